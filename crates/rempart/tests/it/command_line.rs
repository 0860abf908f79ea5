//! The help of every command, the shape of what `--json` prints, and what a person is told.

use crate::golden::Transcript;
use crate::rack::{PROGRAM, Rack};
use std::process::Command;

/// The commands that a help text lists.
fn listed(help: &str) -> Vec<String> {
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = commands.take_while(|line| line.starts_with("  ")).filter(|line| !line.starts_with("   "));
    names
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

fn tell_help(path: &[String], transcript: &mut Transcript) {
    let output =
        Command::new(PROGRAM).args(path).arg("--help").env_remove("REMPART_CONFIG").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    transcript.told(&format!("rempart {} --help", path.join(" ")).replace("  ", " "), 0, &help, "");
    for name in listed(&help) {
        tell_help(&[path, &[name]].concat(), transcript);
    }
}

#[test]
fn every_command_has_a_help_text() {
    let mut transcript = Transcript::default();
    tell_help(&[], &mut transcript);
    transcript.check("help.txt", &[]);
}

/// Its id was shown once, before it was in a cluster.
#[test]
fn a_node_in_no_cluster_is_shown_by_its_name() {
    let rack = Rack::new();
    let node = rack.node("node-a");
    node.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    node.until("it leads", || node.vm("shop")["role"] == "primary");
    let shown = node.vm("shop");
    assert_eq!((&shown["primary"], &shown["in_sync"]), (&"node-a".into(), &serde_json::json!(["node-a"])));
}

#[test]
fn json_keeps_its_shape() {
    let rack = Rack::new();
    let (a, _b, _witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    a.until("the copying is over", || a.vm("shop")["resync"]["running"] == false);
    a.until("an event", || a.vm("shop")["events"].as_array().is_some_and(|events| !events.is_empty()));
    let mut transcript = Transcript::default();
    for arguments in [
        &["status"][..],
        &["vm", "list"],
        &["vm", "show", "shop"],
        &["cluster", "members"],
        &["cluster", "token"],
        &["compare", "shop"],
        &["unprotect", "shop"],
        &["vm", "disk", "resize", "shop", "0", "2M"],
    ] {
        transcript.shape(&format!("rempart {}", arguments.join(" ")), &a.json(arguments));
    }
    transcript.check("json.txt", &[]);
}

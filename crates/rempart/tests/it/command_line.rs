//! The help of every command, the shape of what `--json` prints, and what a person is told.

use crate::golden::Transcript;
use crate::rack::{PROGRAM, Rack};
use serde_json::Value;
use std::fmt::Write;
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

/// Names and types, not values.
fn shape(value: &Value, indent: usize, text: &mut String) {
    let pad = "  ".repeat(indent);
    match value {
        Value::Null => text.push_str("null\n"),
        Value::Bool(_) => text.push_str("bool\n"),
        Value::Number(_) => text.push_str("number\n"),
        Value::String(_) => text.push_str("string\n"),
        Value::Array(items) => match items.first() {
            None => text.push_str("[]\n"),
            Some(first) => {
                text.push_str("list of ");
                shape(first, indent, text);
            }
        },
        Value::Object(fields) => {
            text.push('\n');
            for (name, value) in fields {
                write!(text, "{pad}  {name}: ").unwrap();
                shape(value, indent + 1, text);
            }
        }
    }
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
        let mut text = String::new();
        shape(&a.json(arguments), 0, &mut text);
        let text = text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
        transcript.told(&format!("rempart {} --json", arguments.join(" ")), 0, &text, "");
    }
    transcript.check("json.txt", &[]);
}

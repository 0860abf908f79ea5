//! What the commands of backups say with `--json`: its keys, and what kinds of values they have. Scripts are made for it, so a
//! key that goes or is renamed is a change that somebody has to mean.

use crate::backup::Vault;
use crate::golden::Transcript;
use crate::schedule::schedule;
use serde_json::Value;

const MIB: usize = 1 << 20;

/// What a command says, which succeeds, or finds something to say no to.
fn told(vault: &Vault, arguments: &[&str]) -> Value {
    let answer = vault.run(&[arguments, &["--json"]].concat());
    serde_json::from_str(&answer.out).unwrap_or_else(|_| panic!("{arguments:?}: {}", answer.err))
}

#[test]
fn backups_keep_their_shape_in_json() {
    let vault = Vault::opened_by_file();
    let path = |name: &str| vault.rack.path(name).display().to_string();
    let mut transcript = Transcript::default();
    let mut note = |arguments: &[&str]| -> Value {
        let value = told(&vault, arguments);
        transcript.shape(&format!("rempart {}", arguments.join(" ")), &value);
        value
    };
    let disk = vault.rack.image("disk.raw", 2 * MIB, 7).display().to_string();
    vault.rack.image("other.raw", MIB, 8);

    note(&["repo", "create", &path("second"), "--new-key-file", &path("second-key")]);
    note(&["repo", "show"]);
    note(&["backup", "shop", "--disk", &disk]);
    note(&["backup", "mail", "--disk", &path("other.raw")]);
    note(&["points"]);
    note(&["points", "shop"]);
    note(&["verify", "shop"]);
    note(&["restore", "shop", "--to", &path("restored")]);
    note(&["export", "shop", "--to", &path("exported.qcow2"), "--format", "qcow2"]);
    let to = path("second");
    note(&["copy", "shop", "--to", &to, "--to-key-file", &path("second-key")]);
    note(&["repo", "check"]);
    note(&["repo", "list", &path("")]);
    note(&["repo", "key", "list"]);
    let added = note(&["repo", "key", "add", "--new-key-file", &path("third-key"), "--label", "spare"]);
    let added = added["key"].as_str().expect("its id").to_owned();
    note(&["repo", "key", "remove", &added]);
    vault.ok(&["backup", "shop", "--disk", &disk]);
    note(&["retain", "shop", "--keep-last", "1", "--dry-run"]);
    note(&["retain", "shop", "--keep-last", "1"]);
    note(&["points", "shop", "--forgotten"]);
    note(&["undelete", "--all"]);
    note(&["forget", "shop@2"]);
    note(&["gc", "--dry-run"]);
    note(&["gc"]);

    // Damage has keys of its own.
    let packs = vault.files_below("packs");
    for pack in &packs {
        let mut bytes = std::fs::read(pack).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(pack, bytes).unwrap();
    }
    note(&["verify", "shop"]);
    note(&["repo", "check"]);
    note(&["repo", "repair", "--from", &to, "--from-key-file", &path("second-key")]);
    transcript.check("json-backups.txt", &[(vault.rack.path("").display().to_string(), "DIR/")]);
}

#[test]
fn schedules_keep_their_shape_in_json() {
    let vault = Vault::new();
    let mut node = vault.rack.initialised("node-a");
    schedule(
        &node,
        &vault,
        "0 0 30 2 *",
        "machines = 'all'\nverify = true\nretain = { keep_last = 1 }\ngc = true",
    );
    node.start();
    node.import("shop", &[&vault.rack.image("disk.raw", MIB, 7)]);
    let mut transcript = Transcript::default();
    let config = node.config().display().to_string();
    for arguments in [&["backup", "shop"][..], &["backup", "--all"]] {
        let value = vault.json(&[arguments, &["--config", &config]].concat());
        transcript.shape(&format!("rempart {}", arguments.join(" ")), &value);
    }
    for arguments in [
        &["schedule", "list"][..],
        &["schedule", "run", "nightly"],
        &["schedule", "history", "nightly"],
        &["schedule", "show", "nightly"],
        &["schedule", "list"],
    ] {
        transcript.shape(&format!("rempart {}", arguments.join(" ")), &node.json(arguments));
    }
    transcript.check("json-schedules.txt", &[]);
}

//! Keys of a repository.

use crate::backup::Vault;
use serde_json::Value;

fn keys(vault: &Vault) -> Vec<Value> {
    vault.json(&["repo", "key", "list"]).as_array().unwrap().clone()
}

#[test]
fn keys_come_and_go_and_the_last_one_stays() {
    let vault = Vault::new();
    let path = |name: &str| vault.rack.path(name).to_str().unwrap().to_owned();
    let first = keys(&vault)[0]["key"].as_str().unwrap().to_owned();
    let last = vault.refused(&["repo", "key", "remove", &first]);
    assert!(last.err.contains("it is the last one"), "{}", last.err);

    std::fs::write(vault.rack.path("second"), "staple\n").unwrap();
    let second =
        vault.json(&["repo", "key", "add", "--new-passphrase-file", &path("second"), "--label", "ours"]);
    vault.ok(&["repo", "key", "add", "--new-key-file", &path("third")]);
    assert_eq!(keys(&vault).len(), 3);
    let ours =
        |key: &Value| key["label"] == "ours" && key["key"] == second["key"] && key["by"] == "passphrase";
    assert!(keys(&vault).iter().any(ours));
    vault.ok(&["points", "--passphrase-file", &path("second")]);
    let by_file = || {
        let mut command = vault.command(&["points", "--key-file", &path("third")]);
        command.env_remove("REMPART_PASSPHRASE_FILE").output().unwrap().status.success()
    };
    assert!(by_file());

    vault.ok(&["repo", "key", "remove", &first]);
    let removed = vault.refused(&["points"]);
    assert!(removed.err.contains("the passphrase is wrong"), "{}", removed.err);
    let second_file = ["--passphrase-file", &path("second")];
    let unknown = vault.refused(&[&["repo", "key", "remove", &first], &second_file[..]].concat());
    assert!(unknown.err.contains("no such key"), "{}", unknown.err);
    assert!(by_file());
}

//! Keys of a repository.

use crate::backup::Vault;
use crate::rack::Answer;
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

#[test]
fn a_key_that_only_adds_opens_nothing() {
    let vault = Vault::new();
    let path = |name: &str| vault.rack.path(name).to_str().unwrap().to_owned();
    let add = |name: &str, file: &str| {
        let file = path(file);
        vec!["repo", "key", "add", "--write-only", "--name", name, "--new-key-file", &file]
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let run = |arguments: Vec<String>| vault.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(run(add("web", "web.key")).code, 0);
    let of_web = || keys(&vault).into_iter().find(|key| key["name"] == "web" && key["write_only"] == true);
    let id = of_web().expect("it is listed")["key"].as_str().unwrap().to_owned();

    let key_file = path("web.key");
    for arguments in
        [&["points"][..], &["repo", "show"], &["gc"], &["repo", "key", "list"], &["verify", "web"]]
    {
        let mut command = vault.command(&[arguments, &["--key-file", &key_file]].concat());
        let refused = Answer::of(command.env_remove("REMPART_PASSPHRASE_FILE").output().unwrap());
        assert!(refused.code != 0 && refused.err.contains("opens nothing"), "{arguments:?}: {}", refused.err);
    }
    // One name, one machine.
    std::fs::write(vault.rack.path("disk"), [7; 4096]).unwrap();
    let same = vault.refused(&["backup", "web", "--disk", &path("disk")]);
    assert!(same.err.contains("only adds restore points of `web`"), "{}", same.err);
    vault.ok(&["backup", "shop", "--disk", &path("disk")]);
    let taken = run(add("shop", "shop.key"));
    assert!(taken.code != 0 && taken.err.contains("made without such a key"), "{}", taken.err);
    let strange = run(add("../web", "other.key"));
    assert!(strange.code != 0 && strange.err.contains("cannot be the name"), "{}", strange.err);

    vault.ok(&["repo", "key", "remove", &id]);
    assert!(of_web().is_none());
    vault.ok(&["backup", "web", "--disk", &path("disk")]);
}

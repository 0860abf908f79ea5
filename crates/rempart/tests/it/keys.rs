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

/// Who names no key of `names`, and whose environment does not either, but for what is said in the row.
fn named(vault: &Vault, command: &[&str], names: [&str; 2], variables: [&str; 2]) -> Vec<String> {
    let path = |name: &str| vault.rack.path(name).to_str().unwrap().to_owned();
    let mut answers = Vec::new();
    for row in 0..16u32 {
        let has = |bit: u32| row & (1 << bit) != 0;
        let mut run = vault.command(command);
        for (place, file) in ["key", "passphrase"].into_iter().enumerate() {
            run.env_remove(variables[place]);
            if has(place as u32) {
                run.env(variables[place], path(&format!("{file}-in-environment")));
            }
            if has(place as u32 + 2) {
                run.args([names[place], &path(&format!("{file}-on-line"))]);
            }
        }
        let answer = Answer::of(run.output().unwrap());
        // None of these files is there, so that what is said names the one that is meant.
        let files = ["key-in-environment", "passphrase-in-environment", "key-on-line", "passphrase-on-line"];
        let meant = files.iter().find(|file| answer.err.contains(&path(file)));
        let said = match meant {
            Some(file) => (*file).to_owned(),
            None => answer.err.lines().next().unwrap_or_default().to_owned(),
        };
        assert_ne!(answer.code, 0, "{said}");
        answers.push(said);
    }
    answers
}

#[test]
fn the_command_lines_key_goes_before_the_environments() {
    let vault = Vault::new();
    let disk = vault.rack.path("disk");
    std::fs::write(&disk, [7; 4096]).unwrap();
    vault.ok(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
    // By bits: key file and passphrase in the environment, key file and passphrase on the command line.
    let (none, [key, passphrase], [own_key, own_passphrase]) = (
        "error: there is no key and no terminal to ask for a passphrase",
        ["key-in-environment", "passphrase-in-environment"],
        ["key-on-line", "passphrase-on-line"],
    );
    let both = |names: [&str; 2], place: &str| {
        format!(
            "error: both {} and {} are said {place}: one of them opens the repository",
            names[0], names[1]
        )
    };
    for (command, names, variables) in [
        (
            &["points"][..],
            ["--key-file", "--passphrase-file"],
            ["REMPART_KEY_FILE", "REMPART_PASSPHRASE_FILE"],
        ),
        (
            &["copy", "--all", "--to", "/no/such/place"],
            ["--to-key-file", "--to-passphrase-file"],
            ["REMPART_COPY_KEY_FILE", "REMPART_COPY_PASSPHRASE_FILE"],
        ),
    ] {
        let (in_environment, on_line) =
            (both(names, "in the environment"), both(names, "on the command line"));
        let expected = [
            none,
            key,
            passphrase,
            &in_environment,
            own_key,
            own_key,
            own_key,
            own_key,
            own_passphrase,
            own_passphrase,
            own_passphrase,
            own_passphrase,
            &on_line,
            &on_line,
            &on_line,
            &on_line,
        ];
        let answers = named(&vault, command, names, variables);
        for (row, (said, expected)) in answers.into_iter().zip(expected).enumerate() {
            assert_eq!(said, expected, "{command:?}, row {row:04b}");
        }
    }
    // And what is named opens it, whatever the environment says.
    let passphrase = vault.rack.path("passphrase");
    let mut opened = vault.command(&["points", "--passphrase-file", passphrase.to_str().unwrap()]);
    opened.env("REMPART_KEY_FILE", "/no/such/file").env_remove("REMPART_PASSPHRASE_FILE");
    assert!(opened.output().unwrap().status.success());
}

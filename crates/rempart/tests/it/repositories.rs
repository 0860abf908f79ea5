//! Which repositories there are.

use crate::backup::Vault;
use crate::rack::{Answer, PROGRAM, Rack, noise};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

const MIB: usize = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Without a key, unless `more` names one.
fn list(vault: &Vault, more: &[&str]) -> Answer {
    let mut command = Command::new(PROGRAM);
    command.args(["repo", "list", "--json", "--cache-dir", text(&vault.rack.path("cache"))]).args(more);
    Answer::of(command.stdin(Stdio::null()).output().unwrap())
}

fn listed(answer: &Answer) -> Vec<Value> {
    serde_json::from_str::<Value>(&answer.out).unwrap().as_array().unwrap().clone()
}

#[test]
fn repositories_below_a_place_and_of_schedules_are_listed() {
    let vault = Vault::new();
    let (passphrase, top) = (vault.rack.path("passphrase"), vault.rack.path("all"));
    let disk = vault.rack.path("disk.raw");
    std::fs::write(&disk, noise(1, MIB)).unwrap();
    let (full, empty, foreign) = (top.join("site/full"), top.join("empty"), top.join("foreign"));
    for repo in [&full, &empty] {
        vault.ok(&["repo", "create", text(repo)]);
    }
    let key = vault.rack.path("other.key");
    let mut create = Command::new(PROGRAM);
    create.args(["repo", "create", text(&foreign), "--new-key-file", text(&key)]);
    assert_eq!(Answer::of(create.output().unwrap()).code, 0);
    let backup = vault.json(&["backup", "shop", "--disk", text(&disk), "--repo", text(&full)]);
    assert_eq!(backup["vm"], "shop");

    // What everybody can see.
    let answer = list(&vault, &[text(&top)]);
    assert_eq!(answer.code, 0, "{}", answer.err);
    let all = listed(&answer);
    let urls: Vec<_> = all.iter().map(|one| one["url"].as_str().unwrap()).collect();
    assert_eq!(urls, [text(&empty), text(&foreign), text(&full)]);
    for one in &all {
        assert!(one["points"].is_null() && one["error"].is_null(), "{one}");
        assert!(one["created_unix_ms"].as_u64() > Some(0) && one["size_bytes"].as_u64() > Some(0), "{one}");
    }
    assert_eq!(all[2]["repository"], backup["repository"]);

    // With a key: of one it is not.
    let answer = list(&vault, &[text(&top), "--passphrase-file", text(&passphrase)]);
    assert_eq!(answer.code, 1, "{}", answer.err);
    assert!(answer.err.contains("1 of 3 could not be looked at"), "{}", answer.err);
    let all = listed(&answer);
    let why = all[1]["error"]["message"].as_str().unwrap();
    assert!(why.starts_with("cannot open the repository"), "{why}");
    let points: Vec<_> = all.iter().map(|one| one["points"].as_u64()).collect();
    assert_eq!(points, [Some(0), None, Some(1)]);
    assert!(all[0]["last_backup_unix_ms"].is_null() && !all[1]["repository"].is_null(), "{all:?}");
    assert!(all[2]["last_backup_unix_ms"].as_u64() >= all[2]["created_unix_ms"].as_u64(), "{all:?}");

    // Of schedules, each once, by what opens it there; one is not there.
    let rack = Rack::new();
    let node = rack.initialised("node-a");
    let (nowhere, opens) = (rack.path("nowhere"), format!("passphrase_file = '{}'", passphrase.display()));
    let section = |name: &str, repo: &Path, opens: &str| {
        format!(
            "[[backup]]\nname = '{name}'\nrepository = '{}'\n{opens}\nmachines = 'all'\nschedule = '@daily'\n",
            repo.display()
        )
    };
    let sections = [
        section("nightly", &full, &opens),
        section("weekly", &full, &opens),
        section("other", &foreign, &format!("key_file = '{}'", key.display())),
        section("gone", &nowhere, &opens),
    ];
    node.configure("# [[backup]]\n", &sections.concat());
    let answer = list(&vault, &["--config", text(&node.config())]);
    assert_eq!(answer.code, 1, "{}", answer.err);
    assert!(answer.err.contains("1 of 3 could not be looked at"), "{}", answer.err);
    let all = listed(&answer);
    let of = |repo: &Path| all.iter().find(|one| one["url"] == text(repo)).unwrap();
    assert_eq!(of(&full)["schedules"], serde_json::json!(["nightly", "weekly"]));
    let points = [&full, &foreign, &nowhere].map(|repo| of(repo)["points"].as_u64());
    assert_eq!(points, [Some(1), Some(0), None]);
    let why = of(&nowhere)["error"]["message"].as_str().unwrap();
    assert!(why.starts_with("cannot open the place"), "{why}");
    // For people.
    let mut shown = Command::new(PROGRAM);
    shown.args(["repo", "list", "--config", text(&node.config())]);
    let shown = Answer::of(shown.output().unwrap());
    assert!(shown.err.contains(&format!("`{}`: cannot open the place", nowhere.display())), "{}", shown.err);
    assert!(shown.out.contains("nightly, weekly"), "{}", shown.out);

    // Damaged, and nothing at all.
    std::fs::write(empty.join("repository"), "damaged").unwrap();
    let answer = list(&vault, &[text(&empty)]);
    assert_eq!((answer.code, listed(&answer).len()), (1, 1), "{}", answer.err);
    assert_eq!(listed(&answer)[0]["error"]["message"], "cannot look at it", "{}", answer.out);
    let answer = list(&vault, &[text(&vault.rack.path("cache"))]);
    assert_eq!((answer.code, listed(&answer).len()), (0, 0), "{}", answer.err);
}

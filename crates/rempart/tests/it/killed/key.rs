//! `repo key add` and `repo key remove`: nobody is locked out, and no key lasts that nobody has.

use super::{AT_ONCE, Place, Stage, Story, copy_of, with_points};
use crate::backup::Vault;
use crate::rack::Answer;
use std::path::Path;
use std::process::Command;

/// Whether what lies in a file of the stage's opens the repository.
fn opens(stage: &Stage, key: &str) -> bool {
    stage.run(&["points", "--key-file", &stage.path(key)]).code == 0
}

/// A copy of what is left.
fn apart<'s>(stage: &Stage) -> Stage<'s> {
    let vault = copy_of(&stage.vault);
    Stage { place: Place::Directory(vault.repo()), key: "key", vault: vault.into() }
}

/// What the repository says its keys are, and what lies there of each kind.
fn keys(stage: &Stage, context: &str) -> (Vec<String>, Vec<String>) {
    let listed = stage.json(&["repo", "key", "list"], context);
    let of = |write_only: bool| {
        let keys = listed.as_array().expect("keys").iter().filter(|key| key["write_only"] == write_only);
        keys.map(|key| key["key"].as_str().expect("text").to_owned()).collect()
    };
    (of(false), of(true))
}

/// After a collection there is an object for each key, and none for any other.
fn nothing_else_lasts(stage: &Stage, context: &str) {
    stage.ok(&AT_ONCE, context);
    let (opening, adding) = keys(stage, context);
    for (folder, mut keys) in [("keys/", opening), ("writers/", adding)] {
        let mut objects: Vec<String> = stage.objects(folder).into_keys().collect();
        keys.iter_mut().for_each(|key| key.insert_str(0, folder));
        objects.sort();
        keys.sort();
        assert_eq!(objects, keys, "{context}");
    }
}

/// Plays a command for the keys of a repository whose points stay whatever is killed. `examine` gets what is left, and what was killed.
fn played(
    template: Vault,
    points: &[String],
    killed: impl Fn(&Stage) -> Command + 'static,
    examine: impl Fn(&Stage, &str),
) {
    let story = Story { slice: 6, ..Story::new(template, killed) };
    story.play(|stage, left| {
        assert_eq!(stage.verify_all(&left.context), points, "{}", left.context);
        examine(stage, &left.context);
    });
}

/// Whether the key was there still is told by what was killed.
fn remove_again(stage: &Stage, key: &str, was_there: bool, context: &str) {
    let again = stage.run(&["repo", "key", "remove", key]);
    match was_there {
        true => assert_eq!(again.code, 0, "{context}: {}", again.err),
        false => assert!(again.err.contains("no such key"), "{context}: {}", again.err),
    }
}

/// The command once more, of which the file may be there already; whatever it was is moved away then, as it says.
fn add_again(stage: &Stage, arguments: &[&str], serves: impl Fn() -> bool, context: &str) {
    let file = arguments.last().expect("the new file");
    if Path::new(file).exists() {
        let refused = stage.run(arguments);
        assert!(
            refused.code != 0 && refused.err.contains("if it is what a command left"),
            "{context}: {}",
            refused.err
        );
        if serves() {
            return;
        }
        std::fs::remove_file(file).expect("it is there");
    }
    stage.ok(arguments, context);
    assert!(serves(), "{context}");
}

#[test]
fn a_key_that_is_added_by_a_command_that_is_killed_at_any_step_opens_or_is_added_again() {
    fn add(stage: &Stage) -> [String; 5] {
        let [repo, key, add, file] = ["repo", "key", "add", "--new-key-file"].map(str::to_owned);
        [repo, key, add, file, stage.path("third")]
    }
    let (template, points) = with_points(1, 8);
    let killed = |stage: &Stage| stage.command(&add(stage).each_ref().map(String::as_str));
    played(template, &points, killed, |stage, context| {
        add_again(stage, &add(stage).each_ref().map(String::as_str), || opens(stage, "third"), context);
        assert!(opens(stage, "third") && opens(stage, "key"), "{context}");
        assert_eq!(keys(stage, context).0.len(), 2, "{context}");
        nothing_else_lasts(stage, context);
        stage.all_is_removed(context);
    });
}

#[test]
fn a_key_that_only_adds_is_added_whole_or_again() {
    fn add(stage: &Stage) -> [String; 8] {
        let words =
            ["repo", "key", "add", "--write-only", "--name", "web", "--new-key-file"].map(str::to_owned);
        let [repo, key, add, write_only, name, web, file] = words;
        [repo, key, add, write_only, name, web, file, stage.path("web.key")]
    }
    let (template, points) = with_points(1, 8);
    let killed = |stage: &Stage| stage.command(&add(stage).each_ref().map(String::as_str));
    played(template, &points, killed, |stage, context| {
        let adds = || {
            let (disk, key) = (stage.path("disk.raw"), stage.vault.rack.path("web.key"));
            let mut command = stage.command(&["agent", "backup", "--device", &disk]);
            command.env("REMPART_KEY_FILE", key).env("REMPART_CACHE_DIR", stage.path("its-cache"));
            Answer::of(command.output().expect("it runs")).code == 0
        };
        add_again(stage, &add(stage).each_ref().map(String::as_str), adds, context);
        assert_eq!(keys(stage, context).1.len(), 1, "{context}");
        nothing_else_lasts(stage, context);
    });
}

#[test]
fn a_key_whose_removal_is_killed_at_any_step_locks_nobody_out_and_is_gone_on_with() {
    let (template, points) = with_points(1, 8);
    let path = |name: &str| template.rack.path(name).to_str().expect("text").to_owned();
    let id = |added: serde_json::Value| added["key"].as_str().expect("text").to_owned();
    let first = id(template.json(&["repo", "key", "list"])[0].clone());
    let second = id(template.json(&["repo", "key", "add", "--new-key-file", &path("second-key")]));
    let removed = second.clone();
    let killed = move |stage: &Stage| stage.command(&["repo", "key", "remove", &removed]);
    played(template, &points, killed, |stage, context| {
        let was_there = opens(stage, "second-key");

        // Whoever removes the other one now is refused, or can open it by this one.
        let other = apart(stage);
        let also = other.run(&["repo", "key", "remove", &first]);
        match also.code {
            0 => {
                assert!(opens(&other, "second-key") && !opens(&other, "key"), "{context}: nobody can open it")
            }
            _ => assert!(also.err.contains("it is the last one"), "{context}: {}", also.err),
        }
        assert!(opens(&other, "key") || opens(&other, "second-key"), "{context}");

        // No collection ends what was begun: a thief with the keys could have it remove those of the owner. The list tells.
        let begun = also.code != 0;
        let listed = stage.json(&["repo", "key", "list"], context);
        let of_second = listed.as_array().expect("keys").iter().find(|key| key["key"] == *second);
        let expected = was_there.then(|| begun.into());
        assert_eq!(of_second.map(|key| key["removal_begun"].clone()), expected, "{context}");
        stage.collect(context);
        assert_eq!(opens(stage, "second-key"), was_there, "{context}");

        remove_again(stage, &second, was_there, context);
        assert!(opens(stage, "key") && !opens(stage, "second-key"), "{context}");
        let last = stage.run(&["repo", "key", "remove", &first]);
        assert!(last.code != 0 && last.err.contains("it is the last one"), "{context}: {}", last.err);
        nothing_else_lasts(stage, context);
        stage.all_is_removed(context);
    });
}

#[test]
fn a_key_that_only_adds_whose_removal_is_killed_at_any_step_adds_nothing_more() {
    let (template, points) = with_points(1, 8);
    let file = template.rack.path("web.key").to_str().expect("text").to_owned();
    let added =
        template.json(&["repo", "key", "add", "--write-only", "--name", "web", "--new-key-file", &file]);
    let web = added["key"].as_str().expect("text").to_owned();
    let removed = web.clone();
    let killed = move |stage: &Stage| stage.command(&["repo", "key", "remove", &removed]);
    played(template, &points, killed, |stage, context| {
        let was_there = keys(stage, context).1.len() == 1;
        remove_again(stage, &web, was_there, context);
        assert_eq!(keys(stage, context).1, [""; 0], "{context}");
        nothing_else_lasts(stage, context);
        stage.all_is_removed(context);
    });
}

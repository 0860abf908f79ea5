//! `gc`.

use super::{AT_ONCE, CHUNK, COMMIT, MIB, Story, bytes_below, disk, write_disk};
use super::{with, with_points};
use crate::backup::Vault;
use std::process::Command;

pub fn story() -> Story {
    // Enough segments to be put together, and a pack of which little is of use once the first points are gone.
    let (template, _) = with_points(1, 0);
    for round in 1..18 {
        write_disk(&template, &disk(round, 12));
        super::back_up(&template);
    }
    forget_most(&template);
    let story = Story::new(template, |stage| stage.command(&AT_ONCE));
    let done = story.begin().json(&AT_ONCE, "not killed");
    assert!(done["rewritten_packs"].as_u64() > Some(0), "{done}");
    assert!(done["removed_objects"].as_u64() > Some(20), "{done}");
    story
}

/// All but the newest three points.
fn forget_most(template: &Vault) {
    let points = template.json(&["points"]);
    let points = points.as_array().expect("points");
    let names: Vec<String> = points.iter().map(|point| format!("shop@{}", point["point"])).collect();
    template.ok(&with(&["forget"], &names[..names.len() - 3]));
}

pub fn play(story: &Story) {
    story.play(|stage, left| {
        let context = &left.context;
        assert_eq!(stage.verify_all(context).len(), 3, "{context}");
        let there = stage.bytes("packs/");
        stage.back_up(context);
        let put = stage.bytes("packs/") - there;
        assert!(put <= COMMIT, "{context}: {put} bytes were put of what is all there");
        stage.ok(&AT_ONCE, context);
        assert_eq!(stage.verify_all(context).len(), 4, "{context}");
        let again = stage.json(&AT_ONCE, context);
        assert_eq!(again["removed_objects"], 0, "{context}: {again}");
        stage.all_is_removed(context);
    });
}

#[test]
fn a_collection_that_is_killed_at_any_step_leaves_every_point_and_the_next_goes_on() {
    play(&story());
}

/// By a machine's own key, which only adds.
fn by_its_own(vault: &Vault) -> Command {
    let disk = vault.rack.path("disk.raw");
    let mut command = vault.command(&["agent", "backup", "--device", disk.to_str().expect("text"), "--json"]);
    command.env("REMPART_KEY_FILE", vault.rack.path("its-key"));
    command.env("REMPART_CACHE_DIR", vault.rack.path("its-cache"));
    command
}

fn back_up_by_its_own(vault: &Vault) {
    let answer = by_its_own(vault).output().expect("it runs");
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
}

/// A collection puts what a machine with a key of its own needs anew in that machine's domain, in sessions beside its own.
#[test]
fn a_collection_in_an_agents_domain_that_is_killed_at_any_step_leaves_every_point_and_the_next_goes_on() {
    let template = Vault::opened_by_file();
    let key = template.rack.path("its-key");
    let add = ["repo", "key", "add", "--write-only", "--name", "shop", "--new-key-file"];
    template.ok(&[&add[..], &[key.to_str().expect("text")]].concat());
    for round in 0..18 {
        write_disk(&template, &disk(round, if round == 0 { 0 } else { 12 }));
        back_up_by_its_own(&template);
    }
    forget_most(&template);
    let story = {
        let story = Story::new(template, |stage| stage.command(&AT_ONCE));
        let vault = story.begin().vault;
        let before = bytes_below(&vault.repo().join("packs"));
        let done = vault.json(&AT_ONCE);
        assert!(done["rewritten_packs"].as_u64() > Some(0), "{done}");
        let after = bytes_below(&vault.repo().join("packs"));
        let needed = (2 * MIB + 2 * 12 * CHUNK) as u64;
        assert!(after < needed + needed / 20 && after < before / 4, "{after} of {before} bytes are left");
        story
    };
    story.play(|stage, left| {
        let context = &left.context;
        assert_eq!(stage.verify_all(context).len(), 3, "{context}");
        let there = stage.bytes("packs/");
        back_up_by_its_own(&stage.vault);
        let put = stage.bytes("packs/") - there;
        assert!(put <= COMMIT, "{context}: {put} bytes were put of what is all there");
        stage.ok(&AT_ONCE, context);
        let whole = stage.verify_all(context);
        assert_eq!(whole.len(), 4, "{context}");
        for (point, round) in whole.iter().zip([15, 16, 17, 17]) {
            assert!(stage.restored(point, context) == disk(round, 12), "{context}: {point} is another");
        }
        let again = stage.json(&AT_ONCE, context);
        assert_eq!(again["removed_objects"], 0, "{context}: {again}");
        stage.all_is_removed(context);
    });
}

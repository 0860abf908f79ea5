//! `copy`.

use super::{COMMIT, Story, with_points};
use crate::stage::{self, SECOND, Stage};
use std::process::Command;

fn copy(stage: &Stage) -> Command {
    let (to, key) = (stage.url(), stage.path(stage.key));
    let mut command = stage.command(&["copy", "--all", "--to", &to, "--to-key-file", &key, "--json"]);
    // From the vault's own.
    command.env("REMPART_REPOSITORY", stage.vault.repo()).env("REMPART_KEY_FILE", stage.path("key"));
    command
}

pub fn story() -> Story {
    let (template, _) = with_points(2, 8);
    stage::second(&template);
    let (repository, key) = SECOND;
    Story { repository, key, ..Story::new(template, copy) }
}

pub fn play(story: &Story) {
    story.play(|stage, left| {
        let context = &left.context;
        let copied = stage.verify_all(context);
        let there = stage.bytes("packs/");
        let again = copy(stage).output().expect("it runs");
        assert!(again.status.success(), "{context}: {}", String::from_utf8_lossy(&again.stderr));
        let told: serde_json::Value = serde_json::from_slice(&again.stdout).expect("one JSON value");
        let told = told.as_array().expect("points");
        let was_there = told.iter().filter(|copy| copy["was_there"] == true).count();
        assert_eq!(was_there, copied.len(), "{context}: {told:?}");
        let put = stage.bytes("packs/") - there;
        let most = left.put.saturating_sub(left.told) + 2 * COMMIT;
        assert!(put <= most, "{context}: {put} bytes were sent, and {most} at most were missing");
        assert_eq!(stage.verify_all(context).len(), 2, "{context}");
        stage.vault.ok(&["verify", "shop"]);
        stage.all_is_removed(context);
    });
}

#[test]
fn a_copy_that_is_killed_at_any_step_is_gone_on_with() {
    play(&story());
}

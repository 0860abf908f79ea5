//! `undelete`.

use super::{AT_ONCE, COMMIT, Story, with, with_points};
use crate::killer::{self, Watched};

/// Two of three points were forgotten, and a collection that condemned what only they had was killed before it removed any of it.
#[test]
fn an_undelete_that_is_killed_at_any_step_is_gone_on_with() {
    let (template, points) = with_points(3, 8);
    template.ok(&with(&["forget"], &points[..2]));
    let story = Story::new(template, |stage| stage.command(&AT_ONCE));
    let steps = story.run(&story.begin(), None).steps;
    let removes = |step: &killer::Step| {
        step.call == "unlink" && step.path.components().any(|part| part.as_os_str() == "packs")
    };
    let first = steps.iter().position(removes).expect("packs are removed");
    let folder = &story.template.rack.path("");
    let watched = Watched { folder, requests: false };
    assert!(killer::run(story.template.command(&AT_ONCE), watched, Some(first)).status.is_none());
    let forgotten = story.template.json(&["points", "--forgotten"]);
    let is_condemned = |point: &serde_json::Value| point["remains"]["state"] == "condemned";
    assert!(forgotten.as_array().expect("points").iter().all(is_condemned), "{forgotten}");

    let names = points[..2].to_vec();
    let mut story = Story::new(story.template, move |stage| stage.command(&with(&["undelete"], &names)));
    story.slice = 6;
    let unkilled = {
        let stage = story.begin();
        stage.ok(&with(&["undelete"], &points[..2]), "not killed");
        stage.collect("not killed");
        stage.bytes("packs/")
    };
    story.play(|stage, left| {
        let context = &left.context;
        let whole = stage.verify_all(context);
        let in_between = [points[0].clone(), points[2].clone()];
        let expected = [&points[2..], &in_between[..], &points[..]];
        assert!(expected.contains(&&whole[..]), "{context}: {whole:?}");
        stage.ok(&with(&["undelete"], &points[..2]), context);
        stage.all_is_there(&points, context);
        let left = stage.bytes("packs/");
        assert!(
            left <= unkilled + COMMIT,
            "{context}: {left} bytes are left, and {unkilled} of who is not killed"
        );
        stage.all_is_removed(context);
    });
}

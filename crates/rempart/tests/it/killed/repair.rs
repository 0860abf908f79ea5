//! `repo repair`.

use super::{COMMIT, Stage, Story, disk, with_points};
use std::collections::BTreeSet;
use std::process::Command;

fn repair(stage: &Stage) -> Command {
    let (from, key) = (stage.path("second"), stage.path("key-of-second"));
    stage.command(&["repo", "repair", "--from", &from, "--from-key-file", &key])
}

#[test]
fn a_repair_that_is_killed_at_any_step_is_gone_on_with() {
    let (template, mut points) = with_points(2, 8);
    let before: BTreeSet<_> = template.files_below("packs").into_iter().collect();
    super::write_disk(&template, &disk(2, 8));
    points.push(super::back_up(&template));
    crate::stage::second(&template);
    let [second, key] = ["second", "key-of-second"].map(|name| template.rack.path(name));
    let [second, key] = [&second, &key].map(|path| path.to_str().expect("text"));
    template.ok(&["copy", "--all", "--to", second, "--to-key-file", key]);
    for pack in template.files_below("packs").iter().filter(|pack| !before.contains(*pack)) {
        let mut bytes = std::fs::read(pack).expect("a pack");
        // Chunks and nodes.
        bytes.iter_mut().skip(1000).step_by(5000).for_each(|byte| *byte ^= 1);
        std::fs::write(pack, bytes).expect("it is ours");
    }
    template.refused(&["verify", &points[2]]);
    let story = Story { slice: 6, ..Story::new(template, repair) };
    let unkilled = {
        let stage = story.begin();
        assert!(repair(&stage).output().expect("it runs").status.success());
        stage.collect("not killed");
        stage.bytes("packs/")
    };
    story.play(|stage, left| {
        let context = &left.context;
        assert_eq!(stage.points(context), points, "{context}");
        stage.verify(&points[..2], context);
        let there = stage.bytes("packs/");
        let again = repair(stage).output().expect("it runs");
        assert!(again.status.success(), "{context}: {}", String::from_utf8_lossy(&again.stderr));
        let put = stage.bytes("packs/") - there;
        let most = left.put.saturating_sub(left.told) + 2 * COMMIT;
        assert!(put <= most, "{context}: {put} bytes were put, and {most} at most were missing");
        stage.all_is_there(&points, context);
        let left = stage.bytes("packs/");
        assert!(
            left <= unkilled + 2 * COMMIT,
            "{context}: {left} bytes are left, and {unkilled} of who is not killed"
        );
        stage.all_is_removed(context);
    });
}

//! `backup`.

use super::{COMMIT, Story, disk, with_points, write_disk};

pub fn story() -> Story {
    let (template, _) = with_points(2, 4);
    write_disk(&template, &disk(2, 12));
    Story::new(template, |stage| stage.command(&["backup", "shop", "--disk", &stage.path("disk.raw")]))
}

pub fn play(story: &Story) {
    story.play(|stage, left| {
        let context = &left.context;
        let whole = stage.verify_all(context);
        assert!((2..=3).contains(&whole.len()), "{context}: {whole:?}");
        let there = stage.bytes("packs/");
        stage.back_up(context);
        let put = stage.bytes("packs/") - there;
        let most = left.put.saturating_sub(left.told) + COMMIT;
        assert!(put <= most, "{context}: {put} bytes were put, and {most} at most were missing");
        assert_eq!(stage.verify_all(context).len(), whole.len() + 1, "{context}");
        assert!(stage.restored("shop", context) == disk(2, 12), "{context}: the newest point is another");
        stage.ok(&super::AT_ONCE, context);
        assert_eq!(stage.verify_all(context).len(), whole.len() + 1, "{context}");
        stage.all_is_removed(context);
    });
}

#[test]
fn a_backup_that_is_killed_at_any_step_leaves_every_point_and_the_next_goes_on() {
    play(&story());
}

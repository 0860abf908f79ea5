//! `forget` and `retain`.

use super::{Story, disk, with, with_points};

/// Kills a command that has the first two of three points forgotten, and says why it refuses to do so twice, if it does.
fn play(arguments: impl Fn(&[String]) -> Vec<String>, refusal: Option<&'static str>) {
    let (template, points) = with_points(3, 8);
    let arguments = arguments(&points);
    let command = arguments.clone();
    let mut story = Story::new(template, move |stage| stage.command(&with(&[], &command)));
    story.slice = 6;
    let unkilled = {
        let stage = story.begin();
        stage.ok(&with(&[], &arguments), "not killed");
        stage.collect("not killed");
        stage.bytes("packs/")
    };
    story.play(|stage, left| {
        let context = &left.context;
        let whole = stage.verify_all(context);
        assert!(whole == points || whole == points[2..], "{context}: of both or none, {whole:?}");
        let again = stage.run(&with(&[], &arguments));
        match refusal.filter(|_| whole.len() == 1) {
            Some(why) => assert!(again.code != 0 && again.err.contains(why), "{context}: {}", again.err),
            None => assert_eq!(again.code, 0, "{context}: {}", again.err),
        }
        assert_eq!(stage.verify_all(context), points[2..], "{context}");
        stage.collect(context);
        let left = stage.bytes("packs/");
        assert!(left <= unkilled, "{context}: {left} bytes are left, and {unkilled} of who is not killed");
        assert!(stage.restored("shop", context) == disk(2, 8), "{context}: it is another");
        stage.all_is_removed(context);
    });
}

#[test]
fn a_forget_that_is_killed_at_any_step_forgets_all_that_it_names_or_nothing() {
    let arguments = |points: &[String]| [&["forget".to_owned()], &points[..2]].concat();
    play(arguments, Some("there is no restore point"));
}

#[test]
fn a_retain_that_is_killed_at_any_step_is_gone_on_with() {
    play(|_| ["retain", "--all", "--keep-last", "1"].map(str::to_owned).to_vec(), None);
}

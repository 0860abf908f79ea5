//! The protocol told as transcripts: each file of `testdata` is a story, its commands after `>`, and below each
//! command what follows from it. `REMPART_REWRITE=1` writes what really follows into the files.

mod stage;

use stage::Stage;
use std::fmt::Write as _;
use std::path::Path;

fn play(path: &Path) {
    let script = std::fs::read_to_string(path).expect("a readable transcript");
    let mut stage = Stage::default();
    let mut told = String::new();
    for line in script.lines() {
        if let Some(command) = line.strip_prefix("> ") {
            writeln!(told, "{line}").expect("writes to memory");
            for line in stage.command(command) {
                writeln!(told, "  {line}").expect("writes to memory");
            }
        } else if line.is_empty() || line.starts_with('#') {
            writeln!(told, "{line}").expect("writes to memory");
        }
    }
    if std::env::var_os("REMPART_REWRITE").is_some() {
        std::fs::write(path, told).expect("a writable transcript");
    } else if let Some((place, (told, written))) =
        told.lines().zip(script.lines()).enumerate().find(|(_, (told, written))| told != written)
    {
        panic!("{}:{}: it went\n{told}\ninstead of\n{written}", path.display(), place + 1);
    } else {
        assert_eq!(told.lines().count(), script.lines().count(), "{}: another length", path.display());
    }
}

macro_rules! story {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            play(&Path::new(env!("CARGO_MANIFEST_DIR")).join(concat!("tests/testdata/", stringify!($name), ".txt")));
        }
    )*};
}

story! {
    mirror_write_and_flush
    a_flush_waits_for_what_a_member_lost
    a_peer_that_lags
    reconnect_with_truncation
    a_leader_waits_for_what_the_one_before_ordered
    catch_up_from_the_log
    resync_by_extents
    takeover_recommits_the_tail
    a_new_leader_adopts_a_longer_log
    a_leader_that_lost_what_was_stable_leads_no_more
    a_tail_of_a_mirrored_log_is_no_divergence
    a_forced_takeover_is_shown_as_divergence
    applied_without_a_lasting_word_for_it
    a_blocking_member_is_reported
    a_member_that_blocks_again_and_again
    older_sessions_and_terms_are_dropped
}

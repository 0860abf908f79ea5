//! One of those that run at once: two backups, a collection, a copy and a verify.

use crate::at_once::{AtOnce, rounds};

#[test]
fn one_of_those_that_run_at_once_is_killed_in_each_round_and_nothing_is_lost() {
    // Each of them once.
    AtOnce::new(None).play(rounds(6), true);
}

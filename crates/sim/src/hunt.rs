//! The hunt for planted bugs: checkers that find nothing prove nothing.

use crate::campaign::run_seed;
use crate::faults::Planted;
use crate::scenario::SCENARIOS;
use crate::trace::Verbosity;
use crate::violation::Violation;
use crate::world::Options;
use std::ops::Range;

/// A planted bug was found.
#[derive(Debug)]
pub struct Found {
    /// Worlds, or stories, played until then.
    pub after: u64,
    pub seed: u64,
    pub violation: Violation,
}

fn options(planted: Option<Planted>) -> Options {
    Options { verbosity: Verbosity::Silent, planted }
}

/// Plays the worlds of `seeds` until one breaks a promise that it keeps without the bug.
pub fn in_worlds(bug: Planted, seeds: Range<u64>) -> Option<Found> {
    let first = seeds.start;
    seeds.into_iter().find_map(|seed| {
        let violation = run_seed(seed, options(Some(bug))).1.err()?;
        let of_the_bug = run_seed(seed, options(None)).1.is_ok();
        of_the_bug.then_some(Found { after: seed - first + 1, seed, violation })
    })
}

/// Tells a row of the failure table until it breaks a promise that it keeps without the bug.
///
/// # Panics
/// If there is no row of that name.
pub fn in_row(bug: Planted, row: &str, seeds: Range<u64>) -> Option<Found> {
    let scenario = SCENARIOS.iter().find(|scenario| scenario.name == row).expect("a row of the table");
    let first = seeds.start;
    seeds.into_iter().find_map(|seed| {
        let violation = scenario.tell(seed, options(Some(bug))).1.err()?;
        let of_the_bug = scenario.tell(seed, options(None)).1.is_ok();
        of_the_bug.then_some(Found { after: seed - first + 1, seed, violation })
    })
}

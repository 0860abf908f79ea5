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

/// Plays the worlds of `seeds` until one breaks a promise that it keeps without the bug.
pub fn in_worlds(bug: Planted, seeds: Range<u64>) -> Option<Found> {
    first_found(bug, seeds, |seed, options| run_seed(seed, options).1)
}

/// Tells a row of the failure table until it breaks a promise that it keeps without the bug.
///
/// # Panics
/// If there is no row of that name.
pub fn in_row(bug: Planted, row: &str, seeds: Range<u64>) -> Option<Found> {
    let scenario = SCENARIOS.iter().find(|scenario| scenario.name == row).expect("a row of the table");
    first_found(bug, seeds, |seed, options| scenario.tell(seed, options).1)
}

fn first_found(
    bug: Planted,
    seeds: Range<u64>,
    play: impl Fn(u64, Options) -> Result<(), Violation>,
) -> Option<Found> {
    let with = |planted| Options { verbosity: Verbosity::Silent, planted };
    let first = seeds.start;
    seeds.into_iter().find_map(|seed| {
        let violation = play(seed, with(Some(bug))).err()?;
        let of_the_bug = play(seed, with(None)).is_ok();
        of_the_bug.then_some(Found { after: seed - first + 1, seed, violation })
    })
}

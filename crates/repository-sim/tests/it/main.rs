//! A slice of the campaign on each build, and the seeds that once failed.

#[cfg(feature = "planted-bugs")]
mod planted;

use rempart_repository_sim::{World, campaign};

/// Worlds of an ordinary build, and of an optimised one.
const SEEDS: u64 = if cfg!(debug_assertions) { 500 } else { 2000 };

#[test]
fn a_slice_of_worlds_keeps_every_promise() {
    let report = campaign(0..SEEDS, 1);
    if let Some((seed, broken)) = report.failure {
        panic!("seed {seed}: {broken}\nreplay: cargo xtask sim --repository --seed {seed} --verbose");
    }
    assert_eq!(report.too_seldom(1), [], "in {SEEDS} worlds");
}

#[test]
fn a_seed_determines_its_world() {
    let trace = |seed| {
        let mut world = World::new(seed, true);
        world.run().expect("it keeps its promises");
        world.trace()
    };
    assert_eq!(trace(3), trace(3));
    assert_ne!(trace(3), trace(4));
}

//! A short campaign, for every build; the long one is `cargo xtask sim --seeds 100000`.

use rempart_sim::campaign::{CampaignOptions, campaign, run_seed};
use rempart_sim::world::Options;

#[test]
fn a_seed_tells_the_same_story_twice() {
    for seed in 0..3 {
        let end = || {
            let (world, result) = run_seed(seed, Options::default());
            (world.now(), world.steps(), world.coverage().clone(), result)
        };
        assert_eq!(end(), end(), "seed {seed}");
    }
}

#[test]
fn every_promise_is_kept_in_a_few_worlds() {
    let seeds = if cfg!(debug_assertions) { 20 } else { 300 };
    let report = campaign(0..seeds, &CampaignOptions { threads: 2, ..CampaignOptions::default() });
    if let Some((seed, violation)) = report.failures.first() {
        panic!(
            "seed {seed}: {violation}\nreplay: cargo run --release -p rempart-sim -- --seed {seed} --verbose"
        );
    }
}

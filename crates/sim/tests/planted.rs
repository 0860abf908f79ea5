//! Checkers that find nothing prove nothing: every planted bug must be found within a bounded number of seeds.

use rempart_sim::campaign::{CampaignOptions, campaign};
use rempart_sim::faults::Planted;

/// Worlds a bug may hide in.
const SEEDS: u64 = 2_000;

#[test]
#[ignore = "minutes: cargo test --release -p rempart-sim --test planted -- --ignored"]
fn every_planted_bug_is_found() {
    assert!(Planted::ALL.len() >= 20);
    let mut missed = Vec::new();
    for bug in Planted::ALL {
        let options = CampaignOptions { threads: 2, planted: Some(bug), ..CampaignOptions::default() };
        let report = campaign(0..SEEDS, &options);
        match report.failures.first() {
            Some((seed, violation)) => {
                let short: String = violation.to_string().chars().take(140).collect();
                println!("{bug:?}: seed {seed}, after {} worlds: {short}", report.seeds);
            }
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not found in {SEEDS} worlds: {missed:?}");
}

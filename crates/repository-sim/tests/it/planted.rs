//! A simulation that finds nothing proves nothing: each planted mistake must be found.

use rempart_repository::Bug;
use rempart_repository_sim::hunt;

/// More worlds than any takes.
const WORLDS: u64 = 5000;

#[test]
fn every_planted_mistake_is_found() {
    let missed: Vec<Bug> = Bug::ALL
        .into_iter()
        .filter(|bug| match hunt(*bug, 0..WORLDS) {
            Some((seed, broken)) => {
                println!("{bug:?}: seed {seed}: {broken}");
                false
            }
            None => true,
        })
        .collect();
    assert!(missed.is_empty(), "not found in {WORLDS} worlds: {missed:?}");
}

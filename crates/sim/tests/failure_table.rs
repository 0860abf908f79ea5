//! The failure table in virtual time. `cargo test -p rempart-sim --test failure_table -- --nocapture` prints it.

use rempart_sim::scenario::{SCENARIOS, Scenario};
use rempart_sim::trace::Verbosity;
use rempart_sim::world::Options;

const SEEDS: u64 = if cfg!(debug_assertions) { 2 } else { 20 };

fn check(scenario: &Scenario) {
    match scenario.measure(SEEDS) {
        Ok(measures) => {
            for measure in measures {
                println!("{:<42} {measure}", scenario.name);
            }
        }
        Err((seed, violation)) => {
            let options = Options { verbosity: Verbosity::Tail, planted: None };
            let (stage, _) = scenario.tell(seed, options);
            for line in stage.world.trace().tail() {
                println!("{line}");
            }
            panic!("{} (seed {seed}): {violation}", scenario.name);
        }
    }
}

macro_rules! rows {
    ($($test:ident: $name:literal,)*) => {
        $(
            #[test]
            fn $test() {
                check(SCENARIOS.iter().find(|scenario| scenario.name == $name).expect("a row of the table"));
            }
        )*

        #[test]
        fn every_row_has_its_test() {
            let mut tested = vec![$($name),*];
            let mut names: Vec<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
            tested.sort_unstable();
            names.sort_unstable();
            assert_eq!(tested, names);
        }
    };
}

rows! {
    node_dies_silently: "node dies silently",
    node_dies_with_resets: "node dies, connections reset",
    qemu_killed: "QEMU killed",
    daemon_killed_and_back: "daemon killed, back in time",
    daemon_killed_for_good: "daemon killed, not back",
    peer_dies: "peer loses power",
    peer_cut: "peer's link cut",
    peer_frozen: "peer frozen",
    peer_black_holed_towards_it: "peer black-holed towards it",
    peer_black_holed_from_it: "peer black-holed from it",
    primary_isolated: "primary cut off from peer and witness",
    primary_frozen_and_continued: "primary's machine frozen and continued",
    witness_lost: "witness lost, both nodes up",
    witness_lost_while_solo: "witness lost while solo",
    witness_and_peer_lost: "witness and peer lost",
    link_flaps: "link flapping for a minute",
    disk_fails_on_secondary: "fsync error on the secondary",
    disk_fails_on_primary: "fsync error on the primary",
    primary_dies_during_resync: "primary dies during a resync",
    both_lose_power: "both nodes lose power",
    back_after_long: "node back after its journal was trimmed",
}

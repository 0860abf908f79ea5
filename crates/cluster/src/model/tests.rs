//! Small bounds, in seconds; large ones behind `REMPART_MODEL_WORLDS`; and every planted bug.

use super::*;

const NOTHING: Bounds = Bounds {
    nodes: 2,
    epochs: 3,
    writes: 0,
    crashes: 0,
    power_cuts: 0,
    silences: 0,
    disconnects: 0,
    handovers: 0,
    deadlines: 0,
    disk_failures: 0,
    spoilt_copies: 0,
};

const SCENES: &[(&str, Start, Bounds)] = &[
    ("cut links", Start::Mirrored, Bounds { writes: 1, disconnects: 1, deadlines: 2, ..NOTHING }),
    ("a silent register", Start::Mirrored, Bounds { writes: 1, silences: 1, deadlines: 2, ..NOTHING }),
    ("a process dies", Start::Mirrored, Bounds { writes: 1, crashes: 1, deadlines: 1, ..NOTHING }),
    ("power fails", Start::Mirrored, Bounds { writes: 1, power_cuts: 1, deadlines: 1, ..NOTHING }),
    ("admission", Start::Alone, Bounds { writes: 1, silences: 1, deadlines: 1, ..NOTHING }),
    ("admission and power", Start::Alone, Bounds { writes: 1, power_cuts: 1, deadlines: 1, ..NOTHING }),
    ("restart without register", Start::Mirrored, Bounds { crashes: 1, silences: 2, ..NOTHING }),
    ("handover", Start::Mirrored, Bounds { handovers: 1, silences: 1, deadlines: 1, ..NOTHING }),
    ("handover and crash", Start::Mirrored, Bounds { handovers: 1, crashes: 1, ..NOTHING }),
    ("a disk fails", Start::Mirrored, Bounds { writes: 1, disk_failures: 1, deadlines: 1, ..NOTHING }),
    ("three replicas", Start::Mirrored, Bounds { nodes: 3, epochs: 2, deadlines: 1, ..NOTHING }),
    ("three replicas, admission", Start::Alone, Bounds { nodes: 3, epochs: 2, ..NOTHING }),
    ("a spoilt copy", Start::Mirrored, Bounds { crashes: 1, spoilt_copies: 1, deadlines: 1, ..NOTHING }),
];

fn must_hold(name: &str, start: Start, bounds: Bounds, order: Order, most: usize) -> Explored {
    let began = std::time::Instant::now();
    match explore(World::started(start, bounds), order, most, 32) {
        Ok(explored) => {
            println!("{name}: {explored:?} {:.1?}", began.elapsed());
            explored
        }
        Err(found) => {
            let story = tell(&World::started(start, bounds), &found.path);
            panic!("{name}: {} worlds\n{story}\n{:?}", found.worlds, found.violation)
        }
    }
}

#[test]
fn every_promise_holds_in_every_order_of_events() {
    for &(name, start, bounds) in SCENES {
        must_hold(name, start, bounds, Order::ShortestFirst, 15_000);
    }
}

#[test]
#[ignore]
fn sizes() {
    for &(name, start, bounds) in SCENES {
        let deadlines = bounds.deadlines.min(1);
        let bounds = Bounds { epochs: 2, deadlines, ..bounds };
        must_hold(name, start, bounds, Order::DeepestFirst, 1_000_000);
    }
}

/// Where each mistake shows: just enough may happen.
#[cfg(feature = "planted-bugs")]
fn hunting_ground(bug: crate::Bug) -> (Start, Bounds) {
    use crate::Bug::*;
    let mirrored = |bounds| (Start::Mirrored, bounds);
    let alone = |bounds| (Start::Alone, bounds);
    let suspicion = Bounds { epochs: 2, deadlines: 1, ..NOTHING };
    match bug {
        SwapBeforePromise | OutsiderTakesOver => mirrored(Bounds { deadlines: 2, ..NOTHING }),
        AckAfterPromise | LeaseWithoutPeer | NoWait => mirrored(suspicion),
        WaitFromSuspicion | SoloLeaseWhileAdmitting => alone(suspicion),
        SameTermAgain => mirrored(Bounds { crashes: 1, silences: 1, ..NOTHING }),
        RestartForgetsAttempts => alone(Bounds { epochs: 1, writes: 1, crashes: 1, silences: 1, ..NOTHING }),
        NoUnion => alone(Bounds { epochs: 1, writes: 1, ..NOTHING }),
        UnknownIsLost => alone(Bounds { epochs: 1, writes: 1, silences: 1, ..NOTHING }),
        AdmitEarly => mirrored(Bounds { writes: 1, deadlines: 1, ..NOTHING }),
        JoinOutlivesAttempt => alone(Bounds { epochs: 2, writes: 1, deadlines: 1, ..NOTHING }),
        UnusableLeads => mirrored(Bounds { crashes: 1, spoilt_copies: 1, ..NOTHING }),
        SourceTakesBack => mirrored(Bounds { epochs: 1, handovers: 1, silences: 1, deadlines: 2, ..NOTHING }),
        HandoverWithMachine => mirrored(Bounds { epochs: 1, handovers: 1, deadlines: 1, ..NOTHING }),
    }
}

#[cfg(feature = "planted-bugs")]
#[test]
fn every_planted_bug_is_found() {
    let mut missed = Vec::new();
    for bug in crate::Bug::ALL {
        let began = std::time::Instant::now();
        let (start, bounds) = hunting_ground(bug);
        match explore(World::started(start, bounds).with_bug(bug), Order::ShortestFirst, 200_000, 16) {
            Err(found) => {
                let (steps, worlds) = (found.path.len(), found.worlds);
                println!("{bug:?}: {steps} steps, {worlds} worlds, {:.1?}", began.elapsed());
                println!("    {}", format!("{:?}", found.violation).lines().next().unwrap_or_default());
            }
            Ok(explored) => {
                println!("{bug:?} MISSED {explored:?} {:.1?}", began.elapsed());
                missed.push(bug);
            }
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}

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
        must_hold(name, start, bounds, Order::ShortestFirst, 20_000);
    }
}

#[test]
#[ignore]
fn sizes() {
    for &(name, start, bounds) in SCENES {
        must_hold(name, start, Bounds { epochs: 2, ..bounds }, Order::DeepestFirst, 3_000_000);
    }
}

#[cfg(feature = "planted-bugs")]
#[test]
fn every_planted_bug_is_found() {
    let mut missed = Vec::new();
    for bug in crate::Bug::ALL {
        let began = std::time::Instant::now();
        let found = SCENES.iter().find_map(|&(name, start, bounds)| {
            let world = World::started(start, bounds).with_bug(bug);
            explore(world, Order::ShortestFirst, 60_000, 16).err().map(|found| (name, found))
        });
        match found {
            Some((name, found)) => {
                let (steps, worlds) = (found.path.len(), found.worlds);
                println!("{bug:?}: {name}, {steps} steps, {worlds} worlds, {:.1?}", began.elapsed());
                println!("    {}", format!("{:?}", found.violation).lines().next().unwrap_or_default());
            }
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}

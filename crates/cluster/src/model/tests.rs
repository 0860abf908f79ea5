//! The small scenes to their end and the large ones in part; and every planted bug.
//!
//! `REMPART_MODEL_WORLDS=2000000 cargo test -p rempart-cluster --release promise -- --nocapture` goes further.

use super::*;

/// Worlds looked at of a scene that is too large for every test run.
const GLIMPSE: usize = 4_000;

fn must_hold(scene: &Scene, order: Order, most: usize, heal_one_in: u64) -> Explored {
    let began = std::time::Instant::now();
    match explore(World::started(scene.start, scene.bounds), order, most, heal_one_in) {
        Ok(explored) => {
            println!("{}: {explored:?} {:.1?}", scene.name, began.elapsed());
            explored
        }
        Err(found) => {
            let story = tell(&World::started(scene.start, scene.bounds), &found.path);
            panic!("{}: {} worlds\n{story}\n{:?}", scene.name, found.worlds, found.violation)
        }
    }
}

#[test]
fn every_promise_holds_in_every_order_of_events() {
    let further = std::env::var("REMPART_MODEL_WORLDS").ok();
    let further = further.map(|text| text.parse::<usize>().expect("REMPART_MODEL_WORLDS is a number"));
    for scene in SCENES {
        if scene.small {
            let explored = must_hold(scene, Order::ShortestFirst, usize::MAX, 16);
            assert!(explored.complete && explored.worlds > 20, "{}: {explored:?}", scene.name);
        } else if let Some(most) = further {
            must_hold(scene, Order::DeepestFirst, most, 256);
        } else {
            must_hold(scene, Order::ShortestFirst, GLIMPSE, 16);
        }
    }
}

#[cfg(feature = "planted-bugs")]
mod planted {
    use super::*;
    /// Where each mistake shows: just enough may happen.
    fn hunting_ground(bug: crate::Bug) -> (Start, Bounds) {
        use crate::Bug::*;
        let mirrored = |bounds| (Start::Mirrored, bounds);
        let alone = |bounds| (Start::Alone, bounds);
        let suspicion = Bounds { epochs: 2, deadlines: 1, ..Bounds::NOTHING };
        match bug {
            SwapBeforePromise | OutsiderTakesOver => mirrored(Bounds { deadlines: 2, ..Bounds::NOTHING }),
            AckAfterPromise | LeaseWithoutPeer | NoWait => mirrored(suspicion),
            WaitFromSuspicion | SoloLeaseWhileAdmitting => alone(suspicion),
            RestartAsksNobody => {
                alone(Bounds { epochs: 1, power_cuts: 1, forces: 1, silences: 1, ..Bounds::NOTHING })
            }
            OrderUntold => {
                alone(Bounds { epochs: 0, power_cuts: 2, forces: 1, silences: 1, ..Bounds::NOTHING })
            }
            SameTermAgain => mirrored(Bounds { crashes: 1, silences: 1, ..Bounds::NOTHING }),
            RestartForgetsAttempts => {
                alone(Bounds { epochs: 1, writes: 1, crashes: 1, silences: 1, ..Bounds::NOTHING })
            }
            NoUnion => alone(Bounds { epochs: 1, writes: 1, ..Bounds::NOTHING }),
            UnknownIsLost => alone(Bounds { epochs: 1, writes: 1, silences: 1, ..Bounds::NOTHING }),
            AdmitEarly => mirrored(Bounds { writes: 1, deadlines: 1, ..Bounds::NOTHING }),
            JoinOutlivesAttempt => alone(Bounds { epochs: 2, writes: 1, deadlines: 1, ..Bounds::NOTHING }),
            CaughtUpOutlivesTerm => {
                mirrored(Bounds { writes: 1, handovers: 1, deadlines: 1, ..Bounds::NOTHING })
            }
            UnusableLeads => mirrored(Bounds { crashes: 1, spoilt_copies: 1, ..Bounds::NOTHING }),
            SourceTakesBack => {
                mirrored(Bounds { epochs: 1, handovers: 1, silences: 1, deadlines: 2, ..Bounds::NOTHING })
            }
            HandoverWithMachine => {
                mirrored(Bounds { epochs: 1, handovers: 1, deadlines: 1, ..Bounds::NOTHING })
            }
        }
    }

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
}

//! Every world that can be reached, each once.

use crate::model::check::Violation;
use crate::model::step::Step;
use crate::model::world::{Bounds, Start, Vm, World};
use crate::timers::Timer;
use crate::{Command, Event};
use rempart_types::Epoch;
use std::collections::{HashSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What an exploration saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Explored {
    pub worlds: usize,
    pub steps: usize,
    /// Worlds from which healing was tried.
    pub healed: usize,
    /// The longest path.
    pub depth: usize,
    /// Nothing within the bounds was left out.
    pub complete: bool,
}

/// A broken promise, and how it came to be.
#[derive(Debug, Clone)]
pub struct Found {
    pub violation: Violation,
    /// From the start on.
    pub path: Vec<Step>,
    pub worlds: usize,
}

struct Visit {
    parent: u32,
    depth: u16,
    step: Option<Step>,
}

impl World {
    /// A group that was created and works, ready to be explored within `bounds`.
    pub fn started(start: Start, bounds: Bounds) -> World {
        let mut world = World::empty(Bounds { deadlines: 100, ..bounds });
        let count = if start == Start::Unprotected { 1 } else { bounds.nodes };
        world.replicas = count;
        let calm = "nothing goes wrong before the start";
        for node in 0..count {
            world.start(node).expect(calm);
        }
        world.settle(false);
        world.give(0, Event::Command(Command::Lead), crate::model::world::Cause::Other).expect(calm);
        world.settle(false);
        for a in 0..count {
            for b in a + 1..count {
                world.take(Step::Connect { a, b }).expect(calm);
            }
        }
        world.settle(start == Start::Mirrored);
        assert!(world.nodes[0].vm == Vm::Running, "the machine runs at the start");
        let in_sync = world.register.as_ref().expect("it was created").in_sync.len();
        assert_eq!(in_sync, if start == Start::Mirrored { usize::from(count) } else { 1 });
        let epoch = world.register.as_ref().expect("it was created").epoch;
        world.last_epoch = Epoch(epoch.0 + u64::from(bounds.epochs));
        world.left = bounds;
        world
    }

    /// Plants a mistake into every member, now and after each restart.
    #[cfg(feature = "planted-bugs")]
    #[must_use]
    pub fn with_bug(mut self, bug: crate::Bug) -> World {
        self.bug = Some(bug);
        for member in self.nodes.iter_mut().filter_map(|node| node.member.as_mut()) {
            member.plant(bug);
        }
        self
    }

    /// Everything quick happens, and a few beacons. `mirror`: the followers catch up, too.
    fn settle(&mut self, mirror: bool) {
        for turn in 0..500 {
            let quick = self.steps().into_iter().find(|step| match step {
                Step::Deliver { .. } | Step::Read { .. } | Step::Answer { .. } | Step::Land { .. } => true,
                Step::Persisted { .. } | Step::Sync { .. } | Step::MachineGone { .. } => true,
                Step::Timer { timer: Timer::Beacon, .. } => turn % 100 < 3,
                Step::Ship { .. } => mirror,
                _ => false,
            });
            if let Some(step) = quick {
                self.take(step).expect("nothing goes wrong before the start");
            }
        }
    }

    fn fingerprint(&self) -> u128 {
        let mut hasher = Fingerprint { low: 0x9e37_79b9_7f4a_7c15, high: 0xc2b2_ae3d_27d4_eb4f };
        self.hash(&mut hasher);
        (u128::from(hasher.finish()) << 64) | u128::from(mix(hasher.low))
    }
}

/// Two multiplicative hashes side by side: fast, and 128 bits make a chance collision unlikely among billions.
struct Fingerprint {
    low: u64,
    high: u64,
}

impl Hasher for Fingerprint {
    fn finish(&self) -> u64 {
        mix(self.high)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(u64::from(word));
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        self.low = (self.low.rotate_left(23) ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        self.high = (self.high.rotate_left(41) ^ word).wrapping_mul(0x9fb2_1c65_1e98_df25);
    }

    fn write_u128(&mut self, word: u128) {
        self.write_u64(word as u64);
        self.write_u64((word >> 64) as u64);
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn write_isize(&mut self, word: isize) {
        self.write_u64(word as u64);
    }
}

fn mix(mut word: u64) -> u64 {
    word ^= word >> 32;
    word = word.wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^ (word >> 29)
}

/// In which order worlds are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Breadth first: what is found has the shortest path. Keeps every world at the edge in memory.
    ShortestFirst,
    /// Depth first: for large bounds.
    DeepestFirst,
}

/// Explores from `start` until nothing new is found, `most` worlds were seen, or a promise breaks.
/// Healing is tried from one world in `heal_one_in` (0: never).
pub fn explore(start: World, order: Order, most: usize, heal_one_in: u64) -> Result<Explored, Box<Found>> {
    let mut seen = HashSet::from([start.fingerprint()]);
    let mut visits = vec![Visit { parent: 0, step: None, depth: 0 }];
    let mut frontier = VecDeque::from([(0usize, start)]);
    let mut explored = Explored { worlds: 1, steps: 0, healed: 0, depth: 0, complete: true };
    let next_of = |frontier: &mut VecDeque<(usize, World)>| match order {
        Order::ShortestFirst => frontier.pop_front(),
        Order::DeepestFirst => frontier.pop_back(),
    };
    while let Some((at, world)) = next_of(&mut frontier) {
        for step in world.steps() {
            explored.steps += 1;
            let mut next = world.clone();
            let depth = visits[at].depth.saturating_add(1);
            let found = |violation, visits: &[Visit], worlds| {
                let mut path = path_to(visits, at);
                path.push(step);
                Box::new(Found { violation, path, worlds })
            };
            guarded(|| next.take(step)).map_err(|v| found(v, &visits, explored.worlds))?;
            let fingerprint = next.fingerprint();
            if !seen.insert(fingerprint) {
                continue;
            }
            explored.worlds += 1;
            explored.depth = explored.depth.max(usize::from(depth));
            if heal_one_in > 0 && (fingerprint as u64).is_multiple_of(heal_one_in) {
                explored.healed += 1;
                let healing = next.clone();
                guarded(|| healing.heal()).map_err(|v| found(v, &visits, explored.worlds))?;
            }
            let parent = u32::try_from(at).expect("fewer worlds than memory holds");
            visits.push(Visit { parent, step: Some(step), depth });
            if explored.worlds >= most {
                explored.complete = false;
                return Ok(explored);
            }
            frontier.push_back((visits.len() - 1, next));
        }
    }
    Ok(explored)
}

/// Tells a path step by step, with what matters of the world after each.
pub fn tell(start: &World, path: &[Step]) -> String {
    let mut world = start.clone();
    let mut text = format!("{}\n", world.in_short());
    for &step in path {
        let outcome = guarded(|| world.take(step));
        text.push_str(&format!("{step:?}\n{}\n", world.in_short()));
        if let Err(violation) = outcome {
            text.push_str(&format!("=> {violation:?}\n"));
        }
    }
    text
}

fn path_to(visits: &[Visit], mut at: usize) -> Vec<Step> {
    let mut path = Vec::new();
    while let Some(step) = visits[at].step {
        path.push(step);
        at = visits[at].parent as usize;
    }
    path.reverse();
    path
}

/// A failed assertion of a member is a finding like any other.
fn guarded(turn: impl FnOnce() -> Result<(), Violation>) -> Result<(), Violation> {
    catch_unwind(AssertUnwindSafe(turn)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default();
        Err(Violation::Assertion { message })
    })
}

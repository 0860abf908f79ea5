//! What may go wrong together in one exploration.

use crate::model::world::{Bounds, Start};

/// One exploration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scene {
    pub name: &'static str,
    pub start: Start,
    pub bounds: Bounds,
    /// Small enough to be explored to its end in every test run.
    pub small: bool,
}

const fn scene(name: &'static str, start: Start, bounds: Bounds) -> Scene {
    Scene { name, start, bounds, small: false }
}

const fn small(name: &'static str, start: Start, bounds: Bounds) -> Scene {
    Scene { name, start, bounds, small: true }
}

const MIRRORED: Start = Start::Mirrored;
const ALONE: Start = Start::Alone;
const UNPROTECTED: Start = Start::Unprotected;
const B: Bounds = Bounds::NOTHING;

/// Two replicas unless said otherwise, and three changes of the register, two where one says so: with the creation and
/// the admission before the start, at least four epochs.
pub const SCENES: &[Scene] = &[
    small("a deadline passes", MIRRORED, Bounds { epochs: 2, deadlines: 1, ..B }),
    small("the primary's or the peer's process dies", MIRRORED, Bounds { crashes: 1, writes: 1, ..B }),
    small("power fails", MIRRORED, Bounds { power_cuts: 1, writes: 1, ..B }),
    small("the link breaks", MIRRORED, Bounds { disconnects: 1, writes: 2, ..B }),
    small("a restart without register", MIRRORED, Bounds { crashes: 1, silences: 2, ..B }),
    small("a handover whose answer is lost", MIRRORED, Bounds { handovers: 1, silences: 1, ..B }),
    small("a handover and a crash", MIRRORED, Bounds { handovers: 1, crashes: 1, ..B }),
    small("a spoilt copy", MIRRORED, Bounds { crashes: 1, spoilt_copies: 1, ..B }),
    small("a disk fails", MIRRORED, Bounds { disk_failures: 1, writes: 1, ..B }),
    small("an admission whose answer is lost", ALONE, Bounds { silences: 1, writes: 2, ..B }),
    small("a register moves", UNPROTECTED, Bounds { moves: 1, writes: 1, ..B }),
    small("a register moves, a crash", UNPROTECTED, Bounds { moves: 2, crashes: 1, ..B }),
    small("a register moves, power fails", UNPROTECTED, Bounds { moves: 2, power_cuts: 1, ..B }),
    small("a register moves, answers are lost", UNPROTECTED, Bounds { moves: 2, silences: 1, ..B }),
    small(
        "the other one is forced to lead, then the first returns",
        ALONE,
        Bounds { epochs: 1, power_cuts: 1, forces: 1, silences: 1, ..B },
    ),
    small("three replicas, admission", ALONE, Bounds { nodes: 3, epochs: 2, ..B }),
    scene("a deadline passes, a write", MIRRORED, Bounds { epochs: 2, deadlines: 1, writes: 1, ..B }),
    scene("the register is silent", MIRRORED, Bounds { epochs: 2, deadlines: 1, silences: 1, ..B }),
    scene("a crash and a deadline", MIRRORED, Bounds { crashes: 1, deadlines: 1, writes: 1, ..B }),
    scene("power and a deadline", MIRRORED, Bounds { power_cuts: 1, deadlines: 1, writes: 1, ..B }),
    scene("cut links", MIRRORED, Bounds { disconnects: 1, deadlines: 2, writes: 1, ..B }),
    scene("a silent register and a write", MIRRORED, Bounds { silences: 1, deadlines: 2, writes: 1, ..B }),
    scene("a handover and a deadline", MIRRORED, Bounds { epochs: 2, handovers: 1, deadlines: 1, ..B }),
    scene("a handover and back by takeover", MIRRORED, Bounds { handovers: 1, deadlines: 1, writes: 1, ..B }),
    scene("a handover, everything late", MIRRORED, Bounds { handovers: 1, silences: 1, deadlines: 1, ..B }),
    scene("a disk fails and a deadline", MIRRORED, Bounds { disk_failures: 1, deadlines: 1, writes: 1, ..B }),
    scene(
        "a spoilt copy and a deadline",
        MIRRORED,
        Bounds { crashes: 1, spoilt_copies: 1, deadlines: 1, ..B },
    ),
    scene("an admission and a crash", ALONE, Bounds { epochs: 2, crashes: 1, writes: 1, ..B }),
    scene("an admission and a power cut", ALONE, Bounds { epochs: 2, power_cuts: 1, writes: 1, ..B }),
    scene("an admission, everything late", ALONE, Bounds { silences: 1, deadlines: 1, writes: 1, ..B }),
    scene(
        "a move, everything late",
        UNPROTECTED,
        Bounds { moves: 2, silences: 2, crashes: 1, deadlines: 1, ..B },
    ),
    scene(
        "forced in a mirrored group, answers are lost",
        MIRRORED,
        Bounds { epochs: 2, power_cuts: 2, forces: 1, silences: 2, ..B },
    ),
    scene(
        "the one that is forced dies before it leads, and both return",
        ALONE,
        Bounds { epochs: 0, power_cuts: 2, forces: 1, silences: 1, ..B },
    ),
    scene("three replicas", MIRRORED, Bounds { nodes: 3, epochs: 2, deadlines: 1, ..B }),
];

//! The deterministic world around the real engine. Never shipped.
//!
//! One seed draws a world: two nodes with their clocks, disks and daemons, the cables between them, a witness, and a
//! machine that uses its disks. Faults come first, as many and as odd as the seed says; then everything is healed,
//! and the pair must find back to one primary, a running machine and equal images. Checkers watch every step. The
//! code under test is the code that ships: this crate only replaces what is outside it.

pub mod agenda;
pub mod clock;
pub mod coverage;
pub mod guest;
pub mod history;
pub mod network;
pub mod pattern;
pub mod rng;
pub mod trace;
pub mod violation;

//! The deterministic world around the real engine. Never shipped.
//!
//! One seed draws a world: two nodes with their clocks, disks and daemons, the cables between them, a witness, and a
//! machine that uses its disks. Faults come first, as many and as odd as the seed says; then everything is healed,
//! and the pair must find back to one primary, a running machine and equal images. Checkers watch every step. The
//! code under test is the code that ships: this crate only replaces what is outside it.

pub mod agenda;
mod audit;
mod backups;
pub mod book;
pub mod campaign;
mod check;
pub mod clock;
mod converge;
pub mod coverage;
mod daemon;
pub mod drive;
pub mod faults;
pub mod guest;
mod guest_io;
pub mod history;
pub mod hunt;
mod hypervisor;
pub mod machine;
pub mod network;
mod operator;
pub mod pattern;
pub mod reached;
pub mod rng;
mod rot;
pub mod scenario;
pub mod setup;
pub mod trace;
pub mod violation;
mod wire;
pub mod witness;
pub mod world;

//! An exhaustive check of [`Member`](crate::Member) at small size: every order of every event, within bounds.
//!
//! A few replicas, one register and the connections between them are one [`World`]. Around the real members it has
//! a tiny log (each record is only the term it was written in), a machine and a guard. From a start, every possible
//! next step is taken: a message arrives, a timer goes off, a request is answered or not, a swap lands now, later or
//! never, a write reaches the disk, a process or a machine dies. Each new situation is checked against the
//! invariants; from a sample of them everything is healed, and somebody must come to lead with all in sync again.
//!
//! **Time** does not pass: each member always sees the same moment, and the explorer lets its timers go off in any
//! order. Only one thing about time is promised by the numbers (see `Timing::takeover_wait`) and kept here: when a
//! takeover's wait is over, every lease that rests on something sent before the wait began has ended.

mod check;
mod heal;
mod scenes;
mod search;
mod step;
#[cfg(test)]
mod tests;
mod world;

pub use check::Violation;
pub use scenes::{SCENES, Scene};
pub use search::{Explored, Found, Order, explore, tell};
pub use step::Step;
pub use world::{Bounds, Start, World};

pub use crate::timers::Timer;

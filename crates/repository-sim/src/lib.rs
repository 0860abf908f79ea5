//! A deterministic simulation of a repository: writers, collectors, fencers, readers, undeleters and liars over the product's own log and
//! collection, with lost answers, late effects, crashes and pauses. Never shipped.
//!
//! [`World`]: one seed. [`campaign`]: many. Nothing in the code that is tested knows that it is simulated: it blocks in
//! [`place`], where others run.

mod actor;
mod book;
mod campaign;
mod fiber;
mod keys;
mod liar;
mod place;
mod reading;
mod rng;
mod undeleting;
mod world;

#[cfg(feature = "planted-bugs")]
pub use campaign::hunt;
pub use campaign::{Report, campaign};
pub use world::World;

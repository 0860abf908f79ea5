//! Who leads a group, in which term, with whose acknowledgement, and whether its machine may run.
//!
//! One [`Member`] is one replica's view of one group. It has no socket, file, clock or thread: it takes an
//! [`Event`] and the time, and appends [`Action`]s. The rules it keeps:
//!
//! - The group's configuration is one [`RegisterValue`](rempart_types::RegisterValue), changed only by
//!   compare-and-swap. From before a swap is sent until its outcome is known, every replica named by the old
//!   *or* the new value must acknowledge.
//! - A replica never undoes a promise; whatever depends on a promise waits until it is durable.
//! - Only a member of the in-sync set leads, and only after the register says so.
//! - A lease keeps a cut-off primary's machine from running. It never protects data.
//!
//! Start at [`Role`] for the states, [`Event`] and [`Action`] for the contract, [`Timing`] for the times.

mod action;
#[cfg_attr(not(feature = "planted-bugs"), allow(dead_code))]
mod bug;
mod claim;
mod config;
mod desk;
mod event;
mod following;
mod force;
mod handover;
mod leading;
mod machine;
mod member;
mod message;
#[cfg(any(test, feature = "model"))]
pub mod model;
mod moving;
mod peer;
mod persistent;
mod reconcile;
mod status;
mod timers;
#[cfg(test)]
mod transcripts;

pub use action::{Action, Condition, FrozenWhy, HandoverFailure, Receipt, RefusedWhy, RequestId};
#[cfg(feature = "planted-bugs")]
pub use bug::Bug;
pub use config::{Config, Timing, TimingError};
pub use event::{Command, Event, ReadOutcome, SwapOutcome};
pub use member::Member;
pub use message::Message;
pub use persistent::{Attempt, PersistentState};
pub use status::{PeerStatus, Role, Standing, Status};

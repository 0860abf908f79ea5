//! One replica of one group: store, replication and cluster composed, without I/O, clock or threads.
//!
//! The daemon and the simulator run exactly this. The caller executes [`Action`]s and feeds back [`Input`]s;
//! guest requests have calls of their own, because they are the hot path. One loop turn is:
//!
//! 1. everything that is ready goes in: guest requests by their calls, [`Engine::handle`] for the rest;
//! 2. [`Engine::end_turn`]: what was written becomes one batch, reads are started, acknowledgements go out;
//! 3. the actions are executed in order. I/O that completes at once (a small write to the page cache) is fed back
//!    in the same turn, followed by another `end_turn`, before anything is waited for;
//! 4. wait for sockets, completions or [`Engine::next_wake`].

mod action;
mod commands;
mod compare;
mod configs;
mod control;
mod disks;
mod engine;
mod flush_habit;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod guest;
mod input;
mod message;
mod params;
mod requests;
mod resync;
mod route;
mod scan;
mod snapshots;
mod status;
mod view;
mod work;

pub use action::{Action, DigestJob, RegisterRequest, Report, VmAction};
pub use engine::Engine;
pub use guest::{Bytes, DiskRange, GuestError, ReadPiece, Reply, Token, WriteBuffer};
pub use input::{Command, CommandError, CommandId, CommandOutput, Input, RegisterReply, VmFact};
pub use message::{MAX_META_BYTES, MAX_PAYLOAD_BYTES, PeerMessage, WireError};
pub use params::{OpenError, Params};
pub use rempart_replication::Digest;
pub use status::{Glance, PeerStatus, ResyncStatus, Role, Status};
pub use view::{ChangesSince, OpenedView, ViewId, ViewReadError, ViewedExtents};

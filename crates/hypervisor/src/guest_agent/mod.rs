//! QEMU's guest agent: file systems that stand still while a view of the disks is taken, and applications that know.
//!
//! | file | what is in it |
//! |---|---|
//! | [`client`] | a connection: synchronised, a deadline on every command |
//! | [`freeze`] | freezing and thawing, with the thaw on every way out |
//! | [`report`] | what the guest's hooks say they did |
//!
//! The agent is software in the guest: what it says is foreign input, it may never answer, and it may lie. A program is
//! run in the guest only where somebody names it.

pub mod client;
pub mod freeze;
pub mod report;

pub use client::{GuestAgent, Ran};
pub use freeze::{FreezeOptions, Frozen, Level, Thawed};
pub use report::{HookOutcome, HookReport};

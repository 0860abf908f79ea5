//! The witness: registers kept by a process on a third machine.
//!
//! [`Witness`] is the server as a library: it decides ([`store`]) and speaks HTTP/1.1 with JSON on any stream.
//! Who the caller is, its owner must say for each connection; with TLS that is the certificate's identity.
//! [`WitnessClient`] is a [`Register`](crate::Register) on the other end.
//!
//! # State that was copied, restored or lost
//!
//! A witness's state is an **instance**, tied to its machine and its file. State that starts anywhere else (a
//! copy, a backup, an empty directory) is a new instance and remembers nothing reliable: every register in it
//! is *recovering*. A client knows the instance it talked to and refuses another ([`Refusal::OtherInstance`]).
//! Each replica then reports the newest value it knows, and when **every** replica of a register has reported,
//! the newest of these values stands and the register serves again.
//!
//! ```text
//!             start with foreign state,
//!             or a report newer than the state
//!  serving ───────────────────────────────────► recovering ──► serving
//!                                                every replica reported
//!                                                (or an operator excused it)
//! ```
//!
//! [`Refusal::OtherInstance`]: crate::Refusal::OtherInstance

mod client;
mod connector;
mod fingerprint;
mod http;
mod metrics;
mod server;
mod store;
mod wire;

pub use client::{WitnessClient, WitnessClientConfig};
pub use connector::{ConnectFailed, Connector, Stream};
pub use metrics::Counters;
pub use server::{Caller, Witness, WitnessConfig, WitnessError};
pub use wire::{Health, ReportOutcome};

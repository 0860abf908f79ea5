//! A client of QEMU's monitor protocol (QMP, docs/interop/qmp-spec in QEMU's source).
//!
//! [`message`] knows the lines, [`client`] a connection, [`commands`] the commands that are used here, [`block`] those
//! about block nodes, bitmaps and exports, [`migration`] those about migration. Fields and events that are
//! not known are let through or ignored: QEMU adds some in every release.

pub mod block;
pub mod client;
pub mod commands;
pub mod message;
pub mod migration;

pub use client::{Client, EventStream, Heard};
pub use message::{CommandError, Event, Message, ParseError};

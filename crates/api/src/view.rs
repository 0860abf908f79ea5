//! A machine's disks as they were at one moment, read while it runs on: what a backup reads.
//!
//! `POST /v1/vms/{name}/views` answers with lines of JSON, one [`ViewMessage`] each, and does not end by itself: the
//! view lives as long as the connection.

use crate::stream::Lines;
use crate::{Client, Error};
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use std::path::PathBuf;

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ViewRequest {
    /// Where an earlier view of the same machine was, wherever it ran then: to learn what changed since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<ViewPosition>,
    #[serde(default)]
    pub freeze: Freeze,
    /// The guest's memory, too, where its file systems are not frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryRequest>,
}

/// The guest stands still while its memory is written, and until the view is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRequest {
    /// No longer than this.
    pub longest_pause_ms: u64,
    /// There is no view without it, but of a machine that does not run.
    pub or_refuse: bool,
}

impl MemoryRequest {
    /// What may be asked for as the longest pause, in seconds.
    pub const PAUSES_S: RangeInclusive<u64> = 1..=600;
}

/// Whether the guest's file systems stand still while the view is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Freeze {
    /// The guest is not asked.
    #[default]
    No,
    IfPossible,
    /// There is no view otherwise.
    OrRefuse,
}

/// What the disks are good for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consistency {
    pub level: ConsistencyLevel,
    /// What made it so good, or why it is no better. For people.
    pub why: String,
    /// How long the guest's file systems stood still, or the guest itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_ms: Option<u64>,
    /// What the guest could not undo afterwards. For people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsistencyLevel {
    /// As after a power cut.
    Crash,
    /// The guest's memory of the same moment is there, too.
    SavedState,
    /// File systems were frozen.
    FileSystem,
    /// Applications had prepared themselves, too.
    Application,
    /// The machine did not run.
    Stopped,
}

/// A moment in the life of a machine's disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewPosition {
    /// The log, and a record in it: number, and term that wrote it.
    pub group: String,
    pub epoch: u64,
    pub incarnation: u32,
    pub lsn: u64,
    pub disks: Vec<DiskThen>,
}

/// A disk at that moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskThen {
    pub uuid: String,
    pub size_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    pub vm: String,
    pub position: ViewPosition,
    pub opened_unix_ms: u64,
    /// The machine's definition in the log at that position.
    pub definition: serde_json::Value,
    /// Its UEFI variables, as hexadecimal text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram_hex: Option<String>,
    pub consistency: Consistency,
    pub disks: Vec<ViewDisk>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ViewMemory>,
}

/// The guest's memory and devices, as QEMU's `-incoming` reads them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewMemory {
    /// There until the view is closed.
    pub path: PathBuf,
    pub size_bytes: u64,
    /// What QEMU told of the machine, with its command line.
    pub qemu: serde_json::Value,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewDisk {
    pub index: u16,
    pub uuid: String,
    pub size_bytes: u64,
    /// An NBD server on a unix socket, and the name of the export there. Read-only, any number of requests at once;
    /// `base:allocation`, `rempart:changed-at`, and where changes are known `rempart:changed-since`.
    pub socket: PathBuf,
    pub export: String,
    pub changes: Changes,
}

/// Whether it is known what changed since the position that the request named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Changes {
    /// `rempart:changed-since` tells: 1 where a disk may have changed.
    Known,
    /// Anything may have changed.
    Unknown { why: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum ViewMessage {
    /// First.
    Opened { view: Box<View> },
    /// Every few seconds.
    Alive,
    /// Last, unless the client leaves: nothing can be read any more.
    Lost { error: Error },
}

/// A view that is open until this is dropped, or it is lost.
#[derive(Debug)]
pub struct OpenView {
    pub view: View,
    lines: Lines,
}

impl Client {
    /// Opens a view of a machine on the node that leads it.
    pub async fn open_view(&self, vm: &str, request: &ViewRequest) -> Result<OpenView, Error> {
        let mut lines = self.lines(&format!("/v1/vms/{vm}/views"), request, "a view").await?;
        match lines.next().await? {
            ViewMessage::Opened { view } => Ok(OpenView { view: *view, lines }),
            ViewMessage::Lost { error } => Err(error),
            ViewMessage::Alive => Err(Error::failed("the daemon speaks of a view that it did not open")),
        }
    }
}

impl OpenView {
    /// Returns when the view can be read no more, and why.
    pub async fn lost(&mut self) -> Error {
        loop {
            match self.lines.next().await {
                Ok(ViewMessage::Alive | ViewMessage::Opened { .. }) => {}
                Ok(ViewMessage::Lost { error }) | Err(error) => return error,
            }
        }
    }
}

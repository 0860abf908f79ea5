//! A machine of this node that is made of disks from elsewhere, or whose disks are overwritten by them.
//!
//! `POST /v1/restores` answers with lines of JSON, one [`RestoreMessage`] each: the restore lives as long as the
//! connection. Whoever opened it writes the disks where [`RestoreReady`] says, and has it ended by
//! `POST /v1/restores/{id}/finish`, which answers a job. A new machine is there from then on, and not before. The disks of
//! one that is there are written between `POST /v1/restores/{id}/begin`, with an [`UnfinishedRestore`], and the end;
//! it does not start until a restore of it ended, whatever became of this one.

use crate::stream::Lines;
use crate::{Client, Error};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// The machine's.
    pub name: String,
    pub disks: Vec<RestoreDisk>,
    /// UEFI variables, as hexadecimal text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram_hex: Option<String>,
    pub onto: RestoreOnto,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum RestoreOnto {
    NewMachine {
        /// A machine's definition, with these disks.
        definition: serde_json::Value,
        /// It keeps the UUID and the network addresses in the definition, instead of new ones.
        same_identity: bool,
        /// What the disks will take.
        needed_bytes: u64,
    },
    /// One that is there, stopped, and led by this node.
    Machine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreDisk {
    pub index: u16,
    pub size_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReady {
    pub id: u64,
    /// In the order of the request.
    pub disks: Vec<RestoreTarget>,
    /// A restore of this machine that was begun, and has not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unfinished: Option<UnfinishedRestore>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum RestoreTarget {
    /// A raw file, to be made.
    File { path: PathBuf },
    /// The disk's export on a unix socket, to be written through.
    Nbd { socket: PathBuf, export: String },
}

/// A machine's disks hold neither what they did nor what they should.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnfinishedRestore {
    /// Of which point it is.
    pub point: String,
    /// The only disk of the point that is restored, by its name there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// The machine's disks that are overwritten, by number. The daemon's to fill in.
    #[serde(default)]
    pub indexes: Vec<u16>,
    /// The point that holds what the machine held before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum RestoreMessage {
    /// First.
    Ready { ready: RestoreReady },
    /// Every few seconds.
    Alive,
}

/// A restore that is open until this is dropped.
#[derive(Debug)]
pub struct OpenRestore {
    pub ready: RestoreReady,
    lines: Lines,
}

impl Client {
    pub async fn open_restore(&self, request: &RestoreRequest) -> Result<OpenRestore, Error> {
        let mut lines = self.lines("/v1/restores", request, "a restore").await?;
        match lines.next().await? {
            RestoreMessage::Ready { ready } => Ok(OpenRestore { ready, lines }),
            RestoreMessage::Alive => {
                Err(Error::failed("the daemon speaks of a restore that it did not open"))
            }
        }
    }
}

impl OpenRestore {
    /// Returns when the daemon knows nothing of it any more, and why.
    pub async fn lost(&mut self) -> Error {
        loop {
            if let Err(error) = self.lines.next::<RestoreMessage>().await {
                return error;
            }
        }
    }
}

//! Files of guests' file systems, read-only.
//!
//! Whoever reads a file is told where its bytes lie, and reads them itself.

mod content;
mod exfat;
mod fat;
mod ntfs;
mod recognise;
pub(crate) mod xfs;

pub use content::{Content, Extent};
pub(crate) use recognise::has_boot_sector;
pub use recognise::{FileSystemKind, Found, open, recognise};

use crate::disk::Fault;
use serde::{Deserialize, Serialize};

/// Bytes of a folder that are read, at most.
pub(crate) const LARGEST_FOLDER: u64 = 256 << 20;

/// A file system. Files have numbers, which stay theirs.
pub trait FileSystem {
    fn root(&self) -> u64;
    fn attributes(&mut self, file: u64) -> Result<Attributes, Fault>;
    /// What is in a folder, but for itself and the one that it is in.
    fn list(&mut self, folder: u64) -> Result<Vec<Name>, Fault>;
    fn content(&mut self, file: u64) -> Result<Content, Fault>;
    /// Where a link leads.
    fn target(&mut self, link: u64) -> Result<Vec<u8>, Fault>;
    /// Extended attributes, as Linux names them.
    fn extended(&mut self, _file: u64) -> Result<Extended, Fault> {
        Ok(Vec::new())
    }
}

/// Extended attributes: names, and what they are.
pub type Extended = Vec<(Vec<u8>, Vec<u8>)>;

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Folder,
    File,
    Link,
    CharacterDevice,
    BlockDevice,
    Pipe,
    Socket,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    pub kind: Kind,
    /// Permissions.
    pub mode: u32,
    pub owner: u32,
    pub group: u32,
    /// Since 1970: seconds, and nanoseconds behind them.
    pub modified: (i64, u32),
    /// Bytes.
    pub size: u64,
    /// Names.
    pub links: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
}

impl Attributes {
    /// Where the file system knows no owners and permissions.
    pub(crate) fn plain(kind: Kind, modified: (i64, u32), size: u64) -> Attributes {
        let mode = if kind == Kind::Folder { 0o755 } else { 0o644 };
        Attributes { kind, mode, owner: 0, group: 0, modified, size, links: 1, device: (0, 0) }
    }
}

/// An entry of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    pub name: Vec<u8>,
    pub file: u64,
    pub kind: Kind,
}

//! Disks to back up: bytes that stay as they are while they are read.

mod file;
mod nbd;
mod qemu_image;

pub use file::FileSource;
pub(crate) use nbd::Requests;
pub use nbd::{Connections, NbdEndpoint, NbdSource};
pub use qemu_image::QemuImage;

use crate::ChunkSet;
use std::fmt::Debug;
use std::ops::Range;
use thiserror::Error;

/// A disk. What it holds does not change while it is open.
pub trait Source: Debug + Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;

    /// For one thread.
    fn reader(&self) -> Result<Box<dyn Reader + '_>, SourceError>;

    /// The chunks of `chunk_len` bytes that may hold anything but zeroes.
    fn data(&self, chunk_len: u64) -> Result<ChunkSet, SourceError>;
}

/// Reads a disk.
pub trait Reader: Send {
    /// Bytes that are best read at once, if more than a chunk is to be.
    fn piece(&self) -> u64 {
        u64::MAX
    }

    /// Told what will be read next, each range at once and in this order: where answers take their time, it is asked for
    /// now.
    fn ahead(&mut self, _ranges: &[Range<u64>]) -> Result<(), SourceError> {
        Ok(())
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// If any of these bytes cannot be read: nothing is left out in silence.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError>;
}

/// A disk that cannot be read.
#[derive(Debug, Error)]
#[error("{action} `{disk}`{}", place(*.offset))]
pub struct SourceError {
    /// A verb phrase: "read", "open".
    pub action: &'static str,
    /// A path or an NBD address.
    pub disk: String,
    /// Where, in bytes.
    pub offset: Option<u64>,
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

fn place(offset: Option<u64>) -> String {
    offset.map_or(String::new(), |offset| format!(" at byte {offset}"))
}

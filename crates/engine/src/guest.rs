//! What a virtual machine asks of its disks, and the answers.

pub use bytes::Bytes;
use rempart_store::PayloadBuffer;
use rempart_types::DiskIndex;

/// Names one guest request; chosen by the caller, returned with the reply. Unique among those under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// Bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRange {
    pub disk: DiskIndex,
    pub offset: u64,
    pub length: u64,
}

/// A write's buffer, with room in front for the headers of the batch it becomes: the data plane receives a large
/// payload from the socket straight into it, and the same bytes go to the journal and to the peer.
#[derive(Debug)]
pub struct WriteBuffer(pub(crate) PayloadBuffer);

impl WriteBuffer {
    /// Where the guest's bytes go. All of it counts.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        self.0.payload_mut()
    }

    pub fn payload(&self) -> &[u8] {
        self.0.payload()
    }
}

/// A part of what a read returns, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadPiece {
    Data(Bytes),
    /// That many bytes of zeroes, for which nothing is stored.
    Zeroes(u64),
}

/// Why a request failed. A guest sees an I/O error for all of them; the kind is for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GuestError {
    #[error("no such disk")]
    NoSuchDisk,
    #[error("beyond the end of the disk")]
    OutOfBounds,
    #[error("offset or length is not a multiple of the sector size")]
    Unaligned,
    #[error("the request is larger than a batch may be")]
    TooLarge,
    #[error("the local disk failed")]
    Disk,
}

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Done,
    Data(Vec<ReadPiece>),
    Failed(GuestError),
    /// This replica does not lead any more: never answer, close the guest's connections.
    Dropped,
}

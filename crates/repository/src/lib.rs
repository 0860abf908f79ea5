//! A repository of backups: chunks of disks in packs, trees of chunks, and one log that orders everything.

mod blob;
mod boot;
#[cfg_attr(not(feature = "planted-bugs"), allow(dead_code))]
mod bug;
mod check;
mod chunk;
pub mod collect;
mod copies;
mod description;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
mod golden;
mod id;
mod immutable;
mod index;
mod key;
pub mod log;
mod names;
mod pack;
mod point;
mod reader;
mod reading;
mod repository;
mod tree;
mod undelete;
mod wire;
mod writer;

pub use blob::{BlobKind, Codec, Compressor, Decompressor};
pub use boot::{BootCheck, BootResult};
#[cfg(feature = "planted-bugs")]
pub use bug::plant;
pub use bug::{Bug, planted};
pub use check::{Checked, check};
pub use chunk::{ChunkSize, is_zero};
pub use description::Description;
pub use error::{Error, ErrorKind};
pub use id::{
    ChainId, ChunkId, DomainId, EntryHash, KeyId, PackId, ParseIdError, RepositoryId, SegmentId, SessionId,
    WrappedKeyId,
};
pub use index::{
    Covers, Index, IndexEntry, IndexUpdate, LocalIndex, Located, MAX_SEGMENT_ENTRIES, SealedSegment, Segment,
    SegmentBuilder,
};
pub use key::{
    AnyKey, BOX_OVERHEAD, BoxPurpose, Cipher, Domain, KeyFile, KeyRing, MasterKey, Opener, PassphraseCost,
    PublicKeys, Recipient, SIGNATURE, Signer, Unlock, Verifier, WRAPPED_KEYS, WrappedBy, WrappedKey,
    WriterKey, WriterName,
};
pub use names::{CHECKPOINTS, COPIES, LOG, PACKS, PackName, SEGMENTS, SegmentName};
pub use pack::{Blob, MAX_BLOBS, MAX_PACK, MIN_PACK, PACK_HEADER, Pack, PackBuilder, PackHeader, PackOpener};
pub use point::{
    Consistency, ConsistencyLevel, Definition, Excluded, FileTree, HowRead, MEMORY, Point, PointDisk,
};
pub use reader::BlobReader;
pub use reading::{PointReader, Reading};
pub use repository::{NewRepository, Repository, keys};
pub use tree::{
    Difference, Differences, FAN_OUT, MAX_CHUNKS, MAX_NODE, NodeSink, NodeSource, Step, Tree, TreeUpdate,
    Walk, resize,
};
pub use undelete::{ForgottenPoint, Forgottens, Remains};
pub use writer::{BackupWriter, BlobWriter, Written};

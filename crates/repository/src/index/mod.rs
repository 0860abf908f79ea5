//! The index: in which pack a chunk lies.
//!
//! Writers put what they stored into **segments**, sealed, immutable objects. Every machine keeps a **local index** made of
//! those: sorted files that are searched on the disk, and a small filter in memory that answers for most chunks that are
//! new. It holds nothing that cannot be made again.

mod entry;
mod filter;
mod levels;
mod local;
mod segment;
mod sort;
#[cfg(test)]
pub(crate) mod tests;
mod update;
mod writer;

pub use entry::{IndexEntry, Located};
pub use levels::Index;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use local::local_of;
pub use local::{Covers, LocalIndex};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use segment::SegmentHeader;
pub use segment::{MAX_SEGMENT_ENTRIES, SealedSegment, Segment, SegmentBuilder};
pub use update::IndexUpdate;
pub(crate) use writer::unnamed_file;

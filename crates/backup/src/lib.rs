//! Backing up disks into a repository, and bringing them back.

mod chunk_set;
mod source;

pub use chunk_set::ChunkSet;
pub use source::{FileSource, NbdEndpoint, NbdSource, QemuImage, Reader, Source, SourceError};

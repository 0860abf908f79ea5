//! Backing up disks into a repository, and bringing them back.

mod chunk_set;
mod pipeline;
mod source;

pub use chunk_set::ChunkSet;
pub use pipeline::{ChunkSink, PipelineError, Progress, store_chunks};
pub use source::{FileSource, NbdEndpoint, NbdSource, QemuImage, Reader, Source, SourceError};

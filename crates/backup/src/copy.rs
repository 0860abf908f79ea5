//! Disks of restore points as something to back up: into another repository, whatever its keys and the size of its chunks.

use crate::{ChunkCache, ChunkSet, Content, DiskReader, Reader, Source, SourceError};
use rempart_repository::{BlobReader, Differences, Error, Step, Walk};
use std::sync::Arc;

/// One disk of a restore point.
#[derive(Debug)]
pub struct PointSource<'a> {
    disk: DiskReader,
    content: Content,
    nodes: &'a BlobReader,
}

impl<'a> PointSource<'a> {
    /// `nodes` reads the repository whose chunks `cache` keeps.
    pub fn new(
        cache: &Arc<ChunkCache>,
        nodes: &'a BlobReader,
        name: &str,
        content: Content,
    ) -> PointSource<'a> {
        PointSource { disk: DiskReader::new(cache, name, content), content, nodes }
    }

    /// Chunks of `chunk_len` bytes that are not as in an earlier point of this disk, in the same repository.
    pub fn changed_since(&self, earlier: Content, chunk_len: u64) -> Result<ChunkSet, Error> {
        let mut changed = ChunkSet::none(self.content.size, chunk_len);
        for difference in Differences::new(self.nodes, earlier.tree, self.content.tree)? {
            self.insert(&mut changed, difference?.index);
        }
        Ok(changed)
    }

    /// A chunk of the point's repository may be part of one, or several, here.
    fn insert(&self, set: &mut ChunkSet, chunk: u64) {
        let len = u64::from(self.content.chunk_size.bytes());
        set.insert_bytes(chunk * len..(chunk + 1) * len);
    }

    fn failed(
        &self,
        offset: Option<u64>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> SourceError {
        SourceError { action: "read", disk: self.disk.name().to_owned(), offset, source: source.into() }
    }
}

impl Source for PointSource<'_> {
    fn size(&self) -> u64 {
        self.content.size
    }

    fn reader(&self) -> Result<Box<dyn Reader + '_>, SourceError> {
        Ok(Box::new(self))
    }

    fn data(&self, chunk_len: u64) -> Result<ChunkSet, SourceError> {
        let mut data = ChunkSet::none(self.content.size, chunk_len);
        let walk = Walk::new(self.nodes, self.content.tree).map_err(|error| self.failed(None, error))?;
        for step in walk {
            if let Step::Chunk { index, .. } = step.map_err(|error| self.failed(None, error))? {
                self.insert(&mut data, index);
            }
        }
        Ok(data)
    }
}

impl Reader for &PointSource<'_> {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        self.disk.read_into(offset, buffer).map_err(|error| self.failed(Some(offset), error))
    }
}

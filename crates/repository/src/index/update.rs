//! Bringing a local index up to date: the old one and new segments, merged in bounded memory.

use super::entry::IndexEntry;
use super::local::{Covers, LocalIndex};
use super::segment::Segment;
use super::writer::LocalWriter;
use crate::RepositoryId;
use crate::error::{Error, ErrorKind};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::{Path, PathBuf};

/// Entries of segments that are sorted in memory: 32 MiB.
const BATCH: usize = 1 << 20;
/// Files that are merged at once.
const MAX_PARTS: usize = 128;

/// A local index in the making.
#[derive(Debug)]
pub struct IndexUpdate {
    path: PathBuf,
    repository: RepositoryId,
    old: Option<LocalIndex>,
    batch: Vec<IndexEntry>,
    batch_entries: usize,
    /// Sorted batches that had no room in memory.
    parts: Vec<LocalIndex>,
}

impl LocalIndex {
    /// A new index at `path`, of all the segments it will be given.
    pub fn create(path: &Path, repository: RepositoryId) -> IndexUpdate {
        IndexUpdate::new(path.to_owned(), repository, None)
    }

    /// This index and the segments it will be given. Gives up its memory now; the file stays until the new one is whole.
    pub fn update(mut self) -> IndexUpdate {
        self.filter = super::filter::Filter::new(0);
        IndexUpdate::new(self.path.clone(), self.repository, Some(self))
    }
}

impl IndexUpdate {
    fn new(path: PathBuf, repository: RepositoryId, old: Option<LocalIndex>) -> IndexUpdate {
        IndexUpdate { path, repository, old, batch: Vec::new(), batch_entries: BATCH, parts: Vec::new() }
    }

    #[cfg(test)]
    pub(super) fn with_batches_of(mut self, entries: usize) -> IndexUpdate {
        self.batch_entries = entries;
        self
    }

    /// Adds the entries of a segment. `numbers` are those that the log gave its packs, in their order; none for a pack that
    /// is not live.
    pub fn add(&mut self, segment: &Segment, numbers: &[Option<u32>]) -> Result<(), Error> {
        if numbers.len() != segment.packs().len() {
            let why = format!("{} numbers for {} packs", numbers.len(), segment.packs().len());
            return Err(Error::new(ErrorKind::Invalid, self.path.display(), why));
        }
        let live = segment.entries().iter().filter_map(|entry| {
            let number = numbers[entry.pack() as usize]?;
            Some(entry.with_pack(number))
        });
        for entry in live {
            if self.batch.len() == self.batch_entries {
                self.write_part()?;
            }
            self.batch.push(entry);
        }
        Ok(())
    }

    fn write_part(&mut self) -> Result<(), Error> {
        self.batch.sort_unstable();
        let mut part = LocalWriter::part(&self.path, self.repository)?;
        self.batch.drain(..).try_for_each(|entry| part.push(entry))?;
        self.parts.push(part.finish(Covers::default())?);
        if self.parts.len() == MAX_PARTS {
            let mut part = LocalWriter::part(&self.path, self.repository)?;
            merge(&self.parts, &[], &mut |entry| part.push(entry))?;
            self.parts = vec![part.finish(Covers::default())?];
        }
        Ok(())
    }

    /// The index of what `keep` keeps of all that was added and of the old one, which it replaces.
    pub fn finish(mut self, keep: impl Fn(&IndexEntry) -> bool, covers: Covers) -> Result<LocalIndex, Error> {
        self.batch.sort_unstable();
        let mut files = std::mem::take(&mut self.parts);
        files.extend(self.old.take());
        let most = files.iter().map(LocalIndex::len).sum::<u64>() + self.batch.len() as u64;
        let mut writer = LocalWriter::new(&self.path, self.repository, most)?;
        merge(&files, &self.batch, &mut |entry| if keep(&entry) { writer.push(entry) } else { Ok(()) })?;
        writer.finish(covers)
    }
}

/// Gives the entries of all files and of the sorted `batch`, in order.
fn merge(
    files: &[LocalIndex],
    batch: &[IndexEntry],
    out: &mut dyn FnMut(IndexEntry) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut sources: Vec<Box<dyn Iterator<Item = Result<IndexEntry, Error>>>> = Vec::new();
    sources.push(Box::new(batch.iter().copied().map(Ok)));
    sources.extend(files.iter().map(|file| Box::new(file.entries()) as _));
    let mut heads = BinaryHeap::new();
    for (source, entries) in sources.iter_mut().enumerate() {
        heads.extend(entries.next().transpose()?.map(|entry| Reverse((entry, source))));
    }
    while let Some(Reverse((entry, source))) = heads.pop() {
        out(entry)?;
        heads.extend(sources[source].next().transpose()?.map(|entry| Reverse((entry, source))));
    }
    Ok(())
}

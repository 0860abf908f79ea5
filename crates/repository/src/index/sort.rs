//! Sorting entries in bounded memory.

use super::entry::IndexEntry;
use super::local::{Covers, LocalIndex};
use super::writer::LocalWriter;
use crate::RepositoryId;
use crate::error::Error;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::{Path, PathBuf};

/// Entries that are sorted in memory: 8 MiB.
const BATCH: usize = 1 << 18;
/// Files that are merged at once, with 32 KiB of each in memory: for 128 million entries.
const MAX_PARTS: usize = 512;

/// Entries in any order. Batches that had no room in memory lie sorted in files without names, checked by hashes as a local
/// index is.
#[derive(Debug)]
pub(crate) struct EntrySort {
    /// Beside which the files are made.
    path: PathBuf,
    repository: RepositoryId,
    batch: Vec<IndexEntry>,
    batch_entries: usize,
    parts: Vec<LocalIndex>,
}

impl EntrySort {
    pub fn new(path: &Path, repository: RepositoryId) -> EntrySort {
        let path = path.to_owned();
        EntrySort { path, repository, batch: Vec::new(), batch_entries: BATCH, parts: Vec::new() }
    }

    #[cfg(test)]
    pub fn with_batches_of(mut self, entries: usize) -> EntrySort {
        self.batch_entries = entries;
        self
    }

    /// Entries. Of those that are the same in one file only one counts.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(LocalIndex::len).sum::<u64>() + self.batch.len() as u64
    }

    pub fn push(&mut self, entry: IndexEntry) -> Result<(), Error> {
        if self.batch.len() == self.batch_entries {
            self.write_part()?;
        }
        self.batch.push(entry);
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

    /// Gives all entries in order, with those of `others`.
    pub fn merged_with(
        mut self,
        others: impl IntoIterator<Item = LocalIndex>,
        out: &mut dyn FnMut(IndexEntry) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.batch.sort_unstable();
        self.parts.extend(others);
        merge(&self.parts, &self.batch, out)
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

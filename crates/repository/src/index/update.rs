//! Bringing a local index up to date: the old one and new segments, merged in bounded memory.

use super::entry::IndexEntry;
use super::local::{Covers, LocalIndex};
use super::segment::Segment;
use super::sort::EntrySort;
use super::writer::LocalWriter;
use crate::RepositoryId;
use crate::error::{Error, ErrorKind};
use std::path::{Path, PathBuf};

/// A local index in the making.
#[derive(Debug)]
pub struct IndexUpdate {
    path: PathBuf,
    repository: RepositoryId,
    old: Option<LocalIndex>,
    added: EntrySort,
}

impl LocalIndex {
    /// A new index at `path`, of all the segments it will be given.
    pub fn create(path: &Path, repository: RepositoryId) -> IndexUpdate {
        IndexUpdate::new(path.to_owned(), repository, None)
    }

    /// This index and the segments it will be given. Gives up its memory now; the file stays until the new one is whole.
    pub fn update(mut self) -> IndexUpdate {
        self.forget_filter();
        IndexUpdate::new(self.path.clone(), self.repository, Some(self))
    }
}

impl IndexUpdate {
    fn new(path: PathBuf, repository: RepositoryId, old: Option<LocalIndex>) -> IndexUpdate {
        let added = EntrySort::new(&path, repository);
        IndexUpdate { path, repository, old, added }
    }

    #[cfg(test)]
    pub(super) fn with_batches_of(mut self, entries: usize) -> IndexUpdate {
        self.added = self.added.with_batches_of(entries);
        self
    }

    /// Adds the entries of a segment. `numbers` are those that the log gave its packs, in their order; none for a pack that
    /// is not live.
    pub fn add(&mut self, segment: &Segment, numbers: &[Option<u32>]) -> Result<(), Error> {
        if numbers.len() != segment.packs().len() {
            let why = format!("{} numbers for {} packs", numbers.len(), segment.packs().len());
            return Err(Error::new(ErrorKind::Invalid, self.path.display(), why));
        }
        let mut live = segment.entries().iter().filter_map(|entry| {
            let number = numbers[entry.pack() as usize]?;
            Some(entry.with_pack(number))
        });
        live.try_for_each(|entry| self.added.push(entry))
    }

    /// The index of what `keep` keeps of all that was added and of the old one, which it replaces.
    pub fn finish(mut self, keep: impl Fn(&IndexEntry) -> bool, covers: Covers) -> Result<LocalIndex, Error> {
        let old = self.old.take();
        let most = self.added.len() + old.as_ref().map_or(0, LocalIndex::len);
        let mut writer = LocalWriter::new(&self.path, self.repository, most)?;
        self.added.merged_with(old, &mut |entry| if keep(&entry) { writer.push(entry) } else { Ok(()) })?;
        writer.finish(covers)
    }
}

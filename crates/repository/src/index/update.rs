//! Bringing an index up to date: the old one and new segments, merged in bounded memory.

use super::entry::IndexEntry;
use super::levels::{Index, path_of_recent};
use super::local::{Covers, LocalIndex};
use super::segment::Segment;
use super::sort::EntrySort;
use super::writer::LocalWriter;
use crate::RepositoryId;
use crate::error::{Error, ErrorKind};
use std::path::{Path, PathBuf};

/// What came since the large file was written is in a file of its own as long as it is at most one part of so many: all of a
/// large repository is not written anew for what one backup brings.
const RECENT_PART: u64 = 16;

/// An index in the making.
#[derive(Debug)]
pub struct IndexUpdate {
    path: PathBuf,
    repository: RepositoryId,
    old: Option<Index>,
    added: EntrySort,
}

impl Index {
    /// A new index at `path`, of all the segments it will be given.
    pub fn create(path: &Path, repository: RepositoryId) -> IndexUpdate {
        IndexUpdate::new(path.to_owned(), repository, None)
    }

    /// This index and the segments it will be given. Its files stay until the new ones are whole.
    pub fn update(self) -> IndexUpdate {
        let (path, repository) = (self.base.path.clone(), self.base.repository);
        IndexUpdate::new(path, repository, Some(self))
    }
}

impl IndexUpdate {
    fn new(path: PathBuf, repository: RepositoryId, old: Option<Index>) -> IndexUpdate {
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

    /// The index of what was added and of the old one, which it replaces. What `keep` does not keep is not in the files that
    /// are written anew.
    pub fn finish(mut self, keep: impl Fn(&IndexEntry) -> bool, covers: Covers) -> Result<Index, Error> {
        let recent = self.added.len() + self.old.as_ref().map_or(0, Index::recent_len);
        match self.old.take_if(|old| recent <= old.base.len() / RECENT_PART) {
            None => Ok(self.finish_whole(keep, covers)?.into()),
            Some(Index { base, recent: before }) => {
                let path = path_of_recent(&self.path);
                let writer = LocalWriter::new(&path, self.repository, base.covers().entry, recent)?;
                let recent = Some(write(writer, self.added, before, keep, covers)?);
                Ok(Index { base, recent })
            }
        }
    }

    /// The same in one file. Gives up the old one's memory.
    pub fn finish_whole(
        mut self,
        keep: impl Fn(&IndexEntry) -> bool,
        covers: Covers,
    ) -> Result<LocalIndex, Error> {
        let old = self.old.take().map_or_else(Vec::new, |mut old| {
            old.forget_filter();
            old.into_files()
        });
        let most = self.added.len() + old.iter().map(LocalIndex::len).sum::<u64>();
        let writer = LocalWriter::new(&self.path, self.repository, 0, most)?;
        let whole = write(writer, self.added, old, keep, covers)?;
        // If it stays it is found to have nothing that is not here, too.
        let _ = std::fs::remove_file(path_of_recent(&self.path));
        Ok(whole)
    }
}

fn write(
    mut writer: LocalWriter,
    added: EntrySort,
    old: impl IntoIterator<Item = LocalIndex>,
    keep: impl Fn(&IndexEntry) -> bool,
    covers: Covers,
) -> Result<LocalIndex, Error> {
    added.merged_with(old, &mut |entry| if keep(&entry) { writer.push(entry) } else { Ok(()) })?;
    writer.finish(covers)
}

//! The index of a repository on this machine: one large file, and a small one of what came since that was written.

use super::entry::Located;
use super::local::{Covers, LocalIndex};
use crate::error::Error;
use crate::{ChunkId, RepositoryId};
use std::path::{Path, PathBuf};

/// Says in which packs a blob is.
#[derive(Debug)]
pub struct Index {
    pub(super) base: LocalIndex,
    /// Goes on at the latest where `base` ends, and further.
    pub(super) recent: Option<LocalIndex>,
}

/// Where the file is of what came since the one at `path` was written.
pub(super) fn path_of_recent(path: &Path) -> PathBuf {
    path.with_added_extension("recent")
}

impl Index {
    /// Opens what is at `path`, if `continues` says that the log that it covers goes on in the one that is asked about. For
    /// what cannot be opened, the same errors as of [`LocalIndex::open`].
    pub fn open(
        path: &Path,
        repository: &RepositoryId,
        continues: impl Fn(Covers) -> bool,
    ) -> Result<Option<Index>, Error> {
        let base = LocalIndex::open(path, repository)?;
        if !continues(base.covers()) {
            return Ok(None);
        }
        // Others may have written either of them since, from an older state or a newer one.
        let goes_on = |recent: &LocalIndex| {
            let from_where_base_ends = recent.from <= base.covers().entry;
            from_where_base_ends && recent.covers().entry > base.covers().entry && continues(recent.covers())
        };
        let recent = LocalIndex::open(&path_of_recent(path), repository).ok().filter(goes_on);
        Ok(Some(Index { base, recent }))
    }

    pub fn is_whole(&self) -> bool {
        self.recent.is_none()
    }

    /// The file that all of it is in.
    ///
    /// # Panics
    /// If it is in two.
    pub(crate) fn file(&self) -> &LocalIndex {
        assert!(self.is_whole(), "it was asked for in one file");
        &self.base
    }

    /// How far the log is in it.
    pub fn covers(&self) -> Covers {
        self.files().last().expect("there is one").covers()
    }

    /// Whether the blob may be in it: as [`LocalIndex::may_hold`].
    pub fn may_hold(&self, id: &ChunkId) -> bool {
        self.files().any(|file| file.may_hold(id))
    }

    /// Every place where the blob may be, as [`LocalIndex::find`] tells them, the same place twice at most.
    pub fn find(&self, id: &ChunkId) -> Result<Vec<Located>, Error> {
        let mut found = Vec::new();
        for file in self.files() {
            found.extend(file.find(id)?);
        }
        Ok(found)
    }

    /// Gives up its filters: see [`LocalIndex::forget_filter`].
    pub(crate) fn forget_filter(&mut self) {
        self.base.forget_filter();
        self.recent.iter_mut().for_each(LocalIndex::forget_filter);
    }

    /// Bytes of memory that it takes.
    pub(crate) fn memory(&self) -> u64 {
        self.files().map(LocalIndex::memory).sum()
    }

    pub(super) fn recent_len(&self) -> u64 {
        self.recent.as_ref().map_or(0, LocalIndex::len)
    }

    pub(super) fn into_files(self) -> Vec<LocalIndex> {
        [self.base].into_iter().chain(self.recent).collect()
    }

    fn files(&self) -> impl Iterator<Item = &LocalIndex> {
        [&self.base].into_iter().chain(&self.recent)
    }
}

impl From<LocalIndex> for Index {
    fn from(base: LocalIndex) -> Index {
        Index { base, recent: None }
    }
}

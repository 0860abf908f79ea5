//! Writing a local index, from sorted entries.

use super::entry::IndexEntry;
use super::filter::Filter;
use super::local::{BLOCK, BLOCK_ENTRIES, Covers, Header, LocalIndex, block_hash, first, tail_hash};
use crate::RepositoryId;
use crate::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes that are written at once.
const PIECE: usize = 1 << 20;
/// What an unfinished file is called, behind the name it shall have.
const UNFINISHED: &str = ".new-";
/// An unfinished file that was not touched for so long has nobody who will finish it.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// An index that is being written. Dropped unfinished, it leaves nothing behind.
pub(super) struct LocalWriter {
    file: File,
    /// Where it is until it is whole; none once it has no name any more.
    unfinished: Option<PathBuf>,
    path: PathBuf,
    repository: RepositoryId,
    from: u64,
    entries: u64,
    last: Option<IndexEntry>,
    buffer: Vec<u8>,
    hashes: Vec<[u8; 8]>,
    firsts: Vec<u64>,
    filter: Filter,
}

impl LocalWriter {
    /// A file that will be `path`, of at most `entries` entries, made of the log's objects from number `from` on.
    pub fn new(path: &Path, repository: RepositoryId, from: u64, entries: u64) -> Result<LocalWriter, Error> {
        remove_abandoned(path);
        let mut writer = Self::create(path, repository, Filter::new(entries))?;
        writer.from = from;
        Ok(writer)
    }

    /// A file without a name and without a filter: part of a larger one, gone when it is closed.
    pub fn part(path: &Path, repository: RepositoryId) -> Result<LocalWriter, Error> {
        Ok(Self::begin(unnamed_file(path)?, None, path, repository, Filter::new(0)))
    }

    fn create(path: &Path, repository: RepositoryId, filter: Filter) -> Result<LocalWriter, Error> {
        let (file, unfinished) = new_file(path)?;
        Ok(Self::begin(file, Some(unfinished), path, repository, filter))
    }

    fn begin(
        file: File,
        unfinished: Option<PathBuf>,
        path: &Path,
        repository: RepositoryId,
        filter: Filter,
    ) -> LocalWriter {
        let mut writer = LocalWriter {
            file,
            unfinished,
            path: path.to_owned(),
            repository,
            from: 0,
            entries: 0,
            last: None,
            buffer: Vec::with_capacity(PIECE),
            hashes: Vec::new(),
            firsts: Vec::new(),
            filter,
        };
        // The header's place. It is known last.
        writer.buffer.resize(BLOCK, 0);
        writer
    }

    /// Adds an entry. They come in order; one that is the same as the one before is left out.
    pub fn push(&mut self, entry: IndexEntry) -> Result<(), Error> {
        if self.last == Some(entry) {
            return Ok(());
        }
        assert!(self.last < Some(entry), "entries come in order");
        self.last = Some(entry);
        let id = entry.id();
        if self.entries.is_multiple_of(BLOCK_ENTRIES as u64) {
            self.firsts.push(first(&id));
        }
        if !self.filter.bytes().is_empty() {
            self.filter.insert(&id);
        }
        self.buffer.extend_from_slice(entry.bytes());
        self.entries += 1;
        if self.entries.is_multiple_of(BLOCK_ENTRIES as u64) {
            self.end_block()?;
        }
        Ok(())
    }

    fn end_block(&mut self) -> Result<(), Error> {
        let block = self.buffer.len() - BLOCK;
        self.hashes.push(block_hash(&self.buffer[block..]));
        if self.buffer.len() == PIECE { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Error> {
        let result = self.file.write_all(&self.buffer);
        self.buffer.clear();
        result.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: std::io::Error) -> Error {
        Error::local(&self.path, "write index", source)
    }

    /// The index, which takes the place of any there was, whole or not at all.
    pub fn finish(mut self, covers: Covers) -> Result<LocalIndex, Error> {
        if !self.entries.is_multiple_of(BLOCK_ENTRIES as u64) {
            let whole = self.buffer.len().next_multiple_of(BLOCK);
            self.buffer.resize(whole, 0);
            self.end_block()?;
        }
        let mut tables = Vec::with_capacity(self.hashes.len() * 16);
        self.hashes.iter().for_each(|hash| tables.extend_from_slice(hash));
        self.firsts.iter().for_each(|first| tables.extend_from_slice(&first.to_be_bytes()));
        self.flush()?;
        let tail = self.file.write_all(&tables).and_then(|()| self.file.write_all(self.filter.bytes()));
        tail.map_err(|source| self.failed(source))?;
        let header = Header {
            repository: self.repository,
            entries: self.entries,
            from: self.from,
            covers,
            filter_len: self.filter.bytes().len() as u64,
            filter_probes: self.filter.probes(),
            tail_hash: tail_hash(&tables, self.filter.bytes()),
        };
        self.file.write_all_at(&header.encode(), 0).map_err(|source| self.failed(source))?;
        if let Some(unfinished) = &self.unfinished {
            let synced = self.file.sync_all().and_then(|()| fs::rename(unfinished, &self.path));
            synced.map_err(|source| self.failed(source))?;
            self.unfinished = None;
        }
        Ok(LocalIndex {
            file: self.file.try_clone().map_err(|source| self.failed(source))?,
            path: self.path.clone(),
            repository: self.repository,
            entries: self.entries,
            from: self.from,
            covers,
            hashes: std::mem::take(&mut self.hashes),
            firsts: std::mem::take(&mut self.firsts),
            filter: Some(std::mem::replace(&mut self.filter, Filter::new(0))),
        })
    }
}

impl Drop for LocalWriter {
    fn drop(&mut self) {
        if let Some(unfinished) = &self.unfinished {
            // What is left behind is removed when it is old.
            let _ = fs::remove_file(unfinished);
        }
    }
}

/// A new file beside `path`, and where it is.
fn new_file(path: &Path) -> Result<(File, PathBuf), Error> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(UNFINISHED);
    unfinished.push(format!("{:016x}", u64::from_le_bytes(crate::key::random())));
    let unfinished = PathBuf::from(unfinished);
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&unfinished);
    let file = file.map_err(|source| Error::local(&unfinished, "create index", source))?;
    Ok((file, unfinished))
}

/// A file beside `path` that has no name: it is gone when it is closed.
pub(crate) fn unnamed_file(path: &Path) -> Result<File, Error> {
    let (file, unfinished) = new_file(path)?;
    fs::remove_file(&unfinished).map_err(|source| Error::local(&unfinished, "remove name of", source))?;
    Ok(file)
}

/// Removes what a process that was killed left unfinished. Failing to is no reason to stop.
fn remove_abandoned(path: &Path) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return;
    };
    let prefix = format!("{name}{UNFINISHED}");
    let Ok(files) = fs::read_dir(folder) else { return };
    for file in files.flatten() {
        let is_unfinished = file.file_name().to_str().is_some_and(|name| name.starts_with(&prefix));
        let age = || file.metadata().ok()?.modified().ok()?.elapsed().ok();
        if is_unfinished && age().is_some_and(|age| age > ABANDONED) {
            let _ = fs::remove_file(file.path());
        }
    }
}

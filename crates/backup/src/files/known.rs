//! What this machine remembers of the files it backed up last: which they were, and the ids of their chunks.
//!
//! Whoever only adds to a repository cannot read there what it was. A mistake in it would be one in the backup, so it is
//! believed only whole; without it everything is read.

use super::entry::{Time, order};
use super::failed;
use crate::BackupError;
use crate::disk::draw;
use rempart_repository::{ChunkId, DomainId};
use rustix::fs::Stat;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

const MAGIC: &[u8; 8] = b"RMPKNOW1";
const HASH: usize = 32;
/// A file that changed so shortly before it was read may have changed again, and shows the same times.
const SETTLED: i64 = 2;

/// What tells that a file is as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub number: u64,
    pub size: u64,
    pub modified: Time,
    pub changed: Time,
}

impl Identity {
    pub fn of(stat: &Stat) -> Identity {
        Identity {
            number: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or_default(),
            modified: Time { seconds: stat.st_mtime, nanoseconds: stat.st_mtime_nsec as u32 },
            changed: Time { seconds: stat.st_ctime, nanoseconds: stat.st_ctime_nsec as u32 },
        }
    }

    /// Whether a change from `now` on would show.
    pub fn is_settled(&self, now: i64) -> bool {
        self.changed.seconds.max(self.modified.seconds) < now.saturating_sub(SETTLED)
    }
}

/// One file with content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub path: Vec<u8>,
    pub identity: Identity,
    /// Whether the identity would tell of a change.
    pub is_settled: bool,
    /// Bytes.
    pub size: u64,
    /// Chunks that are not all zeroes, by their numbers in the file.
    pub chunks: Vec<(u64, ChunkId)>,
}

impl Record {
    /// Chunks, those of zeroes among them, if its identity would tell of a change.
    fn settled_chunks(&self, chunk_size: u32) -> u64 {
        if self.is_settled { self.size.div_ceil(chunk_size.into()) } else { 0 }
    }
}

/// What is known of the backup before.
#[derive(Debug)]
pub struct Known {
    records: Records,
    next: Option<Record>,
    chunk_size: u32,
    /// Chunks of settled files before the next one.
    passed: u64,
    /// Chunks of settled files, counted through all of them, that are read all the same, in ascending order.
    audit: VecDeque<u64>,
}

impl Known {
    /// `None` if there is nothing, or nothing that can be believed. So many chunks are drawn to be audited.
    pub(super) fn open(path: &Path, domain: DomainId, chunk_size: u32, audit: usize) -> Option<Known> {
        let mut file = File::open(path).ok()?;
        let mut rest = file.metadata().ok()?.len().checked_sub(HASH as u64)?;
        let (mut hasher, mut buffer) = (blake3::Hasher::new(), vec![0; 1 << 20]);
        while rest > 0 {
            let part = &mut buffer[..rest.min(1 << 20) as usize];
            file.read_exact(part).ok()?;
            hasher.update(part);
            rest -= part.len() as u64;
        }
        let mut hash = [0; HASH];
        file.read_exact(&mut hash).ok()?;
        if hasher.finalize() != hash {
            return None;
        }
        let mut records = Records::open(file.try_clone().ok()?, domain, chunk_size).ok()??;
        let mut chunks = 0;
        while let Some(record) = records.next().ok()? {
            chunks += record.settled_chunks(chunk_size);
        }
        let mut records = Records::open(file, domain, chunk_size).ok()??;
        let next = records.next().ok()?;
        Some(Known { records, next, chunk_size, passed: 0, audit: draw(chunks, audit).into() })
    }

    /// What is known of the file at `path`, and which of its chunks are to be audited. Paths must rise.
    pub(super) fn find(&mut self, path: &[u8]) -> Option<(Record, Vec<u64>)> {
        while let Some(record) = &self.next {
            match order(&record.path, path) {
                Ordering::Greater => return None,
                Ordering::Equal if !record.is_settled => return None,
                Ordering::Equal => return Some((record.clone(), self.audit_of_next())),
                Ordering::Less => {
                    self.passed += record.settled_chunks(self.chunk_size);
                    // What cannot be read any more is not known.
                    self.next = self.records.next().unwrap_or_default();
                }
            }
        }
        None
    }

    fn audit_of_next(&mut self) -> Vec<u64> {
        let chunks = self.next.as_ref().map_or(0, |record| record.settled_chunks(self.chunk_size));
        // Of files that are not there any more, nothing is audited.
        while self.audit.pop_front_if(|place| *place < self.passed).is_some() {}
        let mut own = Vec::new();
        while let Some(place) = self.audit.pop_front_if(|place| *place < self.passed + chunks) {
            own.push(place - self.passed);
        }
        own
    }
}

/// Records, one after the other.
#[derive(Debug)]
pub(super) struct Records(BufReader<File>);

impl Records {
    /// From a file's beginning; `None` if it is of something else.
    fn open(mut file: File, domain: DomainId, chunk_size: u32) -> io::Result<Option<Records>> {
        file.rewind()?;
        let mut file = BufReader::new(file);
        let expected = header(domain, chunk_size);
        let mut found = vec![0; expected.len()];
        file.read_exact(&mut found)?;
        Ok((found == expected).then_some(Records(file)))
    }

    pub fn next(&mut self) -> io::Result<Option<Record>> {
        let mut len = [0; 4];
        self.0.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len == 0 {
            return Ok(None);
        }
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes)?;
        postcard::from_bytes(&bytes).map(Some).map_err(|_| io::ErrorKind::InvalidData.into())
    }
}

fn header(domain: DomainId, chunk_size: u32) -> Vec<u8> {
    [&MAGIC[..], &domain.0, &chunk_size.to_le_bytes()].concat()
}

/// What will be known when this backup is in the repository.
#[derive(Debug)]
pub(super) struct NewKnown {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    hasher: blake3::Hasher,
    domain: DomainId,
    chunk_size: u32,
}

impl NewKnown {
    pub fn create(path: &Path, domain: DomainId, chunk_size: u32) -> Result<NewKnown, BackupError> {
        let folder = path.parent().expect("it is in the cache's folder");
        let file = NamedTempFile::new_in(folder).map_err(|why| failed("write", bytes(path), why))?;
        let hasher = blake3::Hasher::new();
        let mut new =
            NewKnown { path: path.to_owned(), file: BufWriter::new(file), hasher, domain, chunk_size };
        new.write(&header(domain, chunk_size))?;
        Ok(new)
    }

    fn write(&mut self, part: &[u8]) -> Result<(), BackupError> {
        self.hasher.update(part);
        self.file.write_all(part).map_err(|why| failed("write", bytes(&self.path), why))
    }

    pub fn push(&mut self, record: &Record) -> Result<(), BackupError> {
        let encoded = postcard::to_allocvec(record).expect("writing to memory does not fail");
        // In chunks of 64 KiB that is a file of 8 TiB without holes.
        let len = u32::try_from(encoded.len());
        let len =
            len.map_err(|_| failed("remember", &record.path, io::Error::from(io::ErrorKind::FileTooLarge)))?;
        self.write(&len.to_le_bytes())?;
        self.write(&encoded)
    }

    /// Ends it, and reads it from the beginning.
    pub fn finish(mut self) -> Result<(Records, Kept), BackupError> {
        self.write(&0u32.to_le_bytes())?;
        let hash = *self.hasher.finalize().as_bytes();
        let NewKnown { path, file, domain, chunk_size, .. } = self;
        let fail = |why| failed("write", bytes(&path), why);
        let mut file = file.into_inner().map_err(|e| fail(e.into_error()))?;
        file.write_all(&hash).map_err(fail)?;
        let again = file.reopen().map_err(fail)?;
        let records = Records::open(again, domain, chunk_size).map_err(fail)?;
        Ok((records.expect("it was just written"), Kept { path, file }))
    }
}

/// It is on the disk, and not yet in its place.
#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
    file: NamedTempFile,
}

impl Kept {
    pub fn keep(self) -> Result<(), BackupError> {
        let Kept { path, file } = self;
        let fail = |why| failed("write", bytes(&path), why);
        file.as_file().sync_all().map_err(fail)?;
        file.persist(&path).map_err(|e| fail(e.error))?;
        Ok(())
    }
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: DomainId = DomainId([7; 16]);

    fn record(path: &str, is_settled: bool) -> Record {
        let time = Time { seconds: 5, nanoseconds: 6 };
        let identity = Identity { number: 1, size: 9, modified: time, changed: time };
        let chunks = vec![(0, ChunkId([1; 32])), (2, ChunkId([2; 32]))];
        Record { path: path.into(), identity, is_settled, size: 9, chunks }
    }

    fn write(path: &Path) {
        let mut new = NewKnown::create(path, DOMAIN, 4096).expect("creates");
        for one in [record("a/b", true), record("a/c", false), record("a b", true)] {
            new.push(&one).expect("writes");
        }
        let (mut records, kept) = new.finish().expect("writes");
        let count = std::iter::from_fn(|| records.next().expect("reads")).count();
        assert_eq!(count, 3);
        kept.keep().expect("kept");
    }

    #[test]
    fn it_is_found_in_order_unless_it_may_have_changed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("known");
        assert!(Known::open(&path, DOMAIN, 4096, 0).is_none());
        write(&path);
        let mut known = Known::open(&path, DOMAIN, 4096, 0).expect("whole");
        let found = ["a", "a/b", "a/bb", "a/c", "a b", "z"]
            .map(|path| known.find(path.as_bytes()).map(|(record, _)| record));
        let expected = [None, Some(record("a/b", true)), None, None, Some(record("a b", true)), None];
        assert_eq!(found, expected);
        assert!(Known::open(&path, DomainId([8; 16]), 4096, 0).is_none(), "another key's");
        assert!(Known::open(&path, DOMAIN, 8192, 0).is_none(), "in other chunks");
    }

    /// Each chunk of a file whose identity would tell of a change is drawn as often as any other.
    #[test]
    fn as_many_chunks_are_audited_as_are_asked_for_of_files_that_are_known() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("known");
        let mut new = NewKnown::create(&path, DOMAIN, 4096).expect("creates");
        let sizes =
            [("a", 1, true), ("b", 3 * 4096 + 1, true), ("c", 9 * 4096, false), ("d", 2 * 4096, true)];
        for (name, size, is_settled) in sizes {
            new.push(&Record { size, ..record(name, is_settled) }).expect("writes");
        }
        new.finish().expect("writes").1.keep().expect("kept");
        let audited = |wanted: usize, names: &[&str]| {
            let mut known = Known::open(&path, DOMAIN, 4096, wanted).expect("whole");
            let found = names
                .iter()
                .map(|name| known.find(name.as_bytes()).map_or_else(Vec::new, |(_, audit)| audit));
            found.collect::<Vec<_>>()
        };
        let whole = [vec![0], vec![0, 1, 2, 3], vec![], vec![0, 1]];
        assert_eq!(audited(64, &["a", "b", "c", "d"]), whole);
        assert_eq!(audited(7, &["b", "d"]), [vec![0, 1, 2, 3], vec![0, 1]], "one is not there any more");
        let mut times = [0; 7];
        for _ in 0..700 {
            let drawn = audited(2, &["a", "b", "c", "d"]);
            assert_eq!(drawn.iter().map(Vec::len).sum::<usize>(), 2);
            let [a, b, c, d] = drawn.try_into().expect("four");
            assert!(c.is_empty());
            let places =
                a.into_iter().chain(b.into_iter().map(|at| at + 1)).chain(d.into_iter().map(|at| at + 5));
            places.for_each(|place| times[place as usize] += 1);
        }
        // 200 each; 100 less are ten standard deviations.
        assert!(times.iter().all(|times| (100..300).contains(times)), "{times:?}");
    }

    #[test]
    fn it_is_not_believed_with_a_bit_flipped_or_cut() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("known");
        write(&path);
        let whole = std::fs::read(&path).expect("reads");
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 4;
            std::fs::write(&path, &flipped).expect("writes");
            assert!(Known::open(&path, DOMAIN, 4096, 0).is_none(), "{at}");
            std::fs::write(&path, &whole[..at]).expect("writes");
            assert!(Known::open(&path, DOMAIN, 4096, 0).is_none(), "{at}");
        }
    }

    #[test]
    fn what_changed_a_moment_ago_is_not_settled() {
        let identity = record("a", true).identity;
        assert!(!identity.is_settled(5) && !identity.is_settled(7) && identity.is_settled(8));
    }
}

//! The local index, searched where it lies.
//!
//! | part | content |
//! |---|---|
//! | header | what it is, how many entries, hashes of itself and of the tail |
//! | blocks of 4 KiB | 128 sorted entries each, the last filled up with zeroes |
//! | tail, kept in memory | of each block: its hash, the start of its first id; the filter |
//!
//! Damage in header or tail is found when it is opened, damage in a block when that block is read; either way the file is
//! thrown away and made again from the segments. It is read with `pread`: under a memory map a failing disk would
//! kill the process instead of giving an error.

use super::entry::{ENTRY, IndexEntry, Located};
use super::filter::{Filter, LINE};
use crate::error::{Error, ErrorKind, Fault};
use crate::wire::{Reader, Writer};
use crate::{ChunkId, RepositoryId};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"RMPLOCAL";
const VERSION: u16 = 3;
/// Bytes of a block, and of the header with what fills it up.
pub(super) const BLOCK: usize = 4096;
pub(super) const BLOCK_ENTRIES: usize = BLOCK / ENTRY;
/// Bytes of the header that are in use.
const HEADER: usize = 8 + 2 + 6 + 16 + 8 + 8 + 8 + 32 + 8 + 8 + 32 + 32;
/// Bytes of a block's hash; it is to find accidents, nobody else writes the file.
const HASH: usize = 8;
/// Blocks that are read at once when all entries are.
const PIECE_BLOCKS: usize = 8;

/// How far the log was read into an index: the number of the last entry, and its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Covers {
    pub entry: u64,
    pub hash: [u8; 32],
}

pub(super) struct Header {
    pub repository: RepositoryId,
    pub entries: u64,
    pub from: u64,
    pub covers: Covers,
    pub filter_len: u64,
    pub filter_probes: u32,
    pub tail_hash: [u8; 32],
}

impl Header {
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut out = Writer::with_capacity(BLOCK);
        out.bytes(MAGIC);
        out.u16(VERSION);
        out.zeroes(6);
        out.bytes(&self.repository.0);
        out.u64(self.entries);
        out.u64(self.from);
        out.u64(self.covers.entry);
        out.bytes(&self.covers.hash);
        out.u64(self.filter_len);
        out.u32(self.filter_probes);
        out.zeroes(4);
        out.bytes(&self.tail_hash);
        let mut bytes = out.into_bytes();
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(check.as_bytes());
        bytes.resize(BLOCK, 0);
        bytes.try_into().expect("it was filled up")
    }

    fn parse(bytes: &[u8; BLOCK]) -> Result<Header, Fault> {
        let (header, rest) = bytes.split_at(HEADER);
        let mut input = Reader::new(header);
        input.magic(MAGIC)?;
        input.version(VERSION)?;
        if blake3::hash(&header[..HEADER - 32]) != *<&[u8; 32]>::try_from(&header[HEADER - 32..]).expect("32")
        {
            return Err(Fault::damaged("the checksum of its header does not fit"));
        }
        input.zeroes::<6>()?;
        let repository = RepositoryId(input.array()?);
        let entries = input.u64()?;
        let from = input.u64()?;
        let covers = Covers { entry: input.u64()?, hash: input.array()? };
        let filter_len = input.u64()?;
        let filter_probes = input.u32()?;
        input.zeroes::<4>()?;
        if rest.iter().any(|byte| *byte != 0) {
            return Err(Fault::damaged("a reserved byte is not zero"));
        }
        Ok(Header { repository, entries, from, covers, filter_len, filter_probes, tail_hash: input.array()? })
    }

    /// Bytes of the tail before the filter, and of the file; `None` if they cannot be.
    fn lengths(&self) -> Option<(usize, u64)> {
        let blocks = self.entries.div_ceil(BLOCK_ENTRIES as u64);
        let tables = blocks.checked_mul(2 * HASH as u64)?;
        let body = blocks.checked_mul(BLOCK as u64)?.checked_add(BLOCK as u64)?;
        let whole = body.checked_add(tables)?.checked_add(self.filter_len)?;
        self.filter_len.is_multiple_of(LINE as u64).then_some(())?;
        Some((usize::try_from(tables).ok()?, whole))
    }
}

/// One file of an index on this machine's disk. Its memory: ten bits an entry, 48 MiB at most, and 16 bytes a block.
pub struct LocalIndex {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) repository: RepositoryId,
    pub(super) entries: u64,
    /// The first of the log's objects that it was made of: 0 unless it goes on where another ends.
    pub(super) from: u64,
    pub(super) covers: Covers,
    /// Hashes of the blocks.
    pub(super) hashes: Vec<[u8; HASH]>,
    /// What the first id of each block begins with.
    pub(super) firsts: Vec<u64>,
    /// None if it was given up.
    pub(super) filter: Option<Filter>,
}

impl LocalIndex {
    /// Opens the file. [`ErrorKind::Damaged`], [`ErrorKind::Newer`] and [`ErrorKind::Foreign`]: throw it away and make it
    /// again.
    pub fn open(path: &Path, repository: &RepositoryId) -> Result<LocalIndex, Error> {
        let local = |source| Error::local(path, "read index", source);
        let file = File::open(path).map_err(local)?;
        let length = file.metadata().map_err(local)?.len();
        let fault = |fault: Fault| fault.of(path.display());
        if length < BLOCK as u64 {
            return Err(fault(Fault::damaged("it ends too early")));
        }
        let mut header = [0; BLOCK];
        file.read_exact_at(&mut header, 0).map_err(local)?;
        let header = Header::parse(&header).map_err(fault)?;
        if header.repository != *repository {
            return Err(fault(Fault::new(ErrorKind::Foreign, "it is the index of another repository")));
        }
        let damaged_length = || fault(Fault::damaged("its length is not that of what it lists"));
        // The file is as long as the header says, so what is allocated below is really there.
        let (tables, whole) =
            header.lengths().filter(|(_, whole)| *whole == length).ok_or_else(damaged_length)?;
        let filter_at = whole - header.filter_len;
        let mut table = vec![0; tables];
        file.read_exact_at(&mut table, filter_at - tables as u64).map_err(local)?;
        let mut filter = vec![0; usize::try_from(header.filter_len).map_err(|_| damaged_length())?];
        file.read_exact_at(&mut filter, filter_at).map_err(local)?;
        if tail_hash(&table, &filter) != header.tail_hash {
            return Err(fault(Fault::damaged("the checksum of its tail does not fit")));
        }
        let filter = Filter::from_bytes(filter, header.filter_probes)
            .ok_or_else(|| fault(Fault::damaged("it has an impossible filter")))?;
        let (hashes, firsts) = table.as_chunks::<HASH>().0.split_at(tables / (2 * HASH));
        Ok(LocalIndex {
            file,
            path: path.to_owned(),
            repository: header.repository,
            entries: header.entries,
            from: header.from,
            covers: header.covers,
            hashes: hashes.to_vec(),
            firsts: firsts.iter().map(|first| u64::from_be_bytes(*first)).collect(),
            filter: Some(filter),
        })
    }

    /// Gives up its filter: from then on what is not there is looked for on the disk, as what is there always is. For who
    /// looks for little else, and while another filter is being made.
    pub(crate) fn forget_filter(&mut self) {
        self.filter = None;
    }

    /// How far the log is in it.
    pub fn covers(&self) -> Covers {
        self.covers
    }

    /// Entries.
    pub fn len(&self) -> u64 {
        self.entries
    }

    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Whether the chunk may be in it: asked of memory only, and wrong for one new chunk in eighty, in very large
    /// repositories more, and for all of them without a filter.
    pub fn may_hold(&self, id: &ChunkId) -> bool {
        self.may_hold_half(&half(id))
    }

    fn may_hold_half(&self, id: &[u8; 16]) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.may_hold(id))
    }

    /// Bytes of memory that it takes.
    pub(crate) fn memory(&self) -> u64 {
        let filter = self.filter.as_ref().map_or(0, |filter| filter.bytes().len());
        (filter + 2 * HASH * self.hashes.len()) as u64
    }

    /// Every place where the blob may be: all but one in 2¹²⁸ are it, which shows when it is opened. Reads one block of the
    /// file, or none.
    pub fn find(&self, id: &ChunkId) -> Result<Vec<Located>, Error> {
        let mut found = Vec::new();
        self.search(id, |entry| {
            let located = IndexEntry::parse(entry).and_then(|entry| entry.locate(id));
            found.push(located.ok_or_else(|| self.damaged("an entry is impossible"))?);
            Ok(())
        })
        .map_err(|error| self.thrown_away(error))?;
        Ok(found)
    }

    /// How many entries stand before the first of those that [`find`](Self::find) would give.
    pub fn place_of(&self, id: &ChunkId) -> Result<Option<u64>, Error> {
        let wanted = half(id);
        if !self.may_hold_half(&wanted) {
            return Ok(None);
        }
        self.cursor().place_of(&wanted).map_err(|error| self.thrown_away(error))
    }

    /// What is damaged here can be made again: it is no loss. Takes the file away, so that the next who wants an index makes it
    /// anew; if that fails, so will whoever reads it.
    pub(crate) fn thrown_away(&self, error: Error) -> Error {
        if !error.is_loss() {
            return error;
        }
        let _ = std::fs::remove_file(&self.path);
        let (object, source) = (error.object.clone(), Some(error.into()));
        let why = "is damaged, and was thrown away: begin again".into();
        Error { kind: ErrorKind::Local, object, why, source }
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Looks for many ids, in their order.
    pub(crate) fn cursor(&self) -> Cursor<'_> {
        Cursor { index: self, passed: 0, block: None, bytes: [0; BLOCK] }
    }

    /// Gives the entries that may be the blob's.
    fn search(
        &self,
        id: &ChunkId,
        mut each: impl FnMut(&[u8; ENTRY]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let wanted = half(id);
        if !self.may_hold_half(&wanted) {
            return Ok(());
        }
        let start = first(&wanted);
        // The last block that begins before what is wanted, and any that begin just like it.
        let from = self.firsts.partition_point(|first| *first < start).saturating_sub(1);
        let to = self.firsts.partition_point(|first| *first <= start);
        let mut bytes = [0; BLOCK];
        for number in from..to {
            self.read_blocks(number, &mut bytes)?;
            let entries = self.block_entries(number, &bytes);
            let begin = entries.partition_point(|entry| entry[..16] < wanted[..]);
            let matching = entries[begin..].iter().take_while(|entry| entry[..16] == wanted);
            matching.into_iter().try_for_each(&mut each)?;
        }
        Ok(())
    }

    /// All entries, in order.
    pub fn entries(&self) -> impl Iterator<Item = Result<IndexEntry, Error>> + '_ {
        Entries { index: self, block: 0, bytes: Vec::new(), next: 0, end: 0 }
    }

    /// Reads whole blocks and checks them.
    fn read_blocks(&self, number: usize, bytes: &mut [u8]) -> Result<(), Error> {
        let at = BLOCK as u64 * (number as u64 + 1);
        self.file
            .read_exact_at(bytes, at)
            .map_err(|source| Error::local(&self.path, "read index", source))?;
        let blocks = bytes.chunks_exact(BLOCK).zip(&self.hashes[number..]);
        if blocks.into_iter().any(|(block, hash)| block_hash(block) != *hash) {
            return Err(self.damaged("the checksum of a block does not fit"));
        }
        Ok(())
    }

    /// The entries of a block, without what fills it up.
    fn block_entries<'a>(&self, number: usize, bytes: &'a [u8; BLOCK]) -> &'a [[u8; ENTRY]] {
        let before = (number * BLOCK_ENTRIES) as u64;
        let count = (self.entries - before).min(BLOCK_ENTRIES as u64) as usize;
        &bytes.as_chunks::<ENTRY>().0[..count]
    }

    fn damaged(&self, why: &'static str) -> Error {
        Error::new(ErrorKind::Damaged, self.path.display(), why)
    }
}

impl fmt::Debug for LocalIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("LocalIndex");
        out.field("path", &self.path).field("entries", &self.entries).field("covers", &self.covers).finish()
    }
}

/// Looks for ids that come in order. No block is read twice.
pub(crate) struct Cursor<'a> {
    index: &'a LocalIndex,
    /// Blocks that begin before the id that was looked for last.
    passed: usize,
    /// The block that `bytes` are of.
    block: Option<usize>,
    bytes: [u8; BLOCK],
}

impl Cursor<'_> {
    /// How many entries stand before the first whose id begins with `wanted`, if there is one. `wanted` is not before the
    /// one of the last call.
    pub fn place_of(&mut self, wanted: &[u8; 16]) -> Result<Option<u64>, Error> {
        let (index, start) = (self.index, first(wanted));
        let rest = &index.firsts[self.passed..];
        // Where many are looked for the next one is in the same block, or the next.
        if rest.first().is_some_and(|first| *first < start) {
            self.passed += rest.partition_point(|first| *first < start);
        }
        // The last block that begins before what is wanted, and any that begin just like it.
        for number in self.passed.saturating_sub(1)..index.firsts.len() {
            if number >= self.passed && index.firsts[number] > start {
                break;
            }
            if self.block != Some(number) {
                self.block = None;
                index.read_blocks(number, &mut self.bytes)?;
                self.block = Some(number);
            }
            let entries = index.block_entries(number, &self.bytes);
            let slot = entries.partition_point(|entry| entry[..16] < wanted[..]);
            if entries.get(slot).is_some_and(|entry| entry[..16] == wanted[..]) {
                return Ok(Some((number * BLOCK_ENTRIES + slot) as u64));
            }
        }
        Ok(None)
    }
}

struct Entries<'a> {
    index: &'a LocalIndex,
    /// The block to be read next.
    block: usize,
    bytes: Vec<u8>,
    /// Entries of `bytes` that were given, and that there are.
    next: usize,
    end: usize,
}

impl Entries<'_> {
    fn fill(&mut self) -> Result<bool, Error> {
        let blocks = (self.index.hashes.len() - self.block).min(PIECE_BLOCKS);
        if blocks == 0 {
            return Ok(false);
        }
        self.bytes.resize(blocks * BLOCK, 0);
        self.index.read_blocks(self.block, &mut self.bytes)?;
        let before = (self.block * BLOCK_ENTRIES) as u64;
        self.next = 0;
        self.end = (self.index.entries - before).min((blocks * BLOCK_ENTRIES) as u64) as usize;
        self.block += blocks;
        Ok(true)
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<IndexEntry, Error>;

    /// After an error there is nothing more.
    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.end {
            match self.fill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    (self.block, self.next, self.end) = (self.index.hashes.len(), 0, 0);
                    return Some(Err(error));
                }
            }
        }
        let bytes = &self.bytes.as_chunks::<ENTRY>().0[self.next];
        self.next += 1;
        Some(IndexEntry::parse(bytes).ok_or_else(|| self.index.damaged("an entry is impossible")))
    }
}

/// A file of those blocks, hashes and all, whose filter knows everything.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn local_of(repository: RepositoryId, entries: u64, blocks: &[u8]) -> Vec<u8> {
    let blocks = blocks.chunks(BLOCK);
    let hashes = blocks.clone().flat_map(block_hash);
    let firsts = blocks.clone().flat_map(|block| block[..8].to_vec());
    let (tables, filter) = (hashes.chain(firsts).collect::<Vec<_>>(), [0xff; LINE]);
    let covers = Covers { entry: 9, hash: [9; 32] };
    let tail_hash = tail_hash(&tables, &filter);
    let (from, filter_len, filter_probes) = (0, LINE as u64, 6);
    let header = Header { repository, entries, from, covers, filter_len, filter_probes, tail_hash };
    [&header.encode()[..], &blocks.collect::<Vec<_>>().concat(), &tables, &filter].concat()
}

pub(super) fn block_hash(block: &[u8]) -> [u8; HASH] {
    blake3::hash(block).as_bytes()[..HASH].try_into().expect("8 bytes")
}

pub(super) fn tail_hash(tables: &[u8], filter: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(tables).update(filter).finalize().as_bytes()
}

/// What an id begins with, as a number.
pub(super) fn first(id: &[u8; 16]) -> u64 {
    let (first, _) = id.split_at(8);
    u64::from_be_bytes(first.try_into().expect("8 bytes"))
}

fn half(id: &ChunkId) -> [u8; 16] {
    id.0[..16].try_into().expect("16 bytes")
}

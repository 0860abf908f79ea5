//! Disks of restore points, and files that lie in their trees, read at any place, from any number of threads.

mod cache;
mod read_ahead;
mod streams;

pub use cache::ChunkCache;

use crate::Content;
use bytes::Bytes;
use rempart_nbd::server::Piece;
use rempart_repository::{ChunkId, ChunkSize, Error, ErrorKind, FAN_OUT, Step, Tree, Walk};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use streams::Streams;
use thiserror::Error;

/// Chunks that one answer about holes looks at, at most: it may end before the range that was asked about.
const LOOKED_AT: u64 = 16 * 1024;
/// A piece of a chunk that is smaller than this part of it is copied: else who keeps it keeps the whole chunk.
const WORTH_KEEPING: usize = 2;

/// One disk of a restore point, or one of its files.
#[derive(Debug)]
pub struct DiskReader {
    cache: Arc<ChunkCache>,
    name: String,
    /// For people.
    what: String,
    content: Content,
    /// Chunks of the tree that are before it.
    first: u64,
    streams: Mutex<Streams>,
}

/// Why bytes cannot be read. Others can, most likely.
#[derive(Debug, Error)]
#[error("{}{what} cannot be read", bytes_of(*start, *end))]
pub struct ReadError {
    /// Such as a disk.
    pub what: String,
    pub start: u64,
    /// Where it is the start, all that is meant is `what`.
    pub end: u64,
    pub source: Error,
}

fn bytes_of(start: u64, end: u64) -> String {
    if start == end { String::new() } else { format!("bytes {start} to {end} of ") }
}

/// A run of bytes that hold something, or nothing but zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub len: u64,
    pub is_data: bool,
}

impl DiskReader {
    pub fn new(cache: &Arc<ChunkCache>, name: &str, content: Content) -> DiskReader {
        let streams = Mutex::new(Streams::new(cache.read_ahead_chunks()));
        let what = format!("disk `{name}`");
        DiskReader { cache: cache.clone(), name: name.to_owned(), what, content, first: 0, streams }
    }

    /// `size` bytes in a tree, of which `first` is the first chunk. `what` is for people.
    pub(crate) fn of_part(
        cache: &Arc<ChunkCache>,
        what: String,
        tree: Tree,
        chunk_size: ChunkSize,
        first: u64,
        size: u64,
    ) -> DiskReader {
        let content = Content { tree, chunk_size, size };
        DiskReader { what, first, ..DiskReader::new(cache, "", content) }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.content.size
    }

    /// What lies there, in order and as long as asked for. The range is within the disk.
    pub fn read(&self, offset: u64, len: u64) -> Result<Vec<Piece>, ReadError> {
        let chunks = self.chunks(offset, len);
        self.read_ahead_of(&chunks);
        let mut pieces = Vec::with_capacity((chunks.end - chunks.start) as usize);
        for part in self.by_leaves(chunks) {
            let leaf = self.cache.leaf(self.content.tree, part.start / FAN_OUT as u64);
            let leaf = leaf.map_err(|source| self.unreadable(part.clone(), source))?;
            let ids = ids_of(&leaf, &part);
            let contents = self.cache.chunks(ids).map_err(|(place, source)| {
                let chunk = part.start + place as u64;
                self.unreadable(chunk..chunk + 1, source)
            })?;
            self.add_pieces(&mut pieces, part, ids, contents, offset..offset + len)?;
        }
        Ok(pieces)
    }

    /// The same, if all of it is in memory.
    pub fn read_cached(&self, offset: u64, len: u64) -> Option<Vec<Piece>> {
        let chunks = self.chunks(offset, len);
        self.read_ahead_of(&chunks);
        let mut pieces = Vec::new();
        for part in self.by_leaves(chunks) {
            let leaf = self.cache.cached_leaf(self.content.tree, part.start / FAN_OUT as u64)?;
            let ids = ids_of(&leaf, &part);
            let contents = self.cache.cached_chunks(ids)?;
            self.add_pieces(&mut pieces, part, ids, contents, offset..offset + len).ok()?;
        }
        Some(pieces)
    }

    fn add_pieces(
        &self,
        pieces: &mut Vec<Piece>,
        chunks: Range<u64>,
        ids: &[ChunkId],
        contents: Vec<Bytes>,
        bytes: Range<u64>,
    ) -> Result<(), ReadError> {
        for ((chunk, id), content) in chunks.zip(ids).zip(contents) {
            let start = self.start_of(chunk);
            let expected = self.chunk_len(chunk);
            let wanted = bytes.start.max(start) - start..bytes.end.min(start + expected) - start;
            if id.is_zero() {
                push_zeroes(pieces, wanted.end - wanted.start);
                continue;
            }
            if content.len() as u64 != expected {
                let why = format!("it has {} bytes, and its place {expected}", content.len());
                return Err(self.unreadable(chunk..chunk + 1, Error::new(ErrorKind::Damaged, id, why)));
            }
            let part = content.slice(wanted.start as usize..wanted.end as usize);
            let is_most = part.len() >= content.len() / WORTH_KEEPING;
            pieces.push(Piece::Data(if is_most { part } else { Bytes::copy_from_slice(&part) }));
        }
        Ok(())
    }

    /// What lies there, written into `buffer`.
    pub fn read_into(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let mut rest = buffer;
        for piece in self.read(offset, rest.len() as u64)? {
            match piece {
                Piece::Data(bytes) => {
                    let (here, behind) = rest.split_at_mut(bytes.len());
                    here.copy_from_slice(&bytes);
                    rest = behind;
                }
                Piece::Zeroes(len) => {
                    let (here, behind) = rest.split_at_mut(len as usize);
                    here.fill(0);
                    rest = behind;
                }
            }
        }
        Ok(())
    }

    /// Where there is something, from `offset` on: at least one run, in order, and together no longer than `len`.
    pub fn allocation(&self, offset: u64, len: u64) -> Result<Vec<Run>, ReadError> {
        let chunks = self.chunks(offset, len);
        let unreadable = |chunks: Range<u64>| move |source| self.unreadable(chunks, source);
        let walk = Walk::range(self.cache.nodes(), self.content.tree, chunks.clone());
        let walk = walk.map_err(unreadable(chunks.clone()))?;
        let mut runs = Runs::default();
        let (mut next, mut seen) = (chunks.start, 0);
        for step in walk {
            let Step::Chunk { index, .. } = step.map_err(unreadable(next..chunks.end))? else { continue };
            runs.push(self.bytes_of(next..index, offset, len), false);
            runs.push(self.bytes_of(index..index + 1, offset, len), true);
            (next, seen) = (index + 1, seen + 1);
            if seen == LOOKED_AT {
                return Ok(runs.0);
            }
        }
        runs.push(self.bytes_of(next..chunks.end, offset, len), false);
        Ok(runs.0)
    }

    /// The first byte at or behind `offset` that is data, or that is not: the disk's size if there is none.
    pub fn seek(&self, offset: u64, to_data: bool) -> Result<u64, ReadError> {
        let mut at = offset;
        while at < self.size() {
            for run in self.allocation(at, self.size() - at)? {
                if run.is_data == to_data {
                    return Ok(at);
                }
                at += run.len;
            }
        }
        Ok(at)
    }

    fn read_ahead_of(&self, chunks: &Range<u64>) {
        let wanted = self.streams.lock().expect("no holder panics").read(chunks.clone());
        if let Some(mut wanted) = wanted {
            wanted.end = wanted.end.min(self.first + self.content.chunk_size.count(self.size()));
            if !wanted.is_empty() {
                self.cache.read_ahead(self.content.tree, wanted);
            }
        }
    }

    /// The chunks that hold the range.
    fn chunks(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size());
        let end = end.expect("who reads stays within the disk");
        let chunk_len = u64::from(self.content.chunk_size.bytes());
        self.first + offset / chunk_len..self.first + end.div_ceil(chunk_len)
    }

    /// Cut where one leaf of the tree ends and the next begins.
    fn by_leaves(&self, chunks: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let fan_out = FAN_OUT as u64;
        let leaves = chunks.start / fan_out..chunks.end.div_ceil(fan_out);
        leaves.map(move |leaf| {
            chunks.start.max(leaf * fan_out)..chunks.end.min((leaf + 1).saturating_mul(fan_out))
        })
    }

    /// The byte that a chunk begins with.
    fn start_of(&self, chunk: u64) -> u64 {
        (chunk - self.first) * u64::from(self.content.chunk_size.bytes())
    }

    /// Bytes of a chunk; the last may be shorter than the others.
    fn chunk_len(&self, chunk: u64) -> u64 {
        u64::from(self.content.chunk_size.bytes()).min(self.size() - self.start_of(chunk))
    }

    /// How many bytes of these chunks are in the range.
    fn bytes_of(&self, chunks: Range<u64>, offset: u64, len: u64) -> u64 {
        let start = self.start_of(chunks.start).clamp(offset, offset + len);
        let end = self.start_of(chunks.end).clamp(offset, offset + len);
        end - start
    }

    fn unreadable(&self, chunks: Range<u64>, source: Error) -> ReadError {
        let (start, end) = (self.start_of(chunks.start), self.start_of(chunks.end).min(self.size()));
        ReadError { what: self.what.clone(), start, end, source }
    }
}

/// Those of chunks that lie below one leaf.
fn ids_of<'a>(leaf: &'a Leaf, chunks: &Range<u64>) -> &'a [ChunkId] {
    let first = (chunks.start % FAN_OUT as u64) as usize;
    &leaf[first..first + (chunks.end - chunks.start) as usize]
}

/// Neighbouring zeroes are told together.
fn push_zeroes(pieces: &mut Vec<Piece>, len: u64) {
    match pieces.last_mut() {
        Some(Piece::Zeroes(before)) => *before += len,
        _ => pieces.push(Piece::Zeroes(len)),
    }
}

#[derive(Default)]
struct Runs(Vec<Run>);

impl Runs {
    fn push(&mut self, len: u64, is_data: bool) {
        match self.0.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.is_data == is_data => last.len += len,
            _ => self.0.push(Run { len, is_data }),
        }
    }
}

/// The ids of the chunks below one leaf of a tree.
type Leaf = [ChunkId; FAN_OUT];

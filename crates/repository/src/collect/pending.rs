//! Chunks that are reached, and not looked for in the index yet.
//!
//! They come in no order, and the index is in that of ids: each goes to those that begin as it does, in a file, and what
//! begins alike is sorted in memory and looked for together. So the index is read once for all of them.

use crate::ChunkId;
use crate::error::Error;
use crate::index::LocalIndex;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bits of an id that say where it goes.
const PREFIX: u32 = 9;
/// Ids that are written at once: 8 KiB, of which each prefix has as much in memory.
const PIECE: usize = 512;
/// Pieces that are sorted together, at most: 4 MiB.
const TOGETHER: usize = 512;
const ID: usize = 16;
/// Threads that look for them, at most: each has 6 MiB in its hands.
const THREADS: usize = 4;

/// The first half of an id, in the order of the index.
type Half = u128;

/// Ids in any order, many of them more than once.
#[derive(Debug)]
pub(super) struct Pending {
    /// Beside which the file is made.
    path: PathBuf,
    piece: usize,
    together: usize,
    /// It has no name, and is gone when it is closed.
    file: Option<File>,
    prefixes: Vec<Alike>,
    len: u64,
    /// Pieces in the file.
    pieces: u64,
}

/// Ids that begin alike.
#[derive(Debug, Default)]
struct Alike {
    ids: Vec<Half>,
    written: Vec<Piece>,
}

/// Where it lies, and a hash of it: what is read wrong would be taken for unreached.
#[derive(Debug)]
struct Piece {
    place: u32,
    hash: [u8; 8],
}

impl Pending {
    pub fn new(index: &LocalIndex) -> Pending {
        let prefixes = (0..1 << PREFIX).map(|_| Alike::default()).collect();
        let (piece, together) = (PIECE, TOGETHER);
        Pending { path: index.path().to_owned(), piece, together, file: None, prefixes, len: 0, pieces: 0 }
    }

    /// Pieces of so many ids, of which so many are sorted together.
    #[cfg(test)]
    pub fn with_pieces_of(self, piece: usize, together: usize) -> Pending {
        Pending { piece, together, ..self }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn push(&mut self, id: &ChunkId) -> Result<(), Error> {
        let half = Half::from_be_bytes(id.0[..ID].try_into().expect("16 bytes"));
        let place = (half >> (Half::BITS - PREFIX)) as usize;
        self.prefixes[place].ids.push(half);
        self.len += 1;
        if self.prefixes[place].ids.len() == self.piece { self.write(place) } else { Ok(()) }
    }

    fn write(&mut self, place: usize) -> Result<(), Error> {
        let file = match &self.file {
            Some(file) => file,
            None => self.file.insert(crate::index::unnamed_file(&self.path)?),
        };
        let alike = &mut self.prefixes[place];
        let bytes: Vec<u8> = alike.ids.drain(..).flat_map(Half::to_be_bytes).collect();
        let at = self.pieces * (self.piece * ID) as u64;
        file.write_all_at(&bytes, at)
            .map_err(|source| Error::local(&self.path, "write beside index", source))?;
        let piece = u32::try_from(self.pieces).expect("so many chunks are not collected");
        alike.written.push(Piece { place: piece, hash: hash(&bytes) });
        self.pieces += 1;
        Ok(())
    }

    /// Tells the places of all that are in the index.
    ///
    /// # Errors
    /// The first one. Places may have been told before.
    pub fn find(self, index: &LocalIndex, found: impl FnMut(u64) + Send) -> Result<(), Error> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
        let (next, found) = (AtomicUsize::new(0), Mutex::new(found));
        let work = || {
            loop {
                let place = next.fetch_add(1, Ordering::Relaxed);
                let Some(alike) = self.prefixes.get(place) else { return Ok(()) };
                let told = self.find_alike(alike, index, &found);
                if told.is_err() {
                    // The others need not go on.
                    next.store(self.prefixes.len(), Ordering::Relaxed);
                    return told;
                }
            }
        };
        // Few are found sooner than a thread is started.
        if self.pieces == 0 || threads == 1 {
            return work();
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let ended =
                threads.into_iter().map(|thread| thread.join().expect("a panic of a thread goes on here"));
            ended.reduce(Result::and).unwrap_or(Ok(()))
        })
    }

    fn find_alike(
        &self,
        alike: &Alike,
        index: &LocalIndex,
        found: &Mutex<impl FnMut(u64)>,
    ) -> Result<(), Error> {
        let mut rest = &alike.written[..];
        loop {
            // More than that there are only if somebody made up ids that all begin alike.
            let (here, behind) = rest.split_at(rest.len().min(self.together));
            rest = behind;
            let mut ids = self.read(here)?;
            if rest.is_empty() {
                ids.extend_from_slice(&alike.ids);
            }
            ids.sort_unstable();
            ids.dedup();
            let mut cursor = index.cursor();
            let mut places = Vec::with_capacity(ids.len());
            for id in &ids {
                places.extend(cursor.place_of(&id.to_be_bytes())?);
            }
            let mut found = found.lock().expect("no holder panics");
            places.into_iter().for_each(&mut *found);
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    fn read(&self, pieces: &[Piece]) -> Result<Vec<Half>, Error> {
        let Some(file) = &self.file else { return Ok(Vec::new()) };
        let local = |source| Error::local(&self.path, "read beside index", source);
        let mut bytes = vec![0; self.piece * ID];
        let mut ids = Vec::with_capacity(pieces.len() * self.piece);
        for piece in pieces {
            let at = u64::from(piece.place) * bytes.len() as u64;
            file.read_exact_at(&mut bytes, at).map_err(local)?;
            if hash(&bytes) != piece.hash {
                return Err(local(std::io::Error::other("it is not what was written")));
            }
            ids.extend(bytes.as_chunks::<ID>().0.iter().map(|half| Half::from_be_bytes(*half)));
        }
        Ok(ids)
    }
}

fn hash(bytes: &[u8]) -> [u8; 8] {
    blake3::hash(bytes).as_bytes()[..8].try_into().expect("8 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::index::tests::{id, local};
    use std::collections::BTreeSet;

    const COUNT: u64 = 4000;

    fn found(pending: Pending, index: &LocalIndex) -> Result<BTreeSet<u64>, Error> {
        let mut places = BTreeSet::new();
        let found = pending.find(index, |place| places.extend([place]));
        found.map(|()| places)
    }

    /// A hostile writer's trees may say that they have any chunks.
    #[test]
    fn ids_that_all_begin_alike_are_found_and_take_no_more_memory() {
        let folder = tempfile::tempdir().expect("a folder");
        let index = local(&folder.path().join("index"), COUNT);
        let alike: Vec<ChunkId> = (0..COUNT).map(id).filter(|id| id.0[0] == 7).collect();
        let mut pending = Pending::new(&index).with_pieces_of(2, 3);
        alike[..5].iter().chain(&alike).for_each(|id| pending.push(id).expect("pends"));
        // Some of them lie in pieces that are read by themselves, and some are not in the file.
        let of_them = pending.prefixes.iter().filter(|prefix| !prefix.written.is_empty());
        let of_them: Vec<_> = of_them.map(|prefix| (prefix.written.len(), prefix.ids.len())).collect();
        assert!(of_them.iter().any(|(written, rest)| *written > 3 && *rest > 0), "{of_them:?}");
        let expected = alike.iter().filter_map(|id| index.place_of(id).expect("whole"));
        assert_eq!(found(pending, &index).expect("found"), expected.collect());
    }

    #[test]
    fn what_is_read_wrong_is_no_chunk_that_nobody_reaches() {
        let folder = tempfile::tempdir().expect("a folder");
        let index = local(&folder.path().join("index"), COUNT);
        let mut pending = Pending::new(&index).with_pieces_of(2, TOGETHER);
        (0..COUNT).for_each(|number| pending.push(&id(number)).expect("pends"));
        let file = pending.file.as_ref().expect("most of them are in it");
        file.write_all_at(&[0x55], file.metadata().expect("its length").len() / 2).expect("damages");
        let error = found(pending, &index).expect_err("it is damaged");
        assert!(error.kind == ErrorKind::Local && !error.is_loss(), "{error}");
    }
}

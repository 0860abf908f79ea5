//! Reading chunks and tree nodes back.

use crate::blob::{BlobKind, Decompressor};
use crate::error::{Error, ErrorKind};
use crate::index::{Index, Located};
use crate::log::{LivePacks, Log, Number, State};
use crate::pack::{Blob, PackOpener};
use crate::repository::Keys;
use crate::tree::NodeSource;
use crate::{ChunkId, DomainId, Repository};
use rempart_objects::Objects;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

/// Packs whose secrets are kept opened: 300 bytes each.
const OPENED: usize = 16 * 1024;
/// What lies between two wanted blobs is read along up to so many bytes: a request costs as much.
const GAP: u64 = 128 << 10;
/// Bytes read from a pack at once, at most.
const LONGEST: u64 = 8 << 20;
/// Times that what is missing is looked for where the log says that it is by now.
const LOOKS: u32 = 10;
/// Looking in vain takes at most one part of the time in so many.
const LOOK_PART: u32 = 20;

/// Reads what is in a repository, on any number of threads.
#[derive(Debug)]
pub struct BlobReader {
    objects: Arc<dyn Objects>,
    keys: Keys,
    index: RwLock<Index>,
    packs: RwLock<LivePacks>,
    opened: Mutex<BTreeMap<Number, Arc<PackOpener>>>,
    follows: Option<Follows>,
}

/// How a reader goes on while others collect.
#[derive(Debug)]
struct Follows {
    repository: Arc<Repository>,
    looked: Mutex<Looked>,
}

/// What is known of the log.
#[derive(Debug)]
struct Looked {
    log: Option<Log>,
    /// Entries of which packs and index are.
    covers: u64,
    /// When nothing had changed last, and how long that took to find out.
    in_vain: Option<(Instant, Duration)>,
}

impl BlobReader {
    /// Reads what is live in `state`, and looks in the log again where that is not there any more: collections put elsewhere,
    /// and backups store anew, what is lost.
    pub fn following(repository: &Arc<Repository>, state: &State) -> Result<BlobReader, Error> {
        let reader = BlobReader::new(repository, state, repository.index(state)?);
        reader.forget_filter();
        let looked = Mutex::new(Looked { log: None, covers: state.next(), in_vain: None });
        Ok(BlobReader { follows: Some(Follows { repository: repository.clone(), looked }), ..reader })
    }

    /// Reads what is live in `state`, of which `index` is, and nothing else.
    pub fn new(repository: &Repository, state: &State, index: Index) -> BlobReader {
        BlobReader {
            objects: repository.objects().clone(),
            keys: repository.keys().clone(),
            index: RwLock::new(index),
            packs: RwLock::new(state.live_packs()),
            opened: Mutex::default(),
            follows: None,
        }
    }

    /// Whether, and where, a blob is stored.
    pub(crate) fn find(&self, id: &ChunkId) -> Result<Vec<Located>, Error> {
        let found = self.index().find(id)?;
        let packs = self.packs.read().expect("no holder panics");
        Ok(found.into_iter().filter(|located| packs.get(located.pack).is_some()).collect())
    }

    /// The same, in packs of one domain: what a backup of that domain may require.
    pub(crate) fn find_in(&self, id: &ChunkId, domain: DomainId) -> Result<Vec<Located>, Error> {
        let found = self.index().find(id)?;
        let packs = self.packs.read().expect("no holder panics");
        let is_of_it = |pack: Number| packs.get(pack).is_some_and(|(_, of)| of == domain);
        Ok(found.into_iter().filter(|located| is_of_it(located.pack)).collect())
    }

    /// Reads a chunk, or a node, into `plain`.
    ///
    /// # Errors
    /// If no live pack has it whole. The last pack that should have had it says why.
    pub fn read(
        &self,
        kind: BlobKind,
        id: &ChunkId,
        plain: &mut Vec<u8>,
        decompressor: &mut Decompressor,
    ) -> Result<(), Error> {
        for _ in 0..LOOKS {
            let covers = self.covers();
            match self.read_here(kind, id, plain, decompressor) {
                Err(_) if self.look_again(covers) => {}
                ended => return ended,
            }
        }
        self.read_here(kind, id, plain, decompressor)
    }

    fn covers(&self) -> u64 {
        let looked = self.follows.as_ref().map(|follows| follows.looked.lock().expect("no holder panics"));
        looked.map_or(0, |looked| looked.covers)
    }

    /// Whether more of the log is known now than its first `covers` entries.
    fn look_again(&self, covers: u64) -> bool {
        let Some(Follows { repository, looked }) = &self.follows else { return false };
        let mut looked = looked.lock().expect("no holder panics");
        if looked.covers > covers {
            return true;
        }
        if looked.in_vain.is_some_and(|(ended, took)| ended.elapsed() < took * LOOK_PART) {
            return false;
        }
        let began = Instant::now();
        // What the caller met says more than why it could not be looked for.
        let found = self.catch_up(repository, &mut looked).unwrap_or(false);
        looked.in_vain = (!found).then(|| (Instant::now(), began.elapsed()));
        found
    }

    fn catch_up(&self, repository: &Repository, looked: &mut Looked) -> Result<bool, Error> {
        let log = match looked.log.take() {
            Some(mut log) => {
                log.refresh()?;
                log
            }
            None => repository.log()?,
        };
        let state = looked.log.insert(log).state();
        let is_more = state.next() > looked.covers;
        if is_more {
            drop(self.replace(state, repository.index(state)?));
            self.forget_filter();
            looked.covers = state.next();
        }
        Ok(is_more)
    }

    fn read_here(
        &self,
        kind: BlobKind,
        id: &ChunkId,
        plain: &mut Vec<u8>,
        decompressor: &mut Decompressor,
    ) -> Result<(), Error> {
        let mut refusal = missing(id);
        for located in self.find(id)?.into_iter().filter(|located| located.blob.kind == kind) {
            match self.read_at(&located, plain, decompressor) {
                Ok(()) => return Ok(()),
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }

    fn read_at(
        &self,
        located: &Located,
        plain: &mut Vec<u8>,
        decompressor: &mut Decompressor,
    ) -> Result<(), Error> {
        let opener = self.opener(located.pack)?;
        let stored = self.objects.get_range(&opener.name().object(), located.blob.range())?;
        plain.resize(located.blob.plain_len as usize, 0);
        opener.open_blob(&located.blob, &stored, plain, decompressor)
    }

    /// Reads many chunks, those that lie together in one request. `each` is given them in any order, each once, by its
    /// place in `ids`; the reserved id of zeroes is not asked for.
    ///
    /// # Errors
    /// The first one; of a chunk that no pack has whole, or of `each`.
    pub fn read_many(
        &self,
        ids: &[ChunkId],
        decompressor: &mut Decompressor,
        each: impl FnMut(usize, &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.read_all(BlobKind::Data, ids, decompressor, each)
    }

    /// The same for nodes, too.
    pub(crate) fn read_all(
        &self,
        kind: BlobKind,
        ids: &[ChunkId],
        decompressor: &mut Decompressor,
        mut each: impl FnMut(usize, &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut wanted = Vec::with_capacity(ids.len());
        let mut plain = Vec::new();
        for (place, id) in ids.iter().enumerate().filter(|(_, id)| !id.is_zero()) {
            match self.find(id)?.into_iter().find(|located| located.blob.kind == kind) {
                Some(located) => wanted.push((located, place)),
                None => {
                    self.read(kind, id, &mut plain, decompressor)?;
                    each(place, &plain)?;
                }
            }
        }
        self.read_located(wanted, decompressor, |_, place, whole| match whole {
            Some(plain) => each(place, plain),
            // Another pack may have it.
            None => {
                self.read(kind, &ids[place], &mut plain, &mut Decompressor::new())?;
                each(place, &plain)
            }
        })
    }

    /// Reads blobs where they are said to lie, those that lie together in one request. `each` is given their packs, the numbers
    /// that came with them, and the blobs; `None` for one that is not there whole.
    pub(crate) fn read_located(
        &self,
        mut wanted: Vec<(Located, usize)>,
        decompressor: &mut Decompressor,
        mut each: impl FnMut(Number, usize, Option<&[u8]>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut plain = Vec::new();
        wanted.sort_unstable_by_key(|(located, _)| (located.pack, located.blob.offset));
        let mut rest = &wanted[..];
        while let Some((first, _)) = rest.first() {
            let start = first.blob.range().start;
            let mut end = start;
            let together = rest.iter().take_while(|(located, _)| {
                let range = located.blob.range();
                let fits =
                    located.pack == first.pack && range.start <= end + GAP && range.end - start <= LONGEST;
                if fits {
                    end = end.max(range.end);
                }
                fits
            });
            let (here, behind) = rest.split_at(together.count().max(1));
            rest = behind;
            end = end.max(first.blob.range().end);
            let read = self.opener(first.pack).and_then(|opener| {
                let bytes = self.objects.get_range(&opener.name().object(), start..end)?;
                Ok((opener, bytes))
            });
            for (located, place) in here {
                let Blob { plain_len, .. } = located.blob;
                plain.resize(plain_len as usize, 0);
                let opened = read.as_ref().ok().and_then(|(opener, bytes)| {
                    let range = located.blob.range();
                    let stored = &bytes[(range.start - start) as usize..(range.end - start) as usize];
                    opener.open_blob(&located.blob, stored, &mut plain, decompressor).ok()
                });
                each(located.pack, *place, opened.map(|()| &plain[..]))?;
            }
        }
        Ok(())
    }

    fn opener(&self, pack: Number) -> Result<Arc<PackOpener>, Error> {
        if let Some(opened) = self.opened.lock().expect("no holder panics").get(&pack) {
            return Ok(opened.clone());
        }
        let name = self.packs.read().expect("no holder panics").get(pack).map(|(name, _)| name);
        let name =
            name.ok_or_else(|| Error::new(ErrorKind::Missing, format!("pack {pack}"), "it is not live"))?;
        let opener = Arc::new(PackOpener::fetch(&*self.objects, self.keys.opener()?, name)?);
        let mut opened = self.opened.lock().expect("no holder panics");
        if opened.len() >= OPENED {
            opened.pop_first();
        }
        opened.insert(pack, opener.clone());
        Ok(opener)
    }

    /// Whether the index may know the blob: asked of memory only.
    pub(crate) fn may_hold(&self, id: &ChunkId) -> bool {
        self.index().may_hold(id)
    }

    /// From here on with what is live in `state`, too. Returns the index that it had.
    pub(crate) fn replace(&self, state: &State, index: Index) -> Index {
        *self.packs.write().expect("no holder panics") = state.live_packs();
        std::mem::replace(&mut self.index.write().expect("no holder panics"), index)
    }

    /// Gives up the index's filter, until it is [replaced](Self::replace): for who looks for what is there.
    pub(crate) fn forget_filter(&self) {
        self.index.write().expect("no holder panics").forget_filter();
    }

    pub(crate) fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().expect("no holder panics")
    }
}

fn missing(id: &ChunkId) -> Error {
    Error::new(ErrorKind::Missing, id, "no pack has this chunk")
}

impl NodeSource for BlobReader {
    fn node(&self, id: &ChunkId) -> Result<Vec<u8>, Error> {
        let mut plain = Vec::new();
        self.read(BlobKind::Tree, id, &mut plain, &mut Decompressor::new())?;
        Ok(plain)
    }
}

//! Reading chunks and tree nodes back.

use crate::blob::{BlobKind, Decompressor};
use crate::error::{Error, ErrorKind};
use crate::index::{LocalIndex, Located};
use crate::log::{Content, Number, Object, State, Status};
use crate::pack::{Blob, PackOpener};
use crate::repository::Keys;
use crate::tree::NodeSource;
use crate::{ChunkId, DomainId, PackName, Repository};
use rempart_objects::Objects;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};

/// Packs whose secrets are kept opened: 300 bytes each.
const OPENED: usize = 16 * 1024;
/// What lies between two wanted blobs is read along up to so many bytes: a request costs as much.
const GAP: u64 = 128 << 10;
/// Bytes read from a pack at once, at most.
const LONGEST: u64 = 8 << 20;

/// Reads what is in a repository, on any number of threads.
#[derive(Debug)]
pub struct BlobReader {
    objects: Arc<dyn Objects>,
    keys: Keys,
    index: RwLock<LocalIndex>,
    packs: RwLock<BTreeMap<Number, LivePack>>,
    opened: Mutex<BTreeMap<Number, Arc<PackOpener>>>,
}

impl BlobReader {
    /// Reads what is live in `state`, of which `index` is.
    pub fn new(repository: &Repository, state: &State, index: LocalIndex) -> BlobReader {
        BlobReader {
            objects: repository.objects().clone(),
            keys: repository.keys().clone(),
            index: RwLock::new(index),
            packs: RwLock::new(live_packs(state).collect()),
            opened: Mutex::default(),
        }
    }

    /// Whether, and where, a blob is stored.
    pub(crate) fn find(&self, id: &ChunkId) -> Result<Vec<Located>, Error> {
        let found = self.index().find(id)?;
        let packs = self.packs.read().expect("no holder panics");
        Ok(found.into_iter().filter(|located| packs.contains_key(&located.pack)).collect())
    }

    /// The same, in packs of one domain: what a backup of that domain may require.
    pub(crate) fn find_in(&self, id: &ChunkId, domain: DomainId) -> Result<Vec<Located>, Error> {
        let found = self.index().find(id)?;
        let packs = self.packs.read().expect("no holder panics");
        let is_of_it = |pack: Number| packs.get(&pack).is_some_and(|pack| pack.domain == domain);
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
        for (place, id) in ids.iter().enumerate().filter(|(_, id)| !id.is_zero()) {
            let found = self.find(id)?.into_iter().find(|located| located.blob.kind == kind);
            let located = found.ok_or_else(|| missing(id))?;
            wanted.push((located, place));
        }
        wanted.sort_unstable_by_key(|(located, _)| (located.pack, located.blob.offset));
        let mut plain = Vec::new();
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
                if opened.is_none() {
                    // Another pack may have it.
                    self.read(kind, &ids[*place], &mut plain, decompressor)?;
                }
                each(*place, &plain)?;
            }
        }
        Ok(())
    }

    fn opener(&self, pack: Number) -> Result<Arc<PackOpener>, Error> {
        if let Some(opened) = self.opened.lock().expect("no holder panics").get(&pack) {
            return Ok(opened.clone());
        }
        let name = self.packs.read().expect("no holder panics").get(&pack).map(|pack| pack.name);
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
    pub(crate) fn replace(&self, state: &State, index: LocalIndex) -> LocalIndex {
        *self.packs.write().expect("no holder panics") = live_packs(state).collect();
        std::mem::replace(&mut self.index.write().expect("no holder panics"), index)
    }

    pub(crate) fn index(&self) -> RwLockReadGuard<'_, LocalIndex> {
        self.index.read().expect("no holder panics")
    }
}

fn missing(id: &ChunkId) -> Error {
    Error::new(ErrorKind::Missing, id, "no pack has this chunk")
}

#[derive(Debug, Clone, Copy)]
struct LivePack {
    name: PackName,
    /// Whose keys made the ids in it.
    domain: DomainId,
}

fn live_packs(state: &State) -> impl Iterator<Item = (Number, LivePack)> {
    let name = |object: &Object| match object.content {
        Content::Pack(pack) if object.status == Status::Live => {
            let owner = state.owner(object);
            let name = PackName { session: owner.id, pack };
            Some((object.number, LivePack { name, domain: owner.domain }))
        }
        _ => None,
    };
    state.objects().filter_map(name)
}

impl NodeSource for BlobReader {
    fn node(&self, id: &ChunkId) -> Result<Vec<u8>, Error> {
        let mut plain = Vec::new();
        self.read(BlobKind::Tree, id, &mut plain, &mut Decompressor::new())?;
        Ok(plain)
    }
}

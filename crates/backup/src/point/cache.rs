//! What was read of a repository and may be wanted again: bounded, shared by all disks, read once when many want it.

use super::Leaf;
use super::read_ahead::ReadAhead;
use bytes::Bytes;
use quick_cache::sync::{Cache, DefaultLifecycle, GuardResult, PlaceholderGuard};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, UnitWeighter, Weighter};
use rempart_repository::{
    BlobKind, BlobReader, ChunkId, ChunkSize, Decompressor, Error, ErrorKind, FAN_OUT, MAX_NODE, NodeSource,
    Repository, Step, Tree, Walk,
};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Leaves of trees that are kept, each of 8 KiB: those of 128 GiB of disk, at the default size of chunks.
const LEAVES: u64 = 2048;
/// Bytes of the trees' nodes that are kept.
const NODES: u64 = 4 << 20;
/// Bytes that are read ahead of one reader, at most.
const AHEAD: u64 = 8 << 20;
/// Of the cache, what one reader's reading ahead may take at most.
const AHEAD_PART: u64 = 8;
/// Of the cache, what is for chunks that were read more than once: the rest is room for what is read ahead.
const HOT: f64 = 0.5;
/// Chunks that one part of the cache, with a lock of its own, should have room for.
const SHARD: u64 = 64;
const MOST_SHARDS: u64 = 8;

/// What is read of a repository by those who read at random.
pub struct ChunkCache {
    ahead: ReadAhead,
    shelf: Arc<Shelf>,
}

/// The chunks, and the way to those that are not here.
pub(super) struct Shelf {
    repository: Arc<Repository>,
    reader: BlobReader,
    chunks: Cache<ChunkId, Bytes, Weight>,
    nodes: Cache<ChunkId, Bytes, Weight>,
    leaves: Cache<(ChunkId, u64), Arc<Leaf>>,
    decompressors: Mutex<Vec<Decompressor>>,
}

#[derive(Debug, Clone)]
struct Weight;

impl Weighter<ChunkId, Bytes> for Weight {
    fn weight(&self, _: &ChunkId, content: &Bytes) -> u64 {
        content.len() as u64
    }
}

type Guard<'a> =
    PlaceholderGuard<'a, ChunkId, Bytes, Weight, DefaultHashBuilder, DefaultLifecycle<ChunkId, Bytes>>;

impl ChunkCache {
    /// Keeps at most `bytes` bytes of chunks.
    pub fn new(repository: Arc<Repository>, bytes: u64) -> Result<Arc<ChunkCache>, Error> {
        let reader = BlobReader::following(&repository, repository.log()?.state())?;
        let chunk_len = u64::from(repository.chunk_size().bytes());
        let room = (bytes / chunk_len).max(1);
        let options = |items: u64, weight: u64, shards: u64| {
            let mut options = OptionsBuilder::new();
            options.estimated_items_capacity(items as usize).weight_capacity(weight);
            options.shards(shards as usize).hot_allocation(HOT);
            options.build().expect("both capacities are given")
        };
        let shards = (room / SHARD).clamp(1, MOST_SHARDS);
        let hash = DefaultHashBuilder::default;
        let shelf = Arc::new(Shelf {
            reader,
            chunks: Cache::with_options(
                options(room, bytes, shards),
                Weight,
                hash(),
                DefaultLifecycle::default(),
            ),
            nodes: Cache::with_options(
                options(NODES / MAX_NODE as u64, NODES, 1),
                Weight,
                hash(),
                DefaultLifecycle::default(),
            ),
            leaves: Cache::with_options(
                options(LEAVES, LEAVES, 4),
                UnitWeighter,
                hash(),
                DefaultLifecycle::default(),
            ),
            decompressors: Mutex::default(),
            repository,
        });
        let most = AHEAD.min(bytes / AHEAD_PART) / chunk_len;
        let ahead = ReadAhead::start(shelf.clone(), most);
        Ok(Arc::new(ChunkCache { ahead, shelf }))
    }

    pub fn chunk_size(&self) -> ChunkSize {
        self.shelf.repository.chunk_size()
    }

    /// `len` bytes that are kept in chunks beside the disks.
    pub fn content(&self, ids: &[ChunkId], len: u64) -> Result<Vec<u8>, Error> {
        let mut content = Vec::new();
        for (id, chunk) in ids.iter().zip(self.chunks(ids).map_err(|(_, error)| error)?) {
            let left = len.saturating_sub(content.len() as u64);
            let expected = left.min(u64::from(self.chunk_size().bytes())) as usize;
            if !id.is_zero() && chunk.len() != expected {
                let why = format!("it has {} bytes, and its place {expected}", chunk.len());
                return Err(Error::new(ErrorKind::Damaged, id, why));
            }
            content.extend_from_slice(&chunk);
            content.resize(content.len() + expected - chunk.len(), 0);
        }
        if content.len() as u64 != len {
            let why = format!("its chunks are {} bytes, and it has {len}", content.len());
            return Err(Error::new(ErrorKind::Damaged, "what is kept beside the disks", why));
        }
        Ok(content)
    }

    /// One chunk of a tree.
    pub(crate) fn chunk_of(&self, tree: Tree, index: u64) -> Result<Bytes, Error> {
        let (leaf, place) = (index / FAN_OUT as u64, (index % FAN_OUT as u64) as usize);
        let id = self.leaf(tree, leaf)?[place];
        if id.is_zero() { Ok(Bytes::new()) } else { self.shelf.chunk(&id) }
    }

    /// Bytes of chunks that are in memory now.
    pub fn held(&self) -> u64 {
        self.shelf.chunks.weight()
    }

    pub(super) fn read_ahead_chunks(&self) -> u64 {
        self.ahead.most()
    }

    pub(super) fn read_ahead(&self, tree: Tree, chunks: Range<u64>) {
        self.ahead.order(tree, chunks);
    }

    /// Each chunk, as [`chunks`](ChunkCache::chunks), if all are in memory.
    pub(super) fn cached_chunks(&self, ids: &[ChunkId]) -> Option<Vec<Bytes>> {
        let cached = |id: &ChunkId| if id.is_zero() { Some(Bytes::new()) } else { self.shelf.chunks.get(id) };
        ids.iter().map(cached).collect()
    }

    pub(super) fn cached_leaf(&self, tree: Tree, leaf: u64) -> Option<Arc<Leaf>> {
        self.shelf.leaves.get(&(tree.root, leaf))
    }

    /// The nodes of trees.
    pub(super) fn nodes(&self) -> &dyn NodeSource {
        &*self.shelf
    }

    pub(super) fn leaf(&self, tree: Tree, leaf: u64) -> Result<Arc<Leaf>, Error> {
        self.shelf.leaf(tree, leaf)
    }

    /// Each chunk; nothing for one of zeroes. The first that cannot be read ends it, by its place.
    pub(super) fn chunks(&self, ids: &[ChunkId]) -> Result<Vec<Bytes>, (usize, Error)> {
        let mut found = vec![Bytes::new(); ids.len()];
        self.shelf.fetch(ids, |place, chunk| found[place] = chunk);
        for (place, id) in ids.iter().enumerate().filter(|(_, id)| !id.is_zero()) {
            if found[place].is_empty() {
                found[place] = self.shelf.chunk(id).map_err(|error| (place, error))?;
            }
        }
        Ok(found)
    }
}

impl Shelf {
    /// The ids of the chunks below a leaf, of those that the disk has.
    pub fn leaf(&self, tree: Tree, leaf: u64) -> Result<Arc<Leaf>, Error> {
        self.leaves.get_or_insert_with(&(tree.root, leaf), || {
            let mut ids = [ChunkId::ZERO; FAN_OUT];
            let first = leaf * FAN_OUT as u64;
            for step in Walk::range(self, tree, first..first + FAN_OUT as u64)? {
                if let Step::Chunk { index, id } = step? {
                    ids[(index - first) as usize] = id;
                }
            }
            Ok(Arc::new(ids))
        })
    }

    /// Reads those that nobody else reads just now; what lies together at once. Those that are left can be had by
    /// [`chunk`](Shelf::chunk), which tells why if not.
    pub fn fetch(&self, ids: &[ChunkId], mut found: impl FnMut(usize, Bytes)) {
        let (mut places, mut wanted, mut guards): (Vec<usize>, Vec<ChunkId>, Vec<Option<Guard<'_>>>) =
            Default::default();
        for (place, id) in ids.iter().enumerate().filter(|(_, id)| !id.is_zero()) {
            // Nobody waits for one chunk with others in hand that somebody else may wait for.
            match self.chunks.get_value_or_guard(id, Some(Duration::ZERO)) {
                GuardResult::Value(chunk) => found(place, chunk),
                GuardResult::Guard(guard) => {
                    places.push(place);
                    wanted.push(*id);
                    guards.push(Some(guard));
                }
                GuardResult::Timeout => {}
            }
        }
        if wanted.is_empty() {
            return;
        }
        let mut decompressor = self.take_decompressor();
        // Who wants what could not be read meets the reason again.
        let _ = self.reader.read_many(&wanted, &mut decompressor, |at, plain| {
            let chunk = Bytes::copy_from_slice(plain);
            let guard = guards[at].take().expect("each is given once");
            let _ = guard.insert(chunk.clone());
            found(places[at], chunk);
            Ok(())
        });
        self.give_back(decompressor);
    }

    /// One chunk, by whoever reads it first.
    pub fn chunk(&self, id: &ChunkId) -> Result<Bytes, Error> {
        self.chunks.get_or_insert_with(id, || self.read(BlobKind::Data, id))
    }

    fn read(&self, kind: BlobKind, id: &ChunkId) -> Result<Bytes, Error> {
        let mut plain = Vec::new();
        let mut decompressor = self.take_decompressor();
        let read = self.reader.read(kind, id, &mut plain, &mut decompressor);
        self.give_back(decompressor);
        read.map(|()| plain.into())
    }

    fn take_decompressor(&self) -> Decompressor {
        self.decompressors.lock().expect("no holder panics").pop().unwrap_or_default()
    }

    fn give_back(&self, decompressor: Decompressor) {
        self.decompressors.lock().expect("no holder panics").push(decompressor);
    }
}

impl NodeSource for Shelf {
    fn node(&self, id: &ChunkId) -> Result<Vec<u8>, Error> {
        self.nodes.get_or_insert_with(id, || self.read(BlobKind::Tree, id)).map(|node| node.to_vec())
    }
}

impl fmt::Debug for ChunkCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("ChunkCache");
        out.field("repository", &self.shelf.repository.id()).field("held", &self.held()).finish()
    }
}

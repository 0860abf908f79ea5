//! Writing a backup: chunks that are new go into packs, and one log entry makes it all count.

use crate::blob::{BlobKind, Compressor};
use crate::boot::BootResult;
use crate::error::{Error, ErrorKind};
use crate::immutable::Keeper;
use crate::index::SegmentBuilder;
use crate::is_zero;
use crate::key::{BoxPurpose, Domain};
use crate::log::{Commit, Content, Damaged, Number, Numbers, Segment as LogSegment, Session, Status};
use crate::pack::{Pack, PackBuilder};
use crate::repository;
use crate::tree::NodeSink;
use crate::{
    BlobReader, ChainId, ChunkId, ChunkSize, PackId, PackName, Point, Repository, SessionId, WriterKey,
};
use rempart_buffer::BufferMut;
use rempart_objects::{Created, Name, Objects};
use rempart_types::WallTime;
use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Threads that put packs into their place while others fill the next, at least.
const UPLOADS: usize = 2;
/// Bytes of a pack, at most: one for each thread is in memory, and those on their way.
pub(crate) const MAX_PACK_LEN: u64 = 16 << 20;
/// Chunks of this backup that are remembered in memory, in 9 MiB; with so many, the index learns of them.
const MAX_OWN: usize = 400_000;
/// Bytes that the log, the index and packs may take. What else a backup needs fits beside them into 256 MiB: an index that is
/// made anew, what is read ahead.
const MEMORY: u64 = 180 << 20;
/// Threads that there is always room for.
const FEWEST: usize = 2;
/// What is stored is made live this often: who is interrupted need not store it again.
const LIVE_EVERY: Duration = Duration::from_secs(60);
/// Attempts to put an object, and the pause before the second, which doubles each time.
const TRIES: u32 = 10;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// One backup that is being written: a session of the repository's log, and what was stored in it so far.
#[derive(Debug)]
pub struct BackupWriter {
    repository: Arc<Repository>,
    reader: BlobReader,
    /// Found damaged: stored anew.
    damaged: BTreeSet<ChunkId>,
    /// Nodes of trees are stored even where there should be some.
    nodes_anew: AtomicBool,
    session: Mutex<Session>,
    /// When what is stored was made live, and how often that is done.
    made_live: Mutex<Instant>,
    live_every: Duration,
    /// Chunks that are remembered.
    most_own: usize,
    stored: Arc<Stored>,
    uploads: Mutex<Uploads>,
    /// [`BlobWriter`]s that did not finish.
    open: AtomicUsize,
}

/// What is known of the blobs of this backup.
#[derive(Debug, Default)]
struct Stored {
    /// Halves of the ids that were put in this session, as far as the index does not have them.
    own: Mutex<HashSet<[u8; 16]>>,
    /// Damaged chunks that were stored anew.
    mended: Mutex<BTreeSet<ChunkId>>,
    /// Packs of earlier backups that have chunks of this one.
    required: Mutex<BTreeSet<Number>>,
    /// Acknowledged packs.
    acknowledged: Mutex<Acknowledged>,
    new_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    limit: Mutex<Option<Limit>>,
    /// Buffers of packs that are stored.
    buffers: Mutex<Vec<BufferMut>>,
    arrived: Arrived,
}

/// Packs that are stored. Each upload begins when as many are as there are uploads before it: who reads a running machine's
/// disk does not hurry ahead of a store that takes nothing, or little.
#[derive(Debug, Default)]
struct Arrived {
    packs: Mutex<usize>,
    more: Condvar,
}

impl Arrived {
    fn add(&self, packs: usize) {
        let mut arrived = self.packs.lock().expect("no holder panics");
        *arrived = arrived.saturating_add(packs);
        self.more.notify_all();
    }

    fn wait(&self, packs: usize) {
        let arrived = self.packs.lock().expect("no holder panics");
        drop(self.more.wait_while(arrived, |arrived| *arrived < packs).expect("no holder panics"));
    }
}

struct Ended<'a>(&'a Arrived);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.add(usize::MAX);
    }
}

/// A line that carries so much, and is busy until then.
#[derive(Debug)]
struct Limit {
    bytes_per_second: u64,
    busy_until: Instant,
}

impl Limit {
    fn new(bytes_per_second: u64) -> Limit {
        Limit { bytes_per_second: bytes_per_second.max(1), busy_until: Instant::now() }
    }

    /// When what has so many bytes will have been sent, at that rate, behind all that was sent before.
    fn sent_at(&mut self, now: Instant, bytes: u64) -> Instant {
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        self.busy_until = self.busy_until.max(now) + takes;
        self.busy_until
    }
}

#[derive(Debug, Default)]
struct Acknowledged {
    /// No log entry has made them live yet; full ones first.
    segments: Vec<SegmentBuilder>,
    /// Live already.
    published: Vec<PackId>,
    failed: Option<Error>,
}

#[derive(Debug)]
struct Uploads {
    queue: Option<mpsc::SyncSender<Pack>>,
    threads: Vec<JoinHandle<()>>,
    stored: Arc<Stored>,
}

/// What a backup came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Its log entry.
    pub root: u64,
    /// Bytes that no earlier backup had, before compression.
    pub new_bytes: u64,
    /// Bytes of packs that were put.
    pub stored_bytes: u64,
    /// The newest that is known of starting a backup of this chain, and which that is. Whoever only adds does not know.
    pub last_boot: Option<(u64, BootResult)>,
}

impl BackupWriter {
    /// Opens a session. What is stored by then, and later by itself, is not stored again.
    pub fn open(repository: Arc<Repository>) -> Result<BackupWriter, Error> {
        let now = wall_time();
        let session = Session::open(repository.log()?, repository.signer(), SessionId::random(), now)?;
        let state = session.state();
        let reader = BlobReader::new(&repository, state, repository.index(state)?);
        let damaged = repository::damaged(state);
        let stored = Arc::new(Stored::default());
        let room = Room::beside(reader.index().memory() + state.memory());
        let uploads = room.uploads(repository.objects().abilities().creates);
        let uploads = Uploads::start(repository.objects(), session.id(), &stored, uploads)?;
        Ok(BackupWriter {
            repository,
            reader,
            damaged,
            nodes_anew: AtomicBool::new(false),
            session: Mutex::new(session),
            made_live: Mutex::new(Instant::now()),
            live_every: LIVE_EVERY,
            most_own: MAX_OWN,
            stored,
            uploads: Mutex::new(uploads),
            open: AtomicUsize::new(0),
        })
    }

    /// Sends no more than so many bytes a second.
    pub fn limit(&mut self, bytes_per_second: Option<u64>) {
        *self.stored.limit.lock().expect("no holder panics") = bytes_per_second.map(Limit::new);
    }

    /// Makes what is stored live so often, instead of once a minute.
    pub fn make_live_every(&mut self, period: Duration) {
        self.live_every = period;
    }

    /// Remembers so many chunks of its own, instead of 400,000, before the index has to know them.
    pub fn remember(&mut self, chunks: usize) {
        self.most_own = chunks;
    }

    /// What earlier backups stored, and this one as far as it is in the index.
    pub fn reader(&self) -> &BlobReader {
        &self.reader
    }

    /// The newest backup of a chain, and what it says of itself. Where that is damaged, `lost` hears of it, and there is none: what
    /// follows builds on nothing.
    pub fn before(
        &self,
        chain: ChainId,
        lost: impl FnOnce(u64, &Error),
    ) -> Result<Option<(u64, Point)>, Error> {
        let Some((root, _)) = self.session().state().latest(chain) else { return Ok(None) };
        match self.repository.point(self.session().log(), root) {
            Ok(point) => Ok(Some((root, point))),
            Err(error) if error.is_loss() => {
                lost(root, &error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether a machine of that name has a key of its own to add with, other than this writer's.
    pub fn is_of_a_writer(&self, name: &str) -> Result<bool, Error> {
        self.repository.has_writer(self.session().state(), name)
    }

    /// Chunks that were found damaged or missing: stored anew by whoever puts them.
    pub fn damaged(&self) -> &BTreeSet<ChunkId> {
        &self.damaged
    }

    /// A tree could not be read: from here on each node is stored, whatever the index says.
    pub fn store_nodes_anew(&self) {
        self.nodes_anew.store(true, Ordering::Relaxed);
    }

    /// The keys of the ids that this writer gives.
    pub fn domain(&self) -> &Domain {
        self.repository.writer().domain()
    }

    /// Of the repository's chunks.
    pub fn chunk_size(&self) -> ChunkSize {
        self.repository.chunk_size()
    }

    /// Bytes so far that no earlier backup had, before compression.
    pub fn new_bytes(&self) -> u64 {
        self.stored.new_bytes.load(Ordering::Relaxed)
    }

    /// For so many threads, or as many as there is memory for: each has a pack in its hands, and the larger the repository,
    /// the more its log and its index take. One at least.
    pub fn sinks(&self, threads: usize) -> Vec<BlobWriter<'_>> {
        let room = Room::beside(self.reader.index().memory() + self.session().state().memory());
        let uploads = self.uploads.lock().expect("no holder panics").threads.len();
        (0..room.threads(threads, uploads)).map(|_| self.blobs()).collect()
    }

    /// Puts blobs, on one thread.
    pub fn blobs(&self) -> BlobWriter<'_> {
        self.open.fetch_add(1, Ordering::Relaxed);
        BlobWriter { writer: self, pack: None, compressor: Compressor::new() }
    }

    /// Stores something small beside the disks: the chunks it is cut into, and its length.
    pub fn keep(&self, content: &[u8]) -> Result<(Vec<ChunkId>, u64), Error> {
        let mut blobs = self.blobs();
        let chunks = content.chunks(self.repository.chunk_size().bytes() as usize);
        let id = |chunk: &[u8]| if is_zero(chunk) { Ok(ChunkId::ZERO) } else { blobs.chunk(chunk) };
        let ids = chunks.map(id).collect::<Result<Vec<_>, _>>()?;
        blobs.finish()?;
        Ok((ids, content.len() as u64))
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().expect("no holder panics")
    }

    /// Makes what is acknowledged live if that is due, so that it need not be stored again if this backup comes to nothing.
    fn make_live_if_due(&self) -> Result<(), Error> {
        // Once is enough: others go on meanwhile.
        let (Ok(mut made_live), Ok(mut session)) = (self.made_live.try_lock(), self.session.try_lock())
        else {
            return Ok(());
        };
        if made_live.elapsed() < self.live_every {
            return Ok(());
        }
        let segments = std::mem::take(&mut self.stored.acknowledged().segments);
        make_live(&self.repository, &mut session, &self.stored, wall_time(), segments)?;
        *made_live = Instant::now();
        Ok(())
    }

    /// Makes what is acknowledged live, and has the index remember it instead of this process.
    fn publish(&self) -> Result<(), Error> {
        // Once is enough: others go on meanwhile.
        let Ok(mut session) = self.session.try_lock() else { return Ok(()) };
        let now = wall_time();
        let segments = std::mem::take(&mut self.stored.acknowledged().segments);
        make_live(&self.repository, &mut session, &self.stored, now, segments)?;
        let state = session.state();
        // Two filters at once are what memory has no room for: meanwhile what is new is looked for on the disk.
        self.reader.forget_filter();
        drop(self.reader.replace(state, self.repository.index(state)?));
        self.stored.own().retain(|id| {
            let mut whole = ChunkId::ZERO;
            whole.0[..16].copy_from_slice(id);
            // A mistake of its filter costs a chunk that is stored twice.
            !self.reader.may_hold(&whole)
        });
        Ok(())
    }

    /// Takes over a chunk that an earlier backup of this writer stored, if it is there and was not found damaged.
    pub fn take_over(&self, id: &ChunkId) -> Result<bool, Error> {
        if !self.reader.may_hold(id) || self.damaged.contains(id) {
            return Ok(false);
        }
        self.require(BlobKind::Data, id)
    }

    /// Requires what holds a blob, if anything does: every copy of it. One may be damaged, and have been stored anew since; which
    /// of them is whole shows when it is read.
    fn require(&self, kind: BlobKind, id: &ChunkId) -> Result<bool, Error> {
        let found = self.reader.find_in(id, self.domain().id())?;
        let packs = found.iter().filter(|located| located.blob.kind == kind).map(|located| located.pack);
        let mut packs = packs.peekable();
        let is_there = packs.peek().is_some();
        self.stored.required().extend(packs);
        Ok(is_there)
    }

    /// Commits the backup. `base` is an earlier backup some of whose chunks were taken over without being looked at.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`]: what it relies on was removed meanwhile. Begin again; what was stored is not lost.
    ///
    /// # Panics
    /// If a [`BlobWriter`] is still open.
    pub fn commit(
        self,
        chain: ChainId,
        base: Option<u64>,
        point: &Point,
        retain_until: Option<WallTime>,
    ) -> Result<Written, Error> {
        assert_eq!(self.open.load(Ordering::Relaxed), 0, "every blob was handed over");
        self.uploads.lock().expect("no holder panics").finish();
        let mut acknowledged = self.stored.acknowledged();
        if let Some(error) = acknowledged.failed.take() {
            return Err(error);
        }
        let mut segments = std::mem::take(&mut acknowledged.segments);
        drop(acknowledged);
        let mut session = self.session.into_inner().expect("no holder panics");
        let now = point.ended;
        let last = segments.pop();
        make_live(&self.repository, &mut session, &self.stored, now, segments)?;
        let segment = match last {
            Some(builder) => put_segment(&self.repository, self.repository.writer(), session.id(), builder)?,
            None => LogSegment::default(),
        };
        let writer = self.repository.writer();
        let payload = writer.seal(BoxPurpose::Commit, &chain.0, &point.encode());
        let published = std::mem::take(&mut self.stored.acknowledged().published);
        let required = std::mem::take(&mut *self.stored.required());
        let id = session.id();
        let brought: Vec<PackName> =
            segment.packs.iter().map(|pack| PackName { session: id, pack: *pack }).collect();
        let mut keeper = Keeper::new(&self.repository);
        let retain_until = retain_until.max(keeper.as_ref().map(Keeper::until));
        let appended = session.commit(now, |state| {
            let stale = |why: &'static str| Error::new(ErrorKind::Stale, "log", why);
            if base.is_some_and(|base| !state.roots().contains_key(&base)) {
                return Err(stale("the backup that this one builds on was given up meanwhile"));
            }
            let condemned = || stale("a pack that has chunks of this backup was condemned meanwhile");
            let live =
                |number: Number| state.object(number).is_some_and(|object| object.status == Status::Live);
            if !required.iter().all(|number| live(*number)) {
                return Err(condemned());
            }
            // By whom they were put: somebody else may have named them, too.
            let number =
                |pack: &PackId| state.number(id, Content::Pack(*pack)).filter(|number| live(*number));
            let own = published.iter().map(|pack| number(pack).ok_or_else(condemned));
            let own: Numbers = own.collect::<Result<Vec<_>, _>>()?.into_iter().collect();
            let packs = own.union(&required.iter().copied().collect());
            if let Some(keeper) = &mut keeper {
                let base = base.and_then(|base| state.roots().get(&base));
                let inherited = base.map(|base| base.required.clone()).unwrap_or_default();
                keeper.keep(state, &inherited.union(&packs), &brought)?;
            }
            Ok(Commit {
                chain,
                parent: state.latest(chain).map(|(root, _)| root),
                segment: segment.clone(),
                base,
                packs,
                retain_until,
                payload: payload.clone(),
            })
        })?;
        let mended = std::mem::take(&mut *self.stored.mended.lock().expect("no holder panics"));
        // Only the owner may say so; what others mended is told whole by the next `verify`.
        if !mended.is_empty() && self.repository.opener().is_ok() {
            // If this fails, they are stored once more by the next backup.
            let _ = settle(&mut session, now, &mended);
        }
        let last_boot = self.repository.last_boot(session.state(), chain);
        // A session that stays open is no harm: a collection ends it when it is old.
        let _ = session.end(now);
        Ok(Written {
            last_boot,
            root: appended.number,
            new_bytes: self.stored.new_bytes.load(Ordering::Relaxed),
            stored_bytes: self.stored.stored_bytes.load(Ordering::Relaxed),
        })
    }
}

impl BackupWriter {
    /// Ends it without a backup. What was stored counts for those that are there: what was damaged is whole again.
    ///
    /// # Panics
    /// If a [`BlobWriter`] is still open.
    pub fn finish(self) -> Result<(), Error> {
        assert_eq!(self.open.load(Ordering::Relaxed), 0, "every blob was handed over");
        self.uploads.lock().expect("no holder panics").finish();
        let mut acknowledged = self.stored.acknowledged();
        if let Some(error) = acknowledged.failed.take() {
            return Err(error);
        }
        let segments = std::mem::take(&mut acknowledged.segments);
        drop(acknowledged);
        let mut session = self.session.into_inner().expect("no holder panics");
        let now = wall_time();
        make_live(&self.repository, &mut session, &self.stored, now, segments)?;
        let mended = std::mem::take(&mut *self.stored.mended.lock().expect("no holder panics"));
        if !mended.is_empty() {
            settle(&mut session, now, &mended)?;
        }
        session.end(now)?;
        Ok(())
    }
}

/// Packs that there is memory for.
struct Room(usize);

impl Room {
    /// Where log and index take so many bytes.
    fn beside(taken: u64) -> Room {
        Room((MEMORY.saturating_sub(taken) / MAX_PACK_LEN) as usize)
    }

    /// How many can be on their way, of those that the place is worth.
    fn uploads(&self, worth: usize) -> usize {
        worth.min(self.0 / 2).max(UPLOADS)
    }

    /// Of so many threads those that can have a pack each in their hands.
    fn threads(&self, wanted: usize, uploads: usize) -> usize {
        // Those on their way, and the one that nodes go into.
        let rest = self.0.saturating_sub(uploads + 1);
        wanted.min(rest.max(FEWEST)).max(1)
    }
}

fn wall_time() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(since.as_millis() as u64)
}

/// Writes down that chunks are whole again.
pub(crate) fn settle(session: &mut Session, now: WallTime, mended: &BTreeSet<ChunkId>) -> Result<(), Error> {
    session.refresh()?;
    let rest: Vec<ChunkId> = repository::damaged(session.state()).difference(mended).copied().collect();
    if rest.len() > repository::MAX_DAMAGED {
        return Ok(());
    }
    let settles: Vec<u64> = session.state().damaged().keys().copied().collect();
    session.damaged(now, Damaged { settles, payload: repository::payload_of(&rest) })?;
    Ok(())
}

/// Makes acknowledged packs live.
fn make_live(
    repository: &Repository,
    session: &mut Session,
    stored: &Stored,
    now: WallTime,
    segments: Vec<SegmentBuilder>,
) -> Result<(), Error> {
    for builder in segments {
        let segment = put_segment(repository, repository.writer(), session.id(), builder)?;
        let packs = segment.packs.clone();
        session.segment(now, segment)?;
        stored.acknowledged().published.extend(packs);
    }
    Ok(())
}

/// Puts a segment of the writer's domain.
pub(crate) fn put_segment(
    repository: &Repository,
    writer: &WriterKey,
    session: SessionId,
    builder: SegmentBuilder,
) -> Result<LogSegment, Error> {
    let sealed = builder.seal(writer);
    let name = sealed.name(session);
    put(&**repository.objects(), &name.object(), sealed.bytes())?;
    Ok(LogSegment { packs: sealed.packs().to_vec(), indexes: vec![name.segment] })
}

impl Stored {
    fn own(&self) -> MutexGuard<'_, HashSet<[u8; 16]>> {
        self.own.lock().expect("no holder panics")
    }

    fn required(&self) -> MutexGuard<'_, BTreeSet<Number>> {
        self.required.lock().expect("no holder panics")
    }

    fn acknowledged(&self) -> MutexGuard<'_, Acknowledged> {
        self.acknowledged.lock().expect("no holder panics")
    }

    fn upload(&self, objects: &dyn Objects, session: SessionId, pack: Pack) {
        if self.acknowledged().failed.is_some() {
            return;
        }
        let bytes = pack.bytes().len() as u64;
        let mut limit = self.limit.lock().expect("no holder panics");
        let sent_at = limit.as_mut().map(|limit| limit.sent_at(Instant::now(), bytes));
        drop(limit);
        let put = put(objects, &pack.name(session).object(), pack.bytes());
        if let Some(pause) = sent_at.and_then(|at| at.checked_duration_since(Instant::now())) {
            std::thread::sleep(pause);
        }
        let mut acknowledged = self.acknowledged();
        match put {
            Ok(()) => {
                self.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
                if !acknowledged.segments.last().is_some_and(|last| last.has_room(pack.blobs().len())) {
                    acknowledged.segments.push(SegmentBuilder::new());
                }
                let last = acknowledged.segments.last_mut().expect("one was just added");
                last.add(pack.id(), pack.blobs());
            }
            Err(error) => {
                acknowledged.failed.get_or_insert(error);
            }
        }
        drop(acknowledged);
        self.buffers.lock().expect("no holder panics").push(pack.into_buffer());
        self.arrived.add(1);
    }
}

impl Uploads {
    fn start(
        objects: &Arc<dyn Objects>,
        session: SessionId,
        stored: &Arc<Stored>,
        at_a_time: usize,
    ) -> Result<Uploads, Error> {
        let (queue, packs) = mpsc::sync_channel::<Pack>(0);
        let packs = Arc::new(Mutex::new(packs));
        let mut uploads = Uploads { queue: Some(queue), threads: Vec::new(), stored: stored.clone() };
        for number in 0..at_a_time {
            let (objects, stored, packs) = (objects.clone(), stored.clone(), packs.clone());
            let work = move || {
                stored.arrived.wait(number);
                // Ended by a panic, it leaves none waiting.
                let _ended = Ended(&stored.arrived);
                loop {
                    let next = packs.lock().expect("no holder panics").recv();
                    let Ok(pack) = next else { return };
                    stored.upload(&*objects, session, pack);
                }
            };
            let thread = std::thread::Builder::new().name(format!("upload-{number}")).spawn(work);
            uploads.threads.push(thread.map_err(|source| Error {
                source: Some(Box::new(source)),
                ..Error::new(ErrorKind::Local, "upload", "no thread can be started")
            })?);
        }
        Ok(uploads)
    }

    /// Nothing more comes, for those that have not begun either.
    fn end(&mut self) {
        self.queue = None;
        self.stored.arrived.add(usize::MAX);
    }

    /// Waits until all is there, or failed.
    fn finish(&mut self) {
        self.end();
        for thread in self.threads.drain(..) {
            thread.join().expect("a panic of an upload goes on here");
        }
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        self.end();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Puts blobs on one thread. [`BlobWriter::finish`] hands over what is not in a full pack, and tells if it failed.
pub struct BlobWriter<'w> {
    writer: &'w BackupWriter,
    pack: Option<PackBuilder>,
    compressor: Compressor,
}

impl std::fmt::Debug for BlobWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlobWriter").field("pack", &self.pack).finish()
    }
}

impl BlobWriter<'_> {
    /// Stores a chunk that is not all zeroes, if it is not stored yet.
    pub fn chunk(&mut self, content: &[u8]) -> Result<ChunkId, Error> {
        let id = self.writer.domain().chunk_id(content);
        self.put(BlobKind::Data, id, content)?;
        Ok(id)
    }

    fn put(&mut self, kind: BlobKind, id: ChunkId, content: &[u8]) -> Result<(), Error> {
        let writer = self.writer;
        let half: [u8; 16] = id.0[..16].try_into().expect("16 bytes");
        if writer.stored.own().contains(&half) {
            return Ok(());
        }
        let anew = kind == BlobKind::Tree && writer.nodes_anew.load(Ordering::Relaxed);
        let may_be_there = !anew && writer.reader.may_hold(&id) && !writer.damaged.contains(&id);
        if may_be_there && writer.require(kind, &id)? {
            return Ok(());
        }
        let full = {
            let mut own = writer.stored.own();
            if !own.insert(half) {
                return Ok(());
            }
            own.len() > writer.most_own
        };
        if writer.damaged.contains(&id) {
            writer.stored.mended.lock().expect("no holder panics").insert(id);
        }
        writer.stored.new_bytes.fetch_add(content.len() as u64, Ordering::Relaxed);
        if self.pack.as_ref().is_some_and(|pack| !pack.has_room(content.len())) {
            self.hand_over()?;
            if full { writer.publish()? } else { writer.make_live_if_due()? }
        }
        let pack = self.pack.get_or_insert_with(|| {
            let buffer = writer.stored.buffers.lock().expect("no holder panics").pop().unwrap_or_default();
            let len = writer.repository.objects().abilities().pack_len.min(MAX_PACK_LEN);
            PackBuilder::new(writer.repository.writer(), len, buffer)
        });
        pack.add(kind, id, content, &mut self.compressor);
        Ok(())
    }

    fn hand_over(&mut self) -> Result<(), Error> {
        let Some(pack) = self.pack.take().filter(|pack| !pack.is_empty()) else { return Ok(()) };
        let pack = pack.finish();
        let queue = self.writer.uploads.lock().expect("no holder panics").queue.clone();
        let sent = queue.expect("it is open as long as there are writers").send(pack);
        assert!(sent.is_ok(), "uploads end after their queue");
        match &self.writer.stored.acknowledged().failed {
            Some(error) => Err(Error::new(error.kind, &error.object, error.why.clone())),
            None => Ok(()),
        }
    }

    /// Hands over the last pack.
    pub fn finish(mut self) -> Result<(), Error> {
        self.hand_over()
    }
}

impl Drop for BlobWriter<'_> {
    /// What was put counts, whatever became of who put it: others may refer to it already. A failure is told by the commit.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = self.hand_over();
            self.writer.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl NodeSink for BlobWriter<'_> {
    fn node(&mut self, id: ChunkId, encoded: &[u8]) -> Result<(), Error> {
        self.put(BlobKind::Tree, id, encoded)
    }
}

/// Puts an object under a name that nobody else has. Tries again where that may help.
pub(crate) fn put(objects: &dyn Objects, name: &Name, content: &[u8]) -> Result<(), Error> {
    let mut pause = FIRST_PAUSE;
    for attempt in 1.. {
        match objects.create(name, &[content], None) {
            Ok(Created::New) => return Ok(()),
            // An attempt before, whose outcome was not known.
            Ok(Created::Taken) if attempt > 1 => return Ok(()),
            Ok(Created::Taken) => {
                return Err(Error::new(ErrorKind::Damaged, name, "there is something else under this name"));
            }
            Err(error) if error.is_transient() && attempt < TRIES => {
                std::thread::sleep(pause);
                pause *= 2;
            }
            Err(error) => return Err(error.into()),
        }
    }
    unreachable!("the last attempt returns")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_repository_leaves_room_for_fewer_packs() {
        let at = [1 << 20, 73 << 20, 98 << 20, u64::MAX].map(Room::beside);
        let in_a_directory = at.each_ref().map(|room| (room.uploads(2), room.threads(8, room.uploads(2))));
        assert_eq!(in_a_directory, [(2, 8), (2, 3), (2, 2), (2, 2)]);
        let in_a_bucket = at.each_ref().map(|room| (room.uploads(8), room.threads(8, room.uploads(8))));
        assert_eq!(in_a_bucket, [(5, 5), (3, 2), (2, 2), (2, 2)]);
        assert_eq!([(1, 2), (0, 2), (9, 9)].map(|(wanted, on_way)| at[0].threads(wanted, on_way)), [1, 1, 2]);
    }
}

//! A repository in its place: making one, opening one, and this machine's index of it.

use crate::blob::{BlobKind, Decompressor};
use crate::copies::{self, copy_of};
use crate::error::{Error, ErrorKind};
use crate::immutable::Keeping;
use crate::index::{Covers, Index, IndexEntry, IndexUpdate, Segment, SegmentBuilder};
use crate::key::{
    BOX_OVERHEAD, BoxPurpose, KeyRing, MasterKey, Opener, PassphraseCost, Unlock, WRAPPED_KEYS, WrappedBy,
    WrappedKey, WriterKey, WriterName,
};
use crate::log::{
    self, Content, Damaged, Ed25519, Log, LogError, Number, Numbers, Object, Refusal, Root, Session, Sign,
    State, Status,
};
use crate::writer::settle;
use crate::{
    BlobReader, ChainId, ChunkId, ChunkSize, Description, KeyId, PACKS, PackName, PackOpener, Point,
    RepositoryId, SegmentName, SessionId, WrappedKeyId,
};
use rempart_objects::{Created, ErrorKind as ObjectErrorKind, Name, Objects, pages, probe};
use rempart_types::WallTime;
use std::collections::BTreeSet;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Wrapped copies of the master key that are tried, at most.
const MAX_KEYS: usize = 100;
/// How long objects may be kept against everybody: a slip of the hand should not cost a bucket for life.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(10 * 366 * 24 * 3600);
/// Where names of writers lie, and how long one is with its box, at most.
pub(crate) const WRITERS: &str = "writers/";
const MAX_WRITER_NAME: u64 = (WriterName::LONGEST + BOX_OVERHEAD) as u64;
/// Damaged chunks of one log entry.
pub(crate) const MAX_DAMAGED: usize = 16 * 1024;

/// A repository that was opened: with its master key, or to add to it only.
#[derive(Debug)]
pub struct Repository {
    objects: Arc<dyn Objects>,
    description: Description,
    keys: Keys,
    cache: PathBuf,
}

/// What a repository was opened with.
#[derive(Debug, Clone)]
pub(crate) enum Keys {
    Owner(Arc<KeyRing>),
    /// It only adds.
    Writer(Arc<WriterKey>),
}

impl Keys {
    pub fn writer(&self) -> &WriterKey {
        match self {
            Keys::Owner(ring) => ring.writer(),
            Keys::Writer(writer) => writer,
        }
    }

    /// [`ErrorKind::WrongKey`] for a key that only adds.
    pub fn owner(&self) -> Result<&KeyRing, Error> {
        match self {
            Keys::Owner(ring) => Ok(ring),
            Keys::Writer(writer) => {
                let why = "this key adds restore points, and does nothing else";
                Err(Error::new(ErrorKind::WrongKey, format!("key {}", writer.signer().id()), why))
            }
        }
    }

    pub fn opener(&self) -> Result<&Opener, Error> {
        Ok(self.owner()?.opener())
    }
}

/// How a new repository shall be.
#[derive(Debug, Clone, Copy)]
pub struct NewRepository<'a> {
    /// Drawn at random for it.
    pub id: RepositoryId,
    pub chunk_size: ChunkSize,
    /// What opens it.
    pub unlock: Unlock<'a>,
    pub cost: PassphraseCost,
    /// Of that key, for people.
    pub label: &'a str,
    /// Every object is kept against everybody for so long: the place must have object lock. Nobody can take it back.
    pub kept: Option<Duration>,
    pub now: WallTime,
}

impl Repository {
    /// Makes a repository in a place that has none. `cache` is a folder of this machine for what can be made again.
    pub fn create(
        objects: Arc<dyn Objects>,
        cache: &Path,
        new: NewRepository<'_>,
    ) -> Result<Repository, Error> {
        probe(&*objects)?;
        let kept_ms = kept_ms(&*objects, new.kept)?;
        let objects = keeping(objects, kept_ms);
        let ring = KeyRing::new(new.id, MasterKey::random());
        let public = *ring.public();
        let key =
            WrappedKey::wrap(public.repository, ring.master(), new.unlock, new.cost, new.label, new.now)?;
        let description = Description::new(&ring, new.chunk_size, new.now, kept_ms);
        // The key first: what has a description can be opened.
        create_new(&*objects, &key.name(), &key.encode())?;
        if let Err(error) = create_new(&*objects, &Description::name(), &description.encode()) {
            let _ = objects.remove(&key.name());
            return Err(error);
        }
        let repository =
            Repository { objects, description, keys: Keys::Owner(Arc::new(ring)), cache: cache.to_owned() };
        repository.keep_description()?;
        repository.begin_log(new.now)?;
        Ok(repository)
    }

    /// Opens the repository of a place. [`ErrorKind::WrongKey`] if `unlock` opens none of its keys.
    pub fn open(objects: Arc<dyn Objects>, cache: &Path, unlock: Unlock<'_>) -> Result<Repository, Error> {
        let description = read_description(&*objects)?;
        let ring = description.unlock(open_key(&*objects, &description, unlock)?)?;
        let objects = keeping(objects, description.kept_ms);
        Ok(Repository { objects, description, keys: Keys::Owner(Arc::new(ring)), cache: cache.to_owned() })
    }

    /// Opens a place to add to it what `key` may add. [`ErrorKind::Foreign`] if it is of another repository.
    pub fn open_to_add(objects: Arc<dyn Objects>, cache: &Path, key: WriterKey) -> Result<Repository, Error> {
        let description = read_description(&*objects)?;
        if *key.public() != description.keys {
            let why = "the key adds to another repository than this";
            return Err(Error::new(ErrorKind::Foreign, Description::name(), why));
        }
        let objects = keeping(objects, description.kept_ms);
        Ok(Repository { objects, description, keys: Keys::Writer(Arc::new(key)), cache: cache.to_owned() })
    }

    /// Has the description and its copy be whole.
    pub(crate) fn keep_description(&self) -> Result<(), Error> {
        let (name, bytes) = (Description::name(), self.description.encode());
        for name in [copy_of(&name), name] {
            copies::put_right(&*self.objects, &name, &bytes)?;
        }
        Ok(())
    }

    fn begin_log(&self, now: WallTime) -> Result<Log, Error> {
        let ring = self.keys.owner()?;
        let (id, domain) = (self.id(), ring.writer().domain().id());
        Ok(Log::create(self.objects.clone(), Arc::new(Ed25519), id, ring, domain, now)?)
    }

    pub fn id(&self) -> RepositoryId {
        self.description.keys.repository
    }

    pub fn description(&self) -> &Description {
        &self.description
    }

    pub fn chunk_size(&self) -> ChunkSize {
        self.description.chunk_size
    }

    pub fn objects(&self) -> &Arc<dyn Objects> {
        &self.objects
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// What it writes with.
    pub fn writer(&self) -> &WriterKey {
        self.keys.writer()
    }

    /// What signs its log entries.
    pub fn signer(&self) -> Arc<dyn Sign> {
        match &self.keys {
            Keys::Owner(ring) => ring.clone(),
            Keys::Writer(writer) => writer.clone(),
        }
    }

    /// [`ErrorKind::WrongKey`] if it was opened to add to it only.
    pub fn opener(&self) -> Result<&Opener, Error> {
        self.keys.opener()
    }

    /// Where this machine keeps what it can make again of it. Of a writer's domain only, if it was opened to add to it.
    pub fn cache_folder(&self) -> Result<PathBuf, Error> {
        let name = match &self.keys {
            Keys::Owner(_) => self.id().to_string(),
            Keys::Writer(writer) => format!("{}-{}", self.id(), writer.domain().id()),
        };
        let folder = self.cache.join(name);
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.map_err(|source| Error::local(&folder, "create folder", source))?;
        Ok(folder)
    }

    /// Lets something else open it, too.
    pub fn add_key(
        &self,
        unlock: Unlock<'_>,
        cost: PassphraseCost,
        label: &str,
        now: WallTime,
    ) -> Result<WrappedKeyId, Error> {
        let key = WrappedKey::wrap(self.id(), self.keys.owner()?.master(), unlock, cost, label, now)?;
        create_new(&*self.objects, &key.name(), &key.encode())?;
        Ok(key.id)
    }

    /// What this key is wrapped by opens the repository no more, as far as the wrapped copy is not kept elsewhere. Of several
    /// who remove one at the same time the log says who was first, so that the last one stays.
    pub fn remove_key(&self, id: WrappedKeyId, now: WallTime) -> Result<(), Error> {
        let keys_now = || keys(&*self.objects);
        let Some(key) = keys_now()?.into_iter().find(|key| key.id == id) else {
            return Err(Error::new(ErrorKind::Missing, id, "the repository has no such key"));
        };
        let may = |state: &State| {
            let stays = |other: &WrappedKey| {
                other.id != id && other.repository == self.id() && !state.key_is_removed(other.id)
            };
            if keys_now()?.iter().any(stays) {
                return Ok(());
            }
            let why = "it is the last one: without it nobody could open the repository";
            Err(Error::new(ErrorKind::Refused, key.name(), why))
        };
        let mut session = Session::open(self.log()?, self.signer(), SessionId::random(), now)?;
        // Who began before and did not get to the end goes on.
        let told = match session.state().key_is_removed(id) {
            true => Ok(()),
            false => session.remove_key(now, id, may).map(drop),
        };
        session.end(now)?;
        told?;
        Ok(self.objects.remove(&key.name())?)
    }

    /// A key for a machine that shall only add. It may not yet: [`Repository::add_writer`].
    pub fn new_writer(&self, name: WriterName) -> Result<WriterKey, Error> {
        Ok(self.keys.owner()?.new_writer(name))
    }

    /// Whether a machine of that name has a key of its own to add with.
    pub fn has_writer(&self, state: &State, name: &str) -> Result<bool, Error> {
        let domain = self.opener()?.domain_of(name);
        Ok(state.keys().any(|key| key.domain == domain))
    }

    /// Lets a machine add restore points of its own, and do nothing else, by `key`, which was made for it.
    pub fn add_writer(&self, key: &WriterKey, now: WallTime) -> Result<(), Error> {
        let (id, name) = (key.signer().id(), key.name().expect("it was made for a machine"));
        let mut session = Session::open(self.log()?, self.signer(), SessionId::random(), now)?;
        let sealed = self.writer().seal(BoxPurpose::WriterName, &id.0, name.as_str().as_bytes());
        create_new(&*self.objects, &writer_name(id), &sealed)?;
        session.register(now, log::Key { public: key.signer().verifier(), domain: key.domain().id() })?;
        session.end(now)?;
        Ok(())
    }

    /// The keys that only add, and whose they are if that is still known.
    pub fn writers(&self, state: &State) -> Result<Vec<(KeyId, Option<WriterName>)>, Error> {
        let opener = self.opener()?;
        let mut writers = Vec::new();
        for key in state.keys().filter(|key| key.public != state.maintenance()) {
            let id = key.public.id();
            let sealed = match self.objects.get(&writer_name(id), MAX_WRITER_NAME) {
                Ok(sealed) => Some(sealed),
                Err(error)
                    if error.kind == ObjectErrorKind::Missing || error.kind == ObjectErrorKind::TooLong =>
                {
                    None
                }
                Err(error) => return Err(error.into()),
            };
            let name = sealed.and_then(|sealed| {
                let opened = opener.open(BoxPurpose::WriterName, &id.0, &sealed)?;
                WriterName::new(std::str::from_utf8(&opened).ok()?)
            });
            // Anybody can close such a box: the domain tells whether it is true.
            let name = name.filter(|name| opener.domain_of(name.as_str()) == key.domain);
            writers.push((id, name));
        }
        Ok(writers)
    }

    /// Lets a writer add nothing more. What it added stays.
    pub fn remove_writer(&self, id: KeyId, now: WallTime) -> Result<(), Error> {
        let mut session = Session::open(self.log()?, self.signer(), SessionId::random(), now)?;
        if session.state().keys().all(|key| key.public.id() != id) {
            return Err(Error::new(ErrorKind::Missing, id, "the repository has no such key"));
        }
        session.revoke(now, id)?;
        session.end(now)?;
        // A name without its key does no harm.
        let _ = self.objects.remove(&writer_name(id));
        Ok(())
    }

    /// The log, read up to its head.
    pub fn log(&self) -> Result<Log, Error> {
        let keys = &self.description.keys;
        let log = Log::open(self.objects.clone(), Arc::new(Ed25519), keys.repository, keys.maintenance);
        match log.map_err(Error::from) {
            // Who made it was killed before it had a log. Packs without one are of a log that was lost: those are not to be
            // taken for leftovers.
            Err(error)
                if error.kind == ErrorKind::Objects(ObjectErrorKind::Missing)
                    && self.objects.list(PACKS, None)?.is_empty() =>
            {
                self.begin_log(self.description.created)
            }
            ended => ended,
        }
    }

    /// The chain of backups of the machine that `identity` stands for: the same for whoever has this repository's master
    /// key, and telling nobody else.
    pub fn chain(&self, identity: &str) -> ChainId {
        let named = ["rempart 2026 chain\0", identity].concat();
        let ChunkId(hash) = self.writer().domain().chunk_id(named.as_bytes());
        ChainId(hash[..16].try_into().expect("16 bytes"))
    }

    /// What backup `root` says of itself.
    pub fn point(&self, log: &Log, root: u64) -> Result<Point, Error> {
        self.point_of(log.state(), root)
    }

    /// The same of a backup of `state`.
    pub(crate) fn point_of(&self, state: &State, root: u64) -> Result<Point, Error> {
        let payload = log::payload(&*self.objects, state, root)?;
        self.open_point(root, state.roots().get(&root).expect("it has a payload"), &payload)
    }

    /// What a backup's payload says.
    pub(crate) fn open_point(&self, root: u64, record: &Root, payload: &[u8]) -> Result<Point, Error> {
        let object = log::name(root).to_string();
        let opener = self.opener()?;
        let opened = opener.open(BoxPurpose::Commit, &record.chain.0, payload);
        let opened = opened.ok_or_else(|| {
            Error::new(ErrorKind::Damaged, &object, "what it says of its backup does not open")
        })?;
        let point = Point::decode(&object, &opened)?;
        let is_own = record.domain == self.writer().domain().id();
        if !is_own && record.domain != opener.domain_of(&point.vm) {
            let why = "the key that wrote it may not add backups of that machine";
            return Err(Error::new(ErrorKind::Damaged, &object, why));
        }
        // Whoever starts machines by it does what it says.
        if !is_own && point.definition.is_some() {
            return Err(Error::new(
                ErrorKind::Damaged,
                &object,
                "the key that wrote it may not define machines",
            ));
        }
        if !is_own && !point.is_printable() {
            return Err(Error::new(ErrorKind::Damaged, &object, "its texts are not for people to read"));
        }
        Ok(point)
    }

    /// Has chunks that are damaged or missing stored anew by the next backup that meets them.
    pub fn report_damaged(&self, chunks: &[ChunkId], now: WallTime) -> Result<(), Error> {
        let mut session = Session::open(self.log()?, self.signer(), SessionId::random(), now)?;
        let known = damaged(session.state());
        let new: BTreeSet<ChunkId> = chunks.iter().copied().filter(|chunk| !known.contains(chunk)).collect();
        for chunks in new.into_iter().collect::<Vec<_>>().chunks(MAX_DAMAGED) {
            session.damaged(now, Damaged { settles: Vec::new(), payload: payload_of(chunks) })?;
        }
        session.end(now)?;
        Ok(())
    }

    /// Writes down which damaged chunks can be read again: somebody who may not say so stored them anew.
    pub fn settle_mended(&self, reader: &BlobReader, now: WallTime) -> Result<(), Error> {
        let mut session = Session::open(self.log()?, self.signer(), SessionId::random(), now)?;
        let (mut plain, mut decompressor) = (Vec::new(), Decompressor::new());
        let mut is_whole = |id: &ChunkId| {
            let kinds = [BlobKind::Data, BlobKind::Tree];
            kinds.into_iter().any(|kind| reader.read(kind, id, &mut plain, &mut decompressor).is_ok())
        };
        let mended: BTreeSet<ChunkId> =
            damaged(session.state()).into_iter().filter(|id| is_whole(id)).collect();
        if !mended.is_empty() {
            settle(&mut session, now, &mended)?;
        }
        session.end(now)?;
        Ok(())
    }

    /// This machine's index, with all that is live in `state`.
    pub fn index(&self, state: &State) -> Result<Index, Error> {
        self.index_up_to_date(state, false)
    }

    /// The same in one file: for who goes through all of it.
    pub(crate) fn whole_index(&self, state: &State) -> Result<Index, Error> {
        self.index_up_to_date(state, true)
    }

    fn index_up_to_date(&self, state: &State, whole: bool) -> Result<Index, Error> {
        let path = self.cache_folder()?.join("index");
        let old = Index::open(&path, &self.id(), |covers| continues(covers, state));
        if let Ok(Some(old)) = old {
            let from = old.covers().entry;
            let is_up_to_date = self.segments(state).all(|object| u64::from(object.number) < from);
            if is_up_to_date && (old.is_whole() || !whole) {
                return Ok(old);
            }
            let update = self.add_segments(old.update(), state, from);
            match update.and_then(|update| finish(update, state, whole)) {
                // A segment, or what is here: all of it is made anew.
                Err(error) if error.is_of_its_writer() => {}
                done => return done,
            }
        }
        self.new_index(&path, state)
    }

    /// Adds the live segments from number `from` on.
    fn add_segments(&self, mut update: IndexUpdate, state: &State, from: u64) -> Result<IndexUpdate, Error> {
        for object in self.segments(state).filter(|object| u64::from(object.number) >= from) {
            let segment = self.segment(state, &object)?;
            let all = pack_numbers(state, &object, &segment);
            all.iter().try_for_each(|numbers| update.add(&segment, numbers))?;
        }
        Ok(update)
    }

    fn segment(&self, state: &State, object: &Object) -> Result<Segment, Error> {
        let Content::Index(segment) = object.content else { unreachable!("it was chosen for being one") };
        let name = SegmentName { session: state.owner(object).id, segment };
        let domain_of = |domain| match &self.keys {
            Keys::Owner(ring) => Some(ring.opener().domain(domain)),
            Keys::Writer(writer) => Some(writer.domain().clone()).filter(|own| own.id() == domain),
        };
        Segment::fetch(&*self.objects, &self.id(), domain_of, &name)
    }

    /// Live index segments that its keys open.
    fn segments<'a>(&self, state: &'a State) -> impl Iterator<Item = Object> + use<'a> {
        let only = match &self.keys {
            Keys::Owner(_) => None,
            Keys::Writer(writer) => Some(writer.domain().id()),
        };
        state.objects().filter(move |object| {
            matches!(object.content, Content::Index(_))
                && object.status == Status::Live
                && only.is_none_or(|only| state.owner(object).domain == only)
        })
    }

    /// Made of the segments, and of the packs' own lists where those do not tell.
    fn new_index(&self, path: &Path, state: &State) -> Result<Index, Error> {
        let mut update = Index::create(path, self.id());
        let mut covered = Numbers::new();
        for object in self.segments(state) {
            match self.segment(state, &object) {
                Ok(segment) => {
                    let all = pack_numbers(state, &object, &segment);
                    covered = covered.union(&all.iter().flatten().copied().flatten().collect());
                    all.iter().try_for_each(|numbers| update.add(&segment, numbers))?;
                }
                // The packs that it lists can still be read.
                Err(error) if error.is_of_its_writer() => {}
                Err(error) => return Err(error),
            }
        }
        // Who only adds cannot look into packs, and stores again what they hold.
        let opener = self.opener().ok();
        for object in state.objects().filter(|object| object.status == Status::Live) {
            let (Content::Pack(pack), Some(opener)) = (object.content, opener) else { continue };
            if covered.contains(object.number) {
                continue;
            }
            let name = PackName { session: state.owner(&object).id, pack };
            let blobs = PackOpener::fetch(&*self.objects, opener, name)
                .and_then(|opener| opener.fetch_blobs(&*self.objects));
            let blobs = match blobs {
                Ok(blobs) => blobs,
                // It could be read at another time.
                Err(error) if matches!(error.kind, ErrorKind::Objects(_)) && !error.is_loss() => {
                    return Err(error);
                }
                // What a damaged pack holds is missing, which is told to who wants it.
                Err(_) => continue,
            };
            let mut builder = SegmentBuilder::new();
            builder.add(pack, &blobs);
            let sealed = builder.seal(self.writer());
            let own = self.writer().domain().clone();
            let segment =
                Segment::open(&self.id(), |_| Some(own), &sealed.name(name.session), sealed.bytes())?;
            update.add(&segment, &[Some(object.number)])?;
        }
        finish(update, state, true)
    }
}

/// Chunks that were found damaged, and were not stored anew since.
pub(crate) fn damaged(state: &State) -> BTreeSet<ChunkId> {
    let ids = state.damaged().values().flat_map(|payload| payload.as_chunks::<32>().0);
    ids.map(|id| ChunkId(*id)).collect()
}

/// What an entry about damaged chunks carries.
pub(crate) fn payload_of(chunks: &[ChunkId]) -> Vec<u8> {
    chunks.iter().flat_map(|chunk| chunk.0).collect()
}

/// The log's numbers of the packs that a segment lists. A pack that has several of them has each in another list: only one of
/// them may be there, and who named the others does not hide it.
fn pack_numbers(state: &State, object: &Object, segment: &Segment) -> Vec<Vec<Option<Number>>> {
    let domain = state.owner(object).domain;
    let none = vec![None; segment.packs().len()];
    let mut lists = vec![none.clone()];
    for (place, pack) in segment.packs().iter().enumerate() {
        for (list, number) in state.live_packs_named(*pack, domain).enumerate() {
            if list == lists.len() {
                lists.push(none.clone());
            }
            lists[list][place] = Some(number);
        }
    }
    lists
}

/// Whether an index that covers so much is of an earlier state of this log: the last object it has seen is the same.
fn continues(covers: Covers, state: &State) -> bool {
    let Some(last) = covers.entry.checked_sub(1).and_then(|last| Number::try_from(last).ok()) else {
        return false;
    };
    match state.object(last) {
        Some(object) => *object.content.hash() == covers.hash,
        // Forgotten, if there are newer ones; else this log is not as far.
        None => state.objects().any(|object| object.number > last),
    }
}

fn finish(update: IndexUpdate, state: &State, whole: bool) -> Result<Index, Error> {
    let live = state.live();
    let last = state.objects().max_by_key(|object| object.number);
    let covers = last.map_or(Covers::default(), |object| Covers {
        entry: u64::from(object.number) + 1,
        hash: *object.content.hash(),
    });
    let keep = |entry: &IndexEntry| live.contains(entry.pack());
    if whole { update.finish_whole(keep, covers).map(Index::from) } else { update.finish(keep, covers) }
}

/// In milliseconds; 0 if nothing is kept.
fn kept_ms(objects: &dyn Objects, kept: Option<Duration>) -> Result<u64, Error> {
    let refused = |why: String| Err(Error::new(ErrorKind::Invalid, "retention", why));
    match kept {
        None => Ok(0),
        Some(kept) if !(SHORTEST..=LONGEST).contains(&kept) => {
            refused(format!("{} s are too short or too long: a second to ten years can be", kept.as_secs()))
        }
        Some(_) if !objects.abilities().retention => {
            refused(format!("{} has no object lock: a bucket must be created with it", objects.url()))
        }
        Some(kept) => Ok(kept.as_millis() as u64),
    }
}

fn keeping(place: Arc<dyn Objects>, period_ms: u64) -> Arc<dyn Objects> {
    if period_ms == 0 { place } else { Arc::new(Keeping { place, period_ms }) }
}

fn create_new(objects: &dyn Objects, name: &Name, content: &[u8]) -> Result<(), Error> {
    match objects.create(name, &[content], None)? {
        Created::New => Ok(()),
        Created::Taken => {
            let why = format!("there is one already in {}", objects.url());
            Err(Error::new(ErrorKind::Invalid, name, why))
        }
    }
}

/// The description, or what its copy says where it is damaged or was lost: nothing removes one.
pub(crate) fn read_description(objects: &dyn Objects) -> Result<Description, Error> {
    let name = Description::name();
    match copies::read(objects, &name, Description::LEN, Description::decode) {
        Err(missing) if missing.kind == ObjectErrorKind::Missing => {
            let copy = objects.get(&copy_of(&name), Description::LEN);
            match copy.map(|bytes| Description::decode(&bytes)) {
                Ok(Ok(description)) => Ok(description),
                Err(error) if error.is_transient() => Err(error.into()),
                _ => {
                    let why = format!("there is no repository in {}", objects.url());
                    let kind = ErrorKind::Objects(ObjectErrorKind::Missing);
                    Err(Error { source: Some(Box::new(missing)), ..Error::new(kind, "repository", why) })
                }
            }
        }
        read => read?,
    }
}

/// What is wrong with the description or its copy, one of which was read.
pub(crate) fn damaged_descriptions(objects: &dyn Objects, read: &Description) -> Result<Vec<Error>, Error> {
    let mut damaged = Vec::new();
    let name = Description::name();
    for name in [copy_of(&name), name] {
        match copies::fetch(objects, &name, Description::LEN) {
            Ok(bytes) if bytes == read.encode() => {}
            Ok(_) => damaged.push(Error::new(
                ErrorKind::Damaged,
                name,
                "its bytes are not those that were written",
            )),
            // A copy may not be made yet.
            Err(error) if error.kind == ObjectErrorKind::Missing && copies::original_of(&name).is_some() => {}
            Err(error) => damaged.push(error.into()),
        }
    }
    Ok(damaged)
}

fn writer_name(key: KeyId) -> Name {
    Name::new(format!("{WRITERS}{key}")).expect("hexadecimal digits make a name")
}

/// The wrapped copies of a repository's master key that are whole.
pub fn keys(objects: &dyn Objects) -> Result<Vec<WrappedKey>, Error> {
    let mut keys = Vec::new();
    each_key(objects, |key| {
        match key {
            Ok(key) => keys.push(key),
            // It opens nothing.
            Err(error) if error.is_loss() || error.kind == ErrorKind::Newer => {}
            Err(error) => return Err(error),
        }
        Ok(())
    })?;
    Ok(keys)
}

/// Every wrapped copy that a list shows, or what is wrong with it.
pub(crate) fn each_key(
    objects: &dyn Objects,
    mut take: impl FnMut(Result<WrappedKey, Error>) -> Result<(), Error>,
) -> Result<(), Error> {
    for page in pages(objects, WRAPPED_KEYS) {
        for listed in page? {
            let read = objects.get(&listed.name, WrappedKey::LEN).map_err(Error::from);
            take(read.and_then(|bytes| WrappedKey::decode(&listed.name, &bytes)))?;
        }
    }
    Ok(())
}

/// The master key, by whichever wrapped copy `unlock` opens.
fn open_key(
    objects: &dyn Objects,
    description: &Description,
    unlock: Unlock<'_>,
) -> Result<MasterKey, Error> {
    let listed = objects.list(WRAPPED_KEYS, None)?.into_iter().map(|listed| listed.name).collect();
    match open_key_of(objects, description, unlock, listed) {
        Err(refusal) => {
            // Somebody may have hidden them.
            let hidden = objects.hidden(WRAPPED_KEYS)?;
            if hidden.is_empty() { Err(refusal) } else { open_key_of(objects, description, unlock, hidden) }
        }
        opened => opened,
    }
}

fn open_key_of(
    objects: &dyn Objects,
    description: &Description,
    unlock: Unlock<'_>,
    names: Vec<Name>,
) -> Result<MasterKey, Error> {
    let none = Error::new(ErrorKind::Damaged, WRAPPED_KEYS, "there is no key in the repository");
    let mut refusal = (0, none);
    for name in names.iter().take(MAX_KEYS) {
        let mut is_of_the_kind = false;
        let opened = objects.get(name, WrappedKey::LEN).map_err(Error::from).and_then(|bytes| {
            let wrapped = WrappedKey::decode(name, &bytes)?;
            if wrapped.repository != description.keys.repository {
                return Err(Error::new(ErrorKind::Foreign, name, "it is a key of another repository"));
            }
            is_of_the_kind =
                matches!(unlock, Unlock::Passphrase(_)) == matches!(wrapped.by, WrappedBy::Passphrase(_));
            wrapped.open(unlock)
        });
        match opened {
            Ok(master) => return Ok(master),
            // A wrong key says more than a damaged one beside it, and that of a passphrase more to who gave one.
            Err(error) => {
                let says = u8::from(error.kind == ErrorKind::WrongKey) + u8::from(is_of_the_kind);
                if says >= refusal.0 {
                    refusal = (says, error);
                }
            }
        }
    }
    Err(refusal.1)
}

impl From<LogError> for Error {
    fn from(source: LogError) -> Error {
        let kind = match &source {
            LogError::Objects(error) => ErrorKind::Objects(error.kind),
            LogError::Unsettled { source, .. } => ErrorKind::Objects(source.kind),
            LogError::Missing { .. } => ErrorKind::Objects(ObjectErrorKind::Missing),
            LogError::Damaged { .. } => ErrorKind::Damaged,
            LogError::Newer { .. } => ErrorKind::Newer,
            LogError::Foreign { .. } => ErrorKind::Foreign,
            LogError::Contended(_) => ErrorKind::Objects(ObjectErrorKind::Unavailable),
            // Whoever was taken for dead, or found what was forgotten meanwhile, begins again.
            LogError::SessionOver(_)
            | LogError::Refused(Refusal::SessionOver(_) | Refusal::NoSuchRoot(_)) => ErrorKind::Stale,
            LogError::Refused(_) => ErrorKind::Refused,
        };
        Error { kind, object: "log".to_owned(), why: "cannot be used".into(), source: Some(Box::new(source)) }
    }
}

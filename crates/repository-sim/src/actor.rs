//! Who works in a simulated repository. Each is a program that blocks, over the calls that the product's programs use.

use crate::book::{Book, CHUNKS, Chunks, chunks_in, each};
use crate::fiber::suspend;
use crate::keys::{Check, Key};
use crate::place::Place;
use crate::rng::Rng;
use rempart_objects::{Created, ErrorKind, Objects};
use rempart_repository::collect::{CollectError, Collector, Follow, Kept};
use rempart_repository::log::{
    self, Commit, Content, Log, LogError, Number, Refusal, Segment, Session, State, Status,
};
use rempart_repository::{Bug, ChainId, DomainId, PackId, PackName, RepositoryId, SessionId, planted};
use rempart_types::WallTime;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

pub const REPOSITORY: RepositoryId = RepositoryId([0x11; 16]);
pub const OWNER: Key = Key(1);
pub const OWNERS_DOMAIN: DomainId = DomainId([1; 16]);
pub const AGENT: Key = Key(2);
pub const AGENTS_DOMAIN: DomainId = DomainId([2; 16]);

/// Tries to put one pack, and to commit one backup.
pub const TRIES: u32 = 3;

/// Steps without a word after which a session is taken for dead, at least.
pub const IDLE: u64 = 50;

/// What an actor does for a living.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Backs up one machine again and again.
    Writer(Key),
    /// Forgets, condemns, removes, sweeps, truncates.
    Collector,
    /// Ends other sessions, for no reason.
    Fencer,
    /// Reads backups, which it has in use meanwhile, and finds all they reach.
    Reader,
    /// Copies what lies in few packs together, and condemns those.
    Repacker,
    /// Brings back what was forgotten.
    Undeleter,
    /// Has a write-only key and writes into the log what it may not.
    Liar,
}

/// An actor's means.
#[derive(Debug, Clone)]
pub struct Actor {
    pub number: usize,
    pub role: Role,
    pub place: Place,
    pub book: Arc<Mutex<Book>>,
    pub rng: Arc<Mutex<Rng>>,
}

/// Why a backup did not go on as planned.
#[derive(Debug)]
enum Trouble {
    Log(LogError),
    /// These chunks do not lie where they were thought to.
    Missing(Chunks),
    /// The backup that this one continues was forgotten.
    NoBase,
}

impl From<LogError> for Trouble {
    fn from(error: LogError) -> Trouble {
        Trouble::Log(error)
    }
}

impl Actor {
    /// Works until it is stopped.
    pub fn work(&self) {
        let mut index = BTreeMap::new();
        loop {
            let done = match self.role {
                Role::Writer(key) => self.back_up(key, &mut index).map_err(|trouble| format!("{trouble:?}")),
                Role::Collector => self.collect().map_err(|error| format!("{error:?}")),
                Role::Fencer => self.fence().map_err(|error| format!("{error:?}")),
                Role::Reader => self.read().map_err(|error| format!("{error:?}")),
                Role::Repacker => self.repack().map_err(|error| format!("{error:?}")),
                Role::Undeleter => self.undelete().map_err(|error| format!("{error:?}")),
                Role::Liar => self.lie().map_err(|error| format!("{error:?}")),
            };
            self.place.store().tell(|| format!("{} {:?}: {done:?}", self.number, self.role));
            suspend();
        }
    }

    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("no holder panics")
    }

    pub fn rng(&self) -> MutexGuard<'_, Rng> {
        self.rng.lock().expect("no holder panics")
    }

    pub fn chance(&self, per_mille: u64) -> bool {
        self.rng().chance(per_mille)
    }

    pub fn now(&self) -> WallTime {
        WallTime(self.place.store().now)
    }

    pub fn open_log(&self) -> Result<Log, LogError> {
        Log::open(Arc::new(self.place.clone()), Arc::new(Check), REPOSITORY, log::Sign::verifier(&OWNER))
    }

    pub fn open(&self, key: Key) -> Result<Session, LogError> {
        let id = SessionId(self.rng().bytes16());
        Session::open(self.open_log()?, Arc::new(key), id, self.now())
    }

    pub fn end(&self, session: Session) -> Result<(), LogError> {
        session.end(self.now()).map(drop)
    }

    /// One backup. `index` is what this writer believes to lie in live packs: as old as it may be.
    pub fn back_up(&self, key: Key, index: &mut BTreeMap<Number, Chunks>) -> Result<(), LogError> {
        let domain = if key.0 == OWNER.0 { OWNERS_DOMAIN } else { AGENTS_DOMAIN };
        let chain = ChainId([self.number as u8; 16]);
        let mut session = self.open(key)?;
        if index.is_empty() || self.chance(500) {
            *index = self.read_index(session.state(), domain);
        }
        let parent = session.state().latest(chain).map(|(number, _)| number);
        let before = match parent {
            Some(parent) => chunks_in(&session.log().payload(parent)?),
            None => 0,
        };
        let target = match before {
            0 => 1 + self.rng().below((1 << CHUNKS) - 1) as Chunks,
            before => self.touch(before),
        };
        let mut backup = Backup {
            domain,
            base: parent.filter(|_| self.chance(800)),
            referred: BTreeMap::new(),
            live: Vec::new(),
            fresh: Vec::new(),
        };
        let unchanged = if backup.base.is_some() { before & target } else { 0 };
        self.find_or_put(&mut session, &mut backup, target & !unchanged, index)?;
        for _ in 0..TRIES {
            let payload = target.to_le_bytes().to_vec();
            let result = session
                .commit(self.now(), |state| backup.resolve(state, self, chain, parent, payload.clone()));
            match result {
                Ok(appended) => {
                    let mut book = self.book();
                    book.committed.insert(appended.number, (appended.hash, target));
                    book.meet("committed");
                    if backup.base.is_some() {
                        book.meet("committed incrementally");
                    }
                    drop(book);
                    self.place.store().changed = true;
                    if self.chance(800) {
                        self.end(session)?;
                    }
                    return Ok(());
                }
                Err(Trouble::Missing(chunks)) => {
                    self.book().meet("chunks put again: their pack is not live any more");
                    self.put_again(&mut session, &mut backup, chunks)?;
                }
                Err(Trouble::NoBase) => {
                    self.book().meet("base forgotten: everything looked up");
                    backup.base = None;
                    self.find_or_put(&mut session, &mut backup, target, index)?;
                }
                Err(Trouble::Log(error)) => {
                    if matches!(error, LogError::SessionOver(_) | LogError::Refused(Refusal::SessionOver(_)))
                    {
                        self.book().meet("fenced: starts over");
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn read_index(&self, state: &State, domain: DomainId) -> BTreeMap<Number, Chunks> {
        let book = self.book();
        let usable = state.objects().filter(|object| state.may_require(object.number, domain));
        let chunks = usable.filter_map(|object| match object.content {
            Content::Pack(pack) => Some((object.number, book.chunks_of(pack))),
            Content::Index(_) => None,
        });
        chunks.collect()
    }

    /// What a machine holds next: a few chunks more or less.
    fn touch(&self, before: Chunks) -> Chunks {
        let mut rng = self.rng();
        let mut next = before;
        for _ in 0..=rng.below(3) {
            next ^= 1 << rng.below(u64::from(CHUNKS));
        }
        if next == 0 { before } else { next }
    }

    /// Refers to chunks that the index knows, and puts the others.
    fn find_or_put(
        &self,
        session: &mut Session,
        backup: &mut Backup,
        chunks: Chunks,
        index: &BTreeMap<Number, Chunks>,
    ) -> Result<(), LogError> {
        let mut new = 0;
        for chunk in each(chunks & !backup.own()) {
            let holding = index.iter().filter(|(_, held)| **held & chunk != 0);
            let found = self.rng().pick(holding.map(|(number, _)| *number).collect());
            match found {
                Some(number) if self.chance(800) => {
                    backup.referred.insert(chunk, number);
                }
                _ => new |= chunk,
            }
        }
        self.put_chunks(session, backup, new)
    }

    fn put_again(&self, session: &mut Session, backup: &mut Backup, chunks: Chunks) -> Result<(), LogError> {
        backup.referred.retain(|chunk, _| chunk & chunks == 0);
        if planted(Bug::NameUsedAgain) {
            let dead = |pack: &PackId| session.state().live_pack(*pack, backup.domain).is_none();
            let again: Vec<_> = backup.live.extract_if(.., |(pack, _)| dead(pack)).collect();
            for (pack, held) in again {
                let bytes = self.book().packs[&pack].clone();
                self.put_pack(session.id(), pack, &bytes)?;
                backup.fresh.push((pack, held));
            }
            return self.put_chunks(session, backup, chunks & !backup.own());
        }
        let domain = backup.domain;
        backup.live.retain(|(pack, _)| session.state().live_pack(*pack, domain).is_some());
        self.put_chunks(session, backup, chunks & !backup.own())
    }

    fn put_chunks(&self, session: &mut Session, backup: &mut Backup, chunks: Chunks) -> Result<(), LogError> {
        let all: Vec<Chunks> = each(chunks).collect();
        for some in all.chunks(3) {
            let held = some.iter().fold(0, |a, b| a | b);
            let pack = self.put_new_pack(session.id(), held)?;
            backup.fresh.push((pack, held));
        }
        // Of a long backup, some packs are live long before its commit.
        if !backup.fresh.is_empty() && self.chance(400) {
            let packs = backup.fresh.iter().map(|(pack, _)| *pack).collect();
            session.segment(self.now(), Segment { packs, indexes: Vec::new() })?;
            backup.live.append(&mut backup.fresh);
        }
        Ok(())
    }

    fn put_new_pack(&self, session: SessionId, held: Chunks) -> Result<PackId, LogError> {
        let mut bytes = self.rng().bytes16().to_vec();
        bytes.extend(held.to_le_bytes());
        let pack = PackId(blake3::hash(&bytes).into());
        self.book().packs.insert(pack, bytes.clone());
        self.put_pack(session, pack, &bytes)?;
        Ok(pack)
    }

    /// The same bytes again until they are acknowledged, and never after.
    pub fn put_pack(&self, session: SessionId, pack: PackId, bytes: &[u8]) -> Result<(), LogError> {
        let name = PackName { session, pack }.object();
        let mut tries = 0;
        loop {
            match self.place.create(&name, &[bytes], None) {
                Ok(Created::New | Created::Taken) => return Ok(()),
                Err(error) if error.kind == ErrorKind::Unknown && tries < TRIES => tries += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn collect(&self) -> Result<(), CollectError> {
        let mut session = self.open(OWNER)?;
        if self.chance(600) {
            self.forget(&mut session)?;
        }
        let mut collector = Collector::new(&mut session, self.now(), true)?;
        if self.chance(400) {
            let most = if self.chance(600) { 50 } else { 1000 };
            let idle = IDLE + self.rng().below(most);
            collector.fence_idle(Duration::from_millis(idle))?;
        }
        let mut walk = self.walk(None);
        let follow: Option<&mut dyn Follow> = if self.chance(700) { Some(&mut walk) } else { None };
        let followed = follow.is_some();
        let condemned = collector.condemn(follow)?;
        if condemned.objects > 0 {
            self.book().meet(if followed { "condemned, followed" } else { "condemned, not followed" });
        }
        // Some leave it to the next one.
        let removes = self.chance(600);
        if removes && self.chance(900) {
            collector.delete()?;
        }
        if removes && self.chance(700) {
            collector.sweep()?;
        }
        let entries = self.rng().below(25);
        if self.chance(500) && collector.truncate(entries)? > 0 {
            self.book().meet("truncated");
        }
        self.end(session)?;
        Ok(())
    }

    fn forget(&self, session: &mut Session) -> Result<(), LogError> {
        let roots: Vec<u64> = session.state().roots().keys().copied().collect();
        let some: Vec<u64> = roots.into_iter().filter(|_| self.chance(400)).collect();
        if some.is_empty() {
            return Ok(());
        }
        if self.chance(500) {
            self.end_readers(session, &some)?;
        }
        self.book().set_out_to_forget(self.number, &some);
        let forgotten = session.forget(self.now(), some);
        self.book().forgetting.remove(&self.number);
        match forgotten {
            Ok(_) => self.book().meet("forgotten"),
            Err(LogError::Refused(Refusal::InUse(..))) => self.book().meet("in use: not forgotten"),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// All backups but the newest.
    pub fn forget_most(&self) -> Result<(), LogError> {
        let mut session = self.open(OWNER)?;
        let mut roots: Vec<u64> = session.state().roots().keys().copied().collect();
        roots.pop();
        if !roots.is_empty() {
            self.book().set_out_to_forget(self.number, &roots);
            session.forget(self.now(), roots)?;
        }
        self.end(session)
    }

    fn fence(&self) -> Result<(), LogError> {
        let mut session = self.open(OWNER)?;
        let own = session.id();
        let open = session.state().sessions().filter(|other| !other.is_over && other.id != own);
        let other = self.rng().pick(open.map(|other| other.id).collect());
        if let Some(other) = other {
            self.book().ended.insert(other);
            session.fence(self.now(), other)?;
        }
        self.end(session)
    }

    /// Rule 10: the copies are live before the originals are condemned. Those of the agent's packs lie in its domain, too.
    fn repack(&self) -> Result<(), CollectError> {
        let domain = if self.chance(500) { OWNERS_DOMAIN } else { AGENTS_DOMAIN };
        let mut session = self.open(OWNER)?;
        let state = session.state();
        let whole = state.objects().filter(|object| {
            object.status == Status::Live
                && state.may_require(object.number, domain)
                && state.owner(object).is_over
        });
        let packs: Vec<_> = whole
            .filter_map(|object| match object.content {
                Content::Pack(pack) => Some(pack),
                Content::Index(_) => None,
            })
            .collect();
        let mut held = 0;
        for _ in 0..2 {
            let pack = self.rng().pick(packs.clone());
            held |= pack.map_or(0, |pack| self.book().chunks_of(pack));
        }
        if held == 0 {
            return Ok(self.end(session)?);
        }
        let believed = planted(Bug::RepackedBeforeLive).then_some(domain);
        let put = |session: &mut Session| {
            let copy = self.put_new_pack(session.id(), held)?;
            if believed.is_none() {
                session.segment(self.now(), Segment { packs: vec![copy], indexes: Vec::new() })?;
            }
            Ok::<_, LogError>(copy)
        };
        let copy = if domain == OWNERS_DOMAIN {
            put(&mut session)?
        } else {
            let id = SessionId(self.rng().bytes16());
            session.within(domain, id, self.now(), put)?
        };
        let mut walk = Walk { believed, ..self.walk(Some(copy)) };
        let mut collector = Collector::new(&mut session, self.now(), true)?;
        if collector.condemn(Some(&mut walk))?.objects > 0 {
            self.book().meet(match domain {
                OWNERS_DOMAIN => "condemned after a repack",
                _ => "condemned after a repack in an agent's domain",
            });
        }
        collector.delete()?;
        if believed == Some(OWNERS_DOMAIN) {
            session.segment(self.now(), Segment { packs: vec![copy], indexes: Vec::new() })?;
        }
        self.end(session)?;
        Ok(())
    }

    pub fn walk(&self, preferred: Option<PackId>) -> Walk<'_> {
        Walk { actor: self, preferred, believed: None }
    }
}

/// A backup on its way.
#[derive(Debug)]
struct Backup {
    domain: DomainId,
    base: Option<u64>,
    /// Chunks that others put.
    referred: BTreeMap<Chunks, Number>,
    /// Own packs that a segment made live.
    live: Vec<(PackId, Chunks)>,
    /// Own packs that are acknowledged, no more.
    fresh: Vec<(PackId, Chunks)>,
}

impl Backup {
    fn own(&self) -> Chunks {
        self.live.iter().chain(&self.fresh).fold(0, |all, (_, held)| all | held)
    }

    /// Each chunk in a pack that is live in this state, or an own one.
    fn resolve(
        &self,
        state: &State,
        actor: &Actor,
        chain: ChainId,
        parent: Option<u64>,
        payload: Vec<u8>,
    ) -> Result<Commit, Trouble> {
        let is_there = |base| state.roots().contains_key(&base) || planted(Bug::BaseNotLookedFor);
        if self.base.is_some_and(|base| !is_there(base)) {
            return Err(Trouble::NoBase);
        }
        let mut packs = Vec::new();
        let mut missing = 0;
        for (chunk, number) in &self.referred {
            if state.may_require(*number, self.domain) {
                packs.push(*number);
            } else {
                missing |= chunk;
            }
        }
        for (pack, held) in &self.live {
            match state.live_pack(*pack, self.domain) {
                Some(number) => packs.push(number),
                None => missing |= held,
            }
        }
        if missing != 0 {
            actor.book().meet("a commit found packs that are not live");
            return Err(Trouble::Missing(missing));
        }
        Ok(Commit {
            chain,
            parent,
            segment: Segment {
                packs: self.fresh.iter().map(|(pack, _)| *pack).collect(),
                indexes: Vec::new(),
            },
            base: self.base,
            packs: packs.into_iter().collect(),
            retain_until: None,
            payload,
        })
    }
}

/// Follows the trees of backups.
#[derive(Debug)]
pub struct Walk<'a> {
    actor: &'a Actor,
    /// A pack that is to be kept rather than others.
    preferred: Option<PackId>,
    /// It is believed to be live in that domain, whether it is or not.
    believed: Option<DomainId>,
}

impl Follow for Walk<'_> {
    fn follow(&mut self, state: &State, root: u64, kept: &mut Kept) -> Result<(), CollectError> {
        let chunks = chunks_in(&log::payload(&self.actor.place, state, root)?);
        let domain = state.roots()[&root].domain;
        let book = self.actor.book();
        let mut packs = Vec::new();
        for object in state.objects().filter(|object| state.may_require(object.number, domain)) {
            if let Content::Pack(pack) = object.content
                && object.status == Status::Live
            {
                packs.push((object.number, pack, book.chunks_of(pack)));
            }
        }
        let preferred = self.preferred.map_or(0, |pack| book.chunks_of(pack));
        drop(book);
        for chunk in each(chunks) {
            if self.believed == Some(domain) && preferred & chunk != 0 {
                continue;
            }
            let holding = || packs.iter().filter(|(_, _, held)| held & chunk != 0);
            let copies = holding().count();
            let chosen = holding()
                .find(|(_, pack, _)| Some(*pack) == self.preferred)
                .or_else(|| holding().find(|(number, ..)| kept.contains(*number)))
                .or_else(|| holding().nth(self.actor.rng().below(copies.max(1) as u64) as usize));
            match chosen {
                Some((number, ..)) => kept.keep(*number, copies > 1),
                None => {
                    let why = format!("chunk {chunk:b} of backup {root} lies in no live pack");
                    self.actor.book().broken.get_or_insert(why.clone());
                    return Err(CollectError::Unknown { root, why: why.into() });
                }
            }
        }
        Ok(())
    }
}

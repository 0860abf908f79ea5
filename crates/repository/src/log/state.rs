//! What the log says when it is folded: pure, and the same for whoever reads the same entries.

use super::body::{
    Body, Checkpoint, Commit, Condemn, Damaged, Key, MAX_OBJECTS, MAX_ROOTS, Read, Segment, Undelete,
};
use super::entry::{self, Header, MAX_CHECKPOINT, Meaning, Parsed};
use super::live_packs::LivePacks;
use super::numbers::{Number, Numbers, Shared};
use super::refusal::{Refusal, Remark};
use super::sign::{Sign, Verify};
use super::table::{Content, Object, SessionNumber, Status, Table};
use crate::bug::{Bug, planted};
use crate::{ChainId, DomainId, EntryHash, KeyId, PackId, RepositoryId, SessionId, Verifier, WrappedKeyId};
use rempart_types::WallTime;
use std::collections::{BTreeMap, BTreeSet};

/// All that entries up to a number say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    pub(super) repository: RepositoryId,
    /// The number that the next entry gets.
    pub(super) next: u64,
    /// The hash of the entry before it.
    pub(super) head: EntryHash,
    /// What stands in the entry before could not be told, so that its successor's word about its hash proves nothing.
    pub(super) head_is_doubtful: bool,
    pub(super) maintenance: Verifier,
    /// Checkpoints so far, and the last.
    pub(super) checkpoints: u64,
    pub(super) floor: Option<(u64, EntryHash)>,
    pub(super) keys: BTreeMap<KeyId, Key>,
    pub(super) sessions: BTreeMap<SessionNumber, SessionRecord>,
    pub(super) next_session: SessionNumber,
    pub(super) by_id: BTreeMap<SessionId, SessionNumber>,
    pub(super) roots: BTreeMap<u64, Root>,
    pub(super) objects: Table,
    pub(super) verified: Numbers,
    pub(super) damaged: BTreeMap<u64, Vec<u8>>,
    /// What open sessions have in use.
    pub(super) reads: BTreeMap<SessionNumber, Read>,
    /// What came of starting backups, by their entries.
    pub(super) boots: BTreeMap<u64, Vec<u8>>,
    /// Wrapped keys that are removed, or about to be.
    pub(super) removed_keys: BTreeSet<WrappedKeyId>,
    /// An entry of a kind that only a newer version knows was skipped: what may follow it is not known here.
    pub(super) newer: bool,
}

/// A writer's stay, as long as it is not over or any of its objects is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRecord {
    pub id: SessionId,
    pub key: KeyId,
    pub domain: DomainId,
    /// The entry that opened it.
    pub opened: u64,
    /// It was fenced, or has ended, or its key was revoked.
    pub is_over: bool,
    /// Its newest entry: how a writer finds out whether its entry is in a state that it did not read entry by entry.
    pub last: (u64, EntryHash),
    /// When that was written, as the writer's clock told it.
    pub last_written: WallTime,
    /// Objects of it that are known.
    pub(super) objects: u64,
}

/// A backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    pub chain: ChainId,
    pub parent: Option<u64>,
    pub domain: DomainId,
    pub key: KeyId,
    pub written: WallTime,
    pub retain_until: Option<WallTime>,
    /// The entry it stands in: the one that committed it, or that brought it back.
    pub entry: u64,
    /// Of that entry, which stays as long as this.
    pub hash: EntryHash,
    /// The packs that hold what it reaches. All are live.
    pub required: Numbers,
}

/// A body that may be appended right behind a certain state, of which it holds on to: once another entry is there, there
/// is nothing left to hold. Entries are made from this only.
#[derive(Debug)]
pub struct Valid<'s> {
    state: &'s State,
    header: Header,
    body: Body,
}

/// How an entry was taken.
#[derive(Debug)]
pub(super) enum Followed {
    Applied,
    /// It counts for nothing, for that reason.
    Ignored(Remark),
    /// It is of a newer version, and must not be passed over.
    Newer,
}

impl State {
    pub fn repository(&self) -> RepositoryId {
        self.repository
    }

    /// Entries so far: the number of the next.
    pub fn next(&self) -> u64 {
        self.next
    }

    pub fn maintenance(&self) -> Verifier {
        self.maintenance
    }

    /// The newest checkpoint's number and hash.
    pub fn floor(&self) -> Option<(u64, EntryHash)> {
        self.floor
    }

    pub fn checkpoints(&self) -> u64 {
        self.checkpoints
    }

    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.keys.values()
    }

    pub fn sessions(&self) -> impl Iterator<Item = &SessionRecord> {
        self.sessions.values()
    }

    pub fn session(&self, id: SessionId) -> Option<&SessionRecord> {
        self.sessions.get(self.by_id.get(&id)?)
    }

    pub fn session_is_open(&self, id: SessionId) -> bool {
        self.session(id).is_some_and(|session| !session.is_over)
    }

    /// Backups by the numbers of their entries.
    pub fn roots(&self) -> &BTreeMap<u64, Root> {
        &self.roots
    }

    /// Entries in which backups stand: those that stay when the ones before a checkpoint go.
    pub(super) fn entries_of_roots(&self) -> BTreeSet<u64> {
        let entry = |(number, root): (&u64, &Root)| {
            if planted(Bug::UndeletedEntryFreed) { *number } else { root.entry }
        };
        self.roots.iter().map(entry).collect()
    }

    /// The newest backup of a chain.
    pub fn latest(&self, chain: ChainId) -> Option<(u64, &Root)> {
        self.roots.iter().rev().find(|(_, root)| root.chain == chain).map(|(number, root)| (*number, root))
    }

    pub fn objects(&self) -> impl Iterator<Item = Object> {
        self.objects.iter()
    }

    pub fn object(&self, number: Number) -> Option<Object> {
        self.objects.get(number)
    }

    /// Bytes of memory that its objects take, about.
    pub(crate) fn memory(&self) -> u64 {
        60 * self.objects.len() as u64
    }

    /// Live packs as they are now, for readers.
    pub(crate) fn live_packs(&self) -> LivePacks {
        let named = |session: &SessionRecord| (session.id, session.domain);
        let sessions = self.sessions.iter().map(|(number, session)| (*number, named(session)));
        LivePacks::new(self.objects.snapshot(), sessions.collect())
    }

    /// The numbers of live packs of that name that a writer of `domain` may refer to, in no order: one, unless somebody hostile
    /// named what others put, too, and perhaps put nothing.
    pub fn live_packs_named(&self, pack: PackId, domain: DomainId) -> impl Iterator<Item = Number> + '_ {
        let known = self.objects.with_content(Content::Pack(pack));
        known.map(|object| object.number).filter(move |number| self.may_require(*number, domain))
    }

    /// The first of them.
    pub fn live_pack(&self, pack: PackId, domain: DomainId) -> Option<Number> {
        self.live_packs_named(pack, domain).min()
    }

    /// Whether a pack has another number, too: somebody hostile named what another put, and it may not be there under this one.
    pub(crate) fn is_named_again(&self, object: &Object) -> bool {
        let Content::Pack(pack) = object.content else { return false };
        self.live_packs_named(pack, self.owner(object).domain).nth(1).is_some()
    }

    pub fn owner(&self, object: &Object) -> &SessionRecord {
        self.sessions.get(&object.session).expect("an object's session is known")
    }

    /// The number of an object put by `session`; `None` if no entry tells, or it is forgotten.
    pub fn number(&self, session: SessionId, content: Content) -> Option<Number> {
        let session = self.by_id.get(&session)?;
        self.objects.find(content, *session).map(|object| object.number)
    }

    /// What an object put by `session` has become; `None` if no entry tells.
    pub fn status(&self, session: SessionId, content: Content) -> Option<Status> {
        let session = self.by_id.get(&session)?;
        self.objects.find(content, *session).map(|object| object.status)
    }

    pub fn live(&self) -> Numbers {
        self.with_status(Status::Live)
    }

    pub fn condemned(&self) -> Numbers {
        self.with_status(Status::Condemned)
    }

    fn with_status(&self, status: Status) -> Numbers {
        let mut numbers = Numbers::new();
        let objects = self.objects.iter().filter(|object| object.status == status);
        objects.for_each(|object| numbers.push(object.number));
        numbers
    }

    /// What any backup requires.
    pub fn required(&self) -> Numbers {
        // Pairs, pairs of pairs and so on: adding one after the other would copy the sum each time.
        let mut sets: Vec<Numbers> = self.roots.values().map(|root| root.required.clone()).collect();
        while sets.len() > 1 {
            let pairs = sets.chunks(2);
            sets = pairs.map(|pair| pair.iter().skip(1).fold(pair[0].clone(), |a, b| a.union(b))).collect();
        }
        sets.pop().unwrap_or_default()
    }

    pub fn verified(&self) -> &Numbers {
        &self.verified
    }

    /// What was found damaged and is not settled, by entry.
    pub fn damaged(&self) -> &BTreeMap<u64, Vec<u8>> {
        &self.damaged
    }

    /// What came of starting a backup's machine, the last time that somebody did.
    pub fn boot(&self, root: u64) -> Option<&[u8]> {
        self.boots.get(&root).map(Vec::as_slice)
    }

    /// Whether the wrapped key is removed, or about to be.
    pub fn key_is_removed(&self, key: WrappedKeyId) -> bool {
        self.removed_keys.contains(&key)
    }

    /// Sessions that have backups in use, and which.
    pub fn reads(&self) -> impl Iterator<Item = (&SessionRecord, &Read)> {
        self.reads.iter().map(|(session, read)| (&self.sessions[session], read))
    }

    /// A session that has one of these backups in use, and which.
    fn reader_of(&self, roots: &[u64]) -> Option<(u64, SessionId)> {
        self.reads().find_map(|(session, read)| {
            let root = roots.iter().find(|root| read.roots.binary_search(root).is_ok())?;
            Some((*root, session.id))
        })
    }

    /// The state before the first entry, which is at once taken.
    pub(super) fn begin(
        bytes: &[u8],
        repository: RepositoryId,
        verify: &dyn Verify,
    ) -> Result<State, &'static str> {
        let parsed = Parsed::new(bytes)?;
        let Meaning::Body(Body::Create(create)) = parsed.meaning() else {
            return Err("it is not the first entry of a log");
        };
        if !parsed.is_signed_by(&create.maintenance, verify) {
            return Err("its signature is wrong");
        }
        if parsed.header.repository != repository {
            return Err("it is of another repository");
        }
        if parsed.header.number != 0 || parsed.header.previous.0 != [0; 32] {
            return Err("it is not the first entry of a log");
        }
        let owner = Key { public: create.maintenance, domain: create.domain };
        Ok(State {
            repository,
            next: 1,
            head: entry::hash(bytes),
            head_is_doubtful: false,
            maintenance: create.maintenance,
            checkpoints: 0,
            floor: None,
            keys: BTreeMap::from([(owner.public.id(), owner)]),
            sessions: BTreeMap::new(),
            next_session: 0,
            by_id: BTreeMap::new(),
            roots: BTreeMap::new(),
            objects: Table::default(),
            verified: Numbers::new(),
            damaged: BTreeMap::new(),
            reads: BTreeMap::new(),
            boots: BTreeMap::new(),
            removed_keys: BTreeSet::new(),
            newer: false,
        })
    }

    /// Takes what stands in the next slot, whatever it is.
    pub(super) fn follow(&mut self, bytes: &[u8], verify: &dyn Verify) -> Followed {
        let hash = entry::hash(bytes);
        let followed = self.judge(bytes, hash, verify);
        if matches!(followed, Followed::Newer) {
            return followed;
        }
        self.next += 1;
        self.head = hash;
        self.head_is_doubtful =
            matches!(&followed, Followed::Ignored(remark) if remark.may_have_been_an_entry());
        followed
    }

    fn judge(&mut self, bytes: &[u8], hash: EntryHash, verify: &dyn Verify) -> Followed {
        let ignored = |why| Followed::Ignored(Remark::Unreadable(why));
        let parsed = match Parsed::new(bytes) {
            Ok(parsed) => parsed,
            Err(why) => return ignored(why),
        };
        if parsed.header.repository != self.repository {
            return ignored("it is of another repository");
        }
        if parsed.header.number != self.next {
            return ignored("it is for another place in the log");
        }
        let Some(key) = self.keys.get(&parsed.header.key) else {
            return ignored("its key may not write here");
        };
        if !parsed.is_signed_by(&key.public, verify) {
            return ignored("its signature is wrong");
        }
        if parsed.header.previous != self.head && !self.head_is_doubtful {
            return Followed::Ignored(Remark::OtherPast(parsed.header.key));
        }
        let body = match parsed.meaning() {
            Meaning::Body(body) => body,
            Meaning::Newer { skippable: false } if key.public == self.maintenance => return Followed::Newer,
            Meaning::Newer { skippable } => {
                // An agent cannot stop others from reading by a kind that nobody knows.
                self.newer |= skippable && key.public == self.maintenance;
                return Followed::Ignored(Remark::Newer);
            }
            Meaning::Nonsense => return Followed::Ignored(Remark::Nonsense(parsed.header.key)),
        };
        match self.check(&parsed.header, &body) {
            Ok(()) => {
                self.apply(&parsed.header, hash, body);
                Followed::Applied
            }
            Err(refusal) => Followed::Ignored(Remark::Refused(parsed.header.key, refusal)),
        }
    }

    /// A body for the next entry, if it may be one.
    pub fn validate(
        &self,
        session: SessionId,
        signer: &dyn Sign,
        written: WallTime,
        body: Body,
    ) -> Result<Valid<'_>, Refusal> {
        if self.newer {
            return Err(Refusal::Newer);
        }
        let header = Header {
            repository: self.repository,
            number: self.next,
            previous: self.head,
            session,
            key: signer.verifier().id(),
            written,
        };
        self.check(&header, &body)?;
        Ok(Valid { state: self, header, body })
    }

    /// Whether an entry may follow this state: asked by its writer before, and by every reader after.
    fn check(&self, header: &Header, body: &Body) -> Result<(), Refusal> {
        let key = self.keys.get(&header.key).ok_or(Refusal::KeyUnknown(header.key))?;
        let maintains = key.public == self.maintenance;
        if let Body::Session(domain) = body {
            if domain.is_some() && !maintains && !planted(Bug::AnyKeyInAnyDomain) {
                return Err(Refusal::Maintenance("session in a domain that it names"));
            }
            let is_new = !self.by_id.contains_key(&header.session) && self.next_session < SessionNumber::MAX;
            return is_new.then_some(()).ok_or(Refusal::SessionKnown(header.session));
        }
        let session = self
            .session(header.session)
            .filter(|session| !session.is_over || planted(Bug::FenceIgnored))
            .ok_or(Refusal::SessionOver(header.session))?;
        if session.key != header.key {
            return Err(Refusal::NotYours(header.session));
        }
        match body {
            Body::Session(_) | Body::End => return Ok(()),
            Body::Segment(segment) => return self.check_segment(header.session, segment),
            Body::Commit(commit) => return self.check_commit(header.session, session, commit),
            Body::Fence(other) => {
                let other = self.session(*other).ok_or(Refusal::SessionOver(*other))?;
                if other.is_over {
                    return Err(Refusal::SessionOver(other.id));
                }
                return (maintains || other.key == header.key)
                    .then_some(())
                    .ok_or(Refusal::NotYours(other.id));
            }
            _ => {}
        }
        if !maintains && !planted(Bug::AnyKeyMaintains) {
            return Err(Refusal::Maintenance(body.name()));
        }
        match body {
            Body::Key(key) => {
                let new = !self.keys.contains_key(&key.public.id());
                new.then_some(()).ok_or(Refusal::KeyKnown(key.public.id()))
            }
            Body::Revoke(key) => {
                let known = self.keys.contains_key(key) && *key != self.maintenance.id();
                known.then_some(()).ok_or(Refusal::KeyUnknown(*key))
            }
            Body::Condemn(condemn) => self.check_condemn(condemn),
            Body::Forget(roots) => {
                let distinct: BTreeSet<_> = roots.iter().collect();
                let unknown = roots.iter().find(|root| !self.roots.contains_key(root));
                match unknown {
                    Some(root) => Err(Refusal::NoSuchRoot(*root)),
                    None if distinct.len() != roots.len() || roots.is_empty() => Err(Refusal::Nothing),
                    None => match self.reader_of(roots) {
                        Some((root, session)) if !planted(Bug::InUseForgotten) => {
                            Err(Refusal::InUse(root, session))
                        }
                        _ => Ok(()),
                    },
                }
            }
            Body::Read(read) => self.check_read(read),
            Body::RemoveKey(key) if self.removed_keys.contains(key) => Err(Refusal::Nothing),
            Body::RemoveKey(_) => Ok(()),
            Body::Boot(boot) if !self.roots.contains_key(&boot.root) => Err(Refusal::NoSuchRoot(boot.root)),
            Body::Boot(_) => Ok(()),
            Body::Undelete(undelete) => self.check_undelete(undelete),
            Body::Gone(objects) => self.all(objects, |object| object.status == Status::Condemned),
            Body::Verified(packs) => self.all(packs, |object| {
                object.status == Status::Live && matches!(object.content, Content::Pack(_))
            }),
            Body::Damaged(damaged) => self.check_damaged(damaged),
            Body::Checkpoint(checkpoint) => self.check_checkpoint(checkpoint),
            Body::Create(_) => Err(Refusal::Created),
            Body::Session(_) | Body::Segment(_) | Body::Commit(_) | Body::Fence(_) | Body::End => {
                unreachable!("handled above")
            }
        }
    }

    fn check_segment(&self, session: SessionId, segment: &Segment) -> Result<(), Refusal> {
        if segment.is_empty() {
            return Err(Refusal::Nothing);
        }
        self.check_new(session, segment)
    }

    /// Each object is named once in its session's life.
    fn check_new(&self, session: SessionId, segment: &Segment) -> Result<(), Refusal> {
        let session = self.by_id[&session];
        let mut distinct = BTreeSet::new();
        for content in contents(segment) {
            let named = self.objects.find(content, session).is_some() && !planted(Bug::NameUsedAgain);
            if !distinct.insert(content) || named {
                return Err(Refusal::NamedBefore(content));
            }
        }
        if distinct.len() > MAX_OBJECTS || !self.objects.has_room_for(distinct.len()) {
            return Err(Refusal::TooMany);
        }
        Ok(())
    }

    fn check_commit(&self, id: SessionId, session: &SessionRecord, commit: &Commit) -> Result<(), Refusal> {
        self.check_new(id, &commit.segment)?;
        if planted(Bug::NotValidatedAgain) {
            return Ok(());
        }
        if let Some(base) = commit.base.filter(|_| !planted(Bug::BaseNotLookedFor)) {
            let root = self.roots.get(&base).ok_or(Refusal::NoSuchRoot(base))?;
            if root.domain != session.domain {
                return Err(Refusal::OtherDomain(base));
            }
        }
        if commit.parent.is_some_and(|parent| parent >= self.next) {
            return Err(Refusal::NoSuchRoot(self.next));
        }
        let unfit = commit.packs.iter().find(|pack| !self.may_require(*pack, session.domain));
        unfit.map_or(Ok(()), |pack| Err(Refusal::NotFit(pack)))
    }

    /// Whether a backup of that domain may require the object: a live pack of the domain, or one that was verified.
    pub fn may_require(&self, number: Number, domain: DomainId) -> bool {
        let Some(object) = self.objects.get(number) else { return planted(Bug::NotCondemnedIsEnough) };
        (object.status == Status::Live || planted(Bug::CondemnedIsRequired))
            && matches!(object.content, Content::Pack(_))
            && (self.owner(&object).domain == domain
                || self.verified.contains(object.number)
                || planted(Bug::OtherDomainsRequired))
    }

    fn check_condemn(&self, condemn: &Condemn) -> Result<(), Refusal> {
        if condemn.objects.is_empty() {
            return Err(Refusal::Nothing);
        }
        self.all(&condemn.objects, |object| object.status == Status::Live)?;
        self.all(&condemn.survivors, |object| {
            object.status == Status::Live && matches!(object.content, Content::Pack(_))
        })?;
        if condemn.survivors.intersects(&condemn.objects) {
            return Err(Refusal::Nothing);
        }
        let claimed = self.roots.iter().find(|(_, root)| root.required.intersects(&condemn.objects));
        match claimed {
            Some((root, _)) if !condemn.followed => Err(Refusal::Required(*root)),
            _ => Ok(()),
        }
    }

    fn check_read(&self, read: &Read) -> Result<(), Refusal> {
        match read.roots.iter().find(|root| !self.roots.contains_key(root)) {
            Some(root) if !planted(Bug::ForgottenIsRead) => Err(Refusal::NoSuchRoot(*root)),
            _ if read.roots.len() > MAX_ROOTS => Err(Refusal::TooMany),
            _ if !is_ascending(&read.roots) => Err(Refusal::Nothing),
            _ => Ok(()),
        }
    }

    /// What it requires is asked to be live and no more: which packs hold what it reaches, the maintenance key knows.
    fn check_undelete(&self, undelete: &Undelete) -> Result<(), Refusal> {
        if undelete.root >= self.next {
            return Err(Refusal::NoSuchRoot(undelete.root));
        }
        if self.roots.contains_key(&undelete.root) {
            return Err(Refusal::RootKnown(undelete.root));
        }
        if let Some(parent) = undelete.parent.filter(|parent| *parent >= undelete.root) {
            return Err(Refusal::NoSuchRoot(parent));
        }
        if planted(Bug::UndeletedUnchecked) {
            return Ok(());
        }
        self.all(&undelete.packs, |object| {
            object.status == Status::Live && matches!(object.content, Content::Pack(_))
        })
    }

    fn check_damaged(&self, damaged: &Damaged) -> Result<(), Refusal> {
        match damaged.settles.iter().find(|entry| !self.damaged.contains_key(entry)) {
            Some(entry) => Err(Refusal::NoSuchEntry(*entry)),
            None if damaged.settles.is_empty() && damaged.payload.is_empty() => Err(Refusal::Nothing),
            None => Ok(()),
        }
    }

    fn check_checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), Refusal> {
        if checkpoint.ordinal != self.checkpoints || !self.is_encoded_as(&checkpoint.state) {
            return Err(Refusal::OtherState);
        }
        if checkpoint.state.len() as u64 > MAX_CHECKPOINT / 2 {
            return Err(Refusal::TooMany);
        }
        Ok(())
    }

    /// Whether all are known, and as they should be.
    fn all(&self, numbers: &Numbers, fits: impl Fn(&Object) -> bool) -> Result<(), Refusal> {
        for number in numbers.iter() {
            if !self.objects.get(number).is_some_and(|object| fits(&object)) {
                return Err(Refusal::NotFit(number));
            }
        }
        Ok(())
    }

    /// Takes a checked entry.
    fn apply(&mut self, header: &Header, hash: EntryHash, body: Body) {
        if let Body::Session(domain) = body {
            let session = SessionRecord {
                id: header.session,
                key: header.key,
                domain: domain.unwrap_or_else(|| self.keys[&header.key].domain),
                opened: header.number,
                is_over: false,
                last: (header.number, hash),
                last_written: header.written,
                objects: 0,
            };
            self.by_id.insert(session.id, self.next_session);
            self.sessions.insert(self.next_session, session);
            self.next_session += 1;
            return;
        }
        let number = self.by_id[&header.session];
        let session = self.sessions.get_mut(&number).expect("the entry was checked");
        session.last = (header.number, hash);
        session.last_written = header.written;
        let may_forget = matches!(body, Body::Revoke(_) | Body::Fence(_) | Body::End | Body::Gone(_));
        match body {
            Body::Create(_) | Body::Session(_) => unreachable!("not applied here"),
            Body::Key(key) => {
                self.keys.insert(key.public.id(), key);
            }
            Body::Revoke(key) => {
                self.keys.remove(&key);
                self.sessions
                    .values_mut()
                    .filter(|session| session.key == key)
                    .for_each(SessionRecord::close);
            }
            Body::Segment(segment) => {
                self.add(number, &segment);
            }
            Body::Commit(commit) => self.apply_commit(header, hash, number, commit),
            Body::Condemn(condemn) => self.apply_condemn(&condemn),
            Body::Fence(other) => {
                let other = self.by_id[&other];
                self.sessions.get_mut(&other).expect("known by its id").close();
            }
            Body::End => session.close(),
            Body::Forget(roots) => {
                for root in roots {
                    self.roots.remove(&root).expect("the entry was checked");
                    self.boots.remove(&root);
                }
            }
            Body::Gone(objects) => self.objects.set_status(&objects, Status::Gone),
            Body::Verified(packs) => self.verified = self.verified.union(&packs),
            Body::Damaged(damaged) => {
                damaged.settles.iter().for_each(|entry| drop(self.damaged.remove(entry)));
                if !damaged.payload.is_empty() {
                    self.damaged.insert(header.number, damaged.payload);
                }
            }
            Body::Read(read) if planted(Bug::FirstReadCounts) => {
                self.reads.entry(number).or_insert(read);
            }
            Body::Read(read) => {
                self.reads.insert(number, read);
            }
            Body::RemoveKey(key) => {
                self.removed_keys.insert(key);
            }
            Body::Boot(boot) => {
                self.boots.insert(boot.root, boot.payload);
            }
            Body::Undelete(undelete) => self.apply_undelete(header, hash, undelete),
            Body::Checkpoint(_) => {
                self.checkpoints += 1;
                self.floor = Some((header.number, hash));
            }
        }
        if may_forget {
            self.forget_what_is_over();
        }
    }

    fn apply_commit(&mut self, header: &Header, hash: EntryHash, session: SessionNumber, commit: Commit) {
        let own = self.add(session, &commit.segment);
        let base = commit.base.and_then(|base| self.roots.get(&base));
        let inherited = base.map(|base| base.required.clone()).unwrap_or_default();
        let required = inherited.union(&commit.packs).union(&own);
        if let Some(until) = commit.retain_until {
            self.objects.retain(&required, until);
        }
        let root = Root {
            chain: commit.chain,
            parent: commit.parent,
            domain: self.sessions[&session].domain,
            key: header.key,
            written: header.written,
            retain_until: commit.retain_until,
            entry: header.number,
            hash,
            required,
        };
        self.roots.insert(header.number, root);
    }

    fn apply_undelete(&mut self, header: &Header, hash: EntryHash, undelete: Undelete) {
        let Undelete { root, chain, parent, domain, key, written, packs, retain_until, payload: _ } =
            undelete;
        if let Some(until) = retain_until {
            self.objects.retain(&packs, until);
        }
        let entry = header.number;
        let again = Root { chain, parent, domain, key, written, retain_until, entry, hash, required: packs };
        self.roots.insert(root, again);
    }

    fn apply_condemn(&mut self, condemn: &Condemn) {
        self.objects.set_status(&condemn.objects, Status::Condemned);
        self.verified = self.verified.difference(&condemn.objects);
        // What lies in one domain, nothing of another holds again: nobody claims more of others than it did.
        let domains = self.by_domain(condemn);
        let claiming = self.roots.values_mut().filter(|root| root.required.intersects(&condemn.objects));
        let mut shared = Shared::default();
        for root in claiming {
            let lost = domains.iter().filter(|(condemned, _)| root.required.intersects(condemned));
            let left = root.required.difference(&condemn.objects);
            root.required = lost.fold(left, |required, (_, survivors)| required.union(survivors));
            root.required.share(&mut shared);
        }
    }

    /// What is condemned of each domain, and what survives of it.
    fn by_domain(&self, condemn: &Condemn) -> Vec<(Numbers, Numbers)> {
        if planted(Bug::SurvivorsOfAnyDomain) {
            return vec![(condemn.objects.clone(), condemn.survivors.clone())];
        }
        let mut domains: BTreeMap<DomainId, (Numbers, Numbers)> = BTreeMap::new();
        let of = |number| self.objects.get(number).map(|object| self.owner(&object).domain);
        for number in condemn.objects.iter() {
            of(number).into_iter().for_each(|domain| domains.entry(domain).or_default().0.push(number));
        }
        for number in condemn.survivors.iter() {
            let lost = of(number).and_then(|domain| domains.get_mut(&domain));
            lost.into_iter().for_each(|(_, survivors)| survivors.push(number));
        }
        domains.into_values().collect()
    }

    /// Returns the packs' numbers.
    fn add(&mut self, session: SessionNumber, segment: &Segment) -> Numbers {
        let mut packs = Vec::new();
        for content in contents(segment) {
            let before = self.objects.next();
            let number = self.objects.add(content, session);
            if matches!(content, Content::Pack(_)) {
                packs.push(number);
            }
            self.sessions.get_mut(&session).expect("the entry was checked").objects +=
                self.objects.next() - before;
        }
        packs.into_iter().collect()
    }

    /// A session that is over can name nothing any more: its objects that are gone need not be known, nor it without any.
    fn forget_what_is_over(&mut self) {
        let sessions = &self.sessions;
        self.reads.retain(|session, _| !sessions[session].is_over || planted(Bug::UseOutlivesSession));
        let lost = self.objects.forget_gone(|session| sessions[&session].is_over);
        for (session, objects) in lost {
            self.sessions.get_mut(&session).expect("an object's session is known").objects -= objects;
        }
        let by_id = &mut self.by_id;
        self.sessions.retain(|_, session| {
            let kept = !session.is_over || session.objects > 0;
            if !kept {
                by_id.remove(&session.id);
            }
            kept
        });
    }

    /// What must hold after any entries; what does not, if it does not.
    pub(super) fn contradiction(&self) -> Option<&'static str> {
        let mut live = Numbers::new();
        let mut objects: BTreeMap<SessionNumber, u64> = BTreeMap::new();
        for object in self.objects.iter() {
            if object.status == Status::Live && matches!(object.content, Content::Pack(_)) {
                live.push(object.number);
            }
            *objects.entry(object.session).or_insert(0) += 1;
        }
        if self.roots.keys().any(|number| *number >= self.next) {
            return Some("a backup is in the future");
        }
        let stands = |(number, root): (&u64, &Root)| (*number..self.next).contains(&root.entry);
        if !self.roots.iter().all(stands) {
            return Some("a backup stands where it cannot");
        }
        if !self.required().difference(&live).is_empty() {
            return Some("a backup requires what is no live pack");
        }
        if !self.verified.difference(&live).is_empty() {
            return Some("what is no live pack was verified");
        }
        for (session, read) in &self.reads {
            if self.sessions.get(session).is_none_or(|session| session.is_over) {
                return Some("who is not there has backups in use");
            }
            if !is_ascending(&read.roots) || !read.roots.iter().all(|root| self.roots.contains_key(root)) {
                return Some("a backup is in use that is not there");
            }
        }
        if !self.boots.keys().all(|root| self.roots.contains_key(root)) {
            return Some("a backup was started that is not there");
        }
        for (number, session) in &self.sessions {
            if session.objects != objects.remove(number).unwrap_or(0) {
                return Some("the objects of a session are not as many as it says");
            }
            if self.by_id.get(&session.id) != Some(number) || *number >= self.next_session {
                return Some("a session is not known by its number");
            }
            if session.is_over && session.objects == 0 {
                return Some("a session that is over is known without need");
            }
        }
        if !objects.is_empty() || self.by_id.len() != self.sessions.len() {
            return Some("the session of an object is not known");
        }
        None
    }
}

impl SessionRecord {
    fn close(&mut self) {
        self.is_over = true;
    }
}

impl<'s> Valid<'s> {
    /// The state that it is valid behind.
    pub fn state(&self) -> &'s State {
        self.state
    }

    pub(super) fn number(&self) -> u64 {
        self.header.number
    }

    /// Until when the entry should be kept.
    pub(super) fn retain_until(&self) -> Option<WallTime> {
        match &self.body {
            Body::Commit(commit) => commit.retain_until,
            Body::Undelete(undelete) => undelete.retain_until,
            _ => None,
        }
    }

    pub(super) fn session(&self) -> SessionId {
        self.header.session
    }

    pub(super) fn opens_session(&self) -> bool {
        matches!(self.body, Body::Session(_))
    }

    pub(super) fn sign(&self, signer: &dyn Sign) -> Vec<u8> {
        entry::encode(&self.header, &self.body, signer)
    }
}

/// The entry that a hostile writer puts behind `state`, whatever the rules say: for simulations.
#[cfg(feature = "planted-bugs")]
pub fn forge(state: &State, session: SessionId, signer: &dyn Sign, body: &Body) -> Vec<u8> {
    let header = Header {
        repository: state.repository,
        number: state.next,
        previous: state.head,
        session,
        key: signer.verifier().id(),
        written: WallTime(0),
    };
    entry::encode(&header, body, signer)
}

/// Some numbers, each greater than the one before.
fn is_ascending(numbers: &[u64]) -> bool {
    !numbers.is_empty() && numbers.windows(2).all(|pair| pair[0] < pair[1])
}

fn contents(segment: &Segment) -> impl Iterator<Item = Content> + '_ {
    let packs = segment.packs.iter().map(|pack| Content::Pack(*pack));
    packs.chain(segment.indexes.iter().map(|index| Content::Index(*index)))
}

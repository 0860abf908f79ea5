//! A state as bytes: the body of a checkpoint. One state has one encoding.

use super::body::{Body, Key, MAX_BOOT, MAX_PAYLOAD, Read};
use super::codec::{Reader, Writer};
use super::entry::{Meaning, Parsed};
use super::numbers::{Number, Numbers};
use super::sign::Verify;
use super::state::{Followed, Root, SessionRecord, State};
use super::table::{Content, Object, SessionNumber, Status, Table};
use crate::bug::{Bug, planted};
use crate::{
    ChainId, DomainId, EntryHash, KeyId, PackId, RepositoryId, SegmentId, SessionId, Verifier, WrappedKeyId,
};
use rempart_types::WallTime;
use std::collections::{BTreeMap, BTreeSet};

/// More than fit into a checkpoint.
const MANY: usize = 1 << 24;
/// Bytes that are encoded at once, about.
const PIECE: usize = 64 << 10;

impl State {
    /// The state that a checkpoint's bytes stand for, behind it.
    pub(super) fn from_checkpoint(
        bytes: &[u8],
        repository: RepositoryId,
        maintenance: Verifier,
        verify: &dyn Verify,
    ) -> Result<State, &'static str> {
        let parsed = Parsed::new(bytes)?;
        let Meaning::Body(Body::Checkpoint(checkpoint)) = parsed.meaning() else {
            return Err("it is no checkpoint");
        };
        if parsed.header.repository != repository {
            return Err("it is of another repository");
        }
        let mut state = State::decode(&checkpoint.state, repository).ok_or("its state makes no sense")?;
        // Of a large repository it is as long as the state.
        drop(checkpoint);
        if maintenance != state.maintenance {
            return Err("it is signed by another key than this repository's");
        }
        if state.next != parsed.header.number {
            return Err("its state is of another place in the log");
        }
        if let Some(why) = state.contradiction() {
            return Err(why);
        }
        match state.follow(bytes, verify) {
            Followed::Applied => Ok(state),
            _ => Err("it does not fit its own state"),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.encode_pieces(&mut |piece| bytes.extend_from_slice(piece));
        bytes
    }

    /// Whether that is its encoding.
    pub(super) fn is_encoded_as(&self, bytes: &[u8]) -> bool {
        let mut rest = Some(bytes);
        self.encode_pieces(&mut |piece| rest = rest.and_then(|rest| rest.strip_prefix(piece)));
        rest.is_some_and(<[u8]>::is_empty)
    }

    /// Gives its encoding one piece after the other.
    fn encode_pieces(&self, each: &mut dyn FnMut(&[u8])) {
        let mut writer = Writer::default();
        let w = &mut writer;
        w.u64(self.next);
        w.raw(&self.head.0);
        w.u8(self.head_is_doubtful.into());
        w.u8(self.newer.into());
        w.raw(&self.maintenance.0);
        w.short(self.checkpoints);
        w.optional(self.floor.map(|(number, _)| number));
        w.raw(&self.floor.map_or([0; 32], |(_, hash)| hash.0));
        w.short(self.keys.len() as u64);
        for key in self.keys.values() {
            w.raw(&key.public.0);
            w.raw(&key.domain.0);
        }
        w.u32(self.next_session);
        w.short(self.sessions.len() as u64);
        for (number, session) in &self.sessions {
            w.u32(*number);
            encode_session(w, session);
        }
        w.short(self.roots.len() as u64);
        let mut before = BTreeMap::new();
        for (number, root) in &self.roots {
            w.short(*number);
            encode_root(w, root, before.insert(root.chain, &root.required));
        }
        w.short(self.objects.next());
        w.short(self.objects.len() as u64);
        let mut before = None;
        for object in self.objects.iter() {
            encode_object(w, &object, before.replace(object));
            if w.0.len() >= PIECE {
                each(&w.0);
                w.0.clear();
            }
        }
        self.verified.encode(w);
        w.short(self.damaged.len() as u64);
        for (number, payload) in &self.damaged {
            w.short(*number);
            w.bytes(payload);
        }
        let reads = || self.reads.iter().filter(|_| !planted(Bug::ReadsNotFolded));
        w.short(reads().count() as u64);
        for (session, read) in reads() {
            w.u32(*session);
            read.encode(w);
        }
        // Nothing where there are none, as it was before there were any.
        let moved = || {
            let moved = self.roots.iter().filter(|(number, root)| root.entry != **number);
            moved.filter(|_| !planted(Bug::UndeletedNotFolded))
        };
        let is_moved = moved().next().is_some();
        if !self.removed_keys.is_empty() || !self.boots.is_empty() || is_moved {
            w.short(self.removed_keys.len() as u64);
            self.removed_keys.iter().for_each(|key| w.raw(&key.0));
        }
        if !self.boots.is_empty() || is_moved {
            w.short(self.boots.len() as u64);
            for (root, payload) in &self.boots {
                w.short(*root);
                w.bytes(payload);
            }
        }
        if is_moved {
            w.short(moved().count() as u64);
            for (number, root) in moved() {
                w.short(*number);
                w.short(root.entry);
            }
        }
        each(&w.0);
    }

    pub(super) fn decode(bytes: &[u8], repository: RepositoryId) -> Option<State> {
        let mut reader = Reader(bytes);
        let r = &mut reader;
        let next = r.u64()?;
        let head = EntryHash(r.array()?);
        let head_is_doubtful = r.bool()?;
        let newer = r.bool()?;
        let maintenance = Verifier(r.array()?);
        let checkpoints = r.short()?;
        let floor = match (r.optional()?, r.array()?) {
            (Some(number), hash) => Some((number, EntryHash(hash))),
            (None, hash) if hash == [0; 32] => None,
            _ => return None,
        };
        let keys = r.list(MANY, |r| {
            let key = Key { public: Verifier(r.array()?), domain: DomainId(r.array()?) };
            Some((key.public.id(), key))
        })?;
        let next_session = r.u32()?;
        let sessions = r.list(MANY, |r| Some((r.u32()?, decode_session(r)?)))?;
        let mut before = BTreeMap::new();
        let roots = r.list(MANY, |r| {
            let number = r.short()?;
            let root = decode_root(r, number, &before)?;
            before.insert(root.chain, root.required.clone());
            Some((number, root))
        })?;
        drop(before);
        let mut roots = distinct(roots)?;
        let next_object = r.short()?;
        let mut objects = Table::default();
        // One after the other: all of them twice is more than there is room for.
        let mut before = None;
        r.list(MANY, |r| {
            let object = decode_object(r, before)?;
            before = Some(object);
            objects.restore(object)
        })?;
        objects.restore_next(next_object)?;
        let verified = Numbers::decode(r)?;
        let damaged = r.list(MANY, |r| Some((r.short()?, r.bytes(MAX_PAYLOAD)?.to_vec())))?;
        let reads = r.list(MANY, |r| Some((r.u32()?, Read::decode(r)?)))?;
        let (mut removed_keys, mut boots) = (BTreeSet::new(), BTreeMap::new());
        if r.at_end().is_none() {
            let keys = r.list(MANY, |r| r.array().map(WrappedKeyId))?;
            let count = keys.len();
            removed_keys = keys.into_iter().collect();
            if removed_keys.len() != count {
                return None;
            }
            if count == 0 || r.at_end().is_none() {
                boots = distinct(r.list(MANY, |r| Some((r.short()?, r.bytes(MAX_BOOT)?.to_vec())))?)?;
                if boots.is_empty() && r.at_end().is_some() {
                    return None;
                }
            }
            if r.at_end().is_none() {
                let moved = r.list(MANY, |r| Some((r.short()?, r.short()?)))?;
                for (number, entry) in &moved {
                    let root = roots.get_mut(number).filter(|_| entry != number)?;
                    root.entry = *entry;
                }
                if moved.is_empty() {
                    return None;
                }
            }
        }
        r.at_end()?;
        let by_id = sessions.iter().map(|(number, session)| (session.id, *number)).collect();
        Some(State {
            repository,
            next,
            head,
            head_is_doubtful,
            maintenance,
            checkpoints,
            floor,
            keys: distinct(keys)?,
            sessions: distinct(sessions)?,
            next_session,
            by_id,
            roots,
            objects,
            verified,
            damaged: distinct(damaged)?,
            reads: distinct(reads)?,
            boots,
            removed_keys,
            newer,
        })
    }
}

fn distinct<K: Ord, V>(pairs: Vec<(K, V)>) -> Option<BTreeMap<K, V>> {
    let count = pairs.len();
    let map: BTreeMap<K, V> = pairs.into_iter().collect();
    (map.len() == count).then_some(map)
}

fn encode_session(w: &mut Writer, session: &SessionRecord) {
    w.raw(&session.id.0);
    w.raw(&session.key.0);
    w.raw(&session.domain.0);
    w.short(session.opened);
    w.u8(session.is_over.into());
    w.short(session.last.0);
    w.raw(&session.last.1.0);
    w.short(session.last_written.0);
    w.short(session.objects);
}

fn decode_session(r: &mut Reader<'_>) -> Option<SessionRecord> {
    Some(SessionRecord {
        id: SessionId(r.array()?),
        key: KeyId(r.array()?),
        domain: DomainId(r.array()?),
        opened: r.short()?,
        is_over: r.bool()?,
        last: (r.short()?, EntryHash(r.array()?)),
        last_written: WallTime(r.short()?),
        objects: r.short()?,
    })
}

/// What it requires is told by what the newest backup of the same chain before it does.
fn encode_root(w: &mut Writer, root: &Root, before: Option<&Numbers>) {
    w.raw(&root.chain.0);
    w.optional(root.parent);
    w.raw(&root.domain.0);
    w.raw(&root.key.0);
    w.short(root.written.0);
    w.optional(root.retain_until.map(|time| time.0));
    w.raw(&root.hash.0);
    let nothing = Numbers::new();
    let before = before.unwrap_or(&nothing);
    before.difference(&root.required).encode(w);
    root.required.difference(before).encode(w);
}

/// In the entry of its number.
fn decode_root(r: &mut Reader<'_>, number: u64, before: &BTreeMap<ChainId, Numbers>) -> Option<Root> {
    let chain = ChainId(r.array()?);
    Some(Root {
        entry: number,
        chain,
        parent: r.optional()?,
        domain: DomainId(r.array()?),
        key: KeyId(r.array()?),
        written: WallTime(r.short()?),
        retain_until: r.optional()?.map(WallTime),
        hash: EntryHash(r.array()?),
        required: {
            let before = before.get(&chain).cloned().unwrap_or_default();
            before.difference(&Numbers::decode(r)?).union(&Numbers::decode(r)?)
        },
    })
}

/// What an object is, and which of its fields follow.
mod object {
    pub const STATUS: u8 = 0b11;
    pub const INDEX: u8 = 1 << 2;
    /// Its number: it is not the one behind that of the object before.
    pub const NUMBER: u8 = 1 << 3;
    /// Its session and until when it is kept, if those are not of the object before.
    pub const SESSION: u8 = 1 << 4;
    pub const RETAINED: u8 = 1 << 5;
}

/// What is taken for the object before the first.
fn before_object(before: Option<Object>) -> (u64, SessionNumber, WallTime) {
    let next = |object: Object| (u64::from(object.number) + 1, object.session, object.retain_until);
    before.map_or((0, 0, WallTime(0)), next)
}

fn encode_object(w: &mut Writer, object: &Object, before: Option<Object>) {
    let status = match object.status {
        Status::Live => 0,
        Status::Condemned => 1,
        Status::Gone => 2,
    };
    let number = u64::from(object.number);
    let (next, session, retain_until) = before_object(before);
    let when = |flag: u8, is_so: bool| if is_so { flag } else { 0 };
    let fields = when(object::NUMBER, number != next)
        | when(object::SESSION, object.session != session)
        | when(object::RETAINED, object.retain_until != retain_until);
    w.u8(status | when(object::INDEX, matches!(object.content, Content::Index(_))) | fields);
    if fields & object::NUMBER != 0 {
        w.short(number);
    }
    if fields & object::SESSION != 0 {
        w.short(object.session.into());
    }
    if fields & object::RETAINED != 0 {
        w.short(object.retain_until.0);
    }
    w.raw(object.content.hash());
}

fn decode_object(r: &mut Reader<'_>, before: Option<Object>) -> Option<Object> {
    let kind = r.u8()?;
    let has = |flag: u8| kind & flag != 0;
    let status = match kind & object::STATUS {
        0 => Status::Live,
        1 => Status::Condemned,
        2 => Status::Gone,
        _ => return None,
    };
    if kind > object::STATUS | object::INDEX | object::NUMBER | object::SESSION | object::RETAINED {
        return None;
    }
    let (next, session, retain_until) = before_object(before);
    let number = if has(object::NUMBER) { r.short()? } else { next };
    let session = if has(object::SESSION) { r.short_u32()? } else { session };
    let retain_until = if has(object::RETAINED) { WallTime(r.short()?) } else { retain_until };
    let content = if has(object::INDEX) {
        Content::Index(SegmentId(r.array()?))
    } else {
        Content::Pack(PackId(r.array()?))
    };
    Some(Object { number: Number::try_from(number).ok()?, content, status, retain_until, session })
}

//! Packs and index segments that the log knows, by number and by name.

use super::numbers::{Number, Numbers};
use crate::bug::{Bug, planted};
use crate::{PackId, PackName, SegmentId, SegmentName, SessionId};
use rempart_objects::Name;
use rempart_types::WallTime;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};

/// What is in an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Content {
    Pack(PackId),
    Index(SegmentId),
}

impl Content {
    pub fn hash(&self) -> &[u8; 32] {
        match self {
            Content::Pack(id) => &id.0,
            Content::Index(id) => &id.0,
        }
    }

    /// The object, as `session` put it.
    pub fn object(&self, session: SessionId) -> Name {
        match *self {
            Content::Pack(pack) => PackName { session, pack }.object(),
            Content::Index(segment) => SegmentName { session, segment }.object(),
        }
    }

    /// What an object's name says.
    pub fn of_name(name: &Name) -> Option<(SessionId, Content)> {
        let pack = PackName::parse(name).map(|name| (name.session, Content::Pack(name.pack)));
        let index = || SegmentName::parse(name).map(|name| (name.session, Content::Index(name.segment)));
        pack.or_else(index)
    }
}

/// What became of an object. There is no way back:
///
/// ```text
/// (put) ── segment, commit ──► Live ── condemn ──► Condemned ── gone ──► Gone
/// ```
///
/// Gone objects are forgotten as soon as their session is over: nobody can name them again then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    Live,
    Condemned,
    Gone,
}

/// The number of a session within one log, in order of appearance.
pub(super) type SessionNumber = u32;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    pub number: Number,
    pub content: Content,
    pub status: Status,
    /// No backup that requires it wants it to be kept any longer than that.
    pub retain_until: WallTime,
    pub(super) session: SessionNumber,
}

/// All objects that are not forgotten.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    /// In order of their numbers.
    objects: Vec<Object>,
    /// By what `short` makes of their content, for a third of the memory. One content can be known from several sessions: a
    /// hostile one may claim to have put what another put.
    by_content: BTreeSet<(u64, Number)>,
    /// Of a secret of this process: nobody can make up contents of which it makes the same.
    short: RandomState,
    next: u64,
}

impl PartialEq for Table {
    fn eq(&self, other: &Table) -> bool {
        (&self.objects, self.next) == (&other.objects, other.next)
    }
}

impl Eq for Table {}

impl Table {
    pub fn get(&self, number: Number) -> Option<&Object> {
        self.place(number).map(|place| &self.objects[place])
    }

    pub fn find(&self, content: Content, session: SessionNumber) -> Option<&Object> {
        self.with_content(content).find(|object| object.session == session)
    }

    pub fn with_content(&self, content: Content) -> impl Iterator<Item = &Object> {
        let short = self.short.hash_one(content);
        let known = self.by_content.range((short, Number::MIN)..=(short, Number::MAX));
        known.filter_map(|(_, number)| self.get(*number)).filter(move |object| object.content == content)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Object> {
        self.objects.iter()
    }

    /// The number that the next object gets.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Whether so many more can be numbered.
    pub fn has_room_for(&self, more: usize) -> bool {
        self.next + more as u64 <= u64::from(Number::MAX)
    }

    pub fn add(&mut self, content: Content, session: SessionNumber) -> Number {
        if planted(Bug::NameUsedAgain)
            && let Some(number) = self.find(content, session).map(|object| object.number)
        {
            self.change(&[number].into_iter().collect(), |object| object.status = Status::Live);
            return number;
        }
        let number = Number::try_from(self.next).expect("room was looked for");
        self.next += 1;
        let object =
            Object { number, content, status: Status::Live, retain_until: WallTime::default(), session };
        self.put_back(object);
        number
    }

    /// Adds an object as it was encoded. `None` if it cannot stand behind those that are there.
    pub fn restore(&mut self, object: Object) -> Option<()> {
        let in_order = self.objects.last().is_none_or(|last| last.number < object.number);
        let unknown = self.find(object.content, object.session).is_none();
        (in_order && unknown).then(|| self.put_back(object))
    }

    /// What is the next number after a checkpoint: behind all, though the last may be forgotten.
    pub fn restore_next(&mut self, next: u64) -> Option<()> {
        let behind = self.objects.last().is_none_or(|last| u64::from(last.number) < next);
        (behind && next <= u64::from(Number::MAX)).then(|| self.next = next)
    }

    fn put_back(&mut self, object: Object) {
        assert!(self.find(object.content, object.session).is_none(), "an object has one number");
        self.by_content.insert((self.short.hash_one(object.content), object.number));
        self.objects.push(object);
    }

    pub fn retain(&mut self, numbers: &Numbers, until: WallTime) {
        self.change(numbers, |object| object.retain_until = object.retain_until.max(until));
    }

    pub fn set_status(&mut self, numbers: &Numbers, status: Status) {
        self.change(numbers, |object| {
            assert!(object.status < status, "no way back");
            object.status = status;
        });
    }

    fn change(&mut self, numbers: &Numbers, mut change: impl FnMut(&mut Object)) {
        for run in numbers.runs() {
            let from = self.objects.partition_point(|object| object.number < *run.start());
            let known = self.objects[from..].iter_mut().take_while(|object| object.number <= *run.end());
            known.for_each(&mut change);
        }
    }

    /// Forgets what is gone and of a session that is over; tells each session's loss.
    pub fn forget_gone(&mut self, is_over: impl Fn(SessionNumber) -> bool) -> BTreeMap<SessionNumber, u64> {
        let mut lost = BTreeMap::new();
        let (by_content, short) = (&mut self.by_content, &self.short);
        self.objects.retain(|object| {
            let forgotten = object.status == Status::Gone && is_over(object.session);
            if forgotten {
                by_content.remove(&(short.hash_one(object.content), object.number));
                *lost.entry(object.session).or_insert(0) += 1;
            }
            !forgotten
        });
        lost
    }

    fn place(&self, number: Number) -> Option<usize> {
        self.objects.binary_search_by_key(&number, |object| object.number).ok()
    }
}

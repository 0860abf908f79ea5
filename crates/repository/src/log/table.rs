//! Packs and index segments that the log knows, by number and by name.

use super::numbers::{Number, Numbers};
use crate::bug::{Bug, planted};
use crate::{PackId, PackName, SegmentId, SegmentName, SessionId};
use hashbrown::HashTable;
use rempart_objects::Name;
use rempart_types::WallTime;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::Arc;

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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object {
    pub number: Number,
    pub content: Content,
    pub status: Status,
    /// No backup that requires it wants it to be kept any longer than that.
    pub retain_until: WallTime,
    pub(super) session: SessionNumber,
}

/// Objects whose names lie together.
const PAGE: usize = 1024;

/// All objects that are not forgotten: 60 bytes each, of which there are 680,000 in 10 TiB.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    objects: Pages,
    /// By what `short` makes of their content. One content can be known from several sessions: a hostile one may claim to
    /// have put what another put.
    by_content: HashTable<Number>,
    /// Of a secret of this process: nobody can make up contents of which it makes the same.
    short: RandomState,
    next: u64,
}

impl PartialEq for Table {
    fn eq(&self, other: &Table) -> bool {
        self.next == other.next && self.iter().eq(other.iter())
    }
}

impl Eq for Table {}

impl Table {
    pub fn get(&self, number: Number) -> Option<Object> {
        self.objects.get(number)
    }

    pub fn find(&self, content: Content, session: SessionNumber) -> Option<Object> {
        self.with_content(content).find(|object| object.session == session)
    }

    pub fn with_content(&self, content: Content) -> impl Iterator<Item = Object> {
        let known = self.by_content.iter_hash(self.short.hash_one(content));
        known.filter_map(|number| self.get(*number)).filter(move |object| object.content == content)
    }

    pub fn len(&self) -> usize {
        self.by_content.len()
    }

    /// In order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = Object> {
        self.objects.0.iter().flat_map(Page::objects)
    }

    /// All of them as they are now. Their names are in memory once.
    pub fn snapshot(&self) -> Pages {
        self.objects.clone()
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
            let one = [number].into_iter().collect();
            self.objects.change(&one, |page, places| page.statuses[places].fill(Status::Live));
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
        let in_order = self.objects.last().is_none_or(|last| last < object.number);
        let unknown = self.find(object.content, object.session).is_none();
        (in_order && unknown).then(|| self.put_back(object))
    }

    /// What is the next number after a checkpoint: behind all, though the last may be forgotten.
    pub fn restore_next(&mut self, next: u64) -> Option<()> {
        let behind = self.objects.last().is_none_or(|last| u64::from(last) < next);
        (behind && next <= u64::from(Number::MAX)).then(|| self.next = next)
    }

    fn put_back(&mut self, object: Object) {
        assert!(self.find(object.content, object.session).is_none(), "an object has one number");
        let (objects, short) = (&mut self.objects, &self.short);
        objects.push(object);
        let hash_of = |number: &Number| {
            let known = objects.get(*number).expect("what is listed is known");
            short.hash_one(known.content)
        };
        self.by_content.insert_unique(short.hash_one(object.content), object.number, hash_of);
    }

    pub fn retain(&mut self, numbers: &Numbers, until: WallTime) {
        self.objects.change(numbers, |page, places| {
            let retained = &mut Arc::make_mut(&mut page.retained)[places];
            retained.iter_mut().for_each(|end| *end = until.max(*end));
        });
    }

    pub fn set_status(&mut self, numbers: &Numbers, new: Status) {
        self.objects.change(numbers, |page, places| {
            let statuses = &mut page.statuses[places];
            assert!(statuses.iter().all(|status| *status < new), "no way back");
            statuses.fill(new);
        });
    }

    /// Forgets what is gone and of a session that is over; tells each session's loss.
    pub fn forget_gone(&mut self, is_over: impl Fn(SessionNumber) -> bool) -> BTreeMap<SessionNumber, u64> {
        let mut lost = BTreeMap::new();
        let (by_content, short) = (&mut self.by_content, &self.short);
        self.objects.retain(|object| {
            let forgotten = object.status == Status::Gone && is_over(object.session);
            if forgotten {
                let hash = short.hash_one(object.content);
                let listed = by_content.find_entry(hash, |number| *number == object.number);
                listed.expect("what is known is listed").remove();
                *lost.entry(object.session).or_insert(0) += 1;
            }
            !forgotten
        });
        lost
    }
}

/// What never changes of an object.
#[derive(Debug, Clone, Copy)]
struct Named {
    number: Number,
    content: Content,
    session: SessionNumber,
}

/// Objects whose numbers follow each other.
#[derive(Debug, Clone, Default)]
struct Page {
    /// Shared by all copies, as is until when each is kept: neither changes often.
    names: Arc<Vec<Named>>,
    retained: Arc<Vec<WallTime>>,
    statuses: Vec<Status>,
}

impl Page {
    fn first(&self) -> Number {
        self.names[0].number
    }

    fn object(&self, place: usize) -> Object {
        let Named { number, content, session } = self.names[place];
        let (status, retain_until) = (self.statuses[place], self.retained[place]);
        Object { number, content, status, retain_until, session }
    }

    fn objects(&self) -> impl Iterator<Item = Object> {
        (0..self.statuses.len()).map(|place| self.object(place))
    }

    fn push(&mut self, object: Object) {
        let Object { number, content, status, retain_until, session } = object;
        Arc::make_mut(&mut self.names).push(Named { number, content, session });
        Arc::make_mut(&mut self.retained).push(retain_until);
        self.statuses.push(status);
    }
}

/// Objects in order of their numbers. No page is empty.
#[derive(Debug, Clone, Default)]
pub(super) struct Pages(Vec<Page>);

impl Pages {
    fn last(&self) -> Option<Number> {
        self.0.last()?.names.last().map(|named| named.number)
    }

    pub fn get(&self, number: Number) -> Option<Object> {
        let behind = self.0.partition_point(|page| page.first() <= number);
        let page = &self.0[behind.checked_sub(1)?];
        let place = page.names.binary_search_by_key(&number, |named| named.number).ok()?;
        Some(page.object(place))
    }

    fn push(&mut self, object: Object) {
        if self.0.last().is_none_or(|page| page.statuses.len() == PAGE) {
            self.0.push(Page::default());
        }
        self.0.last_mut().expect("there is one").push(object);
    }

    /// Gives each page on which some of them are, and their places on it.
    fn change(&mut self, numbers: &Numbers, mut change: impl FnMut(&mut Page, Range<usize>)) {
        for run in numbers.runs() {
            let from = self.0.partition_point(|page| page.first() <= *run.start()).saturating_sub(1);
            for page in self.0[from..].iter_mut().take_while(|page| page.first() <= *run.end()) {
                let start = page.names.partition_point(|named| named.number < *run.start());
                let end = page.names.partition_point(|named| named.number <= *run.end());
                change(page, start..end);
            }
        }
    }

    fn retain(&mut self, mut keep: impl FnMut(&Object) -> bool) {
        for page in &mut self.0 {
            let kept: Vec<Object> = page.objects().filter(&mut keep).collect();
            if kept.len() < page.statuses.len() {
                *page = Page::default();
                kept.into_iter().for_each(|object| page.push(object));
            }
        }
        self.0.retain(|page| !page.statuses.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn content(number: u64) -> Content {
        Content::Pack(PackId(*blake3::hash(&number.to_le_bytes()).as_bytes()))
    }

    /// What objects are by a plain map.
    #[derive(Default)]
    struct Twin(BTreeMap<Number, Object>);

    #[derive(Debug, Clone)]
    enum Change {
        Add(u64),
        Status(u32, u32, Status),
        Retain(u32, u32, u64),
        Forget(SessionNumber),
    }

    fn change() -> impl Strategy<Value = Change> {
        let run = || (0u32..6000, prop_oneof![1u32..5, 1u32..4000]);
        prop_oneof![
            3 => prop_oneof![1u64..10, 1u64..3000].prop_map(Change::Add),
            2 => (run(), any::<bool>()).prop_map(|((from, len), gone)| {
                Change::Status(from, len, if gone { Status::Gone } else { Status::Condemned })
            }),
            1 => (run(), 0u64..9).prop_map(|((from, len), until)| Change::Retain(from, len, until)),
            1 => (0u32..3).prop_map(Change::Forget),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_table_is_as_a_plain_map_and_a_snapshot_stays_as_it_is(changes in prop::collection::vec(change(), 1..25)) {
            let (mut table, mut twin) = (Table::default(), Twin::default());
            let (mut snapshot, mut at_snapshot) = (table.snapshot(), Vec::new());
            for (step, change) in changes.into_iter().enumerate() {
                match change {
                    Change::Add(count) => for _ in 0..count {
                        let session = (table.next() % 3) as SessionNumber;
                        let content = content(table.next());
                        let number = table.add(content, session);
                        let (status, retain_until) = (Status::Live, WallTime(0));
                        twin.0.insert(number, Object { number, content, status, retain_until, session });
                    },
                    Change::Status(from, len, status) => {
                        let fits = twin.0.range(from..from + len).filter(|(_, object)| object.status < status);
                        let numbers: Numbers = fits.map(|(number, _)| *number).collect();
                        table.set_status(&numbers, status);
                        numbers.iter().for_each(|number| twin.0.get_mut(&number).expect("known").status = status);
                    }
                    Change::Retain(from, len, until) => {
                        table.retain(&(from..from + len).collect(), WallTime(until));
                        let kept = twin.0.range_mut(from..from + len);
                        kept.for_each(|(_, object)| object.retain_until = object.retain_until.max(WallTime(until)));
                    }
                    Change::Forget(session) => {
                        let lost = table.forget_gone(|over| over == session);
                        let before = twin.0.len();
                        twin.0.retain(|_, object| object.status != Status::Gone || object.session != session);
                        let expected = (before - twin.0.len()) as u64;
                        prop_assert_eq!(lost.into_values().sum::<u64>(), expected);
                    }
                }
                prop_assert!(table.iter().eq(twin.0.values().copied()));
                for number in (0..6100).step_by(7) {
                    prop_assert_eq!(table.get(number), twin.0.get(&number).copied());
                    let found = table.find(content(number.into()), number % 3);
                    prop_assert_eq!(found, twin.0.get(&number).copied());
                }
                prop_assert!(snapshot.0.iter().flat_map(Page::objects).eq(at_snapshot.iter().copied()));
                if step % 3 == 0 {
                    (snapshot, at_snapshot) = (table.snapshot(), table.iter().collect());
                }
            }
        }
    }
}

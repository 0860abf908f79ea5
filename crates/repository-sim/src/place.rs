//! The place of a simulated repository: every call is a point at which others run, answers get lost, and what was asked for
//! may happen much later.

use crate::fiber::suspend;
use crate::rng::Rng;
use rempart_objects::{Abilities, Created, Error, ErrorKind, Listed, Name, Objects};
use rempart_repository::{Bug, COPIES, PackName, planted};
use rempart_types::WallTime;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Bound, Range};
use std::sync::{Arc, Mutex, MutexGuard};

/// Names of a list's page: few, so that lists take several calls.
const PAGE: usize = 4;

/// How often what goes wrong, in a thousand calls.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// The answer to a create or remove is lost; before, after, or long before the effect.
    pub unknown: u64,
    /// Nothing is done.
    pub unavailable: u64,
}

/// What will happen yet.
#[derive(Debug, Clone)]
pub enum Late {
    Create(Name, Vec<u8>),
    Remove(Name),
}

/// What lies there, and what is known of it.
#[derive(Debug)]
pub struct Store {
    objects: BTreeMap<Name, Vec<u8>>,
    /// Packs that are there.
    pub packs: BTreeSet<PackName>,
    pub late: Vec<Late>,
    /// What each actor has asked for and waits to be done.
    pub in_flight: BTreeMap<usize, Late>,
    /// Packs whose creation was acknowledged.
    acknowledged: BTreeSet<Name>,
    /// Objects that were there, and were not.
    pub removed: BTreeSet<Name>,
    /// Something that a checker should look at happened.
    pub changed: bool,
    /// The first promise that broke here.
    pub broken: Option<String>,
    pub faults: Faults,
    pub rng: Rng,
    /// Steps so far.
    pub now: u64,
    /// What happened, if somebody wants to know.
    pub trace: Option<Vec<String>>,
}

impl Store {
    pub fn new(rng: Rng, faults: Faults, tell: bool) -> Store {
        Store {
            objects: BTreeMap::new(),
            packs: BTreeSet::new(),
            late: Vec::new(),
            in_flight: BTreeMap::new(),
            acknowledged: BTreeSet::new(),
            removed: BTreeSet::new(),
            changed: false,
            broken: None,
            faults,
            rng,
            now: 0,
            trace: tell.then(Vec::new),
        }
    }

    pub fn names(&self) -> impl DoubleEndedIterator<Item = &Name> {
        self.objects.keys()
    }

    /// Objects that are there twice, and their copies.
    pub fn whole_copies(&self) -> Vec<(Name, Name)> {
        let twice = self.objects.iter().filter_map(|(copy, bytes)| {
            let original =
                Name::new(copy.as_str().strip_prefix(COPIES)?).expect("a copy's name ends with one");
            (self.objects.get(&original) == Some(bytes)).then(|| (original, copy.clone()))
        });
        twice.collect()
    }

    /// One bit is another.
    pub fn damage(&mut self, name: &Name, place: u64) {
        let bytes = self.objects.get_mut(name).expect("it is there");
        let bit = place as usize % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        self.tell(|| format!("bit {bit} of {name} is damaged"));
    }

    pub fn tell(&mut self, line: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now:5} {}", line()));
        }
    }

    fn create(&mut self, name: &Name, bytes: &[u8]) -> Created {
        if self.objects.contains_key(name) && !planted(Bug::SlotReplaced) {
            return Created::Taken;
        }
        self.objects.insert(name.clone(), bytes.to_vec());
        if let Some(pack) = PackName::parse(name) {
            self.packs.insert(pack);
        }
        self.changed = true;
        Created::New
    }

    fn remove(&mut self, name: &Name) {
        if self.objects.remove(name).is_some() {
            self.removed.insert(name.clone());
            if let Some(pack) = PackName::parse(name) {
                self.packs.remove(&pack);
            }
            self.changed = true;
        }
    }

    pub fn land(&mut self, late: Late) {
        match late {
            Late::Create(name, bytes) => {
                let created = self.create(&name, &bytes);
                self.tell(|| format!("late: create {name}: {created:?}"));
            }
            Late::Remove(name) => {
                self.remove(&name);
                self.tell(|| format!("late: remove {name}"));
            }
        }
    }
}

/// The store as one actor reaches it.
#[derive(Debug, Clone)]
pub struct Place {
    pub store: Arc<Mutex<Store>>,
    /// `None`: the checker, whom nothing befalls.
    pub actor: Option<usize>,
}

impl Place {
    pub fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().expect("no holder panics")
    }

    fn error(&self, kind: ErrorKind, action: &'static str, name: &Name) -> Error {
        Error::new(kind, action, name, self.url(), "simulated")
    }

    /// Waits for its turn; whether the call fails without any effect. Others run before a call and not behind it: until the
    /// next call nobody could tell.
    fn turn(&self, action: &'static str, name: &Name) -> Result<(), Error> {
        if self.actor.is_none() {
            return Ok(());
        }
        suspend();
        let mut store = self.store();
        let rate = store.faults.unavailable;
        if store.rng.chance(rate) {
            drop(store);
            return Err(self.error(ErrorKind::Unavailable, action, name));
        }
        Ok(())
    }

    /// A change: it may be done late, and its answer may be lost.
    fn change(&self, action: &'static str, late: Late) -> Result<Created, Error> {
        let name = match &late {
            Late::Create(name, _) | Late::Remove(name) => name.clone(),
        };
        let Some(actor) = self.actor else {
            return Ok(self.perform(&late));
        };
        let again = matches!(late, Late::Create(..)) && self.store().acknowledged.contains(&name);
        if again {
            self.store().broken.get_or_insert(format!("{name} is put again after it was acknowledged"));
        }
        self.store().in_flight.insert(actor, late.clone());
        let turn = self.turn(action, &name);
        self.store().in_flight.remove(&actor);
        turn?;
        let lost = {
            let mut store = self.store();
            let rate = store.faults.unknown;
            store.rng.chance(rate).then(|| store.rng.below(3))
        };
        let created = match lost {
            None | Some(0) => self.perform(&late),
            Some(1) => {
                self.store().tell(|| format!("{actor}: {action} {name}: may come late"));
                self.store().late.push(late.clone());
                Created::Taken
            }
            Some(_) => Created::Taken,
        };
        if lost.is_some() {
            self.store().tell(|| format!("{actor}: {action} {name}: unknown"));
        } else {
            self.store().tell(|| format!("{actor}: {action} {name}: {created:?}"));
        }
        if lost.is_some() {
            return Err(self.error(ErrorKind::Unknown, action, &name));
        }
        if matches!(late, Late::Create(..)) && PackName::parse(&name).is_some() {
            self.store().acknowledged.insert(name);
        }
        Ok(created)
    }

    fn perform(&self, late: &Late) -> Created {
        match late {
            Late::Create(name, bytes) => self.store().create(name, bytes),
            Late::Remove(name) => {
                self.store().remove(name);
                Created::New
            }
        }
    }

    fn read<T>(&self, name: &Name, read: impl FnOnce(Option<&Vec<u8>>) -> T) -> Result<T, Error> {
        self.turn("read", name)?;
        let store = self.store();
        Ok(read(store.objects.get(name)))
    }
}

impl Objects for Place {
    fn create(&self, name: &Name, parts: &[&[u8]], _: Option<WallTime>) -> Result<Created, Error> {
        self.change("create", Late::Create(name.clone(), parts.concat()))
    }

    fn get(&self, name: &Name, limit: u64) -> Result<Vec<u8>, Error> {
        let found = self.read(name, |bytes| bytes.cloned())?;
        let bytes = found.ok_or_else(|| self.error(ErrorKind::Missing, "read", name))?;
        if bytes.len() as u64 > limit {
            return Err(self.error(ErrorKind::TooLong, "read", name));
        }
        Ok(bytes)
    }

    fn get_range(&self, name: &Name, range: Range<u64>) -> Result<Vec<u8>, Error> {
        let bytes = self.get(name, u64::MAX)?;
        let part = bytes.get(range.start as usize..range.end as usize);
        part.map(<[u8]>::to_vec).ok_or_else(|| self.error(ErrorKind::TooShort, "read", name))
    }

    fn len(&self, name: &Name) -> Result<u64, Error> {
        let len = self.read(name, |bytes| bytes.map(|bytes| bytes.len() as u64))?;
        len.ok_or_else(|| self.error(ErrorKind::Missing, "read", name))
    }

    fn list(&self, prefix: &str, after: Option<&Name>) -> Result<Vec<Listed>, Error> {
        let root = Name::new(prefix.trim_end_matches('/')).expect("prefixes are names");
        self.turn("list", &root)?;
        let start = match after {
            Some(after) => Bound::Excluded(after.clone()),
            None => Bound::Included(root),
        };
        let store = self.store();
        let behind = store.objects.range((start, Bound::Unbounded));
        let matching = behind.take_while(|(name, _)| name.as_str().starts_with(prefix));
        let listed = matching.map(|(name, bytes)| Listed { name: name.clone(), len: bytes.len() as u64 });
        Ok(listed.take(PAGE).collect())
    }

    fn remove(&self, name: &Name) -> Result<(), Error> {
        self.change("remove", Late::Remove(name.clone())).map(drop)
    }

    fn retain(&self, name: &Name, _: WallTime) -> Result<(), Error> {
        Err(self.error(ErrorKind::Unsupported, "retain", name))
    }

    fn abilities(&self) -> Abilities {
        Abilities { retention: false, pack_len: 1024, creates: 2 }
    }

    fn url(&self) -> String {
        "simulated:".to_owned()
    }
}

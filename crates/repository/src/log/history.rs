//! What the log said before: backups that were forgotten.
//!
//! The state knows nothing of them. The entries that made and forgot them do, as long as they are there: since the last
//! checkpoint always, and before it as long as the place keeps them against everybody.

use super::body::{Body, Undelete};
use super::entry::{self, Meaning, Parsed};
use super::error::LogError;
use super::numbers::{Number, Numbers};
use super::read::{Log, Pointer, load, payload_in, slot};
use super::sign::Verify;
use super::state::{Followed, Root, State};
use super::table::{Content, Object, Status};
use crate::{DomainId, KeyId, PackName};
use rempart_objects::ErrorKind;
use rempart_types::WallTime;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A backup that was forgotten, and is not there again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forgotten {
    /// Its number.
    pub number: u64,
    /// As it was when it was forgotten.
    pub root: Root,
    /// `None` if the entry that forgot it is gone, too.
    pub by: Option<Forgetting>,
    /// Packs that it requires and that are not live any more.
    pub condemned: Numbers,
    /// What they were, and those of other backups: most are of many.
    packs: Arc<BTreeMap<Number, OldPack>>,
}

impl Forgotten {
    /// In order of their numbers.
    pub fn condemned_packs(&self) -> impl Iterator<Item = (Number, OldPack)> + '_ {
        self.condemned.iter().map(|number| (number, self.packs[&number]))
    }

    /// What brings it back. `copies`: for each condemned pack that it requires, a live one with the same bytes.
    pub fn undelete(
        &self,
        copies: &BTreeMap<Number, Number>,
        retain_until: Option<WallTime>,
        payload: Vec<u8>,
    ) -> Undelete {
        let Root { chain, parent, domain, key, written, .. } = self.root;
        let packs = self.root.required.iter().map(|pack| copies.get(&pack).copied().unwrap_or(pack));
        let packs = packs.collect();
        Undelete { root: self.number, chain, parent, domain, key, written, packs, retain_until, payload }
    }
}

/// An entry that forgot backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forgetting {
    pub entry: u64,
    pub key: KeyId,
    /// By its writer's clock.
    pub written: WallTime,
}

/// A pack that was live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OldPack {
    pub name: PackName,
    /// Of who put it.
    pub domain: DomainId,
}

impl Log {
    /// Backups that were forgotten, in order of their numbers, as far as entries tell that are still there.
    pub fn forgotten(&self) -> Result<Vec<Forgotten>, LogError> {
        let mut starts = self.starts()?;
        let mut found = Found::default();
        let Some(mut state) = self.start(&mut starts)? else { return Ok(Vec::new()) };
        while state.next < self.state.next {
            let is_start = matches!(starts.last(), Some(Start::At(pointer)) if pointer.number == state.next);
            let followed = match slot(&*self.objects, state.next)? {
                Some(bytes) => found.follow(&mut state, &bytes, &*self.verify, is_start),
                None => false,
            };
            if followed {
                if is_start {
                    starts.pop();
                }
                continue;
            }
            // The slot was freed, or what was read is not what the checkpoint stands for.
            let Some(next) = self.start(&mut starts)? else { break };
            found.jump(&state, &next);
            state = next;
        }
        found.jump(&state, &self.state);
        Ok(found.without(&self.state))
    }

    /// What a forgotten backup carries sealed.
    pub fn forgotten_payload(&self, forgotten: &Forgotten) -> Result<Vec<u8>, LogError> {
        payload_in(&*self.objects, &forgotten.root)
    }

    /// From where it can be read, the oldest last. What the place keeps for a time it keeps the longer the newer it is.
    fn starts(&self) -> Result<Vec<Start>, LogError> {
        let mut starts = Vec::new();
        for ordinal in (0..self.state.checkpoints).rev() {
            let Some(pointer) = self.pointer(ordinal)? else { return Ok(starts) };
            match self.objects.len(&entry::name(pointer.number)) {
                Ok(_) => starts.push(Start::At(pointer)),
                Err(error) if error.kind == ErrorKind::Missing => return Ok(starts),
                Err(error) => return Err(error.into()),
            }
        }
        starts.push(Start::First);
        Ok(starts)
    }

    /// The state at the oldest start that is whole. Takes it, and all that are older, from `starts`.
    fn start(&self, starts: &mut Vec<Start>) -> Result<Option<State>, LogError> {
        let (repository, maintenance) = (self.state.repository, self.state.maintenance);
        while let Some(start) = starts.pop() {
            let state = match start {
                Start::First => slot(&*self.objects, 0)?
                    .and_then(|bytes| State::begin(&bytes, repository, &*self.verify).ok())
                    .filter(|state| state.maintenance == maintenance),
                Start::At(pointer) => {
                    match load(&*self.objects, &*self.verify, repository, maintenance, pointer) {
                        Err(LogError::Damaged { .. }) => None,
                        loaded => loaded?,
                    }
                }
            };
            if state.is_some() {
                return Ok(state);
            }
        }
        Ok(None)
    }
}

/// From where a log can be read.
#[derive(Debug)]
enum Start {
    First,
    /// A checkpoint.
    At(Pointer),
}

/// What is found while entries are read again.
#[derive(Debug, Default)]
struct Found {
    forgotten: BTreeMap<u64, (Root, Option<Forgetting>)>,
    /// All that they require.
    required: Numbers,
    /// Of that, what is not live any more.
    condemned: BTreeMap<Number, OldPack>,
}

impl Found {
    /// Takes an entry into `state`. Whether that could be; one that `must_count` has to count for something.
    fn follow(&mut self, state: &mut State, bytes: &[u8], verify: &dyn Verify, must_count: bool) -> bool {
        let (mut forgotten, mut condemned, mut by) = (Vec::new(), Vec::new(), None);
        if let Ok(parsed) = Parsed::new(bytes)
            && let Meaning::Body(body) = parsed.meaning()
        {
            let header = &parsed.header;
            by = Some(Forgetting { entry: header.number, key: header.key, written: header.written });
            match body {
                Body::Forget(roots) => {
                    forgotten.extend(
                        roots.iter().filter_map(|root| Some((*root, state.roots.get(root)?.clone()))),
                    );
                }
                Body::Condemn(condemn) => condemned = self.packs(state, &condemn.objects, |_| true),
                _ => {}
            }
        }
        match state.follow(bytes, verify) {
            Followed::Applied => {
                forgotten.into_iter().for_each(|(number, root)| self.add(number, root, by));
                self.condemned.extend(condemned);
                true
            }
            Followed::Ignored(_) => !must_count,
            Followed::Newer => false,
        }
    }

    /// What became of `before` is `after`, and nothing tells how.
    fn jump(&mut self, before: &State, after: &State) {
        let lost = before.roots.iter().filter(|(number, _)| !after.roots.contains_key(number));
        lost.for_each(|(number, root)| self.add(*number, root.clone(), None));
        // Entries that never counted may have been taken for true, and have numbered others.
        let is_lost = |object: &Object| {
            let now = after.object(object.number).filter(|now| now.status == Status::Live);
            now.is_none_or(|now| {
                (now.content, after.owner(&now).id) != (object.content, before.owner(object).id)
            })
        };
        let condemned = self.packs(before, &self.required, is_lost);
        self.condemned.extend(condemned);
    }

    fn add(&mut self, number: u64, root: Root, by: Option<Forgetting>) {
        self.required = self.required.union(&root.required);
        self.forgotten.insert(number, (root, by));
    }

    /// Live packs among those numbers, and of what forgotten backups require.
    fn packs(
        &self,
        state: &State,
        numbers: &Numbers,
        which: impl Fn(&Object) -> bool,
    ) -> Vec<(Number, OldPack)> {
        let required = numbers.intersection(&self.required);
        let live = required.iter().filter_map(|number| state.object(number));
        let live = live.filter(|object| object.status == Status::Live && which(object));
        let packs = live.filter_map(|object| {
            let Content::Pack(pack) = object.content else { return None };
            let owner = state.owner(&object);
            let name = PackName { session: owner.id, pack };
            Some((object.number, OldPack { name, domain: owner.domain }))
        });
        packs.collect()
    }

    /// Those that are not there again.
    fn without(self, state: &State) -> Vec<Forgotten> {
        let Found { forgotten, condemned: packs, .. } = self;
        let forgotten = forgotten.into_iter().filter(|(number, _)| !state.roots.contains_key(number));
        let (all, packs): (Numbers, _) = (packs.keys().copied().collect(), Arc::new(packs));
        let described = forgotten.map(|(number, (root, by))| {
            let condemned = root.required.intersection(&all);
            Forgotten { number, root, by, condemned, packs: packs.clone() }
        });
        described.collect()
    }
}

//! The steps of a collection.

use super::Kept;
use crate::bug::{Bug, planted};
use crate::log::{Condemn, Content, LogError, Numbers, Refusal, Session, SessionRecord, State, Status};
use crate::repository::WRITERS;
use crate::{KeyId, PACKS, SEGMENTS, SessionId};
use rempart_objects::{ErrorKind, Listed, Name, Objects, pages};
use rempart_types::WallTime;
use std::collections::BTreeSet;
use std::time::Duration;
use thiserror::Error;

/// Objects whose absence one entry tells.
const BATCH: usize = 10_000;

/// Tells what a backup reaches. Takes the repository's keys.
pub trait Follow {
    /// Has `kept` hold live packs of `state` for every chunk and tree node that backup `root` reaches; of several packs
    /// that hold one, one that is kept already.
    fn follow(&mut self, state: &State, root: u64, kept: &mut Kept) -> Result<(), CollectError>;

    /// All backups of `state` were followed; `kept` is about to be relied upon.
    fn finish(&mut self, _state: &State, _kept: &mut Kept) -> Result<(), CollectError> {
        Ok(())
    }
}

/// A collection could not go on.
#[derive(Debug, Error)]
pub enum CollectError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Repository(#[from] crate::Error),
    /// It may have been a backup, whose packs are not to be condemned.
    #[error(
        "`log/{0:016x}` cannot be read, and may have been a backup: nothing is removed until somebody has looked at it"
    )]
    Doubtful(u64),
    #[error("what backup {root} reaches cannot be told: {why}")]
    Unknown { root: u64, why: Box<dyn std::error::Error + Send + Sync> },
    #[error("there is nothing to condemn")]
    Nothing,
}

/// What was condemned.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Condemned {
    pub objects: u64,
    /// Packs that nobody requires, and that the place would not remove yet: left for later.
    pub retained: Numbers,
}

/// What was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Removed {
    pub objects: u64,
    /// Of those.
    pub bytes: u64,
    /// The place keeps them for now.
    pub retained: u64,
    pub retained_bytes: u64,
    /// Whether they are removed is not known: the next collection tries again.
    pub unsettled: u64,
}

impl Removed {
    pub(super) fn and(self, other: Removed) -> Removed {
        Removed {
            objects: self.objects + other.objects,
            bytes: self.bytes + other.bytes,
            retained: self.retained + other.retained,
            retained_bytes: self.retained_bytes + other.retained_bytes,
            unsettled: self.unsettled + other.unsettled,
        }
    }
}

/// One collection, within a session of the maintenance key.
#[derive(Debug)]
pub struct Collector<'s> {
    session: &'s mut Session,
    now: WallTime,
}

impl<'s> Collector<'s> {
    /// Fails if entries are there that cannot be read, unless `accept_doubtful`: whoever says so has looked at them.
    pub fn new(
        session: &'s mut Session,
        now: WallTime,
        accept_doubtful: bool,
    ) -> Result<Collector<'s>, CollectError> {
        session.refresh()?;
        let remarks = session.log().remarks();
        let doubtful = remarks.iter().find(|(_, remark)| remark.may_have_been_an_entry());
        match doubtful {
            Some((number, _)) if !accept_doubtful => Err(CollectError::Doubtful(*number)),
            _ => Ok(Collector { session, now }),
        }
    }

    /// Fences sessions that wrote nothing for `idle`, by their writers' clocks and this one: a writer that goes on after all
    /// starts over. Returns how many.
    pub fn fence_idle(&mut self, idle: Duration) -> Result<u64, CollectError> {
        let idle = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX);
        let is_idle = |written: WallTime| written.0.saturating_add(idle) < self.now.0;
        let own = self.session.id();
        let open = self.session.state().sessions().filter(|session| !session.is_over && session.id != own);
        let stale: Vec<_> =
            open.filter(|open| is_idle(open.last_written)).map(|open| (open.id, open.last)).collect();
        let mut fenced = 0;
        for (session, last) in stale {
            match self.session.fence_silent(self.now, session, last) {
                Ok(_) => fenced += 1,
                Err(LogError::Refused(Refusal::SessionOver(other) | Refusal::Spoke(other)))
                    if other == session => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(fenced)
    }

    /// Condemns packs of sessions that are over and that no backup requires; with `follow`, also what backups require and
    /// do not reach.
    pub fn condemn(&mut self, mut follow: Option<&mut dyn Follow>) -> Result<Condemned, CollectError> {
        let retention = self.session.log().objects().abilities().retention;
        let now = self.now;
        let mut marked = BTreeSet::new();
        let mut kept = Kept::default();
        let mut done = Condemned::default();
        let result = self.session.condemn(now, |state| {
            let live = state.live();
            let survivors;
            match follow.as_deref_mut() {
                Some(follow) => {
                    // Another collector may have kept the other copy of what is kept here.
                    let spoilt = !kept.packs().difference(&live).is_empty();
                    if spoilt && !planted(Bug::ChoiceOutlivesCondemnation) {
                        marked.clear();
                        kept = Kept::default();
                    }
                    let first = marked.is_empty();
                    for root in state.roots().keys() {
                        let skipped = planted(Bug::NewRootsNotFollowed) && !first;
                        if !skipped && marked.insert(*root) {
                            follow.follow(state, *root, &mut kept)?;
                        }
                    }
                    follow.finish(state, &mut kept)?;
                    survivors = kept.survivors().intersection(&live);
                }
                None => {
                    kept = Kept::default();
                    state.required().iter().for_each(|pack| kept.keep(pack, false));
                    survivors = Numbers::new();
                }
            }
            let plan = plan(state, &kept, retention.then_some(now));
            done = Condemned { objects: plan.objects.len(), retained: plan.retained };
            if plan.objects.is_empty() {
                return Err(CollectError::Nothing);
            }
            let survivors = if planted(Bug::SurvivorsUntold) { Numbers::new() } else { survivors };
            Ok(Condemn { objects: plan.objects, followed: follow.is_some(), survivors })
        });
        match result {
            Ok(_) | Err(CollectError::Nothing) => Ok(done),
            Err(error) => Err(error),
        }
    }

    /// Removes what is condemned, by this collection or an earlier one, and tells the log what is gone.
    pub fn delete(&mut self) -> Result<Removed, CollectError> {
        let mut removed = Removed::default();
        let condemned: Vec<_> = self.session.state().condemned().iter().collect();
        for batch in condemned.chunks(BATCH) {
            let mut gone = Vec::new();
            for number in batch {
                let state = self.session.state();
                let Some(object) = state.object(*number) else { continue };
                let name = object.content.object(state.owner(&object).id);
                if remove(&**self.session.log().objects(), &name, &mut removed)? {
                    gone.push(*number);
                }
            }
            if !gone.is_empty() {
                self.tell_gone(gone.into_iter().collect())?;
            }
        }
        Ok(removed)
    }

    /// Another collector may have told of some of them.
    fn tell_gone(&mut self, gone: Numbers) -> Result<(), CollectError> {
        self.session.gone(self.now, |state| gone.intersection(&state.condemned()))?;
        Ok(())
    }

    /// Removes objects that no entry names, of sessions that are over.
    pub fn sweep(&mut self) -> Result<Removed, CollectError> {
        let mut removed = Removed::default();
        let objects = self.session.log().objects().clone();
        for prefix in [PACKS, SEGMENTS] {
            let mut pages = pages(&*objects, prefix);
            loop {
                if planted(Bug::ListedAfterLog) {
                    self.session.refresh()?;
                }
                let Some(page) = pages.next().transpose().map_err(LogError::from)? else { break };
                // In this order: what the list shows and is not live *now* was put before, and is not live by any entry
                // up to now; and no later entry of a session that is over now makes it so.
                if !planted(Bug::ListedAfterLog) {
                    self.session.refresh()?;
                }
                for listed in page.iter().filter(|listed| is_orphan(self.session.state(), listed)) {
                    remove(&*objects, &listed.name, &mut removed)?;
                }
            }
        }
        Ok(removed)
    }

    /// Removes names of writers without a key: who added one died before it was registered, or who removed it before its name was.
    pub fn sweep_writers(&mut self) -> Result<Removed, CollectError> {
        let mut removed = Removed::default();
        let objects = self.session.log().objects().clone();
        for page in pages(&*objects, WRITERS) {
            let page = page.map_err(LogError::from)?;
            // In this order: who put a name had opened a session before, and registers its key within that or not at all.
            self.session.refresh()?;
            let (state, own) = (self.session.state(), self.session.id());
            for listed in page.iter().filter(|listed| is_nobodys_name(state, own, listed)) {
                remove(&*objects, &listed.name, &mut removed)?;
            }
        }
        Ok(removed)
    }

    /// Makes a checkpoint if more than `entries` follow the last, or that is damaged, and removes what it stands for. Returns how
    /// many entries were removed.
    pub fn truncate(&mut self, entries: u64) -> Result<u64, CollectError> {
        let state = self.session.state();
        let since = state.next() - state.floor().map_or(0, |(number, _)| number + 1);
        if since > entries || self.session.begins_damaged()? {
            self.session.checkpoint(self.now)?;
        }
        Ok(self.session.truncate()?)
    }
}

/// What can be condemned.
#[derive(Debug)]
pub(super) struct Plan {
    pub objects: Numbers,
    /// Packs that the place keeps yet.
    pub retained: Numbers,
}

/// `expired_by`: the place keeps objects against everybody until then. Those stay live, so that they may be of use.
pub(super) fn plan(state: &State, kept: &Kept, expired_by: Option<WallTime>) -> Plan {
    let candidates = state.objects().filter(|object| {
        // A writer that is here may be about to commit what requires it.
        object.status == Status::Live
            && matches!(object.content, Content::Pack(_))
            && (state.owner(object).is_over || planted(Bug::NameUsedAgain))
            && !kept.contains(object.number)
    });
    let (mut retained, mut objects) = (Vec::new(), Vec::new());
    for object in candidates {
        let is_retained = expired_by.is_some_and(|now| object.retain_until > now);
        if is_retained { retained.push(object.number) } else { objects.push(object.number) }
    }
    Plan { objects: objects.into_iter().collect(), retained: retained.into_iter().collect() }
}

fn is_orphan(state: &State, listed: &Listed) -> bool {
    // Something else's object is none of ours to remove.
    let Some((session, content)) = Content::of_name(&listed.name) else { return false };
    match state.status(session, content) {
        Some(Status::Live) => false,
        Some(Status::Condemned | Status::Gone) => true,
        // A session of which the log knows nothing is over: it was opened before it put anything.
        None => !state.session_is_open(session) || planted(Bug::OpenSessionsOrphaned),
    }
}

fn is_nobodys_name(state: &State, own: SessionId, listed: &Listed) -> bool {
    let id = listed.name.as_str().strip_prefix(WRITERS).and_then(|id| id.parse::<KeyId>().ok());
    let maintenance = state.maintenance().id();
    let may_register =
        |session: &SessionRecord| !session.is_over && session.key == maintenance && session.id != own;
    id.is_some_and(|id| state.keys().all(|key| key.public.id() != id)) && !state.sessions().any(may_register)
}

/// Whether it was seen absent.
fn remove(objects: &dyn Objects, name: &Name, removed: &mut Removed) -> Result<bool, LogError> {
    // For people only: who cannot be told now is told nothing.
    let bytes = objects.len(name).unwrap_or(0);
    match objects.remove(name) {
        Ok(()) => {}
        Err(error) if error.kind == ErrorKind::Retained => {
            removed.retained += 1;
            removed.retained_bytes += bytes;
            return Ok(false);
        }
        // It may be removed at any time from now on; whether it is, is asked next.
        Err(error) if error.kind == ErrorKind::Unknown => {}
        Err(error) => return Err(error.into()),
    }
    if planted(Bug::GoneUnseen) {
        removed.objects += 1;
        removed.bytes += bytes;
        return Ok(true);
    }
    match objects.len(name) {
        Err(error) if error.kind == ErrorKind::Missing => {
            removed.objects += 1;
            removed.bytes += bytes;
            Ok(true)
        }
        Ok(_) => {
            removed.unsettled += 1;
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

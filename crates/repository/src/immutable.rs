//! Object lock: what a backup needs is kept by the place, against everybody, for a time.

use crate::copies::original_of;
use crate::error::Error;
use crate::log::{self, Content, Number, Numbers, Object, State, Status};
use crate::{CHECKPOINTS, COPIES, Description, PackName, Repository, WRAPPED_KEYS};
use rempart_objects::{Created, Error as PlaceError, ErrorKind, Front, Name, Objects, pages};
use rempart_types::WallTime;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Ends of periods are rounded up to this part of them: what many backups share is kept for longer once in an eighth of a
/// period, not by each of them.
const STEPS: u64 = 8;
/// Attempts to have one object kept, and the pause before the second, which doubles each time.
const TRIES: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

fn wall_time() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(since.as_millis() as u64)
}

/// Until when what is made now is kept. S3 counts whole seconds.
fn until(now: WallTime, period_ms: u64) -> WallTime {
    let step = (period_ms / STEPS).max(1000);
    let end = now.0.saturating_add(period_ms);
    WallTime(end.checked_next_multiple_of(step).unwrap_or(u64::MAX))
}

/// A place each of whose new objects is kept for a period.
#[derive(Debug)]
pub(crate) struct Keeping {
    pub place: Arc<dyn Objects>,
    pub period_ms: u64,
}

impl Front for Keeping {
    fn behind(&self) -> &dyn Objects {
        &*self.place
    }

    fn create(
        &self,
        name: &Name,
        parts: &[&[u8]],
        retain_until: Option<WallTime>,
    ) -> Result<Created, PlaceError> {
        self.place.create(name, parts, retain_until.max(Some(until(wall_time(), self.period_ms))))
    }
}

/// Has a backup's needs kept before it is committed.
#[derive(Debug)]
pub(crate) struct Keeper<'r> {
    repository: &'r Repository,
    until: WallTime,
    /// What is kept already: objects that the log knows, of which there may be as many as in 10 TiB, and others.
    numbered: BTreeSet<Number>,
    named: BTreeSet<Name>,
}

impl<'r> Keeper<'r> {
    /// `None` where nothing is kept.
    pub fn new(repository: &'r Repository) -> Option<Keeper<'r>> {
        let period_ms = Some(repository.description().kept_ms).filter(|period| *period > 0)?;
        let until = until(wall_time(), period_ms);
        Some(Keeper { repository, until, numbered: BTreeSet::new(), named: BTreeSet::new() })
    }

    /// Until when.
    pub fn until(&self) -> WallTime {
        self.until
    }

    /// Has kept what it takes to restore a backup that is committed behind `state`: the packs it requires, those that it
    /// brings, and what leads to them.
    pub fn keep(&mut self, state: &State, required: &Numbers, own: &[PackName]) -> Result<(), Error> {
        for object in required.iter().filter_map(|number| state.object(number)) {
            if object.retain_until < self.until {
                match self.keep_numbered(state, &object) {
                    Err(error) if error.is_loss() && state.is_named_again(&object) => {}
                    kept => kept?,
                }
            }
        }
        own.iter().try_for_each(|pack| self.keep_named(pack.object()))?;
        // The last backup that is kept as long has seen to what is older than it.
        let sufficient = |root: &log::Root| root.retain_until >= Some(self.until);
        let seen_to = state.roots().values().filter(|root| sufficient(root)).map(|root| root.entry).max();
        let floor = state.floor().map_or(0, |(number, _)| number);
        for number in seen_to.map_or(floor, |number| floor.max(number + 1))..state.next() {
            self.keep_named(log::name(number))?;
        }
        if seen_to.is_some() {
            return Ok(());
        }
        self.keep_named(Description::name())?;
        for prefix in [WRAPPED_KEYS, CHECKPOINTS, COPIES] {
            for page in pages(&**self.repository.objects(), prefix) {
                page?.into_iter().try_for_each(|listed| self.keep_named(listed.name))?;
            }
        }
        let mut segments = state
            .objects()
            .filter(|object| object.status == Status::Live && matches!(object.content, Content::Index(_)));
        segments.try_for_each(|segment| match self.keep_numbered(state, &segment) {
            // It can be made again.
            Err(error) if error.is_loss() => Ok(()),
            kept => kept,
        })
    }

    fn keep_numbered(&mut self, state: &State, object: &Object) -> Result<(), Error> {
        if !self.numbered.contains(&object.number) {
            self.retain(&object.content.object(state.owner(object).id))?;
            self.numbered.insert(object.number);
        }
        Ok(())
    }

    fn keep_named(&mut self, name: Name) -> Result<(), Error> {
        if !self.named.contains(&name) {
            self.retain(&name)?;
            self.named.insert(name);
        }
        Ok(())
    }

    fn retain(&self, name: &Name) -> Result<(), Error> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            match self.repository.objects().retain(name, self.until) {
                Ok(()) => return Ok(()),
                Err(error) if error.is_transient() && attempt < TRIES => {
                    std::thread::sleep(pause);
                    pause *= 2;
                }
                // An entry of the log, or the copy of one, freed since.
                Err(error) if error.kind == ErrorKind::Missing && is_entry(name) => {
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        unreachable!("the last attempt returns")
    }
}

/// Whether it is an entry of the log or the copy of one.
fn is_entry(name: &Name) -> bool {
    log::number_of(&original_of(name).unwrap_or_else(|| name.clone())).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_shared_and_never_early() {
        let period = 8000;
        for now in 0..3000 {
            let end = until(WallTime(now), period).0;
            assert!((now + period..now + period + period / STEPS).contains(&end), "{now}");
            assert!(end.is_multiple_of(1000), "{now}");
        }
        assert_eq!(until(WallTime(u64::MAX - 1), period).0, u64::MAX);
        assert_eq!(until(WallTime(5), 10).0, 1000);
    }
}

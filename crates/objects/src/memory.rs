//! Objects in memory: for tests, and as the naive twin of the others.

use crate::{Abilities, Created, Error, ErrorKind, Listed, Name, Objects};
use rempart_types::WallTime;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

/// Objects of a list's page.
const PAGE: usize = 1000;

/// Objects in memory. Its time, against which retention counts, is set by hand.
#[derive(Debug, Default)]
pub struct Memory {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<Name, Object>,
    now: WallTime,
}

#[derive(Debug)]
struct Object {
    content: Vec<u8>,
    retain_until: WallTime,
}

impl Memory {
    /// Sets the time.
    pub fn set_time(&self, now: WallTime) {
        self.state().now = now;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    fn error(&self, kind: ErrorKind, action: &'static str, name: &Name, why: &'static str) -> Error {
        Error::new(kind, action, name, self.url(), why)
    }

    fn read<T>(&self, name: &Name, read: impl FnOnce(&[u8]) -> Result<T, Error>) -> Result<T, Error> {
        match self.state().objects.get(name) {
            Some(object) => read(&object.content),
            None => Err(self.error(ErrorKind::Missing, "read", name, "there is no such object")),
        }
    }
}

impl Objects for Memory {
    fn create(&self, name: &Name, parts: &[&[u8]], retain_until: Option<WallTime>) -> Result<Created, Error> {
        let mut state = self.state();
        if state.objects.contains_key(name) {
            return Ok(Created::Taken);
        }
        let retain_until = retain_until.unwrap_or_default();
        state.objects.insert(name.clone(), Object { content: parts.concat(), retain_until });
        Ok(Created::New)
    }

    fn get(&self, name: &Name, limit: u64) -> Result<Vec<u8>, Error> {
        self.read(name, |content| {
            if content.len() as u64 > limit {
                return Err(self.error(ErrorKind::TooLong, "read", name, "it is longer than it may be"));
            }
            Ok(content.to_vec())
        })
    }

    fn get_range(&self, name: &Name, range: Range<u64>) -> Result<Vec<u8>, Error> {
        self.read(name, |content| {
            let part = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
            match part.and_then(|(start, end)| content.get(start..end)) {
                Some(part) => Ok(part.to_vec()),
                None => Err(self.error(ErrorKind::TooShort, "read", name, "it ends before")),
            }
        })
    }

    fn len(&self, name: &Name) -> Result<u64, Error> {
        self.read(name, |content| Ok(content.len() as u64))
    }

    fn list(&self, prefix: &str, after: Option<&Name>) -> Result<Vec<Listed>, Error> {
        let state = self.state();
        let matching = state
            .objects
            .iter()
            .filter(|(name, _)| name.as_str().starts_with(prefix) && after.is_none_or(|after| *name > after));
        let listed =
            matching.map(|(name, object)| Listed { name: name.clone(), len: object.content.len() as u64 });
        Ok(listed.take(PAGE).collect())
    }

    fn remove(&self, name: &Name) -> Result<(), Error> {
        let mut state = self.state();
        if state.objects.get(name).is_some_and(|object| object.retain_until > state.now) {
            drop(state);
            return Err(self.error(ErrorKind::Retained, "remove", name, "it is retained"));
        }
        state.objects.remove(name);
        Ok(())
    }

    fn retain(&self, name: &Name, until: WallTime) -> Result<(), Error> {
        match self.state().objects.get_mut(name) {
            Some(object) => object.retain_until = object.retain_until.max(until),
            None => return Err(self.error(ErrorKind::Missing, "retain", name, "there is no such object")),
        }
        Ok(())
    }

    fn abilities(&self) -> Abilities {
        Abilities { retention: true, pack_len: 1024 * 1024, creates: 2 }
    }

    fn url(&self) -> String {
        "memory:".to_owned()
    }
}

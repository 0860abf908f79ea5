//! Writing to the log.

use super::body::{Body, Create};
use super::entry::{self, Header};
use super::error::LogError;
use super::read::{Log, TRIES, slot};
use super::sign::{Sign, Verify};
use super::state::{State, Valid};
use crate::bug::{Bug, planted};
use crate::{DomainId, EntryHash, RepositoryId, SessionId};
use rempart_objects::{Created, ErrorKind, Objects};
use rempart_types::WallTime;
use std::sync::Arc;

/// Entries of others that one append gives way to, at most.
const LOST: u32 = 1000;

/// An entry that is in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    pub number: u64,
    pub hash: EntryHash,
}

/// Who stands in a slot.
#[derive(Debug, PartialEq, Eq)]
enum Slot {
    Mine,
    NotMine,
}

impl Log {
    /// Writes the first entry. `signer` has the maintenance key, whose dedup domain is `domain`.
    pub fn create(
        objects: Arc<dyn Objects>,
        verify: Arc<dyn Verify>,
        repository: RepositoryId,
        signer: &dyn Sign,
        domain: DomainId,
        written: WallTime,
    ) -> Result<Log, LogError> {
        let maintenance = signer.verifier();
        let header = Header {
            repository,
            number: 0,
            previous: EntryHash([0; 32]),
            session: SessionId([0; 16]),
            key: maintenance.id(),
            written,
        };
        let bytes = entry::encode(&header, &Body::Create(Create { maintenance, domain }), signer);
        match put(&*objects, 0, &bytes, None)? {
            Slot::Mine => {
                let log = Log::open(objects, verify, repository, maintenance)?;
                log.keep_copy()?;
                Ok(log)
            }
            Slot::NotMine => Err(super::Refusal::Created.into()),
        }
    }

    /// Appends what `propose` wants, which is asked with the state at the head, and again whenever another entry took the
    /// place: what was right behind one state may be wrong behind the next.
    ///
    /// [`LogError::Unsettled`]: the entry may still come to be there, as long as nobody else writes. It does no harm then.
    pub fn append<E: From<LogError>>(
        &mut self,
        signer: &dyn Sign,
        mut propose: impl for<'s> FnMut(&'s State) -> Result<Valid<'s>, E>,
    ) -> Result<Appended, E> {
        for _ in 0..LOST {
            // What an old state refuses may be right by now.
            self.refresh()?;
            let valid = propose(&self.state)?;
            assert!(std::ptr::eq(valid.state(), &self.state), "validated behind the state that was given");
            let number = valid.number();
            let session = (valid.session(), valid.opens_session());
            let (bytes, retain_until) = (valid.sign(signer), valid.retain_until());
            let landed = match put(&*self.objects, number, &bytes, retain_until)? {
                Slot::Mine => self.confirm(number, &bytes, session)?,
                Slot::NotMine => None,
            };
            if let Some(appended) = landed {
                return Ok(appended);
            }
        }
        Err(LogError::Contended(LOST).into())
    }

    /// An entry stands where it was put. Whether it is in the log: the slot may have been freed before, so that what
    /// stands there now is behind a checkpoint and nobody reads it. `None` if it is not.
    fn confirm(
        &mut self,
        number: u64,
        bytes: &[u8],
        (session, opens): (SessionId, bool),
    ) -> Result<Option<Appended>, LogError> {
        let appended = Appended { number, hash: entry::hash(bytes) };
        if planted(Bug::FreedSlotCounts) || !self.jump()? {
            let before = self.remarks().len();
            self.follow(bytes)?;
            assert_eq!(self.remarks().len(), before, "an entry is valid behind the state it was made for");
            return Ok(Some(appended));
        }
        // The checkpoint was made from a log with it, or from one without.
        let state = self.state();
        if state.roots().values().any(|root| (root.entry, root.hash) == (number, appended.hash)) {
            return Ok(Some(appended));
        }
        match state.session(session) {
            Some(record) if record.last == (number, appended.hash) => Ok(Some(appended)),
            Some(record) if record.is_over => Err(LogError::SessionOver(session)),
            Some(_) => Ok(None),
            // Opened, and over before anything was put in it: as good as never opened.
            None if opens => Ok(None),
            None => Err(LogError::SessionOver(session)),
        }
    }
}

/// Creates entry `number`, and finds out who stands there.
fn put(
    objects: &dyn Objects,
    number: u64,
    bytes: &[u8],
    retain_until: Option<WallTime>,
) -> Result<Slot, LogError> {
    let name = entry::name(number);
    let mut last = None;
    for _ in 0..TRIES {
        match objects.create(&name, &[bytes], retain_until) {
            Ok(Created::New) => return Ok(Slot::Mine),
            Ok(Created::Taken) => {}
            // The same bytes in the same place again: whichever copy lands is this entry.
            Err(error) if error.kind == ErrorKind::Unknown => {
                if planted(Bug::UnknownIsDone) {
                    return Ok(Slot::Mine);
                }
                last = Some(error);
            }
            Err(error) => return Err(error.into()),
        }
        match slot(objects, number) {
            Ok(Some(there)) if there == bytes => return Ok(Slot::Mine),
            Ok(Some(_)) => return Ok(Slot::NotMine),
            // It was taken, and freed since.
            Ok(None) if last.is_none() => return Ok(Slot::NotMine),
            Ok(None) => {}
            Err(LogError::Objects(error)) if error.is_transient() => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    let source = last.expect("only an unknown outcome is tried again");
    Err(LogError::Unsettled { name: name.to_string(), source })
}

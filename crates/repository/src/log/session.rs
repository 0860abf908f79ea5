//! A writer's stay: everything but the first entry is written within one.

use super::append::Appended;
use super::body::{Body, Boot, Checkpoint, Commit, Condemn, Damaged, Key, Read, Segment, Undelete};
use super::entry;
use super::error::LogError;
use super::numbers::Numbers;
use super::read::{Log, TRIES};
use super::refusal::Refusal;
use super::sign::Sign;
use super::state::State;
use crate::bug::{Bug, planted};
use crate::copies::{original_of, remove_unless_kept};
use crate::{COPIES, DomainId, EntryHash, KeyId, LOG, SessionId, WrappedKeyId};
use rempart_objects::{Name, pages};
use rempart_types::WallTime;
use std::sync::Arc;

/// A session that was opened here. One thing at a time is written within it.
///
/// After [`LogError::SessionOver`], or [`Refusal::SessionOver`](super::Refusal::SessionOver), nothing that was put in it and
/// is not live counts any more: start over with a new session, under new names.
#[derive(Debug)]
pub struct Session {
    log: Log,
    signer: Arc<dyn Sign>,
    id: SessionId,
}

impl Session {
    /// Opens a session. `id` is drawn at random for it. Open it before reading an index: what is live then, and condemned
    /// later, is found when the backup is committed.
    pub fn open(
        mut log: Log,
        signer: Arc<dyn Sign>,
        id: SessionId,
        now: WallTime,
    ) -> Result<Session, LogError> {
        log.append::<LogError>(&*signer, |state| {
            Ok(state.validate(id, &*signer, now, Body::Session(None))?)
        })?;
        Ok(Session { log, signer, id })
    }

    /// Goes on with a session that was opened elsewhere, with the same key, and that nobody else writes in.
    pub fn resume(log: Log, signer: Arc<dyn Sign>, id: SessionId) -> Result<Session, LogError> {
        match log.state().session_is_open(id) {
            true => Ok(Session { log, signer, id }),
            false => Err(LogError::SessionOver(id)),
        }
    }

    /// Has `work` put something into any domain, in a session of its own beside this one: it takes the maintenance key. `id` is drawn
    /// at random for it. It is over when `work` is done, or failed; one that stays open for being killed is as any other.
    pub fn within<T, E: From<LogError>>(
        &mut self,
        domain: DomainId,
        id: SessionId,
        now: WallTime,
        work: impl FnOnce(&mut Session) -> Result<T, E>,
    ) -> Result<T, E> {
        let signer = Arc::clone(&self.signer);
        let opens = Body::Session(Some(domain));
        self.log
            .append::<LogError>(&*signer, |state| Ok(state.validate(id, &*signer, now, opens.clone())?))?;
        let own = std::mem::replace(&mut self.id, id);
        let done = work(self);
        let ended = self.close(now);
        self.id = own;
        let done = done?;
        ended?;
        Ok(done)
    }

    pub fn id(&self) -> SessionId {
        self.id
    }

    pub fn log(&self) -> &Log {
        &self.log
    }

    /// As of the newest entry that was read.
    pub fn state(&self) -> &State {
        self.log.state()
    }

    pub fn refresh(&mut self) -> Result<(), LogError> {
        self.log.refresh()
    }

    /// Makes packs live that were put, and acknowledged, under this session's name.
    pub fn segment(&mut self, now: WallTime, segment: Segment) -> Result<Appended, LogError> {
        self.append(now, Body::Segment(segment))
    }

    /// Commits a backup. `resolve` says what it requires, behind the state that it is given: each chunk it reaches must lie in
    /// a pack that is live there, or in one of the commit's own segment. It is asked again whenever that state was
    /// not the newest.
    pub fn commit<E: From<LogError>>(
        &mut self,
        now: WallTime,
        mut resolve: impl FnMut(&State) -> Result<Commit, E>,
    ) -> Result<Appended, E> {
        let mut first = None;
        self.append_with(now, |state| {
            if let Some(first) = first.clone().filter(|_| planted(Bug::NotValidatedAgain)) {
                return Ok(Body::Commit(first));
            }
            let resolved = resolve(state)?;
            first = planted(Bug::NotValidatedAgain).then(|| resolved.clone());
            Ok(Body::Commit(resolved))
        })
    }

    /// Ends another session, of the same key or with the maintenance key.
    pub fn fence(&mut self, now: WallTime, session: SessionId) -> Result<Appended, LogError> {
        self.append(now, Body::Fence(session))
    }

    /// Ends another session that wrote nothing behind `last`: [`Refusal::Spoke`] if it did.
    pub fn fence_silent(
        &mut self,
        now: WallTime,
        session: SessionId,
        last: (u64, EntryHash),
    ) -> Result<Appended, LogError> {
        self.append_with(now, |state| match state.session(session) {
            Some(record) if record.last != last => Err(Refusal::Spoke(session).into()),
            _ => Ok(Body::Fence(session)),
        })
    }

    pub fn register(&mut self, now: WallTime, key: Key) -> Result<Appended, LogError> {
        self.append(now, Body::Key(key))
    }

    pub fn revoke(&mut self, now: WallTime, key: KeyId) -> Result<Appended, LogError> {
        self.append(now, Body::Revoke(key))
    }

    pub fn forget(&mut self, now: WallTime, roots: Vec<u64>) -> Result<Appended, LogError> {
        self.append(now, Body::Forget(roots))
    }

    /// Brings back a backup that was forgotten. `resolve` says what it requires behind the state that it is given, and is asked
    /// again whenever that was not the newest.
    pub fn undelete<E: From<LogError>>(
        &mut self,
        now: WallTime,
        mut resolve: impl FnMut(&State) -> Result<Undelete, E>,
    ) -> Result<Appended, E> {
        self.append_with(now, |state| Ok(Body::Undelete(resolve(state)?)))
    }

    /// Has these backups in use from now on, and no others.
    pub fn read(&mut self, now: WallTime, read: Read) -> Result<Appended, LogError> {
        self.append(now, Body::Read(read))
    }

    /// Tells what came of starting a backup's machine.
    pub fn boot(&mut self, now: WallTime, boot: Boot) -> Result<Appended, LogError> {
        self.append(now, Body::Boot(boot))
    }

    /// Says that a wrapped key is removed, if `may` finds, behind the state that it is given, that it may be.
    pub fn remove_key<E: From<LogError>>(
        &mut self,
        now: WallTime,
        key: WrappedKeyId,
        mut may: impl FnMut(&State) -> Result<(), E>,
    ) -> Result<Appended, E> {
        self.append_with(now, |state| may(state).map(|()| Body::RemoveKey(key)))
    }

    pub fn verified(&mut self, now: WallTime, packs: Numbers) -> Result<Appended, LogError> {
        self.append(now, Body::Verified(packs))
    }

    pub fn damaged(&mut self, now: WallTime, damaged: Damaged) -> Result<Appended, LogError> {
        self.append(now, Body::Damaged(damaged))
    }

    /// Condemns what `plan` says, behind the state that it is given and no other.
    pub fn condemn<E: From<LogError>>(
        &mut self,
        now: WallTime,
        mut plan: impl FnMut(&State) -> Result<Condemn, E>,
    ) -> Result<Appended, E> {
        self.append_with(now, |state| Ok(Body::Condemn(plan(state)?)))
    }

    /// Tells which condemned objects were seen absent.
    pub fn gone(
        &mut self,
        now: WallTime,
        mut which: impl FnMut(&State) -> Numbers,
    ) -> Result<Appended, LogError> {
        self.append_with(now, |state| Ok::<_, LogError>(Body::Gone(which(state))))
    }

    /// Folds the log into an entry from which it can be read.
    pub fn checkpoint(&mut self, now: WallTime) -> Result<Appended, LogError> {
        for _ in 0..TRIES {
            self.log.refresh()?;
            // Who reads goes from one pointer to the next, so none may be missing: whoever made the last checkpoint may have
            // died before it told where that is.
            self.publish()?;
            let before = self.state().checkpoints();
            let appended = self.append_with(now, |state| {
                if state.checkpoints() != before {
                    return Err(LogError::Contended(1));
                }
                let checkpoint = Checkpoint { ordinal: before, state: state.encode() };
                Ok(Body::Checkpoint(checkpoint))
            });
            match appended {
                // Somebody else made one meanwhile.
                Err(LogError::Contended(1)) => {}
                Err(error) => return Err(error),
                Ok(appended) => {
                    self.publish()?;
                    return Ok(appended);
                }
            }
        }
        Err(LogError::Contended(TRIES))
    }

    fn publish(&self) -> Result<(), LogError> {
        if planted(Bug::TruncatedBeforePublished) {
            return Ok(());
        }
        self.log.publish(&*self.signer)
    }

    /// Whether a new checkpoint is called for: the entry that reading begins with, or the pointer to it, is damaged. Copies of them that
    /// are damaged are made again when the log is truncated.
    pub fn begins_damaged(&self) -> Result<bool, LogError> {
        self.log.begins_damaged()
    }

    /// Removes entries that the newest checkpoint stands for, and copies of such. Returns how many entries.
    pub fn truncate(&mut self) -> Result<u64, LogError> {
        self.publish()?;
        let state = self.log.state();
        let Some((floor, _)) = state.floor() else { return Ok(0) };
        let (objects, needed) = (self.log.objects(), state.entries_of_roots());
        let is_old = |copy: &Name| {
            let number = original_of(copy).and_then(|original| entry::number_of(&original));
            number.is_some_and(|number| number < floor)
        };
        for page in pages(&**objects, &format!("{COPIES}{LOG}")) {
            for copy in page?.iter().filter(|copy| is_old(&copy.name)) {
                remove_unless_kept(&**objects, &copy.name)?;
            }
        }
        let mut removed = 0;
        for page in pages(&**objects, LOG) {
            for number in page?.iter().filter_map(|object| entry::number_of(&object.name)) {
                if number >= floor {
                    return Ok(removed);
                }
                if !needed.contains(&number) {
                    removed += u64::from(remove_unless_kept(&**objects, &entry::name(number))?);
                }
            }
        }
        Ok(removed)
    }

    /// Ends this session. What it put and did not make live is removed by the next collection.
    pub fn end(mut self, now: WallTime) -> Result<Log, LogError> {
        self.close(now)?;
        Ok(self.log)
    }

    fn close(&mut self, now: WallTime) -> Result<(), LogError> {
        match self.append(now, Body::End) {
            // Somebody fenced it: it is over all the same.
            Ok(_) | Err(LogError::SessionOver(_)) | Err(LogError::Refused(Refusal::SessionOver(_))) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn append(&mut self, now: WallTime, body: Body) -> Result<Appended, LogError> {
        self.append_with(now, |_| Ok::<_, LogError>(body.clone()))
    }

    fn append_with<E: From<LogError>>(
        &mut self,
        now: WallTime,
        mut propose: impl FnMut(&State) -> Result<Body, E>,
    ) -> Result<Appended, E> {
        let (id, signer) = (self.id, Arc::clone(&self.signer));
        self.log.append(&*signer, |state| {
            let body = propose(state)?;
            state.validate(id, &*signer, now, body).map_err(|refusal| E::from(LogError::Refused(refusal)))
        })
    }
}

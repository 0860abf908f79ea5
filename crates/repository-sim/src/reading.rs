//! Who reads backups: restores, verifications, copies, servers. They have in use what they read; some cannot write, and read
//! all the same.

use crate::actor::{Actor, OWNER, TRIES};
use crate::book::{SALT, Use, chunks_in};
use rempart_objects::{ErrorKind, Objects};
use rempart_repository::log::{Log, LogError, Number, Read, Refusal, Session};

impl Actor {
    pub fn read(&self) -> Result<(), LogError> {
        let mut log = self.open_log()?;
        let Some(mut root) = self.any_root(&log) else { return Ok(()) };
        if self.chance(200) {
            return self.find_all(&mut log, root);
        }
        let mut session = self.open(OWNER)?;
        if self.have_in_use(&mut session, vec![root])? {
            let rounds = self.rng().below(5);
            for _ in 0..rounds {
                self.find_all(&mut log, root)?;
                let next = self.any_root(&log).filter(|_| self.chance(300)).unwrap_or(root);
                if self.chance(600) && self.have_in_use(&mut session, vec![next])? {
                    root = next;
                }
            }
        }
        self.book().in_use.remove(&session.id());
        self.end(session)
    }

    fn any_root(&self, log: &Log) -> Option<u64> {
        self.rng().pick(log.state().roots().keys().copied().collect())
    }

    /// These backups and no others, from now on. Whether they are still there.
    fn have_in_use(&self, session: &mut Session, roots: Vec<u64>) -> Result<bool, LogError> {
        let (id, told) = (session.id(), self.now());
        // Until it is known which of both counts, what is in both.
        if let Some(before) = self.book().in_use.get_mut(&id) {
            before.roots.retain(|root| roots.contains(root));
        }
        match session.read(told, Read { roots: roots.clone(), payload: Vec::new() }) {
            Ok(_) => {
                self.book().in_use.insert(id, Use { roots, told });
                self.book().meet("in use");
                self.place.store().changed = true;
                Ok(true)
            }
            Err(LogError::Refused(Refusal::NoSuchRoot(_))) => {
                self.book().meet("forgotten before it was in use");
                Ok(false)
            }
            Err(error) => {
                if matches!(error, LogError::SessionOver(_) | LogError::Refused(Refusal::SessionOver(_))) {
                    self.book().meet("a use was taken away");
                }
                Err(error)
            }
        }
    }

    /// Ends the sessions of those who read any of these backups.
    pub fn end_readers(&self, session: &mut Session, roots: &[u64]) -> Result<(), LogError> {
        let reads =
            session.state().reads().filter(|(_, read)| read.roots.iter().any(|root| roots.contains(root)));
        for reader in reads.map(|(reader, _)| reader.id).collect::<Vec<_>>() {
            self.book().ended.insert(reader);
            match session.fence(self.now(), reader) {
                Ok(_) => self.book().meet("a reader was ended by force"),
                Err(LogError::Refused(Refusal::SessionOver(over))) if over == reader => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// All that a backup reaches, unless it is forgotten meanwhile.
    fn find_all(&self, log: &mut Log, root: u64) -> Result<(), LogError> {
        let entry = |log: &Log| log.state().roots().get(&root).map(|root| root.entry);
        let before = entry(log);
        let chunks = match log.payload(root) {
            Ok(payload) => chunks_in(&payload),
            Err(LogError::Objects(error)) => return Err(error.into()),
            Err(error) => {
                // It may have been forgotten, and its entry removed.
                log.refresh()?;
                let now = entry(log);
                if now.is_some() && now != before {
                    // And brought back.
                    self.book().meet("read again: it stands in another entry");
                    return self.find_all(log, root);
                }
                if now.is_some() {
                    self.book().broken.get_or_insert(format!("backup {root} cannot be read: {error}"));
                }
                return Ok(());
            }
        };
        for _ in 0..TRIES {
            let mut found = 0;
            let Some(record) = log.state().roots().get(&root) else { return Ok(()) };
            let required: Vec<Number> = record.required.iter().collect();
            for number in required {
                let object = log.state().object(number).expect("what is required is known");
                let name = object.content.object(log.state().owner(&object).id);
                match self.place.get(&name, 1000) {
                    Ok(bytes) => found |= chunks_in(&bytes[SALT..]),
                    Err(error) if error.kind == ErrorKind::Missing => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if chunks & !found == 0 {
                self.book().meet("read");
                return Ok(());
            }
            // What it required then may be condemned by now.
            let before = log.state().next();
            log.refresh()?;
            let lost = log.state().roots().contains_key(&root) && log.state().next() == before;
            if lost {
                self.book()
                    .broken
                    .get_or_insert(format!("backup {root} reaches {chunks:b}, and found is {found:b}"));
                return Ok(());
            }
            self.book().meet("read again: packs were condemned meanwhile");
        }
        Ok(())
    }
}

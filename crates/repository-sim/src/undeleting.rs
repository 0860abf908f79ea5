//! Who brings back what was forgotten.

use crate::actor::{Actor, OWNER, OWNERS_DOMAIN};
use rempart_objects::{ErrorKind, Objects};
use rempart_repository::log::{Content, Forgotten, LogError, Number, Refusal, Segment, Session};
use std::collections::BTreeMap;

impl Actor {
    /// Brings back what somebody forgot. What it requires and was condemned is put anew, if it is still there.
    pub fn undelete(&self) -> Result<(), LogError> {
        let mut session = self.open(OWNER)?;
        let forgotten = session.log().forgotten()?;
        let mut copies = BTreeMap::new();
        for one in forgotten {
            match self.bring_back(&mut session, &one, &mut copies) {
                Ok(()) => {}
                Err(LogError::Refused(Refusal::NotFit(_))) => {
                    self.book().meet("not brought back: condemned meanwhile");
                }
                Err(LogError::Refused(Refusal::RootKnown(_))) => {
                    self.book().meet("not brought back: somebody else did");
                }
                Err(error) => return Err(error),
            }
        }
        self.end(session)
    }

    fn bring_back(
        &self,
        session: &mut Session,
        one: &Forgotten,
        copies: &mut BTreeMap<Number, Number>,
    ) -> Result<(), LogError> {
        let payload = match session.log().forgotten_payload(one) {
            Err(LogError::Damaged { .. }) => {
                self.book().meet("not brought back: its entry is gone");
                return Ok(());
            }
            payload => payload?,
        };
        if !self.put_condemned_anew(session, one, copies)? {
            return Ok(());
        }
        let undelete = one.undelete(copies, None, payload);
        let set_out = self.book().set_out;
        let appended = session.undelete::<LogError>(self.now(), |_| Ok(undelete.clone()))?;
        let mut book = self.book();
        book.meet(if one.condemned.is_empty() {
            "brought back"
        } else {
            "brought back from condemned packs"
        });
        book.bring_back(one.number, appended.hash, set_out);
        drop(book);
        self.place.store().changed = true;
        Ok(())
    }

    /// Adds the numbers of the copies, by those of the originals. Whether all can be had.
    fn put_condemned_anew(
        &self,
        session: &mut Session,
        one: &Forgotten,
        copies: &mut BTreeMap<Number, Number>,
    ) -> Result<bool, LogError> {
        let mut found = BTreeMap::new();
        for (number, old) in one.condemned_packs().filter(|(number, _)| !copies.contains_key(number)) {
            match self.place.get(&old.name.object(), u64::MAX) {
                Ok(bytes) if old.domain == OWNERS_DOMAIN => {
                    found.insert(number, (old.name.pack, bytes));
                }
                Err(error) if error.kind != ErrorKind::Missing => return Err(error.into()),
                _ => {
                    self.book().meet("not brought back: a pack is gone");
                    return Ok(false);
                }
            }
        }
        for (pack, bytes) in found.values() {
            self.put_pack(session.id(), *pack, bytes)?;
        }
        if !found.is_empty() {
            let packs = found.values().map(|(pack, _)| *pack).collect();
            session.segment(self.now(), Segment { packs, indexes: Vec::new() })?;
            let number = |pack| session.state().number(session.id(), Content::Pack(pack));
            copies.extend(found.into_iter().filter_map(|(old, (pack, _))| Some((old, number(pack)?))));
        }
        Ok(true)
    }
}

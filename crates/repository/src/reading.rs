//! Points that somebody reads: nobody forgets them meanwhile. A reader that is gone without a word is taken for dead when it
//! wrote nothing for long, as a writer is, or when somebody says so.

use crate::SessionId;
use crate::error::Error;
use crate::key::BoxPurpose;
use crate::log::{LogError, Read, Refusal, Session, State};
use crate::repository::Repository;
use rempart_types::WallTime;

/// Of who reads; longer than any name of a machine.
const LONGEST_WHO: usize = 500;

/// Somebody who has points in use, as the log tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointReader {
    pub session: SessionId,
    /// In ascending order.
    pub roots: Vec<u64>,
    /// In its own words.
    pub who: String,
    /// When it last wrote, by its clock.
    pub heard: WallTime,
}

/// Has points in use until it is ended, or somebody ends its session. Dropping it does not end it: whoever reads may go on
/// later.
#[derive(Debug)]
pub struct Reading {
    session: Session,
    read: Read,
}

impl Reading {
    pub fn session(&self) -> SessionId {
        self.session.id()
    }

    /// Tells that it is still there.
    pub fn renew(&mut self, now: WallTime) -> Result<(), Error> {
        self.session.read(now, self.read.clone())?;
        Ok(())
    }

    pub fn end(self, now: WallTime) -> Result<(), Error> {
        self.session.end(now)?;
        Ok(())
    }
}

impl Repository {
    /// Has points in use, of which `roots` are the entries. `who` is for people who would forget them.
    pub fn read_points(&self, roots: &[u64], who: &str, now: WallTime) -> Result<Reading, Error> {
        let session = Session::open(self.log()?, self.signer(), SessionId::random(), now)?;
        self.read_in(session, roots, who, now)
    }

    /// Goes on with a use that another process began. One that was ended meanwhile is begun anew.
    pub fn read_points_on(
        &self,
        session: SessionId,
        roots: &[u64],
        who: &str,
        now: WallTime,
    ) -> Result<Reading, Error> {
        match Session::resume(self.log()?, self.signer(), session) {
            Ok(session) => self.read_in(session, roots, who, now),
            Err(LogError::SessionOver(_)) => self.read_points(roots, who, now),
            Err(error) => Err(error.into()),
        }
    }

    fn read_in(
        &self,
        mut session: Session,
        roots: &[u64],
        who: &str,
        now: WallTime,
    ) -> Result<Reading, Error> {
        let mut roots = roots.to_vec();
        roots.sort_unstable();
        roots.dedup();
        let who: String = who.chars().take(LONGEST_WHO).collect();
        let payload = self.writer().seal(BoxPurpose::Reader, &session.id().0, who.as_bytes());
        let read = Read { roots, payload };
        match session.read(now, read.clone()) {
            Ok(_) => Ok(Reading { session, read }),
            Err(error) => {
                // It has nothing in use.
                let _ = session.end(now);
                Err(error.into())
            }
        }
    }

    /// Everybody who has points in use.
    pub fn readers(&self, state: &State) -> Result<Vec<PointReader>, Error> {
        let opener = self.opener()?;
        let reader = |(session, read): (&crate::log::SessionRecord, &Read)| {
            let who = opener.open(BoxPurpose::Reader, &session.id.0, &read.payload);
            let who = who.map(|who| String::from_utf8_lossy(&who).into_owned());
            PointReader {
                session: session.id,
                roots: read.roots.clone(),
                who: who.unwrap_or_else(|| "somebody who does not say".to_owned()),
                heard: session.last_written,
            }
        };
        Ok(state.reads().map(reader).collect())
    }

    /// Ends other's uses. Those that are over already are no error.
    pub fn end_readers(&self, sessions: &[SessionId], now: WallTime) -> Result<(), Error> {
        let mut own = Session::open(self.log()?, self.signer(), SessionId::random(), now)?;
        for session in sessions {
            match own.fence(now, *session) {
                Ok(_) => {}
                Err(LogError::Refused(Refusal::SessionOver(over))) if over == *session => {}
                Err(error) => return Err(error.into()),
            }
        }
        own.end(now)?;
        Ok(())
    }
}

//! Who has a key that only adds, and writes into the log what it may not.

use crate::actor::Actor;
#[cfg(feature = "planted-bugs")]
use crate::actor::{AGENT, OWNERS_DOMAIN};
#[cfg(feature = "planted-bugs")]
use rempart_objects::Objects;
#[cfg(feature = "planted-bugs")]
use rempart_repository::SessionId;
use rempart_repository::log::LogError;
#[cfg(feature = "planted-bugs")]
use rempart_repository::log::{self, Body, Condemn, Numbers, Read};

impl Actor {
    #[cfg(not(feature = "planted-bugs"))]
    pub fn lie(&self) -> Result<(), LogError> {
        Ok(())
    }

    /// Puts into the next slot what should not be there, under a key that may only write.
    #[cfg(feature = "planted-bugs")]
    pub fn lie(&self) -> Result<(), LogError> {
        let session = self.open(AGENT)?;
        for _ in 0..3 {
            let mut log = self.open_log()?;
            log.refresh()?;
            let state = log.state();
            let any_session = state.sessions().next().map_or(session.id(), |any| any.id);
            let mut by = session.id();
            let kind = self.rng().below(8);
            let body = match kind {
                0 => Body::Condemn(Condemn {
                    objects: state.live(),
                    followed: true,
                    survivors: Numbers::new(),
                }),
                1 => Body::Fence(any_session),
                2 => Body::Forget(state.roots().keys().copied().collect()),
                3 => Body::Gone(state.live()),
                4 => Body::Verified(state.live()),
                5 => {
                    let roots = state.roots().keys().copied().collect();
                    Body::Read(Read { roots, payload: Vec::new() })
                }
                6 => {
                    by = SessionId(self.rng().bytes16());
                    Body::Session(Some(OWNERS_DOMAIN))
                }
                _ => Body::End,
            };
            let mut bytes = log::forge(state, by, &AGENT, &body);
            if self.chance(200) {
                let place = self.rng().below(bytes.len() as u64) as usize;
                bytes[place] ^= 1;
            }
            self.place.create(&log::name(state.next()), &[&bytes], None)?;
            self.book().meet("lied");
        }
        self.end(session)
    }
}

//! Live packs of a state, as readers need them.

use super::numbers::Number;
use super::table::{Content, Pages, SessionNumber, Status};
use crate::{DomainId, PackName, SessionId};
use std::collections::BTreeMap;

/// Live packs of a state, by their numbers.
#[derive(Debug)]
pub(crate) struct LivePacks {
    objects: Pages,
    /// With the domain whose keys made the ids.
    sessions: BTreeMap<SessionNumber, (SessionId, DomainId)>,
}

impl LivePacks {
    pub(super) fn new(objects: Pages, sessions: BTreeMap<SessionNumber, (SessionId, DomainId)>) -> LivePacks {
        LivePacks { objects, sessions }
    }

    /// A pack's name and domain, if it is live.
    pub fn get(&self, number: Number) -> Option<(PackName, DomainId)> {
        let object = self.objects.get(number).filter(|object| object.status == Status::Live)?;
        let Content::Pack(pack) = object.content else { return None };
        let (session, domain) = self.sessions[&object.session];
        Some((PackName { session, pack }, domain))
    }
}

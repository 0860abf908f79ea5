//! Collecting in the dedup domains of machines that have keys of their own.
//!
//! What is found in a domain lies in packs of its sessions. The maintenance key may open a session in any domain, and the master
//! key makes the ids and indexes of any: so a collection puts into a domain what was there before, and no more.

use super::CollectError;
use crate::log::Session;
use crate::{DomainId, Repository, SessionId};
use rempart_types::WallTime;
use std::cmp::Reverse;

/// Domains beside the owner's in which one collection puts packs, and in which it puts segments, at most: each takes three entries
/// of the log. The others are left for the next one.
const MOST: usize = 32;

/// Leaves the owner's domain, first, and as many of the others as one collection works in: those with the greatest first number.
pub(super) fn choose<T>(repository: &Repository, domains: &mut Vec<(u64, DomainId, T)>) {
    let own = repository.writer().domain().id();
    domains.sort_by_key(|(worth, domain, _)| (*domain != own, Reverse(*worth), *domain));
    let owns = usize::from(domains.first().is_some_and(|(_, domain, _)| *domain == own));
    domains.truncate(MOST + owns);
}

/// Has `work` put something into a domain.
pub(super) fn within<T>(
    repository: &Repository,
    session: &mut Session,
    now: WallTime,
    domain: DomainId,
    work: impl FnOnce(&mut Session) -> Result<T, CollectError>,
) -> Result<T, CollectError> {
    match domain == repository.writer().domain().id() {
        true => work(session),
        false => session.within(domain, SessionId::random(), now, work),
    }
}

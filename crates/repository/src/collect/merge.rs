//! Putting small index segments together: each backup leaves one behind, and whoever has no index yet reads them all.

use super::CollectError;
use crate::error::Error;
use crate::index::{Segment, SegmentBuilder};
use crate::log::{Condemn, Content, Numbers, Segment as LogSegment, Session, State, Status};
use crate::repository::is_of_a_segment;
use crate::writer::put_segment;
use crate::{PackId, Repository, SEGMENTS, SegmentName};
use rempart_objects::pages;
use rempart_types::WallTime;
use std::collections::BTreeMap;

/// A segment with fewer bytes is small: a quarter of a full one.
const SMALL: u64 = 2 << 20;
/// So many small ones are worth being read and put together.
pub(super) const WORTH_IT: usize = 16;

/// Condemns segments that tell of no live pack, and puts those together that are small, or about packs of which most are not
/// live any more. Returns how many were condemned.
pub(super) fn merge(
    repository: &Repository,
    session: &mut Session,
    now: WallTime,
) -> Result<u64, CollectError> {
    let lens = lens(repository)?;
    session.refresh()?;
    let state = session.state();
    let own = repository.writer().domain().id();
    let (mut old, mut small, mut worth_it) = (Vec::new(), Vec::new(), Vec::new());
    for object in state.objects().filter(|object| object.status == Status::Live) {
        let Content::Index(segment) = object.content else { continue };
        let owner = state.owner(&object);
        let name = SegmentName { session: owner.id, segment };
        let Some(len) = lens.get(&name).filter(|_| owner.is_over) else { continue };
        let opener = repository.opener()?;
        let domain_of = |domain| Some(opener.domain(domain));
        let packs = Segment::fetch_packs(&**repository.objects(), &repository.id(), domain_of, &name, *len);
        let packs = match packs {
            Ok(packs) => packs,
            // Whoever needs an index reads the packs themselves.
            Err(error) if is_of_a_segment(&error) => continue,
            Err(error) => return Err(error.into()),
        };
        let live = packs.iter().filter(|pack| state.live_pack(**pack, owner.domain).is_some()).count();
        if live == 0 {
            old.push(object.number);
        } else if owner.domain == own && live * 2 < packs.len() {
            worth_it.push((object.number, name));
        } else if owner.domain == own && *len < SMALL {
            small.push((object.number, name));
        }
    }
    if worth_it.len() + small.len() >= WORTH_IT {
        worth_it.extend(small);
    }
    worth_it.sort_unstable();
    old.extend(put_together(repository, session, now, &worth_it)?);
    condemn(session, now, &old.into_iter().collect())
}

/// Lengths, by what a list shows. What it does not show is left for another time.
fn lens(repository: &Repository) -> Result<BTreeMap<SegmentName, u64>, Error> {
    let mut lens = BTreeMap::new();
    for page in pages(&**repository.objects(), SEGMENTS) {
        let page = page?;
        let parsed = page.iter().filter_map(|listed| Some((SegmentName::parse(&listed.name)?, listed.len)));
        lens.extend(parsed);
    }
    Ok(lens)
}

/// Returns which of them are told anew.
fn put_together(
    repository: &Repository,
    session: &mut Session,
    now: WallTime,
    segments: &[(u32, SegmentName)],
) -> Result<Vec<u32>, CollectError> {
    let (mut done, mut builder) = (Vec::new(), SegmentBuilder::new());
    for (number, name) in segments {
        let opener = repository.opener()?;
        let domain_of = |domain| Some(opener.domain(domain));
        let segment = match Segment::fetch(&**repository.objects(), &repository.id(), domain_of, name) {
            Ok(segment) => segment,
            Err(error) if is_of_a_segment(&error) => continue,
            Err(error) => return Err(error.into()),
        };
        if !builder.add_segment(&segment, |pack| is_live(repository, session.state(), pack)) {
            make_live(repository, session, now, std::mem::take(&mut builder))?;
            let added = builder.add_segment(&segment, |pack| is_live(repository, session.state(), pack));
            assert!(added, "any segment fits in an empty one");
        }
        done.push(*number);
    }
    make_live(repository, session, now, builder)?;
    Ok(done)
}

fn is_live(repository: &Repository, state: &State, pack: &PackId) -> bool {
    state.live_pack(*pack, repository.writer().domain().id()).is_some()
}

fn make_live(
    repository: &Repository,
    session: &mut Session,
    now: WallTime,
    builder: SegmentBuilder,
) -> Result<(), CollectError> {
    if !builder.is_empty() {
        // Its packs are live already.
        let LogSegment { packs: _, indexes } = put_segment(repository, session.id(), builder)?;
        session.segment(now, LogSegment { packs: Vec::new(), indexes })?;
    }
    Ok(())
}

fn condemn(session: &mut Session, now: WallTime, old: &Numbers) -> Result<u64, CollectError> {
    let mut condemned = 0;
    let ended = session.condemn(now, |state| {
        let objects: Numbers = old.intersection(&state.live());
        condemned = objects.len();
        if objects.is_empty() {
            return Err(CollectError::Nothing);
        }
        Ok(Condemn { objects, followed: false, survivors: Numbers::new() })
    });
    match ended {
        Ok(_) | Err(CollectError::Nothing) => Ok(condemned),
        Err(error) => Err(error),
    }
}

//! Putting small index segments together: each backup leaves one behind, and whoever has no index yet reads them all.

use super::CollectError;
use super::domains::{choose, within};
use crate::error::Error;
use crate::index::{Segment, SegmentBuilder};
use crate::log::{Condemn, Content, Number, Numbers, Segment as LogSegment, Session, Status};
use crate::writer::put_segment;
use crate::{DomainId, PackId, Repository, SEGMENTS, SegmentName, WriterKey};
use rempart_objects::pages;
use rempart_types::WallTime;
use std::collections::BTreeMap;

/// A segment with fewer bytes is small: a quarter of a full one.
const SMALL: u64 = 2 << 20;
/// So many small ones are worth being read and put together.
pub(super) const WORTH_IT: usize = 16;

/// Condemns segments that tell of no live pack, and puts those of a domain together that are small, or about packs of which most
/// are not live any more. Returns how many were condemned.
pub(super) fn merge(
    repository: &Repository,
    session: &mut Session,
    now: WallTime,
) -> Result<u64, CollectError> {
    let lens = lens(repository)?;
    session.refresh()?;
    let state = session.state();
    let mut old = Vec::new();
    let mut domains: BTreeMap<DomainId, Candidates> = BTreeMap::new();
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
            Err(error) if error.is_of_its_writer() => continue,
            Err(error) => return Err(error.into()),
        };
        let live = packs.iter().filter(|pack| state.live_pack(**pack, owner.domain).is_some()).count();
        let of = domains.entry(owner.domain).or_default();
        if live == 0 {
            old.push(object.number);
        } else if live * 2 < packs.len() {
            of.worth_it.push((object.number, name));
        } else if *len < SMALL {
            of.small.push((object.number, name));
        }
    }
    let chosen = domains.into_iter().map(|(domain, of)| (domain, of.chosen()));
    let chosen = chosen.map(|(domain, segments)| (segments.len() as u64, domain, segments));
    let mut chosen: Vec<_> = chosen.filter(|(.., segments)| !segments.is_empty()).collect();
    choose(repository, &mut chosen);
    for (_, domain, segments) in chosen {
        let put = |session: &mut Session| put_together(repository, session, now, domain, &segments);
        old.extend(within(repository, session, now, domain, put)?);
    }
    condemn(session, now, &old.into_iter().collect())
}

/// Segments of one domain: their numbers and names.
#[derive(Debug, Default)]
struct Candidates {
    small: Vec<(Number, SegmentName)>,
    worth_it: Vec<(Number, SegmentName)>,
}

impl Candidates {
    fn chosen(self) -> Vec<(Number, SegmentName)> {
        let Candidates { small, mut worth_it } = self;
        if worth_it.len() + small.len() >= WORTH_IT {
            worth_it.extend(small);
        }
        worth_it.sort_unstable();
        worth_it
    }
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

/// In a session of the domain. Returns which of them are told anew.
fn put_together(
    repository: &Repository,
    session: &mut Session,
    now: WallTime,
    domain: DomainId,
    segments: &[(Number, SegmentName)],
) -> Result<Vec<Number>, CollectError> {
    let writer = repository.keys().owner()?.writer_in(domain);
    let (mut done, mut builder) = (Vec::new(), SegmentBuilder::new());
    for (number, name) in segments {
        let opener = repository.opener()?;
        let domain_of = |domain| Some(opener.domain(domain));
        let segment = match Segment::fetch(&**repository.objects(), &repository.id(), domain_of, name) {
            Ok(segment) => segment,
            Err(error) if error.is_of_its_writer() => continue,
            Err(error) => return Err(error.into()),
        };
        let is_live = |session: &Session, pack: &PackId| session.state().live_pack(*pack, domain).is_some();
        if !builder.add_segment(&segment, |pack| is_live(session, pack)) {
            make_live(repository, &writer, session, now, std::mem::take(&mut builder))?;
            let added = builder.add_segment(&segment, |pack| is_live(session, pack));
            assert!(added, "any segment fits in an empty one");
        }
        done.push(*number);
    }
    make_live(repository, &writer, session, now, builder)?;
    Ok(done)
}

fn make_live(
    repository: &Repository,
    writer: &WriterKey,
    session: &mut Session,
    now: WallTime,
    builder: SegmentBuilder,
) -> Result<(), CollectError> {
    if !builder.is_empty() {
        // Its packs are live already.
        let LogSegment { packs: _, indexes } = put_segment(repository, writer, session.id(), builder)?;
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

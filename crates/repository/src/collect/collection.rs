//! A whole collection of a repository.

use super::collector::plan;
use super::domains::within;
use super::merge::merge;
use super::repack::{Rewritten, rewrite, sparse};
use super::{CollectError, Collector, Condemned, Follow, Kept, Reach, Removed};
use crate::log::{Content, Numbers, Session, State, Status};
use crate::{Repository, SessionId};
use rempart_types::WallTime;
use std::collections::BTreeMap;
use std::time::Duration;

/// What a collection shall do.
#[derive(Debug, Clone, Copy)]
pub struct Collection {
    pub now: WallTime,
    /// Sessions that wrote nothing for so long are over: whoever comes back starts over.
    pub idle: Duration,
    /// Follow the trees of all backups. Else what no backup claims to require is removed, which is not for users: an incremental backup
    /// claims all that the one before did, and none claims what was stored anew because it was damaged in an earlier one.
    pub follow: bool,
    /// Packs of which less than so many percent is of use are written anew.
    pub repack: Option<u8>,
    /// Somebody has looked at entries that cannot be read.
    pub accept_doubtful: bool,
    /// Entries of the log behind the last checkpoint that call for a new one.
    pub checkpoint_after: u64,
}

/// What a collection did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Collected {
    /// Sessions.
    pub fenced: u64,
    pub rewritten: Rewritten,
    pub condemned: Condemned,
    /// Bytes of packs that nobody requires and that the place keeps yet.
    pub retained_bytes: u64,
    /// Index segments that told of nothing any more, or are part of a larger one now.
    pub segments: u64,
    pub removed: Removed,
    /// Entries of the log.
    pub truncated: u64,
    /// Backups that cannot be followed, and why: all that they claim is kept.
    pub unreadable: BTreeMap<u64, String>,
}

/// What a collection would do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outlook {
    /// Packs that would be removed, and their bytes.
    pub packs: u64,
    pub bytes: u64,
    /// Packs that the place keeps yet.
    pub retained: u64,
    pub retained_bytes: u64,
    /// Packs that would be written anew, and how many of their bytes are of no use.
    pub sparse: u64,
    pub sparse_waste: u64,
    /// Sessions that are open: what they put is left alone.
    pub open_sessions: u64,
    pub unreadable: BTreeMap<u64, String>,
}

/// Removes what no backup of the repository reaches.
pub fn collect(repository: &Repository, how: &Collection) -> Result<Collected, CollectError> {
    let log = repository.log()?;
    let mut session = Session::open(log, repository.signer(), SessionId::random(), how.now)?;
    let done = steps(repository, &mut session, how);
    // One that stays open is ended by the next collection.
    let _ = session.end(how.now);
    done
}

fn steps(
    repository: &Repository,
    session: &mut Session,
    how: &Collection,
) -> Result<Collected, CollectError> {
    let mut done = Collected::default();
    let (now, doubtful) = (how.now, how.accept_doubtful);
    done.fenced = Collector::new(session, now, doubtful)?.fence_idle(how.idle)?;
    let mut reach = match how.follow {
        true => Some(Reach::new(repository, session.state())?),
        false => None,
    };
    if let (Some(reach), Some(percent)) = (&mut reach, how.repack) {
        follow_all(reach, session.state())?;
        let usage = reach.usage(session.state())?;
        let domains = sparse(reach, session.state(), &usage, percent, now);
        drop(usage);
        for (domain, packs) in domains {
            let write = |session: &mut Session| rewrite(reach, session, now, domain, &packs);
            let rewritten = within(repository, session, now, domain, write)?;
            done.rewritten = done.rewritten.and(rewritten);
        }
    }
    let follow = reach.as_mut().map(|reach| reach as &mut dyn Follow);
    done.condemned = Collector::new(session, now, doubtful)?.condemn(follow)?;
    if let Some(reach) = reach {
        done.unreadable = reach.told();
    }
    done.retained_bytes = bytes_of(repository, session.state(), &done.condemned.retained);
    done.segments = merge(repository, session, now)?;
    let mut collector = Collector::new(session, now, doubtful)?;
    done.removed = collector.delete()?.and(collector.sweep()?).and(collector.sweep_writers()?);
    done.truncated = collector.truncate(how.checkpoint_after)?;
    repository.keep_description()?;
    Ok(done)
}

/// What [`collect`] would do. Changes nothing.
pub fn look(repository: &Repository, how: &Collection) -> Result<Outlook, CollectError> {
    let log = repository.log()?;
    let state = log.state();
    let mut reach = Reach::new(repository, state)?;
    let mut kept = Kept::default();
    let mut packs = Numbers::new();
    if how.follow {
        follow_all(&mut reach, state)?;
        reach.finish(state, &mut kept)?;
    } else {
        state.required().iter().for_each(|pack| kept.keep(pack, false));
    }
    let retention = repository.objects().abilities().retention;
    let plan = plan(state, &kept, retention.then_some(how.now));
    let usage = reach.usage(state)?;
    if let Some(percent) = how.repack.filter(|_| how.follow) {
        let domains = sparse(&reach, state, &usage, percent, how.now);
        packs = domains.iter().fold(packs, |packs, (_, sparse)| packs.union(sparse));
    }
    let whole = |packs: &Numbers| packs.iter().filter_map(|pack| usage.get(pack)).map(|of| of.whole).sum();
    let wasted =
        |packs: &Numbers| packs.iter().filter_map(|pack| usage.get(pack)).map(|of| of.whole - of.used).sum();
    Ok(Outlook {
        packs: plan.objects.len(),
        bytes: whole(&plan.objects),
        retained: plan.retained.len(),
        retained_bytes: whole(&plan.retained),
        sparse: packs.len(),
        sparse_waste: wasted(&packs),
        open_sessions: state.sessions().filter(|session| !session.is_over).count() as u64,
        unreadable: reach.told(),
    })
}

fn follow_all(reach: &mut Reach<'_>, state: &State) -> Result<(), CollectError> {
    // What it keeps is told when all is followed.
    let mut kept = Kept::default();
    state.roots().keys().try_for_each(|root| reach.follow(state, *root, &mut kept))?;
    Ok(reach.settle()?)
}

/// For people: an object whose length cannot be told counts for nothing.
fn bytes_of(repository: &Repository, state: &State, objects: &Numbers) -> u64 {
    let live = objects.iter().filter_map(|number| state.object(number));
    let live =
        live.filter(|object| object.status == Status::Live && matches!(object.content, Content::Pack(_)));
    let len = live.map(|object| repository.objects().len(&object.content.object(state.owner(&object).id)));
    len.map(|len| len.unwrap_or(0)).sum()
}

//! The follower's side of a resync: it asks for regions, takes extents, then starts a new log behind them.

use crate::follower::{Follower, Phase};
use crate::local::Local;
use crate::{Action, Digest, ExtentPiece, Message, REGION_EXTENTS, Region, RegionBits, ResyncMode, Syncing};
use rempart_types::{DiskIndex, EXTENT_SIZE, Lineage, LogPosition, Lsn, MonotonicTime};
use std::collections::VecDeque;

/// ```text
///  SettingAside ─► Waiting ─ ResyncFrom ─► Taking ─ all regions ─► StartingLog ─► (Following)
/// ```
#[derive(Debug)]
pub(crate) struct Target {
    round: u64,
    mode: ResyncMode,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    SettingAside,
    Waiting,
    Taking(Taking),
    StartingLog { at: LogPosition },
}

#[derive(Debug)]
struct Taking {
    at: LogPosition,
    chain: Option<u32>,
    lineage: Lineage,
    /// The next region to look at; `None` when all were.
    next: Option<Region>,
    /// Regions looked at or asked for, in order, and whether the request is out.
    open: VecDeque<(Region, bool)>,
    received: u64,
    /// Messages given to the store whose extents are not written yet: sequence, region if it completes one.
    writing: VecDeque<(u64, Option<Region>)>,
}

/// Where a region is covered by an earlier round of this resync, its changes since are asked for; else it is
/// compared, or asked for since the base.
fn region_mode(mode: ResyncMode, syncing: &Syncing, region: Region) -> ResyncMode {
    let covered = syncing.levels.iter().any(|(end, _)| region < *end);
    if covered { ResyncMode::Changed } else { mode }
}

/// The region at or after `region`, on the disks that are.
fn first_region(mut region: Region, disks: &[u64]) -> Option<Region> {
    loop {
        let size = *disks.get(usize::from(region.disk.0))?;
        if region.index < size.div_ceil(REGION_EXTENTS * EXTENT_SIZE) {
            return Some(region);
        }
        region = Region { disk: DiskIndex(region.disk.0.checked_add(1)?), index: 0 };
    }
}

impl Follower {
    pub fn resync(
        &mut self,
        message: Message,
        bytes: u64,
        local: &mut Local,
        _now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        match message {
            Message::ResyncBegin { round, base, mode, restart, .. } => {
                self.begin(round, base, mode, restart, local, out)
            }
            Message::ResyncFrom { round, at, chain, lineage, .. } => {
                let Some(target) = self.target(round) else { return };
                let goes_on = at.lsn < Lsn(u64::MAX) && lineage.position(at.lsn) == Some(at);
                if !matches!(target.stage, Stage::Waiting) || !goes_on {
                    return self.close("starts a resync out of turn", out);
                }
                let next = first_region(Region::default(), &local.disks);
                let (open, writing) = (VecDeque::new(), VecDeque::new());
                target.stage = Stage::Taking(Taking { at, chain, lineage, next, open, received: 0, writing });
                self.pump(local, out);
            }
            Message::ResyncExtents { round, sequence, region, pieces, last, .. } => {
                self.extents(round, sequence, region, pieces, last, bytes, local, out);
            }
            Message::ResyncFailed { round, .. } => {
                if self.target(round).is_some() {
                    self.close("the source cannot go on with the resync", out);
                }
            }
            _ => unreachable!("only messages of a resync come here"),
        }
    }

    fn target(&mut self, round: u64) -> Option<&mut Target> {
        match &mut self.phase {
            Phase::Syncing(target) if target.round == round => Some(target),
            _ => None,
        }
    }

    fn taking(&mut self, round: u64) -> Option<&mut Taking> {
        match &mut self.target(round)?.stage {
            Stage::Taking(taking) => Some(taking),
            _ => None,
        }
    }

    fn begin(
        &mut self,
        round: u64,
        base: LogPosition,
        mode: ResyncMode,
        restart: bool,
        local: &mut Local,
        out: &mut Vec<Action>,
    ) {
        if !matches!(self.phase, Phase::Told | Phase::Following) || !local.is_settled() {
            return self.close("starts a resync out of turn", out);
        }
        let earlier = if restart { None } else { local.syncing.take() };
        let levels = earlier.map_or_else(Vec::new, |syncing| syncing.levels);
        let syncing = Syncing { base, whole: mode == ResyncMode::Compare, levels };
        local.syncing = Some(syncing.clone());
        local.whole = false;
        local.busy += 1;
        out.push(Action::ResyncSetAside { round, syncing });
        self.phase = Phase::Syncing(Target { round, mode, stage: Stage::SettingAside });
    }

    /// The store set the copy aside; `Local` is not busy with it any more.
    pub fn set_aside(&mut self, round: u64, local: &Local, out: &mut Vec<Action>) {
        if let Some(target) = self.target(round)
            && matches!(target.stage, Stage::SettingAside)
        {
            target.stage = Stage::Waiting;
            self.send(Message::ResyncReady { term: self.term, round }, None, out);
        } else {
            self.answer(local, out);
        }
    }

    /// Looks at regions ahead; starts the log when there are none left.
    fn pump(&mut self, local: &mut Local, out: &mut Vec<Action>) {
        let Phase::Syncing(target) = &mut self.phase else { return };
        let Stage::Taking(taking) = &mut target.stage else { return };
        let syncing = local.syncing.as_ref().expect("a target is syncing");
        while taking.open.len() < local.config.resync_regions_ahead
            && let Some(region) = taking.next
        {
            taking.open.push_back((region, false));
            taking.next = first_region(Region { index: region.index + 1, ..region }, &local.disks);
            out.push(Action::KnowRegion {
                round: target.round,
                region,
                since: syncing.since(region),
                at: taking.at.lsn,
                mode: region_mode(target.mode, syncing, region),
            });
        }
        if taking.open.is_empty() && taking.writing.is_empty() {
            let (from, chain, lineage) = (taking.at, taking.chain, taking.lineage.clone());
            target.stage = Stage::StartingLog { at: from };
            local.busy += 1;
            local.starting_log = Some((from, chain, lineage.clone()));
            out.push(Action::StartResyncLog { from, chain, lineage });
        }
    }

    pub fn region_known(
        &mut self,
        round: u64,
        region: Region,
        changed: RegionBits,
        digests: Option<Vec<Digest>>,
        local: &Local,
        out: &mut Vec<Action>,
    ) {
        let Some(taking) = self.taking(round) else { return };
        let Some(entry) = taking.open.iter_mut().find(|(open, asked)| *open == region && !asked) else {
            return;
        };
        entry.1 = true;
        let since = local.syncing.as_ref().expect("a target is syncing").since(region);
        self.send(
            Message::ResyncRegion { term: self.term, round, region, since, changed, digests },
            None,
            out,
        );
    }

    #[expect(clippy::too_many_arguments)]
    fn extents(
        &mut self,
        round: u64,
        sequence: u64,
        region: Region,
        pieces: Vec<ExtentPiece>,
        last: bool,
        bytes: u64,
        local: &Local,
        out: &mut Vec<Action>,
    ) {
        let Some(taking) = self.taking(round) else { return };
        let asked = taking.open.iter().any(|(open, asked)| *open == region && *asked);
        let first = region.first_extent().0;
        let sound = pieces.iter().all(|piece| {
            let size = local.disks.get(usize::from(piece.disk.0)).copied().unwrap_or(0);
            let range = piece.extent.bytes(size);
            piece.disk == region.disk
                && (first..first.saturating_add(REGION_EXTENTS)).contains(&piece.extent.0)
                && range.start < range.end
                && (piece.length == 0 || u64::from(piece.length) == range.end - range.start)
        });
        let total: u64 = pieces.iter().map(|piece| u64::from(piece.length)).sum();
        if !asked || !sound || total != bytes || sequence != taking.received + 1 {
            return self.close("sends extents that were not asked for", out);
        }
        taking.received = sequence;
        taking.writing.push_back((sequence, last.then_some(region)));
        out.push(Action::WriteExtents { round, sequence, pieces });
    }

    pub fn extents_written(&mut self, round: u64, sequence: u64, local: &mut Local, out: &mut Vec<Action>) {
        let Some(taking) = self.taking(round) else { return };
        let at = taking.at;
        while let Some(&(written, completes)) = taking.writing.front()
            && written <= sequence
        {
            taking.writing.pop_front();
            let Some(region) = completes else { continue };
            taking.open.retain(|(open, _)| *open != region);
            let end = taking.open.front().map(|(open, _)| *open).or(taking.next);
            if let Some(end) = end {
                local.syncing.as_mut().expect("a target is syncing").raise(end, at);
            }
        }
        self.send(Message::ResyncTaken { term: self.term, round, sequence }, None, out);
        self.pump(local, out);
    }

    /// The extents are durable and the log starts anew.
    pub fn log_started(&mut self, from: Lsn, local: &mut Local, out: &mut Vec<Action>) {
        if let Phase::Syncing(target) = &self.phase
            && let Stage::StartingLog { at } = target.stage
        {
            assert_eq!(at.lsn, from, "the store starts the log where it was told");
            let round = target.round;
            self.phase = Phase::Following;
            self.send(Message::ResyncLog { term: self.term, round, at: from }, None, out);
        } else {
            self.answer(local, out);
        }
    }
}

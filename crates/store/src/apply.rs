//! Application: rounds that bring the image from one position of the log to a later one.
//!
//! A round merges what it applies, saves what snapshots still need, and only then writes:
//!
//! ```text
//! collect ─► save (read old pages, write them aside) ─► sync data ─► write map ─► sync map ─► write image
//!    │                    └───────────── no resync: snapshots end with the process ────────────►┤
//!    └──────────────────────────── nothing to save ────────────────────────────────────────────►┘
//! ```
//!
//! It never passes min(stable, durable), nor the position where a snapshot shall open.

use crate::batch::RecordKind;
use crate::event::{Output, SnapshotLoss, StoreEvent, Token};
use crate::interval::{Content, IntervalMap};
use crate::io::{FileId, IoClass, IoError, IoOp};
use crate::snapshot::{PageMask, PageRun, Place, SavedRun, pages_of};
use crate::store::{Pending, Pressure, Store};
use rempart_buffer::{Slice, is_zero};
use rempart_types::{DiskIndex, EXTENT_SIZE, ExtentIndex, Lsn};
use std::collections::BTreeMap;
use std::time::Duration;

/// Bytes per image write at most.
const MAX_WRITE: u64 = 1024 * 1024;
/// Runs of pages read at once to be saved.
const SAVE_AT_ONCE: usize = 32;
/// A resync that waits for room on the disk tries again after this, doubled each time up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// An extent from a resync's source, waiting to be written.
#[derive(Debug)]
pub(crate) struct IncomingExtent {
    pub token: Token,
    pub disk: DiskIndex,
    pub extent: ExtentIndex,
    pub lsn: Lsn,
    pub data: Option<Slice>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Save,
    SyncData,
    WriteMap,
    SyncMap,
    /// No room for what the snapshots need: they are dropped before anything is overwritten.
    DropSnapshots,
    Image,
}

#[derive(Debug)]
pub(crate) struct Round {
    stage: Stage,
    waiting: usize,
    /// The image's position afterwards.
    pub target: Lsn,
    /// Answered when the round is done.
    tokens: Vec<Token>,
    writes: BTreeMap<DiskIndex, IntervalMap>,
    /// Pages still to save.
    to_save: Vec<PageRun>,
    saved: Vec<SavedRun>,
    /// What was read of them and is not written yet.
    unwritten: Vec<(Place, Slice)>,
    data_written: bool,
    /// Pages could not be saved: the disk is full.
    no_room: bool,
    /// Why the snapshots are dropped, if they are.
    loss: SnapshotLoss,
}

/// A resync stands still: what it overwrites cannot be kept.
#[derive(Debug)]
pub(crate) struct NoRoom {
    pause: Duration,
    pub error: IoError,
}

impl Store {
    /// How far the image may go now.
    pub(crate) fn apply_bound(&self) -> Lsn {
        if self.takes_extents() && !self.resync_beginning {
            return self.applied;
        }
        let mut bound = self.stable_told.min(self.journal.durable).min(self.journal.log_end);
        if let Some(at) = self.next_snapshot_stop() {
            bound = bound.min(at);
        }
        self.window.floor(bound).unwrap_or(self.applied).max(self.applied)
    }

    /// The image holds no record later than this.
    pub(crate) fn image_reaches(&self) -> Lsn {
        self.round.as_ref().map_or(self.applied, |round| round.target).max(self.image_may_hold)
    }

    /// Neither a round nor a task is in the way.
    pub(crate) fn may_apply(&self) -> bool {
        self.round.is_none() && !self.apply_held && self.failed.is_none() && !self.wants_quiet()
    }

    /// Starts a round if there is something to apply and a reason to do so now.
    pub(crate) fn apply_more(&mut self, out: &mut Output) {
        if !self.may_apply() {
            return;
        }
        if !self.incoming.is_empty() {
            return self.start_extent_round(out);
        }
        let bound = self.apply_bound();
        if bound <= self.applied {
            return;
        }
        let worth_it = self.window.bytes_between(self.applied, bound) >= self.limits.apply_round
            || self.limits.apply_delay.is_zero()
            || self.apply_now
            || self.wants_everything_applied();
        if !worth_it {
            self.arm_timers();
            return;
        }
        let target = self.window.end_of(self.limits.apply_round, self.applied, bound);
        let target = target.expect("there is something to apply");
        self.start_log_round(target, out);
    }

    fn start_log_round(&mut self, target: Lsn, out: &mut Output) {
        let mut writes: BTreeMap<DiskIndex, IntervalMap> = BTreeMap::new();
        let mut config = None;
        for entry in self.window.between(self.applied, target) {
            for record in entry.batch.records() {
                if record.kind == RecordKind::Config {
                    config = Some((record.lsn, entry.batch.payload(&record)));
                }
                if !record.kind.changes_disk() {
                    continue;
                }
                // A disk that was removed since takes nothing any more.
                let Some(map) = self.maps.get_mut(&record.disk) else { continue };
                let end = record.offset + record.len;
                map.mark(
                    ExtentIndex::containing(record.offset),
                    ExtentIndex::containing(end - 1),
                    record.lsn,
                );
                let content = match record.kind {
                    RecordKind::Write => Content::Data(entry.batch.payload(&record)),
                    kind => Content::Zero { punch: kind == RecordKind::Discard },
                };
                writes.entry(record.disk).or_default().insert(record.offset, end, record.lsn, content);
            }
        }
        if config.is_some() {
            self.config_applied = config;
        }
        self.start_round(target, writes, Vec::new(), out);
    }

    fn start_extent_round(&mut self, out: &mut Output) {
        let mut writes: BTreeMap<DiskIndex, IntervalMap> = BTreeMap::new();
        let mut tokens = Vec::new();
        let mut bytes = 0;
        while bytes < self.limits.apply_round.max(EXTENT_SIZE) {
            let Some(incoming) = self.incoming.pop_front() else { break };
            bytes += EXTENT_SIZE;
            tokens.push(incoming.token);
            let Some(size) = self.disk_size(incoming.disk) else { continue };
            let range = incoming.extent.bytes(size);
            let map = self.maps.get_mut(&incoming.disk).expect("every disk has a map");
            map.mark(incoming.extent, incoming.extent, incoming.lsn);
            let content = match incoming.data {
                Some(data) => Content::Data(data),
                None => Content::Zero { punch: true },
            };
            writes.entry(incoming.disk).or_default().insert(range.start, range.end, incoming.lsn, content);
        }
        self.start_round(self.applied, writes, tokens, out);
    }

    fn start_round(
        &mut self,
        target: Lsn,
        writes: BTreeMap<DiskIndex, IntervalMap>,
        tokens: Vec<Token>,
        out: &mut Output,
    ) {
        let mut to_save = self.pages_to_save(&writes);
        let (mut stage, mut loss) = (Stage::Save, SnapshotLoss::DiskFull);
        let kept = self.snapshots.bytes_with(to_save.iter().map(|run| run.len() as u64).sum());
        if kept > self.limits.snapshots && !to_save.is_empty() && !self.needs_undo() {
            (stage, loss) = (Stage::DropSnapshots, SnapshotLoss::OverLimit);
            to_save.clear();
        }
        self.round = Some(Round {
            stage,
            waiting: 0,
            target,
            tokens,
            writes,
            to_save,
            saved: Vec::new(),
            unwritten: Vec::new(),
            data_written: false,
            no_room: false,
            loss,
        });
        self.advance_round(out);
    }

    /// Pages the round overwrites that an open snapshot has not saved yet. A resync's undo snapshot keeps whole extents.
    fn pages_to_save(&self, writes: &BTreeMap<DiskIndex, IntervalMap>) -> Vec<PageRun> {
        if self.snapshots.newest().is_none() {
            return Vec::new();
        }
        let whole = self.superblock.syncing.is_some();
        let mut changed: BTreeMap<(DiskIndex, ExtentIndex), PageMask> = BTreeMap::new();
        for (&disk, map) in writes {
            for (start, piece) in map.pieces() {
                for (extent, pages) in pages_of(start, piece.end) {
                    *changed.entry((disk, extent)).or_default() |= if whole { PageMask::MAX } else { pages };
                }
            }
        }
        // Popped from the back: keep reading in rising order.
        let missing = changed.into_iter().rev().flat_map(|((disk, extent), pages)| {
            PageRun::of_mask(disk, extent, self.snapshots.needs(disk, extent, pages))
        });
        missing.collect()
    }

    /// Whether a resync is under way: without its undo snapshot there is no copy.
    fn needs_undo(&self) -> bool {
        self.superblock.syncing.is_some() || self.resync_beginning
    }

    /// What a snapshot needs does not fit on the disk: the copy is worth more than the snapshot. Without the undo
    /// snapshot of a resync there is no copy: it is waited for room. False where that is impossible.
    pub(crate) fn no_room_to_save(&mut self, error: &IoError, out: &mut Output) -> bool {
        let resync = self.needs_undo();
        if resync && (self.closing || self.pressure() == Pressure::Full) {
            return false;
        }
        if resync && self.no_room.is_none() {
            self.no_room = Some(NoRoom { pause: FIRST_PAUSE, error: error.clone() });
            out.events.push(StoreEvent::NoRoom(error.clone()));
        }
        let round = self.round.as_mut().expect("pages are saved for a round");
        round.no_room = true;
        round.to_save.clear();
        self.round_step_done(out);
        true
    }

    /// The round goes back to where nothing of it is on the disk that anybody relies on, and stays there until
    /// [`Timers`](crate::timers::Timers) has it go on. The image is as it was.
    fn wait_for_room(&mut self, mut round: Round, pause: Duration) {
        match round.stage {
            Stage::Save => {
                self.snapshots.release(std::mem::take(&mut round.saved));
                round.unwritten.clear();
                round.data_written = false;
                round.to_save = self.pages_to_save(&round.writes);
            }
            // A row that made it to the disk must go on being true: the same rows are written to the same place.
            Stage::WriteMap => {
                self.snapshots.unwrite(round.saved.len());
                round.stage = Stage::SyncData;
            }
            stage => unreachable!("nothing is saved while {stage:?}"),
        }
        self.round = Some(round);
        self.timers.wait_for_room(pause);
    }

    /// Whether a resync waits for room on the disk.
    pub fn waits_for_room(&self) -> bool {
        self.no_room.is_some()
    }

    pub(crate) fn round_step_done(&mut self, out: &mut Output) {
        self.round.as_mut().expect("a round's command completes while it runs").waiting -= 1;
        self.advance_round(out);
    }

    /// Old pages were read: put them aside.
    pub(crate) fn pages_to_save_read(&mut self, run: PageRun, data: Slice, out: &mut Output) {
        let place = (!is_zero(&data)).then(|| self.snapshots.take_place(run));
        let saved = SavedRun::new(run, self.snapshots.newest_lsn(), place, &data);
        let round = self.round.as_mut().expect("pages are saved for a round");
        round.saved.push(saved);
        round.unwritten.extend(place.map(|place| (place, data)));
        self.round_step_done(out);
    }

    /// Writes what was read aside, neighbours together.
    fn write_saved(&mut self, round: &mut Round, out: &mut Output) {
        round.unwritten.sort_unstable_by_key(|(place, _)| *place);
        let mut write: Option<(u64, u64, Vec<Slice>)> = None;
        let mut writes = Vec::new();
        for (place, data) in round.unwritten.drain(..) {
            let (offset, len) = (place.offset(), data.len() as u64);
            match &mut write {
                Some((_, end, parts)) if *end == offset => {
                    *end += len;
                    parts.push(data);
                }
                _ => writes.extend(write.replace((offset, offset + len, vec![data]))),
            }
        }
        for (offset, _, data) in writes.into_iter().chain(write) {
            round.data_written = true;
            round.waiting += 1;
            let op = IoOp::Write { file: FileId::SnapshotData, offset, data };
            self.issue(IoClass::Background, op, Pending::Save, out);
        }
    }

    pub(crate) fn advance_round(&mut self, out: &mut Output) {
        while self.round.as_ref().is_some_and(|round| round.waiting == 0) {
            let mut round = self.round.take().expect("just seen");
            if std::mem::take(&mut round.no_room) {
                if let Some(no_room) = &mut self.no_room {
                    let pause = no_room.pause;
                    no_room.pause = (pause * 2).min(LONGEST_PAUSE);
                    return self.wait_for_room(round, pause);
                }
                round.stage = Stage::DropSnapshots;
            }
            match round.stage {
                Stage::Save => {
                    if !round.unwritten.is_empty() {
                        self.write_saved(&mut round, out);
                    }
                    if round.to_save.is_empty() && round.waiting > 0 {
                        // For what was just begun to be written.
                    } else if round.to_save.is_empty() {
                        let durably = self.superblock.syncing.is_some() && !round.saved.is_empty();
                        if !durably {
                            round.stage = Stage::Image;
                            self.save_done(&mut round);
                            self.issue_image_writes(&mut round, out);
                        } else {
                            round.stage = Stage::SyncData;
                            if round.data_written {
                                let op = IoOp::Sync { file: FileId::SnapshotData };
                                self.issue_for_round(&mut round, op, out);
                            }
                        }
                    } else {
                        let keep = round.to_save.len().saturating_sub(SAVE_AT_ONCE);
                        for run in round.to_save.split_off(keep).into_iter().rev() {
                            round.waiting += 1;
                            let file = FileId::Image(run.disk);
                            let op = IoOp::Read { file, offset: run.offset(), len: run.len() };
                            self.issue(IoClass::Background, op, Pending::SaveRead(run), out);
                        }
                    }
                    self.round = Some(round);
                }
                Stage::SyncData => {
                    round.stage = Stage::WriteMap;
                    for (offset, page) in
                        self.snapshots.encode(&round.saved, self.superblock.snapshot_generation)
                    {
                        let op = IoOp::Write { file: FileId::SnapshotMap, offset, data: vec![page] };
                        round.waiting += 1;
                        self.issue(IoClass::Background, op, Pending::Save, out);
                    }
                    self.round = Some(round);
                }
                Stage::WriteMap => {
                    round.stage = Stage::SyncMap;
                    self.issue_for_round(&mut round, IoOp::Sync { file: FileId::SnapshotMap }, out);
                    self.round = Some(round);
                }
                Stage::SyncMap => {
                    round.stage = Stage::Image;
                    if self.no_room.take().is_some() {
                        out.events.push(StoreEvent::RoomAgain);
                    }
                    self.save_done(&mut round);
                    self.issue_image_writes(&mut round, out);
                    self.round = Some(round);
                }
                Stage::DropSnapshots => {
                    assert!(self.superblock.syncing.is_none(), "a resync's undo snapshot is waited for");
                    round.stage = Stage::Image;
                    (round.to_save, round.saved) = (Vec::new(), Vec::new());
                    round.unwritten.clear();
                    let why = round.loss;
                    let lost = self.snapshots.open.iter();
                    out.events.extend(lost.map(|&(snapshot, _)| StoreEvent::SnapshotLost { snapshot, why }));
                    self.snapshots.clear();
                    let op = IoOp::SetLen { file: FileId::SnapshotData, len: 0 };
                    self.issue_for_round(&mut round, op, out);
                    self.issue_image_writes(&mut round, out);
                    self.round = Some(round);
                }
                Stage::Image => {
                    self.finish_round(round, out);
                    return;
                }
            }
        }
    }

    /// From here on readers of snapshots find what was put aside there, before the image changes.
    fn save_done(&mut self, round: &mut Round) {
        self.snapshots.keep(std::mem::take(&mut round.saved));
    }

    fn issue_for_round(&mut self, round: &mut Round, op: IoOp, out: &mut Output) {
        round.waiting += 1;
        self.issue(IoClass::Background, op, Pending::Round, out);
    }

    /// Writes the merged pieces, in order of place, neighbours together.
    fn issue_image_writes(&mut self, round: &mut Round, out: &mut Output) {
        for (disk, map) in std::mem::take(&mut round.writes) {
            self.images_dirty.insert(disk);
            round.writes.insert(disk, IntervalMap::default());
            let file = FileId::Image(disk);
            let mut run: Option<(u64, u64, Vec<Slice>)> = None;
            for (start, piece) in map.into_pieces() {
                match piece.content {
                    Content::Data(data) => match &mut run {
                        Some((from, end, parts)) if *end == start && piece.end - *from <= MAX_WRITE => {
                            *end = piece.end;
                            match parts.last_mut() {
                                Some(last) if last.joins(&data) => last.extend(&data),
                                _ => parts.push(data),
                            }
                        }
                        _ => {
                            if let Some((offset, _, data)) = run.take() {
                                self.issue_for_round(round, IoOp::Write { file, offset, data }, out);
                            }
                            run = Some((start, piece.end, vec![data]));
                        }
                    },
                    Content::Zero { punch } => {
                        let op = IoOp::Zero { file, offset: start, len: piece.end - start, punch };
                        self.issue_for_round(round, op, out);
                    }
                }
            }
            if let Some((offset, _, data)) = run {
                self.issue_for_round(round, IoOp::Write { file, offset, data }, out);
            }
        }
    }

    fn finish_round(&mut self, round: Round, out: &mut Output) {
        // A checkpoint that ran meanwhile synced some of these writes at most.
        self.images_dirty.extend(round.writes.keys().copied());
        for token in round.tokens {
            out.events.push(StoreEvent::ExtentWritten(token));
        }
        if round.target > self.applied {
            self.forget_applied(round.target);
            self.applied = round.target;
            out.events.push(StoreEvent::Applied(round.target));
        }
        self.open_due_snapshots(out);
        self.apply_now &= self.apply_bound() > self.applied;
        self.apply_more(out);
        self.advance_task(out);
        self.checkpoint_if_due(out);
    }

    /// The image has these records: reads find them there, memory lets them go.
    fn forget_applied(&mut self, target: Lsn) {
        for entry in self.window.between(self.applied, target) {
            for record in entry.batch.records().filter(|record| record.kind.changes_disk()) {
                if let Some(index) = self.index.get_mut(&record.disk) {
                    index.forget(record.offset, record.offset + record.len, target);
                }
            }
        }
        let before = self.window.bytes();
        if let Some(position) = self.window.drop_to(target) {
            self.applied_position = position;
        }
        self.bytes_since_checkpoint += before - self.window.bytes();
    }
}

//! Work that takes several steps and runs one at a time: checkpoints and everything that ends in one,
//! truncation, closing a snapshot, changes of the disk table.
//!
//! A step issues commands and waits for all of them; then the next step runs. Every task but truncation and
//! disk changes begins as a checkpoint:
//!
//! ```text
//! capture position ─► sync images ─► write change map pages ─► sync maps ─► [purpose's own files] ─► superblock
//! ```

use crate::batch::ChainValue;
use crate::event::{Output, SnapshotId, StoreEvent, Token};
use crate::io::{FileId, IoClass, IoOp, IoOutput};
use crate::journal::Prepared;
use crate::params::DiskEntry;
use crate::segment::{BATCHES_START, SegmentHeader};
use crate::store::{CONFIG_SLOT_SIZE, Pending, Store};
use crate::superblock::{ConfigPlace, JournalPosition, Syncing, config_checksum};
use crate::superblock_writer::Waiter;
use rempart_types::{DiskIndex, Lineage, LogPosition, Lsn};

/// What a task is for.
#[derive(Debug, Clone)]
pub(crate) enum Purpose {
    Checkpoint,
    CloseSnapshot(SnapshotId),
    BeginResync(SnapshotId),
    StartLog {
        from: LogPosition,
        chain: Option<ChainValue>,
        lineage: Lineage,
    },
    /// The undo snapshot goes with it.
    EndResync(SnapshotId),
    Truncate(Lsn),
    AddDisk(Token, DiskEntry),
    RemoveDisk(Token, DiskIndex),
    ResizeDisk(Token, DiskIndex, u64),
    Close,
}

#[derive(Debug)]
pub(crate) struct Task {
    pub purpose: Purpose,
    step: u8,
    waiting: usize,
    /// The image's position that this checkpoint makes durable, and where the log goes on from there.
    applied: Lsn,
    position: JournalPosition,
    config: Option<ConfigPlace>,
    fresh: Option<Prepared>,
}

impl Store {
    pub(crate) fn queue_task(&mut self, purpose: Purpose, out: &mut Output) {
        self.tasks.push_back(purpose);
        self.apply_more(out);
        self.advance_task(out);
    }

    pub(crate) fn task_step_done(&mut self, out: &mut Output) {
        if let Some(task) = &mut self.task {
            task.waiting -= 1;
        }
        self.advance_task(out);
    }

    /// Whether a queued task waits for the image to take everything it may.
    pub(crate) fn wants_everything_applied(&self) -> bool {
        !self.openings.is_empty()
            || self.tasks.iter().any(|purpose| {
                matches!(purpose, Purpose::BeginResync(_) | Purpose::StartLog { .. } | Purpose::Close)
            })
    }

    /// Whether a queued task waits for application to pause between two rounds.
    pub(crate) fn wants_quiet(&self) -> bool {
        self.tasks.iter().any(|purpose| {
            matches!(purpose, Purpose::CloseSnapshot(_) | Purpose::RemoveDisk(..) | Purpose::EndResync(_))
        })
    }

    /// Whether a queued task may start now.
    fn is_ready(&self, purpose: &Purpose) -> bool {
        let quiet = self.round.is_none();
        match purpose {
            Purpose::Checkpoint | Purpose::AddDisk(..) | Purpose::ResizeDisk(..) => true,
            Purpose::CloseSnapshot(_) | Purpose::RemoveDisk(..) | Purpose::EndResync(_) => quiet,
            Purpose::BeginResync(_) => {
                // A copy that is syncing has its old state aside already; its log will be dropped.
                let kept = self.superblock.syncing.is_some() || self.applied == self.journal.log_end;
                quiet && kept && self.incoming.is_empty()
            }
            Purpose::StartLog { .. } => {
                quiet
                    && self.incoming.is_empty()
                    && self.journal.preparing.is_none()
                    && self.journal.removing == 0
            }
            Purpose::Truncate(_) => {
                self.journal.in_flight.is_empty()
                    && self.journal.syncing.is_none()
                    && self.journal.preparing.is_none()
                    && self.journal.removing == 0
            }
            Purpose::Close => {
                let end = self.journal.durable == self.journal.log_end;
                let bound = self.stable_told.min(self.journal.durable);
                let applied = self.window.floor(bound).is_none_or(|bound| bound <= self.applied);
                quiet && end && applied && self.incoming.is_empty() && self.journal.preparing.is_none()
            }
        }
    }

    fn start_task(&mut self) -> bool {
        if self.task.is_some() || self.failed.is_some() {
            return false;
        }
        let Some(ready) = self.tasks.iter().position(|purpose| self.is_ready(purpose)) else {
            return false;
        };
        let purpose = self.tasks.remove(ready).expect("just found");
        self.apply_held = matches!(
            purpose,
            Purpose::CloseSnapshot(_)
                | Purpose::BeginResync(_)
                | Purpose::StartLog { .. }
                | Purpose::RemoveDisk(..)
                | Purpose::EndResync(_)
                | Purpose::Close
        );
        let (applied, position) = (self.applied, self.applied_position);
        self.task = Some(Task { purpose, step: 0, waiting: 0, applied, position, config: None, fresh: None });
        true
    }

    /// Runs the task's next steps, and the next tasks, as far as nothing has to be waited for.
    pub(crate) fn advance_task(&mut self, out: &mut Output) {
        loop {
            let Some(task) = &self.task else {
                if self.start_task() {
                    continue;
                }
                return;
            };
            if task.waiting > 0 || self.failed.is_some() {
                return;
            }
            let mut task = self.task.take().expect("just seen");
            let step = task.step;
            task.step += 1;
            let done = match task.purpose {
                Purpose::Truncate(lsn) => self.truncate_step(&mut task, step, lsn, out),
                Purpose::AddDisk(..) | Purpose::RemoveDisk(..) | Purpose::ResizeDisk(..) => {
                    self.disk_step(&mut task, step, out)
                }
                Purpose::CloseSnapshot(id) => self.close_snapshot_step(&mut task, step, id, out),
                _ => self.checkpoint_step(&mut task, step, out),
            };
            // A superblock version may be waited for: its waiter finds the task here.
            if done {
                self.apply_held = false;
                self.apply_more(out);
                self.trim(out);
                self.arm_timers();
            } else {
                self.task = Some(task);
            }
        }
    }

    pub(crate) fn issue_for_task(&mut self, task: &mut Task, op: IoOp, out: &mut Output) {
        task.waiting += 1;
        self.issue(IoClass::Background, op, Pending::Task, out);
    }

    /// Asks for a superblock version. Its receipt never comes at once, so the task is back in its place.
    pub(crate) fn task_superblock(&mut self, task: &mut Task, out: &mut Output) {
        task.waiting += 1;
        self.write_superblock(Waiter::Task, out);
    }

    fn checkpoint_step(&mut self, task: &mut Task, step: u8, out: &mut Output) -> bool {
        match step {
            0 => {
                for disk in std::mem::take(&mut self.images_dirty) {
                    if self.maps.contains_key(&disk) {
                        self.issue_for_task(task, IoOp::Sync { file: FileId::Image(disk) }, out);
                    }
                }
                // Later rounds count for the next checkpoint.
                self.bytes_since_checkpoint = 0;
            }
            1 => self.write_maps(task, out),
            2 => {
                for disk in std::mem::take(&mut self.maps_written) {
                    self.issue_for_task(task, IoOp::Sync { file: FileId::ChangeMap(disk) }, out);
                }
                if task.config.is_some() {
                    self.issue_for_task(task, IoOp::Sync { file: FileId::Config }, out);
                }
            }
            3 => self.purpose_files(task, out),
            4 => {
                self.superblock.applied = task.applied;
                self.superblock.redo = task.position;
                self.superblock.checkpoint += 1;
                if task.config.is_some() {
                    self.superblock.config = task.config;
                }
                self.trust_claims_again();
                self.purpose_superblock(task);
                self.task_superblock(task, out);
            }
            5 => self.purpose_cleanup(task, out),
            _ => {
                self.purpose_report(task, out);
                return true;
            }
        }
        false
    }

    fn write_maps(&mut self, task: &mut Task, out: &mut Output) {
        let checkpoint = self.superblock.checkpoint + 1;
        let mut writes = Vec::new();
        for (&disk, map) in self.maps.iter_mut().filter(|(_, map)| map.is_dirty()) {
            self.maps_written.insert(disk);
            writes.extend(map.take_dirty(checkpoint).into_iter().map(|(offset, page)| (disk, offset, page)));
        }
        for (disk, offset, page) in writes {
            let op = IoOp::Write { file: FileId::ChangeMap(disk), offset, data: vec![page] };
            self.issue_for_task(task, op, out);
        }
        // A round that runs meanwhile may have taken a newer one than this checkpoint's position includes.
        let newest = self.superblock.config.map(|config| config.lsn);
        if let Some((lsn, definition)) = self.config_applied.clone()
            && Some(lsn) != newest
            && lsn <= task.applied
        {
            let slot = self.superblock.config.map_or(0, |config| 1 - config.slot);
            let len = definition.len() as u32;
            task.config = Some(ConfigPlace { lsn, slot, len, checksum: config_checksum(&definition) });
            let offset = u64::from(slot) * CONFIG_SLOT_SIZE;
            self.issue_for_task(
                task,
                IoOp::Write { file: FileId::Config, offset, data: vec![definition] },
                out,
            );
        }
    }

    /// Files that must be there before the superblock speaks of them.
    fn purpose_files(&mut self, task: &mut Task, out: &mut Output) {
        match task.purpose {
            Purpose::StartLog { .. } => {
                let fresh = Prepared { slot: self.journal.next_slot, sequence: self.journal.next_sequence };
                self.journal.next_slot += 1;
                self.journal.next_sequence += 1;
                let (group, size) = (self.superblock.group, self.superblock.segment_size);
                let head = SegmentHeader { group, sequence: fresh.sequence, size }.encode();
                task.fresh = Some(fresh);
                self.issue_for_task(
                    task,
                    IoOp::Create { file: FileId::Segment(fresh.slot), len: size, head },
                    out,
                );
            }
            Purpose::Close => {
                for disk in self.maps.keys().copied().collect::<Vec<_>>() {
                    task.waiting += 1;
                    let op = IoOp::Stat { file: FileId::Image(disk) };
                    self.issue(IoClass::Background, op, Pending::CloseStat(disk), out);
                }
            }
            _ => {}
        }
    }

    pub(crate) fn close_stat(&mut self, disk: DiskIndex, output: &IoOutput, out: &mut Output) {
        if let IoOutput::Stat(stat) = output
            && let Some(row) = self.superblock.disks.iter_mut().find(|row| row.entry.index == disk)
        {
            row.noted = (stat.len, stat.modified_ns);
        }
        self.task_step_done(out);
    }

    fn purpose_superblock(&mut self, task: &Task) {
        match &task.purpose {
            Purpose::BeginResync(undo) => {
                if let Some(syncing) = &mut self.superblock.syncing {
                    syncing.log_until = None;
                } else {
                    self.superblock.syncing = Some(Syncing {
                        undo: *undo,
                        old_lsn: task.applied,
                        old_lineage: self.superblock.lineage.clone(),
                        log_until: None,
                        until: Lsn::ZERO,
                    });
                }
            }
            Purpose::StartLog { from, chain, lineage } => {
                let fresh = task.fresh.expect("made in an earlier step");
                self.superblock.applied = from.lsn;
                self.superblock.redo =
                    JournalPosition { sequence: fresh.sequence, offset: BATCHES_START, chain: *chain };
                self.superblock.first_sequence = fresh.sequence;
                self.superblock.lineage = lineage.clone();
                self.superblock.damage = None;
                self.superblock.claims_since = None;
                let until = self.extents_until.max(from.lsn);
                let syncing = self.superblock.syncing.as_mut().expect("extents come to a syncing copy");
                syncing.until = until;
                syncing.log_until = Some(until);
                self.restart_journal(*from);
            }
            Purpose::EndResync(_) => {
                self.superblock.syncing.take().expect("checked before it was queued");
                // What the map file holds is void from now on.
                self.superblock.snapshot_generation += 1;
                for row in &mut self.superblock.disks {
                    row.suspect = false;
                }
            }
            Purpose::Close => self.superblock.clean = true,
            _ => {}
        }
    }

    /// The old log is gone from memory; its files follow once the superblock is durable.
    fn restart_journal(&mut self, from: LogPosition) {
        self.window = Default::default();
        self.index.clear();
        self.applied = from.lsn;
        self.applied_position = self.superblock.redo;
        self.stable_told = from.lsn;
        self.committed_told = from.lsn;
        self.indexed = from.lsn;
        self.serve_after = Lsn::ZERO;
        self.image_may_hold = Lsn::ZERO;
        let journal = &mut self.journal;
        journal.log_end = from.lsn;
        journal.term = from.term;
        journal.chain = self.applied_position.chain;
        journal.accepted = from.lsn;
        journal.durable = from.lsn;
        journal.unbacked_to = Lsn::ZERO;
        journal.sync_next = None;
        journal.sync_later = None;
    }

    fn purpose_cleanup(&mut self, task: &mut Task, out: &mut Output) {
        match task.purpose {
            Purpose::StartLog { .. } => {
                let old: Vec<u64> = self
                    .journal
                    .segments
                    .drain(..)
                    .map(|segment| segment.slot)
                    .chain(self.journal.prepared.drain(..).map(|prepared| prepared.slot))
                    .collect();
                self.journal.prepared.extend(task.fresh);
                for slot in old {
                    self.issue_for_task(task, IoOp::Remove { file: FileId::Segment(slot) }, out);
                }
            }
            Purpose::EndResync(undo) => {
                self.snapshots.restart_map();
                self.issue_for_task(task, IoOp::SetLen { file: FileId::SnapshotMap, len: 0 }, out);
                self.let_go_of_snapshot(task, undo, out);
            }
            Purpose::BeginResync(_) => {
                let syncing = self.superblock.syncing.as_ref().expect("set in an earlier step");
                self.snapshots.open_undo(syncing.undo, syncing.old_lsn);
            }
            _ => {}
        }
    }

    fn purpose_report(&mut self, task: &Task, out: &mut Output) {
        if task.applied > Lsn::ZERO && !matches!(task.purpose, Purpose::StartLog { .. }) {
            out.events.push(StoreEvent::Checkpointed(task.applied));
        }
        match &task.purpose {
            Purpose::BeginResync(_) => {
                let syncing = self.superblock.syncing.as_ref().expect("set in an earlier step");
                self.resync_beginning = false;
                self.extents_until = syncing.until;
                out.events.push(StoreEvent::ResyncBegun { undo: syncing.undo, at: syncing.old_lsn });
            }
            Purpose::StartLog { from, .. } => {
                self.log_restarting = false;
                out.events.push(StoreEvent::ResyncLogStarted { from: *from });
            }
            Purpose::EndResync(_) => out.events.push(StoreEvent::ResyncEnded),
            Purpose::Close => out.events.push(StoreEvent::Closed),
            _ => {}
        }
        self.refresh_health();
    }

    fn close_snapshot_step(&mut self, task: &mut Task, step: u8, id: SnapshotId, out: &mut Output) -> bool {
        match step {
            0 => self.let_go_of_snapshot(task, id, out),
            _ => {
                out.events.push(StoreEvent::SnapshotClosed(id));
                return true;
            }
        }
        false
    }

    /// What only the closed one needed is given back. An undo snapshot's end is durable before.
    fn let_go_of_snapshot(&mut self, task: &mut Task, id: SnapshotId, out: &mut Output) {
        self.snapshots.open.retain(|(open, _)| *open != id);
        if self.snapshots.open.is_empty() {
            self.snapshots.clear();
            self.issue_for_task(task, IoOp::SetLen { file: FileId::SnapshotData, len: 0 }, out);
        } else {
            self.snapshots.drop_unneeded();
        }
    }

    fn disk_step(&mut self, task: &mut Task, step: u8, out: &mut Output) -> bool {
        match (step, task.purpose.clone()) {
            (0, Purpose::AddDisk(_, entry)) => {
                for op in crate::format::disk_files(&entry) {
                    self.issue_for_task(task, op, out);
                }
            }
            (0, Purpose::ResizeDisk(_, disk, size)) => {
                self.issue_for_task(task, IoOp::SetLen { file: FileId::Image(disk), len: size }, out);
                let len = crate::change_map::ChangeMap::file_len(crate::store::extent_count(size));
                self.issue_for_task(task, IoOp::SetLen { file: FileId::ChangeMap(disk), len }, out);
            }
            (1, Purpose::AddDisk(_, DiskEntry { index, .. }) | Purpose::ResizeDisk(_, index, _)) => {
                for file in [FileId::Image(index), FileId::ChangeMap(index)] {
                    self.issue_for_task(task, IoOp::Sync { file }, out);
                }
            }
            (2, purpose) => {
                self.change_disk_table(&purpose);
                self.task_superblock(task, out);
            }
            (3, Purpose::RemoveDisk(_, disk)) => {
                self.issue_for_task(task, IoOp::Remove { file: FileId::ChangeMap(disk) }, out);
            }
            (
                4,
                Purpose::AddDisk(token, _) | Purpose::RemoveDisk(token, _) | Purpose::ResizeDisk(token, ..),
            ) => {
                out.events.push(StoreEvent::DisksChanged(token));
                return true;
            }
            _ => {}
        }
        false
    }
}

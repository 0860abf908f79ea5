//! The store of one group: its state, and the operations that start everything else.

use crate::apply::{IncomingExtent, NoRoom, Round};
use crate::batch::{Batch, BatchPlace, ChainValue, MAX_BATCH_LEN};
use crate::change_map::ChangeMap;
use crate::event::{AppendError, Output, PinId, Refused, SnapshotId, StoreEvent, StoreFailure, Token};
use crate::interval::IntervalMap;
use crate::io::{IoClass, IoCommand, IoCompletion, IoError, IoErrorKind, IoId, IoOp, IoOutput};
use crate::journal::Journal;
use crate::params::{DiskEntry, Limits};
use crate::read::{GuestRead, LogRead};
use crate::recovery_rows::RecoveryRows;
use crate::resync::ExtentRead;
use crate::segment::BATCHES_START;
use crate::snapshot::{OldRead, PageRun, Snapshots};
use crate::superblock::{JournalPosition, MAX_CONTROL, Superblock, SuperblockChange};
use crate::superblock_writer::{SuperblockWriter, Waiter};
use crate::task::{Purpose, Task};
use crate::timers::Timers;
use crate::window::Window;
use rempart_buffer::Slice;
use rempart_types::{
    DiskIndex, EXTENT_SIZE, GroupId, Lineage, LogPosition, Lsn, MonotonicTime, RegisterId, Term, WallTime,
};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;

/// How a store is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    pub limits: Limits,
    /// Give up an unfinished resync and go back to the state its undo snapshot kept (rule 14).
    /// Nothing happens if the copy is not syncing.
    pub roll_back: bool,
}

/// Why a store cannot be opened at all.
#[derive(Debug)]
pub enum OpenError {
    /// A file could not be read or written.
    Io { what: &'static str, source: IoError },
    /// Neither copy of the superblock is sound.
    Superblock,
    /// There is no store here.
    Unformatted,
    /// There is one already: it is never overwritten.
    Exists,
    /// A new, empty disk was asked for, but something is at its place.
    ImageExists(DiskIndex),
    /// The disks or sizes asked for are not possible.
    Parameters,
    /// Written by a newer program.
    Version(u32),
}

/// Why this copy cannot be trusted to hold what it acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The segment's file and the byte in it where the log breaks.
    pub segment: u64,
    pub offset: u64,
    /// The record that should start there.
    pub expected: Lsn,
    /// Records to here were claimed durable, by what is left or by another copy.
    pub claimed: Lsn,
}

/// How far a resync got before the restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncingPhase {
    /// Extents were coming; they must come again (any that already came are harmless).
    Extents,
    /// All extents are here; the log after them must reach `until`.
    Log { until: Lsn },
}

/// Whether this copy may serve, lead or be counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Image and log are a prefix of the history.
    Good,
    /// An unfinished resync: never admitted nor promoted.
    Syncing(SyncingPhase),
    /// Acknowledged records are missing: only a resync makes it whole.
    Damaged(Damage),
}

/// What recovery found.
#[derive(Debug, Clone)]
pub struct Recovered {
    pub group: GroupId,
    /// The last record of the log; all to here is durable.
    pub log_end: LogPosition,
    /// The image holds every record to here. Those after it, to `log_end`, wait in memory and must be
    /// committed in the new term (or cut off) before anything is read.
    pub applied: Lsn,
    /// Known to be durable on the whole in-sync set.
    pub stable: Lsn,
    pub lineage: Lineage,
    pub promise: Term,
    pub register: Option<RegisterId>,
    pub control: Vec<u8>,
    pub health: Health,
    /// The last stop was clean.
    pub clean: bool,
    /// Disks whose image changed while the store was closed: a full comparison is needed. Kept across
    /// restarts until a resync or [`SuperblockChange::images_trusted`] clears it.
    pub images_changed: Vec<DiskIndex>,
    pub disks: Vec<DiskEntry>,
    /// The last configuration record that the image's position includes.
    pub config: Option<(Lsn, Slice)>,
    /// Rows of the decision table that applied.
    pub rows: RecoveryRows,
    /// Bytes of torn tail that were cut off.
    pub torn_bytes: u64,
    /// An unfinished resync was rolled back just now.
    pub rolled_back: bool,
}

/// How much room the unapplied window has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pressure {
    /// Take more.
    Low,
    /// Over half full: sync, and tell peers to.
    High,
    /// Full: take no new writes until application catches up. Appends still work.
    Full,
}

/// Bytes reserved for each of the two configuration records beside the superblock.
pub(crate) const CONFIG_SLOT_SIZE: u64 = crate::batch::MAX_CONFIG as u64;

pub(crate) fn extent_count(size: u64) -> u64 {
    size.div_ceil(EXTENT_SIZE)
}

/// What a command is for.
#[derive(Debug)]
pub(crate) enum Pending {
    JournalWrite(Lsn),
    JournalSync,
    Prepare,
    RemoveSegment,
    Superblock,
    Round,
    SaveRead(PageRun),
    /// Writes to what snapshots keep.
    Save,
    Task,
    CloseStat(DiskIndex),
    GuestRead(u64, usize),
    LogRead(u64, LogRead),
    OldRead(OldRead),
    ExtentRead(ExtentRead),
}

impl Pending {
    /// What was being done, for the one who reads the error.
    fn verb(&self) -> &'static str {
        match self {
            Pending::JournalWrite(_) => "write the journal",
            Pending::JournalSync => "make the journal durable",
            Pending::Prepare => "prepare a journal segment",
            Pending::RemoveSegment => "remove a journal segment",
            Pending::Superblock => "write the superblock",
            Pending::Round => "apply the log to the image",
            Pending::SaveRead(_) => "read pages for a snapshot",
            Pending::Save => "save pages for a snapshot",
            Pending::Task | Pending::CloseStat(_) => "take a checkpoint",
            Pending::GuestRead(..) | Pending::ExtentRead(_) => "read the image",
            Pending::LogRead(..) => "read the journal",
            Pending::OldRead(_) => "read a snapshot",
        }
    }
}

/// One group's store.
pub struct Store {
    pub(crate) limits: Limits,
    /// As it will be written next; as it is being written; as it durably is.
    pub(crate) superblock: Superblock,
    pub(crate) superblock_writing: Superblock,
    pub(crate) superblock_written: Superblock,
    pub(crate) superblock_writer: SuperblockWriter,
    pub(crate) disk_table: Vec<DiskEntry>,
    pub(crate) health: Health,
    pub(crate) journal: Journal,
    /// The journal's older part, before this record, is damaged or gone.
    pub(crate) journal_from: Lsn,
    pub(crate) window: Window,
    /// Committed records that are not in the image.
    pub(crate) index: BTreeMap<DiskIndex, IntervalMap>,
    /// Records to here are in the index or the image.
    pub(crate) indexed: Lsn,
    /// Recovered records to here must be committed before anything is read.
    pub(crate) serve_after: Lsn,
    pub(crate) stable_told: Lsn,
    pub(crate) committed_told: Lsn,
    pub(crate) applied: Lsn,
    pub(crate) applied_position: JournalPosition,
    /// After a crash the image may hold records to here, though `applied` is less: nothing that needs an
    /// exact position is done before.
    pub(crate) image_may_hold: Lsn,
    pub(crate) maps: BTreeMap<DiskIndex, ChangeMap>,
    pub(crate) maps_written: BTreeSet<DiskIndex>,
    pub(crate) images_dirty: BTreeSet<DiskIndex>,
    pub(crate) bytes_since_checkpoint: u64,
    pub(crate) round: Option<Round>,
    /// A task needs the image to stand still.
    pub(crate) apply_held: bool,
    /// A resync's round waits for room on the disk.
    pub(crate) no_room: Option<NoRoom>,
    /// Apply what there is, even if it is little.
    pub(crate) apply_now: bool,
    pub(crate) incoming: VecDeque<IncomingExtent>,
    pub(crate) extents_until: Lsn,
    pub(crate) resync_beginning: bool,
    pub(crate) log_restarting: bool,
    pub(crate) snapshots: Snapshots,
    pub(crate) openings: Vec<(SnapshotId, Lsn)>,
    pub(crate) task: Option<Task>,
    pub(crate) tasks: VecDeque<Purpose>,
    pub(crate) truncating: bool,
    pub(crate) truncate_position: JournalPosition,
    pub(crate) truncated_slot: Option<u64>,
    pub(crate) closing: bool,
    pub(crate) config_applied: Option<(Lsn, Slice)>,
    pub(crate) config_committed: Option<(Lsn, Slice)>,
    pub(crate) pending: HashMap<IoId, Pending>,
    pub(crate) next_io: u64,
    pub(crate) guest_reads: HashMap<u64, GuestRead>,
    pub(crate) log_reads: BTreeSet<u64>,
    pub(crate) timers: Timers,
    pub(crate) failed: Option<Arc<StoreFailure>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("log_end", &self.journal.log_end)
            .field("accepted", &self.journal.accepted)
            .field("durable", &self.journal.durable)
            .field("stable", &self.stable_told)
            .field("committed", &self.committed_told)
            .field("applied", &self.applied)
            .field("checkpointed", &self.superblock_written.applied)
            .field("health", &self.health)
            .field("task", &self.task)
            .field("pending", &self.pending.len())
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

impl Store {
    // --- the log ---

    /// Where the batch to be sealed next stands. `term` is the caller's; `clock` its wall clock.
    pub fn next_place(&self, term: Term, clock: WallTime) -> BatchPlace {
        BatchPlace {
            group: self.superblock.group,
            term,
            first: self.journal.log_end.next(),
            stable: self.stable_here(),
            wall: clock.max(self.journal.wall),
            clock,
            previous: self.chain(),
        }
    }

    /// Bytes a batch may have here.
    pub fn max_batch_len(&self) -> usize {
        (self.superblock.segment_size - BATCHES_START).min(MAX_BATCH_LEN as u64) as usize
    }

    /// Takes the log's next batch: [`StoreEvent::Accepted`](crate::StoreEvent) follows.
    pub fn append(&mut self, batch: &Batch, out: &mut Output) -> Result<(), AppendError> {
        self.check_append(batch)?;
        self.append_checked(batch, out);
        // The log that follows the extents goes on while they wait, as long as there is memory for it.
        if self.pressure() == Pressure::Full {
            self.give_up_waiting(out);
        }
        Ok(())
    }

    /// Makes everything appended so far durable: `Durable` follows, unless it is already. Calls while a sync
    /// runs are merged.
    pub fn sync(&mut self, out: &mut Output) {
        if self.failed.is_some() {
            return;
        }
        self.note_flush();
        self.want_sync(out);
    }

    /// Records to `lsn` are durable on the whole in-sync set (may be beyond what is here): they are committed,
    /// and may be applied once durable here. The log here must be the history's, as far as `lsn`: what is not
    /// has to be truncated before.
    pub fn stable_is(&mut self, lsn: Lsn, out: &mut Output) {
        if self.failed.is_some() || lsn <= self.stable_told {
            return;
        }
        self.stable_told = lsn;
        self.committed_is(lsn);
        self.apply_more(out);
        self.advance_task(out);
    }

    /// Records to `lsn` are committed: from now on reads see them.
    pub fn committed_is(&mut self, lsn: Lsn) {
        if lsn > self.committed_told {
            self.committed_told = lsn;
            self.index_committed();
        }
    }

    /// Keeps the journal after `after` for a reader, up to the limit's bound; moves an existing pin.
    pub fn pin(&mut self, pin: PinId, after: Lsn) {
        self.journal.pins.insert(pin, after);
    }

    pub fn unpin(&mut self, pin: PinId, out: &mut Output) {
        self.journal.pins.remove(&pin);
        self.trim(out);
    }

    // --- superblock ---

    /// Makes a change durable: `Persisted` is the receipt.
    ///
    /// # Panics
    /// If it would lower the promise, or the control state is over 16 KiB.
    pub fn persist(&mut self, token: Token, change: SuperblockChange, out: &mut Output) {
        if self.failed.is_some() {
            return;
        }
        if let Some(promise) = change.promise {
            assert!(promise >= self.superblock.promise, "a replica never un-promises: {promise}");
            self.superblock.promise = promise;
        }
        if let Some(register) = change.register {
            self.superblock.register = Some(register);
        }
        if let Some(control) = change.control {
            assert!(control.len() <= MAX_CONTROL, "a control state of {} bytes", control.len());
            self.superblock.control = control;
        }
        if change.images_trusted {
            for row in &mut self.superblock.disks {
                row.suspect = false;
            }
        }
        if let Some(claimed) = change.lost_to.filter(|lsn| *lsn > self.journal.log_end) {
            let end = self.journal.segments.back().map(|segment| (segment.slot, segment.end));
            let (segment, offset) = end.unwrap_or_default();
            let expected = self.journal.log_end.next();
            self.superblock.damage.get_or_insert(Damage { segment, offset, expected, claimed });
            self.refresh_health();
        }
        self.write_superblock(Waiter::Persist(token), out);
    }

    // --- running ---

    /// Takes the result of a command.
    pub fn complete(&mut self, completion: IoCompletion, out: &mut Output) {
        let Some(pending) = self.pending.remove(&completion.id) else {
            // After a failure nothing is waited for.
            assert!(self.failed.is_some(), "the completion of a command that was never issued");
            return;
        };
        let output = match completion.result {
            Ok(output) => output,
            Err(error) => return self.command_failed(pending, error, out),
        };
        match (pending, output) {
            (Pending::JournalWrite(last), _) => self.journal_written(last, out),
            (Pending::JournalSync, _) => self.journal_synced(out),
            (Pending::Prepare, _) => self.segment_prepared(out),
            (Pending::RemoveSegment, _) => {
                self.journal.removing -= 1;
                self.trim(out);
                self.advance_task(out);
            }
            (Pending::Superblock, _) => self.superblock_stepped(out),
            (Pending::Round | Pending::Save, _) => self.round_step_done(out),
            (Pending::Task, _) => self.task_step_done(out),
            (Pending::CloseStat(disk), output) => self.close_stat(disk, &output, out),
            (Pending::SaveRead(run), IoOutput::Data(data)) => {
                self.pages_to_save_read(run, data.whole(), out);
            }
            (Pending::GuestRead(key, piece), IoOutput::Data(data)) => {
                self.guest_read_done(key, piece, Ok(data.whole()), out);
            }
            (Pending::LogRead(key, read), IoOutput::Data(data)) => {
                self.log_chunk_read(key, read, Ok(data.whole()), out);
            }
            (Pending::OldRead(read), IoOutput::Data(data)) => {
                self.old_extents_read(read, Ok(data.whole()), out)
            }
            (Pending::ExtentRead(read), IoOutput::Data(data)) => {
                self.extent_read(read, Ok(data.whole()), out)
            }
            (pending, _) => panic!("a read must be answered with data: {pending:?}"),
        }
    }

    /// A failed read is its reader's matter; everything else is the end of this replica's storage.
    fn command_failed(&mut self, pending: Pending, error: IoError, out: &mut Output) {
        match pending {
            Pending::GuestRead(key, piece) => self.guest_read_done(key, piece, Err(error), out),
            Pending::LogRead(key, read) => self.log_chunk_read(key, read, Err(error), out),
            Pending::OldRead(read) => self.old_extents_read(read, Err(error), out),
            Pending::ExtentRead(read) => self.extent_read(read, Err(error), out),
            Pending::Save if error.kind == IoErrorKind::Full && self.no_room_to_save(&error, out) => {}
            pending => self.fail(StoreFailure::new(pending.verb(), error), out),
        }
    }

    fn fail(&mut self, failure: StoreFailure, out: &mut Output) {
        self.failed = Some(Arc::new(failure.clone()));
        self.no_room = None;
        // Reads go on: the engine may need them to hand over.
        self.pending.retain(|_, pending| {
            matches!(
                pending,
                Pending::GuestRead(..) | Pending::LogRead(..) | Pending::OldRead(_) | Pending::ExtentRead(_)
            )
        });
        out.events.push(StoreEvent::Failed(failure));
    }

    /// A resync that waits for room on the disk is not waited for any longer.
    fn give_up_waiting(&mut self, out: &mut Output) {
        if let Some(NoRoom { error, .. }) = self.no_room.take() {
            self.fail(StoreFailure::new(Pending::Save.verb(), error), out);
        }
    }

    pub(crate) fn issue(&mut self, class: IoClass, op: IoOp, pending: Pending, out: &mut Output) {
        let id = IoId(self.next_io);
        self.next_io += 1;
        self.pending.insert(id, pending);
        out.commands.push(IoCommand { id, class, op });
    }

    /// Takes a checkpoint of everything applied, soon: `Checkpointed` follows.
    pub fn checkpoint(&mut self, out: &mut Output) {
        if self.check_running().is_err() || self.tasks.iter().any(|task| matches!(task, Purpose::Checkpoint))
        {
            return;
        }
        self.queue_task(Purpose::Checkpoint, out);
    }

    pub(crate) fn checkpoint_if_due(&mut self, out: &mut Output) {
        if self.bytes_since_checkpoint >= self.limits.checkpoint_every && self.task.is_none() {
            self.checkpoint(out);
        }
    }

    /// Syncs, applies everything stable, checkpoints, notes the images' size and change time: `Closed` follows.
    pub fn close(&mut self, out: &mut Output) {
        if self.check_running().is_err() {
            return;
        }
        // What it waits for may take forever.
        self.give_up_waiting(out);
        if self.failed.is_some() {
            return;
        }
        self.closing = true;
        self.want_sync(out);
        self.queue_task(Purpose::Close, out);
    }

    pub(crate) fn check_running(&self) -> Result<(), Refused> {
        if self.failed.is_some() || self.closing { Err(Refused::State) } else { Ok(()) }
    }

    pub(crate) fn disk_size(&self, disk: DiskIndex) -> Option<u64> {
        self.superblock.disk(disk).map(|row| row.entry.size)
    }

    /// Records known stable that are durable here too: what may be claimed.
    pub(crate) fn stable_here(&self) -> Lsn {
        self.stable_told.min(self.journal.durable)
    }

    pub(crate) fn refresh_health(&mut self) {
        self.health = health_of(&self.superblock);
        self.disk_table = self.superblock.disks.iter().map(|row| row.entry.clone()).collect();
    }

    // --- figures ---

    pub fn group(&self) -> GroupId {
        self.superblock.group
    }

    /// The log's last record, appended or accepted.
    pub fn log_end(&self) -> LogPosition {
        LogPosition { term: self.journal.term, lsn: self.journal.log_end }
    }

    pub fn chain(&self) -> ChainValue {
        self.journal.chain.unwrap_or_default()
    }

    pub fn accepted(&self) -> Lsn {
        self.journal.accepted
    }

    pub fn durable(&self) -> Lsn {
        self.journal.durable
    }

    /// The highest number told to be stable.
    pub fn stable(&self) -> Lsn {
        self.stable_told
    }

    /// By what the next batch names what ends where the image is, if that is known.
    pub fn applied_chain(&self) -> Option<ChainValue> {
        self.applied_position.chain
    }

    /// The highest number told to be committed.
    pub fn committed(&self) -> Lsn {
        self.committed_told
    }

    pub fn applied(&self) -> Lsn {
        self.applied
    }

    /// The last checkpoint's position.
    pub fn checkpointed(&self) -> Lsn {
        self.superblock_written.applied
    }

    pub fn lineage(&self) -> &Lineage {
        &self.superblock.lineage
    }

    /// The highest promise asked to be persisted; proof of durability is the receipt alone.
    pub fn promise(&self) -> Term {
        self.superblock.promise
    }

    pub fn disks(&self) -> &[DiskEntry] {
        &self.disk_table
    }

    /// The last committed configuration record.
    pub fn config(&self) -> Option<(Lsn, Slice)> {
        self.config_committed.clone()
    }

    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Open snapshots and their positions.
    pub fn snapshots(&self) -> &[(SnapshotId, Lsn)] {
        &self.snapshots.open
    }

    pub fn pressure(&self) -> Pressure {
        let bytes = self.unapplied_bytes();
        if bytes >= self.limits.window {
            Pressure::Full
        } else if bytes >= self.limits.window / 2 {
            Pressure::High
        } else {
            Pressure::Low
        }
    }

    /// Bytes of records that are not in the image yet.
    pub fn unapplied_bytes(&self) -> u64 {
        self.window.bytes()
    }

    /// Bytes the journal occupies.
    pub fn journal_bytes(&self) -> u64 {
        let preparing = u64::from(self.journal.preparing.is_some());
        let segments = self.journal.segments.len() + self.journal.prepared.len();
        (segments as u64 + preparing) * self.superblock.segment_size
    }

    /// The consistent state that an unfinished resync keeps aside, and opening with `roll_back` returns to.
    pub fn set_aside(&self) -> Option<LogPosition> {
        let syncing = self.superblock.syncing.as_ref()?;
        Some(syncing.old_lineage.position(syncing.old_lsn).expect("its own lineage knows the end of a log"))
    }

    /// Set once storage failed.
    pub fn failure(&self) -> Option<&Arc<StoreFailure>> {
        self.failed.as_ref()
    }

    /// When something is due by time.
    pub fn next_wake(&self) -> Option<MonotonicTime> {
        if self.failed.is_some() { None } else { self.timers.next() }
    }
}

pub(crate) fn health_of(superblock: &Superblock) -> Health {
    if let Some(syncing) = &superblock.syncing {
        Health::Syncing(match syncing.log_until {
            Some(until) => SyncingPhase::Log { until },
            None => SyncingPhase::Extents,
        })
    } else if let Some(damage) = &superblock.damage {
        Health::Damaged(damage.clone())
    } else {
        Health::Good
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::Io { what, source } => write!(f, "cannot {what}: {source}"),
            OpenError::Superblock => f.write_str("both copies of the superblock are damaged"),
            OpenError::Unformatted => f.write_str("there is no store here"),
            OpenError::Exists => f.write_str("there is a store here already"),
            OpenError::ImageExists(disk) => write!(f, "the image of disk {disk} exists already"),
            OpenError::Parameters => f.write_str("impossible disk or segment sizes"),
            OpenError::Version(version) => {
                write!(f, "the store was written by a newer program (version {version})")
            }
        }
    }
}

impl std::error::Error for OpenError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            OpenError::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the journal breaks in segment {} at byte {}: record {} is missing, though records to {} were \
             acknowledged as durable",
            self.segment, self.offset, self.expected, self.claimed
        )
    }
}

//! The store of one group: its public operations.

use crate::batch::{Batch, BatchPlace, ChainValue};
use crate::buffer::Slice;
use crate::event::{AppendError, Output, PinId, Refused, SnapshotId, StoreFailure, Token};
use crate::io::{Disk, IoCompletion, IoError};
use crate::params::{DiskEntry, FormatParams, Limits};
use crate::superblock::SuperblockChange;
use rempart_types::{
    DiskIndex, ExtentIndex, GroupId, Lineage, LogPosition, Lsn, MonotonicTime, RegisterId, Term, WallTime,
};
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
    /// Records to here were claimed durable by what is left.
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
    /// Snapshots that are still open, with their positions.
    pub snapshots: Vec<(SnapshotId, Lsn)>,
    pub disks: Vec<DiskEntry>,
    /// The last configuration record that the image's position includes.
    pub config: Option<(Lsn, Slice)>,
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

/// One group's store.
#[derive(Debug)]
pub struct Store {}

#[allow(unused_variables, clippy::todo)]
impl Store {
    /// Writes an empty store. Images are created or adopted, never overwritten, when their base says EXISTING.
    pub fn format(disk: &mut dyn Disk, params: &FormatParams) -> Result<(), OpenError> {
        todo!()
    }

    /// Recovers. Synchronous; everything it decides is durable when it returns.
    pub fn open(disk: &mut dyn Disk, options: &OpenOptions) -> Result<(Store, Recovered), OpenError> {
        todo!()
    }

    // --- the log ---

    /// Where the batch to be sealed next stands. `term` is the caller's; `clock` its wall clock.
    pub fn next_place(&self, term: Term, clock: WallTime) -> BatchPlace {
        todo!()
    }

    /// Bytes a batch may have here.
    pub fn max_batch_len(&self) -> usize {
        todo!()
    }

    /// Takes the log's next batch: [`StoreEvent::Accepted`](crate::StoreEvent) follows.
    pub fn append(&mut self, batch: &Batch, out: &mut Output) -> Result<(), AppendError> {
        todo!()
    }

    /// Makes everything appended so far durable: `Durable` follows. Calls while a sync runs are merged.
    pub fn sync(&mut self, out: &mut Output) {
        todo!()
    }

    /// Records to `lsn` are durable on the whole in-sync set (may be beyond what is here): they are committed,
    /// and may be applied once durable here.
    pub fn stable_is(&mut self, lsn: Lsn, out: &mut Output) {
        todo!()
    }

    /// Records to `lsn` are committed: from now on reads see them.
    pub fn committed_is(&mut self, lsn: Lsn) {
        todo!()
    }

    /// Drops every record after `lsn`, durably, before `Truncated` is reported. Appends are refused meanwhile.
    pub fn truncate_after(&mut self, lsn: Lsn, out: &mut Output) -> Result<(), Refused> {
        todo!()
    }

    /// Batches after `after`, about `max_bytes` of them (at least one): `LogRead` follows.
    pub fn read_log(&mut self, token: Token, after: Lsn, max_bytes: usize, out: &mut Output) {
        todo!()
    }

    /// The first record that [`Store::read_log`] can still give.
    pub fn oldest_available_lsn(&self) -> Lsn {
        todo!()
    }

    /// Keeps the journal after `after` for a reader, up to the limit's bound; moves an existing pin.
    pub fn pin(&mut self, pin: PinId, after: Lsn) {
        todo!()
    }

    pub fn unpin(&mut self, pin: PinId, out: &mut Output) {
        todo!()
    }

    // --- reading ---

    /// Reads committed bytes: `Read` follows (at once when memory has it all).
    pub fn read(
        &mut self,
        token: Token,
        disk: DiskIndex,
        offset: u64,
        len: usize,
        out: &mut Output,
    ) -> Result<(), Refused> {
        todo!()
    }

    /// Whether no record ever touched this extent, nor came it with content: it reads as zeroes.
    pub fn is_untouched(&self, disk: DiskIndex, extent: ExtentIndex) -> bool {
        todo!()
    }

    // --- superblock ---

    /// Makes a change durable: `Persisted` is the receipt.
    ///
    /// # Panics
    /// If it would lower the promise, or the control state is over 16 KiB.
    pub fn persist(&mut self, token: Token, change: SuperblockChange, out: &mut Output) {
        todo!()
    }

    // --- change map ---

    /// Extents of `disk` that may have changed after `since`, with the number that last touched them, from
    /// `from` on, at most `limit`. The second value is where to go on, `None` at the end.
    /// A superset after crashes, never less.
    pub fn changed_since(
        &self,
        disk: DiskIndex,
        since: Lsn,
        from: ExtentIndex,
        limit: usize,
    ) -> (Vec<(ExtentIndex, Lsn)>, Option<ExtentIndex>) {
        todo!()
    }

    // --- snapshots ---

    /// Opens a snapshot of all disks at `at` (`None`: as soon as can be): `SnapshotOpened` follows once the
    /// image reached it.
    pub fn open_snapshot(
        &mut self,
        id: SnapshotId,
        at: Option<Lsn>,
        out: &mut Output,
    ) -> Result<(), Refused> {
        todo!()
    }

    /// Closes one: `SnapshotClosed` follows. A resync's undo snapshot cannot be closed.
    pub fn close_snapshot(&mut self, id: SnapshotId, out: &mut Output) -> Result<(), Refused> {
        todo!()
    }

    /// Reads an extent as it was: `SnapshotRead` follows.
    pub fn read_snapshot(
        &mut self,
        token: Token,
        id: SnapshotId,
        disk: DiskIndex,
        extent: ExtentIndex,
        out: &mut Output,
    ) {
        todo!()
    }

    // --- resync, source ---

    /// Reads an extent of the image: stable records only. `ExtentRead` follows.
    pub fn read_extent(
        &mut self,
        token: Token,
        disk: DiskIndex,
        extent: ExtentIndex,
        out: &mut Output,
    ) -> Result<(), Refused> {
        todo!()
    }

    // --- resync, target ---

    /// Keeps the present state (all of the log must be stable, so that it is in the image) as snapshot `undo`
    /// and marks the copy "syncing", durably: `ResyncBegun` follows. A copy that is syncing already keeps its
    /// first undo snapshot and goes back to taking extents.
    pub fn begin_resync(&mut self, undo: SnapshotId, out: &mut Output) -> Result<(), Refused> {
        todo!()
    }

    /// Puts an extent from the source into the image: `ExtentWritten` follows. `data` is absent for zeroes,
    /// else as long as the extent.
    pub fn write_extent(
        &mut self,
        token: Token,
        disk: DiskIndex,
        extent: ExtentIndex,
        lsn: Lsn,
        data: Option<Slice>,
        out: &mut Output,
    ) -> Result<(), Refused> {
        todo!()
    }

    /// All extents came. The old log is dropped and a new one starts after `from`, which no extent's source
    /// was behind; `lineage` is the source's, to `from`. `ResyncLogStarted` follows, then batches after `from`
    /// may be appended, and are applied as they become stable.
    pub fn start_resync_log(
        &mut self,
        from: LogPosition,
        lineage: &Lineage,
        out: &mut Output,
    ) -> Result<(), Refused> {
        todo!()
    }

    /// The number the log must durably reach before [`Store::end_resync`].
    pub fn resync_until(&self) -> Option<Lsn> {
        todo!()
    }

    /// The copy is a prefix of the history again: drops the mark and the undo snapshot. `ResyncEnded` follows.
    pub fn end_resync(&mut self, out: &mut Output) -> Result<(), Refused> {
        todo!()
    }

    // --- disks ---

    /// Adds a disk: `DisksChanged` follows.
    pub fn add_disk(&mut self, token: Token, entry: DiskEntry, out: &mut Output) -> Result<(), Refused> {
        todo!()
    }

    /// Forgets a disk; its image stays where it is.
    pub fn remove_disk(&mut self, token: Token, disk: DiskIndex, out: &mut Output) -> Result<(), Refused> {
        todo!()
    }

    /// Grows a disk.
    pub fn resize_disk(
        &mut self,
        token: Token,
        disk: DiskIndex,
        size: u64,
        out: &mut Output,
    ) -> Result<(), Refused> {
        todo!()
    }

    // --- running ---

    /// Takes the result of a command.
    pub fn complete(&mut self, completion: IoCompletion, out: &mut Output) {
        todo!()
    }

    /// Does what is due by time: own syncs, application, checkpoints.
    pub fn tick(&mut self, now: MonotonicTime, out: &mut Output) {
        todo!()
    }

    /// When to call [`Store::tick`] again.
    pub fn next_wake(&self) -> Option<MonotonicTime> {
        todo!()
    }

    /// Takes a checkpoint of everything applied, soon: `Checkpointed` follows.
    pub fn checkpoint(&mut self, out: &mut Output) {
        todo!()
    }

    /// Syncs, applies everything stable, checkpoints, notes the images' size and change time: `Closed` follows.
    pub fn close(&mut self, out: &mut Output) {
        todo!()
    }

    // --- figures ---

    pub fn group(&self) -> GroupId {
        todo!()
    }

    /// The log's last record, appended or accepted.
    pub fn log_end(&self) -> LogPosition {
        todo!()
    }

    pub fn chain(&self) -> ChainValue {
        todo!()
    }

    pub fn accepted(&self) -> Lsn {
        todo!()
    }

    pub fn durable(&self) -> Lsn {
        todo!()
    }

    pub fn stable(&self) -> Lsn {
        todo!()
    }

    pub fn committed(&self) -> Lsn {
        todo!()
    }

    pub fn applied(&self) -> Lsn {
        todo!()
    }

    pub fn lineage(&self) -> &Lineage {
        todo!()
    }

    pub fn promise(&self) -> Term {
        todo!()
    }

    pub fn disks(&self) -> &[DiskEntry] {
        todo!()
    }

    /// The last applied configuration record.
    pub fn config(&self) -> Option<(Lsn, Slice)> {
        todo!()
    }

    pub fn health(&self) -> &Health {
        todo!()
    }

    pub fn pressure(&self) -> Pressure {
        todo!()
    }

    /// Bytes of records that are not in the image yet.
    pub fn unapplied_bytes(&self) -> u64 {
        todo!()
    }

    /// Bytes the journal occupies.
    pub fn journal_bytes(&self) -> u64 {
        todo!()
    }

    /// Set once storage failed.
    pub fn failure(&self) -> Option<&Arc<StoreFailure>> {
        todo!()
    }
}

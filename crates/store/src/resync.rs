//! Resync by extents (rule 14), both ends.
//!
//! The target's states, each durable before it is reported:
//!
//! ```text
//! good ──begin_resync──► extents ──start_resync_log──► log ──end_resync──► good
//!                           ▲                           │
//!                           └───────begin_resync────────┘
//! any of the two ──open with roll_back──► good, as it was before
//! ```
//!
//! Why it is sound: extents carry stable content at some position `q` at or after the new log's start `p`.
//! Replaying all records after `p` over them rewrites, in order, every sector that changed since `p`; once the
//! log reached the largest `q`, image and log are a prefix of the history.

use crate::apply::IncomingExtent;
use crate::batch::ChainValue;
use crate::event::{Output, Refused, SnapshotId, StoreEvent, Token};
use crate::io::{FileId, IoClass, IoError, IoOp};
use crate::params::EXTENT_BYTES;
use crate::store::{Pending, Store};
use crate::task::{Purpose, Task};
use rempart_buffer::Slice;
use rempart_types::{DiskIndex, EXTENT_SIZE, ExtentIndex, Lineage, LogPosition, Lsn};

/// A read of the image for a resync's target.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExtentRead {
    token: Token,
    disk: DiskIndex,
    extent: ExtentIndex,
}

impl Store {
    /// Whether the copy is taking extents, so that its log stands still.
    pub(crate) fn takes_extents(&self) -> bool {
        let extents = self.superblock.syncing.as_ref().is_some_and(|syncing| syncing.log_until.is_none());
        extents || self.resync_beginning || self.log_restarting
    }

    /// Reads an extent of the image: stable records only. `ExtentRead` follows.
    pub fn read_extent(
        &mut self,
        token: Token,
        disk: DiskIndex,
        extent: ExtentIndex,
        out: &mut Output,
    ) -> Result<(), Refused> {
        self.check_running()?;
        let size = self.disk_size(disk).ok_or(Refused::OutOfRange)?;
        if extent.bytes(size).is_empty() {
            return Err(Refused::OutOfRange);
        }
        let read = ExtentRead { token, disk, extent };
        let op = IoOp::Read { file: FileId::Image(disk), offset: extent.0 * EXTENT_SIZE, len: EXTENT_BYTES };
        self.issue(IoClass::Background, op, Pending::ExtentRead(read), out);
        Ok(())
    }

    pub(crate) fn extent_read(&mut self, read: ExtentRead, result: Result<Slice, IoError>, out: &mut Output) {
        let ExtentRead { token, disk, extent } = read;
        // A round may be writing: what was read can hold everything to its target.
        let lsn = self.image_reaches();
        let result = result.map(|data| self.extent_of(disk, extent, lsn, data));
        out.events.push(StoreEvent::ExtentRead { token, result });
    }

    /// Keeps the present state (all of the log must be stable, so that it is in the image) as snapshot `undo`
    /// and marks the copy "syncing", durably: `ResyncBegun` follows. A copy that is syncing already keeps its
    /// first undo snapshot and goes back to taking extents.
    pub fn begin_resync(&mut self, undo: SnapshotId, out: &mut Output) -> Result<(), Refused> {
        self.check_running()?;
        let again = self.superblock.syncing.is_some();
        if self.truncating || self.resync_beginning || self.log_restarting {
            return Err(Refused::State);
        }
        if !again && !self.is_ending_resync() && self.snapshots.position(undo).is_some() {
            return Err(Refused::Name);
        }
        if !again && self.stable_told < self.journal.log_end {
            return Err(Refused::NotServing);
        }
        // Snapshots that wait for records to come never open: this log ends here.
        let waiting = self.openings.drain(..);
        out.events.extend(waiting.map(|(id, _)| StoreEvent::SnapshotClosed(id)));
        self.resync_beginning = true;
        self.want_sync(out);
        self.queue_task(Purpose::BeginResync(undo), out);
        Ok(())
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
        self.check_running()?;
        if !self.takes_extents() || self.resync_beginning || self.log_restarting {
            return Err(Refused::State);
        }
        let range = extent.bytes(self.disk_size(disk).ok_or(Refused::OutOfRange)?);
        let len = range.end - range.start;
        if len == 0 || data.as_ref().is_some_and(|data| data.len() as u64 != len) {
            return Err(Refused::OutOfRange);
        }
        self.extents_until = self.extents_until.max(lsn);
        // Two contents of one extent never are in one round: the later would win only by luck.
        self.incoming.push_back(IncomingExtent { token, disk, extent, lsn, data });
        self.apply_more(out);
        Ok(())
    }

    /// Notes the machine's definition that the source's image position includes; durable with
    /// [`StoreEvent::ResyncLogStarted`].
    pub fn install_config(&mut self, lsn: Lsn, definition: Slice) -> Result<(), Refused> {
        self.check_running()?;
        if !self.takes_extents() || definition.len() > crate::batch::MAX_CONFIG {
            return Err(Refused::State);
        }
        self.config_applied = Some((lsn, definition.clone()));
        self.config_committed = Some((lsn, definition));
        Ok(())
    }

    /// Of these extents it is only known that they are, or are about to be, as the source has them at `lsn` or later.
    pub fn mark_changed(&mut self, disk: DiskIndex, first: ExtentIndex, count: u64, lsn: Lsn) {
        if let Some(map) = self.maps.get_mut(&disk)
            && count > 0
        {
            map.mark(first, ExtentIndex(first.0 + count - 1), lsn);
        }
    }

    /// All extents came. The old log is dropped and a new one starts after `from`, which no extent's source
    /// was behind; `lineage` is the source's, to `from`, and `chain` names what ends there, so that this log can be
    /// led on without a word from the source. `ResyncLogStarted` follows, then batches after `from` may be appended,
    /// and are applied as they become stable.
    pub fn start_resync_log(
        &mut self,
        from: LogPosition,
        chain: Option<ChainValue>,
        lineage: &Lineage,
        out: &mut Output,
    ) -> Result<(), Refused> {
        self.check_running()?;
        if !self.takes_extents() || self.resync_beginning || self.log_restarting {
            return Err(Refused::State);
        }
        let mut lineage = lineage.clone();
        lineage.truncate(from.lsn);
        if lineage.position(from.lsn) != Some(from) {
            return Err(Refused::OutOfRange);
        }
        self.log_restarting = true;
        self.queue_task(Purpose::StartLog { from, chain, lineage }, out);
        Ok(())
    }

    /// The undo snapshot of a resync that is over is about to go.
    fn is_ending_resync(&self) -> bool {
        matches!(&self.task, Some(Task { purpose: Purpose::EndResync(_), .. }))
    }

    /// The number the log must durably reach before [`Store::end_resync`].
    pub fn resync_until(&self) -> Option<Lsn> {
        self.superblock.syncing.as_ref().and_then(|syncing| syncing.log_until)
    }

    /// The copy is a prefix of the history again: drops the mark and the undo snapshot. `ResyncEnded` follows.
    pub fn end_resync(&mut self, out: &mut Output) -> Result<(), Refused> {
        self.check_running()?;
        match self.resync_until() {
            Some(until) if !self.takes_extents() && self.journal.durable >= until => {}
            _ => return Err(Refused::State),
        }
        if self.tasks.iter().any(|purpose| matches!(purpose, Purpose::EndResync(_))) {
            return Err(Refused::State);
        }
        let undo = self.superblock.syncing.as_ref().expect("its log was restarted").undo;
        self.queue_task(Purpose::EndResync(undo), out);
        Ok(())
    }
}

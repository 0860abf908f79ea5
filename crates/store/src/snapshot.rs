//! Snapshots by copy-before-write: what they saved, and where.
//!
//! A saved extent carries the position of the newest snapshot at that time. A snapshot at `n` reads an extent
//! from the saved one with the smallest position not below `n`, or from the image if there is none: so
//! one copy serves every older snapshot that had not saved the extent itself.
//!
//! A resync's undo snapshot survives crashes: its position is in the superblock, and what it saved is durable, with a
//! row in the map, before the image changes. All others end with the process that opened them: nothing of theirs
//! is synced, and recovery empties the files.
//!
//! Where the disk has no room for them, snapshots are dropped and the copy goes on. Only a resync's undo snapshot is
//! not: without it an unfinished copy could not go back. The resync waits for room instead.

use crate::checksum::crc32c;
use crate::event::{Extent, Output, Refused, SnapshotId, SnapshotReadError, StoreEvent, Token};
use crate::io::{FileId, IoClass, IoError, IoErrorKind, IoOp};
use crate::params::EXTENT_BYTES;
use crate::store::{Pending, Store};
use crate::superblock::MAX_SNAPSHOTS;
use crate::task::Purpose;
use rempart_buffer::{BufferMut, PAGE_SIZE, Slice, is_zero};
use rempart_types::{DiskIndex, EXTENT_SIZE, ExtentIndex, Lsn};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) const MAGIC: [u8; 4] = *b"RMSM";
const HEADER_LEN: usize = 32;
const ENTRY_LEN: usize = 32;
const ENTRIES: usize = (PAGE_SIZE - HEADER_LEN) / ENTRY_LEN;
/// In place of a slot: the extent was all zero.
const ZERO_SLOT: u64 = u64::MAX;

/// One extent put aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SavedExtent {
    disk: DiskIndex,
    extent: ExtentIndex,
    /// Serves snapshots at or before this.
    upto: Lsn,
    slot: Option<u64>,
    checksum: u32,
}

impl SavedExtent {
    pub fn new(
        disk: DiskIndex,
        extent: ExtentIndex,
        upto: Lsn,
        slot: Option<u64>,
        data: &[u8],
    ) -> SavedExtent {
        SavedExtent { disk, extent, upto, slot, checksum: if slot.is_some() { crc32c(data) } else { 0 } }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Saved {
    pub slot: Option<u64>,
    pub checksum: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    /// Open ones and their positions.
    pub open: Vec<(SnapshotId, Lsn)>,
    saved: BTreeMap<(DiskIndex, ExtentIndex, Lsn), Saved>,
    free: BTreeSet<u64>,
    next_slot: u64,
    next_page: u64,
}

impl Snapshots {
    pub fn newest(&self) -> Option<Lsn> {
        self.open.iter().map(|&(_, lsn)| lsn).max()
    }

    pub fn newest_lsn(&self) -> Lsn {
        self.newest().expect("a snapshot is open")
    }

    pub fn position(&self, id: SnapshotId) -> Option<Lsn> {
        self.open.iter().find(|(open, _)| *open == id).map(|&(_, lsn)| lsn)
    }

    /// Whether the extent must be saved before it changes.
    pub fn needs(&self, disk: DiskIndex, extent: ExtentIndex) -> bool {
        self.newest().is_some_and(|newest| self.find(disk, extent, newest).is_none())
    }

    /// The saved extent that a snapshot at `lsn` reads.
    pub fn find(&self, disk: DiskIndex, extent: ExtentIndex, lsn: Lsn) -> Option<Saved> {
        let range = (disk, extent, lsn)..=(disk, extent, Lsn(u64::MAX));
        self.saved.range(range).next().map(|(_, &saved)| saved)
    }

    /// Every extent that differs between a snapshot at `lsn` and the image.
    pub fn saved_for(&self, lsn: Lsn) -> Vec<(DiskIndex, ExtentIndex, Saved)> {
        let mut found: Vec<(DiskIndex, ExtentIndex, Saved)> = Vec::new();
        for (&(disk, extent, upto), &saved) in &self.saved {
            let seen = found.last().is_some_and(|&(d, e, _)| (d, e) == (disk, extent));
            if upto >= lsn && !seen {
                found.push((disk, extent, saved));
            }
        }
        found
    }

    pub fn take_slot(&mut self) -> u64 {
        self.free.pop_first().unwrap_or_else(|| {
            self.next_slot += 1;
            self.next_slot - 1
        })
    }

    /// Bytes put aside.
    pub fn bytes(&self) -> u64 {
        (self.next_slot - self.free.len() as u64) * EXTENT_SIZE
    }

    /// These were put aside in vain: no row of the map names them.
    pub fn release(&mut self, saved: Vec<SavedExtent>) {
        self.free.extend(saved.iter().filter_map(|entry| entry.slot));
    }

    /// The pages last encoded, of so many rows, are to be encoded again.
    pub fn unwrite(&mut self, rows: usize) {
        self.next_page -= rows.div_ceil(ENTRIES) as u64;
    }

    /// The map pages that record `saved`, appended after what is there.
    pub fn encode(&mut self, saved: &[SavedExtent], generation: u64) -> Vec<(u64, Slice)> {
        let mut pages = Vec::new();
        for entries in saved.chunks(ENTRIES) {
            let mut page = BufferMut::zeroed(PAGE_SIZE);
            page[..4].copy_from_slice(&MAGIC);
            page[8..16].copy_from_slice(&generation.to_le_bytes());
            page[16..24].copy_from_slice(&self.next_page.to_le_bytes());
            page[24..28].copy_from_slice(&(entries.len() as u32).to_le_bytes());
            for (row, entry) in page[HEADER_LEN..].chunks_exact_mut(ENTRY_LEN).zip(entries) {
                row[0..2].copy_from_slice(&entry.disk.0.to_le_bytes());
                row[4..8].copy_from_slice(&entry.checksum.to_le_bytes());
                row[8..16].copy_from_slice(&entry.extent.0.to_le_bytes());
                row[16..24].copy_from_slice(&entry.upto.0.to_le_bytes());
                row[24..32].copy_from_slice(&entry.slot.unwrap_or(ZERO_SLOT).to_le_bytes());
            }
            let checksum = crc32c(&page[8..]);
            page[4..8].copy_from_slice(&checksum.to_le_bytes());
            pages.push((self.next_page * PAGE_SIZE as u64, page.freeze().whole()));
            self.next_page += 1;
        }
        pages
    }

    pub fn keep(&mut self, saved: Vec<SavedExtent>) {
        for entry in saved {
            let place = Saved { slot: entry.slot, checksum: entry.checksum };
            self.saved.insert((entry.disk, entry.extent, entry.upto), place);
        }
    }

    /// The undo snapshot of a resync that began, or began again.
    pub fn open_undo(&mut self, id: SnapshotId, at: Lsn) {
        if self.position(id).is_none() {
            // Rows that no map names must not be taken for the undo's.
            assert!(
                self.saved.keys().all(|&(.., upto)| upto < at),
                "the image is at {at:?} for the first time"
            );
            self.open.push((id, at));
        }
    }

    /// The map begins anew, in another generation.
    pub fn restart_map(&mut self) {
        self.next_page = 0;
    }

    /// Reads the undo snapshot's map back. Pages of another generation or behind a torn one were never relied on: nothing
    /// was overwritten before its page was durable. True if a page was unsound.
    pub fn load(&mut self, undo: (SnapshotId, Lsn), generation: u64, map: &[u8]) -> bool {
        self.open = vec![undo];
        let mut entries = Vec::new();
        let mut unsound = false;
        for (index, page) in map.chunks_exact(PAGE_SIZE).enumerate() {
            let Some(rows) = decode_page(page, generation, index as u64) else {
                unsound |= !is_sound(page) && !is_zero(page);
                continue;
            };
            self.next_page = index as u64 + 1;
            entries.extend(rows);
        }
        // A slot given out twice belongs to the later row: the earlier one was let go before.
        let mut owner: BTreeMap<u64, usize> = BTreeMap::new();
        for (index, entry) in entries.iter().enumerate() {
            if let Some(slot) = entry.slot {
                owner.insert(slot, index);
                self.next_slot = self.next_slot.max(slot + 1);
            }
        }
        let sound = entries
            .iter()
            .enumerate()
            .filter(|(index, entry)| entry.slot.is_none_or(|slot| owner.get(&slot) == Some(index)))
            .map(|(_, &entry)| entry)
            .collect();
        self.keep(sound);
        let used: BTreeSet<u64> = self.saved.values().filter_map(|saved| saved.slot).collect();
        self.free = (0..self.next_slot).filter(|slot| !used.contains(slot)).collect();
        self.drop_unneeded();
        unsound
    }

    /// Lets go of what no open snapshot reads: the slots are used again.
    pub fn drop_unneeded(&mut self) {
        let open: BTreeSet<Lsn> = self.open.iter().map(|&(_, lsn)| lsn).collect();
        let mut previous: Option<(DiskIndex, ExtentIndex, Lsn)> = None;
        let mut unneeded = Vec::new();
        for &key in self.saved.keys() {
            let (disk, extent, upto) = key;
            let after = match previous {
                Some((d, e, lsn)) if (d, e) == (disk, extent) => lsn.next(),
                _ => Lsn::ZERO,
            };
            if open.range(after..=upto).next().is_none() {
                unneeded.push(key);
            }
            previous = Some(key);
        }
        for key in unneeded {
            if let Some(Saved { slot: Some(slot), .. }) = self.saved.remove(&key) {
                self.free.insert(slot);
            }
        }
    }

    /// Starts over, after the last snapshot was closed.
    pub fn clear(&mut self) {
        *self = Snapshots::default();
    }
}

fn is_sound(page: &[u8]) -> bool {
    page[..4] == MAGIC && page[4..8] == crc32c(&page[8..]).to_le_bytes()
}

fn decode_page(page: &[u8], generation: u64, index: u64) -> Option<Vec<SavedExtent>> {
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"));
    let count = u32::from_le_bytes(page[24..28].try_into().expect("four bytes")) as usize;
    let counts = is_sound(page) && word(8) == generation && word(16) == index && count <= ENTRIES;
    counts.then(|| {
        page[HEADER_LEN..]
            .chunks_exact(ENTRY_LEN)
            .take(count)
            .map(|row| {
                let word = |at: usize| u64::from_le_bytes(row[at..at + 8].try_into().expect("eight bytes"));
                SavedExtent {
                    disk: DiskIndex(u16::from_le_bytes([row[0], row[1]])),
                    checksum: u32::from_le_bytes(row[4..8].try_into().expect("four bytes")),
                    extent: ExtentIndex(word(8)),
                    upto: Lsn(word(16)),
                    slot: Some(word(24)).filter(|&slot| slot != ZERO_SLOT),
                }
            })
            .collect()
    })
}

/// Extents of the image that are read at once for a snapshot.
const RUN: u64 = 16;

/// A read of old extents under way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OldRead {
    /// The first one's; the others' follow.
    pub token: Token,
    pub at: Lsn,
    pub disk: DiskIndex,
    pub extent: ExtentIndex,
    /// One, unless the image is being read.
    pub count: u64,
    /// `None`: the image is being read.
    pub from: Option<Saved>,
}

impl Store {
    /// The next position the image may not pass because a snapshot opens there.
    pub(crate) fn next_snapshot_stop(&self) -> Option<Lsn> {
        self.openings.iter().map(|&(_, at)| at).min()
    }

    /// Opens a snapshot of all disks at `at` (`None`: as soon as can be): `SnapshotOpened` follows once the
    /// image reached it.
    pub fn open_snapshot(
        &mut self,
        id: SnapshotId,
        at: Option<Lsn>,
        out: &mut Output,
    ) -> Result<(), Refused> {
        let reached = self.image_reaches();
        let at = at.unwrap_or(reached);
        self.check_running()?;
        if self.snapshots.position(id).is_some() || self.openings.iter().any(|&(other, _)| other == id) {
            return Err(Refused::Name);
        }
        if self.snapshots.open.len() + self.openings.len() >= MAX_SNAPSHOTS
            || self.superblock.syncing.is_some()
        {
            return Err(Refused::State);
        }
        if at < reached {
            return Err(Refused::Passed);
        }
        self.openings.push((id, at));
        self.open_due_snapshots(out);
        self.apply_more(out);
        Ok(())
    }

    /// Opens those whose position the image has reached, between two rounds.
    pub(crate) fn open_due_snapshots(&mut self, out: &mut Output) {
        if self.round.is_some() {
            return;
        }
        let at = self.applied;
        for (snapshot, wanted) in self.openings.extract_if(.., |&mut (_, wanted)| wanted <= at) {
            assert_eq!(wanted, at, "the image does not pass where a snapshot opens");
            self.snapshots.open.push((snapshot, at));
            out.events.push(StoreEvent::SnapshotOpened { snapshot, at });
        }
    }

    /// All snapshots together keep at most this aside from now on; what is kept already counts.
    pub fn limit_snapshots(&mut self, bytes: u64) {
        self.limits.snapshots = bytes;
    }

    /// Bytes that snapshots keep aside.
    pub fn snapshot_bytes(&self) -> u64 {
        self.snapshots.bytes()
    }

    /// Closes one: `SnapshotClosed` follows. A resync's undo snapshot cannot be closed.
    pub fn close_snapshot(&mut self, id: SnapshotId, out: &mut Output) -> Result<(), Refused> {
        self.check_running()?;
        if self.superblock.syncing.as_ref().is_some_and(|syncing| syncing.undo == id) {
            return Err(Refused::State);
        }
        if let Some(index) = self.openings.iter().position(|&(opening, _)| opening == id) {
            self.openings.remove(index);
            out.events.push(StoreEvent::SnapshotClosed(id));
            return Ok(());
        }
        if self.snapshots.position(id).is_none() {
            return Err(Refused::Name);
        }
        self.queue_task(Purpose::CloseSnapshot(id), out);
        Ok(())
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
        self.read_snapshot_run(token, id, disk, extent, 1, out);
    }

    /// Reads `count` extents as they were: `SnapshotRead` follows for each, the first with `token`, the others with the
    /// numbers after it.
    pub fn read_snapshot_run(
        &mut self,
        token: Token,
        id: SnapshotId,
        disk: DiskIndex,
        extent: ExtentIndex,
        count: u64,
        out: &mut Output,
    ) {
        let last = ExtentIndex(extent.0.saturating_add(count.saturating_sub(1)));
        let known = self.disk_size(disk).is_some_and(|size| !last.bytes(size).is_empty());
        let Some(at) = self.snapshots.position(id).filter(|_| known && self.failed.is_none()) else {
            return unreadable(token, count, &SnapshotReadError::Unknown, out);
        };
        let mut place = 0;
        while place < count {
            let run = self.unsaved_run(disk, extent.0 + place, at, (count - place).min(RUN));
            let token = Token(token.0 + place);
            let first = ExtentIndex(extent.0 + place);
            if run == 0 {
                self.read_old_extent(token, at, disk, first, out);
            } else {
                self.read_image_run(token, at, disk, first, run, out);
            }
            place += run.max(1);
        }
    }

    /// How many extents from `first` on a snapshot at `at` reads from the image.
    fn unsaved_run(&self, disk: DiskIndex, first: u64, at: Lsn, most: u64) -> u64 {
        let saved = |place: &u64| self.snapshots.find(disk, ExtentIndex(first + place), at).is_some();
        (0..most).find(saved).unwrap_or(most)
    }

    fn read_image_run(
        &mut self,
        token: Token,
        at: Lsn,
        disk: DiskIndex,
        extent: ExtentIndex,
        count: u64,
        out: &mut Output,
    ) {
        let len = EXTENT_BYTES * count as usize;
        let op = IoOp::Read { file: FileId::Image(disk), offset: extent.0 * EXTENT_SIZE, len };
        let read = OldRead { token, at, disk, extent, count, from: None };
        self.issue(IoClass::Background, op, Pending::OldRead(read), out);
    }

    fn read_old_extent(
        &mut self,
        token: Token,
        at: Lsn,
        disk: DiskIndex,
        extent: ExtentIndex,
        out: &mut Output,
    ) {
        match self.snapshots.find(disk, extent, at) {
            None => self.read_image_run(token, at, disk, extent, 1, out),
            Some(Saved { slot: None, .. }) => {
                let result = Ok(Extent { disk, extent, lsn: at, data: None });
                out.events.push(StoreEvent::SnapshotRead { token, result });
            }
            from @ Some(Saved { slot: Some(slot), .. }) => {
                let offset = slot * EXTENT_SIZE;
                let op = IoOp::Read { file: FileId::SnapshotData, offset, len: EXTENT_BYTES };
                let read = OldRead { token, at, disk, extent, count: 1, from };
                self.issue(IoClass::Background, op, Pending::OldRead(read), out);
            }
        }
    }

    pub(crate) fn old_extents_read(
        &mut self,
        read: OldRead,
        result: Result<Slice, IoError>,
        out: &mut Output,
    ) {
        let OldRead { token, at, disk, extent, count, from } = read;
        if !self.snapshots.open.iter().any(|&(_, lsn)| lsn == at) {
            return unreadable(token, count, &SnapshotReadError::Unknown, out);
        }
        let data = match result {
            Ok(data) => data,
            Err(error) => return unreadable(token, count, &SnapshotReadError::Io(error), out),
        };
        for place in 0..count {
            let (token, extent) = (Token(token.0 + place), ExtentIndex(extent.0 + place));
            // The extent may have been saved, and the image changed, while the image was read.
            if from != self.snapshots.find(disk, extent, at) {
                self.read_old_extent(token, at, disk, extent, out);
                continue;
            }
            let start = EXTENT_BYTES * place as usize;
            let data = data.slice(start..start + EXTENT_BYTES);
            let result = match from {
                Some(saved) if crc32c(&data) != saved.checksum => {
                    let message = format!("saved extent {} of disk {disk} is damaged", extent.0);
                    let file = FileId::SnapshotData;
                    let (kind, path) = (IoErrorKind::Io, String::new());
                    Err(SnapshotReadError::Io(IoError { kind, file, path, message }))
                }
                _ => Ok(self.extent_of(disk, extent, at, data)),
            };
            out.events.push(StoreEvent::SnapshotRead { token, result });
        }
    }

    /// An extent's answer: cut at the disk's end, without data when zero.
    pub(crate) fn extent_of(&self, disk: DiskIndex, extent: ExtentIndex, lsn: Lsn, data: Slice) -> Extent {
        let range = extent.bytes(self.disk_size(disk).unwrap_or(0));
        let data = data.slice(0..(range.end - range.start) as usize);
        let data = (!is_zero(&data)).then_some(data);
        Extent { disk, extent, lsn, data }
    }
}

fn unreadable(first: Token, count: u64, error: &SnapshotReadError, out: &mut Output) {
    let tokens = (0..count).map(|place| Token(first.0 + place));
    out.events.extend(tokens.map(|token| StoreEvent::SnapshotRead { token, result: Err(error.clone()) }));
}

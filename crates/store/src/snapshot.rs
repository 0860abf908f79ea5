//! Snapshots by copy-before-write: what they saved, and where.
//!
//! What is saved are the pages that are overwritten, and each carries the position of the newest snapshot at that
//! time. A snapshot at `n` reads a page from the saved one with the smallest position not below `n`, or from the
//! image if there is none: so one copy serves every older snapshot that had not saved the page itself.
//!
//! A resync's undo snapshot survives crashes: its position is in the superblock, and what it saved, whole extents, is
//! durable, with a row in the map, before the image changes. All others end with the process that opened them: nothing
//! of theirs is synced, and recovery empties the files.
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

/// Pages of an extent.
const PAGES: u64 = EXTENT_SIZE / PAGE_SIZE as u64;
/// One bit for each page of an extent.
pub(crate) type PageMask = u16;
const _: () = assert!(PAGES == PageMask::BITS as u64);

/// Neighbouring pages within an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pages {
    first: u8,
    count: u8,
}

impl Pages {
    const ALL: Pages = Pages { first: 0, count: PAGES as u8 };

    fn mask(self) -> PageMask {
        (PageMask::MAX >> (PAGES - u64::from(self.count))) << self.first
    }

    /// Bytes.
    fn len(self) -> usize {
        usize::from(self.count) * PAGE_SIZE
    }
}

/// Neighbouring pages of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageRun {
    pub disk: DiskIndex,
    pub extent: ExtentIndex,
    pages: Pages,
}

impl PageRun {
    pub fn whole(disk: DiskIndex, extent: ExtentIndex) -> PageRun {
        PageRun { disk, extent, pages: Pages::ALL }
    }

    /// The runs that make up `mask`.
    pub fn of_mask(disk: DiskIndex, extent: ExtentIndex, mask: PageMask) -> impl Iterator<Item = PageRun> {
        let mut left = mask;
        std::iter::from_fn(move || {
            let first = (left != 0).then(|| left.trailing_zeros())?;
            let count = (left >> first).trailing_ones();
            let pages = Pages { first: first as u8, count: count as u8 };
            left &= !pages.mask();
            Some(PageRun { disk, extent, pages })
        })
    }

    /// Where it begins on its disk, in bytes.
    pub fn offset(self) -> u64 {
        self.extent.0 * EXTENT_SIZE + u64::from(self.pages.first) * PAGE_SIZE as u64
    }

    /// Bytes.
    pub fn len(self) -> usize {
        self.pages.len()
    }
}

/// Pages of `disk` that any byte of `start..end` is in, by extent.
pub(crate) fn pages_of(start: u64, end: u64) -> impl Iterator<Item = (ExtentIndex, PageMask)> {
    rempart_types::extents_of(start, end - start).map(move |extent| {
        let base = extent.0 * EXTENT_SIZE;
        let from = start.max(base) - base;
        let to = end.min(base + EXTENT_SIZE) - base;
        let first = from / PAGE_SIZE as u64;
        let count = to.div_ceil(PAGE_SIZE as u64) - first;
        (extent, (PageMask::MAX >> (PAGES - count)) << first)
    })
}

/// Pages put aside at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SavedRun {
    run: PageRun,
    /// Serves snapshots at or before this.
    upto: Lsn,
    saved: Saved,
}

impl SavedRun {
    /// `place`: where they are put, none if they are all zero.
    pub fn new(run: PageRun, upto: Lsn, place: Option<Place>, data: &[u8]) -> SavedRun {
        let checksum = if place.is_some() { crc32c(data) } else { 0 };
        SavedRun { run, upto, saved: Saved { pages: run.pages, place, checksum } }
    }
}

/// A page of `snapshot-data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place(u64);

impl Place {
    /// In bytes.
    pub fn offset(self) -> u64 {
        self.0 * PAGE_SIZE as u64
    }

    /// The extent-sized part of the file that it is in.
    fn slot(self) -> u64 {
        self.0 / PAGES
    }
}

/// Neighbouring pages of some extent, and where they are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Saved {
    pages: Pages,
    /// None: they were all zero.
    pub place: Option<Place>,
    pub checksum: u32,
}

impl Saved {
    fn mask(self) -> PageMask {
        self.pages.mask()
    }

    pub fn is_whole(self) -> bool {
        self.pages == Pages::ALL
    }
}

fn mask_of(saved: &[Saved]) -> PageMask {
    saved.iter().fold(0, |mask, saved| mask | saved.mask())
}

#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    /// Open ones and their positions.
    pub open: Vec<(SnapshotId, Lsn)>,
    /// By extent, and by the position up to which they serve.
    saved: BTreeMap<(DiskIndex, ExtentIndex, Lsn), Vec<Saved>>,
    /// Pages that are in use, of each slot of the file: an extent's room.
    used: Vec<u8>,
    /// Slots of which none is.
    free: BTreeSet<u64>,
    /// Where the next pages go, if there is room for them in that slot.
    filling: Option<Place>,
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

    /// Those of the extent's pages that must be saved before they change.
    pub fn needs(&self, disk: DiskIndex, extent: ExtentIndex, pages: PageMask) -> PageMask {
        let Some(newest) = self.newest() else { return 0 };
        // Also what was saved for a newer one that is closed: the image has changed since.
        self.find(disk, extent, newest).fold(pages, |missing, saved| missing & !saved.mask())
    }

    /// What is saved of an extent for a snapshot at `lsn`: a page is where it comes first.
    fn find(&self, disk: DiskIndex, extent: ExtentIndex, lsn: Lsn) -> impl Iterator<Item = Saved> {
        let range = (disk, extent, lsn)..=(disk, extent, Lsn(u64::MAX));
        self.saved.range(range).flat_map(|(_, saved)| saved.iter().copied())
    }

    /// Every extent that differs between the undo snapshot at `lsn` and the image.
    pub fn saved_for(&self, lsn: Lsn) -> Vec<(DiskIndex, ExtentIndex, Saved)> {
        let mut found: Vec<(DiskIndex, ExtentIndex, Saved)> = Vec::new();
        for (&(disk, extent, upto), saved) in &self.saved {
            let seen = found.last().is_some_and(|&(d, e, _)| (d, e) == (disk, extent));
            if upto >= lsn && !seen {
                let saved = saved[0];
                assert!(saved.is_whole(), "a resync keeps whole extents");
                found.push((disk, extent, saved));
            }
        }
        found
    }

    /// Where so many pages are to be put: together, in one slot.
    pub fn take_place(&mut self, run: PageRun) -> Place {
        let count = u64::from(run.pages.count);
        let place = match self.filling.filter(|place| place.0 % PAGES + count <= PAGES) {
            Some(place) if count < PAGES => place,
            _ => {
                let slot = self.free.pop_first().unwrap_or_else(|| {
                    self.used.push(0);
                    self.used.len() as u64 - 1
                });
                Place(slot * PAGES)
            }
        };
        let next = Place(place.0 + count);
        if count < PAGES {
            self.filling = (next.slot() == place.slot()).then_some(next);
        }
        self.used[place.slot() as usize] += run.pages.count;
        place
    }

    fn give_back(&mut self, saved: Saved) {
        let Some(place) = saved.place else { return };
        let used = &mut self.used[place.slot() as usize];
        *used -= saved.pages.count;
        if *used == 0 {
            self.free.insert(place.slot());
            // From its beginning, whoever takes it.
            self.filling = self.filling.filter(|filling| filling.slot() != place.slot());
        }
    }

    /// Bytes put aside.
    pub fn bytes(&self) -> u64 {
        (self.used.len() - self.free.len()) as u64 * EXTENT_SIZE
    }

    /// As many as there will be with `more` of pages, which first fill up what is filled.
    pub fn bytes_with(&self, more: u64) -> u64 {
        let room = self.filling.map_or(0, |place| PAGES - place.0 % PAGES) * PAGE_SIZE as u64;
        self.bytes() + more.saturating_sub(room).next_multiple_of(EXTENT_SIZE)
    }

    /// These were put aside in vain: no row of the map names them.
    pub fn release(&mut self, saved: Vec<SavedRun>) {
        saved.into_iter().for_each(|saved| self.give_back(saved.saved));
    }

    /// The pages last encoded, of so many rows, are to be encoded again.
    pub fn unwrite(&mut self, rows: usize) {
        self.next_page -= rows.div_ceil(ENTRIES) as u64;
    }

    /// The map pages that record `saved`, appended after what is there.
    pub fn encode(&mut self, saved: &[SavedRun], generation: u64) -> Vec<(u64, Slice)> {
        let mut pages = Vec::new();
        for entries in saved.chunks(ENTRIES) {
            let mut page = BufferMut::zeroed(PAGE_SIZE);
            page[..4].copy_from_slice(&MAGIC);
            page[8..16].copy_from_slice(&generation.to_le_bytes());
            page[16..24].copy_from_slice(&self.next_page.to_le_bytes());
            page[24..28].copy_from_slice(&(entries.len() as u32).to_le_bytes());
            for (row, entry) in page[HEADER_LEN..].chunks_exact_mut(ENTRY_LEN).zip(entries) {
                assert!(entry.saved.is_whole(), "a row names an extent, not pages");
                let slot = entry.saved.place.map_or(ZERO_SLOT, Place::slot);
                row[0..2].copy_from_slice(&entry.run.disk.0.to_le_bytes());
                row[4..8].copy_from_slice(&entry.saved.checksum.to_le_bytes());
                row[8..16].copy_from_slice(&entry.run.extent.0.to_le_bytes());
                row[16..24].copy_from_slice(&entry.upto.0.to_le_bytes());
                row[24..32].copy_from_slice(&slot.to_le_bytes());
            }
            let checksum = crc32c(&page[8..]);
            page[4..8].copy_from_slice(&checksum.to_le_bytes());
            pages.push((self.next_page * PAGE_SIZE as u64, page.freeze().whole()));
            self.next_page += 1;
        }
        pages
    }

    pub fn keep(&mut self, saved: Vec<SavedRun>) {
        for SavedRun { run, upto, saved } in saved {
            let pages = self.saved.entry((run.disk, run.extent, upto)).or_default();
            assert!(mask_of(pages) & saved.mask() == 0, "a page is saved once for a snapshot");
            pages.push(saved);
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
        // A slot given out twice belongs to the later row: the earlier one was let go before. So does an extent.
        let mut owner: BTreeMap<u64, usize> = BTreeMap::new();
        for (index, entry) in entries.iter().enumerate() {
            if let Some(place) = entry.saved.place {
                owner.insert(place.slot(), index);
                self.used.resize(self.used.len().max(place.slot() as usize + 1), 0);
            }
        }
        for (index, entry) in entries.iter().enumerate() {
            if entry.saved.place.is_some_and(|place| owner.get(&place.slot()) != Some(&index)) {
                continue;
            }
            let key = (entry.run.disk, entry.run.extent, entry.upto);
            if let Some(earlier) = self.saved.insert(key, vec![entry.saved]) {
                earlier.into_iter().for_each(|earlier| self.give_back(earlier));
            }
            if let Some(place) = entry.saved.place {
                self.used[place.slot() as usize] = PAGES as u8;
            }
        }
        self.free = (0..self.used.len() as u64).filter(|&slot| self.used[slot as usize] == 0).collect();
        self.drop_unneeded();
        unsound
    }

    /// Lets go of what no open snapshot reads: its room is used again.
    pub fn drop_unneeded(&mut self) {
        let mut open: Vec<(Lsn, PageMask)> = self.open.iter().map(|&(_, lsn)| (lsn, 0)).collect();
        let mut previous = None;
        let mut unneeded = Vec::new();
        for (&key, saved) in &self.saved {
            let (disk, extent, upto) = key;
            if previous.replace((disk, extent)) != Some((disk, extent)) {
                open.iter_mut().for_each(|(_, found)| *found = 0);
            }
            let mask = mask_of(saved);
            let mut is_needed = false;
            // A snapshot finds a page where it comes first.
            for (_, found) in open.iter_mut().filter(|(lsn, _)| *lsn <= upto) {
                is_needed |= mask & !*found != 0;
                *found |= mask;
            }
            if !is_needed {
                unneeded.push(key);
            }
        }
        for key in unneeded {
            let saved = self.saved.remove(&key).expect("just seen");
            saved.into_iter().for_each(|saved| self.give_back(saved));
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

fn decode_page(page: &[u8], generation: u64, index: u64) -> Option<Vec<SavedRun>> {
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"));
    let count = u32::from_le_bytes(page[24..28].try_into().expect("four bytes")) as usize;
    let counts = is_sound(page) && word(8) == generation && word(16) == index && count <= ENTRIES;
    counts.then(|| {
        page[HEADER_LEN..]
            .chunks_exact(ENTRY_LEN)
            .take(count)
            .map(|row| {
                let word = |at: usize| u64::from_le_bytes(row[at..at + 8].try_into().expect("eight bytes"));
                let disk = DiskIndex(u16::from_le_bytes([row[0], row[1]]));
                let run = PageRun::whole(disk, ExtentIndex(word(8)));
                let slot = Some(word(24)).filter(|&slot| slot != ZERO_SLOT);
                let place = slot.map(|slot| Place(slot.wrapping_mul(PAGES)));
                let checksum = u32::from_le_bytes(row[4..8].try_into().expect("four bytes"));
                let saved = Saved { pages: run.pages, place, checksum };
                SavedRun { run, upto: Lsn(word(16)), saved }
            })
            .collect()
    })
}

/// Extents of the image that are read at once for a snapshot.
const RUN: u64 = 16;

/// A read of old extents under way.
#[derive(Debug)]
pub(crate) struct OldRead {
    /// The first one's; the others' follow.
    pub token: Token,
    pub at: Lsn,
    pub disk: DiskIndex,
    pub extent: ExtentIndex,
    /// One, unless the image is being read.
    pub count: u64,
    pub from: OldFrom,
}

/// What is being read.
#[derive(Debug)]
pub(crate) enum OldFrom {
    Image,
    /// All of the extent.
    Whole(Saved),
    /// Saved pages, of which those in `due` go into what is there already.
    Pages {
        into: Composed,
        saved: Saved,
        due: PageMask,
    },
}

/// An extent of which some pages are saved.
#[derive(Debug)]
pub(crate) struct Composed {
    bytes: BufferMut,
    /// Pages that came from what is saved.
    have: PageMask,
}

impl Composed {
    fn put(&mut self, saved: Saved, due: PageMask, data: Option<&[u8]>) {
        for page in (0..PAGES as usize).filter(|page| due & 1 << page != 0) {
            let place = &mut self.bytes[page * PAGE_SIZE..(page + 1) * PAGE_SIZE];
            let at = (page - usize::from(saved.pages.first)) * PAGE_SIZE;
            match data {
                Some(data) => place.copy_from_slice(&data[at..at + PAGE_SIZE]),
                None => place.fill(0),
            }
        }
        self.have |= due;
    }
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
        (0..most).find(|place| self.is_saved(disk, ExtentIndex(first + place), at)).unwrap_or(most)
    }

    fn is_saved(&self, disk: DiskIndex, extent: ExtentIndex, at: Lsn) -> bool {
        self.snapshots.find(disk, extent, at).next().is_some()
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
        let read = OldRead { token, at, disk, extent, count, from: OldFrom::Image };
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
        let whole = self.snapshots.find(disk, extent, at).next().filter(|saved| saved.is_whole());
        match whole {
            None => self.read_image_run(token, at, disk, extent, 1, out),
            Some(Saved { place: None, .. }) => {
                let result = Ok(Extent { disk, extent, lsn: at, data: None });
                out.events.push(StoreEvent::SnapshotRead { token, result });
            }
            Some(saved @ Saved { place: Some(place), .. }) => {
                let from = OldFrom::Whole(saved);
                let read = OldRead { token, at, disk, extent, count: 1, from };
                self.read_saved(place, EXTENT_BYTES, read, out);
            }
        }
    }

    fn read_saved(&mut self, place: Place, len: usize, read: OldRead, out: &mut Output) {
        let op = IoOp::Read { file: FileId::SnapshotData, offset: place.offset(), len };
        self.issue(IoClass::Background, op, Pending::OldRead(read), out);
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
        match from {
            OldFrom::Image => {
                for place in 0..count {
                    let (token, extent) = (Token(token.0 + place), ExtentIndex(extent.0 + place));
                    let start = EXTENT_BYTES * place as usize;
                    let data = data.slice(start..start + EXTENT_BYTES);
                    // Pages may have been saved, and the image changed, while the image was read.
                    if self.is_saved(disk, extent, at) {
                        let mut bytes = BufferMut::zeroed(EXTENT_BYTES);
                        bytes.copy_from_slice(&data);
                        self.compose(token, at, disk, extent, Composed { bytes, have: 0 }, out);
                    } else {
                        self.old_extent(token, at, disk, extent, data, out);
                    }
                }
            }
            OldFrom::Whole(saved) | OldFrom::Pages { saved, .. } if crc32c(&data) != saved.checksum => {
                let message = format!("saved extent {} of disk {disk} is damaged", extent.0);
                let file = FileId::SnapshotData;
                let error = IoError { kind: IoErrorKind::Io, file, path: String::new(), message };
                unreadable(token, 1, &SnapshotReadError::Io(error), out);
            }
            OldFrom::Whole(_) => self.old_extent(token, at, disk, extent, data, out),
            OldFrom::Pages { mut into, saved, due } => {
                into.put(saved, due, Some(&data));
                self.compose(token, at, disk, extent, into, out);
            }
        }
    }

    /// Puts the next of the saved pages into an extent that was read from the image, until all are.
    fn compose(
        &mut self,
        token: Token,
        at: Lsn,
        disk: DiskIndex,
        extent: ExtentIndex,
        mut into: Composed,
        out: &mut Output,
    ) {
        let mut found: PageMask = 0;
        let mut next = None;
        for saved in self.snapshots.find(disk, extent, at) {
            let due = saved.mask() & !found & !into.have;
            found |= saved.mask();
            match saved.place {
                _ if due == 0 => {}
                None => into.put(saved, due, None),
                Some(place) => {
                    next = Some((place, saved, due));
                    break;
                }
            }
        }
        match next {
            Some((place, saved, due)) => {
                let from = OldFrom::Pages { into, saved, due };
                let read = OldRead { token, at, disk, extent, count: 1, from };
                self.read_saved(place, saved.pages.len(), read, out);
            }
            None => self.old_extent(token, at, disk, extent, into.bytes.freeze().whole(), out),
        }
    }

    fn old_extent(
        &self,
        token: Token,
        at: Lsn,
        disk: DiskIndex,
        extent: ExtentIndex,
        data: Slice,
        out: &mut Output,
    ) {
        let result = Ok(self.extent_of(disk, extent, at, data));
        out.events.push(StoreEvent::SnapshotRead { token, result });
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

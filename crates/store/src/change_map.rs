//! Which record last touched each extent of a disk.
//!
//! Pages of entries, in memory only where something was touched, on disk in two slots each that checkpoints
//! use in turn. A damaged slot makes its whole page "changed": a superset is always allowed, less never.

use crate::checksum::crc32c;
use rempart_buffer::{BufferMut, PAGE_SIZE, Slice, is_zero};
use rempart_types::{DiskIndex, ExtentIndex, Lsn};

pub(crate) const MAGIC: [u8; 4] = *b"RMCM";
const HEADER_LEN: usize = 32;
/// Entries on a page.
pub(crate) const ENTRIES: usize = (PAGE_SIZE - HEADER_LEN) / 8;

#[derive(Debug)]
struct Page {
    entries: Box<[u64; ENTRIES]>,
    dirty: bool,
    /// The slot that holds the last complete write.
    slot: u8,
}

#[derive(Debug)]
pub(crate) struct ChangeMap {
    disk: DiskIndex,
    base: Lsn,
    extents: u64,
    pages: Vec<Option<Page>>,
    dirty: Vec<u32>,
    /// The highest version that any page on disk carries: the next ones must exceed it, also when the
    /// checkpoint that wrote it was never completed.
    newest_version: u64,
}

impl ChangeMap {
    pub fn new(disk: DiskIndex, base: Lsn, extents: u64) -> ChangeMap {
        let mut map =
            ChangeMap { disk, base, extents: 0, pages: Vec::new(), dirty: Vec::new(), newest_version: 0 };
        map.grow(extents);
        map
    }

    pub fn grow(&mut self, extents: u64) {
        self.extents = self.extents.max(extents);
        self.pages.resize_with(self.extents.div_ceil(ENTRIES as u64) as usize, || None);
    }

    /// Bytes of the file for a disk of so many extents.
    pub fn file_len(extents: u64) -> u64 {
        extents.div_ceil(ENTRIES as u64) * 2 * PAGE_SIZE as u64
    }

    /// Notes that `lsn` touches `first..=last`.
    pub fn mark(&mut self, first: ExtentIndex, last: ExtentIndex, lsn: Lsn) {
        let last = last.0.min(self.extents.saturating_sub(1));
        let mut at = first.0;
        while at <= last && at < self.extents {
            let index = (at / ENTRIES as u64) as usize;
            let page_last = last.min((index as u64 + 1) * ENTRIES as u64 - 1);
            let page = page_of(&mut self.pages[index], self.base);
            if !page.dirty {
                page.dirty = true;
                self.dirty.push(index as u32);
            }
            let range = (at % ENTRIES as u64) as usize..=(page_last % ENTRIES as u64) as usize;
            for entry in &mut page.entries[range] {
                *entry = (*entry).max(lsn.0);
            }
            at = page_last + 1;
        }
    }

    pub fn get(&self, extent: ExtentIndex) -> Lsn {
        let index = (extent.0 / ENTRIES as u64) as usize;
        match self.pages.get(index) {
            Some(Some(page)) => Lsn(page.entries[(extent.0 % ENTRIES as u64) as usize]),
            _ => self.base,
        }
    }

    pub fn newest_version(&self) -> u64 {
        self.newest_version
    }

    pub fn extents(&self) -> u64 {
        self.extents
    }

    /// The first extent at or after `from` on a page that may have entries above `since`.
    pub fn skip_unchanged(&self, from: u64, since: Lsn) -> u64 {
        if self.base > since {
            return from;
        }
        let mut index = (from / ENTRIES as u64) as usize;
        while self.pages.get(index).is_some_and(Option::is_none) {
            index += 1;
        }
        from.max(index as u64 * ENTRIES as u64)
    }

    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// The pages that changed since the last call, each with the offset of the slot to write it to.
    pub fn take_dirty(&mut self, checkpoint: u64) -> Vec<(u64, Slice)> {
        let mut writes = Vec::with_capacity(self.dirty.len());
        for index in std::mem::take(&mut self.dirty) {
            let page = self.pages[index as usize].as_mut().expect("a dirty page is in memory");
            page.dirty = false;
            // The other slot keeps the older state until this checkpoint is complete; checkpoints never overlap.
            page.slot = 1 - page.slot;
            let offset = (u64::from(index) * 2 + u64::from(page.slot)) * PAGE_SIZE as u64;
            writes.push((offset, encode(self.disk, index.into(), checkpoint, &page.entries)));
        }
        writes
    }

    /// Takes the two slots of page `index` from the file. True if a slot was damaged, so that all of the
    /// page now counts as changed at `conservative`.
    pub fn load(&mut self, index: u64, slots: [&[u8]; 2], conservative: Lsn) -> bool {
        let decoded = slots.map(|slot| decode(self.disk, index, slot));
        let damaged = decoded.iter().any(|slot| matches!(slot, Err(Damaged)));
        let mut best: Option<(u8, u64, Box<[u64; ENTRIES]>)> = None;
        for (number, slot) in decoded.into_iter().enumerate() {
            if let Ok(Some((version, _))) = &slot {
                self.newest_version = self.newest_version.max(*version);
            }
            if let Ok(Some((version, entries))) = slot
                && best.as_ref().is_none_or(|(_, other, _)| version > *other)
            {
                best = Some((number as u8, version, entries));
            }
        }
        let Some(place) = self.pages.get_mut(index as usize) else { return false };
        if best.is_none() && !damaged {
            return false;
        }
        // Without a sound slot the next write goes to slot 0.
        let (slot, entries) = match best {
            Some((slot, _, entries)) => (slot, entries),
            None => (1, Box::new([self.base.0; ENTRIES])),
        };
        let page = place.insert(Page { entries, dirty: damaged, slot });
        if damaged {
            // The damaged slot may have been the newer one: only the other's successor repairs it.
            for entry in page.entries.iter_mut() {
                *entry = (*entry).max(conservative.0);
            }
            self.dirty.push(index as u32);
        }
        damaged
    }
}

fn page_of(place: &mut Option<Page>, base: Lsn) -> &mut Page {
    place.get_or_insert_with(|| Page { entries: Box::new([base.0; ENTRIES]), dirty: false, slot: 1 })
}

struct Damaged;

fn encode(disk: DiskIndex, index: u64, checkpoint: u64, entries: &[u64; ENTRIES]) -> Slice {
    let mut bytes = BufferMut::zeroed(PAGE_SIZE);
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[8..16].copy_from_slice(&index.to_le_bytes());
    bytes[16..24].copy_from_slice(&checkpoint.to_le_bytes());
    bytes[24..26].copy_from_slice(&disk.0.to_le_bytes());
    for (place, entry) in bytes[HEADER_LEN..].chunks_exact_mut(8).zip(entries) {
        place.copy_from_slice(&entry.to_le_bytes());
    }
    let checksum = crc32c(&bytes[8..]);
    bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
    bytes.freeze().whole()
}

/// A version and its entries.
type Decoded = Option<(u64, Box<[u64; ENTRIES]>)>;

fn decode(disk: DiskIndex, index: u64, bytes: &[u8]) -> Result<Decoded, Damaged> {
    if is_zero(bytes) {
        return Ok(None);
    }
    if bytes.len() != PAGE_SIZE {
        return Err(Damaged);
    }
    let sound = bytes[..4] == MAGIC
        && bytes[4..8] == crc32c(&bytes[8..]).to_le_bytes()
        && bytes[8..16] == index.to_le_bytes()
        && bytes[24..26] == disk.0.to_le_bytes();
    if !sound {
        return Err(Damaged);
    }
    let mut entries = Box::new([0; ENTRIES]);
    for (entry, place) in entries.iter_mut().zip(bytes[HEADER_LEN..].chunks_exact(8)) {
        *entry = u64::from_le_bytes(place.try_into().expect("eight bytes"));
    }
    Ok(Some((u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes")), entries)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(map: &mut ChangeMap, checkpoint: u64, file: &mut Vec<u8>) {
        for (offset, page) in map.take_dirty(checkpoint) {
            file.resize(file.len().max(offset as usize + PAGE_SIZE), 0);
            file[offset as usize..offset as usize + PAGE_SIZE].copy_from_slice(&page);
        }
    }

    #[test]
    fn the_newer_sound_slot_wins_and_damage_counts_as_changed() {
        let (disk, extents) = (DiskIndex(3), 600);
        let mut map = ChangeMap::new(disk, Lsn(0), extents);
        let mut file = Vec::new();
        map.mark(ExtentIndex(5), ExtentIndex(7), Lsn(10));
        slots(&mut map, 1, &mut file);
        map.mark(ExtentIndex(6), ExtentIndex(6), Lsn(20));
        slots(&mut map, 2, &mut file);

        let load = |file: &[u8]| {
            let mut map = ChangeMap::new(disk, Lsn(0), extents);
            let damaged = map.load(0, [&file[..PAGE_SIZE], &file[PAGE_SIZE..2 * PAGE_SIZE]], Lsn(30));
            (map, damaged)
        };
        let (loaded, damaged) = load(&file);
        assert!(!damaged);
        let seen = [4, 5, 6, 7].map(|extent| loaded.get(ExtentIndex(extent)).0);
        assert_eq!(seen, [0, 10, 20, 10]);

        for at in [PAGE_SIZE + 3, PAGE_SIZE + 17, 2 * PAGE_SIZE - 1, 40] {
            let mut rotten = file.clone();
            rotten[at] ^= 4;
            let (loaded, damaged) = load(&rotten);
            assert!(damaged);
            assert!((0..ENTRIES as u64).all(|extent| loaded.get(ExtentIndex(extent)) >= Lsn(30)));
            assert!(loaded.is_dirty());
        }
    }
}

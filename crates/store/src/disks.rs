//! The group's disk table, and which extents of each disk changed.

use crate::change_map::ChangeMap;
use crate::event::{Output, Refused, Token};
use crate::params::DiskEntry;
use crate::store::{Store, extent_count};
use crate::superblock::{DiskRow, MAX_DISKS, MAX_LOCATION};
use crate::task::Purpose;
use rempart_types::{DiskIndex, ExtentIndex, Lsn, SECTOR_SIZE};
use std::collections::BTreeMap;

/// Extents looked at in one call at most.
const SCAN_LIMIT: u64 = 1 << 20;

impl Store {
    /// Adds a disk: `DisksChanged` follows.
    pub fn add_disk(&mut self, token: Token, entry: DiskEntry, out: &mut Output) -> Result<(), Refused> {
        self.check_running()?;
        if self.disk_size(entry.index).is_some() {
            return Err(Refused::Name);
        }
        if !is_possible(&entry) || self.superblock.disks.len() >= MAX_DISKS {
            return Err(Refused::OutOfRange);
        }
        if self.changes_disks() {
            return Err(Refused::State);
        }
        self.queue_task(Purpose::AddDisk(token, entry), out);
        Ok(())
    }

    /// Forgets a disk; its image stays where it is.
    pub fn remove_disk(&mut self, token: Token, disk: DiskIndex, out: &mut Output) -> Result<(), Refused> {
        self.check_running()?;
        self.disk_size(disk).ok_or(Refused::Name)?;
        if self.changes_disks() || self.superblock.syncing.is_some() {
            return Err(Refused::State);
        }
        self.queue_task(Purpose::RemoveDisk(token, disk), out);
        Ok(())
    }

    /// Grows a disk.
    pub fn resize_disk(
        &mut self,
        token: Token,
        disk: DiskIndex,
        size: u64,
        out: &mut Output,
    ) -> Result<(), Refused> {
        self.check_running()?;
        let old = self.disk_size(disk).ok_or(Refused::Name)?;
        if size < old || !size.is_multiple_of(SECTOR_SIZE) || size > i64::MAX as u64 {
            return Err(Refused::OutOfRange);
        }
        if self.changes_disks() {
            return Err(Refused::State);
        }
        self.queue_task(Purpose::ResizeDisk(token, disk, size), out);
        Ok(())
    }

    /// One change of the table at a time.
    fn changes_disks(&self) -> bool {
        let queued = self.tasks.iter().chain(self.task.as_ref().map(|task| &task.purpose));
        let change = |p: &Purpose| {
            matches!(p, Purpose::AddDisk(..) | Purpose::RemoveDisk(..) | Purpose::ResizeDisk(..))
        };
        queued.into_iter().any(change)
    }

    pub(crate) fn change_disk_table(&mut self, purpose: &Purpose) {
        match purpose {
            Purpose::AddDisk(_, entry) => {
                let map = ChangeMap::new(entry.index, entry.base, extent_count(entry.size));
                self.maps.insert(entry.index, map);
                self.superblock.disks.push(DiskRow { entry: entry.clone(), noted: (0, 0), suspect: false });
                self.superblock.disks.sort_by_key(|row| row.entry.index);
            }
            Purpose::RemoveDisk(_, disk) => {
                self.maps.remove(disk);
                self.index.remove(disk);
                self.images_dirty.remove(disk);
                self.maps_written.remove(disk);
                self.superblock.disks.retain(|row| row.entry.index != *disk);
            }
            Purpose::ResizeDisk(_, disk, size) => {
                if let Some(row) = self.superblock.disks.iter_mut().find(|row| row.entry.index == *disk) {
                    row.entry.size = *size;
                }
                if let Some(map) = self.maps.get_mut(disk) {
                    map.grow(extent_count(*size));
                }
            }
            _ => {}
        }
        self.refresh_health();
    }

    /// Extents of `disk` that may have changed after `since`, with the number that last touched them, from
    /// `from` on, at most `limit`. The second value is where to go on, `None` at the end; a call may find
    /// none and still not be at the end. A superset after crashes, never less.
    pub fn changed_since(
        &self,
        disk: DiskIndex,
        since: Lsn,
        from: ExtentIndex,
        limit: usize,
    ) -> (Vec<(ExtentIndex, Lsn)>, Option<ExtentIndex>) {
        let Some(map) = self.maps.get(&disk) else { return (Vec::new(), None) };
        let end = map.extents();
        let stop = from.0.saturating_add(SCAN_LIMIT).min(end);
        let mut changed: BTreeMap<u64, Lsn> = BTreeMap::new();
        let mut at = from.0;
        while at < stop {
            at = map.skip_unchanged(at, since);
            if at >= stop {
                break;
            }
            let lsn = map.get(ExtentIndex(at));
            if lsn > since {
                changed.insert(at, lsn);
                if changed.len() >= limit.max(1) {
                    at += 1;
                    break;
                }
            }
            at += 1;
        }
        let covered = at.min(stop).max(from.0);
        self.add_unapplied(disk, since, from.0, covered, &mut changed);
        let mut list: Vec<(ExtentIndex, Lsn)> =
            changed.into_iter().map(|(extent, lsn)| (ExtentIndex(extent), lsn)).collect();
        let mut next = (covered < end).then_some(ExtentIndex(covered));
        if list.len() > limit.max(1) {
            next = Some(list[limit.max(1)].0);
            list.truncate(limit.max(1));
        }
        (list, next)
    }

    /// Records that are not in the image yet are not in the map either.
    fn add_unapplied(
        &self,
        disk: DiskIndex,
        since: Lsn,
        from: u64,
        to: u64,
        changed: &mut BTreeMap<u64, Lsn>,
    ) {
        for entry in &self.window.batches {
            if entry.last <= since {
                continue;
            }
            for record in entry.batch.records() {
                if record.disk != disk || !record.kind.changes_disk() || record.lsn <= since {
                    continue;
                }
                let first = ExtentIndex::containing(record.offset).0.max(from);
                let last =
                    ExtentIndex::containing(record.offset + record.len - 1).0.saturating_add(1).min(to);
                for extent in first..last {
                    let lsn = changed.entry(extent).or_default();
                    *lsn = (*lsn).max(record.lsn);
                }
            }
        }
    }
}

pub(crate) fn is_possible(entry: &DiskEntry) -> bool {
    entry.size > 0
        && entry.size.is_multiple_of(SECTOR_SIZE)
        && entry.size <= i64::MAX as u64
        && entry.location.len() <= MAX_LOCATION
}

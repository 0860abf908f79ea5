//! What a client that asks for the status of blocks is told: where a disk holds nothing, and when each of its extents
//! changed last. When in doubt, there is data, and it has changed.

use rempart_engine::{DiskRange, Engine};
use rempart_nbd::server::Extent;
use rempart_nbd::{BASE_ALLOCATION, ContextIndex, STATE_HOLE, STATE_ZERO};
use rempart_types::{DiskIndex, EXTENT_SIZE, ExtentIndex, Lsn};
use rustix::fs::{SeekFrom, seek};
use std::collections::BTreeMap;
use std::fs::File;

/// The log position of the last change of each extent; 0 where nothing ever was. Positions that do not fit into 32 bits
/// are told as the largest number that does: changed, whenever that was.
pub const CHANGED_AT: &str = "rempart:changed-at";
/// On a view that was opened with an earlier position: 1 where the disk may have changed since.
pub const CHANGED_SINCE: &str = "rempart:changed-since";
/// By their place in this list.
pub const CONTEXTS: [&str; 3] = [BASE_ALLOCATION, CHANGED_AT, CHANGED_SINCE];
/// Those of a disk as it is now.
pub const LIVE_CONTEXTS: &[&str] = &[BASE_ALLOCATION, CHANGED_AT];

/// An earlier position, of which it is known what changed after it.
#[derive(Debug, Clone, Copy)]
pub struct Since {
    pub lsn: Lsn,
    /// The disk's size then. What it grew by counts as changed.
    pub size: u64,
}

/// Of which moment a disk's status is told.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Extents without a later change are in the image as they were then. The map knows the latest change only: one with
    /// a later change may have changed before as well.
    pub image_at: Lsn,
    pub since: Option<Since>,
}

/// Touched extents looked at for one answer; it may end before the request does.
const MAX_TOUCHED: usize = 4096;
/// Questions to the filesystem for one answer.
const MAX_SEEKS: usize = 128;

/// The images, opened once more for asking where they have holes.
#[derive(Debug, Default)]
pub struct Images {
    files: BTreeMap<DiskIndex, Option<File>>,
}

impl Images {
    /// Disks came, went or grew.
    pub fn forget(&mut self) {
        self.files.clear();
    }

    fn file(&mut self, engine: &Engine, disk: DiskIndex) -> Option<&File> {
        let open = || File::open(engine.image_location(disk)?).ok();
        self.files.entry(disk).or_insert_with(open).as_ref()
    }
}

/// One status for each context asked for.
pub fn statuses(
    engine: &Engine,
    images: &mut Images,
    range: DiskRange,
    contexts: &[ContextIndex],
    moment: Moment,
) -> Vec<(ContextIndex, Vec<Extent>)> {
    let (touched, end) = touched(engine, range);
    let runs = |&context: &ContextIndex| {
        let runs = match (CONTEXTS[context], moment.since) {
            (CHANGED_AT, _) => changed_at(&touched, range.offset, end),
            (CHANGED_SINCE, Some(since)) => changed_since(&touched, range.offset, end, since),
            (CHANGED_SINCE, None) => unreachable!("offered where an earlier position is known"),
            _ => {
                let file = images.file(engine, range.disk);
                allocation(&touched, range.offset, end, moment.image_at, file)
            }
        };
        (context, runs.0)
    };
    contexts.iter().map(runs).collect()
}

/// A run of bytes of one extent or several, and when it changed; what lies between two of them never did.
struct Touched {
    start: u64,
    end: u64,
    at: Lsn,
}

/// From the beginning of `range` to the position returned, which lies in it or at its end.
fn touched(engine: &Engine, range: DiskRange) -> (Vec<Touched>, u64) {
    let wanted = range.offset + range.length;
    let (list, next) =
        engine.changed_extents(range.disk, ExtentIndex(range.offset / EXTENT_SIZE), MAX_TOUCHED);
    let end = next.map_or(wanted, |next| (next.0 * EXTENT_SIZE).min(wanted));
    let clip = |(extent, at): (ExtentIndex, Lsn)| {
        let start = extent.0 * EXTENT_SIZE;
        Touched { start: start.max(range.offset), end: (start + EXTENT_SIZE).min(end), at }
    };
    (list.into_iter().map(clip).filter(|touched| touched.start < touched.end).collect(), end)
}

#[derive(Debug, Default)]
struct Runs(Vec<Extent>);

impl Runs {
    fn push(&mut self, length: u64, flags: u64) {
        match self.0.last_mut() {
            _ if length == 0 => {}
            Some(last) if last.flags == flags => last.length += length,
            _ => self.0.push(Extent { length, flags }),
        }
    }
}

fn changed_at(touched: &[Touched], offset: u64, end: u64) -> Runs {
    let mut runs = Runs::default();
    let mut at = offset;
    for part in touched {
        runs.push(part.start - at, 0);
        runs.push(part.end - part.start, part.at.0.min(u64::from(u32::MAX)));
        at = part.end;
    }
    runs.push(end - at, 0);
    runs
}

fn changed_since(touched: &[Touched], offset: u64, end: u64, since: Since) -> Runs {
    const CHANGED: u64 = 1;
    let mut runs = Runs::default();
    let mut at = offset;
    let known = since.size.clamp(offset, end);
    for part in touched {
        let (start, stop) = (part.start.min(known), part.end.min(known));
        runs.push(start - at, 0);
        runs.push(stop - start, u64::from(part.at > since.lsn) * CHANGED);
        at = stop;
    }
    runs.push(known - at, 0);
    runs.push(end - known, CHANGED);
    runs
}

fn allocation(touched: &[Touched], offset: u64, end: u64, applied: Lsn, file: Option<&File>) -> Runs {
    const NOTHING: u64 = STATE_HOLE | STATE_ZERO;
    let mut runs = Runs::default();
    let mut at = offset;
    let mut seeks = 0;
    // What the file system said last: how far it holds data, or nothing. Mostly that is many extents.
    let mut last = (offset, 0);
    for part in touched {
        runs.push(part.start - at, NOTHING);
        at = part.start;
        // What the image does not have yet is data.
        let Some(file) = file.filter(|_| part.at <= applied) else {
            runs.push(part.end - at, 0);
            at = part.end;
            continue;
        };
        while at < part.end {
            if last.0 <= at {
                if seeks == MAX_SEEKS && at > offset {
                    return runs;
                }
                seeks += 1;
                last = same_until(file, at);
            }
            let stop = last.0.min(part.end);
            runs.push(stop - at, last.1);
            at = stop;
        }
    }
    runs.push(end - at, NOTHING);
    runs
}

/// Up to where `file` holds what it holds at `at`, data or nothing; both when in doubt are data, of a byte at least.
fn same_until(file: &File, at: u64) -> (u64, u64) {
    match seek(file, SeekFrom::Data(at)) {
        // No data after it.
        Err(rustix::io::Errno::NXIO) => (u64::MAX, STATE_HOLE | STATE_ZERO),
        Ok(data) if data > at => (data, STATE_HOLE | STATE_ZERO),
        _ => (seek(file, SeekFrom::Hole(at)).unwrap_or(u64::MAX).max(at + 1), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const KIB: u64 = 1024;

    fn flags(runs: &Runs) -> Vec<(u64, u64)> {
        runs.0.iter().map(|run| (run.length / KIB, run.flags)).collect()
    }

    #[test]
    fn what_was_never_touched_is_nothing_and_what_is_not_in_the_image_yet_is_data() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1024 * KIB).unwrap();
        file.write_all_at(&[1; 4096], 256 * KIB).unwrap();
        let part =
            |start: u64, end: u64, at: u64| Touched { start: start * KIB, end: end * KIB, at: Lsn(at) };
        let touched = [part(64, 128, 9), part(192, 256, 3), part(256, 320, 4)];
        let runs = allocation(&touched, 32 * KIB, 512 * KIB, Lsn(5), Some(&file));
        let (nothing, data) = (STATE_HOLE | STATE_ZERO, 0);
        assert_eq!(flags(&runs), [(32, nothing), (64, data), (128, nothing), (4, data), (252, nothing)]);
        let without_file = allocation(&touched, 32 * KIB, 512 * KIB, Lsn(5), None);
        assert_eq!(
            flags(&without_file),
            [(32, nothing), (64, data), (64, nothing), (128, data), (192, nothing)]
        );
        let runs = changed_at(&touched, 32 * KIB, 512 * KIB);
        assert_eq!(flags(&runs), [(32, 0), (64, 9), (64, 0), (64, 3), (64, 4), (192, 0)]);
    }

    #[test]
    fn what_changed_since_counts_what_the_disk_grew_by() {
        let part =
            |start: u64, end: u64, at: u64| Touched { start: start * KIB, end: end * KIB, at: Lsn(at) };
        let touched = [part(64, 128, 9), part(192, 256, 3), part(256, 320, 4), part(320, 384, 2)];
        let changed = |lsn: u64, size: u64, offset: u64, end: u64| {
            let since = Since { lsn: Lsn(lsn), size: size * KIB };
            let cut = |part: &Touched| Touched {
                start: part.start.clamp(offset * KIB, end * KIB),
                end: part.end.clamp(offset * KIB, end * KIB),
                at: part.at,
            };
            let touched: Vec<Touched> = touched.iter().map(cut).collect();
            flags(&changed_since(&touched, offset * KIB, end * KIB, since))
        };
        assert_eq!(changed(3, 512, 0, 512), [(64, 0), (64, 1), (128, 0), (64, 1), (192, 0)]);
        assert_eq!(changed(9, 512, 0, 512), [(512, 0)], "the change at the position itself is in it");
        assert_eq!(changed(9, 100, 0, 512), [(100, 0), (412, 1)]);
        assert_eq!(changed(9, 100, 128, 512), [(384, 1)]);
    }

    #[test]
    fn positions_beyond_32_bits_are_told_as_the_largest() {
        let touched = [Touched { start: 0, end: 64 * KIB, at: Lsn(1 << 40) }];
        assert_eq!(flags(&changed_at(&touched, 0, 64 * KIB)), [(64, u64::from(u32::MAX))]);
    }
}

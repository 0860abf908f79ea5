//! The verifier: reads a copy's two disk images and holds them against what was acknowledged.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use lab_guest::record::{self, RECORD_BYTES, Record, Slot};
use lab_guest::ring::slot_of;

use crate::guest::{BOOT_DISK_BYTES, DATA_DISK_BYTES, RECORDS_AT};

const SLOTS: u64 = (BOOT_DISK_BYTES - RECORDS_AT) / RECORD_BYTES as u64;

/// The two images of one copy.
#[derive(Debug, Clone)]
pub struct Copy {
    pub boot: PathBuf,
    pub data: PathBuf,
}

/// What a copy holds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Newest record on disk 1 and on disk 2.
    pub newest: [u64; 2],
    /// Acknowledged records that are not on both disks.
    pub lost: Vec<u64>,
    /// What no instant of the guest's life looked like.
    pub contradictions: Vec<String>,
}

impl Verdict {
    pub fn is_good(&self) -> bool {
        self.lost.is_empty() && self.contradictions.is_empty()
    }
}

/// How many findings are listed; more of them tell no more.
const LISTED: usize = 10;

impl Copy {
    /// Finds the images among a node's files: raw files are known by their size.
    pub fn find(folder: &Path) -> Result<Copy> {
        let mut boot = Vec::new();
        let mut data = Vec::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
                let path = entry?.path();
                let metadata = path.symlink_metadata()?;
                match metadata.len() {
                    _ if metadata.is_dir() => folders.push(path),
                    BOOT_DISK_BYTES if metadata.is_file() => boot.push(path),
                    DATA_DISK_BYTES if metadata.is_file() => data.push(path),
                    _ => {}
                }
            }
        }
        match (&boot[..], &data[..]) {
            ([boot], [data]) => Ok(Copy { boot: boot.clone(), data: data.clone() }),
            _ => bail!(
                "one image of each disk expected below {}, found {boot:?} and {data:?}",
                folder.display()
            ),
        }
    }

    /// Checks that records 1 to `acknowledged` are on both disks, and that the disks show one instant of one history.
    ///
    /// The caller took `acknowledged` BEFORE the images came to rest: taken later it might name a record that was
    /// written after the copy was read.
    pub fn verify(&self, acknowledged: u64) -> Result<Verdict> {
        let first = read_records(&self.boot, RECORDS_AT)?;
        let second = read_records(&self.data, 0)?;
        Ok(judge([&first, &second], acknowledged))
    }

    /// First byte that differs between two copies, as (disk, offset).
    pub fn first_difference(&self, other: &Copy) -> Result<Option<(u8, u64)>> {
        for (disk, one, two) in [(1, &self.boot, &other.boot), (2, &self.data, &other.data)] {
            if let Some(at) = first_difference(one, two)? {
                return Ok(Some((disk, at)));
            }
        }
        Ok(None)
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("open {}", path.display()))
}

/// The ring of a disk, one entry a slot.
fn read_records(path: &Path, from: u64) -> Result<Vec<Slot>> {
    const AT_ONCE: u64 = 256;
    let file = open(path)?;
    let mut slots = Vec::with_capacity(SLOTS as usize);
    let mut buffer = vec![0; AT_ONCE as usize * RECORD_BYTES];
    for first in (0..SLOTS).step_by(AT_ONCE as usize) {
        let count = AT_ONCE.min(SLOTS - first) as usize;
        let bytes = &mut buffer[..count * RECORD_BYTES];
        file.read_exact_at(bytes, from + first * RECORD_BYTES as u64)
            .with_context(|| format!("read {}", path.display()))?;
        slots.extend(bytes.chunks_exact(RECORD_BYTES).map(record::decode));
    }
    Ok(slots)
}

fn judge(disks: [&[Slot]; 2], acknowledged: u64) -> Verdict {
    let slots = disks[0].len() as u64;
    let mut verdict = Verdict::default();
    for (index, disk) in disks.into_iter().enumerate() {
        verdict.newest[index] =
            disk.iter().filter_map(|slot| slot.record()).map(|record| record.sequence).max().unwrap_or(0);
    }
    let [first, second] = verdict.newest;
    let mut contradict = |what: String| {
        if verdict.contradictions.len() < LISTED {
            verdict.contradictions.push(what);
        }
    };
    if !(second <= first && first <= second + 1) {
        contradict(format!("disk 1 ends at record {first}, disk 2 at {second}"));
    }
    for (index, disk) in disks.into_iter().enumerate() {
        for (slot, content) in disk.iter().enumerate() {
            if let Slot::Damaged { claimed_sequence } = content {
                contradict(format!(
                    "disk {}: slot {slot} is damaged (record {claimed_sequence}?)",
                    index + 1
                ));
            }
        }
    }
    // Of a ring that went round, the oldest records are gone, one more on disk 1 while a record is on its way.
    let oldest = (first + 1).saturating_sub(slots).max(1);
    let mut previous: Option<Record> = None;
    for sequence in oldest..=first.min(second).max(acknowledged) {
        let [one, two] = disks.map(|disk| disk[slot_of(sequence, slots) as usize].record());
        let its = |record: Option<Record>| record.filter(|record| record.sequence == sequence);
        match (its(one), its(two)) {
            (Some(one), Some(two)) => {
                if one != two {
                    contradict(format!("record {sequence} differs between the disks"));
                }
                if previous.is_some_and(|previous| previous.checksum != one.previous_checksum) {
                    contradict(format!("record {sequence} does not follow record {}", sequence - 1));
                }
                previous = Some(one);
            }
            _ if sequence <= acknowledged => {
                if verdict.lost.len() < LISTED {
                    verdict.lost.push(sequence);
                }
                previous = None;
            }
            _ => {
                contradict(format!("record {sequence} is missing, later ones are there"));
                previous = None;
            }
        }
    }
    verdict
}

fn first_difference(one: &Path, two: &Path) -> Result<Option<u64>> {
    let (one, two) = (open(one)?, open(two)?);
    let bytes = one.metadata()?.len();
    if bytes != two.metadata()?.len() {
        return Ok(Some(bytes.min(two.metadata()?.len())));
    }
    let mut buffers = [vec![0; 1 << 20], vec![0; 1 << 20]];
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(1 << 20) as usize;
        let [left, right] = &mut buffers;
        one.read_exact_at(&mut left[..length], at)?;
        two.read_exact_at(&mut right[..length], at)?;
        if left[..length] != right[..length] {
            let offset = left.iter().zip(right.iter()).position(|(a, b)| a != b).expect("they differ");
            return Ok(Some(at + offset as u64));
        }
        at += length as u64;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(slots: u64, written: u64) -> Vec<Slot> {
        let mut ring = vec![Slot::Empty; slots as usize];
        let mut buffer = vec![0; RECORD_BYTES];
        let mut previous = 0;
        for sequence in 1..=written {
            previous = record::encode(&mut buffer, sequence, 5, sequence, previous);
            ring[slot_of(sequence, slots) as usize] = record::decode(&buffer);
        }
        ring
    }

    #[test]
    fn a_whole_copy_is_good_also_past_a_lap() {
        for written in [0, 1, 7, 8, 9, 30] {
            let (first, second) = (history(8, written), history(8, written));
            assert!(judge([&first, &second], written).is_good(), "{written} records");
            let ahead = history(8, written + 1);
            let verdict = judge([&ahead, &second], written);
            assert!(verdict.is_good(), "{written} records and one on its way: {verdict:?}");
        }
    }

    #[test]
    fn an_acknowledged_record_that_is_gone_is_lost() {
        let (first, second) = (history(64, 9), history(64, 9));
        assert_eq!(judge([&first, &second], 10).lost, [10]);
        let mut holed = second.clone();
        holed[3] = Slot::Empty;
        assert_eq!(judge([&first, &holed], 9).lost, [4]);
    }

    #[test]
    fn an_instant_that_never_was_is_found() {
        let behind = history(64, 5);
        assert!(!judge([&behind, &history(64, 6)], 5).is_good(), "disk 2 ahead of disk 1");
        assert!(!judge([&history(64, 8), &behind], 5).is_good(), "disk 1 two records ahead");
        let mut damaged = history(64, 5);
        damaged[40] = Slot::Damaged { claimed_sequence: 41 };
        assert!(!judge([&damaged, &behind], 5).is_good(), "damage outside the records");
        let mut other = history(64, 5);
        let mut buffer = vec![0; RECORD_BYTES];
        record::encode(&mut buffer, 3, 6, 3, 0);
        other[2] = record::decode(&buffer);
        assert!(!judge([&other, &other.clone()], 5).is_good(), "a record of another history");
    }
}

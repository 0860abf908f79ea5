//! All disks of a machine: which bytes may be left out of a backup, and what was not understood.

use crate::disk::{Disk, Fault, Section};
use crate::files::{has_boot_sector, xfs};
use crate::lvm::{self, Logical};
use crate::map::{Map, Mapped};
use crate::ntfs::Found;
use crate::swap::Swap;
use crate::volumes::{Place, layout, physical_of};
use crate::{ext4, ntfs, partition, swap};
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::Range;

/// Ranges told, at most: the longest.
const MOST_RANGES: usize = 200_000;

/// What is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Swap spaces, page files.
    pub swap: bool,
    pub free_space: bool,
    /// Its file systems were frozen, or nobody had them mounted: of those that cannot tell themselves.
    pub is_quiet: bool,
}

/// What is in bytes that may be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// A swap partition.
    Swap,
    /// A swap file, or a page file.
    PageFile,
    /// No file has it.
    FreeSpace,
}

/// Bytes that may be left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Of the disks, counted as one.
    pub range: Range<u64>,
    pub reason: Reason,
}

/// What is backed up although it may not need to be, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remark {
    /// The number of the disk; none if it is of several, or of all.
    pub disk: Option<usize>,
    pub what: String,
}

/// What was found on the disks of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survey {
    /// In order, apart from each other.
    pub left_out: Vec<LeftOut>,
    pub remarks: Vec<Remark>,
}

impl Survey {
    fn remark(&mut self, disk: Option<usize>, of: &str, why: &str) {
        self.remarks.push(Remark { disk, what: format!("{of}: {why}: all of it is backed up") });
    }
}

/// What a part of a disk, or a logical volume, is.
enum Finding {
    /// Ranges of its own, and what there is to say of the rest.
    Leave(Vec<LeftOut>, Option<String>),
    /// A machine sleeps in it: its memory knows file systems better than the disks do.
    Sleeping(&'static str),
    Keep(Option<String>),
}

/// Looks at the disks of a machine, which lie one behind the other on `disks`.
///
/// # Errors
/// If a disk cannot be read. What is damaged or not understood is a remark, and is not left out.
pub fn survey(all: &dyn Disk, disks: &[Range<u64>], wanted: Wanted) -> io::Result<Survey> {
    let mut survey = Survey::default();
    let mut places: Vec<(Option<usize>, String, Map)> = Vec::new();
    let mut physical = Vec::new();
    for (disk, at) in disks.iter().enumerate() {
        let parts = match layout(all, at)? {
            Ok(parts) => parts,
            Err(fault) => {
                survey.remark(Some(disk), "the disk", &fault.to_string());
                continue;
            }
        };
        for Place { number, map, is_dynamic } in parts {
            let name = number.map_or_else(|| "the disk".to_owned(), |number| format!("partition {number}"));
            match physical_of(all, &map)? {
                _ if is_dynamic => survey.remark(Some(disk), &name, "a part of a dynamic disk of Windows"),
                Ok(None) => places.push((Some(disk), name, map)),
                Ok(Some(one)) => physical.push(one),
                Err(why) => survey.remark(Some(disk), &name, &why),
            }
        }
    }
    for Logical { name, map, is_shared } in lvm::logical(&physical, all.len()) {
        match map {
            Ok(_) if is_shared => survey.remark(None, &name, "a logical volume that others are made of"),
            Ok(map) => places.push((None, name, map)),
            Err(why) => survey.remark(None, &name, &why),
        }
    }
    for (disk, name, map) in places {
        match look_at(Section::whole(&Mapped { disk: all, map: &map }), wanted)? {
            Finding::Leave(found, remark) => {
                survey.left_out.extend(found.into_iter().flat_map(|found| {
                    let runs = map.runs(found.range).into_iter();
                    runs.map(move |range| LeftOut { range, reason: found.reason })
                }));
                let remark = remark.map(|what| Remark { disk, what: format!("{name}: {what}") });
                survey.remarks.extend(remark);
            }
            Finding::Keep(None) => {}
            Finding::Keep(Some(why)) => survey.remark(disk, &name, &why),
            // Pages of its memory may be in other swap spaces, too.
            Finding::Sleeping(what) => {
                let what = format!("{name}: {what}: all of the machine is backed up");
                return Ok(Survey { left_out: Vec::new(), remarks: vec![Remark { disk, what }] });
            }
        }
    }
    shorten(&mut survey);
    Ok(survey)
}

fn look_at(section: Section<'_>, wanted: Wanted) -> io::Result<Finding> {
    let found = swap::recognise(section).and_then(|swap| {
        Ok(match swap {
            // It may sleep whatever else there is.
            Swap::Hibernated => Finding::Sleeping("a machine hibernates in this swap space"),
            _ if let Some(what) = master(section)? => Finding::Keep(Some(what.to_owned())),
            Swap::Behind(start) if wanted.swap => {
                Finding::Leave(vec![LeftOut { range: start..section.len(), reason: Reason::Swap }], None)
            }
            Swap::Behind(_) => Finding::Keep(None),
            Swap::No if ext4::is_one(section)? && xfs::is_one(section)? => {
                Finding::Keep(Some("an ext4 and an XFS file system in one place".to_owned()))
            }
            Swap::No if ext4::is_one(section)? => match ext4::leave_out(section, wanted)? {
                Some(found) => Finding::Leave(sorted(section, found)?, None),
                None => Finding::Sleeping("a machine hibernates in a swap file"),
            },
            Swap::No if xfs::is_one(section)? => match xfs::leave_out(section, wanted)? {
                Some(found) => Finding::Leave(sorted(section, found)?, None),
                None => Finding::Sleeping("a machine hibernates in a swap file"),
            },
            Swap::No if ntfs::is_one(section)? => match ntfs::leave_out(section, wanted)? {
                Some(Found { left_out, remark }) => {
                    Finding::Leave(sorted(section, left_out)?, remark.map(str::to_owned))
                }
                None => Finding::Sleeping(
                    "Windows hibernates in this file system, or was shut down to start fast",
                ),
            },
            Swap::No => Finding::Keep(None),
        })
    });
    match found {
        Ok(found) => Ok(found),
        Err(Fault::Read(error)) => Err(error),
        Err(fault) => Ok(Finding::Keep(Some(fault.to_string()))),
    }
}

/// What disposes of these bytes, if it is none that is understood here. It may have been put where a file system was whose
/// first bytes are still there, and who believed them would take what is used for free.
fn master(section: Section<'_>) -> Result<Option<&'static str>, Fault> {
    const RAID: &[u8] = b"\xfc\x4e\x2b\xa9";
    const SIGNS: [(u64, &[u8], &str); 6] = [
        (0, b"LUKS\xba\xbe", "encrypted by LUKS"),
        (0, RAID, "a member of a RAID"),
        (4096, RAID, "a member of a RAID"),
        (4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "a part of a bcache"),
        (0x4000, b"\x01\x01\0\0\0\0\0\0\0\0\0\x01", "a part of a ZFS pool"),
        (0x1_0040, b"_BHRfS_M", "a Btrfs file system, which is not understood"),
    ];
    let len = section.len();
    // A RAID's superblock may also be at the end, by either of two rules.
    let ends = [len / 65536 * 65536, len.saturating_sub(8192) / 4096 * 4096 + 65536];
    let at_the_end = ends.map(|end| (end.saturating_sub(65536), RAID, "a member of a RAID"));
    for (at, sign, what) in SIGNS.into_iter().chain(at_the_end) {
        if len >= at + sign.len() as u64 && section.read_vec(at, sign.len())? == sign {
            return Ok(Some(what));
        }
    }
    // As a disk of a machine inside of this one has them.
    let has_partitions = !has_boot_sector(section)? && !partition::list(section)?.is_empty();
    Ok(has_partitions.then_some("a disk with partitions of its own"))
}

/// Sorts, joins, and keeps what saves most. Where things lie in the same place, nothing is left out.
fn shorten(survey: &mut Survey) {
    let left_out = &mut survey.left_out;
    left_out.sort_unstable_by_key(|one| one.range.start);
    if left_out.windows(2).any(|pair| pair[0].range.end > pair[1].range.start) {
        left_out.clear();
        survey.remark(None, "all disks", "two file systems lie in the same place");
        return;
    }
    left_out.dedup_by(|next, one| {
        let joins = one.reason == next.reason && one.range.end == next.range.start;
        if joins {
            one.range.end = next.range.end;
        }
        joins
    });
    if left_out.len() > MOST_RANGES {
        left_out.sort_unstable_by_key(|one| std::cmp::Reverse(one.range.end - one.range.start));
        left_out.truncate(MOST_RANGES);
        left_out.sort_unstable_by_key(|one| one.range.start);
    }
}

/// What a section's file system may be without, if it does not contradict itself.
fn sorted(section: Section<'_>, mut found: Vec<LeftOut>) -> Result<Vec<LeftOut>, Fault> {
    found.retain(|one| !one.range.is_empty());
    found.sort_unstable_by_key(|one| one.range.start);
    let apart = found.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start);
    let inside = found.last().is_none_or(|last| last.range.end <= section.len());
    if apart && inside {
        Ok(found)
    } else {
        Fault::damaged("a file system that gives the same bytes away twice")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_the_same_place_is_nobodys() {
        let left_out = |ranges: &[Range<u64>]| {
            let each = |range: &Range<u64>| LeftOut { range: range.clone(), reason: Reason::Swap };
            let mut survey = Survey { left_out: ranges.iter().map(each).collect(), remarks: Vec::new() };
            shorten(&mut survey);
            let ranges: Vec<_> = survey.left_out.into_iter().map(|one| one.range).collect();
            (ranges, survey.remarks.len())
        };
        assert_eq!(left_out(&[20..30, 0..10, 10..15]), (vec![0..15, 20..30], 0));
        assert_eq!(left_out(&[0..10, 20..30, 9..12]), (vec![], 1));
    }
}

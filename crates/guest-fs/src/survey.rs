//! All of a disk: which bytes may be left out of a backup, and what was not understood.

use crate::disk::{Disk, Fault, Section};
use crate::swap::Swap;
use crate::{ext4, ntfs, partition, swap};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Ranges told of one disk, at most: the longest.
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
    /// Of the disk.
    pub range: Range<u64>,
    pub reason: Reason,
}

/// What was found on a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survey {
    /// In order, apart from each other, but for partitions that are not in order.
    pub left_out: Vec<LeftOut>,
    /// What is backed up although it may not need to be, and why.
    pub remarks: Vec<String>,
}

/// What one part of a disk is.
enum Finding {
    Leave(Vec<LeftOut>),
    /// A machine sleeps in it: its memory knows file systems better than the disk does.
    Sleeping(&'static str),
    Keep(Option<String>),
}

/// Looks at all of a disk.
///
/// # Errors
/// If the disk cannot be read. What is damaged or not understood is a remark, and is not left out.
pub fn survey(disk: &dyn Disk, wanted: Wanted) -> std::io::Result<Survey> {
    let whole = Section::whole(disk);
    let mut survey = Survey::default();
    let partitions = match partition::list(whole) {
        Ok(partitions) => partitions,
        Err(Fault::Read(error)) => return Err(error),
        Err(fault) => {
            survey.remarks.push(format!("the disk: {fault}: all of it is backed up"));
            return Ok(survey);
        }
    };
    let mut sections: Vec<(String, Section<'_>)> = Vec::new();
    for (number, partition) in (1..).zip(&partitions) {
        let section =
            whole.part(partition.start, partition.len).expect("partitions are inside of their disk");
        sections.push((format!("partition {number}"), section));
    }
    if sections.is_empty() {
        sections.push(("the disk".to_owned(), whole));
    }
    for (name, section) in sections {
        match look_at(section, wanted)? {
            Finding::Leave(found) => survey.left_out.extend(found.into_iter().map(|found| LeftOut {
                range: section.start() + found.range.start..section.start() + found.range.end,
                ..found
            })),
            Finding::Keep(None) => {}
            Finding::Keep(Some(why)) => survey.remarks.push(format!("{name}: {why}: all of it is backed up")),
            Finding::Sleeping(what) => {
                let why = format!("{name}: {what}: all of the disk is backed up");
                return Ok(Survey { left_out: Vec::new(), remarks: vec![why] });
            }
        }
    }
    shorten(&mut survey);
    Ok(survey)
}

fn look_at(section: Section<'_>, wanted: Wanted) -> std::io::Result<Finding> {
    let found = swap::recognise(section).and_then(|swap| {
        Ok(match swap {
            Swap::Hibernated => Finding::Sleeping("a machine hibernates in this swap space"),
            Swap::Behind(start) if wanted.swap => {
                Finding::Leave(vec![LeftOut { range: start..section.len(), reason: Reason::Swap }])
            }
            Swap::Behind(_) => Finding::Keep(None),
            Swap::No if ext4::is_one(section)? => match ext4::leave_out(section, wanted)? {
                Some(found) => Finding::Leave(sorted(section, found)?),
                None => Finding::Sleeping("a machine hibernates in a swap file"),
            },
            Swap::No if ntfs::is_one(section)? => match ntfs::leave_out(section, wanted)? {
                Some(found) => Finding::Leave(sorted(section, found)?),
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

/// Sorts, joins, and keeps what saves most.
fn shorten(survey: &mut Survey) {
    let left_out = &mut survey.left_out;
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

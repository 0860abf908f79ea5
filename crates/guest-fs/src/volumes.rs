//! The volumes of a disk: its partitions, or all of it, and what LVM makes of them.

use crate::disk::{Disk, Fault, Section};
use crate::files::{FileSystemKind, Found, has_boot_sector, recognise};
use crate::lvm::{self, Logical, Physical};
use crate::map::{Map, Mapped};
use crate::partition;
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::Range;

/// A part of a disk, and what lies in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// `partition-1`, `whole`, or a group's and a logical volume's, as the device mapper has it.
    pub name: String,
    /// None if it is not known where it lies.
    pub map: Option<Map>,
    /// If its files can be read.
    pub kind: Option<FileSystemKind>,
    /// What else there is to say of it.
    pub note: Option<String>,
}

/// What is on one of the disks that lie, one behind the other, on `all`. A logical volume is on the disk where it begins.
///
/// # Errors
/// If it cannot be read. Of what is damaged or not understood a volume says so.
pub fn volumes(all: &dyn Disk, disks: &[Range<u64>], disk: usize) -> io::Result<Vec<Volume>> {
    let Some(at) = disks.get(disk) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "there is no such disk"));
    };
    let mut found = parts(all, at)?;
    let mut physical = Vec::new();
    for volume in &mut found {
        let Some(map) = &volume.map else { continue };
        match physical_of(all, map)? {
            Ok(None) => {}
            Ok(Some(one)) => {
                physical.push(one);
                volume.note = Some("a physical volume of LVM".to_owned());
            }
            Err(why) => volume.note = Some(why),
        }
    }
    if physical.is_empty() {
        return Ok(found);
    }
    // A group may be on several disks.
    for (_, other) in disks.iter().enumerate().filter(|(number, _)| *number != disk) {
        for map in parts(all, other)?.into_iter().filter_map(|volume| volume.map) {
            physical.extend(physical_of(all, &map)?.ok().flatten());
        }
    }
    for Logical { name, map, .. } in lvm::logical(&physical, all.len()) {
        match map {
            Ok(map) if at.contains(&map.start()) => found.push(look_at(all, name, map)?),
            // It is told with another disk.
            Ok(_) => {}
            Err(why) => found.push(Volume { name, map: None, kind: None, note: Some(why) }),
        }
    }
    Ok(found)
}

/// The partitions of a disk, or all of it, and what lies in each.
fn parts(all: &dyn Disk, at: &Range<u64>) -> io::Result<Vec<Volume>> {
    let parts = match layout(all, at)? {
        Ok(parts) => parts,
        Err(fault) => {
            let whole = look_at(all, "whole".to_owned(), Map::run(at.start, at.end - at.start))?;
            return Ok(vec![Volume { kind: None, note: Some(fault.to_string()), ..whole }]);
        }
    };
    let named = |Place { number, map, .. }| {
        let name = number.map_or_else(|| "whole".to_owned(), |number| format!("partition-{number}"));
        look_at(all, name, map)
    };
    parts.into_iter().map(named).collect()
}

/// A partition of a disk, or all of it.
pub(crate) struct Place {
    /// Of a partition, from 1 on.
    pub number: Option<usize>,
    pub map: Map,
    /// What begins in it may go on elsewhere.
    pub is_dynamic: bool,
}

/// The parts of a disk, or why its table is not understood.
pub(crate) type Layout = Result<Vec<Place>, Fault>;

/// The parts of the disk that lies on `at`.
pub(crate) fn layout(all: &dyn Disk, at: &Range<u64>) -> io::Result<Layout> {
    let disk = at.end.checked_sub(at.start).and_then(|len| Section::whole(all).part(at.start, len));
    let Some(disk) = disk.filter(|disk| !disk.is_empty()) else { return Ok(Ok(Vec::new())) };
    let whole = || vec![Place { number: None, map: Map::run(at.start, disk.len()), is_dynamic: false }];
    // A boot sector of a file system has whatever it likes where a partition table would be.
    let listed =
        has_boot_sector(disk).and_then(|has| if has { Ok(Vec::new()) } else { partition::list(disk) });
    let partitions = match listed {
        Ok(partitions) if partitions.is_empty() => return Ok(Ok(whole())),
        Ok(partitions) => partitions,
        Err(Fault::Read(error)) => return Err(error),
        Err(fault) => return Ok(Err(fault)),
    };
    let numbered = (1..).zip(&partitions).filter(|(_, partition)| partition.len > 0);
    let mapped = numbered.map(|(number, partition)| Place {
        number: Some(number),
        map: Map::run(at.start + partition.start, partition.len),
        is_dynamic: partition.is_dynamic,
    });
    Ok(Ok(mapped.collect()))
}

/// If it is a physical volume; or why it cannot be told.
pub(crate) fn physical_of(all: &dyn Disk, map: &Map) -> io::Result<Result<Option<Physical>, String>> {
    let mapped = Mapped { disk: all, map };
    match lvm::physical(Section::whole(&mapped), map.start()) {
        Ok(found) => Ok(Ok(found)),
        Err(Fault::Read(error)) => Err(error),
        Err(fault) => Ok(Err(fault.to_string())),
    }
}

fn look_at(disk: &dyn Disk, name: String, map: Map) -> io::Result<Volume> {
    let mapped = Mapped { disk, map: &map };
    let (kind, note) = match recognise(Section::whole(&mapped)) {
        Ok((Found::FileSystem(kind), note)) => (Some(kind), note),
        Ok((Found::Other(what), _)) => (None, Some(what.to_owned())),
        Err(Fault::Read(error)) => return Err(error),
        Err(fault) => (None, Some(fault.to_string())),
    };
    Ok(Volume { name, map: Some(map), kind, note })
}

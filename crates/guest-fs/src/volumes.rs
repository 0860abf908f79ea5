//! The volumes of a disk: its partitions, or all of it.

use crate::disk::{Disk, Fault, Section};
use crate::files::{FileSystemKind, Found, recognise};
use crate::map::{Map, Mapped};
use crate::partition;
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::Range;

/// A part of a disk, and what lies in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// `partition-1`, or `whole`.
    pub name: String,
    pub map: Map,
    /// If its files can be read.
    pub kind: Option<FileSystemKind>,
    /// What else there is to say of it.
    pub note: Option<String>,
}

/// What is on the disk at `at`, of those that are on `disks`.
///
/// # Errors
/// If it cannot be read. Of what is damaged or not understood a volume says so.
pub fn volumes(disks: &dyn Disk, at: Range<u64>) -> io::Result<Vec<Volume>> {
    let all = Section::whole(disks);
    let Some(disk) = all.part(at.start, at.end - at.start) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "there is no such disk"));
    };
    let whole = look_at(disks, "whole".to_owned(), Map::run(at.start, at.end - at.start))?;
    // A boot sector of a file system has whatever it likes where a partition table would be.
    if matches!(whole.kind, Some(FileSystemKind::Fat | FileSystemKind::ExFat | FileSystemKind::Ntfs)) {
        return Ok(vec![whole]);
    }
    let partitions = match partition::list(disk) {
        Ok(partitions) => partitions,
        Err(Fault::Read(error)) => return Err(error),
        Err(fault) => return Ok(vec![Volume { kind: None, note: Some(fault.to_string()), ..whole }]),
    };
    if partitions.is_empty() {
        return Ok(vec![whole]);
    }
    let mut found = Vec::new();
    for (number, partition) in (1..).zip(&partitions).filter(|(_, partition)| partition.len > 0) {
        let map = Map::run(at.start + partition.start, partition.len);
        found.push(look_at(disks, format!("partition-{number}"), map)?);
    }
    Ok(found)
}

fn look_at(disk: &dyn Disk, name: String, map: Map) -> io::Result<Volume> {
    let mapped = Mapped { disk, map: &map };
    let (kind, note) = match recognise(Section::whole(&mapped)) {
        Ok((Found::FileSystem(kind), note)) => (Some(kind), note),
        Ok((Found::Other(what), _)) => (None, Some(what.to_owned())),
        Err(Fault::Read(error)) => return Err(error),
        Err(fault) => (None, Some(fault.to_string())),
    };
    Ok(Volume { name, map, kind, note })
}

//! What lies in a part of a disk.

use super::FileSystem;
use super::exfat::{self, ExFat};
use super::fat::{self, Fat};
use super::ntfs::Ntfs;
use super::xfs::{self, Xfs};
use crate::disk::{Fault, Section};
use crate::swap::Swap;
use crate::{ext4, swap};
use serde::{Deserialize, Serialize};

/// A kind of file system that can be read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileSystemKind {
    Ext4,
    Ntfs,
    Fat,
    ExFat,
    Xfs,
}

impl FileSystemKind {
    pub fn name(self) -> &'static str {
        match self {
            FileSystemKind::Ext4 => "ext2/3/4",
            FileSystemKind::Ntfs => "NTFS",
            FileSystemKind::Fat => "FAT",
            FileSystemKind::ExFat => "exFAT",
            FileSystemKind::Xfs => "XFS",
        }
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    FileSystem(FileSystemKind),
    /// Nothing with files that can be read: what it is, if that is known.
    Other(&'static str),
}

/// By its first bytes. The second is what is to be said of it.
pub fn recognise(section: Section<'_>) -> Result<(Found, Option<String>), Fault> {
    let of = |kind| Ok((Found::FileSystem(kind), None));
    if crate::ntfs::is_one(section)? {
        let note = match crate::ntfs::is_at_rest(section) {
            Ok(true) => None,
            Ok(false) => Some("it was in use: it is read as it lay there, without its log".to_owned()),
            Err(fault) => Some(fault.to_string()),
        };
        return Ok((Found::FileSystem(FileSystemKind::Ntfs), note));
    }
    if exfat::is_one(section)? {
        return of(FileSystemKind::ExFat);
    }
    if fat::is_one(section)? {
        return of(FileSystemKind::Fat);
    }
    if ext4::is_one(section)? {
        let note =
            ext4::note(section).map_or_else(|fault| Some(fault.to_string()), |note| note.map(str::to_owned));
        return Ok((Found::FileSystem(FileSystemKind::Ext4), note));
    }
    if xfs::is_one(section)? {
        let note =
            "it is read without its log: if it was in use, what was new in it may be missing".to_owned();
        return Ok((Found::FileSystem(FileSystemKind::Xfs), Some(note)));
    }
    if !matches!(swap::recognise(section), Ok(Swap::No)) {
        return Ok((Found::Other("swap"), None));
    }
    Ok((Found::Other(other(section)?), None))
}

/// Whether it begins with a boot sector, in which a file system is its own master.
pub(crate) fn has_boot_sector(section: Section<'_>) -> Result<bool, Fault> {
    Ok(crate::ntfs::is_one(section)? || exfat::is_one(section)? || fat::is_one(section)?)
}

fn other(section: Section<'_>) -> Result<&'static str, Fault> {
    const SIGNS: [(u64, &[u8], &str); 5] = [
        (0, b"LUKS\xba\xbe", "encrypted by LUKS"),
        (3, b"-FVE-FS-", "encrypted by BitLocker"),
        (0x1_0040, b"_BHRfS_M", "a Btrfs file system, which is not read here"),
        (4096, b"\xfc\x4e\x2b\xa9", "a member of a RAID, which is not read here"),
        (512, b"LABELONE", "a physical volume of LVM"),
    ];
    for (at, sign, what) in SIGNS {
        if section.len() >= at + sign.len() as u64 && section.read_vec(at, sign.len())? == sign {
            return Ok(what);
        }
    }
    Ok("nothing that is known here")
}

/// Opens a file system.
pub fn open<'a>(section: Section<'a>, kind: FileSystemKind) -> Result<Box<dyn FileSystem + 'a>, Fault> {
    Ok(match kind {
        FileSystemKind::Ext4 => Box::new(ext4::Ext4::open(section)?),
        FileSystemKind::Ntfs => Box::new(Ntfs::open(section)?),
        FileSystemKind::Fat => Box::new(Fat::open(section)?),
        FileSystemKind::ExFat => Box::new(ExFat::open(section)?),
        FileSystemKind::Xfs => Box::new(Xfs::open(section)?),
    })
}

//! ext2, ext3 and ext4 (Documentation/filesystems/ext4 of the kernel): free blocks and swap files of file systems whose
//! journal is empty; and the files of any.
//!
//! A mounted file system's truth is half in its journal. ext4 says so itself: `needs_recovery` is set while it is mounted, and
//! clear while it is frozen.

mod files;
mod groups;
mod inode;
mod journal;
mod superblock;

use crate::disk::{Fault, Section};
use crate::survey::{LeftOut, Reason, Wanted};
use crate::swap::{self, Swap};
use groups::Groups;
use inode::Inode;
use std::ops::Range;
use superblock::Superblock;

pub use files::{Ext4, note};

/// Swap files are looked for in the root folder, by how their names begin.
const SWAP_NAME: &[u8] = b"swap";
const MOST_SWAP_FILES: usize = 16;

pub fn is_one(section: Section<'_>) -> Result<bool, Fault> {
    Ok(section.len() >= 2048 && section.read_array::<2>(1024 + 0x38)? == superblock::MAGIC)
}

/// What a clean file system may be without; `None` if a machine hibernates in it.
pub fn leave_out(section: Section<'_>, wanted: Wanted) -> Result<Option<Vec<LeftOut>>, Fault> {
    let superblock = Superblock::read(section)?;
    let groups = Groups::read(section, &superblock)?;
    let mut found = Vec::new();
    // Also where they are to be kept: one of them may hold a sleeping machine's memory.
    let Some(files) = swap_files(section, &superblock, &groups)? else { return Ok(None) };
    if wanted.swap {
        found.extend(files.into_iter().map(|range| LeftOut { range, reason: Reason::PageFile }));
    }
    if wanted.free_space {
        let free = groups.free_blocks(section, &superblock)?;
        let free = free.into_iter().map(|blocks| superblock.bytes_of(blocks));
        found.extend(free.map(|range| LeftOut { range, reason: Reason::FreeSpace }));
    }
    Ok(Some(found))
}

/// Bytes of all swap files, behind their headers; `None` if a machine hibernates in one.
fn swap_files(
    section: Section<'_>,
    superblock: &Superblock,
    groups: &Groups,
) -> Result<Option<Vec<Range<u64>>>, Fault> {
    let root = Inode::read(section, superblock, groups, inode::ROOT)?;
    let mut found = Vec::new();
    let entries = root.entries(section, superblock)?.into_iter();
    for entry in entries.filter(|entry| entry.name.starts_with(SWAP_NAME)).take(MOST_SWAP_FILES) {
        let file = Inode::read(section, superblock, groups, entry.inode)?;
        if !file.is_file() {
            continue;
        }
        let mut extents = file.extents(section, superblock)?;
        // One that begins with a hole cannot be swapped to.
        let Some(first) = extents.first_mut().filter(|first| first.at == 0).map(|first| &mut first.bytes)
        else {
            continue;
        };
        let Some(start) = section.part(first.start, first.end - first.start) else {
            return Fault::damaged("an ext4 file system with a file behind its end");
        };
        match swap::recognise_file(start, file.size())? {
            // The header's page stays: by what it says the guest finds its swap space again.
            Swap::Behind(header) => {
                first.start += header;
                found.extend(extents.into_iter().map(|extent| extent.bytes));
            }
            Swap::Hibernated => return Ok(None),
            Swap::No => {}
        }
    }
    Ok(Some(found))
}

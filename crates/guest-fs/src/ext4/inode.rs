//! Files and folders.

use super::groups::Groups;
use super::superblock::Superblock;
use crate::disk::{Fault, Section, u16_at, u32_at};
use std::ops::Range;

pub const ROOT: u32 = 2;

const KIND: u16 = 0xf000;
pub const KIND_FILE: u16 = 0x8000;
pub const KIND_FOLDER: u16 = 0x4000;
pub const FLAG_EXTENTS: u32 = 0x8_0000;
pub const FLAG_INLINE_DATA: u32 = 0x1000_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
const DEEPEST: u16 = 5;
/// An extent that is longer was reserved and not written.
const LONGEST_WRITTEN: u16 = 0x8000;
pub const MOST_EXTENTS: usize = 1_000_000;
const LARGEST_FOLDER: u64 = 4 << 20;

#[derive(Debug)]
pub struct Inode(Vec<u8>);

/// A piece of a file.
#[derive(Debug)]
pub struct Extent {
    /// Byte of the file that it begins with.
    pub at: u64,
    /// Of the file system.
    pub bytes: Range<u64>,
    /// Else its bytes are zeroes, whatever lies there.
    pub is_written: bool,
}

impl Inode {
    pub fn read(
        section: Section<'_>,
        superblock: &Superblock,
        groups: &Groups,
        number: u32,
    ) -> Result<Inode, Fault> {
        if number == 0 || number > superblock.inodes {
            return Fault::damaged("an ext4 file system that names an inode it does not have");
        }
        let (index, per_group) = (u64::from(number - 1), u64::from(superblock.inodes_per_group));
        let table = groups.inode_table(index / per_group).filter(|table| *table < superblock.blocks);
        let Some(table) = table else {
            return Fault::damaged("an ext4 file system whose inodes lie behind its end");
        };
        let at = table * superblock.block_len + index % per_group * superblock.inode_len;
        Ok(Inode(section.read_vec(at, superblock.inode_len as usize)?))
    }

    pub fn raw(&self) -> &[u8] {
        &self.0
    }

    pub fn kind(&self) -> u16 {
        u16_at(&self.0, 0) & KIND
    }

    pub fn is_file(&self) -> bool {
        self.kind() == KIND_FILE
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        u64::from(u32_at(&self.0, 0x4)) | u64::from(u32_at(&self.0, 0x6c)) << 32
    }

    pub fn flags(&self) -> u32 {
        u32_at(&self.0, 0x20)
    }

    /// Where its bytes lie, in their order, up to whole blocks. Holes are not among them.
    pub fn extents(&self, section: Section<'_>, superblock: &Superblock) -> Result<Vec<Extent>, Fault> {
        if self.flags() & FLAG_INLINE_DATA != 0 || self.flags() & FLAG_EXTENTS == 0 {
            return Err(Fault::Unsupported("an ext4 file system with files that are not kept in extents"));
        }
        let mut extents = Vec::new();
        walk(section, superblock, &self.0[0x28..0x64], DEEPEST + 1, &mut extents)?;
        Ok(extents)
    }

    /// Names in the root folder, and the inodes that they stand for.
    pub fn entries(&self, section: Section<'_>, superblock: &Superblock) -> Result<Vec<DirEntry>, Fault> {
        if self.kind() != KIND_FOLDER || self.size() > LARGEST_FOLDER {
            return Err(Fault::Unsupported(
                "an ext4 file system whose root is no folder, or a very large one",
            ));
        }
        entries(section, superblock, &self.extents(section, superblock)?, self.size())
    }
}

/// A name in a folder.
#[derive(Debug)]
pub struct DirEntry {
    pub name: Vec<u8>,
    pub inode: u32,
    /// What it stands for, as folders say it; 0 where they do not.
    pub kind: u8,
}

/// What is in a folder of `size` bytes. A folder's index is entries of no inode.
pub fn entries(
    section: Section<'_>,
    superblock: &Superblock,
    extents: &[Extent],
    size: u64,
) -> Result<Vec<DirEntry>, Fault> {
    let mut entries = Vec::new();
    for extent in extents.iter().filter(|extent| extent.is_written && extent.at < size) {
        let end = extent.bytes.end.min(extent.bytes.start + (size - extent.at));
        for block in (extent.bytes.start..end).step_by(superblock.block_len as usize) {
            entries_of(&section.read_vec(block, superblock.block_len as usize)?, &mut entries)?;
        }
    }
    Ok(entries)
}

fn entries_of(block: &[u8], entries: &mut Vec<DirEntry>) -> Result<(), Fault> {
    const HEADER: usize = 8;
    let mut rest = block;
    while rest.len() >= HEADER {
        let (inode, len, name) = (u32_at(rest, 0), usize::from(u16_at(rest, 4)), usize::from(rest[6]));
        // With blocks of 64 KiB, the length of a whole one does not fit.
        let len = if len == 0xffff { rest.len() } else { len };
        if len < HEADER || len > rest.len() || HEADER + name > len {
            return Fault::damaged("an ext4 file system with a damaged folder");
        }
        if inode != 0 {
            let name = rest[HEADER..HEADER + name].to_vec();
            entries.push(DirEntry { name, inode, kind: rest[7] });
        }
        rest = &rest[len..];
    }
    Ok(())
}

/// Reads a node of an extent tree. `levels` bounds the depth.
fn walk(
    section: Section<'_>,
    superblock: &Superblock,
    node: &[u8],
    levels: u16,
    found: &mut Vec<Extent>,
) -> Result<(), Fault> {
    const DAMAGED: &str = "an ext4 file system with a damaged extent";
    const ENTRY: usize = 12;
    let (count, depth) = (usize::from(u16_at(node, 2)), u16_at(node, 6));
    if u16_at(node, 0) != EXTENT_MAGIC || depth >= levels || ENTRY * (count + 1) > node.len() {
        return Fault::damaged(DAMAGED);
    }
    for entry in node[ENTRY..].chunks_exact(ENTRY).take(count) {
        let first = u64::from(u32_at(entry, 0)) * superblock.block_len;
        if found.last().is_some_and(|last| first < last.at + (last.bytes.end - last.bytes.start)) {
            return Fault::damaged(DAMAGED);
        }
        if depth > 0 {
            let child = u64::from(u32_at(entry, 4)) | u64::from(u16_at(entry, 8)) << 32;
            let before = found.len();
            walk(section, superblock, &superblock.block(section, child)?, depth, found)?;
            if found.len() == before {
                // No file system has empty ones, and a few of them could name each other very often.
                return Fault::damaged(DAMAGED);
            }
            continue;
        }
        let len = u16_at(entry, 4);
        let is_written = len <= LONGEST_WRITTEN;
        let len = u64::from(if is_written { len } else { len - LONGEST_WRITTEN });
        let start = u64::from(u32_at(entry, 8)) | u64::from(u16_at(entry, 6)) << 32;
        if len == 0 || start == 0 || start + len > superblock.blocks {
            return Fault::damaged(DAMAGED);
        }
        found.push(Extent { at: first, bytes: superblock.bytes_of(start..start + len), is_written });
        if found.len() > MOST_EXTENTS {
            return Err(Fault::Unsupported("an ext4 file system with a file in too many pieces"));
        }
    }
    Ok(())
}

//! Block groups: their descriptors and their bitmaps of blocks.

use super::superblock::{Superblock, checksum};
use crate::disk::{Fault, Section, u16_at, u32_at};
use std::ops::Range;

/// Groups that are looked at: 128 TiB of them with blocks of 4 KiB.
const MOST_GROUPS: u64 = 1 << 20;
/// The group's bitmap was never written: nor were its blocks.
const BLOCK_UNINIT: u16 = 0x2;
/// Runs of free blocks, at most.
const MOST_RUNS: usize = 1 << 20;

#[derive(Debug)]
struct Group {
    bitmap: u64,
    inode_table: u64,
    free_blocks: u32,
    flags: u16,
    bitmap_checksum: u32,
}

#[derive(Debug)]
pub struct Groups(Vec<Group>);

impl Groups {
    pub fn read(section: Section<'_>, superblock: &Superblock) -> Result<Groups, Fault> {
        let count = superblock.groups();
        if count > MOST_GROUPS {
            return Err(Fault::Unsupported("an ext4 file system with too many groups"));
        }
        let at = (superblock.first_data_block + 1) * superblock.block_len;
        let table = section.read_vec(at, (count * superblock.descriptor_len) as usize)?;
        let mut groups = Vec::with_capacity(count as usize);
        for (number, raw) in (0u32..).zip(table.chunks_exact(superblock.descriptor_len as usize)) {
            if let Some(seed) = superblock.checksum_seed {
                let sum = checksum(seed, &[&number.to_le_bytes(), &raw[..0x1e], &[0, 0], &raw[0x20..]]);
                if sum as u16 != u16_at(raw, 0x1e) {
                    return Fault::damaged("an ext4 file system with a group whose checksum is wrong");
                }
            }
            let is_long = raw.len() >= 64;
            let high = |at: usize| if is_long { u64::from(u32_at(raw, at)) << 32 } else { 0 };
            let high16 = |at: usize| if is_long { u32::from(u16_at(raw, at)) << 16 } else { 0 };
            groups.push(Group {
                bitmap: u64::from(u32_at(raw, 0x0)) | high(0x20),
                inode_table: u64::from(u32_at(raw, 0x8)) | high(0x28),
                free_blocks: u32::from(u16_at(raw, 0xc)) | high16(0x2c),
                flags: u16_at(raw, 0x12),
                bitmap_checksum: u32::from(u16_at(raw, 0x18)) | high16(0x38),
            });
        }
        Ok(Groups(groups))
    }

    /// The block where a group's inodes begin.
    pub fn inode_table(&self, group: u64) -> Option<u64> {
        self.0.get(usize::try_from(group).ok()?).map(|group| group.inode_table)
    }

    /// Blocks that no file has, in order. Every bitmap has to agree with its group's count, and with its checksum if it has
    /// one: if one does not, nothing is free.
    pub fn free_blocks(
        &self,
        section: Section<'_>,
        superblock: &Superblock,
    ) -> Result<Vec<Range<u64>>, Fault> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (number, group) in (0u64..).zip(&self.0) {
            if group.flags & BLOCK_UNINIT != 0 {
                continue;
            }
            let blocks = superblock.blocks_of_group(number);
            let bitmap = superblock.block(section, group.bitmap)?;
            if let Some(seed) = superblock.checksum_seed {
                let sum = checksum(seed, &[&bitmap[..superblock.blocks_per_group as usize / 8]]);
                let mask = if superblock.descriptor_len >= 64 { u32::MAX } else { 0xffff };
                if sum & mask != group.bitmap_checksum {
                    return Fault::damaged("an ext4 file system with a bitmap whose checksum is wrong");
                }
            }
            let is_free = |block: &u64| {
                let bit = block - blocks.start;
                bitmap[(bit / 8) as usize] >> (bit % 8) & 1 == 0
            };
            let mut free = 0;
            for block in blocks.clone().filter(is_free) {
                free += 1;
                match runs.last_mut() {
                    Some(last) if last.end == block => last.end += 1,
                    _ => runs.push(block..block + 1),
                }
            }
            if free != group.free_blocks {
                return Fault::damaged("an ext4 file system with a group that miscounts its free blocks");
            }
            if runs.len() > MOST_RUNS {
                return Err(Fault::Unsupported(
                    "an ext4 file system whose free space lies in too many pieces",
                ));
            }
        }
        Ok(runs)
    }
}

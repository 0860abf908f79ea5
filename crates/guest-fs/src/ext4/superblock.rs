//! What the file system says of itself.

use crate::disk::{Fault, Section, u16_at, u32_at};
use crc_fast::{CrcAlgorithm, Digest};
use std::ops::Range;

pub const MAGIC: [u8; 2] = [0x53, 0xef];

const AT: u64 = 1024;
const LEN: usize = 1024;
const COMPAT_HAS_JOURNAL: u32 = 0x4;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_JOURNAL_DEVICE: u32 = 0x8;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
/// File types in folders, recovery, journal device, extents, 64 bits, MMP, flexible groups, attributes in inodes, data in
/// folders, checksum seed, large folders, inline data, encryption, folded names. Not: groups' descriptors elsewhere.
const INCOMPAT_KNOWN: u32 = 0x3_f7ce;
const RO_COMPAT_BIGALLOC: u32 = 0x200;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
const STATE_CLEAN: u16 = 0x1;
const STATE_ERRORS: u16 = 0x2;
/// Blocks have from 1 to 64 KiB.
const LARGEST_BLOCK: u32 = 6;

#[derive(Debug)]
pub struct Superblock {
    pub block_len: u64,
    pub blocks: u64,
    pub first_data_block: u64,
    pub blocks_per_group: u64,
    pub inodes: u32,
    pub inodes_per_group: u32,
    pub inode_len: u64,
    pub descriptor_len: u64,
    /// Of all checksums, where there are any.
    pub checksum_seed: Option<u32>,
    /// The inode of its journal, if it has one.
    pub journal: Option<u32>,
    /// What the journal holds is newer than what lies in its place.
    pub needs_recovery: bool,
    /// Why what lies there is not all there is to say.
    in_use: Option<&'static str>,
}

impl Superblock {
    /// # Errors
    /// [`Fault::InUse`] if the file system is mounted, or was when its machine died.
    pub fn read(section: Section<'_>) -> Result<Superblock, Fault> {
        let superblock = Superblock::read_in_use(section)?;
        superblock.in_use.map_or(Ok(superblock), |why| Err(Fault::InUse(why)))
    }

    /// The same, also of one that is mounted.
    pub fn read_in_use(section: Section<'_>) -> Result<Superblock, Fault> {
        let raw = section.read_vec(AT, LEN)?;
        let (compat, incompat, ro_compat) = (u32_at(&raw, 0x5c), u32_at(&raw, 0x60), u32_at(&raw, 0x64));
        if incompat & INCOMPAT_JOURNAL_DEVICE != 0 {
            return Err(Fault::Unsupported("it is the journal of an ext4 file system"));
        }
        if incompat & !INCOMPAT_KNOWN != 0 || ro_compat & RO_COMPAT_BIGALLOC != 0 {
            return Err(Fault::Unsupported("an ext4 file system with features that are not known here"));
        }
        let state = u16_at(&raw, 0x3a);
        let has_journal = compat & COMPAT_HAS_JOURNAL != 0;
        let needs_recovery = incompat & INCOMPAT_RECOVER != 0;
        let in_use = if state & STATE_ERRORS != 0 {
            Some("an ext4 file system with errors")
        } else if needs_recovery || !has_journal && state & STATE_CLEAN == 0 {
            Some("an ext4 file system that is mounted and was not frozen")
        } else {
            None
        };
        let has_checksums = ro_compat & RO_COMPAT_METADATA_CSUM != 0;
        let checksum_seed = has_checksums.then(|| match incompat & INCOMPAT_CSUM_SEED {
            0 => checksum(u32::MAX, &[&raw[0x68..0x78]]),
            _ => u32_at(&raw, 0x270),
        });
        if has_checksums && checksum(u32::MAX, &[&raw[..0x3fc]]) != u32_at(&raw, 0x3fc) {
            return Fault::damaged("an ext4 file system whose superblock has the wrong checksum");
        }
        let block_shift = u32_at(&raw, 0x18);
        if block_shift > LARGEST_BLOCK {
            return Fault::damaged("an ext4 file system with blocks of an impossible size");
        }
        let is_64bit = incompat & INCOMPAT_64BIT != 0;
        let high = if is_64bit { u64::from(u32_at(&raw, 0x150)) } else { 0 };
        let superblock = Superblock {
            block_len: 1024 << block_shift,
            blocks: u64::from(u32_at(&raw, 0x4)) | high << 32,
            first_data_block: u64::from(u32_at(&raw, 0x14)),
            blocks_per_group: u64::from(u32_at(&raw, 0x20)),
            inodes: u32_at(&raw, 0x0),
            inodes_per_group: u32_at(&raw, 0x28),
            inode_len: if u32_at(&raw, 0x4c) == 0 { 128 } else { u64::from(u16_at(&raw, 0x58)) },
            descriptor_len: if is_64bit { u64::from(u16_at(&raw, 0xfe)) } else { 32 },
            checksum_seed,
            journal: has_journal.then(|| u32_at(&raw, 0xe0)),
            needs_recovery,
            in_use,
        };
        superblock.check(section)?;
        Ok(superblock)
    }

    fn check(&self, section: Section<'_>) -> Result<(), Fault> {
        let fits = self.blocks.checked_mul(self.block_len).is_some_and(|bytes| bytes <= section.len());
        let bitmap_bits = self.block_len * 8;
        let is_sound = fits
            && self.first_data_block == u64::from(self.block_len == 1024)
            && self.blocks > self.first_data_block
            && (8..=bitmap_bits).contains(&self.blocks_per_group)
            && self.blocks_per_group.is_multiple_of(8)
            && (1..=bitmap_bits).contains(&u64::from(self.inodes_per_group))
            && self.inode_len.is_power_of_two()
            && (128..=self.block_len).contains(&self.inode_len)
            && self.descriptor_len.is_power_of_two()
            && (32..=1024).contains(&self.descriptor_len);
        if is_sound { Ok(()) } else { Fault::damaged("an ext4 file system whose superblock makes no sense") }
    }

    pub fn groups(&self) -> u64 {
        (self.blocks - self.first_data_block).div_ceil(self.blocks_per_group)
    }

    /// Blocks of a group: the last may be short.
    pub fn blocks_of_group(&self, group: u64) -> Range<u64> {
        let start = self.first_data_block + group * self.blocks_per_group;
        start..(start + self.blocks_per_group).min(self.blocks)
    }

    pub fn bytes_of(&self, blocks: Range<u64>) -> Range<u64> {
        blocks.start * self.block_len..blocks.end * self.block_len
    }

    /// Reads one block.
    pub fn block(&self, section: Section<'_>, block: u64) -> Result<Vec<u8>, Fault> {
        if block == 0 || block >= self.blocks {
            return Fault::damaged("an ext4 file system that names a block behind its end");
        }
        section.read_vec(block * self.block_len, self.block_len as usize)
    }
}

/// CRC-32C without the last inversion, as ext4 keeps it, over several pieces.
pub fn checksum(seed: u32, pieces: &[&[u8]]) -> u32 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(seed));
    pieces.iter().for_each(|piece| digest.update(piece));
    !(digest.finalize() as u32)
}

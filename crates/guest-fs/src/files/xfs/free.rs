//! What a file system may be without: free space, by the trees of its groups, and swap files.

use super::{DAMAGED, INODE_REALTIME, Xfs, be16, be32, be64, log};
use crate::disk::{Fault, Section, u32_at};
use crate::files::{Content, FileSystem, Kind};
use crate::survey::{LeftOut, Reason, Wanted};
use crate::swap::{self, Swap};
use crc_fast::CrcAlgorithm;
use std::ops::Range;

/// Swap files are looked for in the root folder, by how their names begin.
const SWAP_NAME: &[u8] = b"swap";
const MOST_SWAP_FILES: usize = 16;
/// Free inodes, reverse maps, shared extents, counted inodes.
const RO_COMPAT_KNOWN: u32 = 0xf;
const INCOMPAT_NEEDS_REPAIR: u32 = 0x10;
const INODE_SHARED: u64 = 1 << 1;
const SUPERBLOCK_CHECKSUM: usize = 224;
const GROUP_CHECKSUM: usize = 216;
const NODE_CHECKSUM: usize = 52;
const INODE_CHECKSUM: usize = 100;
const DEEPEST: u32 = 9;
/// Groups that are looked at: of 1 TiB each, 1 EiB.
const MOST_GROUPS: u64 = 1 << 20;
/// Runs of free blocks, at most.
const MOST_RUNS: usize = 1 << 20;

/// What a file system at rest may be without; `None` if a machine hibernates in it.
pub fn leave_out(section: Section<'_>, wanted: Wanted) -> Result<Option<Vec<LeftOut>>, Fault> {
    let mut fs = Xfs::open(section)?;
    let sector = fs.check_superblock()?;
    if !log::is_at_rest(&fs)? {
        return Err(Fault::InUse("an XFS file system that is mounted and was not frozen"));
    }
    // Also where they are to be kept: one of them may hold a sleeping machine's memory.
    let Some(mut found) = swap_files(&mut fs)? else { return Ok(None) };
    if !wanted.swap {
        found.clear();
    }
    if wanted.free_space {
        let groups = fs.blocks.div_ceil(fs.group_blocks);
        if groups > MOST_GROUPS {
            return Err(Fault::Unsupported("an XFS file system with too many groups"));
        }
        for group in 0..groups {
            let free = fs.free_blocks(group, sector)?;
            found.extend(free.into_iter().map(|range| LeftOut { range, reason: Reason::FreeSpace }));
            if found.len() > MOST_RUNS {
                return Err(Fault::Unsupported(
                    "an XFS file system whose free space lies in too many pieces",
                ));
            }
        }
    }
    Ok(Some(found))
}

/// Of all swap files, what is behind their headers; `None` if a machine hibernates in one.
fn swap_files(fs: &mut Xfs<'_>) -> Result<Option<Vec<LeftOut>>, Fault> {
    let mut found = Vec::new();
    let names = fs.list(fs.root())?.into_iter().filter(|entry| entry.name.starts_with(SWAP_NAME));
    for entry in names.take(MOST_SWAP_FILES) {
        let inode = fs.inode(entry.file)?;
        if inode.kind()? != Kind::File {
            continue;
        }
        let is_damaged =
            inode.is_v3() && (!is_sound(&inode.raw, INODE_CHECKSUM) || be64(&inode.raw, 152) != entry.file);
        if is_damaged {
            return Err(DAMAGED);
        }
        // What another file has, too, is not swapped to.
        if inode.flags2() & INODE_SHARED != 0 {
            continue;
        }
        if be16(&inode.raw, 90) & INODE_REALTIME != 0 {
            continue;
        }
        let mut content = fs.mapped_with(&inode.data()?, inode.size(), true)?;
        let size = content.size;
        // One that begins with a hole cannot be swapped to.
        let Some(first) = content.extents.first_mut().filter(|first| first.at == 0) else { continue };
        let start = fs.section.part(first.bytes.start, first.len()).ok_or(DAMAGED)?;
        match swap::recognise_file(start, size)? {
            // The header's page stays: by what it says the guest finds its swap space again.
            Swap::Behind(header) => {
                first.bytes.start += header;
                let Content { extents, .. } = content;
                let ranges = extents.into_iter().map(|extent| extent.bytes);
                found.extend(ranges.map(|range| LeftOut { range, reason: Reason::PageFile }));
            }
            Swap::Hibernated => return Ok(None),
            Swap::No => {}
        }
    }
    Ok(Some(found))
}

/// Whether the checksum that lies at `at` is that of the rest.
fn is_sound(bytes: &[u8], at: usize) -> bool {
    let mut digest = crc_fast::Digest::new(CrcAlgorithm::Crc32Iscsi);
    [&bytes[..at], &[0; 4], &bytes[at + 4..]].into_iter().for_each(|piece| digest.update(piece));
    digest.finalize() as u32 == u32_at(bytes, at)
}

impl Xfs<'_> {
    /// Bytes of its sectors, if it says of itself nothing that is not known here.
    fn check_superblock(&self) -> Result<u64, Fault> {
        let raw = self.section.read_array::<512>(0)?;
        let sector = u64::from(be16(&raw, 102));
        let is_possible =
            sector.is_power_of_two() && (512..=32768).contains(&sector) && sector <= self.block_len;
        // While it is made, this is set.
        if !is_possible || raw[126] != 0 {
            return Err(DAMAGED);
        }
        if self.is_v5 {
            if !is_sound(&self.section.read_vec(0, sector as usize)?, SUPERBLOCK_CHECKSUM) {
                return Err(DAMAGED);
            }
            if be32(&raw, 212) & !RO_COMPAT_KNOWN != 0 {
                return Err(Fault::Unsupported("an XFS file system with features that are not known here"));
            }
            if be32(&raw, 216) & INCOMPAT_NEEDS_REPAIR != 0 {
                return Err(Fault::InUse("an XFS file system that wants to be repaired"));
            }
        }
        Ok(sector)
    }

    /// Bytes of a group that no file has, in order. They have to be as many as the group says.
    fn free_blocks(&self, group: u64, sector: u64) -> Result<Vec<Range<u64>>, Fault> {
        let first = group * self.group_blocks;
        let blocks = self.group_blocks.min(self.blocks - first);
        let raw = self.section.read_vec(first * self.block_len + sector, sector as usize)?;
        let is_group = raw[..4] == *b"XAGF"
            && be32(&raw, 4) == 1
            && u64::from(be32(&raw, 8)) == group
            && u64::from(be32(&raw, 12)) == blocks
            && (!self.is_v5 || is_sound(&raw, GROUP_CHECKSUM));
        let (root, levels) = (be32(&raw, 16), be32(&raw, 28));
        if !is_group || !(1..=DEEPEST).contains(&levels) {
            return Err(DAMAGED);
        }
        let mut free = Vec::new();
        self.free_node(first, blocks, root, levels - 1, &mut free)?;
        let count: u64 = free.iter().map(|run| run.end - run.start).sum();
        if count != u64::from(be32(&raw, 52)) {
            return Err(Fault::Damaged("an XFS file system with a group that miscounts its free blocks"));
        }
        let bytes =
            |run: Range<u64>| (first + run.start) * self.block_len..(first + run.end) * self.block_len;
        Ok(free.into_iter().map(bytes).collect())
    }

    /// The free runs below a node of a group's tree by place. `first` is the group's first block, of `blocks`.
    fn free_node(
        &self,
        first: u64,
        blocks: u64,
        node: u32,
        level: u32,
        found: &mut Vec<Range<u64>>,
    ) -> Result<(), Fault> {
        if u64::from(node) >= blocks {
            return Err(DAMAGED);
        }
        let raw =
            self.section.read_vec((first + u64::from(node)) * self.block_len, self.block_len as usize)?;
        let (sign, header): (&[u8; 4], _) = if self.is_v5 { (b"AB3B", 56) } else { (b"ABTB", 16) };
        let is_node = raw[..4] == *sign
            && u32::from(be16(&raw, 4)) == level
            && (!self.is_v5
                || is_sound(&raw, NODE_CHECKSUM)
                    && be64(&raw, 16) == (first + u64::from(node)) * (self.block_len / 512));
        let count = usize::from(be16(&raw, 6));
        if !is_node || count == 0 && level > 0 {
            return Err(DAMAGED);
        }
        if level > 0 {
            let room = (raw.len() - header) / 12;
            let pointers = raw[header + room * 8..].chunks_exact(4).take(count.min(room));
            if count > room {
                return Err(DAMAGED);
            }
            for pointer in pointers {
                let before = found.len();
                self.free_node(first, blocks, be32(pointer, 0), level - 1, found)?;
                if found.len() == before {
                    // There are no empty ones, and a few of them could name each other very often.
                    return Err(DAMAGED);
                }
            }
            return Ok(());
        }
        let records = raw[header..].chunks_exact(8);
        if count > records.len() {
            return Err(DAMAGED);
        }
        for record in records.take(count) {
            let (start, len) = (u64::from(be32(record, 0)), u64::from(be32(record, 4)));
            let is_behind = found.last().is_none_or(|last| last.end <= start);
            if len == 0 || start + len > blocks || !is_behind || found.len() > MOST_RUNS {
                return Err(DAMAGED);
            }
            found.push(start..start + len);
        }
        Ok(())
    }
}

//! XFS, versions 4 and 5 ("XFS Algorithms & Data Structures", 3rd edition): files, without the log; free blocks and swap
//! files where the log has nothing to say.

mod attributes;
mod folder;
mod free;
mod log;

pub use free::leave_out;

use super::{Attributes, Content, Extended, FileSystem, Kind, LARGEST_FOLDER, Name};
use crate::disk::{Fault, Section};

const DAMAGED: Fault = Fault::Damaged("an XFS file system that is damaged");
const INCOMPAT_FTYPE: u32 = 0x1;
/// File types, sparse inodes, UUID of metadata, times behind 2038, repairs, many extents, exchanged ranges, parents.
const INCOMPAT_KNOWN: u32 = 0xff;
const FEATURES2_FTYPE: u32 = 0x200;
const INODE_REALTIME: u16 = 0x1;
const INODE_BIGTIME: u64 = 1 << 3;
const INODE_MANY_EXTENTS: u64 = 1 << 4;
const LOCAL: u8 = 1;
const EXTENTS: u8 = 2;
const BTREE: u8 = 3;
const DEEPEST: u16 = 9;
const MOST_EXTENTS: usize = 1_000_000;
const LONGEST_TARGET: u64 = 1024;
const LONGEST_ATTRIBUTES: u64 = 16 << 20;

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[derive(Debug)]
pub struct Xfs<'a> {
    section: Section<'a>,
    block_len: u64,
    blocks: u64,
    group_blocks: u64,
    group_bits: u32,
    inode_len: u64,
    /// Inodes of a block are 2 to the power of this.
    inode_bits: u32,
    root: u64,
    folder_block: u64,
    is_v5: bool,
    tells_kinds: bool,
}

pub fn is_one(section: Section<'_>) -> Result<bool, Fault> {
    Ok(section.len() >= 4096 && section.read_array::<4>(0)? == *b"XFSB")
}

/// One of an inode's two lists of extents.
#[derive(Debug)]
struct Fork {
    format: u8,
    bytes: Vec<u8>,
    extents: u64,
}

struct Inode {
    raw: Vec<u8>,
}

impl Inode {
    fn is_v3(&self) -> bool {
        self.raw[4] >= 3
    }

    fn flags2(&self) -> u64 {
        if self.is_v3() { be64(&self.raw, 120) } else { 0 }
    }

    fn mode(&self) -> u16 {
        be16(&self.raw, 2)
    }

    fn size(&self) -> u64 {
        be64(&self.raw, 56)
    }

    fn kind(&self) -> Result<Kind, Fault> {
        Ok(match self.mode() & 0xf000 {
            0x4000 => Kind::Folder,
            0x8000 => Kind::File,
            0xa000 => Kind::Link,
            0x2000 => Kind::CharacterDevice,
            0x6000 => Kind::BlockDevice,
            0x1000 => Kind::Pipe,
            0xc000 => Kind::Socket,
            _ => return Err(DAMAGED),
        })
    }

    fn start(&self) -> usize {
        if self.is_v3() { 176 } else { 100 }
    }

    fn split(&self) -> Result<usize, Fault> {
        let split = match usize::from(self.raw[82]) * 8 {
            0 => self.raw.len(),
            offset => self.start() + offset,
        };
        if split <= self.raw.len() { Ok(split) } else { Err(DAMAGED) }
    }

    fn data(&self) -> Result<Fork, Fault> {
        let many = self.flags2() & INODE_MANY_EXTENTS != 0;
        let extents = if many { be64(&self.raw, 24) } else { be32(&self.raw, 76).into() };
        Ok(Fork { format: self.raw[5], bytes: self.raw[self.start()..self.split()?].to_vec(), extents })
    }

    fn attributes(&self) -> Result<Option<Fork>, Fault> {
        if self.raw[82] == 0 {
            return Ok(None);
        }
        let many = self.flags2() & INODE_MANY_EXTENTS != 0;
        let extents = if many { be32(&self.raw, 76).into() } else { be16(&self.raw, 80).into() };
        Ok(Some(Fork { format: self.raw[83], bytes: self.raw[self.split()?..].to_vec(), extents }))
    }
}

impl<'a> Xfs<'a> {
    pub fn open(section: Section<'a>) -> Result<Xfs<'a>, Fault> {
        let raw = section.read_array::<512>(0)?;
        let is_v5 = be16(&raw, 100) & 15 == 5;
        let incompat = if is_v5 { be32(&raw, 216) } else { 0 };
        if !is_one(section)? || !(4..=5).contains(&(be16(&raw, 100) & 15)) || incompat & !INCOMPAT_KNOWN != 0
        {
            return Err(Fault::Unsupported("an XFS file system of a kind that is not known here"));
        }
        let tells_kinds =
            if is_v5 { incompat & INCOMPAT_FTYPE != 0 } else { be32(&raw, 200) & FEATURES2_FTYPE != 0 };
        let [block_bits, inode_bits, group_bits, folder_bits] =
            [120, 123, 124, 192].map(|at| u32::from(raw[at]));
        let (block_len, inode_len) = (u64::from(be32(&raw, 4)), u64::from(be16(&raw, 104)));
        let (blocks, group_blocks) = (be64(&raw, 8), u64::from(be32(&raw, 84)));
        let is_sound = (9..=16).contains(&block_bits)
            && block_len == 1 << block_bits
            && (256..=2048).contains(&inode_len)
            && inode_bits < 16
            && inode_len << inode_bits == block_len
            && (1..=31).contains(&group_bits)
            && (1..=1 << group_bits).contains(&group_blocks)
            && folder_bits <= 7
            && blocks.checked_mul(block_len).is_some_and(|len| len <= section.len());
        if !is_sound {
            return Err(DAMAGED);
        }
        let (root, folder_block) = (be64(&raw, 56), block_len << folder_bits);
        Ok(Xfs {
            section,
            block_len,
            blocks,
            group_blocks,
            group_bits,
            inode_len,
            inode_bits,
            root,
            folder_block,
            is_v5,
            tells_kinds,
        })
    }

    /// The byte that a block begins with, by its number: that of its group, and that in its group.
    fn byte_of(&self, block: u64, count: u64) -> Result<u64, Fault> {
        let within = block & ((1 << self.group_bits) - 1);
        let block = (block >> self.group_bits)
            .checked_mul(self.group_blocks)
            .and_then(|start| start.checked_add(within));
        let block = block.filter(|block| block.checked_add(count).is_some_and(|end| end <= self.blocks));
        block.filter(|_| within < self.group_blocks).map(|block| block * self.block_len).ok_or(DAMAGED)
    }

    fn inode(&self, number: u64) -> Result<Inode, Fault> {
        let within = number & ((1 << self.inode_bits) - 1);
        let at = self.byte_of(number >> self.inode_bits, 1)? + within * self.inode_len;
        let raw = self.section.read_vec(at, self.inode_len as usize)?;
        if raw[..2] != *b"IN" || be16(&raw, 2) == 0 {
            return Err(DAMAGED);
        }
        Ok(Inode { raw })
    }

    /// Where what a fork maps lies, `size` bytes at most.
    fn mapped(&self, fork: &Fork, size: u64) -> Result<Content, Fault> {
        self.mapped_with(fork, size, false)
    }

    /// The same, and what is `reserved` and was not written.
    fn mapped_with(&self, fork: &Fork, size: u64, reserved: bool) -> Result<Content, Fault> {
        let mut content = Content::new(size);
        match fork.format {
            EXTENTS => {
                let count = usize::try_from(fork.extents).map_err(|_| DAMAGED)?;
                let records = fork.bytes.chunks_exact(16).take(count);
                if records.len() != count {
                    return Err(DAMAGED);
                }
                records.into_iter().try_for_each(|record| self.record(record, reserved, &mut content))?;
            }
            BTREE => self.node(&fork.bytes, 4, DEEPEST, reserved, &mut content)?,
            _ => return Err(DAMAGED),
        }
        Ok(content)
    }

    fn record(&self, record: &[u8], reserved: bool, content: &mut Content) -> Result<(), Fault> {
        let both = u128::from_be_bytes(record.try_into().expect("16 bytes"));
        let count = (both & ((1 << 21) - 1)) as u64;
        let block = (both >> 21 & ((1 << 52) - 1)) as u64;
        let first = (both >> 73 & ((1 << 54) - 1)) as u64;
        let is_written = both >> 127 == 0;
        let at = first.checked_mul(self.block_len).ok_or(DAMAGED)?;
        let start = self.byte_of(block, count)?;
        if content.extents.last().is_some_and(|last| last.end() > at) || count == 0 {
            return Err(DAMAGED);
        }
        if is_written || reserved {
            content.push(at, start..start + count * self.block_len);
        }
        if content.extents.len() > MOST_EXTENTS {
            return Err(Fault::Unsupported("an XFS file system with a file in too many pieces"));
        }
        Ok(())
    }

    /// A node of a tree of extents, whose keys begin at `header`. Its level and count are right before them in an inode.
    fn node(
        &self,
        bytes: &[u8],
        header: usize,
        below: u16,
        reserved: bool,
        content: &mut Content,
    ) -> Result<(), Fault> {
        let counts = if header == 4 { 0 } else { 4 };
        let (level, count) = (be16(bytes, counts), usize::from(be16(bytes, counts + 2)));
        if level >= below {
            return Err(DAMAGED);
        }
        let room = (bytes.len() - header) / 16;
        if count > room || count == 0 {
            return Err(DAMAGED);
        }
        if level == 0 {
            return bytes[header..]
                .chunks_exact(16)
                .take(count)
                .try_for_each(|record| self.record(record, reserved, content));
        }
        for pointer in bytes[header + room * 8..].chunks_exact(8).take(count) {
            let at = self.byte_of(be64(pointer, 0), 1)?;
            let block = self.section.read_vec(at, self.block_len as usize)?;
            let sign: &[u8] = if self.is_v5 { b"BMA3" } else { b"BMAP" };
            if block[..4] != *sign {
                return Err(DAMAGED);
            }
            self.node(&block, if self.is_v5 { 72 } else { 24 }, level, reserved, content)?;
        }
        Ok(())
    }
}

impl FileSystem for Xfs<'_> {
    fn root(&self) -> u64 {
        self.root
    }

    fn attributes(&mut self, file: u64) -> Result<Attributes, Fault> {
        let inode = self.inode(file)?;
        let raw = &inode.raw;
        let kind = inode.kind()?;
        let modified = if inode.flags2() & INODE_BIGTIME != 0 {
            let since = be64(raw, 40);
            ((since / 1_000_000_000).cast_signed() - (1 << 31), (since % 1_000_000_000) as u32)
        } else {
            (be32(raw, 40).cast_signed().into(), be32(raw, 44).min(999_999_999))
        };
        let device = match kind {
            Kind::CharacterDevice | Kind::BlockDevice => be32(raw, inode.start()),
            _ => 0,
        };
        Ok(Attributes {
            kind,
            mode: u32::from(inode.mode() & 0o7777),
            owner: be32(raw, 8),
            group: be32(raw, 12),
            modified,
            size: if matches!(kind, Kind::Folder | Kind::File | Kind::Link) { inode.size() } else { 0 },
            links: if raw[4] == 1 { be16(raw, 6).into() } else { be32(raw, 16) },
            device: (device >> 18, device & 0x3_ffff),
        })
    }

    fn list(&mut self, folder: u64) -> Result<Vec<Name>, Fault> {
        let inode = self.inode(folder)?;
        if inode.kind()? != Kind::Folder || inode.size() > LARGEST_FOLDER {
            return Err(Fault::Unsupported("it is no folder, or a very large one"));
        }
        let entries = self.entries(&inode)?;
        let names = entries.into_iter().map(|(name, file, kind)| {
            let kind = match kind {
                1 => Kind::File,
                2 => Kind::Folder,
                3 => Kind::CharacterDevice,
                4 => Kind::BlockDevice,
                5 => Kind::Pipe,
                6 => Kind::Socket,
                7 => Kind::Link,
                // Old ones do not say it. What cannot be read is told when somebody asks for it.
                _ => self.attributes(file).map_or(Kind::File, |attributes| attributes.kind),
            };
            Name { name, file, kind }
        });
        Ok(names.collect())
    }

    fn content(&mut self, file: u64) -> Result<Content, Fault> {
        let inode = self.inode(file)?;
        if inode.kind()? != Kind::File {
            return Err(Fault::Unsupported("it is no file"));
        }
        if be16(&inode.raw, 90) & INODE_REALTIME != 0 {
            return Err(Fault::Unsupported("it lies on a realtime device"));
        }
        self.mapped(&inode.data()?, inode.size())
    }

    fn target(&mut self, link: u64) -> Result<Vec<u8>, Fault> {
        let inode = self.inode(link)?;
        let size = inode.size();
        if inode.kind()? != Kind::Link || size > LONGEST_TARGET {
            return Err(DAMAGED);
        }
        let fork = inode.data()?;
        if fork.format == LOCAL {
            return fork.bytes.get(..size as usize).map(<[u8]>::to_vec).ok_or(DAMAGED);
        }
        let mut target = Vec::new();
        for extent in &self.mapped(&fork, u64::from(u16::MAX))?.extents {
            let mut at = extent.bytes.start;
            while at < extent.bytes.end && (target.len() as u64) < size {
                let block = self.section.read_vec(at, self.block_len as usize)?;
                let text = if self.is_v5 {
                    let len = be32(&block, 8) as usize;
                    block.get(56..56 + len).filter(|_| block[..4] == *b"XSLM").ok_or(DAMAGED)?
                } else {
                    &block[..]
                };
                target.extend_from_slice(text);
                at += self.block_len;
            }
        }
        if (target.len() as u64) < size {
            return Err(DAMAGED);
        }
        target.truncate(size as usize);
        Ok(target)
    }

    fn extended(&mut self, file: u64) -> Result<Extended, Fault> {
        let inode = self.inode(file)?;
        let Some(fork) = inode.attributes()? else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        if fork.format == LOCAL {
            attributes::short(&fork.bytes, &mut found)?;
        } else {
            let content = self.mapped(&fork, LONGEST_ATTRIBUTES)?;
            for extent in &content.extents {
                for at in (extent.bytes.start..extent.bytes.end).step_by(self.block_len as usize) {
                    let block = self.section.read_vec(at, self.block_len as usize)?;
                    attributes::leaf(&block, &mut found)?;
                }
            }
        }
        found.sort_unstable();
        Ok(found)
    }
}

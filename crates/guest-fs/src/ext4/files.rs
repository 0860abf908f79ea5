//! Files and folders of any ext2, ext3 or ext4 file system.

use super::groups::Groups;
use super::inode::{
    self, Extent, FLAG_EXTENTS, FLAG_INLINE_DATA, Inode, KIND_FILE, KIND_FOLDER, MOST_EXTENTS,
};
use super::journal::Replayed;
use super::superblock::Superblock;
use crate::disk::{Fault, Section, u16_at, u32_at};
use crate::files::{Attributes, Content, Extended, FileSystem, Kind, LARGEST_FOLDER, Name};

const FLAG_ENCRYPTED: u32 = 0x800;
const KIND_LINK: u16 = 0xa000;
/// A shorter target lies in the inode.
const SHORT_TARGET: u64 = 60;
const LONGEST_TARGET: u64 = 4096;
const ATTRIBUTES_MAGIC: u32 = 0xea02_0000;

/// An open file system.
pub struct Ext4<'a> {
    disk: Replayed<'a>,
    superblock: Superblock,
    groups: Groups,
}

/// What is to be said of it.
pub fn note(section: Section<'_>) -> Result<Option<&'static str>, Fault> {
    let superblock = Superblock::read_in_use(section)?;
    Ok(superblock.needs_recovery.then_some("it was in use: what its journal holds is read in its place"))
}

impl<'a> Ext4<'a> {
    pub fn open(section: Section<'a>) -> Result<Ext4<'a>, Fault> {
        let before = Superblock::read_in_use(section)?;
        let journal = before.journal.filter(|inode| before.needs_recovery && *inode != 0);
        let disk = match journal {
            None => Replayed::without(section),
            Some(inode) => {
                let groups = Groups::read(section, &before)?;
                let journal = Inode::read(section, &before, &groups, inode)?;
                let extents = mapped(&journal, section, &before)?;
                let ranges: Vec<_> = extents.into_iter().map(|extent| extent.bytes).collect();
                Replayed::new(section, &before, &ranges)?
            }
        };
        let whole = Section::whole(&disk);
        let superblock = Superblock::read_in_use(whole)?;
        let groups = Groups::read(whole, &superblock)?;
        Ok(Ext4 { superblock, groups, disk })
    }

    fn inode(&self, file: u64) -> Result<Inode, Fault> {
        let number = u32::try_from(file).map_err(|_| Fault::Damaged("there is no such inode"))?;
        let inode = Inode::read(Section::whole(&self.disk), &self.superblock, &self.groups, number)?;
        if u16_at(inode.raw(), 0) == 0 || u16_at(inode.raw(), 0x1a) == 0 {
            return Fault::damaged("an ext4 file system that names an inode that is not in use");
        }
        Ok(inode)
    }

    fn extents(&self, inode: &Inode) -> Result<Vec<Extent>, Fault> {
        if inode.flags() & FLAG_ENCRYPTED != 0 {
            return Err(Fault::Unsupported("it is encrypted by ext4"));
        }
        mapped(inode, Section::whole(&self.disk), &self.superblock)
    }

    fn content_of(&self, inode: &Inode) -> Result<Content, Fault> {
        let size = inode.size();
        let mut content = Content::new(size);
        for extent in self.extents(inode)?.into_iter().filter(|extent| extent.is_written) {
            let mut at = extent.at;
            for place in self.disk.places(extent.bytes)? {
                let len = place.end - place.start;
                content.push(at, place);
                at += len;
            }
        }
        Ok(content)
    }
}

impl FileSystem for Ext4<'_> {
    fn root(&self) -> u64 {
        inode::ROOT.into()
    }

    fn attributes(&mut self, file: u64) -> Result<Attributes, Fault> {
        let inode = self.inode(file)?;
        let raw = inode.raw();
        let kind = match inode.kind() {
            KIND_FOLDER => Kind::Folder,
            KIND_FILE => Kind::File,
            KIND_LINK => Kind::Link,
            0x2000 => Kind::CharacterDevice,
            0x6000 => Kind::BlockDevice,
            0x1000 => Kind::Pipe,
            0xc000 => Kind::Socket,
            _ => return Fault::damaged("an ext4 file system with an inode of no known kind"),
        };
        let wide = |low: usize, high: usize| u32::from(u16_at(raw, low)) | u32::from(u16_at(raw, high)) << 16;
        let extra = if extra_len(raw) >= 12 { u32_at(raw, 0x88) } else { 0 };
        let seconds = i64::from(u32_at(raw, 0x10).cast_signed()) + (i64::from(extra & 3) << 32);
        Ok(Attributes {
            kind,
            mode: u32::from(u16_at(raw, 0)) & 0o7777,
            owner: wide(0x2, 0x78),
            group: wide(0x18, 0x7a),
            modified: (seconds, (extra >> 2).min(999_999_999)),
            size: if matches!(kind, Kind::Folder | Kind::File | Kind::Link) { inode.size() } else { 0 },
            links: u16_at(raw, 0x1a).into(),
            device: device(raw),
        })
    }

    fn list(&mut self, folder: u64) -> Result<Vec<Name>, Fault> {
        let inode = self.inode(folder)?;
        if inode.kind() != KIND_FOLDER || inode.size() > LARGEST_FOLDER {
            return Err(Fault::Unsupported("it is no folder, or a very large one"));
        }
        let section = Section::whole(&self.disk);
        let entries = inode::entries(section, &self.superblock, &self.extents(&inode)?, inode.size())?;
        let named = entries.into_iter().filter(|entry| entry.name != b"." && entry.name != b"..");
        let names = named.map(|entry| {
            let file = u64::from(entry.inode);
            let kind = match entry.kind {
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
            Name { name: entry.name, file, kind }
        });
        Ok(names.collect())
    }

    fn content(&mut self, file: u64) -> Result<Content, Fault> {
        let inode = self.inode(file)?;
        if inode.kind() != KIND_FILE {
            return Err(Fault::Unsupported("it is no file"));
        }
        self.content_of(&inode)
    }

    fn target(&mut self, link: u64) -> Result<Vec<u8>, Fault> {
        let inode = self.inode(link)?;
        let size = inode.size();
        if inode.kind() != KIND_LINK || size > LONGEST_TARGET {
            return Fault::damaged("an ext4 file system with a link that is none");
        }
        if size < SHORT_TARGET && inode.flags() & (FLAG_EXTENTS | FLAG_ENCRYPTED | FLAG_INLINE_DATA) == 0 {
            return Ok(inode.raw()[0x28..0x28 + size as usize].to_vec());
        }
        let extents = self.extents(&inode)?;
        let Some(first) = extents.first().filter(|first| first.at == 0) else {
            return Fault::damaged("an ext4 file system with a link that leads nowhere");
        };
        Section::whole(&self.disk).read_vec(first.bytes.start, size as usize)
    }

    fn extended(&mut self, file: u64) -> Result<Extended, Fault> {
        let inode = self.inode(file)?;
        let raw = inode.raw();
        let mut found = Vec::new();
        let at = 128 + extra_len(raw);
        if raw.len() >= at + 4 && u32_at(raw, at) == ATTRIBUTES_MAGIC {
            attributes_in(&raw[at + 4..], 0, &mut found)?;
        }
        let block = u64::from(u32_at(raw, 0x68)) | u64::from(u16_at(raw, 0x76)) << 32;
        if block != 0 {
            let block = self.superblock.block(Section::whole(&self.disk), block)?;
            if u32_at(&block, 0) != ATTRIBUTES_MAGIC {
                return Fault::damaged("an ext4 file system with damaged attributes");
            }
            attributes_in(&block, 32, &mut found)?;
        }
        found.sort_unstable();
        Ok(found)
    }
}

/// Bytes of an inode behind the first 128 that are fields.
fn extra_len(raw: &[u8]) -> usize {
    if raw.len() >= 160 { usize::from(u16_at(raw, 0x80)).min(raw.len() - 128) } else { 0 }
}

fn device(raw: &[u8]) -> (u32, u32) {
    let (old, new) = (u32_at(raw, 0x28), u32_at(raw, 0x2c));
    if old != 0 {
        return (old >> 8 & 0xff, old & 0xff);
    }
    (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xf_ff00)
}

/// Where a file's bytes lie, in extents or in a map of blocks.
fn mapped(inode: &Inode, section: Section<'_>, superblock: &Superblock) -> Result<Vec<Extent>, Fault> {
    if inode.flags() & (FLAG_EXTENTS | FLAG_INLINE_DATA) != 0 {
        return inode.extents(section, superblock);
    }
    let mut map = Map {
        section,
        superblock,
        left: inode.size().div_ceil(superblock.block_len),
        at: 0,
        found: Vec::new(),
    };
    for (place, pointer) in inode.raw()[0x28..0x64].chunks_exact(4).enumerate() {
        map.pointer(u32_at(pointer, 0).into(), place.saturating_sub(11) as u32)?;
    }
    Ok(map.found)
}

/// A walk through a map of blocks.
struct Map<'a> {
    section: Section<'a>,
    superblock: &'a Superblock,
    /// Blocks of the file that are not looked for yet.
    left: u64,
    at: u64,
    found: Vec<Extent>,
}

impl Map<'_> {
    /// What a pointer leads to over `levels` blocks of pointers.
    fn pointer(&mut self, block: u64, levels: u32) -> Result<(), Fault> {
        let len = self.superblock.block_len;
        if self.left == 0 {
            return Ok(());
        }
        if block == 0 {
            let passed = (len / 4).pow(levels).min(self.left);
            self.left -= passed;
            self.at += passed * len;
            return Ok(());
        }
        if levels > 0 {
            let pointers = self.superblock.block(self.section, block)?;
            return pointers
                .chunks_exact(4)
                .try_for_each(|next| self.pointer(u32_at(next, 0).into(), levels - 1));
        }
        if block >= self.superblock.blocks {
            return Fault::damaged("an ext4 file system with a file behind its end");
        }
        let bytes = self.superblock.bytes_of(block..block + 1);
        match self.found.last_mut() {
            Some(last)
                if last.bytes.end == bytes.start
                    && last.at + (last.bytes.end - last.bytes.start) == self.at =>
            {
                last.bytes.end = bytes.end;
            }
            _ => self.found.push(Extent { at: self.at, bytes, is_written: true }),
        }
        if self.found.len() > MOST_EXTENTS {
            return Err(Fault::Unsupported("an ext4 file system with a file in too many pieces"));
        }
        self.left -= 1;
        self.at += len;
        Ok(())
    }
}

/// Attributes from `start` on; values are counted from the beginning of `bytes`.
fn attributes_in(bytes: &[u8], start: usize, found: &mut Extended) -> Result<(), Fault> {
    const DAMAGED: Fault = Fault::Damaged("an ext4 file system with damaged attributes");
    const HEADER: usize = 16;
    let mut at = start;
    while bytes.len() >= at + HEADER && u32_at(bytes, at) != 0 {
        let (name_len, prefix) = (usize::from(bytes[at]), bytes[at + 1]);
        let (value, inode, len) =
            (usize::from(u16_at(bytes, at + 2)), u32_at(bytes, at + 4), u32_at(bytes, at + 8) as usize);
        let name = bytes.get(at + HEADER..at + HEADER + name_len).ok_or(DAMAGED)?;
        at += (HEADER + name_len).next_multiple_of(4);
        let prefix: &[u8] = match prefix {
            1 => b"user.",
            2 => b"system.posix_acl_access",
            3 => b"system.posix_acl_default",
            4 => b"trusted.",
            6 => b"security.",
            // Of the file system itself, or in an inode of its own.
            _ => continue,
        };
        if inode != 0 {
            continue;
        }
        let value = value.checked_add(len).and_then(|end| bytes.get(value..end)).ok_or(DAMAGED)?;
        let value =
            if prefix.starts_with(b"system.") { access_list(value).ok_or(DAMAGED)? } else { value.to_vec() };
        found.push(([prefix, name].concat(), value));
    }
    Ok(())
}

/// An access control list, from how ext4 keeps it to how Linux names it.
fn access_list(kept: &[u8]) -> Option<Vec<u8>> {
    const OF_ONE: [u16; 2] = [0x2, 0x8];
    let mut list = 2u32.to_le_bytes().to_vec();
    let mut rest = kept.get(4..).filter(|_| u32_at(kept, 0) == 1)?;
    while rest.len() >= 4 {
        let has_id = OF_ONE.contains(&u16_at(rest, 0));
        list.extend_from_slice(&rest[..4]);
        let id = if has_id { rest.get(4..8)?.try_into().ok()? } else { [0xff; 4] };
        list.extend_from_slice(&id);
        rest = &rest[if has_id { 8 } else { 4 }..];
    }
    Some(list)
}

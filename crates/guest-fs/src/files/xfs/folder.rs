//! Folders: in the inode, or in blocks of entries. The indexes behind those are not needed.

use super::{DAMAGED, Inode, LARGEST_FOLDER, LOCAL, Xfs, be16, be32, be64};
use crate::disk::Fault;

/// Byte of a folder where its index begins.
const INDEX: u64 = 1 << 35;
const UNUSED: u16 = 0xffff;

/// A name, its inode, and what kind of file it is; 0 if that is not told.
type Entry = (Vec<u8>, u64, u8);

impl Xfs<'_> {
    pub(super) fn entries(&self, inode: &Inode) -> Result<Vec<Entry>, Fault> {
        let fork = inode.data()?;
        if fork.format == LOCAL {
            return self.short_entries(&fork.bytes).ok_or(DAMAGED);
        }
        let content = self.mapped(&fork, INDEX)?;
        let (mut entries, mut read) = (Vec::new(), 0);
        // A block of a folder may lie in several extents.
        let mut block = Vec::new();
        for extent in &content.extents {
            for at in (extent.bytes.start..extent.bytes.end).step_by(self.block_len as usize) {
                block.extend(self.section.read_vec(at, self.block_len as usize)?);
                if block.len() as u64 == self.folder_block {
                    self.block_entries(&block, &mut entries).ok_or(DAMAGED)?;
                    block.clear();
                }
                read += self.block_len;
                if read > LARGEST_FOLDER {
                    return Err(Fault::Unsupported("a very large folder"));
                }
            }
        }
        Ok(entries)
    }

    fn short_entries(&self, bytes: &[u8]) -> Option<Vec<Entry>> {
        let (count, is_wide) = (*bytes.first()?, *bytes.get(1)? > 0);
        let inode_len = if is_wide { 8 } else { 4 };
        let kind_len = usize::from(self.tells_kinds);
        let mut rest = bytes.get(2 + inode_len..)?;
        let mut entries = Vec::new();
        for _ in 0..count {
            let name_len = usize::from(*rest.first()?);
            let name = rest.get(3..3 + name_len)?.to_vec();
            let kind = if self.tells_kinds { *rest.get(3 + name_len)? } else { 0 };
            let inode = rest.get(3 + name_len + kind_len..3 + name_len + kind_len + inode_len)?;
            let inode = if is_wide { be64(inode, 0) } else { be32(inode, 0).into() };
            entries.push((name, inode, kind));
            rest = &rest[3 + name_len + kind_len + inode_len..];
        }
        Some(entries)
    }

    fn block_entries(&self, block: &[u8], entries: &mut Vec<Entry>) -> Option<()> {
        let (start, end) = match &block[..4] {
            b"XD2D" => (16, block.len()),
            b"XDD3" => (64, block.len()),
            // With an index of its own at its end.
            sign @ (b"XD2B" | b"XDB3") => {
                let tail = block.len() - 8;
                let index = (be32(block, tail) as usize).checked_mul(8)?;
                (if sign == b"XDB3" { 64 } else { 16 }, tail.checked_sub(index)?)
            }
            _ => return None,
        };
        let mut at = start;
        while at + 8 <= end {
            let len = if be16(block, at) == UNUSED {
                usize::from(be16(block, at + 2))
            } else {
                let name_len = usize::from(*block.get(at + 8)?);
                let name = block.get(at + 9..at + 9 + name_len)?;
                let kind = if self.tells_kinds { *block.get(at + 9 + name_len)? } else { 0 };
                if name != b"." && name != b".." {
                    entries.push((name.to_vec(), be64(block, at), kind));
                }
                (11 + name_len + usize::from(self.tells_kinds)).next_multiple_of(8)
            };
            if len < 8 || len % 8 != 0 {
                return None;
            }
            at += len;
        }
        Some(())
    }
}

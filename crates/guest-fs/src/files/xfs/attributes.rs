//! Extended attributes: in the inode, or in leaves. Values that lie in blocks of their own are left out.

use super::{DAMAGED, be16, be32};
use crate::disk::Fault;
use crate::files::Extended;

const OF_ROOT: u8 = 0x2;
const OF_SECURITY: u8 = 0x4;
const HERE: u8 = 0x1;
const UNFINISHED: u8 = 0x80;
/// Parents of files, by newer versions.
const OF_PARENTS: u8 = 0x8;

pub(super) fn short(bytes: &[u8], found: &mut Extended) -> Result<(), Fault> {
    const HEADER: usize = 4;
    let count = *bytes.get(2).ok_or(DAMAGED)?;
    let mut rest = bytes.get(HEADER..).ok_or(DAMAGED)?;
    for _ in 0..count {
        let [name_len, value_len, flags, ..] = *rest else { return Err(DAMAGED) };
        let (name_len, value_len) = (usize::from(name_len), usize::from(value_len));
        let both = rest.get(3..3 + name_len + value_len).ok_or(DAMAGED)?;
        add(flags, &both[..name_len], &both[name_len..], found)?;
        rest = &rest[3 + name_len + value_len..];
    }
    Ok(())
}

/// A block of attributes; others are passed over.
pub(super) fn leaf(block: &[u8], found: &mut Extended) -> Result<(), Fault> {
    let (count, entries) = match be16(block, 8) {
        0xfbee => (be16(block, 12), 32),
        0x3bee => (be16(block, 56), 80),
        _ => return Ok(()),
    };
    for entry in block[entries..].chunks_exact(8).take(count.into()) {
        let (at, flags) = (usize::from(be16(entry, 4)), entry[6]);
        if flags & HERE == 0 {
            continue;
        }
        let header = block.get(at..at + 3).ok_or(DAMAGED)?;
        let (value_len, name_len) = (usize::from(be16(header, 0)), usize::from(header[2]));
        let both = block.get(at + 3..at + 3 + name_len + value_len).ok_or(DAMAGED)?;
        add(flags, &both[..name_len], &both[name_len..], found)?;
    }
    Ok(())
}

fn add(flags: u8, name: &[u8], value: &[u8], found: &mut Extended) -> Result<(), Fault> {
    if flags & (UNFINISHED | OF_PARENTS) != 0 {
        return Ok(());
    }
    let list = match name {
        b"SGI_ACL_FILE" if flags & OF_ROOT != 0 => Some(&b"system.posix_acl_access"[..]),
        b"SGI_ACL_DEFAULT" if flags & OF_ROOT != 0 => Some(&b"system.posix_acl_default"[..]),
        _ => None,
    };
    if let Some(name) = list {
        found.push((name.to_vec(), access_list(value).ok_or(DAMAGED)?));
        return Ok(());
    }
    let prefix: &[u8] = match flags {
        flags if flags & OF_SECURITY != 0 => b"security.",
        flags if flags & OF_ROOT != 0 => b"trusted.",
        _ => b"user.",
    };
    found.push(([prefix, name].concat(), value.to_vec()));
    Ok(())
}

/// An access control list, from how XFS keeps it to how Linux names it.
fn access_list(kept: &[u8]) -> Option<Vec<u8>> {
    const ENTRY: usize = 12;
    const OF_ONE: [u32; 2] = [0x2, 0x8];
    let entries = kept.get(4..)?.chunks_exact(ENTRY).take(be32(kept, 0) as usize);
    let mut list = 2u32.to_le_bytes().to_vec();
    for entry in entries {
        let (tag, id, may) = (be32(entry, 0), be32(entry, 4), be16(entry, 8));
        list.extend_from_slice(&(tag as u16).to_le_bytes());
        list.extend_from_slice(&may.to_le_bytes());
        list.extend_from_slice(&if OF_ONE.contains(&tag) { id } else { u32::MAX }.to_le_bytes());
    }
    Some(list)
}

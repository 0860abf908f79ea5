//! Partitions: of a GUID partition table (UEFI specification, chapter 5), or of a master boot record with its extended
//! partitions.

use crate::disk::{Fault, Section, u32_at, u64_at};
use crc_fast::CrcAlgorithm;

const MBR_SIGNATURE: [u8; 2] = [0x55, 0xaa];
const MBR_ENTRIES: usize = 446;
const MBR_ENTRY: usize = 16;
const TYPE_PROTECTIVE: u8 = 0xee;
const TYPES_EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Of what Windows calls a dynamic disk: volumes lie in it by rules of its own.
const TYPE_DYNAMIC: u8 = 0x42;
const GPT_TYPE_DYNAMIC: [u8; 16] = *b"\xa0\x60\x9b\xaf\x31\x14\x62\x4f\xbc\x68\x33\x11\x71\x4a\x69\xad";
const GPT_SIGNATURE: &[u8; 8] = b"EFI PART";
/// Every tool makes 128; more are possible.
const MOST_ENTRIES: u32 = 1024;
const MOST_PARTITIONS: usize = 1024;
/// A chain of extended partitions may bite its own tail.
const MOST_EXTENDED: usize = 64;

/// Bytes of a partition, on its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    pub start: u64,
    pub len: u64,
    /// What begins in it may go on elsewhere.
    pub is_dynamic: bool,
}

/// The disk's partitions, in the order of their table; none if it has no table.
pub fn list(disk: Section<'_>) -> Result<Vec<Partition>, Fault> {
    if disk.len() < 1024 {
        return Ok(Vec::new());
    }
    let first = disk.read_array::<512>(0)?;
    if first[510..] != MBR_SIGNATURE {
        return Ok(Vec::new());
    }
    let is_gpt = entries(&first).any(|entry| entry.kind == TYPE_PROTECTIVE);
    let found = if is_gpt { gpt(disk)? } else { mbr(disk, &first)? };
    let inside = |partition: &Partition| {
        partition.start.checked_add(partition.len).is_some_and(|end| end <= disk.len())
    };
    if !found.iter().all(inside) {
        return Fault::damaged("a partition ends behind the disk's end");
    }
    let mut sorted = found.clone();
    sorted.sort_unstable_by_key(|partition| partition.start);
    if sorted.windows(2).any(|pair| pair[0].start + pair[0].len > pair[1].start) {
        return Fault::damaged("two partitions overlap");
    }
    Ok(found)
}

struct Entry {
    kind: u8,
    first: u32,
    sectors: u32,
}

fn entries(sector: &[u8; 512]) -> impl Iterator<Item = Entry> + '_ {
    let entries = sector[MBR_ENTRIES..510].chunks_exact(MBR_ENTRY);
    let entries =
        entries.map(|entry| Entry { kind: entry[4], first: u32_at(entry, 8), sectors: u32_at(entry, 12) });
    entries.filter(|entry| entry.kind != 0 && entry.sectors != 0)
}

fn mbr(disk: Section<'_>, first: &[u8; 512]) -> Result<Vec<Partition>, Fault> {
    const SECTOR: u64 = 512;
    let mut found = Vec::new();
    let mut extended = None;
    for entry in entries(first) {
        if TYPES_EXTENDED.contains(&entry.kind) {
            extended = Some(u64::from(entry.first));
        } else {
            let (start, len) = (u64::from(entry.first) * SECTOR, u64::from(entry.sectors) * SECTOR);
            found.push(Partition { start, len, is_dynamic: entry.kind == TYPE_DYNAMIC });
        }
    }
    // A list of tables: each names one partition, from itself on, and the next table, from the first on.
    let Some(base) = extended else { return Ok(found) };
    let mut table = base;
    for _ in 0..MOST_EXTENDED {
        let sector = disk.read_array::<512>(table * SECTOR)?;
        if sector[510..] != MBR_SIGNATURE {
            return Fault::damaged("an extended partition has no table");
        }
        let mut next = None;
        for entry in entries(&sector) {
            if TYPES_EXTENDED.contains(&entry.kind) {
                next = Some(base + u64::from(entry.first));
            } else {
                let start = (table + u64::from(entry.first)) * SECTOR;
                let (len, is_dynamic) = (u64::from(entry.sectors) * SECTOR, entry.kind == TYPE_DYNAMIC);
                found.push(Partition { start, len, is_dynamic });
            }
        }
        match next {
            Some(next) if next > table => table = next,
            Some(_) => return Fault::damaged("its extended partitions lead in a circle"),
            None => return Ok(found),
        }
    }
    Fault::damaged("it has too many extended partitions")
}

fn gpt(disk: Section<'_>) -> Result<Vec<Partition>, Fault> {
    // The size of the disk's sectors is where the table's header shows that it is.
    for sector in [512, 4096u64] {
        let Ok(header) = disk.read_array::<92>(sector) else { continue };
        if header[..8] != *GPT_SIGNATURE {
            continue;
        }
        let header_len = u32_at(&header, 12) as usize;
        if !(92..=512).contains(&header_len) {
            return Fault::damaged("its partition table has a header of an impossible length");
        }
        let mut whole = disk.read_vec(sector, header_len)?;
        let told = u32_at(&whole, 16);
        whole[16..20].fill(0);
        if crc32(&whole) != told {
            return Fault::damaged("its partition table's header has the wrong checksum");
        }
        let (table, count, entry_len) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84));
        if count > MOST_ENTRIES || !(128..=4096).contains(&entry_len) {
            return Fault::damaged("its partition table has an impossible size");
        }
        let Some(at) = table.checked_mul(sector) else {
            return Fault::damaged("its partition table is not on the disk");
        };
        let entries = disk.read_vec(at, (count * entry_len) as usize)?;
        if crc32(&entries) != u32_at(&header, 88) {
            return Fault::damaged("its partition table has the wrong checksum");
        }
        let mut found = Vec::new();
        for entry in entries.chunks_exact(entry_len as usize) {
            if entry[..16] == [0; 16] {
                continue;
            }
            let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
            let bytes = |sectors: u64| sectors.checked_mul(sector);
            let len = last.checked_sub(first).and_then(|sectors| sectors.checked_add(1)).and_then(bytes);
            let (Some(start), Some(len)) = (bytes(first), len) else {
                return Fault::damaged("a partition ends before it begins");
            };
            found.push(Partition { start, len, is_dynamic: entry[..16] == GPT_TYPE_DYNAMIC });
            if found.len() > MOST_PARTITIONS {
                return Fault::damaged("it has too many partitions");
            }
        }
        return Ok(found);
    }
    Fault::damaged("its partition table is announced, and is not there")
}

fn crc32(bytes: &[u8]) -> u32 {
    crc_fast::checksum(CrcAlgorithm::Crc32IsoHdlc, bytes) as u32
}

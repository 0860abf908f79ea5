//! FAT12, FAT16 and FAT32 (Microsoft's specification of FAT, 1.03): boot partitions, memory cards.
//!
//! A file's number is the place of its entry: no other is kept for it.

use super::{Attributes, Content, FileSystem, Kind, LARGEST_FOLDER, Name};
use crate::disk::{Fault, Section, u16_at, u32_at};
use std::ops::Range;

const ENTRY: u64 = 32;
const READ_ONLY: u8 = 0x01;
const VOLUME: u8 = 0x08;
const FOLDER: u8 = 0x10;
const LONG_NAME: u8 = 0x0f;
const LONG_NAME_LAST: u8 = 0x40;
/// UTF-16 units of an entry of a long name, by where they begin.
const LONG_NAME_UNITS: [Range<usize>; 3] = [1..11, 14..26, 28..32];
const MOST_ENTRIES_OF_A_NAME: usize = 20;

/// Chains of clusters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table<'a> {
    pub section: Section<'a>,
    /// Byte of the table.
    pub at: u64,
    /// Bits of an entry: 12, 16 or 32.
    pub bits: u64,
    /// Byte of cluster 2, the first.
    pub heap: u64,
    pub cluster_len: u64,
    pub clusters: u64,
}

impl Table<'_> {
    fn next(&self, cluster: u64) -> Result<Option<u64>, Fault> {
        let at = self.at + cluster * self.bits / 8;
        let (next, end) = match self.bits {
            12 => {
                let both = u64::from(u16::from_le_bytes(self.section.read_array(at)?));
                (if cluster.is_multiple_of(2) { both & 0xfff } else { both >> 4 }, 0xff8)
            }
            16 => (u64::from(u16::from_le_bytes(self.section.read_array(at)?)), 0xfff8),
            _ => (u64::from(u32::from_le_bytes(self.section.read_array(at)?) & 0x0fff_ffff), 0x0fff_fff8),
        };
        Ok((next < end).then_some(next))
    }

    /// What lies in the clusters from `first` on, `size` bytes at most.
    pub fn chain(&self, first: u64, size: u64) -> Result<Content, Fault> {
        let mut content = Content::new(size);
        let (mut at, mut next) = (0, Some(first));
        while let Some(cluster) = next.filter(|_| at < size) {
            // A chain with as many as there are leads in a circle.
            if !(2..self.clusters + 2).contains(&cluster) || at / self.cluster_len >= self.clusters {
                return Fault::damaged("a FAT file system with a chain of clusters that leads nowhere");
            }
            let start = self.heap + (cluster - 2) * self.cluster_len;
            content.push(at, start..start + self.cluster_len);
            at += self.cluster_len;
            next = if at < size { self.next(cluster)? } else { None };
        }
        Ok(content)
    }

    /// The clusters one after the other.
    pub fn run(&self, first: u64, size: u64) -> Result<Content, Fault> {
        let mut content = Content::new(size);
        let clusters = size.div_ceil(self.cluster_len);
        if clusters > 0 && (first < 2 || first.saturating_add(clusters) > self.clusters + 2) {
            return Fault::damaged("an exFAT file system with a file behind its end");
        }
        if clusters > 0 {
            let start = self.heap + (first - 2) * self.cluster_len;
            content.push(0, start..start + clusters * self.cluster_len);
        }
        Ok(content)
    }
}

#[derive(Debug)]
pub struct Fat<'a> {
    table: Table<'a>,
    root: Root,
}

#[derive(Debug)]
enum Root {
    /// In a place of its own.
    Fixed(Range<u64>),
    Cluster(u64),
}

pub fn is_one(section: Section<'_>) -> Result<bool, Fault> {
    if section.len() < 4096 {
        return Ok(false);
    }
    let boot = section.read_array::<512>(0)?;
    Ok(matches!(boot[0], 0xeb | 0xe9)
        && boot[510..] == [0x55, 0xaa]
        && matches!(u16_at(&boot, 11), 512 | 1024 | 2048 | 4096)
        && boot[13].is_power_of_two()
        && u16_at(&boot, 14) > 0
        && matches!(boot[16], 1 | 2)
        && boot[21] >= 0xf0)
}

impl<'a> Fat<'a> {
    pub fn open(section: Section<'a>) -> Result<Fat<'a>, Fault> {
        const DAMAGED: Fault = Fault::Damaged("a FAT file system whose boot sector makes no sense");
        if !is_one(section)? {
            return Err(DAMAGED);
        }
        let boot = section.read_array::<512>(0)?;
        let sector = u64::from(u16_at(&boot, 11));
        let or = |narrow: u16, at: usize| {
            if narrow == 0 { u64::from(u32_at(&boot, at)) } else { u64::from(narrow) }
        };
        let (sectors, table_sectors) = (or(u16_at(&boot, 19), 32), or(u16_at(&boot, 22), 36));
        let table = u64::from(u16_at(&boot, 14));
        let root = table + table_sectors * u64::from(boot[16]);
        let root_len = u64::from(u16_at(&boot, 17)) * ENTRY;
        let heap = root + root_len.div_ceil(sector);
        let per_cluster = u64::from(boot[13]);
        let clusters = sectors.checked_sub(heap).ok_or(DAMAGED)? / per_cluster;
        let bits = if u16_at(&boot, 22) == 0 {
            32
        } else if clusters < 4085 {
            12
        } else {
            16
        };
        let fits = (clusters + 2) * bits <= table_sectors * sector * 8 && sectors * sector <= section.len();
        if !fits || clusters == 0 {
            return Err(DAMAGED);
        }
        let table = Table {
            section,
            at: table * sector,
            bits,
            heap: heap * sector,
            cluster_len: per_cluster * sector,
            clusters,
        };
        let root = match bits {
            32 => Root::Cluster(u32_at(&boot, 44).into()),
            _ => Root::Fixed(root * sector..root * sector + root_len),
        };
        Ok(Fat { table, root })
    }

    fn entry(&self, file: u64) -> Result<[u8; ENTRY as usize], Fault> {
        file.checked_mul(ENTRY)
            .map_or(Fault::damaged("there is no such entry"), |at| self.table.section.read_array(at))
    }
}

fn first_cluster(entry: &[u8]) -> u64 {
    u64::from(u16_at(entry, 26)) | u64::from(u16_at(entry, 20)) << 16
}

impl FileSystem for Fat<'_> {
    /// There is no entry in the boot sector.
    fn root(&self) -> u64 {
        0
    }

    fn attributes(&mut self, file: u64) -> Result<Attributes, Fault> {
        if file == self.root() {
            return Ok(Attributes::plain(Kind::Folder, (0, 0), 0));
        }
        let entry = self.entry(file)?;
        let modified = (seconds(u16_at(&entry, 24), u16_at(&entry, 22)), 0);
        if entry[11] & FOLDER != 0 {
            return Ok(Attributes::plain(Kind::Folder, modified, 0));
        }
        let mut attributes = Attributes::plain(Kind::File, modified, u32_at(&entry, 28).into());
        if entry[11] & READ_ONLY != 0 {
            attributes.mode = 0o444;
        }
        Ok(attributes)
    }

    fn list(&mut self, folder: u64) -> Result<Vec<Name>, Fault> {
        let place = match &self.root {
            Root::Fixed(bytes) if folder == 0 => {
                let mut place = Content::new(bytes.end - bytes.start);
                place.push(0, bytes.clone());
                place
            }
            Root::Cluster(first) if folder == 0 => self.table.chain(*first, LARGEST_FOLDER)?,
            _ => {
                let entry = self.entry(folder)?;
                if entry[11] & FOLDER == 0 {
                    return Err(Fault::Unsupported("it is no folder"));
                }
                self.table.chain(first_cluster(&entry), LARGEST_FOLDER)?
            }
        };
        let mut names = Names::default();
        for extent in &place.extents {
            let mut at = extent.bytes.start;
            while at < extent.bytes.end {
                let len = (extent.bytes.end - at).min(self.table.cluster_len.max(ENTRY));
                let entries = self.table.section.read_vec(at, len as usize)?;
                for (place, entry) in (at / ENTRY..).zip(entries.as_chunks::<{ ENTRY as usize }>().0) {
                    if entry[0] == 0 {
                        return Ok(names.found);
                    }
                    names.entry(place, entry);
                }
                at += len;
            }
        }
        Ok(names.found)
    }

    fn content(&mut self, file: u64) -> Result<Content, Fault> {
        let entry = self.entry(file)?;
        if file == self.root() || entry[11] & (FOLDER | VOLUME) != 0 {
            return Err(Fault::Unsupported("it is no file"));
        }
        let size = u64::from(u32_at(&entry, 28));
        let content = self.table.chain(first_cluster(&entry), size)?;
        if content.extents.iter().map(super::Extent::len).sum::<u64>() != size {
            return Fault::damaged("a FAT file system with a file whose clusters end before it does");
        }
        Ok(content)
    }

    fn target(&mut self, _: u64) -> Result<Vec<u8>, Fault> {
        Err(Fault::Unsupported("FAT has no links"))
    }
}

/// Names as their entries come: long ones before the short one that they belong to.
#[derive(Default)]
struct Names {
    found: Vec<Name>,
    /// Pieces, the last of the name first.
    long: Vec<[u16; 13]>,
    checksum: u8,
}

impl Names {
    fn entry(&mut self, place: u64, entry: &[u8; ENTRY as usize]) {
        const DELETED: u8 = 0xe5;
        if entry[0] == DELETED {
            self.long.clear();
            return;
        }
        if entry[11] & 0x3f == LONG_NAME {
            let number = usize::from(entry[0] & 0x1f);
            if entry[0] & LONG_NAME_LAST != 0 {
                self.long.clear();
                self.checksum = entry[13];
                if number > MOST_ENTRIES_OF_A_NAME {
                    return;
                }
            }
            let units = LONG_NAME_UNITS.into_iter().flat_map(|units| entry[units].as_chunks::<2>().0);
            let mut piece = [0; 13];
            piece.iter_mut().zip(units).for_each(|(to, unit)| *to = u16::from_le_bytes(*unit));
            self.long.push(piece);
            return;
        }
        let long = std::mem::take(&mut self.long);
        if entry[11] & VOLUME != 0 || entry[..2] == *b". " || entry[..3] == *b".. " {
            return;
        }
        let is_its = !long.is_empty() && self.checksum == short_checksum(entry);
        let name = if is_its { long_name(&long) } else { short_name(entry) };
        let kind = if entry[11] & FOLDER != 0 { Kind::Folder } else { Kind::File };
        self.found.push(Name { name: name.into_bytes(), file: place, kind });
    }
}

fn short_checksum(entry: &[u8]) -> u8 {
    entry[..11].iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte))
}

fn long_name(pieces: &[[u16; 13]]) -> String {
    let units = pieces.iter().rev().flatten().copied();
    utf16(units.take_while(|unit| *unit != 0))
}

pub(super) fn utf16(units: impl Iterator<Item = u16>) -> String {
    char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

/// Eight letters and three. Those that are not ASCII depend on the machine that wrote them.
fn short_name(entry: &[u8]) -> String {
    const LOWER_BASE: u8 = 0x08;
    const LOWER_EXTENSION: u8 = 0x10;
    let part = |bytes: &[u8], is_lower: bool| {
        let end = bytes.iter().rposition(|byte| *byte != b' ').map_or(0, |last| last + 1);
        let letter = |byte: &u8| char::from(if is_lower { byte.to_ascii_lowercase() } else { *byte });
        bytes[..end].iter().map(letter).collect::<String>()
    };
    let mut base: [u8; 8] = entry[..8].try_into().expect("8 bytes");
    if base[0] == 0x05 {
        base[0] = 0xe5;
    }
    let base = part(&base, entry[12] & LOWER_BASE != 0);
    let extension = part(&entry[8..11], entry[12] & LOWER_EXTENSION != 0);
    if extension.is_empty() { base } else { format!("{base}.{extension}") }
}

/// Since 1970, of DOS's date and time.
pub(super) fn seconds(date: u16, time: u16) -> i64 {
    let (year, month, day) = (1980 + i64::from(date >> 9), i64::from(date >> 5 & 15), i64::from(date & 31));
    let (month, day) = (month.clamp(1, 12), day.max(1));
    // Days from 1970-03-01 in years that begin in March, with the leap day at their end.
    let (year, month) = if month < 3 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468;
    let (hours, minutes, twos) = (i64::from(time >> 11), i64::from(time >> 5 & 63), i64::from(time & 31));
    days * 86_400 + hours * 3600 + minutes * 60 + twos * 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_counted_from_1970() {
        let date = |year: u16, month: u16, day: u16| (year - 1980) << 9 | month << 5 | day;
        for (date, time, expected) in [
            (date(1980, 1, 1), 0, 315_532_800),
            (date(2000, 2, 29), 12 << 11 | 34 << 5 | 28, 951_827_696),
            (date(2000, 3, 1), 0, 951_868_800),
            (date(2026, 11, 22), 0, 1_795_305_600),
            (0, 0, 315_532_800),
        ] {
            assert_eq!(seconds(date, time), expected, "{date:#x}");
        }
    }
}

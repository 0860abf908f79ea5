//! exFAT (Microsoft's specification, 1.00).
//!
//! A file's number is the place of its entries, and whether the folder that they are in has its clusters in a row: they may
//! go on in the next.

use super::fat::{Table, seconds, utf16};
use super::{Attributes, Content, FileSystem, Kind, LARGEST_FOLDER, Name};
use crate::disk::{Fault, Section, u16_at, u32_at, u64_at};

const ENTRY: usize = 32;
const FILE: u8 = 0x85;
const STREAM: u8 = 0xc0;
const NAME: u8 = 0xc1;
const READ_ONLY: u16 = 0x01;
const FOLDER: u16 = 0x10;
const IN_A_ROW: u8 = 0x02;
/// Entries of one file.
const MOST_ENTRIES: usize = 19;

#[derive(Debug)]
pub struct ExFat<'a> {
    table: Table<'a>,
    root: u64,
}

/// What its entries say of a file.
struct File {
    is_folder: bool,
    mode: u32,
    modified: (i64, u32),
    first: u64,
    size: u64,
    /// Bytes that were written: the others are zeroes.
    valid: u64,
    in_a_row: bool,
    name: String,
}

pub fn is_one(section: Section<'_>) -> Result<bool, Fault> {
    Ok(section.len() >= 4096 && section.read_array::<8>(3)? == *b"EXFAT   ")
}

impl<'a> ExFat<'a> {
    pub fn open(section: Section<'a>) -> Result<ExFat<'a>, Fault> {
        const DAMAGED: Fault = Fault::Damaged("an exFAT file system whose boot sector makes no sense");
        let boot = section.read_array::<512>(0)?;
        let (sector_shift, cluster_shift) = (boot[108], boot[109]);
        if !(9..=12).contains(&sector_shift) || cluster_shift > 25 - sector_shift {
            return Err(DAMAGED);
        }
        let sector = 1u64 << sector_shift;
        let clusters = u64::from(u32_at(&boot, 92));
        let table = Table {
            section,
            at: u64::from(u32_at(&boot, 80)) * sector,
            bits: 32,
            heap: u64::from(u32_at(&boot, 88)) * sector,
            cluster_len: sector << cluster_shift,
            clusters,
        };
        let fits = table.heap + clusters * table.cluster_len <= section.len()
            && (clusters + 2) * 4 <= u64::from(u32_at(&boot, 84)) * sector;
        if !fits || clusters == 0 {
            return Err(DAMAGED);
        }
        Ok(ExFat { table, root: u32_at(&boot, 96).into() })
    }

    /// The clusters of a folder.
    fn folder(&self, folder: u64) -> Result<(Content, bool), Fault> {
        if folder == 0 {
            return Ok((self.table.chain(self.root, LARGEST_FOLDER)?, false));
        }
        let file = self.file(folder)?;
        if !file.is_folder || file.size > LARGEST_FOLDER {
            return Err(Fault::Unsupported("it is no folder, or a very large one"));
        }
        Ok((self.place(&file)?, file.in_a_row))
    }

    fn place(&self, file: &File) -> Result<Content, Fault> {
        if file.in_a_row {
            self.table.run(file.first, file.size)
        } else {
            self.table.chain(file.first, file.size)
        }
    }

    fn file(&self, number: u64) -> Result<File, Fault> {
        const DAMAGED: Fault = Fault::Damaged("an exFAT file system with a damaged entry");
        let (at, in_a_row) = ((number >> 1).checked_mul(ENTRY as u64).ok_or(DAMAGED)?, number & 1 != 0);
        let within = at.checked_sub(self.table.heap).ok_or(DAMAGED)?;
        let cluster = 2 + within / self.table.cluster_len;
        let offset = within % self.table.cluster_len;
        // This cluster and the next hold all of it.
        let len = 2 * self.table.cluster_len.max((MOST_ENTRIES * ENTRY) as u64);
        let place = if in_a_row {
            let len = len.min((self.table.clusters + 2).saturating_sub(cluster) * self.table.cluster_len);
            self.table.run(cluster, len)?
        } else {
            self.table.chain(cluster, len)?
        };
        let mut entries = Vec::with_capacity(MOST_ENTRIES);
        let mut skip = offset;
        for extent in &place.extents {
            let mut at = extent.bytes.start + skip.min(extent.len());
            skip -= skip.min(extent.len());
            while at < extent.bytes.end && entries.len() < MOST_ENTRIES {
                entries.push(self.table.section.read_array::<ENTRY>(at)?);
                at += ENTRY as u64;
            }
        }
        parse(&entries).ok_or(DAMAGED)
    }
}

/// Entries of a file, from its first on.
fn parse(entries: &[[u8; ENTRY]]) -> Option<File> {
    let (file, rest) = entries.split_first().filter(|(file, _)| file[0] == FILE)?;
    let rest = rest.get(..usize::from(file[1]))?;
    let (stream, names) = rest.split_first().filter(|(stream, _)| stream[0] == STREAM)?;
    let name =
        names.iter().take_while(|entry| entry[0] == NAME).flat_map(|entry| entry[2..].as_chunks::<2>().0);
    let name = utf16(name.map(|unit| u16::from_le_bytes(*unit)).take(stream[3].into()));
    let attributes = u16_at(file, 4);
    let is_folder = attributes & FOLDER != 0;
    // Quarters of an hour from universal time, if they are known.
    let zone = if file[22] & 0x80 != 0 { i64::from((file[22] << 1).cast_signed() >> 1) * 900 } else { 0 };
    let hundredths = u32::from(file[21].min(199));
    let seconds = seconds(u16_at(file, 14), u16_at(file, 12)) - zone + i64::from(hundredths / 100);
    let size = u64_at(stream, 24);
    Some(File {
        is_folder,
        mode: match is_folder {
            true => 0o755,
            false if attributes & READ_ONLY != 0 => 0o444,
            false => 0o644,
        },
        modified: (seconds, hundredths % 100 * 10_000_000),
        first: u32_at(stream, 20).into(),
        size,
        valid: u64_at(stream, 8).min(size),
        in_a_row: stream[1] & IN_A_ROW != 0,
        name,
    })
}

impl FileSystem for ExFat<'_> {
    /// There is no entry in the boot sector.
    fn root(&self) -> u64 {
        0
    }

    fn attributes(&mut self, file: u64) -> Result<Attributes, Fault> {
        if file == self.root() {
            return Ok(Attributes::plain(Kind::Folder, (0, 0), 0));
        }
        let file = self.file(file)?;
        let kind = if file.is_folder { Kind::Folder } else { Kind::File };
        Ok(Attributes { mode: file.mode, ..Attributes::plain(kind, file.modified, file.size) })
    }

    fn list(&mut self, folder: u64) -> Result<Vec<Name>, Fault> {
        let (place, in_a_row) = self.folder(folder)?;
        let mut entries: Vec<[u8; ENTRY]> = Vec::new();
        let mut places: Vec<u64> = Vec::new();
        'all: for extent in &place.extents {
            let mut at = extent.bytes.start;
            while at < extent.bytes.end {
                let len = (extent.bytes.end - at).min(self.table.cluster_len);
                let cluster = self.table.section.read_vec(at, len as usize)?;
                for (place, entry) in (at / ENTRY as u64..).zip(cluster.as_chunks::<ENTRY>().0) {
                    if entry[0] == 0 {
                        break 'all;
                    }
                    entries.push(*entry);
                    places.push(place);
                }
                at += len;
            }
        }
        let mut names = Vec::new();
        for (number, place) in places.iter().enumerate().filter(|(number, _)| entries[*number][0] == FILE) {
            let Some(file) = parse(&entries[number..entries.len().min(number + MOST_ENTRIES)]) else {
                continue;
            };
            let kind = if file.is_folder { Kind::Folder } else { Kind::File };
            let number = place << 1 | u64::from(in_a_row);
            names.push(Name { name: file.name.into_bytes(), file: number, kind });
        }
        Ok(names)
    }

    fn content(&mut self, file: u64) -> Result<Content, Fault> {
        let file = if file == self.root() { None } else { Some(self.file(file)?) };
        let Some(file) = file.filter(|file| !file.is_folder) else {
            return Err(Fault::Unsupported("it is no file"));
        };
        let placed = self.place(&File { size: file.valid, ..file })?;
        if placed.extents.iter().map(super::Extent::len).sum::<u64>() != file.valid {
            return Fault::damaged("an exFAT file system with a file whose clusters end before it does");
        }
        Ok(Content { size: file.size, ..placed })
    }

    fn target(&mut self, _: u64) -> Result<Vec<u8>, Fault> {
        Err(Fault::Unsupported("exFAT has no links"))
    }
}

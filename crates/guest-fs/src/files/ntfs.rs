//! NTFS, by a library that reads it.

use super::{Attributes, Content, FileSystem, Kind, LARGEST_FOLDER, Name};
use crate::disk::{Fault, Section, u16_at, u32_at, u64_at};
use crate::ntfs::{Reader, fault};
use ntfs::attribute_value::NtfsAttributeValue;
use ntfs::structured_values::{NtfsAttributeList, NtfsFileAttributeFlags, NtfsFileNamespace};
use ntfs::{
    KnownNtfsFileRecordNumber, Ntfs as Volume, NtfsAttribute, NtfsAttributeFlags, NtfsAttributeType,
    NtfsError, NtfsFile, NtfsReadSeek,
};
use std::io::{Read, Seek};

/// Records below it are the file system's own.
const FIRST_OF_USERS: u64 = 16;
const REPARSE_LINK: u32 = 0xa000_000c;
const REPARSE_MOUNT: u32 = 0xa000_0003;
const LONGEST_REPARSE: u64 = 16 << 10;
const MOST_RUNS: usize = 1_000_000;
const MOST_PIECES: usize = 10_000;
/// Intervals of 100 ns from 1601 to 1970.
const EPOCH: i64 = 116_444_736_000_000_000;

pub struct Ntfs<'a> {
    volume: Volume,
    reader: Reader<'a>,
}

impl<'a> Ntfs<'a> {
    pub fn open(section: Section<'a>) -> Result<Ntfs<'a>, Fault> {
        let mut reader = Reader::new(section);
        let volume = Volume::new(&mut reader).map_err(fault)?;
        if volume.cluster_size() == 0 || volume.file_record_size() == 0 {
            return Fault::damaged("an NTFS file system whose boot sector makes no sense");
        }
        Ok(Ntfs { volume, reader })
    }
}

/// Which bytes of a reparse point's are where it leads.
struct Reparse {
    tag: u32,
    target: Vec<u8>,
}

fn reparse(file: &NtfsFile<'_>, reader: &mut Reader<'_>) -> Result<Option<Reparse>, NtfsError> {
    let mut attributes = file.attributes();
    while let Some(item) = attributes.next(reader) {
        let item = item?;
        let attribute = item.to_attribute()?;
        if attribute.ty()? != NtfsAttributeType::ReparsePoint {
            continue;
        }
        let mut value = attribute.value(reader)?;
        let mut bytes = vec![0; value.len().min(LONGEST_REPARSE) as usize];
        value.read_exact(reader, &mut bytes)?;
        if bytes.len() < 8 {
            return Ok(Some(Reparse { tag: 0, target: Vec::new() }));
        }
        let tag = u32_at(&bytes, 0);
        // The name that is shown; before the names is what differs.
        let names = if tag == REPARSE_LINK { 20 } else { 16 };
        let target = bytes.get(names..).map(|names| {
            let (start, len) = (usize::from(u16_at(&bytes, 12)), usize::from(u16_at(&bytes, 14)));
            let units = names.get(start..start + len).unwrap_or_default().as_chunks::<2>().0;
            let name = super::fat::utf16(units.iter().map(|unit| u16::from_le_bytes(*unit)));
            name.replace('\\', "/").into_bytes()
        });
        return Ok(Some(Reparse { tag, target: target.unwrap_or_default() }));
    }
    Ok(None)
}

impl Ntfs<'_> {
    fn file(&mut self, number: u64) -> Result<NtfsFile<'_>, Fault> {
        let file = self.volume.file(&mut self.reader, number).map_err(fault)?;
        if !file.flags().contains(ntfs::NtfsFileFlags::IN_USE) {
            return Fault::damaged("an NTFS file system that names a file that is not there");
        }
        Ok(file)
    }

    fn attributes_of(volume: &Volume, reader: &mut Reader<'_>, number: u64) -> Result<Attributes, NtfsError> {
        let file = volume.file(reader, number)?;
        let modified = file.info()?.modification_time().nt_timestamp().cast_signed().saturating_sub(EPOCH);
        let modified = (modified.div_euclid(10_000_000), (modified.rem_euclid(10_000_000) * 100) as u32);
        let reparse = reparse(&file, reader)?;
        let kind = match &reparse {
            Some(reparse) if matches!(reparse.tag, REPARSE_LINK | REPARSE_MOUNT) => Kind::Link,
            _ if file.is_directory() => Kind::Folder,
            _ => Kind::File,
        };
        let size = match (kind, reparse) {
            (Kind::Link, Some(reparse)) => reparse.target.len() as u64,
            (Kind::File, _) => match file.data(reader, "") {
                Some(item) => item?.to_attribute()?.value_length(),
                None => 0,
            },
            _ => 0,
        };
        let links = u32::from(file.hard_link_count()).max(1);
        Ok(Attributes { links, ..Attributes::plain(kind, modified, size) })
    }

    fn names_of(volume: &Volume, reader: &mut Reader<'_>, number: u64) -> Result<Vec<Name>, NtfsError> {
        let file = volume.file(reader, number)?;
        let index = file.directory_index(reader)?;
        let mut entries = index.entries();
        let mut names = Vec::new();
        let mut bytes = 0;
        while let Some(entry) = entries.next(reader) {
            let entry = entry?;
            let Some(key) = entry.key() else { continue };
            let key = key?;
            bytes += u64::from(entry.index_entry_length());
            let child = entry.file_reference().file_record_number();
            let is_own = child < FIRST_OF_USERS;
            if key.namespace() == NtfsFileNamespace::Dos || is_own || bytes > LARGEST_FOLDER {
                continue;
            }
            let name = super::fat::utf16(
                key.name().0.as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit)),
            );
            let kind = if key.file_attributes().contains(NtfsFileAttributeFlags::REPARSE_POINT) {
                // Its own record tells whether it is a link.
                Self::attributes_of(volume, reader, child).map_or(Kind::File, |attributes| attributes.kind)
            } else if key.is_directory() {
                Kind::Folder
            } else {
                Kind::File
            };
            names.push(Name { name: name.into_bytes(), file: child, kind });
        }
        Ok(names)
    }

    fn content_of(&mut self, number: u64) -> Result<Result<Content, Fault>, NtfsError> {
        let Ntfs { volume, reader } = self;
        let file = volume.file(reader, number)?;
        if file.is_directory() {
            return Ok(Err(Fault::Unsupported("it is no file")));
        }
        if reparse(&file, reader)?.is_some() {
            // Compressed by Windows as a whole, deduplicated, or elsewhere: what is here is not what is in it.
            return Ok(Err(Fault::Unsupported(
                "what it holds is kept by a filter of Windows (a reparse point)",
            )));
        }
        let mut list = None;
        for item in &mut file.attributes_raw() {
            let attribute = item?;
            match attribute.ty()? {
                NtfsAttributeType::AttributeList => {
                    list = Some(attribute);
                    break;
                }
                NtfsAttributeType::Data if attribute.name_length() == 0 => {
                    let mut content = Content::default();
                    return Ok(add(volume, reader, &attribute, 0, &mut content)?.map(|()| content));
                }
                _ => {}
            }
        }
        let Some(list) = list else { return Ok(Ok(Content::default())) };
        let list = list.structured_value::<_, NtfsAttributeList<'_, '_>>(reader)?;
        let mut entries = list.entries();
        let (mut content, mut pieces) = (Content::default(), 0);
        while let Some(entry) = entries.next(reader) {
            let entry = entry?;
            if entry.ty()? != NtfsAttributeType::Data || entry.name_length() != 0 {
                continue;
            }
            pieces += 1;
            if pieces > MOST_PIECES {
                return Ok(Err(Fault::Unsupported("an NTFS file in too many pieces")));
            }
            let part = entry.to_file(volume, reader)?;
            let attribute = entry.to_attribute(&part)?;
            let at = u64::try_from(entry.lowest_vcn().value()).unwrap_or(u64::MAX);
            if let Err(fault) = add(volume, reader, &attribute, at, &mut content)? {
                return Ok(Err(fault));
            }
        }
        Ok(Ok(content))
    }
}

/// Adds what an attribute has of a file, from cluster `lowest` of it on.
fn add(
    volume: &Volume,
    reader: &mut Reader<'_>,
    attribute: &NtfsAttribute<'_, '_>,
    lowest: u64,
    content: &mut Content,
) -> Result<Result<(), Fault>, NtfsError> {
    let flags = attribute.flags();
    if flags.contains(NtfsAttributeFlags::COMPRESSED) {
        return Ok(Err(Fault::Unsupported("it is compressed by NTFS")));
    }
    if flags.contains(NtfsAttributeFlags::ENCRYPTED) {
        return Ok(Err(Fault::Unsupported("it is encrypted by NTFS")));
    }
    let value = match attribute.value(reader)? {
        NtfsAttributeValue::NonResident(value) => value,
        NtfsAttributeValue::Resident(value) => {
            *content = Content::inline(value.data().to_vec());
            return Ok(Ok(()));
        }
        NtfsAttributeValue::AttributeListNonResident(_) => {
            return Ok(Err(Fault::Damaged("an NTFS file system with a list of attributes in itself")));
        }
    };
    if lowest == 0 {
        content.size = attribute.value_length();
    }
    // What was never written is whatever lay there before.
    let valid = match (lowest, attribute.position().value()) {
        (0, Some(position)) => initialised(volume, reader, position.get())?.min(content.size),
        _ => content.size,
    };
    let cluster = u64::from(volume.cluster_size());
    let Some(mut at) = lowest.checked_mul(cluster) else {
        return Ok(Err(Fault::Damaged("an NTFS file system with a file of an impossible length")));
    };
    let size = std::mem::replace(&mut content.size, valid);
    for run in value.data_runs() {
        let run = run?;
        let len = run.allocated_size();
        let Some(end) = at.checked_add(len) else {
            return Ok(Err(Fault::Damaged("an NTFS file system with a file of an impossible length")));
        };
        if let Some(start) = run.data_position().value() {
            content.push(at, start.get()..start.get().saturating_add(len));
        }
        if content.extents.len() > MOST_RUNS {
            return Ok(Err(Fault::Unsupported("an NTFS file in too many pieces")));
        }
        at = end;
    }
    content.size = size;
    Ok(Ok(()))
}

/// How many bytes of a value were ever written, which the library does not tell: from the attribute's header at `position`.
fn initialised(volume: &Volume, reader: &mut Reader<'_>, position: u64) -> Result<u64, NtfsError> {
    const AT: u64 = 56;
    let record_len = u64::from(volume.file_record_size());
    let sector = u64::from(volume.sector_size());
    if !u64::from(volume.cluster_size()).is_multiple_of(record_len) || sector < 256 {
        return Ok(u64::MAX);
    }
    let start = position / record_len * record_len;
    let mut record = vec![0; record_len as usize];
    reader.seek(std::io::SeekFrom::Start(start))?;
    reader.read_exact(&mut record)?;
    // The last two bytes of each sector are kept elsewhere.
    let (array, count) = (usize::from(u16_at(&record, 4)), usize::from(u16_at(&record, 6)));
    for number in 1..count {
        let (from, to) = (array + 2 * number, number * sector as usize - 2);
        if from + 2 <= record.len() && to + 2 <= record.len() {
            record.copy_within(from..from + 2, to);
        }
    }
    let at = (position - start + AT) as usize;
    Ok(if at + 8 <= record.len() { u64_at(&record, at) } else { u64::MAX })
}

impl FileSystem for Ntfs<'_> {
    fn root(&self) -> u64 {
        KnownNtfsFileRecordNumber::RootDirectory as u64
    }

    fn attributes(&mut self, file: u64) -> Result<Attributes, Fault> {
        self.file(file)?;
        Self::attributes_of(&self.volume, &mut self.reader, file).map_err(fault)
    }

    fn list(&mut self, folder: u64) -> Result<Vec<Name>, Fault> {
        self.file(folder)?;
        Self::names_of(&self.volume, &mut self.reader, folder).map_err(fault)
    }

    fn content(&mut self, file: u64) -> Result<Content, Fault> {
        self.file(file)?;
        self.content_of(file).map_err(fault)?
    }

    fn target(&mut self, link: u64) -> Result<Vec<u8>, Fault> {
        let Ntfs { volume, reader } = self;
        let file = volume.file(reader, link).map_err(fault)?;
        match reparse(&file, reader).map_err(fault)? {
            Some(reparse) if matches!(reparse.tag, REPARSE_LINK | REPARSE_MOUNT) => Ok(reparse.target),
            _ => Err(Fault::Unsupported("it is no link")),
        }
    }
}

//! NTFS: the page files of Windows, by a library that reads it.
//!
//! NTFS does not tell whether it was frozen, only whether it was taken down in order, in the restart pages of `$LogFile`. Whoever
//! froze it says so. Where its free space is is not asked.

use crate::disk::{Fault, Section, u16_at, u64_at};
use crate::survey::{LeftOut, Reason, Wanted};
use ntfs::attribute_value::NtfsAttributeValue;
use ntfs::indexes::NtfsFileNameIndex;
use ntfs::structured_values::NtfsVolumeFlags;
use ntfs::{KnownNtfsFileRecordNumber, Ntfs, NtfsError, NtfsFile, NtfsReadSeek};
use std::io::{self, Read, Seek, SeekFrom};

const PAGE_FILES: [&str; 2] = ["pagefile.sys", "swapfile.sys"];
const HIBERNATION_FILE: &str = "hiberfil.sys";
/// What `hiberfil.sys` begins with while a machine sleeps in it.
const ASLEEP: [&[u8]; 3] = [b"hibr", b"HIBR", b"RSTR"];
const RESTART_PAGE: &[u8; 4] = b"RSTR";
const VOLUME_IS_CLEAN: u16 = 0x2;
const NO_CLIENT: u16 = 0xffff;
/// Pieces of a file, at most.
const MOST_RUNS: usize = 100_000;

pub fn is_one(section: Section<'_>) -> Result<bool, Fault> {
    Ok(section.len() >= 512 && section.read_array::<8>(3)? == *b"NTFS    ")
}

/// What it may be without; `None` if Windows sleeps in it.
pub fn leave_out(section: Section<'_>, wanted: Wanted) -> Result<Option<Vec<LeftOut>>, Fault> {
    let looked = look(&mut Reader::new(section), section.len(), wanted);
    looked.unwrap_or_else(|error| Err(fault(error)))
}

pub(crate) fn fault(error: NtfsError) -> Fault {
    match error {
        NtfsError::Io(error) => Fault::Read(error),
        _ => Fault::Damaged("an NTFS file system that is damaged, or of a kind that is not known here"),
    }
}

/// Whether it was taken down in order, and wants no check.
pub(crate) fn is_at_rest(section: Section<'_>) -> Result<bool, Fault> {
    let mut reader = Reader::new(section);
    let mut look = || {
        let ntfs = Ntfs::new(&mut reader)?;
        let wants_check = ntfs.volume_info(&mut reader)?.flags().contains(NtfsVolumeFlags::IS_DIRTY);
        Ok(!wants_check && is_clean(&ntfs, &mut reader)?)
    };
    look().map_err(fault)
}

type Looked = Result<Result<Option<Vec<LeftOut>>, Fault>, NtfsError>;

fn look(reader: &mut Reader<'_>, len: u64, wanted: Wanted) -> Looked {
    let mut ntfs = Ntfs::new(reader)?;
    ntfs.read_upcase_table(reader)?;
    let cluster = u64::from(ntfs.cluster_size());
    if let Some(file) = find(&ntfs, reader, HIBERNATION_FILE)?
        && let Some(head) = head(&file, reader)?
        && ASLEEP.iter().any(|asleep| head.starts_with(asleep))
    {
        return Ok(Ok(None));
    }
    if !wanted.swap {
        return Ok(Ok(Some(Vec::new())));
    }
    if ntfs.volume_info(reader)?.flags().contains(NtfsVolumeFlags::IS_DIRTY) {
        return Ok(Err(Fault::InUse("an NTFS file system that wants to be checked")));
    }
    if !wanted.is_quiet && !is_clean(&ntfs, reader)? {
        return Ok(Err(Fault::InUse("an NTFS file system that is mounted and was not frozen")));
    }
    let mut found = Vec::new();
    for name in PAGE_FILES {
        let Some(file) = find(&ntfs, reader, name)? else { continue };
        let Some(item) = file.data(reader, "") else { continue };
        let item = item?;
        let attribute = item.to_attribute()?;
        let NtfsAttributeValue::NonResident(value) = attribute.value(reader)? else {
            return Ok(Err(Fault::Unsupported("an NTFS file system with a page file in very many pieces")));
        };
        for run in value.data_runs().take(MOST_RUNS) {
            let run = run?;
            let Some(start) = run.data_position().value() else { continue };
            let (start, bytes) = (start.get(), run.allocated_size());
            let Some(end) = start.checked_add(bytes).filter(|end| *end <= len && start % cluster == 0) else {
                return Ok(Fault::damaged("an NTFS file system with a page file behind its end"));
            };
            found.push(LeftOut { range: start..end, reason: Reason::PageFile });
        }
    }
    Ok(Ok(Some(found)))
}

/// A file of the root folder.
fn find<'n>(ntfs: &'n Ntfs, reader: &mut Reader<'_>, name: &str) -> Result<Option<NtfsFile<'n>>, NtfsError> {
    let root = ntfs.root_directory(reader)?;
    let index = root.directory_index(reader)?;
    let mut finder = index.finder();
    match NtfsFileNameIndex::find(&mut finder, ntfs, reader, name) {
        None => Ok(None),
        Some(entry) => entry?.to_file(ntfs, reader).map(Some),
    }
}

/// The first bytes of a file's content.
fn head(file: &NtfsFile<'_>, reader: &mut Reader<'_>) -> Result<Option<[u8; 4]>, NtfsError> {
    let Some(item) = file.data(reader, "") else { return Ok(None) };
    let item = item?;
    let attribute = item.to_attribute()?;
    let mut value = attribute.value(reader)?;
    let mut head = [0; 4];
    if value.len() < 4 {
        return Ok(None);
    }
    value.read_exact(reader, &mut head)?;
    Ok(Some(head))
}

/// Whether the newer of the log's two restart pages says that it was closed.
fn is_clean(ntfs: &Ntfs, reader: &mut Reader<'_>) -> Result<bool, NtfsError> {
    let file = ntfs.file(reader, KnownNtfsFileRecordNumber::LogFile as u64)?;
    let Some(item) = file.data(reader, "") else { return Ok(false) };
    let item = item?;
    let attribute = item.to_attribute()?;
    let mut value = attribute.value(reader)?;
    let mut newest: Option<(u64, bool)> = None;
    let mut is_new = true;
    for page in [0, 4096] {
        let mut head = [0; 256];
        if value.len() < page + head.len() as u64 {
            return Ok(false);
        }
        value.seek(reader, SeekFrom::Start(page))?;
        value.read_exact(reader, &mut head)?;
        // As a log is made, before anybody mounts.
        is_new &= head == [0xff; 256];
        let area = usize::from(u16_at(&head, 0x18));
        if head[..4] != *RESTART_PAGE || area + 16 > head.len() {
            continue;
        }
        let (sequence, in_use, flags) =
            (u64_at(&head, area), u16_at(&head, area + 12), u16_at(&head, area + 14));
        let closed = in_use == NO_CLIENT || flags & VOLUME_IS_CLEAN != 0;
        if newest.is_none_or(|(newest, _)| sequence > newest) {
            newest = Some((sequence, closed));
        }
    }
    Ok(newest.map_or(is_new, |(_, closed)| closed))
}

/// A section as the library reads it.
pub(crate) struct Reader<'a> {
    section: Section<'a>,
    at: u64,
}

impl<'a> Reader<'a> {
    pub fn new(section: Section<'a>) -> Reader<'a> {
        Reader { section, at: 0 }
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.section.len().saturating_sub(self.at).min(buffer.len() as u64) as usize;
        match self.section.read(self.at, &mut buffer[..len]) {
            Ok(()) => {
                self.at += len as u64;
                Ok(len)
            }
            Err(Fault::Read(error)) => Err(error),
            Err(fault) => Err(io::Error::other(fault.to_string())),
        }
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, by) = match to {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::Current(by) => (self.at, by),
            SeekFrom::End(by) => (self.section.len(), by),
        };
        let at = base.checked_add_signed(by);
        self.at = at.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "before the start"))?;
        Ok(self.at)
    }
}

//! NTFS: the page files of Windows and free clusters, by a library that reads it.
//!
//! NTFS does not tell whether it was frozen, only whether it was taken down in order, in the restart pages of `$LogFile`. Whoever
//! froze it says so. A program that writes without a log (ntfs-3g) leaves an empty one, also while it has the file system
//! mounted, and cannot be frozen: what it calls free is not believed.

use crate::disk::{Fault, Section, u16_at, u64_at};
use crate::survey::{LeftOut, Reason, Wanted};
use ntfs::attribute_value::NtfsAttributeValue;
use ntfs::indexes::NtfsFileNameIndex;
use ntfs::structured_values::NtfsVolumeFlags;
use ntfs::{KnownNtfsFileRecordNumber, Ntfs, NtfsError, NtfsFile, NtfsReadSeek};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

const PAGE_FILES: [&str; 2] = ["pagefile.sys", "swapfile.sys"];
const HIBERNATION_FILE: &str = "hiberfil.sys";
/// What `hiberfil.sys` begins with while a machine sleeps in it.
const ASLEEP: [&[u8]; 3] = [b"hibr", b"HIBR", b"RSTR"];
const RESTART_PAGE: &[u8; 4] = b"RSTR";
const VOLUME_IS_CLEAN: u16 = 0x2;
const NO_CLIENT: u16 = 0xffff;
/// Where a volume that has, or had, shadow copies says so.
const SHADOW_COPIES: (u64, [u8; 16]) =
    (0x1e00, *b"\x6b\x87\x08\x38\x76\xc1\x48\x4e\xb7\xae\x04\x04\x6e\x6c\xc7\x52");
/// Bytes of the bitmap that are read at once.
const PIECE: usize = 1 << 20;
/// Pieces of a file, and of free space, at most.
const MOST_RUNS: usize = 100_000;

pub fn is_one(section: Section<'_>) -> Result<bool, Fault> {
    Ok(section.len() >= 512 && section.read_array::<8>(3)? == *b"NTFS    ")
}

/// What a file system may be without, and what is to be said of the rest.
pub struct Found {
    pub left_out: Vec<LeftOut>,
    pub remark: Option<&'static str>,
}

/// What it may be without; `None` if Windows sleeps in it.
pub fn leave_out(section: Section<'_>, wanted: Wanted) -> Result<Option<Found>, Fault> {
    let looked = look(&mut Reader::new(section), section, wanted);
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
        Ok(!wants_check && log(&ntfs, &mut reader)? != Log::InUse)
    };
    look().map_err(fault)
}

type Looked<T> = Result<Result<T, Fault>, NtfsError>;

fn look(reader: &mut Reader<'_>, section: Section<'_>, wanted: Wanted) -> Looked<Option<Found>> {
    let len = section.len();
    let mut ntfs = Ntfs::new(reader)?;
    ntfs.read_upcase_table(reader)?;
    let cluster = u64::from(ntfs.cluster_size());
    if let Some(file) = find(&ntfs, reader, HIBERNATION_FILE)?
        && let Some(head) = head(&file, reader)?
        && ASLEEP.iter().any(|asleep| head.starts_with(asleep))
    {
        return Ok(Ok(None));
    }
    if ntfs.volume_info(reader)?.flags().contains(NtfsVolumeFlags::IS_DIRTY) {
        return Ok(Err(Fault::InUse("an NTFS file system that wants to be checked")));
    }
    let log = log(&ntfs, reader)?;
    if !wanted.is_quiet && log == Log::InUse {
        return Ok(Err(Fault::InUse("an NTFS file system that is mounted and was not frozen")));
    }
    let mut found = Vec::new();
    for name in PAGE_FILES.into_iter().filter(|_| wanted.swap) {
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
    let (at, sign) = SHADOW_COPIES;
    let keeps_free_space = if log == Log::Empty {
        Some(
            "an NTFS file system without a log, as programs other than Windows leave it: its free space is backed up",
        )
    } else if section.read_array::<16>(at).is_ok_and(|found| found == sign) {
        Some(
            "an NTFS file system with shadow copies, which show what it gave away: its free space is backed up",
        )
    } else {
        None
    };
    if wanted.free_space && keeps_free_space.is_none() {
        match free_clusters(&ntfs, reader)? {
            Ok(free) => found.extend(free.into_iter().map(|clusters| LeftOut {
                range: clusters.start * cluster..clusters.end * cluster,
                reason: Reason::FreeSpace,
            })),
            Err(fault) => return Ok(Err(fault)),
        }
    }
    let remark = keeps_free_space.filter(|_| wanted.free_space);
    Ok(Ok(Some(Found { left_out: found, remark })))
}

/// Clusters that no file has, by `$Bitmap`. It has to call used where the table of files and it lie.
fn free_clusters(ntfs: &Ntfs, reader: &mut Reader<'_>) -> Looked<Vec<Range<u64>>> {
    const DAMAGED: &str = "an NTFS file system whose bitmap makes no sense";
    let cluster = u64::from(ntfs.cluster_size());
    let clusters = ntfs.size() / cluster;
    let mut used = Vec::new();
    for record in [KnownNtfsFileRecordNumber::MFT, KnownNtfsFileRecordNumber::Bitmap] {
        let file = ntfs.file(reader, record as u64)?;
        let Some(item) = file.data(reader, "") else { return Ok(Fault::damaged(DAMAGED)) };
        let item = item?;
        let attribute = item.to_attribute()?;
        let NtfsAttributeValue::NonResident(value) = attribute.value(reader)? else {
            return Ok(Fault::damaged(DAMAGED));
        };
        for run in value.data_runs().take(MOST_RUNS) {
            let run = run?;
            if let Some(start) = run.data_position().value() {
                let start = start.get() / cluster;
                used.push(start..start + run.allocated_size() / cluster);
            }
        }
    }
    let file = ntfs.file(reader, KnownNtfsFileRecordNumber::Bitmap as u64)?;
    let Some(item) = file.data(reader, "") else { return Ok(Fault::damaged(DAMAGED)) };
    let item = item?;
    let attribute = item.to_attribute()?;
    let mut value = attribute.value(reader)?;
    if value.len() < clusters.div_ceil(8) {
        return Ok(Fault::damaged(DAMAGED));
    }
    let mut runs: Vec<Range<u64>> = Vec::new();
    let (mut bytes, mut next) = (vec![0; PIECE], 0);
    while next < clusters {
        let len = (clusters - next).div_ceil(8).min(PIECE as u64) as usize;
        value.read_exact(reader, &mut bytes[..len])?;
        for place in next..clusters.min(next + len as u64 * 8) {
            let bit = place - next;
            if bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 1 {
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.end == place => last.end += 1,
                _ => runs.push(place..place + 1),
            }
        }
        if runs.len() > MOST_RUNS {
            let why = "an NTFS file system whose free space lies in too many pieces";
            return Ok(Err(Fault::Unsupported(why)));
        }
        next += len as u64 * 8;
    }
    let is_free = |used: &Range<u64>| {
        let behind = runs.partition_point(|free| free.end <= used.start);
        runs.get(behind).is_some_and(|free| free.start < used.end)
    };
    if used.iter().any(is_free) {
        return Ok(Fault::damaged(DAMAGED));
    }
    Ok(Ok(runs))
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

/// What `$LogFile` says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Log {
    /// The newer of its two restart pages says that it was closed.
    Closed,
    InUse,
    /// As it is made, before Windows mounts it.
    Empty,
}

fn log(ntfs: &Ntfs, reader: &mut Reader<'_>) -> Result<Log, NtfsError> {
    let file = ntfs.file(reader, KnownNtfsFileRecordNumber::LogFile as u64)?;
    let Some(item) = file.data(reader, "") else { return Ok(Log::InUse) };
    let item = item?;
    let attribute = item.to_attribute()?;
    let mut value = attribute.value(reader)?;
    let mut newest: Option<(u64, bool)> = None;
    let mut is_new = true;
    for page in [0, 4096] {
        let mut head = [0; 256];
        if value.len() < page + head.len() as u64 {
            return Ok(Log::InUse);
        }
        value.seek(reader, SeekFrom::Start(page))?;
        value.read_exact(reader, &mut head)?;
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
    Ok(match newest {
        Some((_, true)) => Log::Closed,
        None if is_new => Log::Empty,
        _ => Log::InUse,
    })
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

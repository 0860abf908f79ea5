//! Making a new store, and the synchronous helpers it shares with recovery.

use crate::disks::is_possible;
use crate::io::{Disk, FileId, IoErrorKind, IoOp, IoOutput};
use crate::params::{DiskEntry, FormatParams};
use crate::segment::{BATCHES_START, SegmentHeader};
use crate::store::{OpenError, Store};
use crate::superblock::{COPY_SIZE, CopyError, DiskRow, JournalPosition, MAX_DISKS, Superblock};
use rempart_buffer::{Buffer, BufferMut, PAGE_SIZE, Slice};
use rempart_types::{Lineage, Lsn, Term, WallTime};

/// The commands that make a disk's files.
pub(crate) fn disk_files(entry: &DiskEntry) -> Vec<IoOp> {
    let map = FileId::ChangeMap(entry.index);
    let mut ops = vec![IoOp::Create { file: map, len: 0, head: BufferMut::zeroed(0).freeze().whole() }];
    if entry.base == DiskEntry::EMPTY {
        ops.push(IoOp::SetLen { file: FileId::Image(entry.index), len: entry.size });
    }
    ops
}

pub(crate) fn run(disk: &mut dyn Disk, what: &'static str, op: &IoOp) -> Result<IoOutput, OpenError> {
    disk.execute(op).map_err(|source| OpenError::Io { what, source })
}

pub(crate) fn read(
    disk: &mut dyn Disk,
    what: &'static str,
    file: FileId,
    offset: u64,
    len: usize,
) -> Result<Buffer, OpenError> {
    match run(disk, what, &IoOp::Read { file, offset, len })? {
        IoOutput::Data(data) => Ok(data),
        other => panic!("a read must be answered with data: {other:?}"),
    }
}

pub(crate) fn write(
    disk: &mut dyn Disk,
    what: &'static str,
    file: FileId,
    offset: u64,
    data: Slice,
) -> Result<(), OpenError> {
    run(disk, what, &IoOp::Write { file, offset, data: vec![data] }).map(drop)
}

/// As the running store does it: copy after copy, each synced.
pub(crate) fn write_superblock(disk: &mut dyn Disk, superblock: &mut Superblock) -> Result<(), OpenError> {
    superblock.sequence += 1;
    write_copies(disk, superblock)
}

pub(crate) fn write_copies(disk: &mut dyn Disk, superblock: &Superblock) -> Result<(), OpenError> {
    let copy = superblock.encode();
    for number in 0..2 {
        write(disk, "write the superblock", FileId::Superblock, number * COPY_SIZE, copy.clone())?;
        run(disk, "write the superblock", &IoOp::Sync { file: FileId::Superblock })?;
    }
    Ok(())
}

/// The newest sound copy, and whether both are sound.
pub(crate) fn read_superblock(disk: &mut dyn Disk) -> Result<(Superblock, bool), OpenError> {
    let mut best: Option<Superblock> = None;
    let mut worst = CopyError::Blank;
    let mut sound = 0;
    for number in 0..2 {
        let op = IoOp::Read { file: FileId::Superblock, offset: number * COPY_SIZE, len: COPY_SIZE as usize };
        let bytes = match disk.execute(&op) {
            Ok(IoOutput::Data(data)) => data,
            Ok(other) => panic!("a read must be answered with data: {other:?}"),
            Err(error) if error.kind == IoErrorKind::Missing => return Err(OpenError::Unformatted),
            Err(source) => return Err(OpenError::Io { what: "read the superblock", source }),
        };
        match Superblock::decode(&bytes) {
            Ok(copy) => {
                sound += 1;
                if best.as_ref().is_none_or(|best| copy.sequence > best.sequence) {
                    best = Some(copy);
                }
            }
            Err(CopyError::Version(version)) => return Err(OpenError::Version(version)),
            Err(CopyError::Damaged) => worst = CopyError::Damaged,
            Err(CopyError::Blank) => {}
        }
    }
    match (best, worst) {
        (Some(superblock), _) => Ok((superblock, sound == 2)),
        (None, CopyError::Blank) => Err(OpenError::Unformatted),
        (None, _) => Err(OpenError::Superblock),
    }
}

impl Store {
    /// Writes an empty store. Images of base [`DiskEntry::EMPTY`] are created, others are left as they are.
    pub fn format(disk: &mut dyn Disk, params: &FormatParams) -> Result<(), OpenError> {
        match read_superblock(disk) {
            Err(OpenError::Unformatted) => {}
            Err(OpenError::Io { what, source }) => return Err(OpenError::Io { what, source }),
            // A damaged one is a store too.
            Ok(_) | Err(_) => return Err(OpenError::Exists),
        }
        let mut indices: Vec<_> = params.disks.iter().map(|entry| entry.index).collect();
        indices.sort();
        indices.dedup();
        let possible = indices.len() == params.disks.len()
            && params.disks.len() <= MAX_DISKS
            && params.disks.iter().all(is_possible)
            && params.segment_size.is_multiple_of(PAGE_SIZE as u64)
            && params.segment_size >= 4 * BATCHES_START
            && params.segments >= 2;
        if !possible {
            return Err(OpenError::Parameters);
        }
        for entry in &params.disks {
            if !entry.location.is_empty() {
                disk.locate_image(entry.index, &entry.location);
            }
            let image = FileId::Image(entry.index);
            match disk.execute(&IoOp::Stat { file: image }) {
                Ok(IoOutput::Stat(stat)) if entry.base == DiskEntry::EMPTY && stat.len > 0 => {
                    return Err(OpenError::ImageExists(entry.index));
                }
                Ok(_) => {}
                Err(error) if error.kind == IoErrorKind::Missing && entry.base == DiskEntry::EMPTY => {}
                Err(source) => return Err(OpenError::Io { what: "look at the image", source }),
            }
            for op in disk_files(entry) {
                run(disk, "create the disk's files", &op)?;
            }
            run(disk, "create the disk's files", &IoOp::Sync { file: image })?;
        }
        for file in [FileId::SnapshotMap, FileId::SnapshotData, FileId::Config] {
            let head = BufferMut::zeroed(0).freeze().whole();
            run(disk, "create the store's files", &IoOp::Create { file, len: 0, head })?;
        }
        for sequence in 1..=params.segments {
            let head = SegmentHeader { group: params.group, sequence, size: params.segment_size }.encode();
            let op = IoOp::Create { file: FileId::Segment(sequence), len: params.segment_size, head };
            run(disk, "create a journal segment", &op)?;
        }
        let mut disks: Vec<DiskRow> = params
            .disks
            .iter()
            .map(|entry| DiskRow { entry: entry.clone(), noted: (0, 0), suspect: false })
            .collect();
        disks.sort_by_key(|row| row.entry.index);
        let mut superblock = Superblock {
            sequence: 0,
            group: params.group,
            segment_size: params.segment_size,
            register: None,
            promise: Term::ZERO,
            applied: Lsn::ZERO,
            durable: Lsn::ZERO,
            stable: Lsn::ZERO,
            wall: WallTime(0),
            checkpoint: 0,
            redo: JournalPosition { sequence: 1, offset: BATCHES_START, chain: None },
            first_sequence: 1,
            truncate_to: None,
            claims_since: Some(Lsn::ZERO),
            lineage: Lineage::new(),
            syncing: None,
            rolling_back: false,
            damage: None,
            snapshot_generation: 1,
            disks,
            clean: false,
            config: None,
            control: Vec::new(),
        };
        // A file of both copies' length first, so that the copies overwrite written space.
        let blank = BufferMut::zeroed(0).freeze().whole();
        let op = IoOp::Create { file: FileId::Superblock, len: 2 * COPY_SIZE, head: blank };
        run(disk, "create the superblock", &op)?;
        write_superblock(disk, &mut superblock)
    }
}

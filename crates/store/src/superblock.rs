//! The superblock: what must be known before the journal is read.
//!
//! Two copies. Every version goes to copy 0, is synced, then to copy 1, is synced; only then it is reported.
//! So a torn write hits a version nobody was told of, and one damaged copy loses nothing (ADR 0010).

use crate::batch::ChainValue;
use crate::checksum::crc32c;
use crate::codec::{Reader, Writer};
use crate::event::SnapshotId;
use crate::params::DiskEntry;
use crate::store::Damage;
use rempart_buffer::{BufferMut, PAGE_SIZE, Slice};
use rempart_types::{DiskIndex, Epoch, GroupId, Lineage, Lsn, RegisterId, Run, Term, WallTime};

/// What to change; `None` leaves a field as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SuperblockChange {
    /// The highest term this replica promised. Never falls.
    pub promise: Option<Term>,
    pub register: Option<RegisterId>,
    /// The cluster core's own state (open attempts, incarnations), opaque here; at most 16 KiB.
    pub control: Option<Vec<u8>>,
    /// True: images found changed behind our back were compared, and are trusted again.
    pub images_trusted: bool,
    /// Records to here were durable in this copy, another one knows, although its log ends before: it is damaged.
    pub lost_to: Option<Lsn>,
}

/// First bytes of every copy.
pub(crate) const MAGIC: [u8; 8] = *b"RMPSUPER";
pub(crate) const VERSION: u32 = 1;
/// Bytes reserved for each copy.
pub const COPY_SIZE: u64 = 256 * 1024;
const PREFIX: usize = 32;
pub(crate) const MAX_CONTROL: usize = 16 * 1024;
pub(crate) const MAX_DISKS: usize = 64;
pub(crate) const MAX_SNAPSHOTS: usize = 256;
pub(crate) const MAX_LOCATION: usize = 1024;

/// A place in the journal: right after some batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct JournalPosition {
    pub sequence: u64,
    pub offset: u64,
    /// What the next batch must name; `None` accepts any (a log that just started after a resync).
    pub chain: Option<ChainValue>,
}

/// An unfinished resync.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Syncing {
    pub undo: SnapshotId,
    /// The state the undo snapshot keeps.
    pub old_lsn: Lsn,
    pub old_lineage: Lineage,
    /// Set once all extents are here: the log must reach it.
    pub log_until: Option<Lsn>,
    /// The largest number an extent came with.
    pub until: Lsn,
}

/// One row of the disk table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskRow {
    pub entry: DiskEntry,
    /// Length and change time at the clean stop.
    pub noted: (u64, u64),
    /// The image changed while we were away and was not compared since.
    pub suspect: bool,
}

/// Where the last applied configuration record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ConfigPlace {
    pub lsn: Lsn,
    pub slot: u8,
    pub len: u32,
    pub checksum: u32,
}

/// The superblock's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Superblock {
    /// Rises with every write.
    pub sequence: u64,
    pub group: GroupId,
    pub segment_size: u64,
    pub register: Option<RegisterId>,
    pub promise: Term,
    /// The image durably holds every record to here.
    pub applied: Lsn,
    /// Known durable here, and on the whole in-sync set, when this was written.
    pub durable: Lsn,
    pub stable: Lsn,
    pub wall: WallTime,
    /// Counts checkpoints; change map pages carry it.
    pub checkpoint: u64,
    /// Right after the record `applied`.
    pub redo: JournalPosition,
    /// Segments of lower sequence are of a dropped log.
    pub first_sequence: u64,
    /// A truncation under way: nothing after it may come back.
    pub truncate_to: Option<Lsn>,
    /// Batch headers' claims of stability count only above this: `None` while catching up, when they speak
    /// of other replicas.
    pub claims_since: Option<Lsn>,
    pub lineage: Lineage,
    pub syncing: Option<Syncing>,
    pub rolling_back: bool,
    pub damage: Option<Damage>,
    pub snapshot_generation: u64,
    pub disks: Vec<DiskRow>,
    pub clean: bool,
    pub config: Option<ConfigPlace>,
    pub control: Vec<u8>,
}

/// Why no superblock could be read from a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CopyError {
    /// Nothing was ever written.
    Blank,
    Damaged,
    Version(u32),
}

impl Superblock {
    /// One copy as it is on disk, padded to whole pages.
    pub fn encode(&self) -> Slice {
        let mut w = Writer::default();
        w.u128(self.group.0);
        w.u64(self.segment_size);
        w.option(self.register, |w, id| w.u128(id.0));
        write_term(&mut w, self.promise);
        w.u64(self.applied.0);
        w.u64(self.durable.0);
        w.u64(self.stable.0);
        w.u64(self.wall.0);
        w.u64(self.checkpoint);
        w.u64(self.redo.sequence);
        w.u64(self.redo.offset);
        w.option(self.redo.chain, |w, chain| w.u32(chain.0));
        w.u64(self.first_sequence);
        w.option(self.truncate_to, |w, lsn| w.u64(lsn.0));
        w.option(self.claims_since, |w, lsn| w.u64(lsn.0));
        write_lineage(&mut w, &self.lineage);
        w.option(self.syncing.as_ref(), |w, syncing| {
            w.u64(syncing.undo.0);
            w.u64(syncing.old_lsn.0);
            write_lineage(w, &syncing.old_lineage);
            w.option(syncing.log_until, |w, lsn| w.u64(lsn.0));
            w.u64(syncing.until.0);
        });
        w.u8(self.rolling_back.into());
        w.option(self.damage.as_ref(), |w, damage| {
            w.u64(damage.segment);
            w.u64(damage.offset);
            w.u64(damage.expected.0);
            w.u64(damage.claimed.0);
        });
        // The one snapshot that outlives a process. Earlier versions listed others, which nobody asked for again.
        w.u32(self.syncing.is_some().into());
        if let Some(syncing) = &self.syncing {
            w.u64(syncing.undo.0);
            w.u64(syncing.old_lsn.0);
        }
        w.u64(self.snapshot_generation);
        w.u32(self.disks.len() as u32);
        for row in &self.disks {
            w.u16(row.entry.index.0);
            w.u64(row.entry.size);
            w.u64(row.entry.base.0);
            w.bytes(row.entry.location.as_bytes());
            w.u64(row.noted.0);
            w.u64(row.noted.1);
            w.u8(row.suspect.into());
        }
        w.u8(self.clean.into());
        w.option(self.config, |w, config| {
            w.u64(config.lsn.0);
            w.u8(config.slot);
            w.u32(config.len);
            w.u32(config.checksum);
        });
        w.bytes(&self.control);
        let body = w.0;
        assert!((PREFIX + body.len()) as u64 <= COPY_SIZE, "a superblock of {} bytes", body.len());

        let mut copy = BufferMut::zeroed((PREFIX + body.len()).next_multiple_of(PAGE_SIZE));
        copy[..8].copy_from_slice(&MAGIC);
        copy[8..12].copy_from_slice(&VERSION.to_le_bytes());
        copy[12..16].copy_from_slice(&(body.len() as u32).to_le_bytes());
        copy[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        copy[PREFIX..PREFIX + body.len()].copy_from_slice(&body);
        let checksum = copy_checksum(&copy, body.len());
        copy[24..28].copy_from_slice(&checksum.to_le_bytes());
        copy.freeze().whole()
    }

    /// Reads one copy.
    pub fn decode(copy: &[u8]) -> Result<Superblock, CopyError> {
        if copy.len() < PREFIX || (copy[..8] != MAGIC && rempart_buffer::is_zero(copy)) {
            return Err(CopyError::Blank);
        }
        let word = |at: usize| u32::from_le_bytes(copy[at..at + 4].try_into().expect("four bytes"));
        let len = word(12) as usize;
        if copy[..8] != MAGIC || copy.len() - PREFIX < len || word(24) != copy_checksum(copy, len) {
            return Err(CopyError::Damaged);
        }
        if word(8) != VERSION {
            return Err(CopyError::Version(word(8)));
        }
        let sequence = u64::from_le_bytes(copy[16..24].try_into().expect("eight bytes"));
        decode_body(sequence, &copy[PREFIX..PREFIX + len]).ok_or(CopyError::Damaged)
    }

    pub fn disk(&self, disk: DiskIndex) -> Option<&DiskRow> {
        self.disks.iter().find(|row| row.entry.index == disk)
    }
}

fn copy_checksum(copy: &[u8], body: usize) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&copy[..24]);
    digest.update(&copy[PREFIX..PREFIX + body]);
    digest.finalize() as u32
}

fn decode_body(sequence: u64, body: &[u8]) -> Option<Superblock> {
    let mut r = Reader(body);
    let superblock = Superblock {
        sequence,
        group: GroupId(r.u128()?),
        segment_size: r.u64()?,
        register: r.option(|r| r.u128().map(RegisterId))?,
        promise: read_term(&mut r)?,
        applied: Lsn(r.u64()?),
        durable: Lsn(r.u64()?),
        stable: Lsn(r.u64()?),
        wall: WallTime(r.u64()?),
        checkpoint: r.u64()?,
        redo: JournalPosition {
            sequence: r.u64()?,
            offset: r.u64()?,
            chain: r.option(|r| r.u32().map(ChainValue))?,
        },
        first_sequence: r.u64()?,
        truncate_to: r.option(|r| r.u64().map(Lsn))?,
        claims_since: r.option(|r| r.u64().map(Lsn))?,
        lineage: read_lineage(&mut r)?,
        syncing: r.option(|r| {
            Some(Syncing {
                undo: SnapshotId(r.u64()?),
                old_lsn: Lsn(r.u64()?),
                old_lineage: read_lineage(r)?,
                log_until: r.option(|r| r.u64().map(Lsn))?,
                until: Lsn(r.u64()?),
            })
        })?,
        rolling_back: r.bool()?,
        damage: r.option(|r| {
            Some(Damage {
                segment: r.u64()?,
                offset: r.u64()?,
                expected: Lsn(r.u64()?),
                claimed: Lsn(r.u64()?),
            })
        })?,
        snapshot_generation: {
            r.list(MAX_SNAPSHOTS, |r| Some((r.u64()?, r.u64()?)))?;
            r.u64()?
        },
        disks: r.list(MAX_DISKS, |r| {
            let (index, size, base) = (DiskIndex(r.u16()?), r.u64()?, Lsn(r.u64()?));
            let location = String::from_utf8(r.bytes()?.to_vec()).ok()?;
            let entry = DiskEntry { index, size, location, base };
            Some(DiskRow { entry, noted: (r.u64()?, r.u64()?), suspect: r.bool()? })
        })?,
        clean: r.bool()?,
        config: r.option(|r| {
            Some(ConfigPlace { lsn: Lsn(r.u64()?), slot: r.u8()?, len: r.u32()?, checksum: r.u32()? })
        })?,
        control: r.bytes()?.to_vec(),
    };
    let sound = r.0.is_empty()
        && superblock.segment_size.is_multiple_of(PAGE_SIZE as u64)
        && superblock.redo.offset <= superblock.segment_size
        && superblock.config.is_none_or(|config| config.slot < 2);
    sound.then_some(superblock)
}

fn write_term(w: &mut Writer, term: Term) {
    w.u64(term.epoch.0);
    w.u32(term.incarnation);
}

fn read_term(r: &mut Reader<'_>) -> Option<Term> {
    Some(Term { epoch: Epoch(r.u64()?), incarnation: r.u32()? })
}

fn write_lineage(w: &mut Writer, lineage: &Lineage) {
    w.u32(lineage.runs().len() as u32);
    for run in lineage.runs() {
        write_term(w, run.term);
        w.u64(run.first.0);
    }
}

fn read_lineage(r: &mut Reader<'_>) -> Option<Lineage> {
    let runs = r.list(Lineage::MAX_RUNS, |r| Some(Run { term: read_term(r)?, first: Lsn(r.u64()?) }))?;
    Lineage::from_runs(runs).ok()
}

/// A checksum over a configuration record as kept beside the superblock.
pub(crate) fn config_checksum(definition: &[u8]) -> u32 {
    crc32c(definition)
}

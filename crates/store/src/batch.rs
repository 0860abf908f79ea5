//! A batch: the unit of journal write, of transfer and of truncation. The same bytes go to every replica.
//!
//! Layout in docs/formats/store.md. A batch is atomic: it is in a log as a whole or not at all. All positions
//! that replicas agree on (ends of logs, watermarks, common points) therefore fall between batches.

use crate::checksum::crc32c;
use bytes::Bytes;
use rempart_buffer::{Buffer, BufferMut, PAGE_SIZE, Slice};
use rempart_types::{DiskIndex, GroupId, LogPosition, Lsn, SECTOR_SIZE, Term, WallTime};
use std::fmt;
use std::sync::Arc;

/// First bytes of every batch.
pub const BATCH_MAGIC: [u8; 8] = *b"RMPBATCH";
/// The format this code writes.
pub const BATCH_VERSION: u16 = 1;
/// Bytes of a batch before the record table.
pub const BATCH_HEADER_LEN: usize = 96;
/// Bytes per record in the table.
pub const RECORD_LEN: usize = 32;
/// Payloads start here.
pub const PAYLOAD_START: usize = PAGE_SIZE;
/// Records a batch holds at most: as many as fit its first page.
pub const MAX_RECORDS: usize = (PAYLOAD_START - BATCH_HEADER_LEN) / RECORD_LEN;
/// Bytes one record's payload has at most: the largest NBD request QEMU sends.
pub const MAX_PAYLOAD: usize = 32 * 1024 * 1024;
/// Bytes a configuration record's payload has at most.
pub const MAX_CONFIG: usize = 4 * 1024 * 1024;
/// Bytes a batch has at most.
pub const MAX_BATCH_LEN: usize = PAYLOAD_START + MAX_PAYLOAD;

const OWN_CHECKSUM_AT: usize = 92;

/// The checksum of a batch's header, by which the next batch names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ChainValue(pub u32);

/// Why bytes are not a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchError {
    /// Fewer bytes than the header, or than the header says.
    Short,
    /// The first bytes are something else.
    Magic,
    /// Written by a newer program.
    Version(u16),
    /// The header or the record table was changed.
    HeaderChecksum,
    /// A sound checksum over fields that no writer produces.
    Malformed,
    /// The payload of this record was changed.
    PayloadChecksum(Lsn),
}

impl fmt::Display for BatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BatchError::Short => f.write_str("too short"),
            BatchError::Magic => f.write_str("wrong first bytes"),
            BatchError::Version(version) => write!(f, "unknown version {version}"),
            BatchError::HeaderChecksum => f.write_str("wrong header checksum"),
            BatchError::Malformed => f.write_str("impossible header"),
            BatchError::PayloadChecksum(lsn) => write!(f, "wrong payload checksum of record {lsn}"),
        }
    }
}

impl std::error::Error for BatchError {}

/// What a batch's header says, but for its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    pub group: GroupId,
    pub term: Term,
    /// Number of its first record.
    pub first: Lsn,
    /// Records, at least 1.
    pub count: u32,
    /// Its writer knew that records to here are durable on the whole in-sync set.
    pub stable: Lsn,
    /// Time for people and for "at time T": never goes back in a log.
    pub wall: WallTime,
    /// What the writer's clock really said.
    pub clock: WallTime,
    /// Bytes in all, a multiple of [`PAGE_SIZE`].
    pub len: usize,
    /// Names the batch before.
    pub previous: ChainValue,
    /// Names this batch.
    pub chain: ChainValue,
}

impl BatchHeader {
    pub fn last(&self) -> Lsn {
        Lsn(self.first.0 + u64::from(self.count) - 1)
    }
}

/// Where and when the next batch stands in the log: see [`Store::next_place`](crate::Store::next_place).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPlace {
    pub group: GroupId,
    pub term: Term,
    pub first: Lsn,
    pub stable: Lsn,
    pub wall: WallTime,
    pub clock: WallTime,
    pub previous: ChainValue,
}

/// What a record does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RecordKind {
    /// Its payload is written to the disk.
    Write,
    /// The range reads as zeroes; the space stays where that is possible.
    Zero,
    /// The range reads as zeroes; the space is given back where that is possible.
    Discard,
    /// A named consistency point; the payload is the caller's.
    Mark,
    /// The machine's definition; the payload is the caller's. The store keeps the last one.
    Config,
    /// A term begins; no effect on any disk.
    TermStart,
}

impl RecordKind {
    fn code(self) -> u8 {
        match self {
            RecordKind::Write => 1,
            RecordKind::Zero => 2,
            RecordKind::Discard => 3,
            RecordKind::Mark => 4,
            RecordKind::Config => 5,
            RecordKind::TermStart => 6,
        }
    }

    fn from_code(code: u8) -> Option<RecordKind> {
        Some(match code {
            1 => RecordKind::Write,
            2 => RecordKind::Zero,
            3 => RecordKind::Discard,
            4 => RecordKind::Mark,
            5 => RecordKind::Config,
            6 => RecordKind::TermStart,
            _ => return None,
        })
    }

    /// True when it changes a disk's bytes.
    pub fn changes_disk(self) -> bool {
        matches!(self, RecordKind::Write | RecordKind::Zero | RecordKind::Discard)
    }
}

/// One record of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub lsn: Lsn,
    pub kind: RecordKind,
    pub disk: DiskIndex,
    /// Bytes from the disk's start; 0 for what changes no disk.
    pub offset: u64,
    /// Bytes of the disk it changes; for the other kinds, of the payload.
    pub len: u64,
    payload_at: u32,
}

/// A sealed batch. Cloning shares the bytes.
#[derive(Clone)]
pub struct Batch(Arc<Sealed>);

struct Sealed {
    header: BatchHeader,
    bytes: Buffer,
}

impl Batch {
    /// Checks bytes from a peer or a journal. `bytes` may go on after the batch.
    pub fn parse(bytes: &[u8]) -> Result<Batch, BatchError> {
        let header = parse_header(bytes)?;
        let bytes = bytes.get(..header.len).ok_or(BatchError::Short)?;
        check_payloads(bytes, &header)?;
        Ok(Batch(Arc::new(Sealed { header, bytes: BufferMut::from_slice(bytes).freeze() })))
    }

    /// As [`Batch::parse`], sharing the bytes if they begin a page. Nothing may follow the batch.
    pub fn adopt(bytes: Bytes) -> Result<Batch, BatchError> {
        let header = parse_header(&bytes)?;
        if header.len != bytes.len() {
            return Err(if header.len > bytes.len() { BatchError::Short } else { BatchError::Malformed });
        }
        check_payloads(&bytes, &header)?;
        Ok(Batch(Arc::new(Sealed { header, bytes: Buffer::adopt(bytes) })))
    }

    pub fn header(&self) -> &BatchHeader {
        &self.0.header
    }

    pub fn first(&self) -> Lsn {
        self.0.header.first
    }

    pub fn last(&self) -> Lsn {
        self.0.header.last()
    }

    pub fn term(&self) -> Term {
        self.0.header.term
    }

    /// The number and term of its last record.
    pub fn end(&self) -> LogPosition {
        LogPosition { term: self.term(), lsn: self.last() }
    }

    /// What the next batch must name.
    pub fn chain(&self) -> ChainValue {
        self.0.header.chain
    }

    /// All of it, as it goes to the journal and over the wire.
    pub fn bytes(&self) -> &[u8] {
        &self.0.bytes
    }

    pub fn as_slice(&self) -> Slice {
        self.0.bytes.whole()
    }

    /// Bytes in all.
    pub fn byte_len(&self) -> usize {
        self.0.header.len
    }

    pub fn records(&self) -> impl ExactSizeIterator<Item = Record> + '_ {
        (0..self.0.header.count as usize).map(|index| {
            let entry = Entry::read(&self.0.bytes, index).expect("a sealed batch was checked");
            entry.record(self.0.header.first, index)
        })
    }

    /// The bytes that a write, mark or config record carries; empty for others.
    pub fn payload(&self, record: &Record) -> Slice {
        match record.kind {
            RecordKind::Write | RecordKind::Mark | RecordKind::Config => {
                let start = record.payload_at as usize;
                self.0.bytes.slice(start..start + record.len as usize)
            }
            RecordKind::Zero | RecordKind::Discard | RecordKind::TermStart => self.0.bytes.slice(0..0),
        }
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Batch({} {}..={}, {} bytes)", self.term(), self.first(), self.last(), self.byte_len())
    }
}

impl PartialEq for Batch {
    fn eq(&self, other: &Batch) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for Batch {}

/// One row of the record table.
struct Entry {
    kind: RecordKind,
    disk: DiskIndex,
    checksum: u32,
    offset: u64,
    len: u64,
    payload_at: u32,
}

impl Entry {
    fn read(bytes: &[u8], index: usize) -> Option<Entry> {
        let at = BATCH_HEADER_LEN + index * RECORD_LEN;
        let row = bytes.get(at..at + RECORD_LEN)?;
        Some(Entry {
            kind: RecordKind::from_code(row[0])?,
            disk: DiskIndex(u16_at(row, 2)),
            checksum: u32_at(row, 4),
            offset: u64_at(row, 8),
            len: u64_at(row, 16),
            payload_at: u32_at(row, 24),
        })
    }

    fn write(&self, row: &mut [u8]) {
        row.fill(0);
        row[0] = self.kind.code();
        row[2..4].copy_from_slice(&self.disk.0.to_le_bytes());
        row[4..8].copy_from_slice(&self.checksum.to_le_bytes());
        row[8..16].copy_from_slice(&self.offset.to_le_bytes());
        row[16..24].copy_from_slice(&self.len.to_le_bytes());
        row[24..28].copy_from_slice(&self.payload_at.to_le_bytes());
    }

    fn record(&self, first: Lsn, index: usize) -> Record {
        Record {
            lsn: Lsn(first.0 + index as u64),
            kind: self.kind,
            disk: self.disk,
            offset: self.offset,
            len: self.len,
            payload_at: self.payload_at,
        }
    }

    /// Whether a writer can have produced this row of a batch of `total` bytes.
    fn is_possible(&self, total: usize) -> bool {
        let payload_fits = || {
            let start = self.payload_at as usize;
            self.len <= MAX_PAYLOAD as u64
                && start >= PAYLOAD_START
                && start.is_multiple_of(SECTOR_SIZE as usize)
                && start + self.len as usize <= total
        };
        let range_is_sound = || {
            self.len > 0
                && self.offset.is_multiple_of(SECTOR_SIZE)
                && self.len.is_multiple_of(SECTOR_SIZE)
                && self.offset.checked_add(self.len).is_some_and(|end| end <= i64::MAX as u64)
        };
        match self.kind {
            RecordKind::Write => range_is_sound() && payload_fits(),
            RecordKind::Zero | RecordKind::Discard => range_is_sound(),
            RecordKind::Mark => self.offset == 0 && payload_fits(),
            RecordKind::Config => self.offset == 0 && self.len <= MAX_CONFIG as u64 && payload_fits(),
            RecordKind::TermStart => self.offset == 0 && self.len == 0,
        }
    }

    fn carries_payload(&self) -> bool {
        matches!(self.kind, RecordKind::Write | RecordKind::Mark | RecordKind::Config)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Checks a batch's header and record table, not its payloads. `bytes` holds at least the batch's first page.
pub fn parse_header(bytes: &[u8]) -> Result<BatchHeader, BatchError> {
    if bytes.len() < PAGE_SIZE {
        return Err(BatchError::Short);
    }
    if bytes[..8] != BATCH_MAGIC {
        return Err(BatchError::Magic);
    }
    // The checksum comes before the version: a flipped bit there is damage, not the future.
    let count = u32_at(bytes, 12);
    let table_end = BATCH_HEADER_LEN + (count as usize).min(MAX_RECORDS) * RECORD_LEN;
    let mut digest = crc32c_pair(&bytes[..OWN_CHECKSUM_AT], &bytes[BATCH_HEADER_LEN..table_end]);
    if count as usize > MAX_RECORDS {
        digest = !u32_at(bytes, OWN_CHECKSUM_AT);
    }
    if digest != u32_at(bytes, OWN_CHECKSUM_AT) {
        return Err(BatchError::HeaderChecksum);
    }
    let version = u16_at(bytes, 8);
    if version != BATCH_VERSION {
        return Err(BatchError::Version(version));
    }
    let header = BatchHeader {
        group: GroupId(u128::from_le_bytes(bytes[16..32].try_into().expect("sixteen bytes"))),
        term: Term::new(u64_at(bytes, 32), u32_at(bytes, 40)),
        len: u32_at(bytes, 44) as usize,
        first: Lsn(u64_at(bytes, 48)),
        count,
        stable: Lsn(u64_at(bytes, 56)),
        wall: WallTime(u64_at(bytes, 64)),
        clock: WallTime(u64_at(bytes, 72)),
        previous: ChainValue(u32_at(bytes, 80)),
        chain: ChainValue(digest),
    };
    let sound = count > 0
        && header.first > Lsn::ZERO
        && header.first.0.checked_add(u64::from(count)).is_some()
        && header.len.is_multiple_of(PAGE_SIZE)
        && (PAYLOAD_START..=MAX_BATCH_LEN).contains(&header.len)
        && (0..count as usize)
            .all(|index| Entry::read(bytes, index).is_some_and(|entry| entry.is_possible(header.len)));
    if sound { Ok(header) } else { Err(BatchError::Malformed) }
}

fn check_payloads(bytes: &[u8], header: &BatchHeader) -> Result<(), BatchError> {
    for index in 0..header.count as usize {
        let entry = Entry::read(bytes, index).ok_or(BatchError::Malformed)?;
        if entry.carries_payload() {
            let start = entry.payload_at as usize;
            let payload = bytes.get(start..start + entry.len as usize).ok_or(BatchError::Short)?;
            if crc32c(payload) != entry.checksum {
                return Err(BatchError::PayloadChecksum(header.first.plus(index as u64)));
            }
        }
    }
    Ok(())
}

/// Checksum of the header up to its own checksum, then of the record table.
fn crc32c_pair(head: &[u8], table: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(head);
    digest.update(table);
    digest.finalize() as u32
}

/// A large payload's place: room for a batch's first page, then the payload, so that a request received
/// into it becomes a batch without being copied again.
#[derive(Debug)]
pub struct PayloadBuffer {
    bytes: BufferMut,
    len: usize,
}

impl PayloadBuffer {
    /// Room for `len` bytes, all of which the caller must fill.
    ///
    /// # Panics
    /// If `len` is over [`MAX_PAYLOAD`].
    pub fn new(len: usize) -> PayloadBuffer {
        assert!(len <= MAX_PAYLOAD, "a payload of {len} bytes");
        let mut bytes = BufferMut::for_overwrite(PAYLOAD_START + len.next_multiple_of(PAGE_SIZE));
        bytes[..PAYLOAD_START].fill(0);
        PayloadBuffer { bytes, len }
    }

    pub fn payload(&self) -> &[u8] {
        &self.bytes[PAYLOAD_START..PAYLOAD_START + self.len]
    }

    pub fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[PAYLOAD_START..PAYLOAD_START + self.len]
    }
}

/// Collects records into one batch. Records are numbered in the order they are added.
#[derive(Debug)]
pub struct BatchBuilder {
    bytes: BufferMut,
    count: usize,
    /// Where the last committed payload ends.
    payload_end: usize,
    max_len: usize,
    /// Length of the last batch: the next one is likely of that size.
    usual_len: usize,
}

impl BatchBuilder {
    /// `max_len`: bytes a batch may have, from [`Store::max_batch_len`](crate::Store::max_batch_len).
    pub fn new(max_len: usize) -> BatchBuilder {
        let max_len = max_len.min(MAX_BATCH_LEN);
        assert!(max_len >= PAYLOAD_START, "a batch is at least a page");
        BatchBuilder {
            bytes: BufferMut::zeroed(0),
            count: 0,
            payload_end: PAYLOAD_START,
            max_len,
            usual_len: 2 * PAGE_SIZE,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn record_count(&self) -> usize {
        self.count
    }

    /// Bytes the batch would have if sealed now.
    pub fn byte_len(&self) -> usize {
        self.payload_end.next_multiple_of(PAGE_SIZE)
    }

    /// Whether one more record with a payload of `payload` bytes fits. An empty builder takes every payload
    /// that any batch can hold; otherwise seal it first.
    pub fn fits(&self, payload: usize) -> bool {
        self.count < MAX_RECORDS
            && (payload == 0 || self.next_payload_at() + payload.next_multiple_of(PAGE_SIZE) <= self.max_len)
    }

    /// Adds a write, copying `payload` once.
    ///
    /// # Panics
    /// If it does not [fit](BatchBuilder::fits), or is not of whole sectors (also the methods below).
    pub fn write(&mut self, disk: DiskIndex, offset: u64, payload: &[u8]) {
        self.reserve(payload.len()).copy_from_slice(payload);
        self.commit_write(disk, offset, payload.len());
    }

    /// Room for a payload of `len` bytes, to be filled in place and then added by
    /// [`BatchBuilder::commit_write`]. Reserving again takes the same place.
    pub fn reserve(&mut self, len: usize) -> &mut [u8] {
        assert!(self.fits(len), "a payload of {len} bytes does not fit");
        let at = self.next_payload_at();
        self.grow(at + len);
        &mut self.bytes[at..at + len]
    }

    /// Adds the payload just reserved as a write.
    pub fn commit_write(&mut self, disk: DiskIndex, offset: u64, len: usize) {
        let at = self.bytes.len() - len;
        self.add(RecordKind::Write, disk, offset, len as u64, at);
    }

    /// Adds a write that was received into its own buffer: without a copy when the builder is empty.
    pub fn write_buffer(&mut self, disk: DiskIndex, offset: u64, payload: PayloadBuffer) {
        if self.count > 0 {
            return self.write(disk, offset, payload.payload());
        }
        assert!(self.fits(payload.len), "a payload of {} bytes does not fit", payload.len);
        self.bytes = payload.bytes;
        self.bytes.resize(PAYLOAD_START + payload.len);
        self.commit_write(disk, offset, payload.len);
    }

    pub fn zero(&mut self, disk: DiskIndex, offset: u64, len: u64) {
        self.add_bare(RecordKind::Zero, disk, offset, len);
    }

    pub fn discard(&mut self, disk: DiskIndex, offset: u64, len: u64) {
        self.add_bare(RecordKind::Discard, disk, offset, len);
    }

    /// Adds a named point.
    pub fn mark(&mut self, name: &[u8]) {
        self.add_blob(RecordKind::Mark, name);
    }

    /// Adds a new definition of the machine.
    pub fn config(&mut self, definition: &[u8]) {
        self.add_blob(RecordKind::Config, definition);
    }

    pub fn term_start(&mut self) {
        self.add_bare(RecordKind::TermStart, DiskIndex(0), 0, 0);
    }

    /// Closes the batch and starts the next one.
    ///
    /// # Panics
    /// If it is empty.
    pub fn seal(&mut self, place: &BatchPlace) -> Batch {
        assert!(self.count > 0, "an empty batch");
        let len = self.byte_len();
        self.bytes.resize(len);
        // An abandoned reservation may have left bytes here.
        self.bytes[self.payload_end..].fill(0);
        self.payload_end = PAYLOAD_START;
        self.usual_len = len.min(1 << 20);
        let mut bytes = std::mem::replace(&mut self.bytes, BufferMut::with_capacity(0, self.usual_len));
        let count = std::mem::take(&mut self.count) as u32;
        bytes[..8].copy_from_slice(&BATCH_MAGIC);
        bytes[8..10].copy_from_slice(&BATCH_VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&count.to_le_bytes());
        bytes[16..32].copy_from_slice(&place.group.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&place.term.epoch.0.to_le_bytes());
        bytes[40..44].copy_from_slice(&place.term.incarnation.to_le_bytes());
        bytes[44..48].copy_from_slice(&(len as u32).to_le_bytes());
        bytes[48..56].copy_from_slice(&place.first.0.to_le_bytes());
        bytes[56..64].copy_from_slice(&place.stable.0.to_le_bytes());
        bytes[64..72].copy_from_slice(&place.wall.0.to_le_bytes());
        bytes[72..80].copy_from_slice(&place.clock.0.to_le_bytes());
        bytes[80..84].copy_from_slice(&place.previous.0.to_le_bytes());
        let table_end = BATCH_HEADER_LEN + count as usize * RECORD_LEN;
        let chain = crc32c_pair(&bytes[..OWN_CHECKSUM_AT], &bytes[BATCH_HEADER_LEN..table_end]);
        bytes[OWN_CHECKSUM_AT..BATCH_HEADER_LEN].copy_from_slice(&chain.to_le_bytes());
        let header = BatchHeader {
            group: place.group,
            term: place.term,
            first: place.first,
            count,
            stable: place.stable,
            wall: place.wall,
            clock: place.clock,
            len,
            previous: place.previous,
            chain: ChainValue(chain),
        };
        Batch(Arc::new(Sealed { header, bytes: bytes.freeze() }))
    }

    fn next_payload_at(&self) -> usize {
        self.payload_end.next_multiple_of(SECTOR_SIZE as usize)
    }

    fn grow(&mut self, len: usize) {
        if self.bytes.capacity() < len {
            let capacity = len.max(self.usual_len).max(self.bytes.capacity() * 2);
            let mut larger = BufferMut::with_capacity(self.bytes.len(), capacity);
            larger.copy_from_slice(&self.bytes);
            self.bytes = larger;
        }
        self.bytes.resize(len);
    }

    fn add_bare(&mut self, kind: RecordKind, disk: DiskIndex, offset: u64, len: u64) {
        assert!(self.fits(0), "a batch holds {MAX_RECORDS} records");
        self.grow(self.payload_end);
        self.add(kind, disk, offset, len, 0);
    }

    fn add_blob(&mut self, kind: RecordKind, payload: &[u8]) {
        self.reserve(payload.len()).copy_from_slice(payload);
        let at = self.bytes.len() - payload.len();
        self.add(kind, DiskIndex(0), 0, payload.len() as u64, at);
    }

    fn add(&mut self, kind: RecordKind, disk: DiskIndex, offset: u64, len: u64, payload_at: usize) {
        let mut entry = Entry { kind, disk, checksum: 0, offset, len, payload_at: payload_at as u32 };
        if entry.carries_payload() {
            entry.checksum = crc32c(&self.bytes[payload_at..payload_at + len as usize]);
        }
        assert!(entry.is_possible(MAX_BATCH_LEN), "{kind:?} of {len} bytes at {offset} is no record");
        let at = BATCH_HEADER_LEN + self.count * RECORD_LEN;
        entry.write(&mut self.bytes[at..at + RECORD_LEN]);
        if entry.carries_payload() {
            self.payload_end = payload_at + len as usize;
        }
        self.count += 1;
    }
}

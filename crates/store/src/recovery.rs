//! Opening a store: what the log holds after whatever happened, decided once and made durable.
//!
//! The decision table is in docs/formats/store.md; the cases here carry its letters.

use crate::batch::{BATCH_MAGIC, Batch, ChainValue, parse_header};
use crate::change_map::ChangeMap;
use crate::format::{read, read_superblock, run, write, write_copies, write_superblock};
use crate::io::{Disk, FileId, IoError, IoErrorKind, IoOp, IoOutput};
use crate::journal::{Prepared, Segment};
use crate::params::EXTENT_BYTES;
use crate::recovery_rows::RecoveryRows;
use crate::segment::{BATCHES_START, HeaderError, SegmentHeader};
use crate::snapshot::Snapshots;
use crate::store::{
    CONFIG_SLOT_SIZE, Damage, Health, OpenError, OpenOptions, Recovered, Store, extent_count, health_of,
};
use crate::superblock::{JournalPosition, Superblock, config_checksum};
use rempart_buffer::{PAGE_SIZE, is_zero};
use rempart_types::{DiskIndex, LogPosition, Lsn, Term};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};

/// The journal's files by what their headers say.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    pub by_sequence: BTreeMap<u64, u64>,
    /// Their headers cannot be read, though they were durable before use.
    pub damaged: Vec<u64>,
    pub next_slot: u64,
    pub rows: RecoveryRows,
}

/// What a walk along the chain found.
#[derive(Debug, Default)]
struct Walk {
    /// Each batch with the place after it.
    batches: Vec<(Batch, JournalPosition)>,
    /// Pages that begin a batch of this log which is not part of it: slot, offset.
    remains: Vec<(u64, u64)>,
    damage: Option<Damage>,
    rows: RecoveryRows,
}

/// Reads all segments' headers; removes what was never completed and what belongs to a dropped log.
pub(crate) fn survey(disk: &mut dyn Disk, superblock: &Superblock) -> Result<Slots, OpenError> {
    const WHAT: &str = "look through the journal";
    let mut slots = Slots { next_slot: 1, ..Slots::default() };
    let files = disk.list().map_err(|source| OpenError::Io { what: WHAT, source })?;
    for file in files {
        let FileId::Segment(slot) = file else { continue };
        slots.next_slot = slots.next_slot.max(slot + 1);
        let page = read(disk, WHAT, file, 0, PAGE_SIZE)?;
        match SegmentHeader::decode(&page) {
            Ok(header) if header.group == superblock.group && header.size == superblock.segment_size => {
                if header.sequence < superblock.first_sequence {
                    slots.rows.add('M');
                    run(disk, WHAT, &IoOp::Remove { file })?;
                } else {
                    match slots.by_sequence.entry(header.sequence) {
                        Entry::Vacant(place) => drop(place.insert(slot)),
                        Entry::Occupied(_) => slots.damaged.push(slot),
                    }
                }
            }
            Err(HeaderError::Blank) => {
                slots.rows.add('L');
                run(disk, WHAT, &IoOp::Remove { file })?;
            }
            Ok(_) | Err(HeaderError::Damaged) => slots.damaged.push(slot),
        }
    }
    Ok(slots)
}

/// Follows the chain from the checkpoint.
fn walk(disk: &mut dyn Disk, superblock: &Superblock, slots: &Slots) -> Result<Walk, OpenError> {
    const WHAT: &str = "read the journal";
    let mut walk = Walk::default();
    let mut here = superblock.redo;
    let mut expected = superblock.applied.next();
    let mut term = superblock.lineage.term_at(superblock.applied).unwrap_or(Term::ZERO);
    let limit = superblock.truncate_to.unwrap_or(Lsn(u64::MAX));
    let is_next = |group, first, previous, expected, chain: Option<ChainValue>| {
        group == superblock.group && first == expected && chain.is_none_or(|chain| chain == previous)
    };
    let size = superblock.segment_size;
    let slot_of = |sequence: u64| slots.by_sequence.get(&sequence).copied();
    let Some(mut slot) = slot_of(here.sequence) else {
        // The segment that the superblock names is gone or its header unreadable.
        walk.rows.add('K');
        let claimed = superblock.durable;
        let segment = slots.damaged.first().copied().unwrap_or(0);
        walk.damage = Some(Damage { segment, offset: here.offset, expected, claimed });
        return Ok(walk);
    };
    let mut claimed = superblock.durable;
    walk.rows.add_if('F', superblock.truncate_to.is_some());
    loop {
        let start = here.offset;
        let bytes = read(disk, WHAT, FileId::Segment(slot), start, (size - start) as usize)?;
        while let Ok(batch) = Batch::parse(&bytes[(here.offset - start) as usize..]) {
            let header = batch.header();
            let next = is_next(header.group, header.first, header.previous, expected, here.chain);
            if !next || header.term < term || batch.last() > limit {
                walk.rows.add_if('E', header.first < expected);
                break;
            }
            expected = batch.last().next();
            term = header.term;
            here.offset += batch.byte_len() as u64;
            here.chain = Some(batch.chain());
            walk.batches.push((batch, here));
        }
        // The log goes on in the next segment, or ends here.
        let follower = slot_of(here.sequence + 1);
        if let Some(next_slot) = follower {
            let page = read(disk, WHAT, FileId::Segment(next_slot), BATCHES_START, PAGE_SIZE)?;
            let goes_on = parse_header(&page).is_ok_and(|header| {
                is_next(header.group, header.first, header.previous, expected, here.chain)
                    && header.term >= term
                    && header.last() <= limit
            });
            if goes_on {
                walk.rows.add('D');
                here =
                    JournalPosition { sequence: here.sequence + 1, offset: BATCHES_START, chain: here.chain };
                slot = next_slot;
                continue;
            }
        }
        let rest = &bytes[(here.offset - start) as usize..];
        let half = Batch::parse(rest).is_err()
            && parse_header(rest).is_ok_and(|header| {
                is_next(header.group, header.first, header.previous, expected, here.chain)
            });
        walk.rows.add_if('C', half);
        collect_remains(superblock, slot, here.offset, rest, expected, &mut walk, &mut claimed);
        break;
    }
    let later: Vec<u64> = slots
        .by_sequence
        .range(here.sequence + 1..)
        .map(|(_, &slot)| slot)
        .chain(slots.damaged.iter().copied())
        .collect();
    for slot in later {
        let bytes = read(disk, WHAT, FileId::Segment(slot), BATCHES_START, (size - BATCHES_START) as usize)?;
        collect_remains(superblock, slot, BATCHES_START, &bytes, expected, &mut walk, &mut claimed);
    }
    if claimed.min(limit) >= expected {
        // What is missing was acknowledged as durable.
        walk.damage =
            Some(Damage { segment: slot, offset: here.offset, expected, claimed: claimed.min(limit) });
        let unreadable = !slots.damaged.is_empty();
        walk.rows.add_if('H', superblock.durable >= expected);
        walk.rows.add_if('G', superblock.durable < expected && !unreadable);
        walk.rows.add_if('I', unreadable);
    } else {
        walk.rows.add(if walk.remains.is_empty() { 'A' } else { 'B' });
        walk.rows.add_if('J', !slots.damaged.is_empty());
    }
    Ok(walk)
}

/// Notes batches of this log behind the break, and what they claim to be stable.
fn collect_remains(
    superblock: &Superblock,
    slot: u64,
    offset: u64,
    bytes: &[u8],
    expected: Lsn,
    walk: &mut Walk,
    claimed: &mut Lsn,
) {
    for (index, page) in bytes.chunks_exact(PAGE_SIZE).enumerate() {
        if page[..8] != BATCH_MAGIC {
            continue;
        }
        let Ok(header) = parse_header(page) else { continue };
        // What an earlier use of the segment left behind is older than the log's end.
        if header.group != superblock.group || header.first < expected {
            continue;
        }
        walk.remains.push((slot, offset + (index * PAGE_SIZE) as u64));
        if superblock.claims_since.is_some_and(|since| header.stable > since) {
            *claimed = (*claimed).max(header.stable);
        }
    }
}

/// Puts back what the undo snapshot kept (rule 14). Can be repeated after a crash at any point.
fn roll_back(
    disk: &mut dyn Disk,
    superblock: &mut Superblock,
    rows: &mut RecoveryRows,
) -> Result<(), OpenError> {
    const WHAT: &str = "roll back the unfinished resync";
    if !superblock.rolling_back {
        superblock.rolling_back = true;
        // The images no longer look as a clean stop noted them.
        superblock.clean = false;
        write_superblock(disk, superblock)?;
    }
    let syncing = superblock.syncing.clone().expect("only a syncing copy is rolled back");
    let snapshots = load_snapshots(disk, superblock, rows)?;
    for (index, extent, saved) in snapshots.saved_for(syncing.old_lsn) {
        let Some(row) = superblock.disk(index) else { continue };
        let range = extent.bytes(row.entry.size);
        let (file, offset, len) = (FileId::Image(index), range.start, range.end - range.start);
        let op = match saved.place {
            None => IoOp::Zero { file, offset, len, punch: true },
            Some(place) => {
                let data = read(disk, WHAT, FileId::SnapshotData, place.offset(), EXTENT_BYTES)?;
                if crate::checksum::crc32c(&data) != saved.checksum {
                    let message = format!("saved extent {} of disk {index} is damaged", extent.0);
                    let file = FileId::SnapshotData;
                    let source = IoError { kind: IoErrorKind::Io, file, path: String::new(), message };
                    return Err(OpenError::Io { what: WHAT, source });
                }
                IoOp::Write { file, offset, data: vec![data.slice(0..len as usize)] }
            }
        };
        run(disk, WHAT, &op)?;
    }
    for row in &superblock.disks {
        run(disk, WHAT, &IoOp::Sync { file: FileId::Image(row.entry.index) })?;
    }
    // The old log's records are all in the image: a new, empty one goes on from there.
    let slots = survey(disk, superblock)?;
    let sequence = slots.by_sequence.keys().next_back().map_or(superblock.first_sequence, |last| last + 1);
    let head = SegmentHeader { group: superblock.group, sequence, size: superblock.segment_size }.encode();
    let file = FileId::Segment(slots.next_slot);
    run(disk, WHAT, &IoOp::Create { file, len: superblock.segment_size, head })?;
    superblock.applied = syncing.old_lsn;
    superblock.durable = syncing.old_lsn;
    superblock.stable = syncing.old_lsn;
    superblock.lineage = syncing.old_lineage;
    superblock.redo = JournalPosition { sequence, offset: BATCHES_START, chain: None };
    superblock.first_sequence = sequence;
    superblock.truncate_to = None;
    superblock.snapshot_generation += 1;
    superblock.syncing = None;
    superblock.rolling_back = false;
    write_superblock(disk, superblock)
}

fn load_snapshots(
    disk: &mut dyn Disk,
    superblock: &Superblock,
    rows: &mut RecoveryRows,
) -> Result<Snapshots, OpenError> {
    const WHAT: &str = "read the snapshot map";
    let mut snapshots = Snapshots::default();
    let Some(syncing) = &superblock.syncing else {
        // What the last process put aside for its views ended with it.
        for file in [FileId::SnapshotMap, FileId::SnapshotData] {
            if stat(disk, WHAT, file)?.0 > 0 {
                run(disk, "empty the snapshot files", &IoOp::SetLen { file, len: 0 })?;
            }
        }
        return Ok(snapshots);
    };
    // What a killed process left in the page cache is relied on from here: data first, then the map. The data
    // was synced before the map was written; the map's own sync may have failed, so it is written again.
    run(disk, WHAT, &IoOp::Sync { file: FileId::SnapshotData })?;
    let file = FileId::SnapshotMap;
    let len = stat(disk, WHAT, file)?.0 as usize;
    let map = read(disk, WHAT, file, 0, len)?;
    if len > 0 {
        write(disk, "write the snapshot map again", file, 0, map.slice(0..len))?;
    }
    run(disk, WHAT, &IoOp::Sync { file })?;
    let undo = (syncing.undo, syncing.old_lsn);
    let unsound = snapshots.load(undo, superblock.snapshot_generation, &map);
    rows.add_if('T', unsound);
    Ok(snapshots)
}

fn stat(disk: &mut dyn Disk, what: &'static str, file: FileId) -> Result<(u64, u64), OpenError> {
    match run(disk, what, &IoOp::Stat { file })? {
        IoOutput::Stat(stat) => Ok((stat.len, stat.modified_ns)),
        other => panic!("a stat must be answered with one: {other:?}"),
    }
}

fn load_maps(
    disk: &mut dyn Disk,
    superblock: &Superblock,
    rows: &mut RecoveryRows,
) -> Result<BTreeMap<DiskIndex, ChangeMap>, OpenError> {
    const WHAT: &str = "read the change map";
    const CHUNK: u64 = 1024 * 1024;
    let conservative = superblock.syncing.as_ref().map_or(Lsn::ZERO, |syncing| syncing.until);
    let conservative = conservative.max(superblock.applied).max(superblock.durable);
    let mut maps = BTreeMap::new();
    for row in &superblock.disks {
        let entry = &row.entry;
        let extents = extent_count(entry.size);
        let mut map = ChangeMap::new(entry.index, entry.base, extents);
        let file = FileId::ChangeMap(entry.index);
        let len = match stat(disk, WHAT, file) {
            Ok((len, _)) => len.min(ChangeMap::file_len(extents)),
            Err(OpenError::Io { source, .. }) if source.kind == IoErrorKind::Missing => {
                map.mark(
                    rempart_types::ExtentIndex(0),
                    rempart_types::ExtentIndex(extents - 1),
                    conservative,
                );
                0
            }
            Err(error) => return Err(error),
        };
        let mut at = 0;
        while at < len {
            // Both slots of the last page, also where the file ends between them.
            let count = (len - at).next_multiple_of(2 * PAGE_SIZE as u64).min(CHUNK);
            let bytes = read(disk, WHAT, file, at, count as usize)?;
            for (index, pair) in bytes.chunks_exact(2 * PAGE_SIZE).enumerate() {
                if !is_zero(pair) {
                    let (first, second) = pair.split_at(PAGE_SIZE);
                    let page = at / (2 * PAGE_SIZE as u64) + index as u64;
                    rows.add_if('S', map.load(page, [first, second], conservative));
                }
            }
            at += CHUNK;
        }
        if row.suspect {
            // Somebody else wrote to the image, wherever: nothing of it may be taken for untouched.
            let last = rempart_types::ExtentIndex(extents - 1);
            map.mark(rempart_types::ExtentIndex(0), last, conservative.max(Lsn(1)));
        }
        maps.insert(entry.index, map);
    }
    Ok(maps)
}

/// Compares the images with what a clean stop noted.
fn check_images(disk: &mut dyn Disk, superblock: &mut Superblock) -> Result<(), OpenError> {
    const WHAT: &str = "look at the image";
    for row in &mut superblock.disks {
        let file = FileId::Image(row.entry.index);
        let found = stat(disk, WHAT, file)?;
        if superblock.clean && found != row.noted {
            row.suspect = true;
        }
        if found.0 < row.entry.size {
            row.suspect = true;
            run(disk, WHAT, &IoOp::SetLen { file, len: row.entry.size })?;
        }
    }
    Ok(())
}

/// Makes the walk's end the log's end: what is behind it is overwritten, what it holds is durable. What no sync is
/// known to have covered is written again in its place: the cache it was read from may be all there is of it.
fn settle(disk: &mut dyn Disk, superblock: &Superblock, slots: &Slots, walk: &Walk) -> Result<(), OpenError> {
    const WHAT: &str = "cut off the journal's torn end";
    for &(slot, offset) in &walk.remains {
        let (file, len) = (FileId::Segment(slot), PAGE_SIZE as u64);
        run(disk, WHAT, &IoOp::Zero { file, offset, len, punch: false })?;
    }
    for (batch, after) in walk.batches.iter().filter(|(batch, _)| batch.last() > superblock.durable) {
        let file = FileId::Segment(slots.by_sequence[&after.sequence]);
        write(
            disk,
            "write the journal's end again",
            file,
            after.offset - batch.byte_len() as u64,
            batch.as_slice(),
        )?;
    }
    for (_, &slot) in slots.by_sequence.range(superblock.redo.sequence..) {
        run(disk, WHAT, &IoOp::Sync { file: FileId::Segment(slot) })?;
    }
    for &slot in &slots.damaged {
        run(disk, WHAT, &IoOp::Remove { file: FileId::Segment(slot) })?;
    }
    Ok(())
}

/// The segment list and the prepared ones, from what was surveyed and walked.
pub(crate) struct Layout {
    pub segments: VecDeque<Segment>,
    pub prepared: VecDeque<Prepared>,
    pub next_sequence: u64,
    pub next_slot: u64,
}

fn lay_out(
    disk: &mut dyn Disk,
    superblock: &Superblock,
    slots: &Slots,
    walk: &Walk,
) -> Result<Layout, OpenError> {
    const WHAT: &str = "read the journal";
    let redo = superblock.redo;
    let mut segments: VecDeque<Segment> = VecDeque::new();
    let first_of = |disk: &mut dyn Disk, slot: u64| -> Result<Option<Lsn>, OpenError> {
        let page = read(disk, WHAT, FileId::Segment(slot), BATCHES_START, PAGE_SIZE)?;
        let header = parse_header(&page).ok().filter(|header| header.group == superblock.group);
        Ok(header.map(|header| header.first))
    };
    if redo.offset > BATCHES_START
        && let Some(&slot) = slots.by_sequence.get(&redo.sequence)
    {
        let next = superblock.applied.next();
        let first = first_of(disk, slot)?.filter(|&first| first < next).unwrap_or(next);
        let (last, end) = (superblock.applied, redo.offset);
        let index = vec![(first, BATCHES_START)];
        let mut segment = Segment { slot, sequence: redo.sequence, first, last, end, index, synced: last };
        if first == next {
            segment.index.clear();
            segment.index.push((next, redo.offset));
        }
        segments.push_back(segment);
    }
    for (batch, after) in &walk.batches {
        let offset = after.offset - batch.byte_len() as u64;
        if segments.back().is_none_or(|segment| segment.sequence != after.sequence) {
            let slot = slots.by_sequence[&after.sequence];
            segments.push_back(Segment {
                slot,
                sequence: after.sequence,
                first: batch.first(),
                last: batch.last(),
                end: offset,
                index: Vec::new(),
                synced: batch.last(),
            });
        }
        let segment = segments.back_mut().expect("just made sure of");
        segment.note(batch.first(), offset);
        segment.last = batch.last();
        segment.synced = batch.last();
        segment.end = after.offset;
    }
    // Older segments, as far back as they follow each other: they serve catch-up.
    let oldest =
        segments.front().map_or((redo.sequence, superblock.applied.next()), |s| (s.sequence, s.first));
    let (mut sequence, mut next) = oldest;
    while let Some(&slot) = sequence.checked_sub(1).and_then(|before| slots.by_sequence.get(&before)) {
        sequence -= 1;
        let Some(first) = first_of(disk, slot)?.filter(|&first| first < next) else { break };
        let (last, end) = (next.previous(), superblock.segment_size);
        segments.push_front(Segment {
            slot,
            sequence,
            first,
            last,
            end,
            index: vec![(first, BATCHES_START)],
            synced: last,
        });
        next = first;
    }
    let lowest = segments.front().map_or(redo.sequence, |segment| segment.sequence);
    let mut next_sequence = segments.back().map_or(redo.sequence, |segment| segment.sequence + 1);
    let mut prepared = VecDeque::new();
    for (&sequence, &slot) in &slots.by_sequence {
        if sequence < lowest {
            run(disk, WHAT, &IoOp::Remove { file: FileId::Segment(slot) })?;
        } else if sequence >= next_sequence {
            if walk.damage.is_some() || sequence == next_sequence {
                // Of a damaged log nothing is thrown away here.
                prepared.push_back(Prepared { slot, sequence });
                next_sequence = sequence + 1;
            } else {
                run(disk, WHAT, &IoOp::Remove { file: FileId::Segment(slot) })?;
            }
        }
    }
    if walk.damage.is_some() {
        prepared.extend(slots.damaged.iter().map(|&slot| Prepared { slot, sequence: 0 }));
    }
    Ok(Layout { segments, prepared, next_sequence, next_slot: slots.next_slot })
}

impl Store {
    /// Recovers. Synchronous; everything it decides is durable when it returns.
    pub fn open(disk: &mut dyn Disk, options: &OpenOptions) -> Result<(Store, Recovered), OpenError> {
        let mut rows = RecoveryRows::default();
        let (mut superblock, both_copies) = read_superblock(disk)?;
        rows.add_if('N', !both_copies);
        // A killed process may have left it in the page cache only, and what follows acts on it. It is written
        // again: after a failed sync the cache holds, and calls clean, what the medium never got.
        write_copies(disk, &superblock)?;
        for row in &superblock.disks {
            if !row.entry.location.is_empty() {
                disk.locate_image(row.entry.index, &row.entry.location);
            }
        }
        let clean = superblock.clean;
        let suspect = |superblock: &Superblock| superblock.disks.iter().filter(|row| row.suspect).count();
        let suspect_before = suspect(&superblock);
        check_images(disk, &mut superblock)?;
        rows.add_if('R', superblock.clean && suspect(&superblock) > suspect_before);
        let rolled_back = superblock.syncing.is_some() && (options.roll_back || superblock.rolling_back);
        rows.add_if('P', rolled_back);
        if rolled_back {
            roll_back(disk, &mut superblock, &mut rows)?;
        }
        rows.add_if('Q', superblock.syncing.is_some());
        let clean = clean && !rolled_back;
        let slots = survey(disk, &superblock)?;
        let walk = walk(disk, &superblock, &slots)?;
        let damage = superblock.damage.clone().or_else(|| walk.damage.clone());
        let walk = Walk { damage, ..walk };
        if walk.damage.is_none() {
            settle(disk, &superblock, &slots, &walk)?;
        }
        let layout = lay_out(disk, &superblock, &slots, &walk)?;
        let maps = load_maps(disk, &superblock, &mut rows)?;
        let versions = maps.values().map(ChangeMap::newest_version);
        superblock.checkpoint = versions.fold(superblock.checkpoint, u64::max);
        let snapshots = load_snapshots(disk, &superblock, &mut rows)?;
        rows = rows.union(slots.rows).union(walk.rows);
        let config = match superblock.config {
            Some(place) => {
                let offset = u64::from(place.slot) * CONFIG_SLOT_SIZE;
                let len = (place.len as usize).min(CONFIG_SLOT_SIZE as usize);
                let data = read(disk, "read the machine's definition", FileId::Config, offset, len)?;
                (config_checksum(&data) == place.checksum).then(|| (place.lsn, data.whole()))
            }
            None => None,
        };

        superblock.lineage.truncate(superblock.applied);
        for (batch, _) in &walk.batches {
            superblock.lineage.append(batch.term(), batch.first());
        }
        let log_end = walk.batches.last().map_or(superblock.applied, |(batch, _)| batch.last());
        let claims = walk.batches.iter().map(|(batch, _)| batch.header().stable).max().unwrap_or(Lsn::ZERO);
        let stable = superblock.stable.max(superblock.applied).max(claims).min(log_end);
        if walk.damage.is_none() {
            superblock.durable = log_end;
            superblock.truncate_to = None;
        }
        superblock.stable = stable;
        superblock.damage = walk.damage.clone();
        superblock.clean = false;
        write_superblock(disk, &mut superblock)?;

        let term = superblock.lineage.term_at(log_end).unwrap_or(Term::ZERO);
        let recovered = Recovered {
            group: superblock.group,
            log_end: LogPosition { term, lsn: log_end },
            applied: superblock.applied,
            stable,
            lineage: superblock.lineage.clone(),
            promise: superblock.promise,
            register: superblock.register,
            control: superblock.control.clone(),
            health: health_of(&superblock),
            clean,
            images_changed: superblock
                .disks
                .iter()
                .filter(|row| row.suspect)
                .map(|row| row.entry.index)
                .collect(),
            disks: superblock.disks.iter().map(|row| row.entry.clone()).collect(),
            config: config.clone(),
            rows,
            torn_bytes: if walk.damage.is_none() { (walk.remains.len() * PAGE_SIZE) as u64 } else { 0 },
            rolled_back,
        };
        debug_assert!(recovered.health != Health::Good || superblock.damage.is_none());
        let log = RecoveredLog { layout, batches: walk.batches, log_end, term, stable };
        let store = Store::start(options.limits.clone(), superblock, log, maps, snapshots, config);
        Ok((store, recovered))
    }
}

/// The log as it was found.
pub(crate) struct RecoveredLog {
    pub layout: Layout,
    pub batches: Vec<(Batch, JournalPosition)>,
    pub log_end: Lsn,
    pub term: Term,
    pub stable: Lsn,
}

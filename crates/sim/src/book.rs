//! The one history of the group: every batch that anyone ever wrote into a journal, and how they follow each other.
//!
//! A batch names the one before it by its checksum, so every log is a path through this book, back to the first
//! batch. That path, replayed, is what an image must hold.

use crate::pattern::{self, Tag};
use crate::violation::{Promise, Violation};
use rempart_store::{Batch, ChainValue, RecordKind};
use rempart_types::{DiskIndex, EXTENT_SIZE, ExtentIndex, Lineage, Lsn, SECTOR_SIZE, Term, extents_of};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A page of the book.
#[derive(Debug, Clone)]
struct Entry {
    batch: Batch,
    /// The batch before it; `None` for the first of a log.
    previous: Option<ChainValue>,
}

/// All batches of all logs.
#[derive(Debug, Default)]
pub struct Book {
    entries: HashMap<ChainValue, Entry>,
    by_place: BTreeMap<(Term, Lsn), ChainValue>,
    /// Where a log ends after a batch.
    by_end: BTreeMap<(Term, Lsn), ChainValue>,
    /// Where a guest's write stands: the first record that carries it.
    tags: HashMap<Tag, (Term, Lsn)>,
}

impl Book {
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// `node` writes `batch` into its journal. Any member may be the first to do so: the peers' copies are on
    /// their way before the leader's own is written.
    ///
    /// `lineage` is that of the node: the first batch of a log that a resync or a roll-back started anew has no
    /// batch before it in its journal, but it has a place in the history.
    pub fn wrote(&mut self, node: usize, batch: &Batch, lineage: Option<&Lineage>) -> Result<(), Violation> {
        let header = batch.header();
        let place = (header.term, header.first);
        if let Some(&known) = self.by_place.get(&place) {
            if known == header.chain {
                return Ok(());
            }
            let detail = format!(
                "record {} of term {} was written twice, differently: node {node} has {batch:?}",
                header.first, header.term
            );
            return Err(Violation::new(Promise::OnePrimary, detail));
        }
        let mut previous = self.entries.contains_key(&header.previous).then_some(header.previous);
        if header.previous == ChainValue::default() {
            let before = header.first.previous();
            let term = lineage.and_then(|lineage| lineage.term_at(before));
            previous = term.and_then(|term| self.by_end.get(&(term, before)).copied());
        }
        if previous.is_none() && header.first > Lsn(1) {
            let detail = format!("node {node} writes {batch:?} after a batch that nobody wrote");
            return Err(Violation::new(Promise::PrefixOfHistory, detail));
        }
        if let Some(before) = previous.map(|chain| self.entries[&chain].batch.last())
            && before.next() != header.first
        {
            let detail = format!("node {node} writes {batch:?} after record {before}");
            return Err(Violation::new(Promise::PrefixOfHistory, detail));
        }
        self.by_place.insert(place, header.chain);
        self.by_end.insert((header.term, header.last()), header.chain);
        for record in batch.records().filter(|record| record.kind == RecordKind::Write) {
            let payload = batch.payload(&record);
            let sector = record.offset / SECTOR_SIZE;
            if let Some(tag) = pattern::tag_of(&payload[..SECTOR_SIZE as usize], record.disk, sector) {
                self.tags.entry(tag).or_insert((header.term, record.lsn));
            }
        }
        self.entries.insert(header.chain, Entry { batch: batch.clone(), previous });
        Ok(())
    }

    /// Where a write first entered a log.
    pub fn place_of(&self, tag: Tag) -> Option<(Term, Lsn)> {
        self.tags.get(&tag).copied()
    }

    /// The batches of the log that ends at `end` of `term`, oldest first; `None` if no log ever ended there.
    pub fn log(&self, term: Term, end: Lsn) -> Option<Vec<&Batch>> {
        if end == Lsn::ZERO {
            return Some(Vec::new());
        }
        let mut next = Some(*self.by_end.get(&(term, end))?);
        let mut batches = Vec::new();
        while let Some(chain) = next {
            let entry = &self.entries[&chain];
            batches.push(&entry.batch);
            next = entry.previous;
        }
        batches.reverse();
        Some(batches)
    }

    /// What the disks hold after the records of `log` from `after` (exclusive) to `upto`, put on top of `disks`.
    pub fn replay(log: &[&Batch], after: Lsn, upto: Lsn, disks: &mut [Vec<u8>]) {
        for batch in log.iter().filter(|batch| batch.last() > after && batch.first() <= upto) {
            for record in batch.records().filter(|record| record.lsn > after && record.lsn <= upto) {
                if !record.kind.changes_disk() {
                    continue;
                }
                let range = record.offset as usize..(record.offset + record.len) as usize;
                let bytes = &mut disks[usize::from(record.disk.0)][range];
                if record.kind == RecordKind::Write {
                    bytes.copy_from_slice(&batch.payload(&record));
                } else {
                    bytes.fill(0);
                }
            }
        }
    }

    /// The extents that the records of `log` after `after` change, up to `upto`.
    pub fn changed(log: &[&Batch], after: Lsn, upto: Lsn) -> BTreeSet<(DiskIndex, ExtentIndex)> {
        let records = log.iter().flat_map(|batch| batch.records());
        let late = records.filter(|r| r.lsn > after && r.lsn <= upto && r.kind.changes_disk());
        late.flat_map(|r| extents_of(r.offset, r.len).map(move |extent| (r.disk, extent))).collect()
    }
}

/// The first place at which two contents of a disk differ, in words.
pub fn first_difference(disk: usize, expected: &[u8], found: &[u8]) -> Option<String> {
    if expected == found {
        return None;
    }
    let at = expected.iter().zip(found).position(|(a, b)| a != b)?;
    let sector = at as u64 / SECTOR_SIZE;
    let range = (sector * SECTOR_SIZE) as usize..((sector + 1) * SECTOR_SIZE) as usize;
    let tell = |bytes: &[u8]| match pattern::tag_of(&bytes[range.clone()], DiskIndex(disk as u16), sector) {
        Some(tag) => format!("request {}", tag.0),
        None => "garbage".to_owned(),
    };
    Some(format!(
        "disk {disk} sector {sector} (extent {}): expected {}, found {}",
        at as u64 / EXTENT_SIZE,
        tell(expected),
        tell(found)
    ))
}

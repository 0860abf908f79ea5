//! The latest definition of the machine in this replica's log, whatever becomes of the log's end.

use crate::Bytes;
use rempart_store::{Batch, RecordKind, Slice};
use rempart_types::Lsn;
use std::collections::VecDeque;

#[derive(Debug, Default)]
pub(crate) struct Configs {
    /// Oldest first; the first may be applied already, the others are not.
    found: VecDeque<(Lsn, Bytes)>,
}

impl Configs {
    pub fn new(applied: Option<(Lsn, Slice)>) -> Configs {
        Configs { found: applied.map(|(lsn, content)| (lsn, content.into_bytes())).into_iter().collect() }
    }

    pub fn latest(&self) -> Option<&Bytes> {
        self.found.back().map(|(_, content)| content)
    }

    /// The latest one at or before `lsn`, which is no older than the image.
    pub fn at(&self, lsn: Lsn) -> Option<&Bytes> {
        self.found.iter().rev().find(|(found, _)| *found <= lsn).map(|(_, content)| content)
    }

    /// A batch went into the log, or was found in it.
    pub fn appended(&mut self, batch: &Batch) {
        for record in batch.records().filter(|record| record.kind == RecordKind::Config) {
            if self.found.back().is_none_or(|(lsn, _)| *lsn < record.lsn) {
                self.found.push_back((record.lsn, batch.payload(&record).into_bytes()));
            }
        }
    }

    /// Records to `applied` are in the image: older definitions cannot come back.
    pub fn applied(&mut self, applied: Lsn) {
        while self.found.get(1).is_some_and(|(lsn, _)| *lsn <= applied) {
            self.found.pop_front();
        }
    }

    pub fn truncated(&mut self, end: Lsn) {
        self.found.retain(|(lsn, _)| *lsn <= end);
    }

    /// A resync brought the whole copy; what the store knows is the truth.
    pub fn replaced(&mut self, applied: Option<(Lsn, Slice)>) {
        *self = Configs::new(applied);
    }
}

//! Checks that open a copy of a node's disk as recovery would, beside the node that goes on using it.

use crate::book::{self, Book};
use crate::coverage::Kind;
use crate::pattern::Tag;
use crate::reached::recovery_row;
use crate::violation::{Promise, Violation};
use crate::world::World;
use rempart_store::simulated::SimulatedDisk;
use rempart_store::{FileId, Health, OpenOptions, Recovered, Store, SyncingPhase};
use rempart_types::{DiskIndex, ExtentIndex, Lsn};
use std::collections::BTreeSet;

impl World {
    /// What recovery would find on `node` now, if its power went.
    fn recover_copy(&mut self, node: usize, power_lost: bool) -> Option<(SimulatedDisk, Store, Recovered)> {
        let mut disk = self.nodes[node].drive.disk.clone();
        let rng = &mut self.rng;
        if power_lost {
            disk.lose_power(&mut || rng.u64());
        } else {
            disk.crash_process(&mut || rng.u64());
        }
        let roll_back = self.nodes[node].roll_back;
        let options = OpenOptions { limits: self.setup.limits.clone(), roll_back };
        match Store::open(&mut disk, &options) {
            Ok((store, recovered)) => Some((disk, store, recovered)),
            Err(_) => None,
        }
    }

    /// A daemon is about to recover its store: I3, I4 and the promise are checked on a copy.
    pub(crate) fn audit_recovery(&mut self, node: usize) {
        let Some((disk, store, recovered)) = self.recover_copy(node, false) else { return };
        self.count_recovery(&recovered);
        if !self.rng.chance(300) {
            return;
        }
        let result = self.audit(node, &disk, &store, &recovered);
        self.must(result);
    }

    fn count_recovery(&mut self, recovered: &Recovered) {
        for letter in recovered.rows.iter() {
            self.coverage.count(Kind::Recovery, recovery_row(letter));
        }
        let mut row = |name| self.coverage.count(Kind::Recovery, name);
        match &recovered.health {
            Health::Damaged(_) => row("damaged"),
            Health::Syncing(SyncingPhase::Extents) => row("syncing: extents"),
            Health::Syncing(SyncingPhase::Log { .. }) => row("syncing: log"),
            Health::Good if recovered.clean => row("clean"),
            Health::Good => row("unclean"),
        }
        if recovered.applied < recovered.log_end.lsn {
            row("redo needed");
        }
        if !recovered.images_changed.is_empty() {
            row("images changed");
        }
    }

    fn audit(
        &mut self,
        node: usize,
        disk: &SimulatedDisk,
        store: &Store,
        recovered: &Recovered,
    ) -> Result<(), Violation> {
        let promise = &mut self.checker.promises[node];
        if recovered.promise < *promise {
            let detail = format!("node {node} promised {promise} and now only {}", recovered.promise);
            return Err(Violation::new(Promise::OnePrimary, detail));
        }
        *promise = recovered.promise;
        self.coverage.count(Kind::Checked, "promise kept");
        let unknown = !recovered.images_changed.is_empty() || self.nodes[node].rotten;
        if recovered.health != Health::Good || unknown {
            return Ok(());
        }
        let end = recovered.log_end;
        let Some(log) = self.book.log(end.term, end.lsn) else {
            let detail = format!("node {node} recovers a log that ends at {end:?}, where no log ever ended");
            return Err(Violation::new(Promise::PrefixOfHistory, detail));
        };
        let mut expected: Vec<Vec<u8>> =
            self.setup.disks.iter().map(|&size| vec![0; size as usize]).collect();
        Book::replay(&log, Lsn::ZERO, end.lsn, &mut expected);
        let mut found: Vec<Vec<u8>> =
            (0..expected.len()).map(|index| content(disk, index, &expected)).collect();
        Book::replay(&log, recovered.applied, end.lsn, &mut found);
        for (index, (expected, found)) in expected.iter().zip(&found).enumerate() {
            if let Some(difference) = book::first_difference(index, expected, found) {
                let detail = format!(
                    "node {node}: image + redo ({} applied, log ends at {}): {difference}",
                    recovered.applied, end.lsn
                );
                return Err(Violation::new(Promise::PrefixOfHistory, detail));
            }
        }
        self.coverage.count(Kind::Checked, "image + redo is a prefix");
        // I4, from a position of chance.
        let since = Lsn(self.rng.below(recovered.applied.0 + 1));
        let changed = Book::changed(&log, since, recovered.applied);
        let mut reported = BTreeSet::new();
        for index in 0..expected.len() {
            let disk = DiskIndex(index as u16);
            let mut from = Some(ExtentIndex(0));
            while let Some(start) = from {
                let (extents, next) = store.changed_since(disk, since, start, 3);
                reported.extend(extents.into_iter().map(|(extent, _)| (disk, extent)));
                from = next;
            }
        }
        if let Some((disk, extent)) = changed.difference(&reported).next() {
            let detail = format!(
                "node {node}: disk {disk} extent {} changed after {since}, and is not reported",
                extent.0
            );
            return Err(Violation::new(Promise::ChangesReported, detail));
        }
        self.coverage.count(Kind::Checked, "changed extents are reported");
        Ok(())
    }

    /// I1: a flush was acknowledged that covers `tags`. Every in-sync member that lost power now must still have
    /// them.
    pub(crate) fn audit_flush(&mut self, tags: &[Tag]) {
        let mask = self.in_sync_mask();
        for node in (0..self.nodes.len()).filter(|node| mask >> node & 1 == 1) {
            if self.nodes[node].rotten {
                continue;
            }
            let Some((_, _, recovered)) = self.recover_copy(node, true) else { continue };
            for &tag in tags {
                let Some((term, lsn)) = self.book.place_of(tag) else { continue };
                let lsn_held = recovered.log_end.lsn >= lsn || recovered.applied >= lsn;
                if !lsn_held || recovered.lineage.term_at(lsn).is_some_and(|found| found < term) {
                    let detail = format!(
                        "request {} (record {lsn} of term {term}) is covered by an acknowledged flush, but node \
                         {node} would recover only to {:?}",
                        tag.0, recovered.log_end
                    );
                    return self.broken(Violation::new(Promise::FlushedIsKept, detail));
                }
            }
            self.coverage.count(Kind::Checked, "flushed data on every member");
        }
    }
}

/// What the image of a disk holds, as long as the disk is.
pub(crate) fn content(disk: &SimulatedDisk, index: usize, like: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = disk.content(FileId::Image(DiskIndex(index as u16))).unwrap_or_default();
    bytes.resize(like[index].len(), 0);
    bytes
}

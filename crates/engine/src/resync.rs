//! Resync's work at the store: the source reads regions, the target writes extents and starts a new log.

use crate::control::ResyncBase;
use crate::route::ENGINE_RECEIPT;
use crate::scan::{Found, HOLE, Scan, ScanFor, Scans};
use crate::work::{Beside, Work};
use crate::{Bytes, Engine};
use rempart_replication::{
    Action as ReplicationAction, Digest, Event as ReplicationEvent, ExtentPiece, Region, RegionBits,
    ResyncMode,
};
use rempart_store::{ChainValue, Health, Slice, SnapshotId, StoreEvent, Token};
use rempart_types::{EXTENT_SIZE, ExtentIndex, Lsn};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The state a resync's target had before.
const UNDO: SnapshotId = SnapshotId(1);

#[derive(Debug, Default)]
pub(crate) struct ResyncJobs {
    pub scans: Scans,
    /// Source: what the scans under way read for, by round.
    reading: BTreeMap<u64, Reading>,
    /// Target: the round that sets the copy aside.
    setting_aside: Option<u64>,
    /// Target: messages whose extents are being written, in order.
    writing: VecDeque<Writing>,
    /// Target: the log runs behind the extents and must reach what they need.
    ending: bool,
}

#[derive(Debug)]
struct Reading {
    region: Region,
    /// Compare mode: extents that changed after this are sent whatever their digest.
    at: Lsn,
    compare: bool,
    next: Option<u64>,
}

#[derive(Debug)]
struct Writing {
    round: u64,
    sequence: u64,
    tokens: BTreeSet<Token>,
}

impl Engine {
    pub(crate) fn perform_resync(&mut self, action: ReplicationAction, beside: &Beside) {
        match action {
            ReplicationAction::ReadRegion { round, region, from, since, also, digests, at, bytes } => {
                let most = usize::try_from(bytes / EXTENT_SIZE).unwrap_or(usize::MAX).max(1);
                let reading = Reading { region, at, compare: digests.is_some(), next: None };
                self.read_region(round, reading, from, (since, &also), digests, most);
            }
            ReplicationAction::KnowRegion { round, region, since, mode: ResyncMode::Changed, .. } => {
                let mut changed = RegionBits::default();
                for place in self.changed_places(region, since) {
                    changed.insert(place);
                }
                self.replication(ReplicationEvent::RegionKnown { round, region, changed, digests: None });
            }
            ReplicationAction::KnowRegion { round, region, at, mode: ResyncMode::Compare, .. } => {
                // Where both sides turn out to be alike nothing is sent, and the map may know nothing of it: the
                // records that made it so can have been lost.
                let first = region.first_extent();
                self.store.mark_changed(region.disk, first, self.region_len(region), at);
                self.scan_digests(ScanFor::Target { round }, region, None);
            }
            ReplicationAction::ResyncSetAside { round, syncing } => {
                self.control.resync = Some(ResyncBase { base: syncing.base, whole: syncing.whole });
                self.persist_control(ENGINE_RECEIPT);
                self.resync.setting_aside = Some(round);
                // A resync that was about to end does not: its records are not waited for any more.
                self.resync.ending = false;
                self.resync.scans.cancel(|scan| matches!(scan.purpose, ScanFor::Target { .. }));
                self.usable_is(false);
                let end = self.log_end();
                let begun = self.with_store(|store, io| {
                    store.stable_is(end, io);
                    store.begin_resync(UNDO, io)
                });
                if begun.is_err() {
                    self.resync.setting_aside = None;
                    self.control.resync = None;
                    self.persist_control(ENGINE_RECEIPT);
                    self.store_refused();
                    self.resume_resync_end();
                    self.weigh_copy();
                }
            }
            ReplicationAction::WriteExtents { round, sequence, pieces } => {
                self.write_extents(round, sequence, &pieces, beside);
            }
            ReplicationAction::StartResyncLog { from, chain, lineage } => {
                let chain = chain.map(ChainValue);
                if self.with_store(|store, io| store.start_resync_log(from, chain, &lineage, io)).is_err() {
                    self.store_refused();
                }
            }
            action => unreachable!("{action:?} is performed elsewhere"),
        }
    }

    pub(crate) fn resync_store_event(&mut self, event: StoreEvent) {
        match event {
            StoreEvent::ExtentRead { token, result } => self.scan_read(token, result.ok()),
            StoreEvent::SnapshotRead { token, result } => {
                if !self.view_read(token, &result) {
                    self.scan_read(token, result.ok());
                }
            }
            StoreEvent::ExtentWritten(token) => self.extent_written(token),
            StoreEvent::ResyncBegun { .. } => {
                let round = self.resync.setting_aside.take().expect("the copy is set aside for a round");
                self.replication(ReplicationEvent::ResyncSetAside { round });
            }
            StoreEvent::ResyncLogStarted { from } => {
                self.images_changed = false;
                self.images_changed_at = None;
                let config = self.store.config();
                self.configs.replaced(config);
                self.control.resync = None;
                self.control.may_overwrite = false;
                self.persist_control(ENGINE_RECEIPT);
                self.resync.ending = true;
                self.replication(ReplicationEvent::ResyncLogStarted { from: from.lsn });
                self.resync_log_durable(self.store.durable());
            }
            // The next resync may have been ordered meanwhile: what it sets aside is no copy to lead with.
            StoreEvent::ResyncEnded if self.resync.setting_aside.is_some() => {}
            StoreEvent::ResyncEnded => {
                self.replication(ReplicationEvent::Whole);
                self.weigh_copy();
            }
            StoreEvent::SnapshotOpened { snapshot, at } => self.snapshot_opened(snapshot, at),
            StoreEvent::SnapshotClosed(_) => {}
            StoreEvent::SnapshotLost { snapshot, why } => self.snapshot_lost(snapshot, why),
            event => unreachable!("{event:?} is handled elsewhere"),
        }
    }

    // --- source ---

    /// Places of `region` that changed after `since`.
    fn changed_places(&self, region: Region, since: Lsn) -> Vec<u64> {
        let first = region.first_extent();
        let len = self.region_len(region);
        let limit = usize::try_from(len).expect("a region is small");
        if limit == 0 {
            return Vec::new();
        }
        let (changed, _) = self.store.changed_since(region.disk, since, first, limit);
        let places = changed.into_iter().map(|(extent, _)| extent.0 - first.0);
        places.take_while(|place| *place < len).collect()
    }

    fn read_region(
        &mut self,
        round: u64,
        mut reading: Reading,
        from: u64,
        (since, also): (Lsn, &RegionBits),
        digests: Option<Vec<Digest>>,
        most: usize,
    ) {
        let region = reading.region;
        let places: Vec<u64> = match &digests {
            None => {
                let mut places: BTreeSet<u64> = self.changed_places(region, since).into_iter().collect();
                places.extend((0..self.region_len(region)).filter(|&place| also.contains(place)));
                places.into_iter().filter(|place| *place >= from).collect()
            }
            Some(digests) => {
                let is_hole = |place: u64| digests.get(place as usize).is_none_or(|digest| *digest == HOLE);
                (from..self.region_len(region))
                    .filter(|&place| !(is_hole(place) && self.is_untouched(region, place)))
                    .collect()
            }
        };
        reading.next = places.get(most).copied();
        self.resync.scans.cancel(|scan| scan.purpose == ScanFor::Source { round });
        self.resync.reading.insert(round, reading);
        let places = places.into_iter().take(most).collect();
        self.scan_extents(round, region, places, digests.unwrap_or_default());
    }

    pub(crate) fn scan_done(&mut self, scan: Scan) {
        match scan.purpose {
            ScanFor::Source { round } => self.source_read(round, scan),
            ScanFor::Target { round } => {
                let digests = Some(scan.digests());
                let (region, changed) = (scan.region, RegionBits::default());
                self.replication(ReplicationEvent::RegionKnown { round, region, changed, digests });
            }
            ScanFor::Compare => self.compare_scanned(&scan),
        }
    }

    pub(crate) fn scan_failed(&mut self, purpose: ScanFor) {
        match purpose {
            ScanFor::Source { round } | ScanFor::Target { round } => {
                self.replication(ReplicationEvent::ResyncBroken { round });
            }
            ScanFor::Compare => self.compare_scan_failed(),
        }
    }

    fn source_read(&mut self, round: u64, scan: Scan) {
        let Some(reading) = self.resync.reading.remove(&round) else { return };
        let Region { disk, .. } = scan.region;
        let first = scan.region.first_extent().0;
        let (mut pieces, mut extents) = (Vec::new(), Vec::new());
        let expected = |place: u64| scan.expected.get(place as usize).copied().unwrap_or(HOLE);
        for Found { place, lsn, data, digest } in scan.found {
            let same = reading.compare && digest == Some(expected(place)) && lsn <= reading.at;
            // Zeroes on both sides are the same however young.
            let both_zero = reading.compare && data.is_none() && expected(place) == HOLE;
            if same || both_zero {
                continue;
            }
            let length =
                data.as_ref().map_or(0, |data| u32::try_from(data.len()).expect("an extent is small"));
            pieces.push(ExtentPiece { disk, extent: ExtentIndex(first + place), lsn, length });
            extents.extend(data);
        }
        let bytes = extents.iter().map(|extent: &Bytes| extent.len() as u64).sum();
        let event =
            ReplicationEvent::RegionRead { round, region: scan.region, pieces, bytes, next: reading.next };
        self.queue.push_back(Work::Replication(event, Beside::Extents(extents)));
    }

    // --- target ---

    fn write_extents(&mut self, round: u64, sequence: u64, pieces: &[ExtentPiece], beside: &Beside) {
        let Beside::Payload(payload) = beside else { panic!("extents come with their bytes") };
        let mut tokens = BTreeSet::new();
        let mut at = 0;
        for piece in pieces {
            let end = at + piece.length as usize;
            let data = (piece.length > 0).then(|| Slice::copy_of(&payload[at..end]));
            at = end;
            let token = Token(self.token());
            let written = self.with_store(|store, io| {
                store.write_extent(token, piece.disk, piece.extent, piece.lsn, data, io)
            });
            match written {
                Ok(()) => {
                    tokens.insert(token);
                }
                Err(_) => return self.replication(ReplicationEvent::ResyncBroken { round }),
            }
        }
        self.resync.writing.push_back(Writing { round, sequence, tokens });
        self.extents_settled();
    }

    fn extent_written(&mut self, token: Token) {
        for writing in &mut self.resync.writing {
            if writing.tokens.remove(&token) {
                break;
            }
        }
        self.extents_settled();
    }

    fn extents_settled(&mut self) {
        while self.resync.writing.front().is_some_and(|writing| writing.tokens.is_empty()) {
            let Writing { round, sequence, .. } = self.resync.writing.pop_front().expect("just seen");
            self.replication(ReplicationEvent::ExtentsWritten { round, sequence });
        }
    }

    /// The process was restarted after the extents came, while the log behind them runs.
    pub(crate) fn resume_resync_end(&mut self) {
        self.resync.ending =
            matches!(self.store.health(), Health::Syncing(rempart_store::SyncingPhase::Log { .. }));
        self.resync_log_durable(self.store.durable());
    }

    /// Ends the resync once the log durably reached what the extents need. A copy that is being closed leaves that to its next start.
    pub(crate) fn resync_log_durable(&mut self, durable: Lsn) {
        let closing = self.is_stopping();
        if self.resync.ending && !closing && self.store.resync_until().is_some_and(|until| durable >= until) {
            self.resync.ending = false;
            let ended = self.with_store(|store, io| store.end_resync(io));
            assert!(ended.is_ok() || self.store.failure().is_some(), "the log reached its mark: {ended:?}");
        }
    }
}

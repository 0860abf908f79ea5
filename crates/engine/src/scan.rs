//! Reading a region's extents, and their digests, a step at a time.

use crate::{Action, Bytes, DigestJob, Engine};
use rempart_replication::{Digest, REGION_EXTENTS, Region};
use rempart_store::{Extent, Slice, SnapshotId, Token};
use rempart_types::{ExtentIndex, Lsn};
use std::collections::{BTreeMap, VecDeque};

/// The digest of an extent that is all zeroes: nothing is hashed for it.
pub(crate) const HOLE: Digest = Digest([0; 32]);

/// Extents read at once by one scan.
const STEP: usize = 32;

/// An extent that was read. `data` is absent for zeroes.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub place: u64,
    pub lsn: Lsn,
    pub data: Option<Bytes>,
    pub digest: Option<Digest>,
}

/// Who wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScanFor {
    /// The source of a resync: extents with their bytes.
    Source { round: u64 },
    /// The target of a resync: digests.
    Target { round: u64 },
    /// A comparison ordered by an operator: digests.
    Compare,
}

#[derive(Debug)]
pub(crate) struct Scan {
    pub purpose: ScanFor,
    pub region: Region,
    snapshot: Option<SnapshotId>,
    /// Places still to be read.
    places: VecDeque<u64>,
    /// Digests are wanted of these; of the others only zero or not.
    hashed: fn(&Scan, u64) -> bool,
    pub expected: Vec<Digest>,
    keep_data: bool,
    reading: Vec<(u64, Option<Extent>)>,
    missing: usize,
    pub found: Vec<Found>,
}

/// Scans under way, by name.
#[derive(Debug, Default)]
pub(crate) struct Scans {
    running: BTreeMap<u64, Scan>,
    /// Those that wait for digests, and of which places.
    hashing: BTreeMap<u64, Vec<usize>>,
}

impl Scans {
    pub fn cancel(&mut self, doomed: impl Fn(&Scan) -> bool) {
        self.running.retain(|_, scan| !doomed(scan));
        self.hashing.retain(|job, _| self.running.contains_key(job));
    }
}

impl Engine {
    /// Extents that `region` has on its disk.
    pub(crate) fn region_len(&self, region: Region) -> u64 {
        let size = self.disk_sizes.get(usize::from(region.disk.0)).copied().unwrap_or(0);
        let extents = size.div_ceil(rempart_types::EXTENT_SIZE);
        extents.saturating_sub(region.first_extent().0).min(REGION_EXTENTS)
    }

    pub(crate) fn is_untouched(&self, region: Region, place: u64) -> bool {
        self.store.is_untouched(region.disk, ExtentIndex(region.first_extent().0 + place))
    }

    /// Reads these places with their bytes; digests only where `expected` has one that is no hole.
    pub(crate) fn scan_extents(
        &mut self,
        round: u64,
        region: Region,
        places: Vec<u64>,
        expected: Vec<Digest>,
    ) {
        let hashed = |scan: &Scan, place: u64| {
            usize::try_from(place).ok().and_then(|place| scan.expected.get(place)).is_some_and(|d| *d != HOLE)
        };
        self.start_scan(Scan {
            purpose: ScanFor::Source { round },
            region,
            snapshot: None,
            places: places.into(),
            hashed,
            expected,
            keep_data: true,
            reading: Vec::new(),
            missing: 0,
            found: Vec::new(),
        });
    }

    /// Digests of a whole region, of the image or of a snapshot.
    pub(crate) fn scan_digests(&mut self, purpose: ScanFor, region: Region, snapshot: Option<SnapshotId>) {
        // Of a copy that is brought up by comparison nothing is known: damage may have taken the records that
        // touched an extent, and with them what the map would say of it.
        let unknown = matches!(purpose, ScanFor::Target { .. });
        let looked_at = |place: &u64| unknown || !self.is_untouched(region, *place);
        let places = (0..self.region_len(region)).filter(looked_at).collect();
        self.start_scan(Scan {
            purpose,
            region,
            snapshot,
            places,
            hashed: |_, _| true,
            expected: Vec::new(),
            keep_data: false,
            reading: Vec::new(),
            missing: 0,
            found: Vec::new(),
        });
    }

    fn start_scan(&mut self, scan: Scan) {
        let job = self.token();
        self.resync.scans.running.insert(job, scan);
        self.scan_step(job);
    }

    /// Reads the next places, or finishes.
    fn scan_step(&mut self, job: u64) {
        let scan = self.resync.scans.running.get_mut(&job).expect("a running scan");
        let step = scan.places.len().min(STEP);
        if step == 0 {
            let scan = self.resync.scans.running.remove(&job).expect("just seen");
            return self.scan_done(scan);
        }
        let (region, snapshot) = (scan.region, scan.snapshot);
        scan.reading = scan.places.drain(..step).map(|place| (place, None)).collect();
        scan.missing = step;
        let places: Vec<u64> = scan.reading.iter().map(|(place, _)| *place).collect();
        for (index, place) in places.into_iter().enumerate() {
            let token = Token(job * STEP as u64 + index as u64);
            let extent = ExtentIndex(region.first_extent().0 + place);
            let started = self.with_store(|store, io| match snapshot {
                Some(snapshot) => {
                    store.read_snapshot(token, snapshot, region.disk, extent, io);
                    Ok(())
                }
                None => store.read_extent(token, region.disk, extent, io),
            });
            if started.is_err() {
                return self.scan_broken(job);
            }
        }
    }

    fn scan_broken(&mut self, job: u64) {
        if let Some(scan) = self.resync.scans.running.remove(&job) {
            self.scan_failed(scan.purpose);
        }
    }

    /// An extent was read, or could not be.
    pub(crate) fn scan_read(&mut self, token: Token, extent: Option<Extent>) {
        let (job, index) = (token.0 / STEP as u64, (token.0 % STEP as u64) as usize);
        let Some(scan) = self.resync.scans.running.get_mut(&job) else { return };
        let Some(extent) = extent else { return self.scan_broken(job) };
        scan.reading[index].1 = Some(extent);
        scan.missing -= 1;
        if scan.missing > 0 {
            return;
        }
        let mut to_hash = Vec::new();
        for (place, extent) in std::mem::take(&mut scan.reading) {
            let Extent { lsn, data, .. } = extent.expect("none is missing");
            let data = data.filter(|data| !rempart_store::is_zero(data)).map(Slice::into_bytes);
            let digest = if data.is_none() { Some(HOLE) } else { None };
            if data.is_some() && (scan.hashed)(scan, place) {
                to_hash.push(scan.found.len());
            }
            scan.found.push(Found { place, lsn, data, digest });
        }
        if to_hash.is_empty() {
            return self.scan_step(job);
        }
        let bytes = |&index: &usize| vec![scan.found[index].data.clone().expect("only data is hashed")];
        let parts = to_hash.iter().map(bytes).collect();
        self.resync.scans.hashing.insert(job, to_hash);
        self.out.push(Action::Digest { job: DigestJob(job), parts });
    }

    pub(crate) fn digested(&mut self, job: DigestJob, digests: Vec<Digest>) {
        let Some(hashed) = self.resync.scans.hashing.remove(&job.0) else { return };
        let Some(scan) = self.resync.scans.running.get_mut(&job.0) else { return };
        assert_eq!(hashed.len(), digests.len(), "one digest for each part");
        for (index, digest) in hashed.into_iter().zip(digests) {
            let found = &mut scan.found[index];
            found.digest = Some(digest);
            if !scan.keep_data {
                found.data = None;
            }
        }
        self.scan_step(job.0);
    }
}

impl Scan {
    /// The digests of the region in order; holes at the end are left out.
    pub fn digests(&self) -> Vec<Digest> {
        let mut digests = Vec::new();
        for found in &self.found {
            let digest = found.digest.expect("every extent of this scan was hashed");
            if digest != HOLE {
                let place = usize::try_from(found.place).expect("a place in a region is small");
                digests.resize(place, HOLE);
                digests.push(digest);
            }
        }
        digests
    }
}

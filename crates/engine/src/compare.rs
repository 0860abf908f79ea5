//! Checking two copies against each other, byte for byte, at one point of the log, while the machine runs.
//!
//! Both sides open a snapshot at the same record; digests of one region after the other are exchanged.

use crate::message::Body;
use crate::requests::FlushFor;
use crate::scan::{HOLE, Scan, ScanFor};
use crate::{Action, CommandError, CommandId, CommandOutput, Engine};
use rempart_replication::{Digest, PeerProgress, Region};
use rempart_store::{SnapshotId, SnapshotLoss};
use rempart_types::{DiskIndex, ExtentIndex, Lsn, NodeId, SessionId};
use serde::{Deserialize, Serialize};

/// Differing extents that are named; beyond, the copies differ anyway.
const MOST_NAMED: usize = 10_000;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum CompareMessage {
    /// Open a snapshot at exactly this record.
    Open {
        at: Lsn,
    },
    Opened {
        opened: bool,
    },
    /// Digests of this region, please.
    Region {
        region: Region,
    },
    /// Missing digests at the end are of holes. `None`: it cannot be read.
    Digests {
        region: Region,
        digests: Option<Vec<Digest>>,
    },
    Close,
}

#[derive(Debug, Default)]
pub(crate) struct Compares {
    /// Ordered here.
    ordered: Option<Ordered>,
    /// Ordered by a leader.
    serving: Option<Serving>,
}

#[derive(Debug)]
struct Ordered {
    command: CommandId,
    peer: NodeId,
    session: SessionId,
    at: Lsn,
    snapshot: SnapshotId,
    opened_here: bool,
    opened_there: bool,
    region: Region,
    own: Option<Vec<Digest>>,
    theirs: Option<Vec<Digest>>,
    extents: u64,
    differing: Vec<(DiskIndex, ExtentIndex)>,
}

#[derive(Debug)]
struct Serving {
    peer: NodeId,
    session: SessionId,
    snapshot: SnapshotId,
    opened: bool,
    asked: Option<Region>,
}

impl Engine {
    pub(crate) fn compare(&mut self, command: CommandId, peer: NodeId) {
        if self.compares.ordered.is_some() {
            return self.command_failed(command, CommandError::Busy);
        }
        let status = self.replication.status(self.now);
        let streaming = status.peers.iter().any(|p| p.peer == peer && p.progress == PeerProgress::Streaming);
        let Some(session) = self.replication.session(peer).filter(|_| streaming && self.serving) else {
            return self.command_failed(command, CommandError::PeerNotReady);
        };
        self.seal();
        let at = self.replication.end();
        let snapshot = self.new_snapshot();
        if self.with_store(|store, io| store.open_snapshot(snapshot, Some(at), io)).is_err() {
            return self.command_failed(command, CommandError::Refused("no snapshot can be opened now"));
        }
        self.compares.ordered = Some(Ordered {
            command,
            peer,
            session,
            at,
            snapshot,
            opened_here: false,
            opened_there: false,
            region: Region::default(),
            own: None,
            theirs: None,
            extents: 0,
            differing: Vec::new(),
        });
        self.send(peer, session, Body::Compare(CompareMessage::Open { at }), Vec::new());
        // The snapshots open when everything to `at` is stable.
        self.start_flush(FlushFor::Nobody, true);
    }

    pub(crate) fn compare_message(&mut self, peer: NodeId, session: SessionId, message: CompareMessage) {
        if self.replication.session(peer) != Some(session) {
            return;
        }
        match message {
            CompareMessage::Open { at } => self.compare_open(peer, session, at),
            CompareMessage::Region { region } => self.compare_asked(peer, session, region),
            CompareMessage::Close => self.stop_serving(),
            CompareMessage::Opened { opened } => {
                let Some(ordered) = self.compares.ordered.as_mut().filter(|o| o.session == session) else {
                    return;
                };
                if !opened {
                    return self.compare_aborted("the peer cannot open a snapshot there");
                }
                ordered.opened_there = true;
                self.compare_begins();
            }
            CompareMessage::Digests { region, digests } => {
                let Some(ordered) = self.compares.ordered.as_mut().filter(|o| o.session == session) else {
                    return;
                };
                let Some(digests) = digests else {
                    return self.compare_aborted("the peer cannot read its copy");
                };
                if ordered.region == region {
                    ordered.theirs = Some(digests);
                    self.compare_region();
                }
            }
        }
    }

    fn compare_open(&mut self, peer: NodeId, session: SessionId, at: Lsn) {
        self.stop_serving();
        let snapshot = self.new_snapshot();
        let opened = self.with_store(|store, io| store.open_snapshot(snapshot, Some(at), io)).is_ok();
        if opened {
            self.compares.serving = Some(Serving { peer, session, snapshot, opened: false, asked: None });
        } else {
            self.send(peer, session, Body::Compare(CompareMessage::Opened { opened: false }), Vec::new());
        }
    }

    /// False if it is no comparison's.
    pub(crate) fn compare_opened(&mut self, snapshot: SnapshotId) -> bool {
        if let Some(ordered) = self.compares.ordered.as_mut().filter(|ordered| ordered.snapshot == snapshot) {
            ordered.opened_here = true;
            self.compare_begins();
            return true;
        }
        if let Some(serving) = self.compares.serving.as_mut().filter(|serving| serving.snapshot == snapshot) {
            serving.opened = true;
            let (peer, session) = (serving.peer, serving.session);
            self.send(peer, session, Body::Compare(CompareMessage::Opened { opened: true }), Vec::new());
            return true;
        }
        false
    }

    fn compare_begins(&mut self) {
        let ordered = self.compares.ordered.as_ref().expect("a comparison is under way");
        if ordered.opened_here && ordered.opened_there && ordered.own.is_none() && ordered.theirs.is_none() {
            self.compare_next(Region::default());
        }
    }

    /// Goes on with the first region at or after `region`, or finishes.
    fn compare_next(&mut self, mut region: Region) {
        while self.region_len(region) == 0 {
            if usize::from(region.disk.0) + 1 >= self.disk_sizes.len() {
                return self.compare_done();
            }
            region = Region { disk: DiskIndex(region.disk.0 + 1), index: 0 };
        }
        let ordered = self.compares.ordered.as_mut().expect("a comparison is under way");
        (ordered.region, ordered.own, ordered.theirs) = (region, None, None);
        let (peer, session, snapshot) = (ordered.peer, ordered.session, ordered.snapshot);
        self.send(peer, session, Body::Compare(CompareMessage::Region { region }), Vec::new());
        self.scan_digests(ScanFor::Compare, region, Some(snapshot));
    }

    /// Both sides' digests of a region may be here.
    fn compare_region(&mut self) {
        let Some(ordered) = &self.compares.ordered else { return };
        let len = self.region_len(ordered.region);
        let ordered = self.compares.ordered.as_mut().expect("just seen");
        let (Some(own), Some(theirs)) = (&ordered.own, &ordered.theirs) else { return };
        let at = |digests: &[Digest], place: u64| digests.get(place as usize).copied().unwrap_or(HOLE);
        let first = ordered.region.first_extent().0;
        for place in (0..len).filter(|&place| at(own, place) != at(theirs, place)) {
            if ordered.differing.len() < MOST_NAMED {
                ordered.differing.push((ordered.region.disk, ExtentIndex(first + place)));
            }
        }
        ordered.extents += len;
        let next = Region { index: ordered.region.index + 1, ..ordered.region };
        self.compare_next(next);
    }

    fn compare_done(&mut self) {
        let ordered = self.compares.ordered.take().expect("a comparison is under way");
        self.close_compare(&ordered);
        let Ordered { command, at, extents, differing, .. } = ordered;
        let result = Ok(CommandOutput::Compared { at, extents, differing });
        self.out.push(Action::CommandDone { id: command, result });
    }

    fn close_compare(&mut self, ordered: &Ordered) {
        self.send(ordered.peer, ordered.session, Body::Compare(CompareMessage::Close), Vec::new());
        self.resync.scans.cancel(|scan| scan.purpose == ScanFor::Compare);
        self.let_go_of(ordered.snapshot);
    }

    pub(crate) fn compare_aborted(&mut self, why: &'static str) {
        if let Some(ordered) = self.compares.ordered.take() {
            self.close_compare(&ordered);
            self.command_failed(ordered.command, CommandError::Aborted(why));
        }
    }

    /// It could not be kept. Where it serves a peer's comparison, the peer is told when it asks for more.
    pub(crate) fn compare_lost(&mut self, snapshot: SnapshotId, why: SnapshotLoss) {
        if self.compares.ordered.as_ref().is_some_and(|ordered| ordered.snapshot == snapshot) {
            self.compare_aborted(match why {
                SnapshotLoss::DiskFull => "the disk is full: what a comparison keeps aside does not fit",
                SnapshotLoss::OverLimit => "more was overwritten meanwhile than may be kept aside",
            });
        }
    }

    pub(crate) fn compares_disconnected(&mut self, peer: NodeId) {
        if self.compares.ordered.as_ref().is_some_and(|ordered| ordered.peer == peer) {
            self.compare_aborted("the session with the peer ended");
        }
        if self.compares.serving.as_ref().is_some_and(|serving| serving.peer == peer) {
            self.stop_serving();
        }
    }

    // --- the peer's side ---

    fn compare_asked(&mut self, peer: NodeId, session: SessionId, region: Region) {
        let Some(serving) = self.compares.serving.as_mut() else { return };
        if serving.peer != peer || serving.session != session || !serving.opened || serving.asked.is_some() {
            return;
        }
        serving.asked = Some(region);
        let snapshot = serving.snapshot;
        self.scan_digests(ScanFor::Compare, region, Some(snapshot));
    }

    fn stop_serving(&mut self) {
        if let Some(serving) = self.compares.serving.take() {
            self.resync.scans.cancel(|scan| scan.purpose == ScanFor::Compare);
            self.let_go_of(serving.snapshot);
        }
    }

    pub(crate) fn compare_scanned(&mut self, scan: &Scan) {
        if let Some(ordered) = &mut self.compares.ordered {
            if ordered.region == scan.region {
                ordered.own = Some(scan.digests());
                self.compare_region();
            }
        } else {
            self.compare_answer(Some(scan.digests()));
        }
    }

    pub(crate) fn compare_scan_failed(&mut self) {
        if self.compares.ordered.is_some() {
            self.compare_aborted("this copy cannot be read");
        } else {
            self.compare_answer(None);
        }
    }

    fn compare_answer(&mut self, digests: Option<Vec<Digest>>) {
        let Some(serving) = self.compares.serving.as_mut() else { return };
        let Some(region) = serving.asked.take() else { return };
        let (peer, session) = (serving.peer, serving.session);
        self.send(peer, session, Body::Compare(CompareMessage::Digests { region, digests }), Vec::new());
    }
}

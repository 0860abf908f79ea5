//! The leader's side of a resync: answers the target's requests for regions, within window and bandwidth.

use crate::link::Link;
use crate::link::Progress;
use crate::local::Local;
use crate::{Action, Digest, ExtentPiece, Message, Region, RegionBits};
use rempart_types::{EXTENT_SIZE, LogPosition, Lsn, MonotonicTime, Term};
use std::collections::VecDeque;

/// Regions a target may ask for at once. More is a broken peer.
const MAX_REQUESTS: usize = 64;

#[derive(Debug)]
pub(crate) struct Source {
    pub round: u64,
    /// Extents are as of this or later; the journal after it is kept. `None` while the target sets its copy aside.
    pub at: Option<LogPosition>,
    requests: VecDeque<Request>,
    reading: bool,
    sequence: u64,
    in_flight: VecDeque<(u64, u64)>,
    in_flight_bytes: u64,
    pub bytes_sent: u64,
    /// Of the extents sent, holes counted in full.
    pub bytes_changed: u64,
    pub regions_done: u64,
    /// Where the target is.
    pub region: Region,
}

#[derive(Debug)]
struct Request {
    region: Region,
    /// Where to go on in the region.
    from: u64,
    since: Lsn,
    also: RegionBits,
    digests: Option<Vec<Digest>>,
}

impl Source {
    pub fn new(round: u64) -> Source {
        Source {
            round,
            at: None,
            requests: VecDeque::new(),
            reading: false,
            sequence: 0,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            bytes_sent: 0,
            bytes_changed: 0,
            regions_done: 0,
            region: Region::default(),
        }
    }

    fn pump(&mut self, local: &Local, now: MonotonicTime, out: &mut Vec<Action>) {
        let Some(at) = self.at else { return };
        let free = self.in_flight_bytes < local.config.resync_window_bytes;
        if self.reading || !free || local.bucket.wait_until(now).is_some() {
            return;
        }
        if let Some(request) = self.requests.front() {
            self.reading = true;
            out.push(Action::ReadRegion {
                round: self.round,
                region: request.region,
                from: request.from,
                since: request.since,
                also: request.also.clone(),
                digests: request.digests.clone(),
                at: at.lsn,
                bytes: local.config.extent_read_bytes,
            });
        }
    }

    /// When it goes on although nothing happens.
    pub fn next_wake(&self, local: &Local, now: MonotonicTime) -> Option<MonotonicTime> {
        let waits = !self.reading && !self.requests.is_empty();
        if waits { local.bucket.wait_until(now) } else { None }
    }
}

impl Link {
    fn source(&mut self, round: u64) -> Option<&mut Source> {
        match &mut self.progress {
            Progress::Resyncing(source) if source.round == round => Some(source),
            _ => None,
        }
    }

    /// The target's copy is set aside: extents are sent as of now.
    pub fn resync_ready(&mut self, round: u64, term: Term, local: &Local, out: &mut Vec<Action>) {
        let Some(source) = self.source(round) else { return };
        if source.at.is_some() {
            return self.close("the target is ready twice", out);
        }
        let Some(at) = local.lineage.position(local.applied) else {
            return self.close("the log's table does not reach back to the image", out);
        };
        source.at = Some(at);
        let mut lineage = local.lineage.clone();
        lineage.truncate(at.lsn);
        self.send(Message::ResyncFrom { term, round, at, chain: local.applied_chain, lineage }, None, out);
    }

    pub fn region_wanted(
        &mut self,
        message: Message,
        local: &Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let Message::ResyncRegion { round, region, since, changed, digests, .. } = message else { return };
        let Some(source) = self.source(round) else { return };
        if source.at.is_none() || source.requests.len() >= MAX_REQUESTS {
            return self.close("the target asks for too much", out);
        }
        source.requests.push_back(Request { region, from: 0, since, also: changed, digests });
        source.pump(local, now, out);
    }

    /// Extents were read; their bytes came beside the event.
    #[expect(clippy::too_many_arguments)]
    pub fn region_read(
        &mut self,
        (round, region): (u64, Region),
        pieces: Vec<ExtentPiece>,
        bytes: u64,
        next: Option<u64>,
        term: Term,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let Some(source) = self.source(round) else { return };
        let Some(request) = source.requests.front_mut().filter(|request| request.region == region) else {
            return;
        };
        assert!(source.reading, "a region is read when it was asked for");
        source.reading = false;
        source.sequence += 1;
        source.in_flight.push_back((source.sequence, bytes));
        source.in_flight_bytes += bytes;
        source.bytes_sent += bytes;
        source.bytes_changed += pieces.len() as u64 * EXTENT_SIZE;
        source.region = region;
        match next {
            Some(from) => {
                assert!(from > request.from, "a region is read forward");
                request.from = from;
            }
            None => {
                source.requests.pop_front();
                source.regions_done += 1;
            }
        }
        let sequence = source.sequence;
        local.bucket.spend(bytes, now);
        source.pump(local, now, out);
        let last = next.is_none();
        // The read that follows must not overtake what was read.
        let at = out.len() - usize::from(matches!(out.last(), Some(Action::ReadRegion { .. })));
        if let Some(session) = self.session {
            let message = Message::ResyncExtents { term, round, sequence, region, pieces, last };
            let payload = (bytes > 0).then_some(0);
            out.insert(at, Action::Send { peer: self.peer, session, message, payload });
        }
    }

    pub fn taken(
        &mut self,
        round: u64,
        sequence: u64,
        local: &Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let Some(source) = self.source(round) else { return };
        while let Some(&(sent, bytes)) = source.in_flight.front()
            && sent <= sequence
        {
            source.in_flight.pop_front();
            source.in_flight_bytes -= bytes;
        }
        source.pump(local, now, out);
    }

    pub fn pump_source(&mut self, local: &Local, now: MonotonicTime, out: &mut Vec<Action>) {
        if let Progress::Resyncing(source) = &mut self.progress {
            source.pump(local, now, out);
        }
    }
}

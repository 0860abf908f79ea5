//! The machine's own history: what it asked of its disks, what it was told, and therefore what a read may return.
//!
//! Every sector is an atomic register. Each value written to it lives in a *zone*: from the first moment at which
//! it is known to have been there (an acknowledgement, or the end of a read that returned it) to the last moment
//! at which it still was (the start of the latest read that returned it). With distinct values, a history is
//! explained by some order of its requests exactly when no zone lies across another (Gibbons and Korach, "Testing
//! shared memories", 1997). The check runs whenever a zone grows.
//!
//! Three things the textbook does not know. A machine that dies, or is superseded while it is frozen, leaves its
//! unanswered writes behind: each landed before the next machine started, or never. A power loss on every copy may undo what no flush covered: those
//! values are *revoked*, and may or may not be found again. A forced takeover revokes everything.

use crate::agenda::Moment;
use crate::pattern::{self, Tag};
use crate::violation::{Promise, Violation};
use rempart_types::{DiskIndex, SECTOR_SIZE};
use std::ops::Range;

/// A place on a disk, in sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub disk: DiskIndex,
    pub sectors: Range<u64>,
}

impl Span {
    pub fn offset(&self) -> u64 {
        self.sectors.start * SECTOR_SIZE
    }

    pub fn length(&self) -> u64 {
        (self.sectors.end - self.sectors.start) * SECTOR_SIZE
    }
}

/// What the guest asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    Write {
        span: Span,
        fua: bool,
    },
    /// Reads as zeroes afterwards: write-zeroes, or discard.
    Zero {
        span: Span,
        discard: bool,
    },
    Read {
        span: Span,
    },
    Flush,
}

impl Request {
    pub fn span(&self) -> Option<&Span> {
        match self {
            Request::Write { span, .. } | Request::Zero { span, .. } | Request::Read { span } => Some(span),
            Request::Flush => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    InFlight,
    Acknowledged,
    /// Its machine died, or it was refused: it landed by then or never will.
    Abandoned,
}

/// One run of the machine, from its start to its death.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Life(pub usize);

#[derive(Debug)]
struct Op {
    request: Request,
    life: Life,
    start: Moment,
    fate: Fate,
    /// Nodes whose memory was wiped since the request was made, one bit each.
    wiped: u8,
    /// It may be gone although its answer is still to come.
    revoked: bool,
    /// For a flush: the acknowledged writes it covers.
    covers: Vec<Tag>,
}

/// One value in one sector. See the module's description.
#[derive(Debug, Clone)]
struct Zone {
    tag: Tag,
    start: Moment,
    first_finish: Moment,
    last_start: Moment,
    /// Acknowledged or read: it must be explained. Otherwise it may as well never have happened.
    counts: bool,
}

impl Zone {
    fn tell(&self) -> String {
        let Zone { tag, start, first_finish, last_start, .. } = self;
        format!("request {} (made {start}, known there from {first_finish} to {last_start})", tag.0)
    }

    fn lies_across(&self, other: &Zone) -> bool {
        let forward = |zone: &Zone| zone.first_finish < zone.last_start;
        match (forward(self), forward(other)) {
            (true, true) => self.first_finish.max(other.first_finish) < self.last_start.min(other.last_start),
            (true, false) => self.first_finish < other.last_start && other.first_finish < self.last_start,
            (false, true) => other.lies_across(self),
            (false, false) => false,
        }
    }
}

#[derive(Debug)]
struct Sector {
    /// Values with a name of their own.
    written: Vec<Zone>,
    /// Those of them that newer ones have replaced. They are compared with nothing until one of them is read
    /// again: comparing every value with every older one would cost more than the rest of the world.
    replaced: Vec<Zone>,
    /// Writes of zeroes, the first of which is the empty disk. They cannot be told apart.
    zeroed: Vec<Zone>,
}

impl Sector {
    /// Values at the front that are known to have been there before a later one was even asked for are put away.
    fn put_away(&mut self) {
        const KEPT: usize = 6;
        if self.written.len() < 2 * KEPT {
            return;
        }
        let last = self.written.len() - KEPT;
        let newest = self.written[last..].iter().filter(|zone| zone.counts).map(|zone| zone.start).max();
        let replaced = |zone: &Zone| newest.is_some_and(|start| zone.first_finish < start);
        let count = self.written[..last].iter().take_while(|zone| replaced(zone)).count();
        for zone in self.written.drain(..count) {
            let place = self.replaced.partition_point(|other| other.tag < zone.tag);
            self.replaced.insert(place, zone);
        }
    }

    fn zone(&mut self, tag: Tag) -> Option<&mut Zone> {
        let find = |list: &[Zone]| list.binary_search_by_key(&tag, |zone| zone.tag).ok();
        if let Some(index) = find(&self.written) {
            return self.written.get_mut(index);
        }
        if let Some(index) = find(&self.replaced) {
            return self.replaced.get_mut(index);
        }
        find(&self.zeroed).map(|index| &mut self.zeroed[index])
    }

    /// A replaced value is seen again: it is compared with the others like any.
    fn bring_back(&mut self, tag: Tag) {
        if let Ok(index) = self.replaced.binary_search_by_key(&tag, |zone| zone.tag) {
            let zone = self.replaced.remove(index);
            let place = self.written.partition_point(|other| other.tag < tag);
            self.written.insert(place, zone);
        }
    }
}

/// All the machine's requests, over all its lives.
#[derive(Debug)]
pub struct History {
    disks: Vec<Vec<Sector>>,
    /// The request with tag `n` is at `n - 1`.
    ops: Vec<Op>,
    /// Writes that no acknowledged flush covers yet, in order.
    unflushed: Vec<Tag>,
    /// When each life was superseded by the next.
    superseded: Vec<Moment>,
    /// Requests not yet answered, by life.
    in_flight: Vec<Vec<Tag>>,
    /// Of dead machines, and not yet bound to have landed.
    orphans: Vec<Tag>,
    /// Lost by a failed sync that the machine's daemon may not have heard of yet: reads may still find them in memory, and that
    /// says nothing once the machine is gone.
    doomed: Vec<Tag>,
}

impl History {
    /// Of empty disks with so many sectors each.
    pub fn new(disks: &[u64]) -> History {
        let empty = || Zone {
            tag: Tag::ZERO,
            start: Moment::START,
            first_finish: Moment::START,
            last_start: Moment::START,
            counts: true,
        };
        let sector = || Sector { written: Vec::new(), replaced: Vec::new(), zeroed: vec![empty()] };
        let disk = |&sectors: &u64| (0..sectors).map(|_| sector()).collect();
        History {
            disks: disks.iter().map(disk).collect(),
            ops: Vec::new(),
            unflushed: Vec::new(),
            superseded: Vec::new(),
            in_flight: Vec::new(),
            orphans: Vec::new(),
            doomed: Vec::new(),
        }
    }

    /// The tag that the next request will have: its data must carry it.
    pub fn next_tag(&self) -> Tag {
        Tag(self.ops.len() as u64 + 1)
    }

    pub fn request(&self, tag: Tag) -> &Request {
        &self.op(tag).request
    }

    pub fn started(&self, tag: Tag) -> Moment {
        self.op(tag).start
    }

    pub fn is_in_flight(&self, tag: Tag) -> bool {
        self.op(tag).fate == Fate::InFlight
    }

    /// Unanswered requests of one machine, in the order they were made.
    pub fn in_flight(&self, life: Life) -> &[Tag] {
        &self.in_flight[life.0]
    }

    /// The acknowledged writes that this flush covers, while it is in flight.
    pub fn covers(&self, tag: Tag) -> &[Tag] {
        &self.op(tag).covers
    }

    /// Another machine started after this one.
    pub fn is_superseded(&self, life: Life) -> bool {
        self.superseded[life.0] != Moment::NEVER
    }

    pub fn count(&self) -> usize {
        self.ops.len()
    }

    fn op(&self, tag: Tag) -> &Op {
        &self.ops[tag.0 as usize - 1]
    }

    fn op_mut(&mut self, tag: Tag) -> &mut Op {
        &mut self.ops[tag.0 as usize - 1]
    }

    /// The machine makes a request.
    pub fn begin(&mut self, life: Life, request: Request, at: Moment) -> Tag {
        let tag = self.next_tag();
        let mut covers = Vec::new();
        if matches!(request, Request::Flush | Request::Write { fua: true, .. }) {
            let acknowledged = |tag: &&Tag| self.op(**tag).fate == Fate::Acknowledged;
            covers.extend(self.unflushed.iter().filter(acknowledged));
        }
        match &request {
            Request::Write { span, .. } | Request::Zero { span, .. } => {
                let zero = matches!(request, Request::Zero { .. });
                let zone =
                    Zone { tag, start: at, first_finish: Moment::NEVER, last_start: at, counts: false };
                for sector in &mut self.disks[usize::from(span.disk.0)][as_index(&span.sectors)] {
                    if zero {
                        sector.zeroed.push(zone.clone());
                    } else {
                        sector.written.push(zone.clone());
                        sector.put_away();
                    }
                }
                self.unflushed.push(tag);
            }
            Request::Flush | Request::Read { .. } => {}
        }
        if matches!(request, Request::Write { fua: true, .. }) {
            covers.push(tag);
        }
        self.ops.push(Op {
            request,
            life,
            start: at,
            fate: Fate::InFlight,
            wiped: 0,
            revoked: false,
            covers,
        });
        self.in_flight[life.0].push(tag);
        tag
    }

    /// The machine is told that a write, a zeroing or a flush is done.
    pub fn acknowledged(&mut self, tag: Tag, at: Moment) -> Result<(), Violation> {
        self.leave_flight(tag, Fate::Acknowledged);
        let op = self.op_mut(tag);
        let covers = std::mem::take(&mut op.covers);
        let (start, life) = (op.start, op.life);
        let revoked = op.revoked && covers.is_empty();
        // A machine that was frozen while its successor started may still be given the answer to what landed
        // before, and to nothing else.
        let finish = at.min(self.superseded[life.0]);
        if start > finish {
            if matches!(self.op(tag).request, Request::Flush) {
                // It tells of what was answered before the successor started: nothing new, as a read.
                return Ok(());
            }
            let detail =
                format!("request {}, made after another machine had started, is acknowledged", tag.0);
            return Err(Violation::new(Promise::ReadsConsistent, detail));
        }
        if revoked {
            // No flush ever covered it: the answer came after what it told of was lost.
            self.land_by(tag, finish);
            return Ok(());
        }
        if !covers.is_empty() {
            self.unflushed.retain(|tag| covers.binary_search(tag).is_err());
        }
        match self.op(tag).request.clone() {
            Request::Write { span, .. } | Request::Zero { span, .. } => {
                for sector in span.sectors.clone() {
                    self.grow(span.disk, sector, tag, start, finish)?;
                }
                Ok(())
            }
            Request::Flush => Ok(()),
            Request::Read { .. } => unreachable!("a read is answered with data"),
        }
    }

    /// The machine is given data.
    pub fn read(&mut self, tag: Tag, bytes: &[u8], at: Moment) -> Result<(), Violation> {
        self.leave_flight(tag, Fate::Acknowledged);
        let start = self.op(tag).start;
        let Request::Read { span } = self.op(tag).request.clone() else {
            unreachable!("only a read is answered with data")
        };
        if self.is_superseded(self.op(tag).life) {
            // Whatever it sees, it was stopped or is about to be: `Promise::OneVm` watches over that.
            return Ok(());
        }
        if bytes.len() as u64 != span.length() {
            let detail = format!("{} bytes for a read of {}", bytes.len(), span.length());
            return Err(Violation::new(Promise::ReadsConsistent, detail));
        }
        let tags = pattern::tags_of(bytes, span.disk, span.sectors.start).map_err(|sector| {
            let detail = format!("disk {} sector {sector} holds what nobody wrote there", span.disk);
            Violation::new(Promise::ReadsConsistent, detail)
        })?;
        for (sector, value) in span.sectors.clone().zip(tags) {
            if value == Tag::ZERO {
                self.read_zero(span.disk, sector, start, at)?;
            } else {
                self.grow(span.disk, sector, value, start, at)?;
            }
        }
        Ok(())
    }

    /// The machine is told that its request failed: it landed by now or never will.
    pub fn refused(&mut self, tag: Tag, at: Moment) {
        self.leave_flight(tag, Fate::Abandoned);
        self.land_by(tag, at);
    }

    /// A machine is gone, and with it whatever it still waited for.
    pub fn machine_died(&mut self, life: Life, at: Moment) {
        for tag in std::mem::take(&mut self.in_flight[life.0]) {
            self.op_mut(tag).fate = Fate::Abandoned;
            self.orphans.push(tag);
        }
        for tag in std::mem::take(&mut self.doomed) {
            self.revoke(tag, at);
        }
    }

    /// A new machine starts: nothing its predecessors left behind may land from now on.
    pub fn machine_started(&mut self, at: Moment) -> Life {
        for life in 0..self.superseded.len() {
            if self.superseded[life] == Moment::NEVER {
                self.superseded[life] = at;
                for tag in self.in_flight[life].clone() {
                    self.land_by(tag, at);
                }
            }
        }
        for tag in std::mem::take(&mut self.orphans) {
            self.land_by(tag, at);
        }
        self.superseded.push(Moment::NEVER);
        self.in_flight.push(Vec::new());
        Life(self.superseded.len() - 1)
    }

    /// The machine's disk driver reconnected and sent an unanswered request again: it may land twice.
    pub fn resent(&mut self, tag: Tag) {
        self.op_mut(tag).revoked = false;
        let start = self.op(tag).start;
        if let Request::Write { span, .. } = self.op(tag).request.clone() {
            for sector in span.sectors.clone() {
                let zone = zone_of(&mut self.disks, span.disk, sector, tag).expect("its own zone");
                zone.first_finish = Moment::NEVER;
                zone.last_start = start;
                zone.counts = false;
            }
        }
    }

    /// `node` lost what was only in its memory while `in_sync` (a bit a node) had to hold everything. Returns what may be gone
    /// now, which no later flush covers.
    pub fn memory_wiped(&mut self, node: usize, in_sync: u8, at: Moment) -> Vec<Tag> {
        for tag in self.unflushed.clone() {
            self.op_mut(tag).wiped |= 1 << node;
        }
        self.revoke_unflushed(at, |op, _| in_sync & !op.wiped == 0)
    }

    /// A sync failed on `node`, and dropped what it should have written, which lasts in memory until its machine is gone.
    pub fn sync_failed(&mut self, node: usize, in_sync: u8, at: Moment) {
        let lost = self.memory_wiped(node, in_sync, at);
        self.doomed.extend(lost);
    }

    /// From here on only the nodes of `in_sync` matter. What all of them lost, and none `holds` again, may be gone.
    pub fn in_sync_is(&mut self, in_sync: u8, at: Moment, holds: impl Fn(Tag) -> bool) {
        self.revoke_unflushed(at, |op, tag| in_sync & !op.wiped == 0 && !holds(tag));
    }

    fn revoke_unflushed(&mut self, at: Moment, gone: impl Fn(&Op, Tag) -> bool) -> Vec<Tag> {
        let (lost, kept): (Vec<Tag>, Vec<Tag>) =
            std::mem::take(&mut self.unflushed).into_iter().partition(|tag| gone(self.op(*tag), *tag));
        self.unflushed = kept;
        lost.iter().for_each(|tag| self.revoke(*tag, at));
        lost
    }

    /// `node` holds everything again: it was admitted to the in-sync set.
    pub fn memory_restored(&mut self, node: usize) {
        for index in 0..self.unflushed.len() {
            let tag = self.unflushed[index];
            self.op_mut(tag).wiped &= !(1 << node);
        }
    }

    /// An operator forced an old copy to lead: any value may be gone, any older one back.
    pub fn forced(&mut self, at: Moment) {
        self.unflushed.clear();
        for index in 0..self.ops.len() {
            self.revoke(Tag(index as u64 + 1), at);
        }
        for zone in self.disks.iter_mut().flatten().flat_map(|sector| &mut sector.zeroed) {
            if zone.tag == Tag::ZERO {
                zone.last_start = Moment::START;
            }
        }
    }

    fn leave_flight(&mut self, tag: Tag, fate: Fate) {
        let op = self.op_mut(tag);
        assert_eq!(op.fate, Fate::InFlight, "request {} was answered twice", tag.0);
        op.fate = fate;
        let life = op.life;
        self.in_flight[life.0].retain(|&other| other != tag);
    }

    fn land_by(&mut self, tag: Tag, at: Moment) {
        self.each_zone(tag, |zone| zone.first_finish = zone.first_finish.min(at));
    }

    fn revoke(&mut self, tag: Tag, at: Moment) {
        let op = self.op_mut(tag);
        op.revoked = op.fate == Fate::InFlight;
        // What is still under way may land later than it was lost.
        let under_way = op.revoked || self.orphans.contains(&tag);
        self.each_zone(tag, |zone| {
            zone.first_finish = if under_way { Moment::NEVER } else { at.max(zone.start) };
            zone.last_start = zone.start;
            zone.counts = false;
        });
    }

    fn each_zone(&mut self, tag: Tag, change: impl Fn(&mut Zone)) {
        let (Request::Write { span, .. } | Request::Zero { span, .. }) = self.op(tag).request.clone() else {
            return;
        };
        for sector in span.sectors.clone() {
            change(zone_of(&mut self.disks, span.disk, sector, tag).expect("its own zone"));
        }
    }

    /// `value` was in the sector at some moment between `start` and `finish`.
    fn grow(
        &mut self,
        disk: DiskIndex,
        sector: u64,
        value: Tag,
        start: Moment,
        finish: Moment,
    ) -> Result<(), Violation> {
        if let Some(sector) = sector_of(&mut self.disks, disk, sector) {
            sector.bring_back(value);
        }
        let Some(zone) = zone_of(&mut self.disks, disk, sector, value) else {
            let detail =
                format!("disk {disk} sector {sector} holds request {}, never written there", value.0);
            return Err(Violation::new(Promise::ReadsConsistent, detail));
        };
        zone.first_finish = zone.first_finish.min(finish);
        zone.last_start = zone.last_start.max(start);
        zone.counts = true;
        let zone = zone.clone();
        let writer = self.op(value);
        if writer.start > self.superseded[writer.life.0] {
            let detail =
                format!("disk {disk} sector {sector} holds request {} of a superseded machine", value.0);
            return Err(Violation::new(Promise::ReadsConsistent, detail));
        }
        let all = &self.disks[usize::from(disk.0)][sector as usize];
        let zero = all.zeroed.binary_search_by_key(&value, |other| other.tag).is_ok();
        let others = all.written.iter().chain(all.zeroed.iter().filter(|_| !zero));
        match others.filter(|other| other.counts && other.tag != value).find(|other| zone.lies_across(other))
        {
            None => Ok(()),
            Some(other) => Err(self.contradiction(disk, sector, &zone, other)),
        }
    }

    /// The sector was zero at some moment between `start` and `finish`. Which write of zeroes that was cannot be
    /// told, so nothing is remembered of it.
    fn read_zero(
        &mut self,
        disk: DiskIndex,
        sector: u64,
        start: Moment,
        finish: Moment,
    ) -> Result<(), Violation> {
        let all = &self.disks[usize::from(disk.0)][sector as usize];
        let explains = |zero: &&Zone| {
            let mut zone = (*zero).clone();
            zone.first_finish = zone.first_finish.min(finish);
            zone.last_start = zone.last_start.max(start);
            !all.written.iter().any(|other| other.counts && zone.lies_across(other))
        };
        if all.zeroed.iter().rev().any(|zero| explains(&zero)) {
            return Ok(());
        }
        let known = all.written.iter().filter(|zone| zone.counts).map(Zone::tell);
        let zeroed = all.zeroed.iter().map(Zone::tell);
        let detail = format!(
            "disk {disk} sector {sector} reads as zero at {finish}; there are {}; zeroed by {}",
            known.collect::<Vec<_>>().join(", "),
            zeroed.collect::<Vec<_>>().join(", ")
        );
        Err(Violation::new(Promise::ReadsConsistent, detail))
    }

    fn contradiction(&self, disk: DiskIndex, sector: u64, zone: &Zone, other: &Zone) -> Violation {
        let detail = format!("disk {disk} sector {sector}: {} and {}", zone.tell(), other.tell());
        Violation::new(Promise::ReadsConsistent, detail)
    }
}

fn as_index(range: &Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

fn sector_of(disks: &mut [Vec<Sector>], disk: DiskIndex, sector: u64) -> Option<&mut Sector> {
    disks.get_mut(usize::from(disk.0))?.get_mut(sector as usize)
}

fn zone_of(disks: &mut [Vec<Sector>], disk: DiskIndex, sector: u64, tag: Tag) -> Option<&mut Zone> {
    sector_of(disks, disk, sector)?.zone(tag)
}

#[cfg(test)]
mod tests;

//! A store on a simulated disk, and a naive twin: the log as a list, disks as arrays of bytes.
// Each suite compiles it anew and uses its own part.
#![allow(dead_code)]

use rempart_store::simulated::SimulatedDisk;
use rempart_store::{
    Batch, BatchBuilder, Disk, DiskEntry, FileId, FormatParams, IoCompletion, IoError, IoErrorKind, IoOp,
    IoOutput, Limits, OpenOptions, Output, ReadPiece, Recovered, Store, StoreEvent, Token,
};
use rempart_types::{DiskIndex, EXTENT_SIZE, ExtentIndex, GroupId, Lsn, MonotonicTime, Term, WallTime};
use std::collections::BTreeSet;

pub const GROUP: GroupId = GroupId(0x5ca1ab1e);
pub const SEGMENT: u64 = 64 * 1024;
/// The last extent of each disk is short.
pub const SIZES: [u64; 2] = [4 * EXTENT_SIZE + 1536, 2 * EXTENT_SIZE];

/// SplitMix64.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// What a record does to a disk.
#[derive(Debug, Clone)]
pub enum Change {
    Write { disk: usize, offset: u64, data: Vec<u8> },
    Zero { disk: usize, offset: u64, len: u64 },
    Nothing,
}

/// The naive twin.
#[derive(Debug, Clone, Default)]
pub struct Model {
    /// Record n is at n - 1, with its term's epoch.
    pub log: Vec<(u64, Change)>,
    /// Last records of batches.
    pub ends: BTreeSet<u64>,
}

impl Model {
    pub fn end(&self) -> u64 {
        self.log.len() as u64
    }

    pub fn truncate(&mut self, end: u64) {
        self.log.truncate(end as usize);
        self.ends.retain(|&last| last <= end);
    }

    /// The disks after the first `lsn` records.
    pub fn disks_at(&self, lsn: u64) -> Vec<Vec<u8>> {
        let mut disks: Vec<Vec<u8>> = SIZES.iter().map(|&size| vec![0; size as usize]).collect();
        for (_, change) in &self.log[..lsn as usize] {
            match change {
                Change::Write { disk, offset, data } => {
                    disks[*disk][*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
                }
                Change::Zero { disk, offset, len } => {
                    disks[*disk][*offset as usize..(*offset + *len) as usize].fill(0);
                }
                Change::Nothing => {}
            }
        }
        disks
    }

    pub fn changed_since(&self, since: u64) -> BTreeSet<(u16, u64)> {
        let mut changed = BTreeSet::new();
        for (_, change) in self.log.iter().skip(since as usize) {
            let (disk, offset, len) = match change {
                Change::Write { disk, offset, data } => (*disk, *offset, data.len() as u64),
                Change::Zero { disk, offset, len } => (*disk, *offset, *len),
                Change::Nothing => continue,
            };
            for extent in rempart_types::extents_of(offset, len) {
                changed.insert((disk as u16, extent.0));
            }
        }
        changed
    }
}

pub fn params() -> FormatParams {
    let disks = SIZES
        .iter()
        .enumerate()
        .map(|(index, &size)| DiskEntry {
            index: DiskIndex(index as u16),
            size,
            location: String::new(),
            base: DiskEntry::EMPTY,
        })
        .collect();
    FormatParams { group: GROUP, disks, segment_size: SEGMENT, segments: 2 }
}

pub fn limits() -> Limits {
    Limits {
        checkpoint_every: 96 * 1024,
        apply_round: 40 * 1024,
        retention: 3 * SEGMENT,
        ..Limits::immediate()
    }
}

/// The world at one place where it may end.
#[derive(Clone)]
pub struct Moment {
    pub disk: SimulatedDisk,
    pub model: Model,
    pub durable: u64,
    pub stable: u64,
    pub note: String,
}

pub struct World {
    /// Keeps a copy of the world after every command.
    pub moments: Option<Vec<Moment>>,
    /// What the script is doing.
    pub note: String,
    pub disk: SimulatedDisk,
    pub store: Store,
    pub out: Output,
    /// Run, not yet delivered.
    pub done: Vec<IoCompletion>,
    pub events: Vec<StoreEvent>,
    pub rng: Rng,
    pub model: Model,
    pub epoch: u64,
    pub durable: u64,
    pub stable: u64,
    pub committed: u64,
    pub next_token: u64,
    pub now: u64,
}

impl World {
    pub fn new(seed: u64) -> World {
        let mut disk = SimulatedDisk::new();
        Store::format(&mut disk, &params()).expect("formats");
        let (store, _) = open(&mut disk).expect("opens");
        World {
            moments: None,
            note: String::new(),
            disk,
            store,
            out: Output::default(),
            done: Vec::new(),
            events: Vec::new(),
            rng: Rng(seed),
            model: Model::default(),
            epoch: 1,
            durable: 0,
            stable: 0,
            committed: 0,
            next_token: 0,
            now: 0,
        }
    }

    pub fn token(&mut self) -> Token {
        self.next_token += 1;
        Token(self.next_token)
    }

    /// Moves commands to the disk and events to us.
    pub fn pump(&mut self) {
        for command in self.out.commands.drain(..) {
            self.disk.submit(command);
        }
        for event in self.out.events.drain(..) {
            match &event {
                StoreEvent::Durable(lsn) => {
                    assert!(lsn.0 > self.durable && lsn.0 <= self.model.end());
                    self.durable = lsn.0;
                }
                StoreEvent::Applied(lsn) => assert!(lsn.0 <= self.stable.min(self.durable), "rule 3"),
                StoreEvent::Failed(failure) => panic!("{failure}"),
                _ => {}
            }
            self.events.push(event);
        }
    }

    /// Runs one queued command, or delivers one completion, of chance's choice.
    pub fn step(&mut self) -> bool {
        self.pump();
        let queued = self.disk.queued().len();
        let choices = queued + self.done.len();
        if choices == 0 {
            return false;
        }
        let choice = self.rng.below(choices as u64) as usize;
        if choice < queued {
            let completion = self.disk.run(choice);
            self.done.push(completion);
            self.keep_moment();
        } else {
            let completion = self.done.swap_remove(choice - queued);
            self.store.complete(completion, &mut self.out);
        }
        self.pump();
        true
    }

    pub fn keep_moment(&mut self) {
        if let Some(moments) = &mut self.moments {
            moments.push(Moment {
                disk: self.disk.clone(),
                model: self.model.clone(),
                durable: self.durable,
                stable: self.stable,
                note: self.note.clone(),
            });
        }
    }

    /// Runs everything there is to do; the twin is not told, for it knows nothing of a log that starts in the middle.
    pub fn run_untwinned(&mut self) -> Vec<StoreEvent> {
        let mut events = Vec::new();
        loop {
            events.append(&mut self.out.events);
            for command in self.out.commands.drain(..) {
                self.disk.submit(command);
            }
            if self.disk.queued().is_empty() {
                return events;
            }
            let completion = self.disk.run(0);
            self.store.complete(completion, &mut self.out);
        }
    }

    pub fn drain(&mut self) {
        let mut steps = 0;
        while self.step() {
            steps += 1;
            assert!(steps < 1_000_000, "the store never comes to rest: {:?}", self.store);
        }
    }

    /// Lets time pass until nothing is left to do.
    pub fn settle(&mut self) {
        for _ in 0..20 {
            self.drain();
            let Some(wake) = self.store.next_wake() else { break };
            self.now = self.now.max(wake.0);
            self.store.tick(MonotonicTime(self.now), &mut self.out);
        }
        self.drain();
    }

    pub fn random_change(&mut self) -> Change {
        let disk = self.rng.below(2) as usize;
        let sectors = SIZES[disk] / 512;
        let start = self.rng.below(sectors);
        let most = if self.rng.chance(4) { 160 } else { 8 };
        let len = (1 + self.rng.below(most)).min(sectors - start);
        match self.rng.below(12) {
            0 => Change::Nothing,
            1 | 2 => Change::Zero { disk, offset: start * 512, len: len * 512 },
            _ => {
                let len = len.min(24);
                let mut data = vec![0; (len * 512) as usize];
                for sector in data.chunks_exact_mut(512) {
                    sector.fill(self.rng.next() as u8);
                    sector[..8].copy_from_slice(&self.rng.next().to_le_bytes());
                }
                Change::Write { disk, offset: start * 512, data }
            }
        }
    }

    pub fn build(&mut self, changes: &[Change]) -> Batch {
        let mut builder = BatchBuilder::new(self.store.max_batch_len());
        for change in changes {
            match change {
                Change::Write { disk, offset, data } => builder.write(DiskIndex(*disk as u16), *offset, data),
                Change::Zero { disk, offset, len } => {
                    if offset % 1024 == 0 {
                        builder.zero(DiskIndex(*disk as u16), *offset, *len);
                    } else {
                        builder.discard(DiskIndex(*disk as u16), *offset, *len);
                    }
                }
                Change::Nothing => builder.mark(b"noon"),
            }
        }
        builder.seal(&self.store.next_place(Term::new(self.epoch, 0), WallTime(self.now)))
    }

    pub fn append(&mut self, changes: Vec<Change>) -> Batch {
        let batch = self.build(&changes);
        self.store.append(&batch, &mut self.out).expect("the next batch is taken");
        for change in changes {
            self.model.log.push((self.epoch, change));
        }
        self.model.ends.insert(self.model.end());
        self.pump();
        batch
    }

    pub fn append_random(&mut self) {
        let count = 1 + self.rng.below(3);
        let changes = (0..count).map(|_| self.random_change()).collect();
        self.append(changes);
    }

    pub fn stable_is(&mut self, lsn: u64) {
        self.stable = self.stable.max(lsn);
        self.committed = self.committed.max(self.stable);
        self.store.stable_is(Lsn(lsn), &mut self.out);
        self.pump();
    }

    pub fn committed_is(&mut self, lsn: u64) {
        self.committed = self.committed.max(lsn);
        self.store.committed_is(Lsn(lsn));
    }

    /// A batch's end at or before `bound`.
    pub fn some_end(&mut self, bound: u64) -> u64 {
        let ends: Vec<u64> = self.model.ends.range(..=bound).copied().collect();
        if ends.is_empty() { 0 } else { ends[self.rng.below(ends.len() as u64) as usize] }
    }

    pub fn make_all_stable(&mut self) {
        self.store.sync(&mut self.out);
        self.drain();
        let end = self.model.end();
        assert_eq!(self.durable, end);
        self.stable_is(end);
        self.settle();
    }

    /// Reads through the store, checking against the committed prefix.
    pub fn check_reads(&mut self, disk: usize, offset: u64, len: usize) {
        let token = self.token();
        self.store.read(token, DiskIndex(disk as u16), offset, len, &mut self.out).expect("serves");
        self.pump();
        let seen = loop {
            let found = self.events.iter().find_map(|event| match event {
                StoreEvent::Read { token: read, result } if *read == token => {
                    Some(result.clone().expect("reads"))
                }
                _ => None,
            });
            match found {
                Some(pieces) => break join(&pieces),
                None => assert!(self.step(), "a read is answered"),
            }
        };
        // Commits move only by the test's hand, between reads.
        let committed = self.floor(self.committed.min(self.model.end()));
        let expected = &self.model.disks_at(committed)[disk][offset as usize..offset as usize + len];
        assert!(seen == expected, "a read at {offset} of disk {disk} returns records to {committed} exactly");
    }

    pub fn floor(&self, lsn: u64) -> u64 {
        self.model.ends.range(..=lsn).next_back().copied().unwrap_or(0)
    }

    pub fn check_images(&self, lsn: u64) {
        let disks = self.model.disks_at(lsn);
        for (index, expected) in disks.iter().enumerate() {
            let image =
                self.disk.content(rempart_store::FileId::Image(DiskIndex(index as u16))).expect("exists");
            assert!(&image == expected, "the image of disk {index} is the log to {lsn}");
        }
    }

    pub fn check_changed_since(&mut self) {
        for since in [0, self.rng.below(self.model.end() + 1), self.store.applied().0] {
            let mut seen = BTreeSet::new();
            for disk in 0..2u16 {
                let mut from = Some(ExtentIndex(0));
                while let Some(at) = from {
                    let (list, next) = self.store.changed_since(DiskIndex(disk), Lsn(since), at, 2);
                    seen.extend(list.into_iter().map(|(extent, _)| (disk, extent.0)));
                    assert!(next.is_none_or(|next| next > at));
                    from = next;
                }
            }
            let must = self.model.changed_since(since);
            assert!(must.is_subset(&seen), "changed since {since}: {must:?}, the map says {seen:?}");
        }
    }

    /// Loses the process or the power, and opens again; the model forgets what was lost.
    pub fn crash(&mut self, power: bool) -> Recovered {
        let rng = &mut self.rng;
        if power {
            self.disk.lose_power(&mut || rng.next());
        } else {
            self.disk.crash_process(&mut || rng.next());
        }
        self.reopen()
    }

    pub fn reopen(&mut self) -> Recovered {
        self.out = Output::default();
        self.done.clear();
        self.events.clear();
        let (store, recovered) = open(&mut self.disk).expect("opens after a crash");
        self.store = store;
        let end = recovered.log_end.lsn.0;
        assert!(end >= self.durable, "durable to {}, recovered to {end}", self.durable);
        assert!(end <= self.model.end(), "nothing appears that was never appended");
        assert!(end == 0 || self.model.ends.contains(&end), "a batch is whole or absent");
        assert!(recovered.stable.0 <= self.stable.max(end));
        self.model.truncate(end);
        self.durable = end;
        self.stable = self.stable.min(end).max(recovered.stable.0);
        self.committed = self.stable;
        self.epoch += 1;
        for (index, run) in recovered.lineage.runs().iter().enumerate() {
            let (epoch, _) = self.model.log[run.first.0 as usize - 1];
            assert_eq!(run.term.epoch.0, epoch, "run {index} of the lineage");
        }
        recovered
    }
}

/// A disk that stops working after so many commands, as a machine does that dies during recovery.
pub struct Dying<'a> {
    pub disk: &'a mut SimulatedDisk,
    pub left: u64,
}

impl Disk for Dying<'_> {
    fn list(&mut self) -> Result<Vec<FileId>, IoError> {
        self.disk.list()
    }

    fn execute(&mut self, op: &IoOp) -> Result<IoOutput, IoError> {
        if self.left == 0 {
            let message = "the machine is gone".to_owned();
            return Err(IoError { kind: IoErrorKind::Io, file: op.file(), path: String::new(), message });
        }
        self.left -= 1;
        self.disk.execute(op)
    }

    fn locate_image(&mut self, _: DiskIndex, _: &str) {}
}

pub fn open(disk: &mut SimulatedDisk) -> Result<(Store, Recovered), rempart_store::OpenError> {
    Store::open(disk, &OpenOptions { limits: limits(), roll_back: false })
}

pub fn join(pieces: &[ReadPiece]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        match piece {
            ReadPiece::Data(slice) => bytes.extend_from_slice(slice),
            ReadPiece::Zero(len) => bytes.resize(bytes.len() + len, 0),
        }
    }
    bytes
}

//! One node's disk: the store's simulated one, with time and trouble added.

use crate::faults::Planted;
use crate::rng::Rng;
use rempart_store::simulated::SimulatedDisk;
use rempart_store::{FileId, IoClass, IoCommand, IoCompletion, IoErrorKind, IoId, IoOp, IoOutput};
use std::ops::Range;
use std::time::Duration;

/// A command under way.
#[derive(Debug)]
pub enum Started {
    /// It happens when it completes.
    Queued,
    /// It happened already; only the news is on its way.
    Happened(IoCompletion),
}

/// A disk with latency and injected failures.
#[derive(Debug)]
pub struct Drive {
    pub disk: SimulatedDisk,
    latency: Range<Duration>,
    slow: Option<Range<Duration>>,
    /// Every sync fails.
    pub sync_fails: bool,
    /// Every write of new data fails.
    pub write_fails: Option<IoErrorKind>,
    /// A sync failed, and with it went what it should have written.
    pub lost_pages: bool,
    planted: Option<Planted>,
    lies: u64,
}

impl Drive {
    pub fn new(disk: SimulatedDisk, latency: Range<Duration>, planted: Option<Planted>) -> Drive {
        Drive {
            disk,
            latency,
            slow: None,
            sync_fails: false,
            write_fails: None,
            lost_pages: false,
            planted,
            lies: 0,
        }
    }

    pub fn slow_down(&mut self, latency: Option<Range<Duration>>) {
        self.slow = latency;
    }

    pub fn is_slow(&self) -> bool {
        self.slow.is_some()
    }

    /// It works as on its first day.
    pub fn heal(&mut self) {
        self.slow = None;
        self.sync_fails = false;
        self.write_fails = None;
        self.disk.set_capacity(None);
        self.disk.fail_nothing();
    }

    pub fn latency(&self, command: &IoCommand, rng: &mut Rng) -> Duration {
        let usual = rng.duration(self.slow.clone().unwrap_or(self.latency.clone()));
        match (&command.op, command.class) {
            (IoOp::Sync { .. } | IoOp::Create { .. }, _) => usual * 4,
            (_, IoClass::Background) => usual * 2,
            _ => usual,
        }
    }

    /// Takes a command. A sync covers what was written when it was issued; it may or may not cover more, and a
    /// write may reach the cache at once or late.
    pub fn start(&mut self, command: IoCommand, rng: &mut Rng) -> Started {
        let id = command.id;
        if let Some(completion) = self.sabotaged(&command) {
            return Started::Happened(completion);
        }
        match &command.op {
            IoOp::Sync { file } if self.sync_fails => {
                self.disk.fail_next_sync(*file);
                self.lost_pages = true;
            }
            IoOp::Write { file, .. } => {
                if let Some(kind) = self.write_fails {
                    self.disk.fail_next_write(*file, kind);
                }
            }
            _ => {}
        }
        let early = if matches!(command.op, IoOp::Sync { .. }) { 700 } else { 300 };
        self.disk.submit(command);
        if rng.chance(early) { Started::Happened(self.run(id)) } else { Started::Queued }
    }

    pub fn finish(&mut self, id: IoId, started: Started) -> IoCompletion {
        match started {
            Started::Happened(completion) => completion,
            Started::Queued => self.run(id),
        }
    }

    fn run(&mut self, id: IoId) -> IoCompletion {
        let index = self.disk.queued().iter().position(|command| command.id == id);
        self.disk.run(index.expect("a queued command stays queued until it runs"))
    }

    /// What a lying disk answers without doing it.
    fn sabotaged(&mut self, command: &IoCommand) -> Option<IoCompletion> {
        let lies = match (self.planted?, &command.op) {
            (Planted::JournalSyncIgnored, IoOp::Sync { file: FileId::Segment(_) }) => true,
            (Planted::ImageSyncIgnored, IoOp::Sync { file: FileId::Image(_) }) => true,
            (Planted::SuperblockSyncIgnored, IoOp::Sync { file: FileId::Superblock }) => true,
            (Planted::SuperblockWriteLost, IoOp::Write { file: FileId::Superblock, .. }) => true,
            (Planted::MapSyncIgnored, IoOp::Sync { file: FileId::ChangeMap(_) }) => true,
            (Planted::MapWriteLost, IoOp::Write { file: FileId::ChangeMap(_), .. }) => {
                self.lies += 1;
                self.lies.is_multiple_of(3)
            }
            (Planted::ImageWriteLost, IoOp::Write { file: FileId::Image(_), .. })
            | (Planted::JournalWriteLost, IoOp::Write { file: FileId::Segment(_), .. }) => {
                self.lies += 1;
                self.lies.is_multiple_of(20)
            }
            (Planted::PunchIgnored, IoOp::Zero { file: FileId::Image(_), .. }) => true,
            _ => false,
        };
        lies.then_some(IoCompletion { id: command.id, result: Ok(IoOutput::Done) })
    }
}

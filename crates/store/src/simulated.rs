//! A deterministic disk in memory that can lose power, for the simulator and for tests.

use crate::io::{Disk, FileId, IoCommand, IoCompletion, IoError, IoErrorKind, IoOp, IoOutput};
use rempart_types::DiskIndex;

/// Random numbers for the disk's choices: any `FnMut() -> u64`.
pub type Random<'a> = &'a mut dyn FnMut() -> u64;

/// One node's disk. Survives crashes of whatever uses it.
///
/// Asynchronous use: [`SimulatedDisk::submit`] queues, [`SimulatedDisk::run`] executes the queued command of
/// the caller's choice and returns its completion, which the caller may deliver later.
#[derive(Debug, Clone, Default)]
pub struct SimulatedDisk {}

#[allow(unused_variables, clippy::todo)]
impl SimulatedDisk {
    pub fn new() -> SimulatedDisk {
        todo!()
    }

    /// Queues a command.
    pub fn submit(&mut self, command: IoCommand) {
        todo!()
    }

    /// Commands queued and not run.
    pub fn queued(&self) -> &[IoCommand] {
        todo!()
    }

    /// Runs the queued command at `index`.
    pub fn run(&mut self, index: usize) -> IoCompletion {
        todo!()
    }

    /// The process dies: queued commands are lost, or (by `random`) happen unseen; the page cache lives on.
    pub fn crash_process(&mut self, random: Random<'_>) {
        todo!()
    }

    /// The machine loses power: as above, and each sector written since the last sync of its file is kept or
    /// lost by `random`, in any order.
    pub fn lose_power(&mut self, random: Random<'_>) {
        todo!()
    }

    /// The next `count` commands of this kind on this file fail. A failed sync also drops the unsynced pages.
    pub fn fail_next_sync(&mut self, file: FileId) {
        todo!()
    }

    pub fn fail_next_write(&mut self, file: FileId, kind: IoErrorKind) {
        todo!()
    }

    /// Bytes all files together may hold; writes past it fail with [`IoErrorKind::Full`].
    pub fn set_capacity(&mut self, bytes: Option<u64>) {
        todo!()
    }

    /// Flips bits of one stored byte, as it is on the medium and in the cache.
    pub fn rot(&mut self, file: FileId, offset: u64, mask: u8) {
        todo!()
    }

    /// A file's content as a reader sees it now, for checkers.
    pub fn content(&self, file: FileId) -> Option<Vec<u8>> {
        todo!()
    }

    /// Writes into a file behind the store's back.
    pub fn overwrite(&mut self, file: FileId, offset: u64, data: &[u8]) {
        todo!()
    }
}

#[allow(unused_variables, clippy::todo)]
impl Disk for SimulatedDisk {
    fn list(&mut self) -> Result<Vec<FileId>, IoError> {
        todo!()
    }

    fn execute(&mut self, op: &IoOp) -> Result<IoOutput, IoError> {
        todo!()
    }

    fn locate_image(&mut self, disk: DiskIndex, location: &str) {
        todo!()
    }
}

use crate::file::FileDisk;
use crate::io::{IoCommand, IoCompletion};
use rempart_types::DiskIndex;
use std::os::fd::BorrowedFd;

/// Executes commands on real files: small journal writes inline, the rest on worker threads. Owned and called
/// by the group's event-loop thread.
#[derive(Debug)]
pub struct Executor {}

#[allow(unused_variables, clippy::todo)]
impl Executor {
    /// Takes over the disk (and its lock) that the store was opened from.
    pub fn new(disk: FileDisk, workers: usize) -> std::io::Result<Executor> {
        todo!()
    }

    /// Starts a command. What executes inline is completed when this returns.
    pub fn submit(&mut self, command: IoCommand) {
        todo!()
    }

    /// Takes what has completed since the last call, and resets the wake-up descriptor.
    pub fn completions(&mut self, into: &mut Vec<IoCompletion>) {
        todo!()
    }

    /// Call when this turn's replies are out: starts write-back of eager journal writes.
    pub fn after_replies(&mut self) {
        todo!()
    }

    /// Readable when completions wait: for the owner's epoll loop.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        todo!()
    }

    /// Commands not completed yet.
    pub fn in_flight(&self) -> usize {
        todo!()
    }

    /// Where a disk's image is; call before adding a disk with a location of its own.
    pub fn locate_image(&mut self, disk: DiskIndex, location: &str) {
        todo!()
    }
}

//! Writes the superblock: one version at a time, copy after copy; who asked meanwhile shares the next one.

use crate::event::{Output, StoreEvent, Token};
use crate::io::{FileId, IoClass, IoOp};
use crate::store::{Pending, Store};
use crate::superblock::COPY_SIZE;
use rempart_buffer::Slice;

/// Who waits for a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waiter {
    Persist(Token),
    Task,
    Gate,
}

#[derive(Debug, Default)]
pub(crate) struct SuperblockWriter {
    /// Wait for the version that will be written next.
    next: Vec<Waiter>,
    /// Wait for the version being written.
    current: Vec<Waiter>,
    /// The version being written, and how many of its four steps are done.
    writing: Option<(Slice, u8)>,
}

impl SuperblockWriter {
    pub fn is_idle(&self) -> bool {
        self.writing.is_none()
    }
}

impl Store {
    /// Makes the superblock as it is now in memory durable, then tells the waiter.
    pub(crate) fn write_superblock(&mut self, waiter: Waiter, out: &mut Output) {
        self.superblock_writer.next.push(waiter);
        if self.superblock_writer.is_idle() {
            self.start_superblock(out);
        }
    }

    fn start_superblock(&mut self, out: &mut Output) {
        self.superblock.sequence += 1;
        // What a crash may not take back is noted as it is now; what needs work first is set by that work.
        self.superblock.durable = self.journal.durable;
        self.superblock.stable = self.stable_here();
        self.superblock.wall = self.journal.wall;
        let copy = self.superblock.encode();
        self.superblock_writing = self.superblock.clone();
        self.superblock_writer.current = std::mem::take(&mut self.superblock_writer.next);
        self.superblock_writer.writing = Some((copy, 0));
        self.superblock_step(out);
    }

    /// Issues the next of: write copy 0, sync, write copy 1, sync.
    fn superblock_step(&mut self, out: &mut Output) {
        let (copy, step) = self.superblock_writer.writing.clone().expect("a version is being written");
        let file = FileId::Superblock;
        let op = if step % 2 == 0 {
            IoOp::Write { file, offset: u64::from(step / 2) * COPY_SIZE, data: vec![copy] }
        } else {
            IoOp::Sync { file }
        };
        self.issue(IoClass::Urgent, op, Pending::Superblock, out);
    }

    pub(crate) fn superblock_stepped(&mut self, out: &mut Output) {
        let (_, step) = self.superblock_writer.writing.as_mut().expect("a version is being written");
        *step += 1;
        if *step < 4 {
            return self.superblock_step(out);
        }
        self.superblock_writer.writing = None;
        self.superblock_written = self.superblock_writing.clone();
        for waiter in std::mem::take(&mut self.superblock_writer.current) {
            match waiter {
                Waiter::Persist(token) => out.events.push(StoreEvent::Persisted(token)),
                Waiter::Gate => {
                    self.journal.gate = false;
                    self.place_batches(out);
                }
                Waiter::Task => self.task_step_done(out),
            }
        }
        if self.superblock_writer.is_idle() && !self.superblock_writer.next.is_empty() {
            self.start_superblock(out);
        }
    }
}

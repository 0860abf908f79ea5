//! Executes a running store's commands.

use crate::file::FileDisk;
use crate::file::disk::BUFFERED_LIMIT;
use crate::file::ring::{self, Ring};
use crate::io::{FileId, IoClass, IoCommand, IoCompletion, IoId, IoOp};
use rempart_buffer::{keep_no_spares, total_len};
use rempart_types::DiskIndex;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Journal writes up to this are executed on the calling thread: copying into the page cache takes less than
/// handing them over. Longer ones wait for the device.
const INLINE_LIMIT: usize = BUFFERED_LIMIT;
/// Reads of images, or writes to them, that a worker gives to the device at once. Handing over small ones singly costs
/// more than executing them, and what a view or a resync reads lies apart; a flush of the journal, on the same disk, waits
/// behind those that are there.
const GATHER: usize = 8;
/// With so many waiting, they come faster than they go that way.
const PILE: usize = 1024;
const GATHER_FROM_PILE: usize = ring::ENTRIES;
/// Bytes of what a worker takes at once.
const GATHER_BYTES: usize = 1024 * 1024;

/// Executes commands on real files: small journal writes inline, the rest on worker threads. Owned and called
/// by the group's event-loop thread.
#[derive(Debug)]
pub struct Executor {
    disk: FileDisk,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Completed inline.
    inline: Vec<IoCompletion>,
    /// Background work of this turn: it starts when the replies are out, all at once.
    background: Vec<IoCommand>,
    /// Ranges to start writing back once the replies are out.
    eager: Vec<(FileId, u64, u64)>,
    in_flight: usize,
    /// Journal writes that workers execute. While there are any, small ones follow them: a write through the page
    /// cache waits, in the kernel, for those past it.
    with_workers: Vec<IoId>,
    submitted: u64,
}

#[derive(Debug)]
struct Shared {
    queues: Mutex<Queues>,
    work: Condvar,
    done: Mutex<Vec<IoCompletion>>,
    /// Something is in `done` that the owner did not take; the wake-up descriptor was or is being written.
    woken: AtomicBool,
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct Queues {
    urgent: VecDeque<IoCommand>,
    background: VecDeque<IoCommand>,
    /// Workers busy with background work: one always stays free for urgent work.
    background_busy: usize,
    workers: usize,
    stop: bool,
}

impl Queues {
    /// Puts the next work in `into`: one command, or several small writes to images, or reads of them. True if it is
    /// background work; `None` if there is nothing to do.
    fn take(&mut self, into: &mut Vec<IoCommand>) -> Option<bool> {
        if let Some(command) = self.urgent.pop_front() {
            into.push(command);
            return Some(false);
        }
        if self.background_busy + 1 >= self.workers {
            return None;
        }
        let most = if self.background.len() > PILE { GATHER_FROM_PILE } else { GATHER };
        into.push(self.background.pop_front()?);
        if let Some((kind, mut bytes)) = Together::of(&into[0]) {
            while into.len() < most
                && let Some((next, len)) = self.background.front().and_then(Together::of)
                && next == kind
                && bytes + len <= GATHER_BYTES
            {
                bytes += len;
                into.extend(self.background.pop_front());
            }
        }
        self.background_busy += 1;
        Some(true)
    }
}

impl Executor {
    /// Takes over the disk (and its lock) that the store was opened from. At least 2 workers run.
    pub fn new(disk: FileDisk, workers: usize) -> std::io::Result<Executor> {
        let workers = workers.max(2);
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared {
            queues: Mutex::new(Queues { workers, ..Queues::default() }),
            work: Condvar::new(),
            done: Mutex::default(),
            woken: AtomicBool::new(false),
            wake,
        });
        let mut executor = Executor {
            disk,
            shared,
            workers: Vec::new(),
            inline: Vec::new(),
            background: Vec::new(),
            eager: Vec::new(),
            in_flight: 0,
            with_workers: Vec::new(),
            submitted: 0,
        };
        for number in 0..workers {
            let (shared, disk) = (executor.shared.clone(), executor.disk.clone());
            let name = format!("store-io-{number}");
            let worker = std::thread::Builder::new().name(name).spawn(move || work(&shared, &disk))?;
            executor.workers.push(worker);
        }
        Ok(executor)
    }

    /// Takes a command. What executes inline is completed when this returns; background work starts with the next
    /// [`Executor::after_replies`].
    pub fn submit(&mut self, command: IoCommand) {
        self.in_flight += 1;
        self.submitted += 1;
        if let (IoClass::JournalWrite { eager }, IoOp::Write { file, offset, data }) =
            (command.class, &command.op)
        {
            let len = total_len(data);
            if len <= INLINE_LIMIT && self.with_workers.is_empty() {
                let result = self.disk.perform(&command.op);
                if eager && result.is_ok() {
                    self.note_eager(*file, *offset, len as u64);
                }
                self.inline.push(IoCompletion { id: command.id, result });
                return;
            }
            self.with_workers.push(command.id);
        }
        if command.class == IoClass::Background {
            self.background.push(command);
            return;
        }
        if let IoOp::Sync { file } = command.op {
            self.eager.retain(|&(eager, ..)| eager != file);
        }
        self.shared.queues.lock().expect("no holder panics").urgent.push_back(command);
        self.shared.work.notify_one();
    }

    fn start_background(&mut self) {
        if self.background.is_empty() {
            return;
        }
        let several = self.background.len() > 1;
        self.shared.queues.lock().expect("no holder panics").background.extend(self.background.drain(..));
        if several {
            self.shared.work.notify_all();
        } else {
            self.shared.work.notify_one();
        }
    }

    fn note_eager(&mut self, file: FileId, offset: u64, len: u64) {
        match self.eager.last_mut() {
            Some((last, start, end)) if *last == file && *end == offset => {
                let _ = start;
                *end = offset + len;
            }
            _ => self.eager.push((file, offset, offset + len)),
        }
    }

    /// Takes what has completed since the last call.
    pub fn completions(&mut self, into: &mut Vec<IoCompletion>) {
        let before = into.len();
        into.append(&mut self.inline);
        // Reset first: what completes after it wakes us again.
        if self.shared.woken.swap(false, Ordering::AcqRel) {
            into.append(&mut self.shared.done.lock().expect("no holder panics"));
        }
        self.in_flight -= into.len() - before;
        if !self.with_workers.is_empty() {
            let done = &into[before..];
            self.with_workers.retain(|id| done.iter().all(|completion| completion.id != *id));
        }
    }

    /// Call when this turn's replies are out: starts background work, and write-back of eager journal writes, so that
    /// the sync which is likely to follow finds little left to do.
    pub fn after_replies(&mut self) {
        self.start_background();
        for (file, start, end) in self.eager.drain(..) {
            self.disk.start_write_back(file, start, end - start);
        }
    }

    /// Whether [`Executor::completions`] would find something, without a system call.
    pub fn has_completed(&self) -> bool {
        !self.inline.is_empty() || self.shared.woken.load(Ordering::Acquire)
    }

    /// Call when the wake-up descriptor is readable, and take the completions then.
    pub fn reset_wake(&self) {
        let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
    }

    /// Readable when completions of workers wait: for the owner's epoll loop.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }

    /// Commands so far: while it does not grow, nothing is done.
    pub fn submitted(&self) -> u64 {
        self.submitted
    }

    /// Commands not handed back yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Where a disk's image is; call before adding a disk with a location of its own.
    pub fn locate_image(&mut self, disk: DiskIndex, location: &str) {
        self.disk.set_image(disk, Path::new(location));
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        self.start_background();
        if let Ok(mut queues) = self.shared.queues.lock() {
            queues.stop = true;
        }
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared, disk: &FileDisk) {
    keep_no_spares();
    let mut commands = Vec::new();
    let mut completions = Vec::new();
    let mut ring = Ring::new();
    loop {
        let mut queues = shared.queues.lock().expect("no holder panics");
        let background = loop {
            // What was submitted is executed, even when the owner goes: a command is a promise to the store.
            match queues.take(&mut commands) {
                Some(background) => break background,
                None if queues.stop && queues.urgent.is_empty() && queues.background.is_empty() => return,
                None => queues = shared.work.wait(queues).expect("no holder panics"),
            }
        };
        drop(queues);
        let ops: Vec<&IoOp> = commands.iter().map(|command| &command.op).collect();
        let results = match Together::of(&commands[0]) {
            Some((Together::Writes, _)) => disk.write_together(&mut ring, &ops),
            Some((Together::Reads, _)) => disk.read_together(&mut ring, &ops),
            None => ops.iter().map(|op| disk.perform(op)).collect(),
        };
        let completed = commands.iter().zip(results);
        completions.extend(completed.map(|(command, result)| IoCompletion { id: command.id, result }));
        // Before anybody hears of it: the owner's thread is to have the last hold of the buffers, and use them again.
        commands.clear();
        shared.done.lock().expect("no holder panics").append(&mut completions);
        if !shared.woken.swap(true, Ordering::AcqRel) {
            let _ = rustix::io::write(&shared.wake, &1u64.to_ne_bytes());
        }
        if background {
            let mut queues = shared.queues.lock().expect("no holder panics");
            queues.background_busy -= 1;
            let more = !queues.background.is_empty() || queues.stop;
            drop(queues);
            if more {
                shared.work.notify_all();
            }
        }
    }
}

/// What several of are given to the device at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Together {
    Writes,
    Reads,
}

impl Together {
    /// With the bytes of this one.
    fn of(command: &IoCommand) -> Option<(Together, usize)> {
        match &command.op {
            IoOp::Write { file: FileId::Image(_), data, .. } => Some((Together::Writes, total_len(data))),
            IoOp::Read { file: FileId::Image(_), len, .. } => Some((Together::Reads, *len)),
            _ => None,
        }
    }
}

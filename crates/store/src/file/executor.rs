//! Executes a running store's commands.

use crate::file::FileDisk;
use crate::io::{FileId, IoClass, IoCommand, IoCompletion, IoErrorKind, IoOp};
use rempart_types::DiskIndex;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Journal writes up to this are executed on the calling thread: copying into the page cache takes less than
/// handing them over.
const INLINE_LIMIT: usize = 256 * 1024;

/// Executes commands on real files: small journal writes inline, the rest on worker threads. Owned and called
/// by the group's event-loop thread.
#[derive(Debug)]
pub struct Executor {
    disk: FileDisk,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Completed inline.
    inline: Vec<IoCompletion>,
    /// Ranges to start writing back once the replies are out.
    eager: Vec<(FileId, u64, u64)>,
    in_flight: usize,
}

#[derive(Debug)]
struct Shared {
    queues: Mutex<Queues>,
    work: Condvar,
    done: Mutex<Vec<IoCompletion>>,
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
    fn take(&mut self) -> Option<(IoCommand, bool)> {
        if let Some(command) = self.urgent.pop_front() {
            return Some((command, false));
        }
        if self.background_busy + 1 < self.workers
            && let Some(command) = self.background.pop_front()
        {
            self.background_busy += 1;
            return Some((command, true));
        }
        None
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
            wake,
        });
        let mut executor = Executor {
            disk,
            shared,
            workers: Vec::new(),
            inline: Vec::new(),
            eager: Vec::new(),
            in_flight: 0,
        };
        for number in 0..workers {
            let (shared, disk) = (executor.shared.clone(), executor.disk.clone());
            let name = format!("store-io-{number}");
            let worker = std::thread::Builder::new().name(name).spawn(move || work(&shared, &disk))?;
            executor.workers.push(worker);
        }
        Ok(executor)
    }

    /// Starts a command. What executes inline is completed when this returns.
    pub fn submit(&mut self, command: IoCommand) {
        self.in_flight += 1;
        if let (IoClass::JournalWrite { eager }, IoOp::Write { file, offset, data }) =
            (command.class, &command.op)
        {
            let len: usize = data.iter().map(|slice| slice.len()).sum();
            if len <= INLINE_LIMIT {
                let result = self.disk.perform(&command.op);
                if eager && result.is_ok() {
                    self.note_eager(*file, *offset, len as u64);
                }
                self.inline.push(IoCompletion { id: command.id, result });
                return;
            }
        }
        let mut queues = self.shared.queues.lock().expect("no holder panics");
        match command.class {
            IoClass::Background => queues.background.push_back(command),
            IoClass::JournalWrite { .. } | IoClass::Urgent => queues.urgent.push_back(command),
        }
        drop(queues);
        self.shared.work.notify_one();
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

    /// Takes what has completed since the last call, and resets the wake-up descriptor.
    pub fn completions(&mut self, into: &mut Vec<IoCompletion>) {
        let before = into.len();
        into.append(&mut self.inline);
        let mut count = [0; 8];
        // Reset first: what completes after it wakes us again.
        let _ = rustix::io::read(&self.shared.wake, &mut count);
        into.append(&mut self.shared.done.lock().expect("no holder panics"));
        self.in_flight -= into.len() - before;
    }

    /// Whether [`Executor::completions`] has something that was completed inline.
    pub fn has_inline(&self) -> bool {
        !self.inline.is_empty()
    }

    /// Call when this turn's replies are out: starts write-back of eager journal writes, so that the sync
    /// which is likely to follow finds little left to do.
    pub fn after_replies(&mut self) {
        for (file, start, end) in self.eager.drain(..) {
            if let Some(handle) = self.disk.opened(file) {
                sync_file_range(&handle, start, end - start);
            }
        }
    }

    /// Readable when completions of workers wait: for the owner's epoll loop.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
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
    loop {
        let mut queues = shared.queues.lock().expect("no holder panics");
        let (command, background) = loop {
            // What was submitted is executed, even when the owner goes: a command is a promise to the store.
            match queues.take() {
                Some(taken) => break taken,
                None if queues.stop && queues.urgent.is_empty() && queues.background.is_empty() => return,
                None => queues = shared.work.wait(queues).expect("no holder panics"),
            }
        };
        drop(queues);
        let result = execute(disk, &command);
        {
            let mut done = shared.done.lock().expect("no holder panics");
            done.push(IoCompletion { id: command.id, result });
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
        let _ = rustix::io::write(&shared.wake, &1u64.to_ne_bytes());
    }
}

fn execute(disk: &FileDisk, command: &IoCommand) -> Result<crate::io::IoOutput, crate::io::IoError> {
    let result = disk.perform(&command.op);
    if let (IoOp::Write { file: file @ FileId::Image(_), offset, data }, Ok(_)) = (&command.op, &result) {
        // Write-back of the image goes on all the time, so that a checkpoint does not wait for all of it.
        if let Some(handle) = disk.opened(*file) {
            sync_file_range(&handle, *offset, data.iter().map(|slice| slice.len() as u64).sum());
        }
    }
    debug_assert!(!matches!(&result, Err(error) if error.kind == IoErrorKind::Locked));
    result
}

/// Starts write-back without waiting for it. Only a hint: errors show at the next `fdatasync`.
fn sync_file_range(file: &std::fs::File, offset: u64, len: u64) {
    // SAFETY: the descriptor is open for the call; no memory is passed.
    unsafe {
        libc::sync_file_range(
            file.as_raw_fd(),
            offset as libc::off64_t,
            len as libc::off64_t,
            libc::SYNC_FILE_RANGE_WRITE,
        );
    }
}

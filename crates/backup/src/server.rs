//! Disks of restore points over NBD, read-only. What is in memory is answered by the thread that has the connections; what
//! is not is read by others.

use crate::{DiskReader, ReadError};
use rempart_nbd::poller::Wake;
use rempart_nbd::server::{
    Asked, ContextStatus, Extent, Limits, Listener, Piece, Readers, RequestId, Wanted,
};
use rempart_nbd::{
    BASE_ALLOCATION, BlockSizes, ContextIndex, ErrorCode, Export, ExportList, STATE_HOLE, STATE_ZERO,
};
use rempart_types::SECTOR_SIZE;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

const KEY_WAKE: u64 = 0;
/// Connections at once.
const MAX_CLIENTS: usize = 32;
/// What one client's requests and the replies to it may hold: all of them together stay far below what a server has.
const LIMITS: Limits =
    Limits { requests: 128, bytes: 8 << 20, receive_buffer_bytes: 192 << 10, options: 4096 };
/// Reads at once of what is not in memory: they wait for a disk or a network mostly.
const READERS: usize = 8;

/// Told of everything that could not be read.
pub type Unreadable = Box<dyn Fn(&ReadError) + Send>;

/// A server with threads of its own, until it is dropped.
#[derive(Debug)]
pub struct DiskServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    wake: Wake,
    ends: AtomicBool,
}

enum Answer {
    Read(Vec<Piece>),
    Status(Vec<ContextIndex>, Vec<Extent>),
}

struct Answered {
    client: u64,
    id: RequestId,
    answer: Result<Answer, ReadError>,
}

/// The thread that has the connections.
struct Connections {
    shared: Arc<Shared>,
    readers: Readers,
    disks: Arc<[DiskReader]>,
    questions: mpsc::Sender<Asked>,
    answers: mpsc::Receiver<Answered>,
    unreadable: Unreadable,
}

impl DiskServer {
    /// Serves each disk under its name, and the first to those who name none.
    pub fn start(
        disks: Vec<DiskReader>,
        listener: Listener,
        unreadable: Unreadable,
    ) -> io::Result<DiskServer> {
        let exports = ExportList::new(disks.iter().map(export).collect()).map_err(io::Error::other)?;
        let exports = Arc::new(exports.with_first_as_default());
        let readers = Readers::new(exports, listener, LIMITS, MAX_CLIENTS)?;
        let shared = Arc::new(Shared { wake: Wake::new()?, ends: AtomicBool::new(false) });
        readers.watch(&shared.wake, KEY_WAKE)?;
        let disks: Arc<[DiskReader]> = disks.into();
        let (questions, asked) = mpsc::channel::<Asked>();
        let (answered, answers) = mpsc::channel();
        let asked = Arc::new(Mutex::new(asked));
        for _ in 0..READERS {
            let (disks, asked, answered) = (disks.clone(), asked.clone(), answered.clone());
            let shared = shared.clone();
            std::thread::Builder::new().name("point-read".into()).spawn(move || {
                loop {
                    let next = asked.lock().expect("no holder panics").recv();
                    let Ok(Asked { client, export, id, offset, length, wanted }) = next else { return };
                    let answer = answer(&disks[export], offset, length, wanted);
                    if answered.send(Answered { client, id, answer }).is_err() {
                        return;
                    }
                    shared.wake.wake();
                }
            })?;
        }
        let connections =
            Connections { shared: shared.clone(), readers, disks, questions, answers, unreadable };
        let thread = std::thread::Builder::new().name("point-nbd".into()).spawn(move || connections.run())?;
        Ok(DiskServer { shared, thread: Some(thread) })
    }
}

impl Drop for DiskServer {
    /// Connections end. Who still reads for one of them is not waited for: a place may take its time.
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Release);
        self.shared.wake.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn export(disk: &DiskReader) -> Export {
    // A file that was backed up may be of any length.
    let minimum = if disk.size().is_multiple_of(SECTOR_SIZE) { SECTOR_SIZE as u32 } else { 1 };
    Export {
        read_only: true,
        contexts: vec![BASE_ALLOCATION.to_owned()],
        block_sizes: BlockSizes { minimum, ..BlockSizes::default() },
        ..Export::new(disk.name(), disk.size())
    }
}

fn answer(disk: &DiskReader, offset: u64, len: u64, wanted: Wanted) -> Result<Answer, ReadError> {
    match wanted {
        Wanted::Read => disk.read(offset, len).map(Answer::Read),
        Wanted::BlockStatus { contexts } => {
            let flags = |is_data| if is_data { 0 } else { STATE_HOLE | STATE_ZERO };
            let runs = disk.allocation(offset, len)?;
            let extents = runs.iter().map(|run| Extent { length: run.len, flags: flags(run.is_data) });
            Ok(Answer::Status(contexts, extents.collect()))
        }
    }
}

impl Connections {
    fn run(mut self) {
        loop {
            let ready = match self.readers.wait(None) {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "a restore point is served no more");
                    return;
                }
            };
            if ready.contains(&KEY_WAKE) {
                self.shared.wake.reset();
                if self.shared.ends.load(Ordering::Acquire) {
                    return;
                }
                while let Ok(answered) = self.answers.try_recv() {
                    self.reply(answered);
                }
            }
            loop {
                while let Some(asked) = self.readers.next_asked() {
                    self.take(asked);
                }
                if !self.readers.send() {
                    break;
                }
            }
        }
    }

    fn take(&mut self, asked: Asked) {
        let disk = &self.disks[asked.export];
        if matches!(asked.wanted, Wanted::Read)
            && let Some(pieces) = disk.read_cached(asked.offset, asked.length)
        {
            if let Some(session) = self.readers.session(asked.client) {
                session.reply_read(asked.id, pieces);
            }
            return;
        }
        let sent = self.questions.send(asked);
        assert!(sent.is_ok(), "the threads that read wait for as long as this one is there");
    }

    fn reply(&mut self, Answered { client, id, answer }: Answered) {
        if let Err(error) = &answer {
            (self.unreadable)(error);
        }
        // Whoever wanted it may have left.
        let Some(session) = self.readers.session(client) else { return };
        match answer {
            Ok(Answer::Read(pieces)) => session.reply_read(id, pieces),
            Ok(Answer::Status(contexts, extents)) => {
                let status = |&context: &ContextIndex| ContextStatus { context, extents: &extents };
                session.reply_block_status(id, &contexts.iter().map(status).collect::<Vec<_>>());
            }
            Err(error) => session.reply_error(id, ErrorCode::Io, &error.to_string()),
        }
    }
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connections").field("readers", &self.readers).finish_non_exhaustive()
    }
}

//! The server: a thread a connection, each with a non-blocking socket as a real one has.

use super::disk::Disk;
use rempart_nbd::server::{Command, ContextStatus, Event, Extent, Limits, RequestId, Session, TlsPolicy};
use rempart_nbd::{BASE_ALLOCATION, ErrorCode, Export, ExportList, HeaderStyle};
use rustix::event::{PollFd, PollFlags, poll};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

pub const CHANGED: &str = "rempart:changed/since-start";

pub struct Setup {
    pub exports: Vec<Export>,
    pub disks: Vec<Arc<Disk>>,
    pub limits: Limits,
    pub tls: Option<(TlsPolicy, Arc<ServerConfig>)>,
}

impl Setup {
    /// `disk0` of so many bytes, with contexts.
    pub fn one(size: u64) -> Setup {
        Setup::several(&[size])
    }

    pub fn several(sizes: &[u64]) -> Setup {
        let export = |(index, &size): (usize, &u64)| {
            let mut export = Export::new(format!("disk{index}"), size);
            export.description = format!("disk {index} of a test");
            export.contexts = vec![BASE_ALLOCATION.into(), CHANGED.into()];
            export
        };
        let exports = sizes.iter().enumerate().map(export).collect();
        let disks = sizes.iter().map(|&size| Arc::new(Disk::new(size))).collect();
        Setup { exports, disks, limits: Limits::default(), tls: None }
    }

    pub fn serve(self) -> Server {
        Server::start(self)
    }
}

/// What connections were like.
#[derive(Debug, Default)]
pub struct Seen {
    pub connections: AtomicUsize,
    pub attached: AtomicUsize,
    pub styles: Mutex<Vec<HeaderStyle>>,
    pub encrypted: AtomicUsize,
    pub problems: Mutex<Vec<String>>,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

pub struct Server {
    directory: tempfile::TempDir,
    pub disks: Vec<Arc<Disk>>,
    pub seen: Arc<Seen>,
    pub port: u16,
    stopping: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    fn start(setup: Setup) -> Server {
        let directory = tempfile::tempdir().unwrap();
        let mut port = 0;
        let listener = if setup.tls.is_some() {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            port = listener.local_addr().unwrap().port();
            Listener::Tcp(listener)
        } else {
            Listener::Unix(UnixListener::bind(directory.path().join("socket")).unwrap())
        };
        let (seen, stopping) = (Arc::new(Seen::default()), Arc::new(AtomicBool::new(false)));
        let exports = Arc::new(ExportList::new(setup.exports).unwrap());
        let disks = setup.disks.clone();
        let acceptor = thread::spawn({
            let (seen, stopping) = (seen.clone(), stopping.clone());
            move || {
                let mut threads = Vec::new();
                loop {
                    let socket: Box<dyn Socket> = match &listener {
                        Listener::Unix(listener) => Box::new(listener.accept().unwrap().0),
                        Listener::Tcp(listener) => Box::new(listener.accept().unwrap().0),
                    };
                    if stopping.load(Ordering::SeqCst) {
                        break;
                    }
                    seen.connections.fetch_add(1, Ordering::SeqCst);
                    let policy = setup.tls.as_ref().map_or(TlsPolicy::Refused, |(policy, _)| *policy);
                    let mut connection = Connection {
                        socket: Some(socket),
                        tls: setup.tls.as_ref().map(|(_, config)| config.clone()),
                        session: Session::new(exports.clone(), policy, setup.limits),
                        disks: setup.disks.clone(),
                        export: 0,
                        streaming: None,
                        seen: seen.clone(),
                    };
                    threads.push(thread::spawn(move || {
                        if let Err(problem) = connection.run() {
                            connection.seen.problems.lock().unwrap().push(problem);
                        }
                    }));
                }
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            }
        });
        Server { directory, disks, seen, port, stopping, acceptor: Some(acceptor) }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// A place for files of the test.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The export `disk<index>` as tools name it.
    pub fn uri(&self, index: usize) -> String {
        format!("nbd+unix:///disk{index}?socket={}", self.socket().display())
    }

    /// Nothing a client did was wrong.
    pub fn assert_no_problems(&self) {
        let problems = self.seen.problems.lock().unwrap();
        assert!(problems.is_empty(), "the server dropped connections: {problems:?}");
    }

    pub fn styles(&self) -> Vec<HeaderStyle> {
        self.seen.styles.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        if self.port == 0 {
            let _ = UnixStream::connect(self.socket());
        } else {
            let _ = TcpStream::connect(("127.0.0.1", self.port));
        }
        let joined = self.acceptor.take().unwrap().join();
        if !thread::panicking() {
            joined.expect("the server's threads do not panic");
        }
    }
}

pub trait Socket: Read + Write + Send {
    fn handle(&self) -> BorrowedFd<'_>;
    fn make_non_blocking(&self);
}

macro_rules! socket {
    ($name:ty) => {
        impl Socket for $name {
            fn handle(&self) -> BorrowedFd<'_> {
                self.as_fd()
            }
            fn make_non_blocking(&self) {
                self.set_nonblocking(true).unwrap();
            }
        }
    };
}
socket!(UnixStream);
socket!(TcpStream);

impl Socket for StreamOwned<ServerConnection, Box<dyn Socket>> {
    fn handle(&self) -> BorrowedFd<'_> {
        self.sock.handle()
    }
    fn make_non_blocking(&self) {}
}

/// A large write whose payload is arriving.
struct Streaming {
    id: RequestId,
    offset: u64,
    fua: bool,
    payload: Vec<u8>,
    filled: usize,
}

struct Connection {
    /// Absent while TLS is put on top of it, and if that failed.
    socket: Option<Box<dyn Socket>>,
    tls: Option<Arc<ServerConfig>>,
    session: Session,
    disks: Vec<Arc<Disk>>,
    export: usize,
    streaming: Option<Streaming>,
    seen: Arc<Seen>,
}

impl Connection {
    fn run(&mut self) -> Result<(), String> {
        self.socket.as_ref().unwrap().make_non_blocking();
        loop {
            if let Err(error) = self.take_events() {
                // Error replies that are queued already may still tell the client why.
                if let Some(socket) = &mut self.socket {
                    let _ = self.session.send_to(socket);
                }
                return Err(error);
            }
            let socket = self.socket.as_mut().unwrap();
            let unsent = match self.session.send_to(socket).and_then(|()| socket.flush()) {
                Ok(()) => self.session.queued_output() > 0,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
                Err(_) => return Ok(()),
            };
            if self.session.is_finished() {
                return Ok(());
            }
            if !self.session.wants_input() {
                self.wait(PollFlags::OUT);
                continue;
            }
            match self.receive() {
                Ok(0) => return self.session.end_of_input().map_err(|error| error.to_string()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(if unsent { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN });
                }
                Err(_) => return Ok(()),
            }
        }
    }

    fn wait(&self, interest: PollFlags) {
        let socket = self.socket.as_ref().unwrap().handle();
        let _ = poll(&mut [PollFd::new(&socket, interest)], None);
    }

    fn receive(&mut self) -> io::Result<usize> {
        let socket = self.socket.as_mut().unwrap();
        if self.session.direct_remaining() == 0 {
            return self.session.receive_from(socket);
        }
        let streaming = self.streaming.as_mut().unwrap();
        let count = socket.read(&mut streaming.payload[streaming.filled..])?;
        streaming.filled += count;
        self.session.received_direct(count);
        Ok(count)
    }

    fn take_events(&mut self) -> Result<(), String> {
        loop {
            if self.session.direct_remaining() == 0
                && let Some(streaming) = self.streaming.take()
            {
                let disk = &self.disks[self.export];
                disk.write(streaming.offset, &streaming.payload);
                disk.streamed_writes.fetch_add(1, Ordering::SeqCst);
                count_durable(disk, streaming.fua);
                self.session.reply_ok(streaming.id);
            }
            let Some(event) = self.session.next_event().map_err(|error| error.to_string())? else {
                return Ok(());
            };
            let request = match event {
                Event::StartTls => {
                    self.start_tls().map_err(|error| error.to_string())?;
                    continue;
                }
                Event::Attached { export } => {
                    self.export = export;
                    self.seen.attached.fetch_add(1, Ordering::SeqCst);
                    self.seen.styles.lock().unwrap().push(self.session.header_style());
                    self.seen.encrypted.fetch_add(usize::from(self.session.is_encrypted()), Ordering::SeqCst);
                    continue;
                }
                Event::Disconnected => continue,
                Event::Request(request) => request,
            };
            let disk = self.disks[self.export].clone();
            let (id, offset, length, fua) = (request.id, request.offset, request.length, request.fua);
            match request.command {
                Command::WriteStreaming { .. } if disk.is_broken() => {
                    self.session.discard_payload();
                    self.session.reply_error(id, ErrorCode::Io, "the disk is broken");
                }
                _ if disk.is_broken() => self.session.reply_error(id, ErrorCode::Io, "the disk is broken"),
                Command::Read if length <= 4096 => {
                    let fill = |buffer: &mut [u8]| {
                        disk.read_into(offset, buffer);
                        Ok::<(), ()>(())
                    };
                    self.session.reply_read_with(id, fill).unwrap();
                }
                Command::Read => self.session.reply_read(id, disk.read(offset, length)),
                Command::Write { payload } => {
                    disk.write(offset, payload);
                    count_durable(&disk, fua);
                    self.session.reply_ok(id);
                }
                Command::WriteStreaming { already, .. } => {
                    let mut payload = vec![0; length as usize];
                    payload[..already.len()].copy_from_slice(already);
                    self.streaming = Some(Streaming { id, offset, fua, filled: already.len(), payload });
                }
                Command::Flush => {
                    disk.flushes.fetch_add(1, Ordering::SeqCst);
                    self.session.reply_ok(id);
                }
                Command::Trim => {
                    disk.zero(offset, length, false);
                    self.session.reply_ok(id);
                }
                // As a disk that cannot zero and allocate at once in a hurry.
                Command::WriteZeroes { no_hole: true, fast: true } => {
                    self.session.reply_error(id, ErrorCode::NotSupported, "this would not be fast");
                }
                Command::WriteZeroes { no_hole, .. } => {
                    disk.zero(offset, length, no_hole);
                    count_durable(&disk, fua);
                    self.session.reply_ok(id);
                }
                Command::BlockStatus { contexts, .. } => {
                    let extents = |&context: &usize| -> (usize, Vec<Extent>) {
                        match context {
                            0 => (0, disk.allocation(offset, length)),
                            _ => (context, disk.changes(offset, length)),
                        }
                    };
                    let found: Vec<_> = contexts.iter().map(extents).collect();
                    let statuses: Vec<_> = found
                        .iter()
                        .map(|(context, extents)| ContextStatus { context: *context, extents })
                        .collect();
                    self.session.reply_block_status(id, &statuses);
                }
                Command::Cache => self.session.reply_ok(id),
            }
        }
    }

    fn start_tls(&mut self) -> io::Result<()> {
        let mut socket = self.socket.take().unwrap();
        while self.session.queued_output() > 0 {
            self.session.send_to(&mut socket)?;
        }
        let config = self.tls.clone().expect("TLS is offered only where it is set up");
        let mut connection = ServerConnection::new(config).map_err(io::Error::other)?;
        while connection.is_handshaking() {
            let waiting = match connection.complete_io(&mut socket) {
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => connection.wants_write(),
                Err(error) => return Err(error),
            };
            let interest = if waiting { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            poll(&mut [PollFd::new(&socket.handle(), interest)], None)?;
        }
        self.socket = Some(Box::new(StreamOwned::new(connection, socket)));
        self.session.tls_established();
        Ok(())
    }
}

fn count_durable(disk: &Disk, fua: bool) {
    disk.durable_writes.fetch_add(usize::from(fua), Ordering::SeqCst);
}

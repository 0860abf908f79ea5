//! A disk that an NBD server shows.

use super::{Reader, Source, SourceError};
use crate::ChunkSet;
use rempart_nbd::client::{Answer, Client, ClientError, Command, ConnectOptions, Cookie};
use rempart_nbd::{BASE_ALLOCATION, STATE_ZERO};
use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A server that does not answer for so long is gone.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of one request. Server and disk are the guest's, too, whose own requests wait behind each of these.
const REQUEST: u64 = 256 << 10;
/// Bytes that all readers of a disk have in flight, or one request each, where a guest's own requests go through the same
/// server: enough for a fast disk, and what they find in front of them is soon done.
const GENTLY: u64 = 1 << 20;
/// And where they do not. Of a slow disk scattered chunks are read at once.
const MOST: u64 = 16 << 20;
/// Bytes whose status is asked for at once.
const STATUS: u64 = 1 << 30;

/// Where a disk is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdEndpoint {
    pub socket: PathBuf,
    pub export: String,
}

impl NbdEndpoint {
    pub(crate) fn shown(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.export, self.socket.display())
    }

    pub(crate) fn connect(&self, contexts: &[&str]) -> Result<Client<UnixStream>, SourceError> {
        let mut options = ConnectOptions::new(&self.export);
        options.timeout = TIMEOUT;
        options.contexts = contexts.iter().map(|&context| context.to_owned()).collect();
        Client::connect_unix(&self.socket, &options).map_err(|why| self.error("connect to", None, why))
    }

    fn error(&self, action: &'static str, offset: Option<u64>, why: ClientError) -> SourceError {
        SourceError { action, disk: self.shown(), offset, source: why.into() }
    }
}

/// A disk behind NBD.
#[derive(Debug)]
pub struct NbdSource {
    endpoint: NbdEndpoint,
    size: u64,
    in_flight: InFlight,
    connections: Connections,
}

/// Of all readers of a disk.
#[derive(Debug, Clone)]
struct InFlight {
    bytes: Arc<AtomicU64>,
    most: u64,
}

impl InFlight {
    fn new(most: u64) -> InFlight {
        InFlight { bytes: Arc::default(), most }
    }
}

/// The connections of a source's readers, for who has to end them under whatever the readers do.
#[derive(Debug, Clone)]
pub struct Connections(Arc<Mutex<Option<Vec<UnixStream>>>>);

/// A reader's connection among [`Connections`].
#[derive(Debug)]
struct Registered {
    connections: Connections,
    socket: RawFd,
}

impl Connections {
    /// Ends all that there are, and lets nobody connect any more.
    ///
    /// A server that QEMU tells to end waits for whoever does not read its answers.
    pub fn end(&self) {
        let ended = self.0.lock().expect("no holder panics").take();
        for mut connection in ended.into_iter().flatten() {
            let _ = connection.shutdown(Shutdown::Both);
            // What the server has sent keeps it from seeing that until it is taken.
            let mut rest = [0; 64 << 10];
            while connection
                .read(&mut rest)
                .map_or_else(|error| error.kind() == ErrorKind::Interrupted, |read| read > 0)
            {}
        }
    }

    /// None if they were ended.
    fn register(&self, connection: &UnixStream) -> std::io::Result<Option<Registered>> {
        let connection = connection.try_clone()?;
        let socket = connection.as_raw_fd();
        let mut open = self.0.lock().expect("no holder panics");
        let Some(open) = open.as_mut() else { return Ok(None) };
        open.push(connection);
        Ok(Some(Registered { connections: self.clone(), socket }))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(open) = self.connections.0.lock().expect("no holder panics").as_mut() {
            open.retain(|connection| connection.as_raw_fd() != self.socket);
        }
    }
}

impl NbdSource {
    pub fn open(endpoint: NbdEndpoint) -> Result<NbdSource, SourceError> {
        let size = endpoint.connect(&[])?.size();
        let connections = Connections(Arc::new(Mutex::new(Some(Vec::new()))));
        Ok(NbdSource { endpoint, size, in_flight: InFlight::new(MOST), connections })
    }

    /// The disk of a guest whose own requests go through the same server.
    pub fn open_gently(endpoint: NbdEndpoint) -> Result<NbdSource, SourceError> {
        Ok(NbdSource { in_flight: InFlight::new(GENTLY), ..NbdSource::open(endpoint)? })
    }

    pub fn connections(&self) -> Connections {
        self.connections.clone()
    }

    /// The chunks of which `context` says, by its flags, that they are wanted.
    ///
    /// # Errors
    /// If the server does not offer the context: then nobody knows.
    pub fn chunks_by(
        &self,
        context: &str,
        chunk_len: u64,
        wanted: impl Fn(u64) -> bool,
    ) -> Result<ChunkSet, SourceError> {
        let mut client = self.endpoint.connect(&[context])?;
        let mut set = ChunkSet::none(self.size, chunk_len);
        let mut at = 0;
        while at < self.size {
            let part = client.map(context, at, STATUS.min(self.size - at));
            for extent in part.map_err(|why| self.endpoint.error("ask for the map of", Some(at), why))? {
                if wanted(extent.flags) {
                    set.insert_bytes(at..at + extent.length);
                }
                at += extent.length;
            }
        }
        Ok(set)
    }
}

impl Source for NbdSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn reader(&self) -> Result<Box<dyn Reader + '_>, SourceError> {
        let failed =
            |source| SourceError { action: "connect to", disk: self.endpoint.shown(), offset: None, source };
        let client = self.endpoint.connect(&[])?;
        if client.size() != self.size {
            let why = format!("it has {} bytes now, and had {}", client.size(), self.size);
            return Err(failed(why.into()));
        }
        let registered = self.connections.register(client.stream()).map_err(|e| failed(e.into()))?;
        let Some(registered) = registered else { return Err(failed("this program is told to end".into())) };
        let requests = Requests::sharing(self.in_flight.clone());
        Ok(Box::new(NbdReader { endpoint: &self.endpoint, client, requests, _registered: registered }))
    }

    fn data(&self, chunk_len: u64) -> Result<ChunkSet, SourceError> {
        if self.endpoint.connect(&[BASE_ALLOCATION])?.contexts().next().is_none() {
            return Ok(ChunkSet::all(self.size, chunk_len));
        }
        self.chunks_by(BASE_ALLOCATION, chunk_len, |flags| flags & STATE_ZERO == 0)
    }
}

struct NbdReader<'a> {
    endpoint: &'a NbdEndpoint,
    client: Client<UnixStream>,
    requests: Requests,
    _registered: Registered,
}

impl Reader for NbdReader<'_> {
    fn ahead(&mut self, ranges: &[Range<u64>]) -> Result<(), SourceError> {
        let asked = self.requests.ask_for(&mut self.client, ranges);
        asked.map_err(|why| self.endpoint.error("read", None, why))
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let read = self.requests.read(&mut self.client, offset, buffer);
        read.map_err(|(at, why)| self.endpoint.error("read", Some(at), why))
    }
}

/// What one reader asks of a server, with several requests in flight.
#[derive(Debug)]
pub(crate) struct Requests {
    /// Asked for and not read yet.
    asked: HashMap<Request, Option<Result<Vec<u8>, ClientError>>>,
    /// Those of them that the server was not told of yet.
    waiting: VecDeque<Request>,
    in_flight: HashMap<Cookie, Request>,
    in_all: InFlight,
}

/// What is asked for at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Request {
    offset: u64,
    length: u32,
}

/// The requests by which `range` is read.
fn requests(client: &Client<UnixStream>, range: Range<u64>) -> impl Iterator<Item = Request> + use<> {
    let longest = REQUEST.min(u64::from(client.export().maximum_payload()));
    let length = move |offset: &u64| longest.min(range.end - offset) as u32;
    let offsets = (range.start..range.end).step_by(longest as usize);
    offsets.map(move |offset| Request { offset, length: length(&offset) })
}

impl Default for Requests {
    fn default() -> Requests {
        Requests::sharing(InFlight::new(MOST))
    }
}

impl Requests {
    fn sharing(in_all: InFlight) -> Requests {
        Requests { asked: HashMap::new(), waiting: VecDeque::new(), in_flight: HashMap::new(), in_all }
    }

    /// Asks for ranges that will be read, each at once.
    fn ask_for(&mut self, client: &mut Client<UnixStream>, ranges: &[Range<u64>]) -> Result<(), ClientError> {
        for range in ranges {
            requests(client, range.clone()).try_for_each(|request| self.ask(client, request))?;
        }
        client.push()
    }

    /// Fills `buffer`, or tells where that failed.
    pub fn read(
        &mut self,
        client: &mut Client<UnixStream>,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), (u64, ClientError)> {
        let range = offset..offset + buffer.len() as u64;
        for request in requests(client, range.clone()) {
            self.ask(client, request).map_err(|why| (request.offset, why))?;
        }
        for request in requests(client, range) {
            let data = self.answer(client, request).map_err(|why| (request.offset, why))?;
            let start = (request.offset - offset) as usize;
            buffer[start..start + data.len()].copy_from_slice(&data);
            client.recycle(data);
        }
        Ok(())
    }

    /// Unless it is asked for already.
    fn ask(&mut self, client: &mut Client<UnixStream>, request: Request) -> Result<(), ClientError> {
        self.asked.entry(request).or_insert_with(|| {
            self.waiting.push_back(request);
            None
        });
        self.submit(client)
    }

    /// Tells the server of what waits, as far as there is room; one request there may always be.
    fn submit(&mut self, client: &mut Client<UnixStream>) -> Result<(), ClientError> {
        while let Some(&request) = self.waiting.front() {
            let Request { offset, length } = request;
            let others = self.in_all.bytes.fetch_add(u64::from(length), Ordering::Relaxed);
            if others + u64::from(length) > self.in_all.most && !self.in_flight.is_empty() {
                self.in_all.bytes.fetch_sub(u64::from(length), Ordering::Relaxed);
                return Ok(());
            }
            self.waiting.pop_front();
            match client.submit(Command::Read { offset, length }) {
                Ok(cookie) => self.in_flight.insert(cookie, request),
                Err(error) => {
                    self.in_all.bytes.fetch_sub(u64::from(length), Ordering::Relaxed);
                    return Err(error);
                }
            };
        }
        Ok(())
    }

    /// The answer to what was asked for.
    fn answer(&mut self, client: &mut Client<UnixStream>, request: Request) -> Result<Vec<u8>, ClientError> {
        loop {
            if let Some(Some(_)) = self.asked.get(&request) {
                return self.asked.remove(&request).flatten().expect("just seen");
            }
            let ended = client.wait()?;
            let of = self.in_flight.remove(&ended.cookie).expect("it was submitted here");
            self.in_all.bytes.fetch_sub(u64::from(of.length), Ordering::Relaxed);
            let answer = ended.result.map_err(ClientError::from).map(|answer| match answer {
                Answer::Data(data) => data,
                _ => unreachable!("a read is answered with data"),
            });
            self.asked.insert(of, Some(answer));
            self.submit(client)?;
        }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        let left: u64 = self.in_flight.values().map(|request| u64::from(request.length)).sum();
        self.in_all.bytes.fetch_sub(left, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_nbd::server::{Command, Event, Limits, Piece, RequestId, Session, TlsPolicy};
    use rempart_nbd::{Export, ExportList};
    use std::io::{IoSlice, Write};
    use std::os::unix::net::UnixListener;
    use std::thread::Scope;

    const SIZE: u64 = 12 << 20;
    /// A server that hears nothing for so long answers what it was asked.
    const LULL: Duration = Duration::from_millis(20);

    /// A server that answers as late as it can, and knows how much it was asked for at most.
    struct Lazy {
        directory: tempfile::TempDir,
        most: AtomicU64,
        now: AtomicU64,
    }

    impl Lazy {
        fn endpoint(&self) -> NbdEndpoint {
            NbdEndpoint { socket: self.directory.path().join("nbd"), export: "disk".to_owned() }
        }

        /// So many connections.
        fn serve<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, connections: usize) {
            let listener = UnixListener::bind(self.endpoint().socket).unwrap();
            scope.spawn(move || {
                for _ in 0..connections {
                    let (stream, _) = listener.accept().unwrap();
                    scope.spawn(move || self.serve_one(stream));
                }
            });
        }

        fn serve_one(&self, mut stream: UnixStream) {
            let exports = ExportList::new(vec![Export::new("disk", SIZE)]).unwrap();
            let mut session = Session::new(Arc::new(exports), TlsPolicy::Refused, Limits::default());
            let mut asked: Vec<(RequestId, u64, u64)> = Vec::new();
            stream.set_read_timeout(Some(LULL)).unwrap();
            loop {
                while session.queued_output() > 0 {
                    let mut slices = [IoSlice::new(&[]); 5];
                    let filled = session.output_slices(&mut slices);
                    let Ok(sent) = stream.write_vectored(&slices[..filled]) else { return };
                    session.sent(sent);
                }
                match stream.read(session.recv_space()) {
                    Ok(0) => return,
                    Ok(received) => session.received(received),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        for (id, offset, length) in asked.drain(..) {
                            self.now.fetch_sub(length, Ordering::SeqCst);
                            let content = vec![(offset / REQUEST) as u8; length as usize];
                            session.reply_read(id, [Piece::Data(content.into())]);
                        }
                    }
                    Err(_) => return,
                }
                while let Some(event) = session.next_event().unwrap() {
                    if let Event::Request(request) = event {
                        assert!(matches!(request.command, Command::Read));
                        let now = self.now.fetch_add(request.length, Ordering::SeqCst) + request.length;
                        self.most.fetch_max(now, Ordering::SeqCst);
                        asked.push((request.id, request.offset, request.length));
                    }
                }
            }
        }
    }

    fn lazy() -> Lazy {
        let directory = tempfile::tempdir().unwrap();
        Lazy { directory, most: AtomicU64::new(0), now: AtomicU64::new(0) }
    }

    #[test]
    fn all_readers_together_keep_little_in_flight() {
        const READERS: u64 = 3;
        let server = lazy();
        std::thread::scope(|scope| {
            server.serve(scope, 1 + READERS as usize);
            let source = NbdSource::open_gently(server.endpoint()).unwrap();
            let share = SIZE / READERS;
            let read = |number: u64| {
                let mut reader = source.reader().unwrap();
                let range = number * share..(number + 1) * share;
                reader.ahead(std::slice::from_ref(&range)).unwrap();
                let mut content = vec![0; share as usize];
                reader.read(range.start, &mut content).unwrap();
                let expected = |at: usize| ((range.start + at as u64) / REQUEST) as u8;
                assert!(content.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
            };
            std::thread::scope(|scope| {
                for number in 0..READERS {
                    scope.spawn(move || read(number));
                }
            });
            assert_eq!(source.in_flight.bytes.load(Ordering::SeqCst), 0);
        });
        let most = server.most.load(Ordering::SeqCst);
        // One request of each reader there may always be.
        assert!((GENTLY..GENTLY + READERS * REQUEST).contains(&most), "{most} bytes");
    }

    #[test]
    fn what_readers_wait_for_can_be_ended_under_them() {
        let server = lazy();
        std::thread::scope(|scope| {
            server.serve(scope, 4);
            let source = NbdSource::open_gently(server.endpoint()).unwrap();
            let connections = source.connections();
            drop(source.reader().unwrap());
            assert_eq!(connections.0.lock().unwrap().as_ref().map(Vec::len), Some(0), "it left");
            let mut reader = source.reader().unwrap();
            reader.ahead(std::slice::from_ref(&(0..SIZE))).unwrap();
            // The server may be sending, and nobody reads.
            std::thread::sleep(2 * LULL);
            connections.end();
            let error = reader.read(0, &mut vec![0; SIZE as usize]).unwrap_err();
            assert_eq!((error.action, error.offset.is_some()), ("read", true));
            drop(reader);
            let error = source.reader().err().expect("it was told to end");
            assert!(error.source.to_string().contains("told to end"), "{error}");
        });
    }
}

//! The codec on a stream: non-blocking underneath, so that a peer that stops reading or answering is
//! noticed, and so that requests and replies pass each other.

use super::codec::{Answer, Codec, Command, Completion, ContextExtents, Cookie};
use super::handshake::{ConnectOptions, ExportInfo, Handshake, Outcome};
use super::{ClientError, CommandError};
use crate::header::HeaderStyle;
use crate::server::Extent;
use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::collections::HashMap;
use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A stream in non-blocking mode, and the socket under it to wait on.
///
/// A stream that keeps written bytes back (TLS does) sends them on `flush`, and tells by `WouldBlock` from
/// it that some are left.
pub trait Stream: Read + Write {
    fn socket(&self) -> BorrowedFd<'_>;
}

impl Stream for UnixStream {
    fn socket(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

impl Stream for TcpStream {
    fn socket(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

/// The end of one request, and the time from [`Client::submit`] to it.
#[derive(Debug)]
pub struct Timed {
    pub cookie: Cookie,
    pub result: Result<Answer, CommandError>,
    pub latency: Duration,
}

/// A client on a stream.
///
/// [`Client::read`] and the like ask for one thing and wait for it. [`Client::submit`] and
/// [`Client::wait`] keep many requests in flight; the two are not to be mixed while any is.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
    codec: Codec,
    timeout: Duration,
    submitted: HashMap<Cookie, Instant>,
    /// The stream keeps written bytes back.
    unflushed: bool,
}

impl Client<UnixStream> {
    /// Connects to a unix socket and attaches to an export.
    ///
    /// # Errors
    /// If nobody listens or answers in time, or the server refuses.
    pub fn connect_unix(path: &Path, options: &ConnectOptions) -> Result<Client<UnixStream>, ClientError> {
        Client::over(unix_stream(path, options.timeout)?, options)
    }
}

impl Client<TcpStream> {
    /// Connects over TCP, in the clear, and attaches to an export.
    ///
    /// # Errors
    /// If nobody listens or answers in time, or the server refuses.
    pub fn connect_tcp(
        address: SocketAddr,
        options: &ConnectOptions,
    ) -> Result<Client<TcpStream>, ClientError> {
        const DOING: &str = "connect";
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::TimedOut => ClientError::TimedOut { doing: DOING },
            _ => ClientError::Io { doing: DOING, source },
        };
        let stream = TcpStream::connect_timeout(&address, options.timeout).map_err(failed)?;
        stream.set_nodelay(true).and_then(|()| stream.set_nonblocking(true)).map_err(failed)?;
        Client::over(stream, options)
    }
}

/// Connects within `timeout`, even to a listener whose queue is full.
fn unix_stream(path: &Path, timeout: Duration) -> Result<UnixStream, ClientError> {
    const DOING: &str = "connect";
    let failed = |errno: Errno| match errno {
        Errno::AGAIN => ClientError::TimedOut { doing: DOING },
        errno => ClientError::Io { doing: DOING, source: errno.into() },
    };
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(failed)?;
    // A unix socket's connect waits at most its send timeout.
    set_socket_timeout(&socket, Timeout::Send, Some(timeout)).map_err(failed)?;
    connect(&socket, &address).map_err(failed)?;
    rustix::io::ioctl_fionbio(&socket, true).map_err(failed)?;
    Ok(UnixStream::from(socket))
}

impl<S: Stream> Client<S> {
    /// Attaches to an export over `stream`, which is in non-blocking mode and fresh.
    ///
    /// # Errors
    /// If the server does not answer in time, or refuses.
    pub fn over(stream: S, options: &ConnectOptions) -> Result<Client<S>, ClientError> {
        Client::attach(stream, options, Handshake::attach(options))
    }

    /// Attaches to an export over a TLS stream on top of what [`start_tls`] gave back.
    ///
    /// # Errors
    /// If the server does not answer in time, or refuses.
    pub fn over_tls(stream: S, options: &ConnectOptions) -> Result<Client<S>, ClientError> {
        let mut handshake = Handshake::attach(options);
        handshake.skip_greeting();
        Client::attach(stream, options, handshake)
    }

    fn attach(
        mut stream: S,
        options: &ConnectOptions,
        handshake: Handshake,
    ) -> Result<Client<S>, ClientError> {
        let outcome = run_handshake(&mut stream, handshake, options.timeout)?;
        let codec = Codec::new(outcome);
        Ok(Client { stream, codec, timeout: options.timeout, submitted: HashMap::new(), unflushed: false })
    }

    /// What it goes over.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    pub fn export(&self) -> &ExportInfo {
        self.codec.export()
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.codec.export().size
    }

    pub fn header_style(&self) -> HeaderStyle {
        self.codec.header_style()
    }

    /// Names of the contexts that were agreed on.
    pub fn contexts(&self) -> impl Iterator<Item = &str> {
        self.codec.contexts()
    }

    pub fn in_flight(&self) -> usize {
        self.codec.in_flight()
    }

    /// Gives a read's buffer back for the next read.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        self.codec.recycle(buffer);
    }

    /// Queues a request; [`Client::wait`] sends it.
    ///
    /// # Errors
    /// `NotOffered`, if the server did not offer what this needs.
    pub fn submit(&mut self, command: Command) -> Result<Cookie, ClientError> {
        let cookie = self.codec.submit(command)?;
        self.submitted.insert(cookie, Instant::now());
        Ok(cookie)
    }

    /// Waits until a request ends. Requests end in any order.
    ///
    /// # Errors
    /// If none does within the timeout, or the connection ends. A request that the server failed is not an
    /// error here.
    ///
    /// # Panics
    /// If none is in flight.
    pub fn wait(&mut self) -> Result<Timed, ClientError> {
        assert!(self.codec.in_flight() > 0, "there is a request to wait for");
        const DOING: &str = "wait for a reply";
        let deadline = Instant::now() + self.timeout;
        loop {
            if let Some(Completion { cookie, result }) = self.codec.next_completion()? {
                let since = self.submitted.remove(&cookie).expect("it was submitted here");
                return Ok(Timed { cookie, result, latency: since.elapsed() });
            }
            let sending = self.send(DOING)?;
            match self.stream.read(self.codec.recv_space()) {
                Ok(0) => return Err(ClientError::Closed { doing: DOING }),
                Ok(count) => self.codec.received(count),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => await_ready(&self.stream, sending, deadline, DOING)?,
                    _ => return Err(failed(DOING, error)),
                },
            }
        }
    }

    /// Sends what was submitted, as much of it as the socket takes now. [`Client::wait`] sends the rest.
    pub fn push(&mut self) -> Result<(), ClientError> {
        self.send("send requests").map(drop)
    }

    /// Sends what the socket takes; says whether something is left.
    fn send(&mut self, doing: &'static str) -> Result<bool, ClientError> {
        while self.codec.queued_output() > 0 {
            let mut slices = [IoSlice::new(&[]); 64];
            let filled = self.codec.output_slices(&mut slices);
            self.unflushed = true;
            match self.stream.write_vectored(&slices[..filled]) {
                Ok(count) => self.codec.sent(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(failed(doing, error)),
            }
        }
        if self.unflushed {
            match self.stream.flush() {
                Ok(()) => self.unflushed = false,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(failed(doing, error)),
            }
        }
        Ok(self.unflushed)
    }

    fn one(&mut self, command: Command) -> Result<Answer, ClientError> {
        assert_eq!(self.codec.in_flight(), 0, "pipelined requests are waited for by `wait`");
        self.submit(command)?;
        Ok(self.wait()?.result?)
    }

    /// Reads into all of `buffer`.
    ///
    /// # Errors
    /// If the server fails the read or the connection.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ClientError> {
        let longest = self.export().maximum_payload().min(32 << 20) as usize;
        let mut at = offset;
        for part in buffer.chunks_mut(longest) {
            let Answer::Data(data) = self.one(Command::Read { offset: at, length: part.len() as u32 })?
            else {
                unreachable!("a read is answered with data");
            };
            part.copy_from_slice(&data);
            self.recycle(data);
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes all of `data`; with `fua`, durably.
    ///
    /// # Errors
    /// If the server fails the write or the connection.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), ClientError> {
        let longest = self.export().maximum_payload().min(32 << 20) as usize;
        let mut at = offset;
        for part in data.chunks(longest) {
            self.one(Command::Write { offset: at, payload: Bytes::copy_from_slice(part), fua })?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Makes durable what was acknowledged before.
    ///
    /// # Errors
    /// If the server fails the flush or the connection.
    pub fn flush(&mut self) -> Result<(), ClientError> {
        self.one(Command::Flush).map(|_| ())
    }

    /// Has `length` bytes read as zero.
    ///
    /// # Errors
    /// If the server fails it or the connection.
    pub fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<(), ClientError> {
        self.one(Command::WriteZeroes { offset, length, fua: false, no_hole: false, fast: false }).map(|_| ())
    }

    /// Tells that nobody needs these bytes any more.
    ///
    /// # Errors
    /// If the server fails it or the connection.
    pub fn trim(&mut self, offset: u64, length: u64) -> Result<(), ClientError> {
        self.one(Command::Trim { offset, length, fua: false }).map(|_| ())
    }

    /// What the agreed contexts say of the bytes from `offset` on, perhaps not as far as `length`.
    ///
    /// # Errors
    /// If the server fails it or the connection.
    pub fn block_status(&mut self, offset: u64, length: u64) -> Result<Vec<ContextExtents>, ClientError> {
        let Answer::Status(statuses) = self.one(Command::BlockStatus { offset, length, one: false })? else {
            unreachable!("a block status is answered with extents");
        };
        Ok(statuses)
    }

    /// What one context says of exactly `length` bytes from `offset` on, asking as often as it takes.
    ///
    /// # Errors
    /// If the context was not agreed on, or the server fails it or the connection.
    pub fn map(&mut self, context: &str, offset: u64, length: u64) -> Result<Vec<Extent>, ClientError> {
        if !self.contexts().any(|name| name == context) {
            return Err(ClientError::NotOffered("this context"));
        }
        // The most that a compact request can ask about, rounded to a size any server is aligned to.
        let most = if self.header_style() == HeaderStyle::Extended { u64::MAX } else { 1 << 31 };
        let (mut map, mut at, end) = (Vec::<Extent>::new(), offset, offset + length);
        while at < end {
            let wanted = (end - at).min(most);
            let statuses = self.block_status(at, wanted)?;
            let status = statuses.into_iter().find(|status| status.context == context);
            for extent in status.expect("every agreed context is answered").extents {
                let length = extent.length.min(end - at);
                at += length;
                match map.last_mut() {
                    _ if length == 0 => {}
                    Some(last) if last.flags == extent.flags => last.length += length,
                    _ => map.push(Extent { length, flags: extent.flags }),
                }
            }
        }
        Ok(map)
    }

    /// Says goodbye and waits for the server to close, which it does when all is answered.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn disconnect(mut self) -> Result<(), ClientError> {
        const DOING: &str = "disconnect";
        self.codec.disconnect();
        let deadline = Instant::now() + self.timeout;
        loop {
            while self.codec.next_completion()?.is_some() {}
            let sending = self.send(DOING)?;
            match self.stream.read(self.codec.recv_space()) {
                Ok(0) => return Ok(()),
                Ok(count) => self.codec.received(count),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => await_ready(&self.stream, sending, deadline, DOING)?,
                    // The other side may close without ceremony once it was told goodbye.
                    io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => return Ok(()),
                    _ => return Err(failed(DOING, error)),
                },
            }
        }
    }
}

/// Lists a server's exports over a fresh non-blocking stream.
///
/// # Errors
/// If the server does not answer in time, or refuses.
pub fn list_exports(stream: &mut impl Stream, timeout: Duration) -> Result<Vec<ExportInfo>, ClientError> {
    match run_handshake(stream, Handshake::list(), timeout)? {
        Outcome::Listed(exports) => Ok(exports),
        other => unreachable!("a list ends listed, not {other:?}"),
    }
}

/// Asks the server for TLS over a fresh non-blocking stream. On success put TLS on top of it, and go on with
/// [`Client::over_tls`].
///
/// # Errors
/// If the server does not answer in time, or refuses.
pub fn start_tls(stream: &mut impl Stream, timeout: Duration) -> Result<(), ClientError> {
    run_handshake(stream, Handshake::start_tls(), timeout).map(|_| ())
}

fn run_handshake(
    stream: &mut impl Stream,
    mut handshake: Handshake,
    timeout: Duration,
) -> Result<Outcome, ClientError> {
    const DOING: &str = "negotiate with the server";
    let deadline = Instant::now() + timeout;
    let (mut output, mut outcome) = (handshake.take_output(), None);
    let mut buffer = [0; 4096];
    loop {
        let mut sending = false;
        while !output.is_empty() && !sending {
            match stream.write(&output) {
                Ok(count) => drop(output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => sending = true,
                // What was sent last, an abort perhaps, need not reach a server that is done with us.
                Err(_) if outcome.is_some() => output.clear(),
                Err(error) => return Err(failed(DOING, error)),
            }
        }
        match stream.flush() {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sending = true,
            Err(_) if outcome.is_some() => {}
            Err(error) => return Err(failed(DOING, error)),
        }
        if let Some(outcome) = outcome.take_if(|_| !sending) {
            return Ok(outcome);
        }
        if outcome.is_some() {
            await_ready(stream, true, deadline, DOING)?;
            continue;
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Err(ClientError::Closed { doing: DOING }),
            Ok(count) => {
                outcome = handshake.received(&buffer[..count])?;
                output.extend(handshake.take_output());
            }
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => await_ready(stream, sending, deadline, DOING)?,
                _ => return Err(failed(DOING, error)),
            },
        }
    }
}

/// Waits until the socket has bytes, or takes some if that is wanted.
fn await_ready(
    stream: &impl Stream,
    sending: bool,
    deadline: Instant,
    doing: &'static str,
) -> Result<(), ClientError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ClientError::TimedOut { doing });
    }
    let interest = if sending { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    let socket = stream.socket();
    let mut waiting = [PollFd::new(&socket, interest)];
    let timeout = Timespec { tv_sec: left.as_secs() as _, tv_nsec: left.subsec_nanos() as _ };
    match poll(&mut waiting, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(failed(doing, errno.into())),
    }
}

fn failed(doing: &'static str, source: io::Error) -> ClientError {
    match source.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => {
            ClientError::Closed { doing }
        }
        _ => ClientError::Io { doing, source },
    }
}

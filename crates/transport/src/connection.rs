//! A connection between two replicas of a group, driven by the readiness of its socket.

use crate::frame::Frame;
use crate::hello::Hello;
use crate::pipe::Pipe;
use crate::{Compression, Error, ErrorKind, Peer};
use bytes::Bytes;
use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

/// Bytes that may wait to be sent, unless the owner sets another bound.
pub const MAX_QUEUED: usize = 64 * 1024 * 1024;
/// Bytes read at most in one call, so that one busy peer does not starve the other sockets of a thread.
const READ_AT_ONCE: usize = 4 * 1024 * 1024;

/// For what the owner should watch the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    pub readable: bool,
    pub writable: bool,
}

/// Why [`Connection::on_readable`] stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadStatus {
    /// The socket is empty; wait for it.
    Drained,
    /// There is probably more: call again, after serving others. Matters to edge-triggered owners only.
    More,
    /// The peer said it would send no more. All its frames were handed out.
    Closed,
}

/// An authenticated, greeted connection. Belongs to one thread; blocks never.
///
/// ```text
///   epoll says readable → on_readable(&mut frames) → handle the frames
///   something to say    → send(frame)…, then on_writable() once for all of them
///   after either        → interest() → tell epoll if it changed
/// ```
///
/// After an error only dropping it makes sense.
pub struct Connection {
    socket: TcpStream,
    pipe: Pipe,
    peer: Peer,
    hello: Hello,
    /// Frames that came together with the peer's greeting.
    early: VecDeque<Frame>,
    max_queued: usize,
    received: u64,
    sent: u64,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.peer)
            .field("hello", &self.hello)
            .field("queued", &self.queued_bytes())
            .finish_non_exhaustive()
    }
}

impl Connection {
    pub(crate) fn new(
        socket: TcpStream,
        mut pipe: Pipe,
        early: VecDeque<Frame>,
        peer: Peer,
        hello: Hello,
    ) -> Connection {
        pipe.greeted(Compression::Off);
        Connection { socket, pipe, peer, hello, early, max_queued: MAX_QUEUED, received: 0, sent: 0 }
    }

    /// The peer's greeting; `hello().protocol` is the version both speak.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Whether payloads sent from now on may be compressed. Received ones always may be.
    pub fn set_compression(&mut self, compression: Compression) {
        self.pipe.greeted(compression);
    }

    /// Bytes that may wait to be sent.
    pub fn set_max_queued(&mut self, bytes: usize) {
        self.max_queued = bytes;
    }

    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    pub fn interest(&self) -> Interest {
        Interest { readable: !self.pipe.peer_closed(), writable: self.pipe.wants_write() }
    }

    /// Bytes that wait to be sent, of frames and of TLS.
    pub fn queued_bytes(&self) -> usize {
        self.pipe.queued()
    }

    /// Bytes read from the socket so far: if it grows, the peer lives.
    pub fn received_bytes(&self) -> u64 {
        self.received
    }

    /// Bytes written to the socket so far.
    pub fn sent_bytes(&self) -> u64 {
        self.sent
    }

    /// Queues a frame; sends nothing yet. `QueueFull` if the bytes that wait already reached the bound
    /// (so a single frame may pass it), and then nothing is queued.
    pub fn send(&mut self, frame: Frame) -> Result<(), Error> {
        self.check_room()?;
        self.pipe.send(frame)
    }

    /// Queues a frame whose payload lies in several pieces, without gathering them.
    pub fn send_parts(&mut self, kind: u16, meta: impl Into<Bytes>, payload: &[Bytes]) -> Result<(), Error> {
        self.check_room()?;
        self.pipe.send_parts(kind, meta.into(), payload.iter().cloned())
    }

    fn check_room(&self) -> Result<(), Error> {
        if self.pipe.queued() < self.max_queued {
            return Ok(());
        }
        Err(Error::new(ErrorKind::QueueFull, "send to the peer"))
    }

    /// Encrypts and sends until nothing waits or the socket is full. Call it after [`Connection::send`] too.
    pub fn on_writable(&mut self) -> Result<(), Error> {
        let mut socket = Counted { socket: &self.socket, bytes: 0 };
        let result = self.pipe.write_to(&mut socket);
        self.sent += socket.bytes;
        result
    }

    /// Reads what is there and appends complete frames. Call it once when the connection is new: frames may be
    /// here for which the socket never becomes readable again.
    pub fn on_readable(&mut self, frames: &mut VecDeque<Frame>) -> Result<ReadStatus, Error> {
        frames.append(&mut self.early);
        let mut taken = 0;
        while taken < READ_AT_ONCE {
            let count = match self.pipe.read_from(&mut &self.socket) {
                Ok(0) if self.pipe.peer_closed() => return Ok(ReadStatus::Closed),
                Ok(0) => return Err(Error::new(ErrorKind::Closed, "read from the peer")),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(ReadStatus::Drained),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::io("read from the peer", error)),
            };
            taken += count;
            self.received += count as u64;
            let full = self.pipe.read_was_full();
            let result = self.pipe.receive(frames);
            if result.is_err() {
                // Tell the peer why, if TLS has a word for it; the error is what counts.
                let _ = self.on_writable();
            }
            result?;
            if self.pipe.peer_closed() {
                return Ok(ReadStatus::Closed);
            }
            if !full {
                return Ok(ReadStatus::Drained);
            }
        }
        Ok(ReadStatus::More)
    }

    /// Announces, after everything queued, that nothing more will come. Go on calling
    /// [`Connection::on_writable`] until [`Connection::interest`] asks no more for it.
    pub fn close(&mut self) {
        self.pipe.close();
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

struct Counted<'a> {
    socket: &'a TcpStream,
    bytes: u64,
}

impl io::Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = io::Write::write(&mut self.socket, bytes)?;
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

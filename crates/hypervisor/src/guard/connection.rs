//! One daemon's connection to a guard: lines and descriptors both ways, never waiting.

use super::protocol::{FromGuard, LONGEST_LINE, MOST_KEPT, Request, line};
use crate::lines::LineBuffer;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// A daemon that does not read this many messages is hung up on.
const MOST_UNSENT: usize = 256;

#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    lines: LineBuffer,
    received: VecDeque<OwnedFd>,
    unsent: VecDeque<Outgoing>,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let lines = LineBuffer::new(LONGEST_LINE);
        Ok(Self { stream, lines, received: VecDeque::new(), unsent: VecDeque::new() })
    }

    /// Requests that have arrived. An error means the connection is over, or not worth keeping.
    pub(super) fn receive(&mut self) -> io::Result<Vec<Request>> {
        let mut bytes = [0; 4096];
        let count = match receive_with_fds(self.stream.as_fd(), &mut bytes, &mut self.received) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        if self.received.len() > MOST_KEPT {
            return Err(io::Error::other("too many descriptors"));
        }
        self.lines.push(&bytes[..count]);
        let mut requests = Vec::new();
        while let Some(line) = self.lines.next_line().map_err(io::Error::other)? {
            requests.push(serde_json::from_slice(&line).or_else(|error| unknown_request(&line, &error))?);
        }
        Ok(requests)
    }

    /// The descriptor that came with a request.
    pub(super) fn take_fd(&mut self) -> Option<OwnedFd> {
        self.received.pop_front()
    }

    pub(super) fn send(&mut self, message: &FromGuard, fds: Vec<OwnedFd>) -> io::Result<()> {
        if self.unsent.len() >= MOST_UNSENT {
            return Err(io::Error::other("it does not read"));
        }
        self.unsent.push_back(Outgoing { bytes: line(message), sent: 0, fds });
        self.flush()
    }

    pub(super) fn wants_to_write(&self) -> bool {
        !self.unsent.is_empty()
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some(outgoing) = self.unsent.front_mut() {
            match send_with_fds(self.stream.as_fd(), &outgoing.bytes[outgoing.sent..], &outgoing.fds) {
                Ok(count) => {
                    outgoing.fds.clear();
                    outgoing.sent += count;
                    if outgoing.sent == outgoing.bytes.len() {
                        self.unsent.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A newer daemon asks for something this guard does not know: the number is enough to say no.
fn unknown_request(line: &[u8], error: &serde_json::Error) -> io::Result<Request> {
    #[derive(serde::Deserialize)]
    struct Numbered {
        id: u64,
    }
    let numbered: Numbered = serde_json::from_slice(line)?;
    let problem = error.to_string();
    Ok(Request { id: numbered.id, command: super::protocol::Command::Unknown { problem } })
}

/// Reads bytes, and the descriptors beside them. Descriptors never survive an exec.
pub(crate) fn receive_with_fds(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    fds: &mut VecDeque<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_KEPT))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut ancillary, flags)
    })?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(received.bytes)
}

/// Writes some of the bytes, with all the descriptors beside the first.
pub(crate) fn send_with_fds(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_KEPT))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    if !borrowed.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, flags)
    })?)
}

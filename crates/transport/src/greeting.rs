//! TLS handshake and greeting of a data connection, on the control plane.

use crate::frame::{Frame, kind};
use crate::hello::{Hello, Refusal};
use crate::pipe::Pipe;
use crate::{Compression, Error, ErrorKind};
use std::collections::VecDeque;
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;

/// A pipe on a socket that tokio watches.
pub(crate) struct Greeting {
    pub(crate) socket: TcpStream,
    pub(crate) pipe: Pipe,
    frames: VecDeque<Frame>,
}

impl Greeting {
    pub(crate) fn new(socket: TcpStream, pipe: Pipe) -> Greeting {
        Greeting { socket, pipe, frames: VecDeque::new() }
    }

    pub(crate) async fn handshake(&mut self) -> Result<(), Error> {
        // The first step needs no input: a client speaks first, a server was given bytes already.
        self.receive().await?;
        while self.pipe.is_handshaking() {
            self.read().await?;
        }
        self.flush().await
    }

    pub(crate) async fn send(&mut self, frame: Frame) -> Result<(), Error> {
        self.pipe.send(frame)?;
        self.flush().await
    }

    pub(crate) async fn next_frame(&mut self) -> Result<Frame, Error> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Ok(frame);
            }
            if self.pipe.peer_closed() {
                return Err(Error::new(ErrorKind::Closed, "greet the peer"));
            }
            self.read().await?;
        }
    }

    /// The answer to our greeting. The peer may send frames of any kind right behind it, so they are let in.
    pub(crate) async fn answer(&mut self) -> Result<Hello, Error> {
        self.pipe.greeted(Compression::Off);
        let frame = self.next_frame().await?;
        if frame.kind == kind::REFUSE {
            let refusal = Refusal::from_frame(&frame)?;
            return Err(Error::new(ErrorKind::Refused(refusal), "greet the peer"));
        }
        Hello::from_frame(&frame)?
            .map_err(|version| Error::new(ErrorKind::Refused(Refusal::version(version)), "greet the peer"))
    }

    /// The parts of a connection. Frames that came right behind the peer's answer are among them.
    pub(crate) fn finish(self) -> Result<(std::net::TcpStream, Pipe, VecDeque<Frame>), Error> {
        let socket = self.socket.into_std().map_err(|error| Error::io("hand over the socket", error))?;
        Ok((socket, self.pipe, self.frames))
    }

    async fn read(&mut self) -> Result<(), Error> {
        let failed = |error| Error::io("greet the peer", error);
        self.flush().await?;
        loop {
            self.socket.readable().await.map_err(failed)?;
            match self.pipe.read_from(&mut Ready(&self.socket)) {
                Ok(0) => return Err(Error::new(ErrorKind::Closed, "greet the peer")),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(failed(error)),
            }
        }
        self.receive().await
    }

    async fn receive(&mut self) -> Result<(), Error> {
        let result = self.pipe.receive(&mut self.frames);
        // Also after a failure: the alert tells the peer what was wrong.
        let flushed = self.flush().await;
        result.and(flushed)
    }

    pub(crate) async fn flush(&mut self) -> Result<(), Error> {
        loop {
            self.pipe.write_to(&mut Ready(&self.socket))?;
            if !self.pipe.has_encrypted() {
                return Ok(());
            }
            self.socket.writable().await.map_err(|error| Error::io("greet the peer", error))?;
        }
    }
}

struct Ready<'a>(&'a TcpStream);

impl io::Read for Ready<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(bytes)
    }
}

impl io::Write for Ready<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits for `work`, but not longer than `limit`.
pub(crate) async fn within<T>(
    limit: Duration,
    doing: impl FnOnce() -> String,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::new(ErrorKind::Deadline, doing())),
    }
}

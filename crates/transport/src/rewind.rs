//! A TLS stream for HTTP, on a socket of which the first bytes were read before its purpose was known.

use crate::Peer;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

/// Gives back `prefix` before it reads on.
#[derive(Debug)]
pub(crate) struct Rewind {
    prefix: Vec<u8>,
    given: usize,
    socket: TcpStream,
}

impl Rewind {
    pub(crate) fn new(socket: TcpStream, prefix: Vec<u8>) -> Rewind {
        Rewind { prefix, given: 0, socket }
    }
}

impl AsyncRead for Rewind {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.given < this.prefix.len() {
            let count = into.remaining().min(this.prefix.len() - this.given);
            into.put_slice(&this.prefix[this.given..this.given + count]);
            this.given += count;
            if this.given == this.prefix.len() {
                (this.prefix, this.given) = (Vec::new(), 0);
            }
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.socket).poll_read(cx, into)
    }
}

impl AsyncWrite for Rewind {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// A TLS stream that carries HTTP, or NBD, for tokio.
///
/// With TLS 1.3 a client learns only when it reads that the server rejected its certificate:
/// [`crate::Error::from_stream`] tells what the I/O error means.
#[derive(Debug)]
pub struct HttpStream {
    stream: Box<TlsStream<Rewind>>,
    peer: Option<Peer>,
}

impl HttpStream {
    pub(crate) fn new(stream: TlsStream<Rewind>, peer: Option<Peer>) -> HttpStream {
        HttpStream { stream: Box::new(stream), peer }
    }

    /// Whom the certificate names. `None` only while enrolling.
    pub fn peer(&self) -> Option<&Peer> {
        self.peer.as_ref()
    }
}

impl AsyncRead for HttpStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for HttpStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

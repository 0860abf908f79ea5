//! Connections others make to us. One port serves all: the first message of TLS says what is wanted.

use crate::connection::Connection;
use crate::greeting::{Greeting, within};
use crate::hello::{Hello, ProtocolVersion, Refusal, RefusalReason};
use crate::pipe::{Pipe, Side};
use crate::rewind::{HttpStream, Rewind};
use crate::socket;
use crate::tls::{Loaded, Protocol};
use crate::{Compression, Deadlines, Error, ErrorKind, Peer, Role, TlsContext};
use rustls::server::{Acceptor, UnbufferedServerConnection};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

/// Bytes of the first message at most.
const MAX_CLIENT_HELLO: usize = 64 * 1024;

/// What a connection turned out to be.
#[derive(Debug)]
pub enum Accepted {
    /// A node greets on behalf of a group: answer it.
    Data(Incoming),
    /// A member of the cluster speaks HTTP.
    Http(HttpStream),
    /// A stranger speaks HTTP: serve it the enrolment endpoint and nothing else.
    Enrolment(HttpStream),
}

/// A greeting that waits for its answer. Dropping it closes the connection.
pub struct Incoming(Box<Waiting>);

struct Waiting {
    greeting: Greeting,
    peer: Peer,
    hello: Hello,
    deadlines: Deadlines,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming")
            .field("peer", self.peer())
            .field("hello", self.hello())
            .finish_non_exhaustive()
    }
}

/// Finds out what a fresh connection is, within `deadlines.handshake`.
///
/// The peer's certificate is verified, and a data connection's greeting has been read and agrees with it.
/// Run it in a task of its own: it may take as long as the peer likes, up to the deadline.
pub async fn accept(socket: TcpStream, tls: &TlsContext, deadlines: Deadlines) -> Result<Accepted, Error> {
    let address = socket.peer_addr().map_err(|error| Error::io("accept a connection", error))?;
    let doing = || format!("accept a connection from `{address}`");
    within(deadlines.handshake, doing, async {
        socket::prepare(&socket, deadlines).map_err(|error| Error::io(doing(), error))?;
        let loaded = tls.loaded();
        let (socket, received, wanted) = first_message(socket).await?;
        match wanted {
            Protocol::Data => {
                accept_data(socket, &received, &loaded, address, deadlines).await.map(Accepted::Data)
            }
            Protocol::Http | Protocol::Enrolment => {
                let stream = TlsAcceptor::from(loaded.server(wanted))
                    .accept(Rewind::new(socket, received))
                    .await
                    .map_err(|error| Error::io(doing(), error))?;
                if wanted == Protocol::Enrolment {
                    return Ok(Accepted::Enrolment(HttpStream::new(stream.into(), None)));
                }
                let peer = loaded.peer(stream.get_ref().1.peer_certificates(), address)?;
                Ok(Accepted::Http(HttpStream::new(stream.into(), Some(peer))))
            }
        }
    })
    .await
}

/// The server's side of TLS on a connection whose protocol began in the clear, with a member of the cluster.
pub async fn accept_member(
    socket: TcpStream,
    tls: &TlsContext,
    deadlines: Deadlines,
) -> Result<HttpStream, Error> {
    let address = socket.peer_addr().map_err(|error| Error::io("accept a connection", error))?;
    let doing = || format!("accept a connection from `{address}`");
    within(deadlines.handshake, doing, async {
        socket::prepare(&socket, deadlines).map_err(|error| Error::io(doing(), error))?;
        let loaded = tls.loaded();
        let stream = TlsAcceptor::from(loaded.server(Protocol::Http))
            .accept(Rewind::new(socket, Vec::new()))
            .await
            .map_err(|error| Error::io(doing(), error))?;
        let peer = loaded.peer(stream.get_ref().1.peer_certificates(), address)?;
        Ok(HttpStream::new(stream.into(), Some(peer)))
    })
    .await
}

async fn accept_data(
    socket: TcpStream,
    received: &[u8],
    loaded: &Arc<Loaded>,
    address: SocketAddr,
    deadlines: Deadlines,
) -> Result<Incoming, Error> {
    let server = UnbufferedServerConnection::new(loaded.server(Protocol::Data))
        .map_err(|error| Error::tls("accept a connection", error))?;
    let pipe = Pipe::new(Side::Server(server), received, Compression::Off);
    let mut greeting = Greeting::new(socket, pipe);
    greeting.handshake().await?;
    let peer = loaded.peer(greeting.pipe.peer_certificates(), address)?;
    let frame = greeting.next_frame().await?;
    let refusal = match Hello::from_frame(&frame)? {
        Err(version) => Refusal::version(version),
        Ok(hello) if hello.cluster != loaded.identity.cluster => {
            Refusal::new(RefusalReason::WrongCluster, "")
        }
        Ok(hello) if peer.identity.role != Role::Node || hello.node != peer.identity.id => {
            Refusal::new(RefusalReason::WrongNode, "")
        }
        Ok(hello) => return Ok(Incoming(Box::new(Waiting { greeting, peer, hello, deadlines }))),
    };
    refuse(&mut greeting, &refusal).await?;
    Err(Error::new(ErrorKind::Refused(refusal), "accept a greeting"))
}

async fn refuse(greeting: &mut Greeting, refusal: &Refusal) -> Result<(), Error> {
    greeting.pipe.close();
    greeting.send(refusal.to_frame()).await
}

impl Incoming {
    pub fn peer(&self) -> &Peer {
        &self.0.peer
    }

    pub fn hello(&self) -> &Hello {
        &self.0.hello
    }

    /// Answers with our greeting. From then on both may send frames.
    pub async fn accept(self, ours: Hello) -> Result<Connection, Error> {
        let Waiting { mut greeting, peer, hello, deadlines } = *self.0;
        within(deadlines.handshake, || "answer a greeting".to_owned(), async move {
            let protocol = hello.protocol.min(ProtocolVersion::CURRENT).min(ours.protocol);
            greeting.send(Hello { protocol, ..ours }.to_frame()).await?;
            let (socket, pipe, early) = greeting.finish()?;
            if !early.is_empty() {
                // Who dials speaks again only when it was answered.
                return Err(Error::new(ErrorKind::BadFrame, "answer a greeting"));
            }
            Ok(Connection::new(socket, pipe, early, peer, Hello { protocol, ..hello }))
        })
        .await
    }

    /// Tells the peer why not, and closes.
    pub async fn refuse(self, refusal: Refusal) -> Result<(), Error> {
        let Waiting { mut greeting, deadlines, .. } = *self.0;
        within(deadlines.handshake, || "decline a greeting".to_owned(), async move {
            refuse(&mut greeting, &refusal).await
        })
        .await
    }
}

/// Reads the first message and keeps its bytes for whoever does the handshake.
async fn first_message(mut socket: TcpStream) -> Result<(TcpStream, Vec<u8>, Protocol), Error> {
    let failed = |error: io::Error| Error::io("read the first message", error);
    let mut acceptor = Acceptor::default();
    let mut received = Vec::new();
    let mut shown = 0;
    loop {
        while shown < received.len() {
            let mut unread = &received[shown..];
            acceptor.read_tls(&mut unread).map_err(failed)?;
            shown = received.len() - unread.len();
            match acceptor.accept() {
                Ok(Some(first)) => {
                    let wanted = wanted(first.client_hello().alpn());
                    return Ok((socket, received, wanted));
                }
                Ok(None) => {}
                Err((error, mut alert)) => {
                    let mut bytes = Vec::new();
                    // Best effort: a stranger who sends garbage may be gone already.
                    if alert.write_all(&mut bytes).is_ok() {
                        let _ = socket.write_all(&bytes).await;
                    }
                    return Err(Error::tls("read the first message", error));
                }
            }
        }
        if received.len() >= MAX_CLIENT_HELLO {
            return Err(Error::new(ErrorKind::NotOurProtocol, "read the first message"));
        }
        if socket.read_buf(&mut received).await.map_err(failed)? == 0 {
            return Err(Error::new(ErrorKind::Closed, "read the first message"));
        }
    }
}

/// An unknown wish is treated as HTTP, whose handshake then declines it in TLS's own words.
fn wanted<'a>(offered: Option<impl Iterator<Item = &'a [u8]>>) -> Protocol {
    let known = [Protocol::Data, Protocol::Enrolment];
    let mut offered = offered.into_iter().flatten();
    offered.find_map(|name| known.into_iter().find(|known| known.alpn() == name)).unwrap_or(Protocol::Http)
}

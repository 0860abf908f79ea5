//! Connections we make.

use crate::connection::Connection;
use crate::greeting::{Greeting, within};
use crate::hello::Hello;
use crate::pipe::{Pipe, Side};
use crate::pki::CaPin;
use crate::rewind::{HttpStream, Rewind};
use crate::socket;
use crate::tls::{Protocol, server_name};
use crate::{ClusterId, Compression, Deadlines, Error, ErrorKind, Identity, TlsContext};
use rustls::client::UnbufferedClientConnection;
use std::net::SocketAddr;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Connects to the data plane of the node `hello` is meant for, and greets it.
///
/// Errors to expect: `Deadline`, `Io` (refused, unreachable), `WrongCluster`, `Certificate…` (theirs, or ours if
/// [`Error::reported_by_peer`]), `WrongPeer`, `Refused`.
pub async fn dial_data(
    address: SocketAddr,
    tls: &TlsContext,
    expected: Identity,
    hello: Hello,
    deadlines: Deadlines,
) -> Result<Connection, Error> {
    let doing = || format!("connect to `{address}`");
    within(deadlines.handshake, doing, async {
        let socket = connect(address, deadlines).await?;
        let loaded = tls.loaded();
        let client = UnbufferedClientConnection::new(loaded.data_client(), server_name(expected.cluster))
            .map_err(|error| Error::tls(doing(), error))?;
        let mut greeting = Greeting::new(socket, Pipe::new(Side::Client(client), &[], Compression::Off));
        greeting.handshake().await?;
        if greeting.pipe.alpn() != Some(Protocol::Data.alpn()) {
            return Err(Error::new(ErrorKind::NotOurProtocol, doing()));
        }
        let peer = loaded.peer(greeting.pipe.peer_certificates(), address)?;
        if peer.identity != expected {
            return Err(wrong_peer(expected, peer.identity));
        }
        greeting.send(hello.to_frame()).await?;
        let answer = greeting.answer().await?;
        if answer.node != expected.id || answer.cluster != expected.cluster {
            return Err(Error::new(ErrorKind::WrongPeer, doing()));
        }
        let (socket, pipe, early) = greeting.finish()?;
        Ok(Connection::new(socket, pipe, early, peer, answer))
    })
    .await
}

/// Connects to the HTTP side of a node or a witness. `expected` is checked if given; the cluster always is.
pub async fn dial_http(
    address: SocketAddr,
    tls: &TlsContext,
    expected: Option<Identity>,
    deadlines: Deadlines,
) -> Result<HttpStream, Error> {
    let doing = || format!("connect to `{address}`");
    within(deadlines.handshake, doing, async {
        let socket = connect(address, deadlines).await?;
        let loaded = tls.loaded();
        let stream = TlsConnector::from(loaded.http_client())
            .connect(server_name(loaded.identity.cluster), Rewind::new(socket, Vec::new()))
            .await
            .map_err(|error| Error::io(doing(), error))?;
        let peer = loaded.peer(stream.get_ref().1.peer_certificates(), address)?;
        if let Some(expected) = expected.filter(|&expected| expected != peer.identity) {
            return Err(wrong_peer(expected, peer.identity));
        }
        Ok(HttpStream::new(stream.into(), Some(peer)))
    })
    .await
}

/// Connects to a member of a cluster we have not joined yet. It is trusted because its chain ends in the
/// authority that the token's pin names. What is sent must hold the token's secret: we show no certificate.
pub async fn dial_enrolment(
    address: SocketAddr,
    cluster: ClusterId,
    pin: CaPin,
    deadlines: Deadlines,
) -> Result<HttpStream, Error> {
    let doing = || format!("connect to `{address}`");
    within(deadlines.handshake, doing, async {
        let socket = connect(address, deadlines).await?;
        let stream = TlsConnector::from(crate::pin::client_config(pin, Protocol::Enrolment)?)
            .connect(server_name(cluster), Rewind::new(socket, Vec::new()))
            .await
            .map_err(|error| Error::io(doing(), error))?;
        Ok(HttpStream::new(stream.into(), None))
    })
    .await
}

async fn connect(address: SocketAddr, deadlines: Deadlines) -> Result<TcpStream, Error> {
    let doing = || format!("connect to `{address}`");
    let socket = TcpStream::connect(address).await.map_err(|error| Error::io(doing(), error))?;
    socket::prepare(&socket, deadlines).map_err(|error| Error::io(doing(), error))?;
    Ok(socket)
}

fn wrong_peer(expected: Identity, found: Identity) -> Error {
    Error::new(ErrorKind::WrongPeer, format!("reach {expected}")).because(format!("{found} answered"))
}

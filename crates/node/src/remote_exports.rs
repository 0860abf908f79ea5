//! The disks of the machines that this node leads, over TCP: `NAME/disk0`, `NAME/disk1` … Off unless configured, never
//! without TLS, and only for holders of a node's certificate of this cluster.
//!
//! This side answers up to and including the choice of an export, then joins the connection with the group's own
//! socket. Unless it is configured otherwise it lets nothing through that would change a disk.

use crate::node::Node;
use crate::vm::Vm;
use rempart_nbd::protocol::option::{
    ABORT, EXPORT_NAME, EXTENDED_HEADERS, GO, INFO, LIST, LIST_META_CONTEXT, SET_META_CONTEXT, STARTTLS,
    STRUCTURED_REPLY,
};
use rempart_nbd::protocol::option_reply::{
    ACK, ERR_INVALID as INVALID, ERR_TLS_REQD as TLS_REQUIRED, ERR_UNKNOWN as UNKNOWN_EXPORT,
    ERR_UNSUP as UNSUPPORTED, ERROR_BIT as ERROR, INFO as INFO_REPLY, SERVER,
};
use rempart_nbd::protocol::{
    EXTENDED_REQUEST_MAGIC, IHAVEOPT as OPTION_MAGIC, OPTION_REPLY_MAGIC as REPLY_MAGIC, REQUEST_MAGIC,
    command, command_flag, handshake_flag, transmission_flag,
};
use rempart_transport::{Deadlines, HttpStream, Role, accept_member};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;

/// Connections at once.
const MAX_CONNECTIONS: usize = 64;
/// From the greeting to the choice of an export.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(30);
/// Before a client made up its mind.
const MAX_OPTIONS: usize = 64;
/// A name and a few queries, each at most 4 KiB.
const MAX_OPTION_BYTES: u32 = 64 << 10;
/// More than any answer of ours to an option.
const MAX_REPLY_BYTES: u32 = 64 << 10;

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
/// Fixed newstyle, no zeroes.
const SERVER_FLAGS: u16 = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
const NO_ZEROES: u32 = handshake_flag::NO_ZEROES as u32;

/// Accepts until the daemon ends.
pub async fn serve(node: Arc<Node>, listener: TcpListener, writable: bool) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        let (socket, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an NBD connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let node = node.clone();
        tokio::spawn(async move {
            if let Err(error) = connection(&node, socket, writable).await {
                tracing::info!(%address, %error, "NBD connection over TCP ended");
            }
            drop(permit);
        });
    }
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

async fn connection(node: &Node, socket: TcpStream, writable: bool) -> io::Result<()> {
    let joined = async {
        let (socket, flags) = until_tls(socket).await?;
        let tls = node.tls().ok_or_else(|| wrong("this node is in no cluster"))?;
        let mut client = accept_member(socket, &tls, Deadlines::default()).await.map_err(io::Error::other)?;
        let peer = client.peer().cloned().ok_or_else(|| wrong("no certificate was shown"))?;
        if peer.identity.role != Role::Node || tls.is_revoked(&peer) {
            return Err(wrong("its certificate is not a node's"));
        }
        let joined = choose(node, &mut client, flags, writable).await?;
        Ok(joined.map(|backend| (client, backend)))
    };
    let joined = tokio::time::timeout(HANDSHAKE_DEADLINE, joined)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no export was chosen in time"))??;
    let Some((client, backend)) = joined else { return Ok(()) };
    relay(client, backend, writable).await
}

#[derive(Debug)]
struct ClientOption {
    kind: u32,
    data: Vec<u8>,
}

async fn read_option(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<ClientOption> {
    if stream.read_u64().await? != OPTION_MAGIC {
        return Err(wrong("sent no option where one was due"));
    }
    let (kind, length) = (stream.read_u32().await?, stream.read_u32().await?);
    if length > MAX_OPTION_BYTES {
        return Err(wrong("sent an option that is too long"));
    }
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await?;
    Ok(ClientOption { kind, data })
}

async fn write_option(stream: &mut (impl AsyncWrite + Unpin), kind: u32, data: &[u8]) -> io::Result<()> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).expect("bounded when it was read").to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes).await
}

async fn reply(
    stream: &mut (impl AsyncWrite + Unpin),
    option: u32,
    kind: u32,
    data: &[u8],
) -> io::Result<()> {
    let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).expect("bounded when it was made").to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes).await?;
    stream.flush().await
}

/// In the clear nothing is told but that TLS is wanted. Returns the client's flags.
async fn until_tls(mut socket: TcpStream) -> io::Result<(TcpStream, u32)> {
    socket.write_all(GREETING).await?;
    socket.write_u16(SERVER_FLAGS).await?;
    let flags = socket.read_u32().await?;
    for _ in 0..MAX_OPTIONS {
        let option = read_option(&mut socket).await?;
        match option.kind {
            STARTTLS if option.data.is_empty() => {
                reply(&mut socket, STARTTLS, ACK, &[]).await?;
                return Ok((socket, flags));
            }
            STARTTLS => reply(&mut socket, STARTTLS, INVALID, &[]).await?,
            ABORT => {
                reply(&mut socket, ABORT, ACK, &[]).await?;
                return Err(wrong("gave up"));
            }
            // It knows no answer but an export.
            EXPORT_NAME => return Err(wrong("wants no TLS")),
            kind => reply(&mut socket, kind, TLS_REQUIRED, b"this server speaks TLS only").await?,
        }
    }
    Err(wrong("did not start TLS"))
}

/// The group's own server, told what the client said so far.
struct Backend {
    stream: UnixStream,
    vm: String,
}

/// Answers options until an export is entered. `None`: the client left.
async fn choose(
    node: &Node,
    client: &mut HttpStream,
    flags: u32,
    writable: bool,
) -> io::Result<Option<UnixStream>> {
    let mut backend: Option<Backend> = None;
    // Said before an export was named, in this order.
    let mut settings: Vec<u32> = Vec::new();
    for _ in 0..MAX_OPTIONS {
        let option = read_option(client).await?;
        match option.kind {
            ABORT => {
                reply(client, ABORT, ACK, &[]).await?;
                return Ok(None);
            }
            LIST if option.data.is_empty() => {
                for name in exports(node).into_keys() {
                    let mut data = u32::try_from(name.len()).expect("names are short").to_be_bytes().to_vec();
                    data.extend_from_slice(name.as_bytes());
                    reply(client, LIST, SERVER, &data).await?;
                }
                reply(client, LIST, ACK, &[]).await?;
            }
            kind @ (STRUCTURED_REPLY | EXTENDED_HEADERS) if option.data.is_empty() && backend.is_none() => {
                settings.push(kind);
                reply(client, kind, ACK, &[]).await?;
            }
            EXPORT_NAME | INFO | GO | LIST_META_CONTEXT | SET_META_CONTEXT => {
                let Some((name, rest)) = named(&option) else {
                    if option.kind == EXPORT_NAME {
                        return Err(wrong("named an export that is no text"));
                    }
                    reply(client, option.kind, INVALID, &[]).await?;
                    continue;
                };
                let Some((vm, disk)) = exports(node).remove(&name) else {
                    if option.kind == EXPORT_NAME {
                        return Err(wrong("named an export that is not there"));
                    }
                    reply(client, option.kind, UNKNOWN_EXPORT, b"there is no such export on this node")
                        .await?;
                    continue;
                };
                // Contexts are chosen for the export that is entered: another machine's are worth nothing.
                if backend.as_ref().is_none_or(|backend| backend.vm != vm.name()) {
                    let stream = dial(&vm, flags, &settings).await?;
                    backend = Some(Backend { stream, vm: vm.name() });
                }
                let stream = &mut backend.as_mut().expect("just made").stream;
                if option.kind == EXPORT_NAME {
                    write_option(stream, EXPORT_NAME, disk.as_bytes()).await?;
                    enter_by_name(client, stream, flags, writable).await?;
                    return Ok(backend.map(|backend| backend.stream));
                }
                let mut data = u32::try_from(disk.len()).expect("names are short").to_be_bytes().to_vec();
                data.extend_from_slice(disk.as_bytes());
                data.extend_from_slice(rest);
                write_option(stream, option.kind, &data).await?;
                let entered = pass_replies(stream, client, writable).await?;
                if entered && option.kind == GO {
                    return Ok(backend.map(|backend| backend.stream));
                }
            }
            kind => reply(client, kind, UNSUPPORTED, &[]).await?,
        }
    }
    Err(wrong("cannot make up its mind"))
}

/// The export that an option names, and what follows the name.
fn named(option: &ClientOption) -> Option<(String, &[u8])> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
    if option.kind == EXPORT_NAME {
        return Some((text(&option.data)?, &[]));
    }
    let (length, rest) = option.data.split_first_chunk::<4>()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
    Some((text(name)?, rest))
}

/// What can be served here now, by name; with the name the group gives it.
fn exports(node: &Node) -> BTreeMap<String, (Arc<Vm>, String)> {
    let mut exports = BTreeMap::new();
    for vm in node.vms().into_iter().filter(|vm| vm.group.status.borrow().serves()) {
        for disk in vm.with_record(|record| record.disks.iter().map(|disk| disk.index).collect::<Vec<_>>()) {
            let name = crate::group::export_name(disk);
            exports.insert(format!("{}/{name}", vm.name()), (vm.clone(), name));
        }
    }
    exports
}

async fn dial(vm: &Vm, flags: u32, settings: &[u32]) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(vm.paths.nbd_socket()).await?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await?;
    stream.write_u32(flags).await?;
    for &setting in settings {
        write_option(&mut stream, setting, &[]).await?;
        let (_, kind, _) = read_reply(&mut stream).await?;
        if kind != ACK {
            return Err(wrong("asked for what cannot be combined"));
        }
    }
    Ok(stream)
}

async fn read_reply(stream: &mut UnixStream) -> io::Result<(u32, u32, Vec<u8>)> {
    let magic = stream.read_u64().await?;
    let (option, kind, length) =
        (stream.read_u32().await?, stream.read_u32().await?, stream.read_u32().await?);
    if magic != REPLY_MAGIC || length > MAX_REPLY_BYTES {
        return Err(wrong("our own server answers strangely"));
    }
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await?;
    Ok((option, kind, data))
}

/// Passes on all replies to one option. True when it was granted.
async fn pass_replies(from: &mut UnixStream, to: &mut HttpStream, writable: bool) -> io::Result<bool> {
    loop {
        let (option, kind, mut data) = read_reply(from).await?;
        // Type 0: size and flags of the export.
        if kind == INFO_REPLY && data.len() == 12 && data[..2] == [0, 0] && !writable {
            let flags = u16::from_be_bytes([data[10], data[11]]) | transmission_flag::READ_ONLY;
            data[10..].copy_from_slice(&flags.to_be_bytes());
        }
        reply(to, option, kind, &data).await?;
        if kind == ACK || kind & ERROR != 0 {
            return Ok(kind == ACK);
        }
    }
}

/// The oldest way: no reply, only the export's size and flags.
async fn enter_by_name(
    client: &mut HttpStream,
    backend: &mut UnixStream,
    flags: u32,
    writable: bool,
) -> io::Result<()> {
    let length = if flags & NO_ZEROES == 0 { 134 } else { 10 };
    let mut entered = vec![0; length];
    backend.read_exact(&mut entered).await?;
    if !writable {
        let flags = u16::from_be_bytes([entered[8], entered[9]]) | transmission_flag::READ_ONLY;
        entered[8..10].copy_from_slice(&flags.to_be_bytes());
    }
    client.write_all(&entered).await?;
    client.flush().await
}

/// Joins both until one ends.
async fn relay(client: HttpStream, backend: UnixStream, writable: bool) -> io::Result<()> {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_backend, mut to_backend) = backend.into_split();
    let requests = async {
        match writable {
            true => copy(&mut from_client, &mut to_backend).await.map(drop),
            false => reads_only(&mut from_client, &mut to_backend).await,
        }
    };
    let replies = async {
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = from_backend.read(&mut buffer).await?;
            if count == 0 {
                return to_client.shutdown().await;
            }
            to_client.write_all(&buffer[..count]).await?;
            to_client.flush().await?;
        }
    };
    tokio::select! {
        result = requests => result,
        result = replies => result,
    }
}

/// Requests that change nothing carry no payload, so a stream of them is a stream of headers. The export was told to be
/// read-only: who sends anything else does not keep to the protocol.
async fn reads_only(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    loop {
        let mut header = [0; 32];
        match from.read_exact(&mut header[..28]).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            result => result.map(drop)?,
        }
        let magic = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
        let flags = u16::from_be_bytes([header[4], header[5]]);
        let command = u16::from_be_bytes([header[6], header[7]]);
        let length = match magic {
            REQUEST_MAGIC => 28,
            EXTENDED_REQUEST_MAGIC => 32,
            _ => return Err(wrong("sent no request where one was due")),
        };
        from.read_exact(&mut header[28..length]).await?;
        let harmless =
            matches!(command, command::READ | command::DISC | command::FLUSH | command::BLOCK_STATUS)
                && flags & command_flag::PAYLOAD_LEN == 0;
        if !harmless {
            return Err(wrong("wants to change a disk that is offered for reading"));
        }
        to.write_all(&header[..length]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_requests_that_change_nothing_pass() {
        let request = |magic: u32, flags: u16, command: u16, length: usize| {
            let mut bytes = vec![0; length];
            bytes[..4].copy_from_slice(&magic.to_be_bytes());
            bytes[4..6].copy_from_slice(&flags.to_be_bytes());
            bytes[6..8].copy_from_slice(&command.to_be_bytes());
            bytes
        };
        let good = [request(0x2560_9513, 0, 0, 28), request(0x21e4_1c71, 0, 7, 32)].concat();
        let mut passed = Vec::new();
        reads_only(&mut good.as_slice(), &mut passed).await.unwrap();
        assert_eq!(passed, good);
        // A write, a trim, zeroes, a payload, garbage, half a request.
        for bad in [
            request(0x2560_9513, 0, 1, 28),
            request(0x2560_9513, 0, 4, 28),
            request(0x21e4_1c71, 0, 6, 32),
            request(0x21e4_1c71, 1 << 5, 7, 32),
            request(1, 0, 0, 28),
        ] {
            let mut passed = Vec::new();
            assert!(reads_only(&mut bad.as_slice(), &mut passed).await.is_err(), "{bad:?}");
            assert!(passed.is_empty());
        }
    }

    #[test]
    fn names_in_options_are_taken_apart_and_garbage_is_refused() {
        let option = |kind, data: &[u8]| ClientOption { kind, data: data.to_vec() };
        assert_eq!(named(&option(EXPORT_NAME, b"a/disk0")), Some(("a/disk0".into(), &[][..])));
        assert_eq!(named(&option(GO, b"\0\0\0\x01x\0\x02")), Some(("x".into(), &b"\0\x02"[..])));
        for garbage in [&b""[..], b"\0\0", b"\0\0\0\x05abc", b"\xff\xff\xff\xffabc", b"\0\0\0\x01\xff"] {
            assert_eq!(named(&option(GO, garbage)), None, "{garbage:?}");
        }
        assert_eq!(named(&option(EXPORT_NAME, b"\xff")), None);
    }

    #[tokio::test]
    async fn an_option_that_is_none_is_refused() {
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff", b"IHAVE"] {
            assert!(read_option(&mut &garbage[..]).await.is_err());
        }
    }
}

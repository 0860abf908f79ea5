//! The group's disks over NBD, on a unix socket: `disk0`, `disk1` …
//!
//! A request takes its place in the log when it is parsed. When a connection ends, what it still has on its way into
//! the log is finished before anything that came after it is served: QEMU sends its requests again on a new
//! connection, and an old write that landed behind a newer one would undo it.

use super::block_status::{self, Images, LIVE_CONTEXTS, Moment};
use rempart_engine::{DiskRange, Engine, GuestError, ReadPiece, Reply, Token, WriteBuffer};
use rempart_nbd::poller::{Poller, Ready};
use rempart_nbd::server::{Command, ContextStatus, Event, Limits, Piece, RequestId, Session, TlsPolicy};
use rempart_nbd::{ErrorCode, Export, ExportError, ExportList};
use rempart_types::DiskIndex;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSliceMut, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

/// Connections at once; a guest has one per disk, tools one or a few.
const MAX_CLIENTS: usize = 64;
/// Receives from one client before the others get their turn.
const MAX_RECEIVES: usize = 16;

#[derive(Debug)]
pub struct NbdServer {
    listener: UnixListener,
    exports: Arc<ExportList>,
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    /// Keys below this are the poller's other users.
    first_key: u64,
    pending: PendingRequests,
    /// Writes of closed connections that are still on their way into the log.
    abandoned: BTreeSet<Token>,
    /// Clients with replies queued in this turn.
    dirty: Vec<u64>,
    images: Images,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    session: Session,
    disk: Option<DiskIndex>,
    streaming: Option<Streaming>,
    wants_write: bool,
    wants_read: bool,
    /// Requests wait in the session or the socket until the engine takes requests in again.
    held: bool,
    /// Requests wait until some of this client's own are answered and the answers sent.
    saturated: bool,
}

/// A large write whose payload is received straight into the log's batch.
#[derive(Debug)]
struct Streaming {
    id: RequestId,
    offset: u64,
    fua: bool,
    buffer: WriteBuffer,
    filled: usize,
}

#[derive(Debug, Default)]
struct Slot {
    /// Raised when the slot is used again, so that an old token names nothing.
    generation: u32,
    waiting: Option<(u64, RequestId)>,
}

impl Slot {
    fn token(&self, place: usize) -> Token {
        Token(u64::from(self.generation) << 32 | place as u64)
    }
}

/// Which client waits for a token.
#[derive(Debug, Default)]
struct PendingRequests {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl PendingRequests {
    fn insert(&mut self, client: u64, request: RequestId) -> Token {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).expect("requests are bounded by their sessions")
        });
        let entry = &mut self.slots[slot as usize];
        entry.waiting = Some((client, request));
        entry.token(slot as usize)
    }

    fn take(&mut self, token: Token) -> Option<(u64, RequestId)> {
        let slot = token.0 as u32;
        let entry = self.slots.get_mut(slot as usize)?;
        if u64::from(entry.generation) != token.0 >> 32 {
            return None;
        }
        let taken = entry.waiting.take()?;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(slot);
        Some(taken)
    }

    fn of_client(&self, client: u64) -> Vec<Token> {
        let belongs = |slot: &Slot| slot.waiting.is_some_and(|(owner, _)| owner == client);
        let slots = self.slots.iter().enumerate();
        slots.filter(|(_, slot)| belongs(slot)).map(|(place, slot)| slot.token(place)).collect()
    }
}

/// The exports of disks of these sizes.
fn export_list(sizes: &[u64]) -> Result<Arc<ExportList>, ExportError> {
    let exports = sizes.iter().enumerate().filter(|(_, size)| **size > 0);
    let export = |(index, &size)| {
        let contexts = LIVE_CONTEXTS.iter().map(|context| (*context).to_owned()).collect();
        Export { contexts, ..Export::new(export_name(DiskIndex(index as u16)), size) }
    };
    ExportList::new(exports.map(export).collect()).map(Arc::new)
}

/// What QEMU asks for.
pub fn export_name(disk: DiskIndex) -> String {
    format!("disk{disk}")
}

impl NbdServer {
    /// Keys from `first_key` on are this server's in the poller.
    pub fn new(listener: OwnedFd, sizes: &[u64], poller: &Poller, first_key: u64) -> io::Result<NbdServer> {
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        poller.add(&listener, first_key, false)?;
        let exports = export_list(sizes).map_err(io::Error::other)?;
        Ok(NbdServer {
            listener,
            exports,
            clients: BTreeMap::new(),
            next_client: first_key + 1,
            first_key,
            pending: PendingRequests::default(),
            abandoned: BTreeSet::new(),
            dirty: Vec::new(),
            images: Images::default(),
        })
    }

    pub fn owns(&self, key: u64) -> bool {
        key >= self.first_key
    }

    /// Disks have these sizes from now on. Whoever knows another size is hung up on: a client learns it when it connects.
    pub fn refresh(&mut self, sizes: &[u64], engine: &mut Engine, poller: &Poller) -> io::Result<()> {
        self.exports = export_list(sizes).map_err(io::Error::other)?;
        self.images.forget();
        let outdated = |client: &Client| {
            let known = client.session.attached().map(|export| export.size);
            client.disk.zip(known).is_some_and(|(disk, known)| sizes.get(usize::from(disk.0)) != Some(&known))
        };
        let outdated: Vec<u64> =
            self.clients.iter().filter(|(_, client)| outdated(client)).map(|(key, _)| *key).collect();
        for key in outdated {
            self.close(key, engine, poller);
        }
        Ok(())
    }

    /// Whether requests may be taken in: not while those of a closed connection are under way.
    fn open(&self, engine: &Engine) -> bool {
        self.abandoned.is_empty() && engine.accepts_writes()
    }

    /// Something is ready on one of this server's descriptors.
    pub fn ready(&mut self, ready: Ready, engine: &mut Engine, poller: &Poller) {
        if ready.key == self.first_key {
            self.accept(poller);
            return;
        }
        if ready.readable && self.clients.contains_key(&ready.key) {
            self.receive(ready.key, engine, poller);
        }
        if ready.writable {
            self.dirty.push(ready.key);
        }
    }

    fn accept(&mut self, poller: &Poller) {
        // Each turn takes what is there; more connections wake the poller again.
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() >= MAX_CLIENTS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let key = self.next_client;
            self.next_client += 1;
            if poller.add(&stream, key, false).is_err() {
                continue;
            }
            let session = Session::new(self.exports.clone(), TlsPolicy::Refused, Limits::default());
            let client = Client {
                stream,
                session,
                disk: None,
                streaming: None,
                wants_write: false,
                wants_read: true,
                held: false,
                saturated: false,
            };
            self.clients.insert(key, client);
            self.dirty.push(key);
        }
    }

    /// Receives and parses until the socket is empty, the client has had its turn, or requests may not be taken in.
    fn receive(&mut self, key: u64, engine: &mut Engine, poller: &Poller) {
        // What it waits for may change here, and the poller is told by whoever sends.
        self.dirty.push(key);
        let mut receives = 0;
        loop {
            if !self.parse(key, engine, poller) {
                return;
            }
            let open = self.open(engine);
            let Some(client) = self.clients.get_mut(&key) else { return };
            // The handshake may always go on.
            client.held = client.disk.is_some() && !open;
            client.saturated = !client.session.wants_input();
            // What was received is parsed: the poller tells when the socket holds more.
            if client.held || client.saturated || receives == MAX_RECEIVES {
                return;
            }
            receives += 1;
            match client.receive() {
                Ok(Received::All) => receives = MAX_RECEIVES,
                Ok(Received::Some) => {}
                Ok(Received::Nothing) => return,
                Ok(Received::End) => return self.close(key, engine, poller),
                Err(error) => {
                    tracing::debug!(%error, "NBD connection broke");
                    return self.close(key, engine, poller);
                }
            }
        }
    }

    /// Hands what was received to the engine. False when the client is gone.
    fn parse(&mut self, key: u64, engine: &mut Engine, poller: &Poller) -> bool {
        loop {
            let open = self.open(engine);
            let Some(client) = self.clients.get_mut(&key) else { return false };
            if client.disk.is_some() && !open {
                return true;
            }
            if let Some(streaming) = client.streaming.take_if(|s| s.filled == s.buffer.payload().len()) {
                let disk = client.disk.expect("a write names an export");
                let token = self.pending.insert(key, streaming.id);
                engine.write_buffer(token, disk, streaming.offset, streaming.buffer, streaming.fua);
                continue;
            }
            if client.streaming.is_some() {
                return true;
            }
            let event = match client.session.next_event() {
                Ok(Some(event)) => event,
                Ok(None) => {
                    self.dirty.push(key);
                    return true;
                }
                Err(error) => {
                    tracing::warn!(%error, "NBD client dropped");
                    self.close(key, engine, poller);
                    return false;
                }
            };
            let disk = client.disk;
            match event {
                Event::StartTls => unreachable!("TLS is not offered on a unix socket"),
                Event::Attached { .. } => {
                    // The session's own list: this server's may have changed since it connected.
                    let name = &client.session.attached().expect("it just attached").name;
                    let index = name.trim_start_matches("disk").parse().expect("exports are named by disk");
                    client.disk = Some(DiskIndex(index));
                }
                Event::Disconnected => {}
                Event::Request(request) => {
                    let disk = disk.expect("requests come after the handshake");
                    let range = DiskRange { disk, offset: request.offset, length: request.length };
                    let (id, fua) = (request.id, request.fua);
                    match request.command {
                        Command::WriteStreaming { already, remaining } => {
                            match engine.reserve(already.len() + remaining) {
                                Ok(mut buffer) => {
                                    let filled = already.len();
                                    buffer.payload_mut()[..filled].copy_from_slice(already);
                                    let offset = request.offset;
                                    client.streaming = Some(Streaming { id, offset, fua, buffer, filled });
                                }
                                Err(error) => {
                                    client.session.discard_payload();
                                    client.session.reply_error(id, error_code(error), &error.to_string());
                                }
                            }
                        }
                        Command::Write { payload } => {
                            let token = self.pending.insert(key, id);
                            engine.write(token, disk, request.offset, payload, fua);
                        }
                        Command::Read => engine.read(self.pending.insert(key, id), range),
                        Command::Flush => engine.flush(self.pending.insert(key, id)),
                        Command::Trim => engine.discard(self.pending.insert(key, id), range, fua),
                        Command::WriteZeroes { no_hole, fast: _ } => {
                            engine.write_zeroes(self.pending.insert(key, id), range, !no_hole, fua);
                        }
                        Command::BlockStatus { contexts, one: _ } => {
                            let contexts = contexts.to_vec();
                            let now = Moment { image_at: engine.applied(), since: None };
                            let runs =
                                block_status::statuses(engine, &mut self.images, range, &contexts, now);
                            let statuses: Vec<ContextStatus<'_>> = runs
                                .iter()
                                .map(|(context, extents)| ContextStatus { context: *context, extents })
                                .collect();
                            client.session.reply_block_status(id, &statuses);
                        }
                        Command::Cache => {
                            client.session.reply_error(id, ErrorCode::NotSupported, "not offered");
                        }
                    }
                }
            }
        }
    }

    /// The engine answers one request.
    pub fn reply(&mut self, token: Token, reply: Reply, engine: &mut Engine, poller: &Poller) {
        self.abandoned.remove(&token);
        let Some((key, id)) = self.pending.take(token) else { return };
        let Some(client) = self.clients.get_mut(&key) else { return };
        match reply {
            Reply::Done => client.session.reply_ok(id),
            Reply::Data(pieces) => client.session.reply_read(
                id,
                pieces.into_iter().map(|piece| match piece {
                    ReadPiece::Data(bytes) => Piece::Data(bytes),
                    ReadPiece::Zeroes(length) => Piece::Zeroes(length),
                }),
            ),
            Reply::Failed(error) => client.session.reply_error(id, error_code(error), &error.to_string()),
            Reply::Dropped => return self.close(key, engine, poller),
        }
        self.dirty.push(key);
    }

    /// Takes in what had to wait. True when something was taken.
    pub fn resume(&mut self, engine: &mut Engine, poller: &Poller) -> bool {
        if !self.open(engine) {
            return false;
        }
        let can_go_on = |client: &Client| client.held || (client.saturated && client.session.wants_input());
        let waiting: Vec<u64> =
            self.clients.iter().filter(|(_, client)| can_go_on(client)).map(|(key, _)| *key).collect();
        for &key in &waiting {
            self.receive(key, engine, poller);
        }
        !waiting.is_empty()
    }

    /// Sends what was queued in this turn.
    pub fn send(&mut self, engine: &mut Engine, poller: &Poller) {
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.sort_unstable();
        dirty.dedup();
        for &key in &dirty {
            let Some(client) = self.clients.get_mut(&key) else { continue };
            let sent = client.session.send_to(&mut client.stream);
            if sent.is_err() || client.session.is_finished() {
                self.close(key, engine, poller);
                continue;
            }
            let wants_write = client.session.queued_output() > 0;
            let wants_read = client.session.wants_input() && !client.held;
            if wants_write != client.wants_write || wants_read != client.wants_read {
                client.wants_write = wants_write;
                client.wants_read = wants_read;
                if poller.change(&client.stream, key, wants_read, wants_write).is_err() {
                    self.close(key, engine, poller);
                }
            }
        }
        dirty.clear();
        if self.dirty.is_empty() {
            self.dirty = dirty;
        }
    }

    /// Ends one connection; what it has on its way into the log is waited for.
    fn close(&mut self, key: u64, engine: &mut Engine, poller: &Poller) {
        let Some(client) = self.clients.remove(&key) else { return };
        poller.remove(&client.stream);
        let tokens = self.pending.of_client(key);
        let unfinished: BTreeSet<Token> = engine.abandon(&tokens).into_iter().collect();
        for token in tokens {
            if !unfinished.contains(&token) {
                self.pending.take(token);
            }
        }
        self.abandoned.extend(unfinished);
    }

    /// Ends every connection: this replica does not serve the guest any more.
    pub fn close_all(&mut self, engine: &mut Engine, poller: &Poller) {
        for key in self.clients.keys().copied().collect::<Vec<_>>() {
            self.close(key, engine, poller);
        }
    }
}

enum Received {
    /// The socket held no more.
    All,
    Some,
    Nothing,
    End,
}

impl Client {
    fn receive(&mut self) -> io::Result<Received> {
        let (room, result) = match &mut self.streaming {
            None => (self.session.recv_space().len(), self.session.receive_from(&mut self.stream)),
            Some(streaming) => {
                let rest = streaming.buffer.payload_mut().split_at_mut(streaming.filled).1;
                let wanted = rest.len();
                let mut slices = [IoSliceMut::new(rest), IoSliceMut::new(self.session.recv_space())];
                let room = slices.iter().map(|slice| slice.len()).sum();
                let result = self.stream.read_vectored(&mut slices);
                if let Ok(count) = result {
                    let direct = count.min(wanted);
                    streaming.filled += direct;
                    self.session.received_direct(direct);
                    self.session.received(count - direct);
                }
                (room, result)
            }
        };
        match result {
            Ok(0) => {
                if let Err(error) = self.session.end_of_input() {
                    tracing::debug!(%error, "NBD connection ended early");
                }
                Ok(Received::End)
            }
            Ok(count) if count < room => Ok(Received::All),
            Ok(_) => Ok(Received::Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Received::Some),
            Err(error) => Err(error),
        }
    }
}

fn error_code(error: GuestError) -> ErrorCode {
    match error {
        GuestError::NoSuchDisk | GuestError::Unaligned => ErrorCode::Invalid,
        GuestError::OutOfBounds => ErrorCode::NoSpace,
        GuestError::TooLarge => ErrorCode::TooLarge,
        GuestError::Disk => ErrorCode::Io,
    }
}

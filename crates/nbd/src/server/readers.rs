//! The clients of a read-only server: their sockets and sessions, on one thread. What they ask for is told to whoever
//! owns this, who answers it in any order.

use super::{Command, ContextIndex, Event, Limits, RequestId, Session, TlsPolicy};
use crate::poller::{Poller, Ready};
use crate::{ErrorCode, ExportList};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

/// Receives from one client before the others get their turn.
const MAX_RECEIVES: usize = 16;
const KEY_LISTENER: u64 = u64::MAX;
/// The owner's keys are smaller.
const KEY_FIRST_CLIENT: u64 = 1 << 32;

/// Where clients come from.
#[derive(Debug)]
pub enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Listener::Unix(listener) => listener.set_nonblocking(true),
            Listener::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    /// The connection, as what can be read and written.
    fn accept(&self) -> io::Result<File> {
        let connection: OwnedFd = match self {
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                stream.into()
            }
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                stream.into()
            }
        };
        Ok(connection.into())
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix(listener) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// A request that wants an answer through its client's [session](Readers::session).
#[derive(Debug)]
pub struct Asked {
    pub client: u64,
    pub export: usize,
    pub id: RequestId,
    pub offset: u64,
    /// In bytes, never 0.
    pub length: u64,
    pub wanted: Wanted,
}

#[derive(Debug)]
pub enum Wanted {
    Read,
    BlockStatus { contexts: Vec<ContextIndex> },
}

#[derive(Debug)]
struct Client {
    stream: File,
    session: Session,
    export: Option<usize>,
    wants_read: bool,
    wants_write: bool,
}

/// All clients of one server.
#[derive(Debug)]
pub struct Readers {
    poller: Poller,
    listener: Listener,
    exports: Arc<ExportList>,
    limits: Limits,
    most: usize,
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    asked: VecDeque<Asked>,
    gone: Vec<u64>,
    /// To be sent to, or looked at anew.
    dirty: Vec<u64>,
    ready: Vec<Ready>,
}

impl Readers {
    /// Serves at most `most` clients at once; who comes when there are so many is turned away.
    pub fn new(
        exports: Arc<ExportList>,
        listener: Listener,
        limits: Limits,
        most: usize,
    ) -> io::Result<Readers> {
        listener.set_nonblocking()?;
        let poller = Poller::new()?;
        poller.add(&listener, KEY_LISTENER, false)?;
        Ok(Readers {
            poller,
            listener,
            exports,
            limits,
            most,
            clients: BTreeMap::new(),
            next_client: KEY_FIRST_CLIENT,
            asked: VecDeque::new(),
            gone: Vec::new(),
            dirty: Vec::new(),
            ready: Vec::new(),
        })
    }

    /// Has [`wait`](Readers::wait) wait for this, too. `key` is below 2³².
    pub fn watch(&self, fd: impl AsFd, key: u64) -> io::Result<()> {
        assert!(key < KEY_FIRST_CLIENT, "the other keys are the clients'");
        self.poller.add(fd, key, false)
    }

    /// Waits, takes in what clients sent, and gives the watched keys that are readable.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Vec<u64>> {
        let mut ready = std::mem::take(&mut self.ready);
        self.poller.wait(timeout, &mut ready)?;
        let mut watched = Vec::new();
        for event in &ready {
            match event.key {
                KEY_LISTENER => self.accept(),
                key if key < KEY_FIRST_CLIENT => watched.push(key),
                key => self.client_ready(key, *event),
            }
        }
        self.ready = ready;
        Ok(watched)
    }

    /// The next request.
    pub fn next_asked(&mut self) -> Option<Asked> {
        self.asked.pop_front()
    }

    /// Clients that went away since this was asked last: nobody waits for what they asked for.
    pub fn take_gone(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.gone)
    }

    /// Where a client is answered, if it is still there.
    pub fn session(&mut self, client: u64) -> Option<&mut Session> {
        let found = self.clients.get_mut(&client)?;
        self.dirty.push(client);
        Some(&mut found.session)
    }

    /// Sends what is answered. True when there are requests again: of what is sent makes room for requests that were
    /// received already, no socket tells.
    pub fn send(&mut self) -> bool {
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.sort_unstable();
        dirty.dedup();
        for key in dirty {
            self.send_to(key);
        }
        !self.asked.is_empty()
    }

    fn accept(&mut self) {
        while let Ok(stream) = self.listener.accept() {
            if self.clients.len() >= self.most {
                continue;
            }
            let key = self.next_client;
            self.next_client += 1;
            if self.poller.add(&stream, key, false).is_err() {
                continue;
            }
            let session = Session::new(self.exports.clone(), TlsPolicy::Refused, self.limits);
            let client = Client { stream, session, export: None, wants_read: true, wants_write: false };
            self.clients.insert(key, client);
            self.dirty.push(key);
        }
    }

    fn client_ready(&mut self, key: u64, ready: Ready) {
        self.dirty.push(key);
        if !ready.readable {
            return;
        }
        for _ in 0..MAX_RECEIVES {
            let Some(client) = self.clients.get_mut(&key) else { return };
            if !client.wants_read {
                // Nothing but the connection's end is told to who does not want to read.
                return self.close(key);
            }
            if !client.session.wants_input() {
                return;
            }
            match client.session.receive_from(&mut client.stream) {
                Ok(0) => return self.close(key),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.close(key),
            }
            if !self.parse(key) {
                return;
            }
        }
    }

    /// Takes in what was received. False when the client is gone.
    fn parse(&mut self, key: u64) -> bool {
        loop {
            let Some(client) = self.clients.get_mut(&key) else { return false };
            let request = match client.session.next_event() {
                Ok(None) => return true,
                Ok(Some(Event::StartTls)) => unreachable!("TLS is not offered"),
                Ok(Some(Event::Attached { export })) => {
                    client.export = Some(export);
                    continue;
                }
                Ok(Some(Event::Disconnected)) => continue,
                Ok(Some(Event::Request(request))) => request,
                // It broke the protocol.
                Err(_) => {
                    self.close(key);
                    return false;
                }
            };
            let (id, offset, length) = (request.id, request.offset, request.length);
            let wanted = match request.command {
                Command::Read => Wanted::Read,
                Command::BlockStatus { contexts, one: _ } => {
                    Wanted::BlockStatus { contexts: contexts.to_vec() }
                }
                Command::Flush => {
                    client.session.reply_ok(id);
                    continue;
                }
                _ => {
                    client.session.reply_error(id, ErrorCode::NotPermitted, "this disk is read-only");
                    continue;
                }
            };
            let export = client.export.expect("requests come after the handshake");
            self.asked.push_back(Asked { client: key, export, id, offset, length, wanted });
        }
    }

    fn send_to(&mut self, key: u64) {
        let Some(client) = self.clients.get_mut(&key) else { return };
        if client.session.send_to(&mut client.stream).is_err() || client.session.is_finished() {
            return self.close(key);
        }
        if !self.parse(key) {
            return;
        }
        let Some(client) = self.clients.get_mut(&key) else { return };
        let (wants_read, wants_write) = (client.session.wants_input(), client.session.queued_output() > 0);
        if (wants_read, wants_write) != (client.wants_read, client.wants_write) {
            (client.wants_read, client.wants_write) = (wants_read, wants_write);
            if self.poller.change(&client.stream, key, wants_read, wants_write).is_err() {
                self.close(key);
            }
        }
    }

    fn close(&mut self, key: u64) {
        let Some(client) = self.clients.remove(&key) else { return };
        self.poller.remove(&client.stream);
        self.asked.retain(|asked| asked.client != key);
        self.gone.push(key);
    }
}

//! One view over NBD, read-only, on a unix socket of its own, by a thread of its own: what a backup does with the bytes
//! costs the group's thread nothing. That one is asked for extents, a bounded number at a time.

use super::block_status::{CHANGED_SINCE, CONTEXTS};
use super::poller::{Poller, Ready};
use super::views::{ExtentsWanted, StatusWanted, ToView, ViewInbox};
use super::{GroupHandle, ToGroup, export_name};
use rempart_engine::{Bytes, DiskRange, ViewId, ViewReadError, ViewedExtents};
use rempart_nbd::server::{Command, ContextStatus, Event, Limits, Piece, RequestId, Session, TlsPolicy};
use rempart_nbd::{ErrorCode, Export, ExportError, ExportList};
use rempart_types::{DiskIndex, EXTENT_SIZE, ExtentIndex};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

const KEY_INBOX: u64 = 0;
const KEY_LISTENER: u64 = 1;
const KEY_FIRST_CLIENT: u64 = 2;

/// Connections at once.
const MAX_CLIENTS: usize = 16;
/// Extents asked for and not here yet. The image's application and the guest's reads share the disk with them.
const MAX_READS: usize = 128;
/// Receives from one client before the others get their turn.
const MAX_RECEIVES: usize = 16;

/// A disk of the view.
#[derive(Debug, Clone, Copy)]
pub struct ViewedDisk {
    pub index: DiskIndex,
    pub size: u64,
    /// What changed since the position named when the view was opened is known.
    pub changes_known: bool,
}

#[derive(Debug)]
pub struct ViewServer {
    view: ViewId,
    disks: Vec<ViewedDisk>,
    socket: PathBuf,
    listener: UnixListener,
    exports: Arc<ExportList>,
    group: GroupHandle,
    inbox: ViewInbox,
    poller: Poller,
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    /// Requests that wait for extents, or for a status.
    jobs: BTreeMap<u64, Job>,
    next_job: u64,
    /// Extents nobody was asked for yet: of which job, and which of its parts.
    wanted: VecDeque<(u64, u32)>,
    reading: usize,
    /// Why the view can be read no more.
    lost: Option<String>,
    dirty: Vec<u64>,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    session: Session,
    disk: Option<ViewedDisk>,
    wants_read: bool,
    wants_write: bool,
}

#[derive(Debug)]
struct Job {
    client: u64,
    id: RequestId,
    range: DiskRange,
    /// Its extents, in order. Empty for a status.
    parts: Vec<Option<Part>>,
    missing: usize,
}

/// An extent, or nothing where it is zero.
type Part = Option<Bytes>;

/// What a read of `range` answers, of its extents in order: cut to the range, neighbouring zeroes together.
fn pieces(range: DiskRange, parts: Vec<Option<Part>>) -> Vec<Piece> {
    let end = range.offset + range.length;
    let mut pieces = Vec::with_capacity(parts.len());
    let mut zeroes = 0;
    for (extent, part) in (range.offset / EXTENT_SIZE..).zip(parts) {
        let start = extent * EXTENT_SIZE;
        let from = range.offset.max(start) - start;
        let to = end.min(start + EXTENT_SIZE) - start;
        match part.expect("every extent is here") {
            None => zeroes += to - from,
            Some(bytes) => {
                if zeroes > 0 {
                    pieces.push(Piece::Zeroes(std::mem::take(&mut zeroes)));
                }
                pieces.push(Piece::Data(bytes.slice(from as usize..to as usize)));
            }
        }
    }
    if zeroes > 0 {
        pieces.push(Piece::Zeroes(zeroes));
    }
    pieces
}

fn export_list(disks: &[ViewedDisk]) -> Result<Arc<ExportList>, ExportError> {
    let export = |disk: &ViewedDisk| {
        let offered = CONTEXTS.iter().filter(|context| disk.changes_known || **context != CHANGED_SINCE);
        Export {
            contexts: offered.map(|context| (*context).to_owned()).collect(),
            read_only: true,
            ..Export::new(export_name(disk.index), disk.size)
        }
    };
    ExportList::new(disks.iter().map(export).collect()).map(Arc::new)
}

impl ViewServer {
    /// Serves until the view is closed. `socket` is removed then.
    pub fn start(
        view: ViewId,
        disks: Vec<ViewedDisk>,
        (socket, listener): (PathBuf, UnixListener),
        group: GroupHandle,
        inbox: ViewInbox,
    ) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let poller = Poller::new()?;
        poller.add(inbox.wake_fd(), KEY_INBOX, false)?;
        poller.add(&listener, KEY_LISTENER, false)?;
        let server = ViewServer {
            view,
            exports: export_list(&disks).map_err(io::Error::other)?,
            disks,
            socket,
            listener,
            group,
            inbox,
            poller,
            clients: BTreeMap::new(),
            next_client: KEY_FIRST_CLIENT,
            jobs: BTreeMap::new(),
            next_job: 0,
            wanted: VecDeque::new(),
            reading: 0,
            lost: None,
            dirty: Vec::new(),
        };
        let name = format!("view-{:x}", view.0 & 0xffff_ffff);
        std::thread::Builder::new().name(name).spawn(move || {
            rempart_store::keep_no_spares();
            server.run();
        })?;
        Ok(())
    }

    fn run(mut self) {
        let mut ready: Vec<Ready> = Vec::new();
        loop {
            if let Err(error) = self.poller.wait(None, &mut ready) {
                tracing::error!(%error, "a view is served no more");
                break;
            }
            for event in &ready {
                match event.key {
                    KEY_INBOX => {
                        if !self.take_inbox() {
                            let _ = std::fs::remove_file(&self.socket);
                            return;
                        }
                    }
                    KEY_LISTENER => self.accept(),
                    key => self.client_ready(key, *event),
                }
            }
            self.ask();
            self.send();
        }
        let _ = std::fs::remove_file(&self.socket);
    }

    /// False when the view is closed.
    fn take_inbox(&mut self) -> bool {
        self.inbox.reset();
        loop {
            match self.inbox.take() {
                Ok(Some(ToView::Read { token, result })) => self.extent_read(token, result),
                Ok(Some(ToView::Status { token, statuses })) => {
                    let Some(job) = self.jobs.remove(&token) else { continue };
                    let Some(client) = self.clients.get_mut(&job.client) else { continue };
                    let statuses: Vec<ContextStatus<'_>> = statuses
                        .iter()
                        .map(|(context, extents)| ContextStatus { context: *context, extents })
                        .collect();
                    client.session.reply_block_status(job.id, &statuses);
                    self.dirty.push(job.client);
                }
                Ok(Some(ToView::Lost { why })) => {
                    self.lost = Some(why);
                    for job in self.jobs.keys().copied().collect::<Vec<_>>() {
                        self.fail(job);
                    }
                }
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() >= MAX_CLIENTS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let key = self.next_client;
            self.next_client += 1;
            if self.poller.add(&stream, key, false).is_err() {
                continue;
            }
            let session = Session::new(self.exports.clone(), TlsPolicy::Refused, Limits::default());
            let client = Client { stream, session, disk: None, wants_read: true, wants_write: false };
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
                Ok(Some(Event::StartTls)) => unreachable!("TLS is not offered on a unix socket"),
                Ok(Some(Event::Attached { export })) => {
                    client.disk = Some(self.disks[export]);
                    continue;
                }
                Ok(Some(Event::Disconnected)) => continue,
                Ok(Some(Event::Request(request))) => request,
                Err(error) => {
                    tracing::warn!(%error, "NBD client of a view dropped");
                    self.close(key);
                    return false;
                }
            };
            let disk = client.disk.expect("requests come after the handshake").index;
            let range = DiskRange { disk, offset: request.offset, length: request.length };
            let id = request.id;
            match request.command {
                Command::Read | Command::BlockStatus { .. } if self.lost.is_some() => {
                    let why = self.lost.as_deref().unwrap_or_default();
                    client.session.reply_error(id, ErrorCode::Io, &lost_text(why));
                }
                Command::Read => self.start_read(key, id, range),
                Command::BlockStatus { contexts, one: _ } => {
                    let contexts = contexts.to_vec();
                    let token = self.add(Job { client: key, id, range, parts: Vec::new(), missing: 0 });
                    let wanted = StatusWanted { token, range, contexts };
                    self.group.send(ToGroup::ViewStatus { view: self.view, wanted });
                }
                Command::Flush => client.session.reply_ok(id),
                _ => client.session.reply_error(id, ErrorCode::NotPermitted, "a view is read-only"),
            }
        }
    }

    fn add(&mut self, job: Job) -> u64 {
        self.next_job += 1;
        self.jobs.insert(self.next_job, job);
        self.next_job
    }

    fn start_read(&mut self, client: u64, id: RequestId, range: DiskRange) {
        let first = range.offset / EXTENT_SIZE;
        let extents = (range.offset + range.length).div_ceil(EXTENT_SIZE) - first;
        let extents = u32::try_from(extents).expect("a request is bounded");
        let parts = vec![None; extents as usize];
        let job = self.add(Job { client, id, range, parts, missing: extents as usize });
        self.wanted.extend((0..extents).map(|part| (job, part)));
    }

    /// Asks the group for as many extents as may be under way.
    fn ask(&mut self) {
        let mut wanted: Vec<ExtentsWanted> = Vec::new();
        while self.reading < MAX_READS
            && let Some((job, part)) = self.wanted.pop_front()
        {
            let Some(of) = self.jobs.get(&job) else { continue };
            self.reading += 1;
            let token = job << 20 | u64::from(part);
            match wanted.last_mut() {
                Some(last) if last.token + last.extents.count == token => last.extents.count += 1,
                _ => {
                    let first = ExtentIndex(of.range.offset / EXTENT_SIZE + u64::from(part));
                    let extents = ViewedExtents { disk: of.range.disk, first, count: 1 };
                    wanted.push(ExtentsWanted { token, extents });
                }
            }
        }
        if !wanted.is_empty() {
            self.group.send(ToGroup::ViewRead { view: self.view, wanted });
        }
    }

    fn extent_read(&mut self, token: u64, result: Result<Part, ViewReadError>) {
        self.reading -= 1;
        let (key, part) = (token >> 20, (token & 0xf_ffff) as usize);
        let Some(job) = self.jobs.get_mut(&key) else { return };
        match result {
            Ok(data) => {
                job.parts[part] = Some(data);
                job.missing -= 1;
                if job.missing > 0 {
                    return;
                }
                let job = self.jobs.remove(&key).expect("just seen");
                self.dirty.push(job.client);
                if let Some(client) = self.clients.get_mut(&job.client) {
                    client.session.reply_read(job.id, pieces(job.range, job.parts));
                }
            }
            Err(error) => {
                self.lost.get_or_insert_with(|| error.to_string());
                self.fail(key);
            }
        }
    }

    fn fail(&mut self, job: u64) {
        let Some(job) = self.jobs.remove(&job) else { return };
        if let Some(client) = self.clients.get_mut(&job.client) {
            let why = self.lost.as_deref().unwrap_or_default();
            client.session.reply_error(job.id, ErrorCode::Io, &lost_text(why));
            self.dirty.push(job.client);
        }
    }

    fn send(&mut self) {
        // What is sent makes room for requests that were received already, and no socket tells of them again.
        while !self.dirty.is_empty() {
            let mut dirty = std::mem::take(&mut self.dirty);
            dirty.sort_unstable();
            dirty.dedup();
            for key in dirty {
                self.send_to(key);
            }
            self.ask();
        }
    }

    fn send_to(&mut self, key: u64) {
        let Some(client) = self.clients.get_mut(&key) else { return };
        let queued = client.session.queued_output();
        if client.session.send_to(&mut client.stream).is_err() || client.session.is_finished() {
            return self.close(key);
        }
        if queued > client.session.queued_output() && !self.parse(key) {
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
        self.jobs.retain(|_, job| job.client != key);
    }
}

fn lost_text(why: &str) -> String {
    format!("the view is lost: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(offset: u64, length: u64, parts: Vec<Part>) -> Vec<String> {
        let range = DiskRange { disk: DiskIndex(0), offset, length };
        pieces(range, parts.into_iter().map(Some).collect()).iter().map(text).collect()
    }

    fn text(piece: &Piece) -> String {
        match piece {
            Piece::Zeroes(length) => format!("0x{length}"),
            Piece::Data(bytes) => format!("{}x{}", bytes[0], bytes.len()),
        }
    }

    #[test]
    fn a_reads_pieces_are_cut_to_its_range_and_zeroes_are_joined() {
        let extent = |fill: u8| Some(Bytes::from(vec![fill; EXTENT_SIZE as usize]));
        assert_eq!(read(512, 1024, vec![extent(7)]), ["7x1024"]);
        let parts = vec![extent(1), None, None, extent(2), None];
        assert_eq!(
            read(65536 - 512, 512 + 3 * 65536 + 1024, parts),
            ["1x512", "0x131072", "2x65536", "0x1024"]
        );
        // The last extent of a disk may be short.
        assert_eq!(read(65536, 4096, vec![Some(Bytes::from(vec![9; 4096]))]), ["9x4096"]);
    }
}

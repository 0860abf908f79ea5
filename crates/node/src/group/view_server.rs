//! One view over NBD, read-only, on a unix socket of its own, by a thread of its own: what a backup does with the bytes
//! costs the group's thread nothing. That one is asked for extents, a bounded number at a time.

use super::block_status::{CHANGED_SINCE, CONTEXTS};
use super::views::{ExtentsWanted, StatusWanted, ToView, ViewInbox};
use super::{GroupHandle, ToGroup, export_name};
use rempart_engine::{Bytes, DiskRange, ViewId, ViewReadError, ViewedExtents};
use rempart_nbd::server::{Asked, ContextStatus, Limits, Listener, Piece, Readers, RequestId, Wanted};
use rempart_nbd::{ErrorCode, Export, ExportError, ExportList};
use rempart_types::{DiskIndex, EXTENT_SIZE, ExtentIndex};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

const KEY_INBOX: u64 = 0;

/// Connections at once.
const MAX_CLIENTS: usize = 16;
/// Extents asked for and not here yet. The image's application and the guest's reads share the disk with them.
const MAX_READS: usize = 128;

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
    readers: Readers,
    group: GroupHandle,
    inbox: ViewInbox,
    /// Requests that wait for extents, or for a status.
    jobs: BTreeMap<u64, Job>,
    next_job: u64,
    /// Extents nobody was asked for yet: of which job, and which of its parts.
    wanted: VecDeque<(u64, u32)>,
    reading: usize,
    /// Why the view can be read no more.
    lost: Option<String>,
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
        let exports = export_list(&disks).map_err(io::Error::other)?;
        let readers = Readers::new(exports, Listener::Unix(listener), Limits::default(), MAX_CLIENTS)?;
        readers.watch(inbox.wake_fd(), KEY_INBOX)?;
        let server = ViewServer {
            view,
            disks,
            socket,
            readers,
            group,
            inbox,
            jobs: BTreeMap::new(),
            next_job: 0,
            wanted: VecDeque::new(),
            reading: 0,
            lost: None,
        };
        let name = format!("view-{:x}", view.0 & 0xffff_ffff);
        std::thread::Builder::new().name(name).spawn(move || {
            rempart_store::keep_no_spares();
            server.run();
        })?;
        Ok(())
    }

    fn run(mut self) {
        loop {
            match self.readers.wait(None) {
                Ok(ready) if ready.contains(&KEY_INBOX) && !self.take_inbox() => break,
                Ok(_) => self.turn(),
                Err(error) => {
                    tracing::error!(%error, "a view is served no more");
                    break;
                }
            }
        }
        let _ = std::fs::remove_file(&self.socket);
    }

    fn turn(&mut self) {
        loop {
            let gone = self.readers.take_gone();
            if !gone.is_empty() {
                self.jobs.retain(|_, job| !gone.contains(&job.client));
            }
            while let Some(asked) = self.readers.next_asked() {
                self.take(asked);
            }
            self.ask();
            if !self.readers.send() {
                return;
            }
        }
    }

    /// False when the view is closed.
    fn take_inbox(&mut self) -> bool {
        self.inbox.reset();
        loop {
            match self.inbox.take() {
                Ok(Some(ToView::Read { token, result })) => self.extent_read(token, result),
                Ok(Some(ToView::Status { token, statuses })) => {
                    let Some(job) = self.jobs.remove(&token) else { continue };
                    let Some(session) = self.readers.session(job.client) else { continue };
                    let statuses: Vec<ContextStatus<'_>> = statuses
                        .iter()
                        .map(|(context, extents)| ContextStatus { context: *context, extents })
                        .collect();
                    session.reply_block_status(job.id, &statuses);
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

    fn take(&mut self, asked: Asked) {
        let Asked { client, export, id, offset, length, wanted } = asked;
        if let Some(why) = &self.lost {
            let why = lost_text(why);
            if let Some(session) = self.readers.session(client) {
                session.reply_error(id, ErrorCode::Io, &why);
            }
            return;
        }
        let range = DiskRange { disk: self.disks[export].index, offset, length };
        match wanted {
            Wanted::Read => self.start_read(client, id, range),
            Wanted::BlockStatus { contexts } => {
                let token = self.add(Job { client, id, range, parts: Vec::new(), missing: 0 });
                let wanted = StatusWanted { token, range, contexts };
                self.group.send(ToGroup::ViewStatus { view: self.view, wanted });
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
                if let Some(session) = self.readers.session(job.client) {
                    session.reply_read(job.id, pieces(job.range, job.parts));
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
        let why = lost_text(self.lost.as_deref().unwrap_or_default());
        if let Some(session) = self.readers.session(job.client) {
            session.reply_error(job.id, ErrorCode::Io, &why);
        }
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

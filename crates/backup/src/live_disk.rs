//! A machine's disk as a target, written through its server: only what differs is.

use crate::source::Requests;
use crate::{BackupError, ChunkSet, NbdEndpoint, NbdSource, Source, Target};
use rempart_nbd::client::{Client, ClientError};
use rempart_repository::{ChunkId, ChunkSize, Domain};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes zeroed by one request.
const ZEROED_AT_ONCE: u64 = 1 << 30;

/// A disk behind NBD that nobody else writes to.
#[derive(Debug)]
pub struct LiveDisk {
    endpoint: NbdEndpoint,
    /// Bytes that are restored; what the disk has beyond them becomes zeroes.
    content: u64,
    size: u64,
    chunk_size: ChunkSize,
    /// Of the point: by its keys the same chunk has the same id.
    domain: Domain,
    /// Chunks that hold anything but zeroes now.
    data: ChunkSet,
    /// Connections that nobody uses just now.
    idle: Mutex<Vec<Connection>>,
    written: AtomicU64,
}

#[derive(Debug)]
struct Connection {
    client: Client<UnixStream>,
    buffer: Vec<u8>,
}

impl LiveDisk {
    /// Bytes of `content` are to be restored onto it.
    pub fn open(
        endpoint: NbdEndpoint,
        content: u64,
        chunk_size: ChunkSize,
        domain: Domain,
    ) -> Result<LiveDisk, BackupError> {
        let source = NbdSource::open(endpoint.clone())?;
        let size = source.size();
        if size < content {
            let why = format!("it has {size} bytes, and the disk needs {content}");
            return Err(failed(&endpoint, 0)(io::Error::new(io::ErrorKind::StorageFull, why)));
        }
        let data = source.data(u64::from(chunk_size.bytes()))?;
        let (idle, written) = (Mutex::default(), AtomicU64::default());
        Ok(LiveDisk { endpoint, content, size, chunk_size, domain, data, idle, written })
    }

    /// Bytes that differed, and were written.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    fn with<T>(
        &self,
        offset: u64,
        work: impl FnOnce(&mut Connection) -> Result<T, ClientError>,
    ) -> Result<T, BackupError> {
        let idle = self.idle.lock().expect("no holder panics").pop();
        let mut connection = match idle {
            Some(connection) => connection,
            None => Connection { client: self.endpoint.connect(&[])?, buffer: Vec::new() },
        };
        let done = work(&mut connection).map_err(|e| failed(&self.endpoint, offset)(io::Error::other(e)))?;
        self.idle.lock().expect("no holder panics").push(connection);
        Ok(done)
    }
}

fn failed(endpoint: &NbdEndpoint, offset: u64) -> impl Fn(io::Error) -> BackupError {
    let disk = endpoint.shown();
    move |source| BackupError::Target { disk: disk.clone(), offset, source }
}

impl Target for LiveDisk {
    fn missing(&self, batch: &[(u64, ChunkId)]) -> Result<Vec<(u64, ChunkId)>, BackupError> {
        let chunk_len = u64::from(self.chunk_size.bytes());
        let mut missing = Vec::new();
        let is_run = |one: &(u64, ChunkId), next: &(u64, ChunkId)| {
            one.0 + 1 == next.0 && self.data.contains(one.0) == self.data.contains(next.0)
        };
        for run in batch.chunk_by(is_run) {
            let first = run[0].0;
            if !self.data.contains(first) {
                missing.extend_from_slice(run);
                continue;
            }
            let start = first * chunk_len;
            let len = ((first + run.len() as u64) * chunk_len).min(self.content) - start;
            self.with(start, |Connection { client, buffer }| {
                buffer.resize(buffer.len().max(len as usize), 0);
                let held = &mut buffer[..len as usize];
                Requests::default().read(client, start, held).map_err(|(_, why)| why)?;
                let chunks = run.iter().zip(held.chunks(chunk_len as usize));
                let other = chunks.filter(|((_, id), held)| self.domain.chunk_id(held) != *id);
                missing.extend(other.map(|(chunk, _)| *chunk));
                Ok(())
            })?;
        }
        Ok(missing)
    }

    fn write(&self, offset: u64, content: &[u8]) -> Result<(), BackupError> {
        self.written.fetch_add(content.len() as u64, Ordering::Relaxed);
        self.with(offset, |connection| connection.client.write(offset, content, false))
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), BackupError> {
        let chunk_len = u64::from(self.chunk_size.bytes());
        let mut chunk = offset / chunk_len;
        while let Some(run) = self.data.next_run(chunk, (ZEROED_AT_ONCE / chunk_len).max(1)) {
            let (start, end) = ((run.start * chunk_len).max(offset), (run.end * chunk_len).min(offset + len));
            if start >= end {
                break;
            }
            self.written.fetch_add(end - start, Ordering::Relaxed);
            self.with(start, |connection| connection.client.write_zeroes(start, end - start))?;
            chunk = run.end;
        }
        Ok(())
    }

    fn finish(&self) -> Result<(), BackupError> {
        self.zero(self.content, self.size - self.content)?;
        self.with(0, |connection| connection.client.flush())
    }
}

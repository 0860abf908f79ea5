//! A disk that an NBD server shows.

use super::{Reader, Source, SourceError};
use crate::ChunkSet;
use rempart_nbd::client::{Answer, Client, ClientError, Command, ConnectOptions, Cookie};
use rempart_nbd::{BASE_ALLOCATION, STATE_ZERO};
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// A server that does not answer for so long is gone.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of one request.
const REQUEST: usize = 1024 * 1024;
/// Requests in flight of one reader.
const IN_FLIGHT: usize = 8;
/// Bytes whose status is asked for at once.
const STATUS: u64 = 1 << 30;

/// Where a disk is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdEndpoint {
    pub socket: PathBuf,
    pub export: String,
}

impl NbdEndpoint {
    pub(crate) fn shown(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.export, self.socket.display())
    }

    pub(crate) fn connect(&self, contexts: &[&str]) -> Result<Client<UnixStream>, SourceError> {
        let mut options = ConnectOptions::new(&self.export);
        options.timeout = TIMEOUT;
        options.contexts = contexts.iter().map(|&context| context.to_owned()).collect();
        Client::connect_unix(&self.socket, &options).map_err(|why| self.error("connect to", None, why))
    }

    fn error(&self, action: &'static str, offset: Option<u64>, why: ClientError) -> SourceError {
        SourceError { action, disk: self.shown(), offset, source: why.into() }
    }
}

/// A disk behind NBD.
#[derive(Debug)]
pub struct NbdSource {
    endpoint: NbdEndpoint,
    size: u64,
}

impl NbdSource {
    pub fn open(endpoint: NbdEndpoint) -> Result<NbdSource, SourceError> {
        let size = endpoint.connect(&[])?.size();
        Ok(NbdSource { endpoint, size })
    }

    /// The chunks of which `context` says, by its flags, that they are wanted.
    ///
    /// # Errors
    /// If the server does not offer the context: then nobody knows.
    pub fn chunks_by(
        &self,
        context: &str,
        chunk_len: u64,
        wanted: impl Fn(u64) -> bool,
    ) -> Result<ChunkSet, SourceError> {
        let mut client = self.endpoint.connect(&[context])?;
        let mut set = ChunkSet::none(self.size, chunk_len);
        let mut at = 0;
        while at < self.size {
            let part = client.map(context, at, STATUS.min(self.size - at));
            for extent in part.map_err(|why| self.endpoint.error("ask for the map of", Some(at), why))? {
                if wanted(extent.flags) {
                    set.insert_bytes(at..at + extent.length);
                }
                at += extent.length;
            }
        }
        Ok(set)
    }
}

impl Source for NbdSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn reader(&self) -> Result<Box<dyn Reader + '_>, SourceError> {
        let client = self.endpoint.connect(&[])?;
        if client.size() != self.size {
            let why = format!("it has {} bytes now, and had {}", client.size(), self.size);
            return Err(SourceError {
                action: "connect to",
                disk: self.endpoint.shown(),
                offset: None,
                source: why.into(),
            });
        }
        Ok(Box::new(NbdReader { endpoint: &self.endpoint, client }))
    }

    fn data(&self, chunk_len: u64) -> Result<ChunkSet, SourceError> {
        if self.endpoint.connect(&[BASE_ALLOCATION])?.contexts().next().is_none() {
            return Ok(ChunkSet::all(self.size, chunk_len));
        }
        self.chunks_by(BASE_ALLOCATION, chunk_len, |flags| flags & STATE_ZERO == 0)
    }
}

struct NbdReader<'a> {
    endpoint: &'a NbdEndpoint,
    client: Client<UnixStream>,
}

impl Reader for NbdReader<'_> {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        read_pipelined(&mut self.client, offset, buffer)
            .map_err(|(at, why)| self.endpoint.error("read", Some(at), why))
    }
}

/// Fills `buffer`, with several requests in flight; or tells where that failed.
pub(crate) fn read_pipelined(
    client: &mut Client<UnixStream>,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), (u64, ClientError)> {
    let longest = REQUEST.min(client.export().maximum_payload() as usize);
    let mut unsent = (0..buffer.len()).step_by(longest);
    let mut in_flight: HashMap<Cookie, usize> = HashMap::new();
    loop {
        while in_flight.len() < IN_FLIGHT
            && let Some(start) = unsent.next()
        {
            let length = longest.min(buffer.len() - start) as u32;
            let at = offset + start as u64;
            let cookie = client.submit(Command::Read { offset: at, length }).map_err(|why| (at, why))?;
            in_flight.insert(cookie, start);
        }
        if in_flight.is_empty() {
            return Ok(());
        }
        let ended = client.wait().map_err(|why| (offset, why))?;
        let start = in_flight.remove(&ended.cookie).expect("it was submitted here");
        let answer = ended.result.map_err(|why| (offset + start as u64, why.into()))?;
        let Answer::Data(data) = answer else { unreachable!("a read is answered with data") };
        buffer[start..start + data.len()].copy_from_slice(&data);
        client.recycle(data);
    }
}

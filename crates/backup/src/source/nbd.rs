//! A disk that an NBD server shows.

use super::{Reader, Source, SourceError};
use crate::ChunkSet;
use rempart_nbd::client::{Answer, Client, ClientError, Command, ConnectOptions, Cookie};
use rempart_nbd::{BASE_ALLOCATION, STATE_ZERO};
use std::collections::HashMap;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// A server that does not answer for so long is gone.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of one request.
const REQUEST: u64 = 1024 * 1024;
/// Requests of one reader in flight, besides those that it was told of ahead.
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
        Ok(Box::new(NbdReader { endpoint: &self.endpoint, client, requests: Requests::default() }))
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
    requests: Requests,
}

impl Reader for NbdReader<'_> {
    fn ahead(&mut self, ranges: &[Range<u64>]) -> Result<(), SourceError> {
        let asked = self.requests.ask_for(&mut self.client, ranges);
        asked.map_err(|why| self.endpoint.error("read", None, why))
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let read = self.requests.read(&mut self.client, offset, buffer);
        read.map_err(|(at, why)| self.endpoint.error("read", Some(at), why))
    }
}

/// What was asked of a server, with several requests in flight.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    /// Asked for and not read yet.
    asked: HashMap<Request, Option<Result<Vec<u8>, ClientError>>>,
    in_flight: HashMap<Cookie, Request>,
}

/// What is asked for at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Request {
    offset: u64,
    length: u32,
}

/// The requests by which `range` is read.
fn requests(client: &Client<UnixStream>, range: Range<u64>) -> impl Iterator<Item = Request> + use<> {
    let longest = REQUEST.min(u64::from(client.export().maximum_payload()));
    let length = move |offset: &u64| longest.min(range.end - offset) as u32;
    let offsets = (range.start..range.end).step_by(longest as usize);
    offsets.map(move |offset| Request { offset, length: length(&offset) })
}

impl Requests {
    /// Asks for ranges that will be read, each at once.
    fn ask_for(&mut self, client: &mut Client<UnixStream>, ranges: &[Range<u64>]) -> Result<(), ClientError> {
        for range in ranges {
            requests(client, range.clone()).try_for_each(|request| self.ask(client, request))?;
        }
        client.push()
    }

    /// Fills `buffer`, or tells where that failed.
    pub fn read(
        &mut self,
        client: &mut Client<UnixStream>,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), (u64, ClientError)> {
        let range = offset..offset + buffer.len() as u64;
        let mut later = requests(client, range.clone());
        for request in requests(client, range) {
            let error = |why: ClientError| (request.offset, why);
            self.ask(client, request).map_err(error)?;
            while self.in_flight.len() < IN_FLIGHT
                && let Some(later) = later.next()
            {
                if later.offset > request.offset {
                    self.ask(client, later).map_err(error)?;
                }
            }
            let data = self.answer(client, request).map_err(error)?;
            let start = (request.offset - offset) as usize;
            buffer[start..start + data.len()].copy_from_slice(&data);
            client.recycle(data);
        }
        Ok(())
    }

    /// Unless it is asked for already.
    fn ask(&mut self, client: &mut Client<UnixStream>, request: Request) -> Result<(), ClientError> {
        let Request { offset, length } = request;
        if !self.asked.contains_key(&request) {
            let cookie = client.submit(Command::Read { offset, length })?;
            self.in_flight.insert(cookie, request);
            self.asked.insert(request, None);
        }
        Ok(())
    }

    /// The answer to what was asked for.
    fn answer(&mut self, client: &mut Client<UnixStream>, request: Request) -> Result<Vec<u8>, ClientError> {
        loop {
            if let Some(Some(_)) = self.asked.get(&request) {
                return self.asked.remove(&request).flatten().expect("just seen");
            }
            let ended = client.wait()?;
            let of = self.in_flight.remove(&ended.cookie).expect("it was submitted here");
            let answer = ended.result.map_err(ClientError::from).map(|answer| match answer {
                Answer::Data(data) => data,
                _ => unreachable!("a read is answered with data"),
            });
            self.asked.insert(of, Some(answer));
        }
    }
}

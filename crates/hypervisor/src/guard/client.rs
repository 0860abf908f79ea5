//! The daemon's side of a guard's socket.

use super::connection::{receive_with_fds, send_with_fds};
use super::protocol::{
    Command, FromGuard, GuardEvent, LONGEST_LINE, Outcome, PROTOCOL_VERSION, Request, line,
};
use crate::error::{Error, ErrorKind, Result};
use crate::lines::LineBuffer;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// Events between the socket and whoever hands them on at once.
const EVENT_QUEUE: usize = 64;

type Answer = Result<(Outcome, Vec<OwnedFd>), String>;

#[derive(Debug)]
pub(crate) struct GuardClient {
    stream: Arc<UnixStream>,
    /// Held while a line is written.
    writing: tokio::sync::Mutex<()>,
    waiting: Arc<Mutex<Waiting>>,
    machine: String,
    reader: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Waiting {
    last_id: u64,
    answers: HashMap<u64, oneshot::Sender<Answer>>,
    closed: bool,
}

impl GuardClient {
    /// Connects and waits for the guard's hello. The events end when the guard hangs up, or is gone.
    pub(crate) async fn connect(
        socket: &Path,
        deadline: Duration,
    ) -> Result<(Self, mpsc::Receiver<GuardEvent>)> {
        let action = "connect to the guard";
        let connect = async {
            let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                    Error::new(ErrorKind::NotRunning, action, "no guard is there")
                }
                _ => Error::io(action, error),
            })?;
            let mut receiver = Receiver::new(Arc::new(stream));
            let machine = match receiver.next().await? {
                Some(FromGuard::Hello { protocol: PROTOCOL_VERSION, machine }) => machine,
                Some(FromGuard::Hello { protocol, .. }) => {
                    let detail = format!("it speaks version {protocol}, this program {PROTOCOL_VERSION}");
                    return Err(Error::new(ErrorKind::Protocol, action, detail));
                }
                Some(_) => return Err(Error::new(ErrorKind::Protocol, action, "it did not say hello")),
                None => return Err(Error::new(ErrorKind::NotRunning, action, "it hung up")),
            };
            Ok((receiver, machine))
        };
        let connected = tokio::time::timeout(deadline, connect).await;
        let (receiver, machine) = connected.map_err(|_| Error::deadline(action, deadline))??;
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let (event_sender, events) = mpsc::channel(EVENT_QUEUE);
        let stream = receiver.stream.clone();
        let reader = tokio::spawn(read_all(receiver, waiting.clone(), event_sender));
        Ok((Self { stream, writing: tokio::sync::Mutex::default(), waiting, machine, reader }, events))
    }

    pub(crate) fn machine(&self) -> &str {
        &self.machine
    }

    pub(crate) async fn request(
        &self,
        what: &str,
        command: Command,
        fds: &[OwnedFd],
        deadline: Duration,
    ) -> Result<(Outcome, Vec<OwnedFd>)> {
        let action = || format!("{what} `{}`", self.machine);
        let gone = || Error::new(ErrorKind::NotRunning, action(), "its guard is gone");
        let (id, answer) = self.register().ok_or_else(gone)?;
        let exchange = async {
            self.write(&line(&Request { id, command }), fds).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())
        };
        let outcome = tokio::time::timeout(deadline, exchange).await;
        self.waiting.lock().expect("no panic holds this").answers.remove(&id);
        let answer = outcome.map_err(|_| Error::deadline(action(), deadline))??;
        answer.map_err(|error| Error::new(ErrorKind::Refused, action(), error))
    }

    fn register(&self) -> Option<(u64, oneshot::Receiver<Answer>)> {
        let mut waiting = self.waiting.lock().expect("no panic holds this");
        if waiting.closed {
            return None;
        }
        waiting.last_id += 1;
        let (sender, receiver) = oneshot::channel();
        let id = waiting.last_id;
        waiting.answers.insert(id, sender);
        Some((id, receiver))
    }

    async fn write(&self, bytes: &[u8], fds: &[OwnedFd]) -> std::io::Result<()> {
        // A caller that gives up in the middle of a line would garble the next one; a line fits the socket's buffer
        // unless the guard does not read at all, and then there is no next one.
        let _writing = self.writing.lock().await;
        let (mut rest, mut fds) = (bytes, fds);
        while !rest.is_empty() {
            self.stream.writable().await?;
            match self.stream.try_io(Interest::WRITABLE, || send_with_fds(self.stream.as_fd(), rest, fds)) {
                Ok(count) => (rest, fds) = (&rest[count..], &[]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Drop for GuardClient {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

struct Receiver {
    stream: Arc<UnixStream>,
    lines: LineBuffer,
    fds: VecDeque<OwnedFd>,
}

impl Receiver {
    fn new(stream: Arc<UnixStream>) -> Self {
        Self { stream, lines: LineBuffer::new(LONGEST_LINE), fds: VecDeque::new() }
    }

    /// The next message that is understood; None when the guard hung up.
    async fn next(&mut self) -> Result<Option<FromGuard>> {
        let action = "understand the guard";
        loop {
            let line = self.lines.next_line();
            if let Some(line) =
                line.map_err(|error| Error::new(ErrorKind::Protocol, action, error.to_string()))?
            {
                match serde_json::from_slice(&line) {
                    Ok(message) => return Ok(Some(message)),
                    // A newer guard's event, say.
                    Err(error) => tracing::warn!(%error, "a line of the guard's is not understood"),
                }
                continue;
            }
            self.stream.readable().await.map_err(|error| Error::io(action, error))?;
            let mut bytes = [0; 4096];
            let received = self.stream.try_io(Interest::READABLE, || {
                receive_with_fds(self.stream.as_fd(), &mut bytes, &mut self.fds)
            });
            match received {
                Ok(0) => return Ok(None),
                Ok(count) => self.lines.push(&bytes[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(Error::io(action, error)),
            }
        }
    }
}

async fn read_all(mut receiver: Receiver, waiting: Arc<Mutex<Waiting>>, events: mpsc::Sender<GuardEvent>) {
    loop {
        let (id, answer) = match receiver.next().await {
            Ok(Some(FromGuard::Event { event })) => {
                // The other end hands them on without waiting for anybody.
                if events.send(event).await.is_err() {
                    break;
                }
                continue;
            }
            Ok(Some(FromGuard::Done { id, outcome })) => {
                let fds = match &outcome {
                    Outcome::Kept(names) => {
                        let count = names.len().min(receiver.fds.len());
                        receiver.fds.drain(..count).collect()
                    }
                    _ => Vec::new(),
                };
                (id, Ok((outcome, fds)))
            }
            Ok(Some(FromGuard::Failed { id, error })) => (id, Err(error)),
            Ok(Some(FromGuard::Hello { .. })) => continue,
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(%error, "the connection to a guard ends");
                break;
            }
        };
        let asker = waiting.lock().expect("no panic holds this").answers.remove(&id);
        if let Some(asker) = asker {
            // It may have given up.
            let _ = asker.send(answer);
        }
    }
    let mut waiting = waiting.lock().expect("no panic holds this");
    waiting.closed = true;
    waiting.answers.clear();
}

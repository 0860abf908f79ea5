//! One connection to a monitor: commands with a deadline, and a bounded stream of events.

use super::message::{self, CommandError, Event, LONGEST_LINE, Message};
use crate::error::{Error, ErrorKind, Result};
use crate::lines::LineBuffer;
use serde_json::Value;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot};
use tokio::task::JoinHandle;

/// Events a slow reader may fall behind before it loses the oldest.
const EVENT_QUEUE: usize = 256;

/// Commands without an answer, at most: each waits for its deadline even if its caller went away.
const MOST_IN_FLIGHT: usize = 64;

type Answer = Result<Value, CommandError>;

/// A connected monitor. Cheap to clone; the connection ends with the last clone.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    waiting: Arc<Mutex<Waiting>>,
    version: String,
    peer: Option<u32>,
    events: broadcast::WeakSender<Event>,
    reader: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Waiting {
    last_id: u64,
    answers: HashMap<u64, oneshot::Sender<Answer>>,
    /// The connection is over; nobody answers any more.
    closed: bool,
}

/// Events from the moment it was made.
#[derive(Debug)]
pub struct EventStream {
    receiver: broadcast::Receiver<Event>,
}

/// What [`EventStream::next`] yields.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    Event(Event),
    /// The reader was slow, and this many are lost.
    Missed(u64),
}

impl Client {
    /// Connects to the monitor at `socket`, waits for QEMU's greeting and leaves negotiation mode.
    pub async fn connect(socket: &Path, deadline: Duration) -> Result<Self> {
        let action = "connect to QEMU's monitor";
        let connect = async {
            let stream = UnixStream::connect(socket).await.map_err(|error| Error::io(action, error))?;
            Self::greet(stream).await
        };
        tokio::time::timeout(deadline, connect).await.map_err(|_| Error::deadline(action, deadline))?
    }

    async fn greet(stream: UnixStream) -> Result<Self> {
        let peer =
            stream.peer_cred().ok().and_then(|peer| peer.pid()).and_then(|pid| u32::try_from(pid).ok());
        let (mut reader, writer) = stream.into_split();
        let mut lines = LineBuffer::new(LONGEST_LINE);
        let version = match read_message(&mut reader, &mut lines).await? {
            Some(Message::Greeting { version }) => version,
            Some(_) => return Err(protocol("QEMU did not start with its greeting")),
            None => return Err(Error::new(ErrorKind::NotRunning, "greet QEMU", "it closed its monitor")),
        };
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let weak = events.downgrade();
        let reader = tokio::spawn(read_all(reader, lines, waiting.clone(), events));
        let shared = Shared { writer: writer.into(), waiting, version, peer, events: weak, reader };
        let client = Self { shared: Arc::new(shared) };
        client.execute("qmp_capabilities", Value::Null, Duration::from_secs(60)).await?;
        Ok(client)
    }

    /// QEMU's version, e.g. `10.0.2`.
    pub fn version(&self) -> &str {
        &self.shared.version
    }

    /// The process that listens on the monitor's socket: QEMU, or who made the socket for it.
    pub fn peer_pid(&self) -> Option<u32> {
        self.shared.peer
    }

    /// A second descriptor of the connection.
    pub(crate) async fn descriptor(&self) -> std::io::Result<OwnedFd> {
        self.shared.writer.lock().await.as_ref().as_fd().try_clone_to_owned()
    }

    pub fn events(&self) -> EventStream {
        let receiver = match self.shared.events.upgrade() {
            Some(sender) => sender.subscribe(),
            // The connection is over: a stream that ends at once.
            None => broadcast::channel(1).1,
        };
        EventStream { receiver }
    }

    /// Sends one command and waits for its answer. After a deadline the command may still take effect.
    pub async fn execute(&self, name: &str, arguments: Value, deadline: Duration) -> Result<Value> {
        let action = || format!("run `{name}` in QEMU");
        let (id, answer) = self.shared.register(name)?;
        let line = message::command(id, name, &arguments);
        let exchange = async {
            self.shared
                .writer
                .lock()
                .await
                .write_all(&line)
                .await
                .map_err(|error| Error::io(action(), error))?;
            answer.await.map_err(|_| Error::new(ErrorKind::NotRunning, action(), "QEMU closed its monitor"))
        };
        let outcome = tokio::time::timeout(deadline, exchange).await;
        self.shared.forget(id);
        let answer = outcome.map_err(|_| Error::deadline(action(), deadline))??;
        answer.map_err(|error| Error::new(ErrorKind::Refused, action(), error.to_string()))
    }
}

impl Shared {
    fn register(&self, name: &str) -> Result<(u64, oneshot::Receiver<Answer>)> {
        let mut waiting = self.waiting.lock().expect("no panic holds this");
        let refuse = |kind, detail| Err(Error::new(kind, format!("run `{name}` in QEMU"), detail));
        if waiting.closed {
            return refuse(ErrorKind::NotRunning, "its monitor is closed");
        }
        if waiting.answers.len() >= MOST_IN_FLIGHT {
            return refuse(ErrorKind::Deadline, "too many commands wait for an answer");
        }
        waiting.last_id += 1;
        let id = waiting.last_id;
        let (sender, receiver) = oneshot::channel();
        waiting.answers.insert(id, sender);
        Ok((id, receiver))
    }

    fn forget(&self, id: u64) {
        self.waiting.lock().expect("no panic holds this").answers.remove(&id);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl EventStream {
    /// The next event; None when the connection is over.
    pub async fn next(&mut self) -> Option<Heard> {
        match self.receiver.recv().await {
            Ok(event) => Some(Heard::Event(event)),
            Err(broadcast::error::RecvError::Lagged(count)) => Some(Heard::Missed(count)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }

    /// Waits for the first event that `choose` takes.
    pub async fn wait_for<T>(&mut self, mut choose: impl FnMut(&Event) -> Option<T>) -> Option<T> {
        loop {
            if let Heard::Event(event) = self.next().await?
                && let Some(chosen) = choose(&event)
            {
                return Some(chosen);
            }
        }
    }
}

fn protocol(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Protocol, "understand QEMU's monitor", detail)
}

/// The next message; None at the end of the stream.
async fn read_message(reader: &mut OwnedReadHalf, lines: &mut LineBuffer) -> Result<Option<Message>> {
    let mut chunk = [0; 16 * 1024];
    loop {
        if let Some(line) = lines.next_line().map_err(|error| protocol(error.to_string()))? {
            return message::parse(&line).map(Some).map_err(|error| protocol(error.to_string()));
        }
        match reader.read(&mut chunk).await.map_err(|error| Error::io("read from QEMU's monitor", error))? {
            0 => return Ok(None),
            count => lines.push(&chunk[..count]),
        }
    }
}

async fn read_all(
    mut reader: OwnedReadHalf,
    mut lines: LineBuffer,
    waiting: Arc<Mutex<Waiting>>,
    events: broadcast::Sender<Event>,
) {
    loop {
        let (id, answer) = match read_message(&mut reader, &mut lines).await {
            Ok(Some(Message::Event(event))) => {
                // Nobody listening is fine.
                let _ = events.send(event);
                continue;
            }
            Ok(Some(Message::Return { id, value })) => (id, Ok(value)),
            Ok(Some(Message::Error { id, error })) => (id, Err(error)),
            Ok(Some(Message::Greeting { .. })) => continue,
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(%error, "QEMU's monitor connection ends");
                break;
            }
        };
        let mut waiting = waiting.lock().expect("no panic holds this");
        if let Some(sender) = id.and_then(|id| waiting.answers.remove(&id)) {
            // Its caller may have given up.
            let _ = sender.send(answer);
        }
    }
    let mut waiting = waiting.lock().expect("no panic holds this");
    waiting.closed = true;
    waiting.answers.clear();
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncBufReadExt;

    const GREETING: &[u8] =
        b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": 10, \"minor\": 0, \"micro\": 2}}}}\r\n";

    /// A monitor that answers each command with what `answer` makes of it.
    async fn monitor(answer: impl Fn(Value) -> Vec<String> + Send + 'static) -> Client {
        let (near, far) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let (reader, mut writer) = far.into_split();
            writer.write_all(GREETING).await.unwrap();
            let mut lines = tokio::io::BufReader::new(reader).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                for line in answer(serde_json::from_str(&line).unwrap()) {
                    writer.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
                }
            }
        });
        Client::greet(near).await.unwrap()
    }

    fn fine(command: &Value) -> String {
        serde_json::json!({ "return": {}, "id": command["id"] }).to_string()
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn events_between_command_and_answer_are_kept() {
        let client = monitor(|command| {
            vec![r#"{"event": "NEW_IN_11", "data": 5}"#.into(), r#"{"event": "STOP"}"#.into(), fine(&command)]
        })
        .await;
        let mut events = client.events();
        client.execute("stop", Value::Null, SECOND).await.unwrap();
        assert!(
            matches!(events.next().await, Some(Heard::Event(Event::Other { name, .. })) if name == "NEW_IN_11")
        );
        assert_eq!(events.next().await, Some(Heard::Event(Event::Stop)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_without_answer_ends_at_its_deadline_and_its_late_answer_is_nobody_elses() {
        let client = monitor(|command| match command["execute"].as_str().unwrap() {
            "slow" => vec![],
            // The late answer of number 2 comes before the one of number 3.
            "next" => vec![r#"{"return": "late", "id": 2}"#.into(), r#"{"return": "right", "id": 3}"#.into()],
            _ => vec![fine(&command)],
        })
        .await;
        let error = client.execute("slow", Value::Null, SECOND).await.unwrap_err();
        assert_eq!(error.to_string(), "cannot run `slow` in QEMU: no answer within 1000 ms");
        assert_eq!(client.execute("next", Value::Null, SECOND).await.unwrap(), "right");
    }

    #[tokio::test]
    async fn a_closed_monitor_fails_commands_and_ends_events() {
        let (near, far) = UnixStream::pair().unwrap();
        let server = tokio::spawn(async move {
            let (reader, mut writer) = far.into_split();
            writer.write_all(GREETING).await.unwrap();
            let mut lines = tokio::io::BufReader::new(reader).lines();
            let command = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
            writer.write_all(format!("{}\n", fine(&command)).as_bytes()).await.unwrap();
            lines.next_line().await.unwrap();
        });
        let client = Client::greet(near).await.unwrap();
        let mut events = client.events();
        let error = client.execute("stop", Value::Null, SECOND).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotRunning);
        server.await.unwrap();
        assert_eq!(events.next().await, None);
        assert_eq!(
            client.execute("stop", Value::Null, SECOND).await.unwrap_err().kind(),
            ErrorKind::NotRunning
        );
    }

    #[tokio::test]
    async fn a_slow_reader_loses_events_and_is_told_how_many() {
        let client = monitor(|command| {
            let mut lines = vec![r#"{"event": "STOP"}"#.to_owned(); EVENT_QUEUE + 10];
            lines.push(fine(&command));
            lines
        })
        .await;
        let mut events = client.events();
        client.execute("noisy", Value::Null, SECOND).await.unwrap();
        // The channel rounds its size up to a power of two; 256 is one.
        let Some(Heard::Missed(missed)) = events.next().await else { panic!("nothing was missed") };
        assert!(missed >= 10, "{missed}");
    }
}

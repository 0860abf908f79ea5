//! One connection to a guest's agent (docs/interop/qemu-ga-ref in QEMU's source).

use crate::error::{Error, ErrorKind, Result};
use crate::lines::LineBuffer;
use data_encoding::BASE64;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::Instant;

/// The agent's longest answers are lists of the guest's file systems.
const LONGEST_LINE: usize = 4 << 20;

/// Lines of earlier conversations that are read away before the answer to a synchronisation.
const MOST_STALE_LINES: usize = 1000;

/// Of each of a program's two outputs.
const LONGEST_OUTPUT: usize = 4096;

/// Between two looks at whether a program has ended.
const POLL: Duration = Duration::from_millis(50);

/// Ends whatever the agent is in the middle of reading, and begins its answer to a synchronisation.
pub(super) const SENTINEL: u8 = 0xFF;

/// A connected agent. Commands go one after the other.
#[derive(Debug)]
pub struct GuestAgent {
    stream: UnixStream,
    lines: LineBuffer,
    /// No answer is outstanding.
    synchronised: bool,
    last_id: u64,
}

/// What an agent can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentInfo {
    pub version: String,
    /// Commands that are not switched off.
    pub commands: BTreeSet<String>,
}

/// How a program ended that ran in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// None: a signal ended it, or the agent does not say.
    pub exit_code: Option<i64>,
    /// The start of what it wrote to its standard output, then of what it wrote to its standard error.
    pub output: Vec<u8>,
}

impl GuestAgent {
    /// Connects to the host's end of the agent's channel and waits until the agent answers.
    pub async fn connect(socket: &Path, deadline: Duration) -> Result<Self> {
        let action = "connect to the guest agent";
        let connect = UnixStream::connect(socket);
        let stream = tokio::time::timeout(deadline, connect)
            .await
            .map_err(|_| Error::deadline(action, deadline))?
            .map_err(|error| Error::io(action, error))?;
        let mut agent =
            Self { stream, lines: LineBuffer::new(LONGEST_LINE), synchronised: false, last_id: 0 };
        agent.synchronise(Instant::now() + deadline).await.map_err(|error| match error.kind() {
            ErrorKind::Deadline => Error::new(
                ErrorKind::Deadline,
                action,
                format!(
                    "no answer within {} ms: it is not installed, does not run, or somebody else talks to it",
                    deadline.as_millis()
                ),
            ),
            _ => error,
        })?;
        Ok(agent)
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Runs one command. After a deadline the agent may still be at it.
    pub async fn execute(&mut self, name: &str, arguments: Value, deadline: Duration) -> Result<Value> {
        let end = Instant::now() + deadline;
        if !self.synchronised {
            self.synchronise(end).await?;
        }
        self.last_id += 1;
        let id = self.last_id;
        let mut command = json!({ "execute": name, "id": id });
        if !arguments.is_null() {
            command["arguments"] = arguments;
        }
        self.synchronised = false;
        let action = || format!("run `{name}` in the guest agent");
        let exchange = async {
            self.send(format!("{command}\n").as_bytes()).await?;
            loop {
                let answer = self.receive().await?;
                // Agents of old do not repeat the number.
                if answer["id"].is_null() || answer["id"] == id {
                    return Ok(answer);
                }
            }
        };
        let answer: Result<Value> = tokio::time::timeout_at(end, exchange)
            .await
            .unwrap_or_else(|_| Err(Error::deadline(action(), deadline)));
        let mut answer = answer?;
        self.synchronised = true;
        if let Some(error) = answer.get("error") {
            let said = error["desc"].as_str().unwrap_or("it did not say why");
            // It is the guest's: bounded, and one line.
            let said: String = said.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect();
            return Err(Error::new(ErrorKind::Refused, action(), said));
        }
        Ok(answer["return"].take())
    }

    /// Reads away what earlier commands, or earlier clients, left unanswered.
    async fn synchronise(&mut self, end: Instant) -> Result<()> {
        // At random: an answer to an earlier client's synchronisation may still be on its way.
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| Error::io("draw a random number", error))?;
        // The agent takes signed numbers, and JSON is exact to 53 bits.
        let number = u64::from_le_bytes(bytes) >> 11;
        let exchange = async {
            let command = json!({ "execute": "guest-sync-delimited", "arguments": { "id": number } });
            let mut bytes = vec![SENTINEL];
            bytes.extend_from_slice(format!("{command}\n").as_bytes());
            self.send(&bytes).await?;
            for _ in 0..MOST_STALE_LINES {
                // What is not understood was not meant for this conversation.
                match self.receive().await {
                    Ok(answer) if answer["return"] == number => return Ok(()),
                    Err(error) if error.kind() != ErrorKind::Protocol => return Err(error),
                    _ => (),
                }
            }
            let detail = "its channel is full of other answers";
            Err(Error::new(ErrorKind::Protocol, "synchronise with the guest agent", detail))
        };
        tokio::time::timeout_at(end, exchange).await.unwrap_or_else(|_| {
            let detail = "no answer in time";
            Err(Error::new(ErrorKind::Deadline, "synchronise with the guest agent", detail))
        })?;
        self.synchronised = true;
        Ok(())
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let sent = self.stream.write_all(bytes).await;
        sent.map_err(|error| Error::io("write to the guest agent", error))
    }

    /// The next line that is an object.
    async fn receive(&mut self) -> Result<Value> {
        let action = "read from the guest agent";
        let foreign = |detail: String| Error::new(ErrorKind::Protocol, "understand the guest agent", detail);
        let mut chunk = [0; 4096];
        loop {
            if let Some(line) = self.lines.next_line().map_err(|error| foreign(error.to_string()))? {
                return parse(&line).ok_or_else(|| foreign("it does not answer in JSON objects".into()));
            }
            match self.stream.read(&mut chunk).await.map_err(|error| Error::io(action, error))? {
                0 => return Err(Error::new(ErrorKind::NotRunning, action, "QEMU closed its channel")),
                count => self.lines.push(&chunk[..count]),
            }
        }
    }

    pub async fn ping(&mut self, deadline: Duration) -> Result<()> {
        self.execute("guest-ping", Value::Null, deadline).await.map(drop)
    }

    pub async fn info(&mut self, deadline: Duration) -> Result<AgentInfo> {
        let info = self.execute("guest-info", Value::Null, deadline).await?;
        let commands = info["supported_commands"].as_array().into_iter().flatten();
        let enabled = commands.filter(|command| command["enabled"] == true);
        Ok(AgentInfo {
            version: info["version"].as_str().unwrap_or_default().chars().take(100).collect(),
            commands: enabled.filter_map(|command| command["name"].as_str().map(str::to_owned)).collect(),
        })
    }

    /// Runs a program in the guest to its end. After a deadline it may still run.
    pub async fn run(&mut self, program: &str, arguments: &[String], deadline: Duration) -> Result<Ran> {
        let end = Instant::now() + deadline;
        let order = json!({ "path": program, "arg": arguments, "capture-output": true });
        let started = self.execute("guest-exec", order, deadline).await?;
        let left = || end.saturating_duration_since(Instant::now());
        loop {
            let asked = json!({ "pid": started["pid"] });
            let told = self.execute("guest-exec-status", asked, left()).await?;
            if told["exited"] == true {
                let captured = |field: &str| {
                    let text = told[field].as_str().unwrap_or_default();
                    let mut bytes = BASE64.decode(text.as_bytes()).unwrap_or_default();
                    bytes.truncate(LONGEST_OUTPUT);
                    bytes
                };
                let output = [captured("out-data"), captured("err-data")].concat();
                return Ok(Ran { exit_code: told["exitcode"].as_i64(), output });
            }
            if left() <= POLL {
                return Err(Error::deadline(format!("run `{program}` in the guest"), deadline));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Up to `longest` bytes from the start of one of the guest's files.
    pub async fn read_file(&mut self, path: &str, longest: usize, deadline: Duration) -> Result<Vec<u8>> {
        let open = json!({ "path": path, "mode": "r" });
        let handle = self.execute("guest-file-open", open, deadline).await?;
        let read = json!({ "handle": handle, "count": longest });
        let contents = self.execute("guest-file-read", read, deadline).await;
        let closed = self.execute("guest-file-close", json!({ "handle": handle }), deadline).await;
        let contents = contents?;
        closed?;
        let text = contents["buf-b64"].as_str().unwrap_or_default();
        let bytes = BASE64.decode(text.as_bytes()).ok().filter(|bytes| bytes.len() <= longest);
        let action = || format!("read `{path}` in the guest");
        bytes.ok_or_else(|| Error::new(ErrorKind::Protocol, action(), "the agent's answer is not understood"))
    }
}

/// Whether an answer is understood.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_line(line: &[u8]) -> bool {
    parse(line).is_some()
}

/// An object, behind what is left of an earlier conversation.
fn parse(line: &[u8]) -> Option<Value> {
    let start = line.iter().rposition(|byte| *byte == SENTINEL).map_or(0, |at| at + 1);
    serde_json::from_slice(&line[start..]).ok().filter(Value::is_object)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::PathBuf;
    use std::sync::{Arc, Mutex};
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    pub(in crate::guest_agent) const SECOND: Duration = Duration::from_secs(1);

    /// A program that speaks the agent's protocol. It answers a command with what `answer` makes of it; nothing for
    /// nothing.
    pub(in crate::guest_agent) struct Script {
        pub socket: PathBuf,
        /// The names of all commands that came.
        pub heard: Arc<Mutex<Vec<String>>>,
        _dir: tempfile::TempDir,
    }

    impl Script {
        pub fn new(mut answer: impl FnMut(&str, &Value) -> Option<Value> + Send + 'static) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("agent");
            let listener = UnixListener::bind(&socket).unwrap();
            let heard = Arc::new(Mutex::new(Vec::new()));
            let names = heard.clone();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let (reader, mut writer) = stream.into_split();
                    let mut lines = BufReader::new(reader).split(b'\n');
                    while let Ok(Some(line)) = lines.next_segment().await {
                        let Some(command) = parse(&line) else { continue };
                        let name = command["execute"].as_str().unwrap().to_owned();
                        if name == "guest-sync-delimited" {
                            let text = json!({ "return": command["arguments"]["id"] }).to_string();
                            let _ = writer.write_all(&[&[SENTINEL], text.as_bytes(), b"\n"].concat()).await;
                            continue;
                        }
                        names.lock().unwrap().push(name.clone());
                        if let Some(mut value) = answer(&name, &command["arguments"]) {
                            value["id"] = command["id"].clone();
                            let _ = writer.write_all(format!("{value}\n").as_bytes()).await;
                        }
                    }
                }
            });
            Self { socket, heard, _dir: dir }
        }

        pub fn heard(&self) -> Vec<String> {
            self.heard.lock().unwrap().clone()
        }
    }

    #[tokio::test]
    async fn an_agent_that_is_not_there_is_told_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent");
        let _channel = UnixListener::bind(&socket).unwrap();
        let error = GuestAgent::connect(&socket, Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot connect to the guest agent: no answer within 50 ms: it is not installed, does not run, or somebody \
             else talks to it"
        );
    }

    #[tokio::test]
    async fn a_command_ends_at_its_deadline_and_its_late_answer_is_nobody_elses() {
        let script = Script::new(|name, _| match name {
            "guest-slow" => None,
            // The answer to the slow one comes just before this one's.
            _ => Some(json!({ "return": "right" })),
        });
        let mut agent = GuestAgent::connect(&script.socket, SECOND).await.unwrap();
        let error = agent.execute("guest-slow", Value::Null, Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Deadline);
        assert_eq!(agent.execute("guest-next", Value::Null, SECOND).await.unwrap(), "right");
    }

    #[tokio::test]
    async fn what_an_earlier_client_left_is_read_away() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"{\"return\": 1}\nhalf a li").await.unwrap();
            let mut lines = BufReader::new(&mut stream).split(b'\n');
            let command = parse(&lines.next_segment().await.unwrap().unwrap()).unwrap();
            let answer = json!({ "return": command["arguments"]["id"] });
            let bytes = [b"ne\n{\"return\": 2}\n\xFF", answer.to_string().as_bytes(), b"\n"].concat();
            stream.write_all(&bytes).await.unwrap();
            std::future::pending::<()>().await;
        });
        GuestAgent::connect(&socket, SECOND).await.unwrap();
    }

    #[tokio::test]
    async fn the_late_answer_to_an_earlier_clients_synchronisation_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            // Real agents complain of the sentinel, too.
            let answer = |number: &Value| {
                format!("{}\n{}\n", json!({ "error": { "desc": "stray" } }), json!({ "return": number }))
            };
            let mut late = String::new();
            for round in 0..2 {
                let (stream, _) = listener.accept().await.unwrap();
                let (reader, mut writer) = stream.into_split();
                let mut lines = BufReader::new(reader).split(b'\n');
                let command = parse(&lines.next_segment().await.unwrap().unwrap()).unwrap();
                let now = answer(&command["arguments"]["id"]);
                if round == 0 {
                    late = now;
                    while let Ok(Some(_)) = lines.next_segment().await {}
                    continue;
                }
                writer.write_all(late.as_bytes()).await.unwrap();
                writer.write_all(now.as_bytes()).await.unwrap();
                lines.next_segment().await.unwrap();
                writer.write_all(b"{\"return\": \"right\"}\n").await.unwrap();
            }
        });
        GuestAgent::connect(&socket, Duration::from_millis(50)).await.unwrap_err();
        let mut agent = GuestAgent::connect(&socket, SECOND).await.unwrap();
        assert_eq!(agent.execute("guest-next", Value::Null, SECOND).await.unwrap(), "right");
    }

    #[tokio::test]
    async fn a_program_is_waited_for_and_its_output_is_bounded() {
        let mut looks = 0;
        let script = Script::new(move |name, arguments| match name {
            "guest-exec" => {
                assert_eq!(arguments["arg"], json!(["-q"]));
                Some(json!({ "return": { "pid": 7 } }))
            }
            _ => {
                assert_eq!(arguments["pid"], 7);
                looks += 1;
                let out = BASE64.encode(&vec![b'x'; 2 * LONGEST_OUTPUT]);
                Some(match looks {
                    1 => json!({ "return": { "exited": false } }),
                    2 => {
                        json!({ "return": { "exited": true, "exitcode": 2, "out-data": out, "err-data": "bm8=" } })
                    }
                    3 => json!({ "return": { "exited": true, "signal": 9, "out-data": 5 } }),
                    _ => json!({ "return": { "exited": false } }),
                })
            }
        });
        let mut agent = GuestAgent::connect(&script.socket, SECOND).await.unwrap();
        let arguments = ["-q".to_owned()];
        let ran = agent.run("/bin/ready", &arguments, SECOND).await.unwrap();
        assert_eq!((ran.exit_code, ran.output.len()), (Some(2), LONGEST_OUTPUT + 2));
        assert!(ran.output.ends_with(b"no"));
        let killed = agent.run("/bin/ready", &arguments, SECOND).await.unwrap();
        assert_eq!(killed, Ran { exit_code: None, output: Vec::new() });
        let error = agent.run("/bin/ready", &arguments, 3 * POLL).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Deadline);
    }

    #[tokio::test]
    async fn a_refusal_is_one_short_line() {
        let long = "a\n".repeat(1000);
        let script = Script::new(move |_, _| Some(json!({ "error": { "desc": long } })));
        let mut agent = GuestAgent::connect(&script.socket, SECOND).await.unwrap();
        let error = agent.ping(SECOND).await.unwrap_err();
        assert_eq!((error.detail().len(), error.detail().contains('\n')), (500, false));
    }

    proptest! {
        #[test]
        fn no_line_panics(line: Vec<u8>) {
            let _ = parse(&line);
        }
    }
}

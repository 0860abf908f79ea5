//! What has to hold of a machine that was started: as people write it, and how it is looked at.

use super::guest::Guest;
use rempart_repository::{ConsistencyLevel, Point};
use std::fmt;
use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// How long a program may take in the guest, each time it is tried.
const RUN: Duration = Duration::from_secs(30);
/// How long a guest may take to answer a connection before another is tried: it may not have had an address yet.
const CONNECT: Duration = Duration::from_secs(5);
/// How much of what a port says is looked at.
const LONGEST_BANNER: usize = 4096;
/// A machine that changes nothing for so long has come to something.
const QUIET: Duration = Duration::from_secs(15);
/// Between two looks at the screen.
const LOOK: Duration = Duration::from_secs(1);
/// What no firmware and no boot loader that found nothing reads of its disks; any kernel is more.
const BOOTED: u64 = 4 << 20;
/// A cursor blinks, and a clock goes on: one byte in so many.
const UNNOTICED: usize = 100;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// The guest agent answers.
    Agent,
    /// The guest agent runs these words, and they end with 0.
    Exec(Vec<String>),
    /// The guest takes a connection, and says that.
    Tcp { port: u16, says: Option<String> },
    /// That is said on the serial console.
    Serial(String),
    /// It read an operating system's worth of its disks, and then stood still.
    Quiet,
}

impl FromStr for Check {
    type Err = String;

    fn from_str(text: &str) -> Result<Check, String> {
        let port = |text: &str| match text.parse() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(format!("`{text}` is no port")),
        };
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        match (kind, rest) {
            ("agent", "") => Ok(Check::Agent),
            ("quiet", "") => Ok(Check::Quiet),
            ("exec", command) => match shlex::split(command) {
                Some(words) if !words.is_empty() => Ok(Check::Exec(words)),
                _ => Err(format!("`{command}` is no command")),
            },
            ("tcp", rest) => match rest.split_once('=') {
                Some((_, "")) => Err("nothing is no text that a port could say".to_owned()),
                Some((number, says)) => Ok(Check::Tcp { port: port(number)?, says: Some(says.to_owned()) }),
                None => Ok(Check::Tcp { port: port(rest)?, says: None }),
            },
            ("serial", says) if !says.is_empty() => Ok(Check::Serial(says.to_owned())),
            _ => Err(format!(
                "`{text}` is no check; there are `agent`, `exec:COMMAND`, `tcp:PORT`, `tcp:PORT=TEXT`, `serial:TEXT` \
                 and `quiet`"
            )),
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Check::Agent => f.write_str("agent"),
            Check::Exec(words) => write!(f, "exec:{}", words.join(" ")),
            Check::Tcp { port, says: None } => write!(f, "tcp:{port}"),
            Check::Tcp { port, says: Some(says) } => write!(f, "tcp:{port}={says}"),
            Check::Serial(says) => write!(f, "serial:{says}"),
            Check::Quiet => f.write_str("quiet"),
        }
    }
}

impl Check {
    /// The port of the guest that it asks.
    pub fn port(&self) -> Option<u16> {
        match self {
            Check::Tcp { port, .. } => Some(*port),
            _ => None,
        }
    }

    /// What is asked of a machine of which nobody said anything: its agent, where that took part in the backup.
    pub fn of(point: &Point) -> Check {
        match point.consistency.level {
            // What a machine froze itself nobody's agent had a hand in.
            _ if point.definition.is_none() => Check::Quiet,
            ConsistencyLevel::FileSystem | ConsistencyLevel::Application => Check::Agent,
            _ => Check::Quiet,
        }
    }
}

/// What these checks leave open.
pub fn unchecked(checks: &[Check]) -> Vec<&'static str> {
    let has = |wanted: fn(&Check) -> bool| checks.iter().any(wanted);
    let mut open = Vec::new();
    if !has(|check| matches!(check, Check::Agent | Check::Exec(_))) {
        open.push("whether its guest agent answers");
    }
    if !has(|check| matches!(check, Check::Exec(_) | Check::Tcp { .. })) {
        open.push("whether any service works");
    }
    if checks.iter().all(|check| *check == Check::Quiet) {
        open.push(
            "whether what runs is well: it read its disks and came to rest, and that may be an error message",
        );
    }
    open
}

/// A check, and what came of it so far.
#[derive(Debug)]
pub struct Probe {
    pub check: Check,
    /// After how long it held.
    pub held: Option<Duration>,
    /// How it held, or why it does not yet.
    pub detail: String,
    connection: Option<Connection>,
    screen: Option<Screen>,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    since: Instant,
    heard: Vec<u8>,
}

#[derive(Debug)]
struct Screen {
    image: Vec<u8>,
    console: u64,
    still_since: Instant,
    looked: Instant,
}

impl Probe {
    pub fn new(check: Check) -> Probe {
        Probe { check, held: None, detail: "it was not looked at".to_owned(), connection: None, screen: None }
    }

    /// Whether it holds by now.
    pub async fn look(&mut self, guest: &mut Guest<'_>) -> bool {
        let found = match self.check.clone() {
            Check::Agent => agent(guest).await,
            Check::Exec(words) => exec(guest, &words).await,
            Check::Tcp { port, says } => {
                let found = self.tcp(guest, port, says.as_deref()).await;
                if found.is_ok() {
                    // A service may have time for one at once.
                    self.connection = None;
                }
                found
            }
            Check::Serial(says) => match guest.console.contains(&says) {
                true => Ok("it was said".to_owned()),
                false => Err("it was not said".to_owned()),
            },
            Check::Quiet => self.quiet(guest).await,
        };
        let holds = found.is_ok();
        self.detail = found.unwrap_or_else(|why_not| why_not);
        holds
    }

    /// QEMU takes a connection before the guest is asked: what counts is what came of it there.
    async fn tcp(&mut self, guest: &mut Guest<'_>, port: u16, says: Option<&str>) -> Result<String, String> {
        let Some(host_port) = guest.forwarded(port).await else {
            return Err("the machine has no network card".to_owned());
        };
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                let address = SocketAddr::from((Ipv4Addr::LOCALHOST, host_port));
                let stream = TcpStream::connect(address).map_err(|e| e.to_string())?;
                stream.set_nonblocking(true).map_err(|e| e.to_string())?;
                none.insert(Connection { stream, since: Instant::now(), heard: Vec::new() })
            }
        };
        let mut chunk = [0; LONGEST_BANNER];
        let over = match connection.stream.read(&mut chunk) {
            Ok(0) => Some("the guest refused the connection, or closed it".to_owned()),
            Ok(count) => {
                let room = LONGEST_BANNER - connection.heard.len();
                connection.heard.extend_from_slice(&chunk[..count.min(room)]);
                None
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => None,
            Err(error) => Some(error.to_string()),
        };
        let heard = plain(&connection.heard, 100);
        match says {
            Some(says) if contains(&connection.heard, says) => return Ok(format!("it said `{heard}`")),
            None if !heard.is_empty() => return Ok(format!("it took the connection, and said `{heard}`")),
            None if over.is_none() && guest.is_established(host_port).await => {
                return Ok("it took the connection".to_owned());
            }
            _ => {}
        }
        let why_not = match over {
            None if connection.since.elapsed() < CONNECT => return Err("no answer yet".to_owned()),
            None => "no answer".to_owned(),
            Some(why) => why,
        };
        self.connection = None;
        Err(if heard.is_empty() { why_not } else { format!("it said `{heard}`; {why_not}") })
    }

    async fn quiet(&mut self, guest: &mut Guest<'_>) -> Result<String, String> {
        if guest.client.is_open_in_guest("agent").await.is_ok_and(|open| open) {
            return Ok("its guest agent has opened its channel".to_owned());
        }
        let now = Instant::now();
        if self.screen.as_ref().is_some_and(|screen| now - screen.looked < LOOK) {
            return Err(std::mem::take(&mut self.detail));
        }
        let (image, console) = (guest.screen().await, guest.console.bytes());
        let still_since = match &self.screen {
            Some(was) if was.console == console && is_alike(&was.image, &image) => was.still_since,
            _ => now,
        };
        self.screen = Some(Screen { image, console, still_since, looked: now });
        let read = guest.read_bytes().await;
        let has_read = format!("it has read {} of its disks", crate::output::bytes(read));
        let still = now - still_since;
        if read < BOOTED {
            return Err(format!("{has_read}, which is less than an operating system"));
        }
        match still >= QUIET {
            true => {
                Ok(format!("{has_read}, and nothing changed on screen and console for {} s", still.as_secs()))
            }
            false => Err(format!("{has_read}, and still changes")),
        }
    }
}

async fn agent(guest: &mut Guest<'_>) -> Result<String, String> {
    let agent = guest.agent().await?;
    match agent.info(Duration::from_secs(5)).await {
        Ok(info) => Ok(format!("version {}", plain(info.version.as_bytes(), 100))),
        Err(error) => {
            guest.forget_agent();
            Err(error.to_string())
        }
    }
}

async fn exec(guest: &mut Guest<'_>, words: &[String]) -> Result<String, String> {
    let agent = guest.agent().await?;
    let ran = match agent.run(&words[0], &words[1..], RUN).await {
        Ok(ran) => ran,
        Err(error) => {
            guest.forget_agent();
            return Err(error.to_string());
        }
    };
    let said = plain(&ran.output, 200);
    let said = if said.is_empty() { said } else { format!(": {said}") };
    match ran.exit_code {
        Some(0) => Ok(format!("it ended with 0{said}")),
        Some(code) => Err(format!("it ended with {code}{said}")),
        None => Err(format!("it did not end by itself{said}")),
    }
}

/// One line of what a guest said, without what would move a terminal's cursor.
pub fn plain(bytes: &[u8], longest: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let line = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c });
    line.take(longest).collect()
}

fn contains(bytes: &[u8], text: &str) -> bool {
    String::from_utf8_lossy(bytes).contains(text)
}

fn is_alike(one: &[u8], other: &[u8]) -> bool {
    let differ = one.iter().zip(other).filter(|(one, other)| one != other).count();
    one.len() == other.len() && differ <= one.len() / UNNOTICED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_read_as_they_are_written() {
        for text in
            ["agent", "quiet", "exec:/usr/bin/pg_isready -q", "tcp:22", "tcp:25=220 ", "serial:login: "]
        {
            assert_eq!(text.parse::<Check>().expect(text).to_string(), text);
        }
        let quoted = "exec:/bin/sh -c 'exit 1'".parse::<Check>();
        assert_eq!(quoted, Ok(Check::Exec(["/bin/sh", "-c", "exit 1"].map(str::to_owned).to_vec())));
        let wrong =
            ["", "agents", "agent:x", "exec:", "exec:'", "tcp:", "tcp:0", "tcp:65536", "tcp:22=", "tcp:x=y"];
        for text in wrong.into_iter().chain(["serial:", "serial", "quiet:1"]) {
            text.parse::<Check>().expect_err(text);
        }
    }

    #[test]
    fn a_blinking_cursor_is_no_change() {
        let screen = vec![0; 720 * 400 * 3];
        let mut blinked = screen.clone();
        blinked[100..100 + 9 * 2 * 3].fill(170);
        assert!(is_alike(&screen, &blinked));
        blinked[..10_000].fill(170);
        assert!(!is_alike(&screen, &blinked));
        assert!(!is_alike(&screen, &screen[1..]));
    }

    #[test]
    fn what_a_guest_says_stays_on_its_line() {
        assert_eq!(plain(b"220 mail\x1b[2J\r\n", 100), "220 mail [2J");
        assert_eq!(plain(b"abc\xff", 3), "abc");
    }
}

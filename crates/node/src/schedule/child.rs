//! This program as a process of its own, which works on a repository: it needs much memory and time, meets what others
//! wrote, and harms nobody when it dies.

use super::hold;
use rempart_api::{Error, ErrorKind, Progress};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::Deserialize;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;
use tokio::sync::oneshot;

/// Behind the guests and the daemon.
const NICE: i32 = 10;
/// Lines of stderr that are kept, the last ones.
const KEPT_LINES: usize = 50;
const LONGEST_ANSWER: u64 = 16 << 20;
/// After SIGTERM: a view is taken out of another's QEMU meanwhile.
const TERM_PATIENCE: Duration = Duration::from_secs(20);
/// After SIGKILL, which only the kernel can hold up.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// What would say otherwise than the arguments do.
const NOT_INHERITED: [&str; 8] = [
    "REMPART_REPOSITORY",
    "REMPART_KEY_FILE",
    "REMPART_PASSPHRASE_FILE",
    "REMPART_CREDENTIALS_FILE",
    "REMPART_COPY_REPOSITORY",
    "REMPART_COPY_KEY_FILE",
    "REMPART_COPY_PASSPHRASE_FILE",
    "REMPART_COPY_CREDENTIALS_FILE",
];

#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    /// Of the daemon's API.
    socket: PathBuf,
}

#[derive(Deserialize)]
struct Line {
    progress: Progress,
}

type Ended = Result<serde_json::Value, Error>;

/// Processes that were killed and did not go, since they hang in the kernel. Nobody waits for them.
#[derive(Debug, Default)]
pub struct Hanging(Mutex<Vec<(u32, oneshot::Receiver<Ended>)>>);

impl Hanging {
    /// Those that are still there.
    pub fn pids(&self) -> Vec<u32> {
        let mut all = hold(&self.0);
        all.retain_mut(|(_, ended)| matches!(ended.try_recv(), Err(oneshot::error::TryRecvError::Empty)));
        all.iter().map(|(pid, _)| *pid).collect()
    }
}

/// A process by what no other can be taken for.
struct Process {
    pid: u32,
    handle: OwnedFd,
}

impl Process {
    fn of(child: &Child) -> std::io::Result<Process> {
        let pid = Pid::from_child(child);
        Ok(Process { pid: child.id(), handle: rustix::process::pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// Ends it, with `why` for an answer where it did not do its work before. Who hangs in the kernel is left to `hanging`.
    async fn end(self, mut ended: oneshot::Receiver<Ended>, why: Error, hanging: &Hanging) -> Ended {
        for (signal, patience) in [(Signal::TERM, TERM_PATIENCE), (Signal::KILL, KILL_PATIENCE)] {
            // It may be gone already.
            let _ = rustix::process::pidfd_send_signal(&self.handle, signal);
            if let Ok(ended) = tokio::time::timeout(patience, &mut ended).await {
                return ended.unwrap_or_else(|_| Err(defect())).map_err(|_| why);
            }
        }
        let place = waits_in(self.pid).map_or_else(String::new, |place| format!(", in `{place}`"));
        let told =
            format!("process {} was killed and hangs in the kernel{place}; nobody waits for it", self.pid);
        tracing::error!(pid = self.pid, "{told}");
        hold(&hanging.0).push((self.pid, ended));
        Err(why.cause(told).hint("see why the repository's place does not answer"))
    }
}

/// Where in the kernel one of its threads waits for what no signal ends.
fn waits_in(pid: u32) -> Option<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    threads.flatten().find_map(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
        let state = stat.rsplit(')').next()?.trim_start();
        let place = std::fs::read_to_string(thread.path().join("wchan")).ok()?;
        (state.starts_with('D') && place != "0").then_some(place)
    })
}

fn defect() -> Error {
    Error::failed("a defect of the daemon ended what waited for a backup")
}

impl Program {
    pub fn new(socket: &Path) -> std::io::Result<Program> {
        Ok(Program { path: std::env::current_exe()?, socket: socket.to_owned() })
    }

    /// Runs a command to its end, or until there is a reason to end it; its answer.
    pub async fn run(
        &self,
        arguments: Vec<OsString>,
        until: impl Future<Output = Error>,
        hanging: &Hanging,
        tell: impl FnMut(Progress) + Send + 'static,
    ) -> Ended {
        let mut command = Command::new(&self.path);
        command.arg("--socket").arg(&self.socket).args(["--json", "--progress", "json"]).args(arguments);
        let (begun, process) = oneshot::channel();
        let (done, mut ended) = oneshot::channel();
        // A thread of its own, which lives as long as the process: the kernel ends the process with its parent's thread.
        let thread = std::thread::Builder::new().name("backup".to_owned()).spawn(move || {
            let _ = done.send(work(command, begun, tell));
        });
        thread.map_err(|e| Error::failed("cannot start a thread").cause(e))?;
        let why = tokio::select! {
            ended = &mut ended => return ended.unwrap_or_else(|_| Err(defect())),
            why = until => why,
        };
        match process.await {
            Ok(process) => process.end(ended, why, hanging).await,
            // It was not begun.
            Err(_) => ended.await.unwrap_or_else(|_| Err(defect())),
        }
    }
}

fn work(
    mut command: Command,
    begun: oneshot::Sender<Process>,
    mut tell: impl FnMut(Progress),
) -> Result<serde_json::Value, Error> {
    let failed = |e: &dyn std::fmt::Display| Error::failed("cannot run this program once more").cause(e);
    for name in NOT_INHERITED {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let daemon = rustix::process::getpid();
    // SAFETY: between fork and exec it makes system calls only.
    unsafe {
        command.pre_exec(move || {
            // It goes on with nothing that a later daemon would do again.
            rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
            if rustix::process::getppid() != Some(daemon) {
                return Err(std::io::ErrorKind::Interrupted.into());
            }
            rustix::process::nice(NICE)?;
            Ok(())
        });
    }
    let mut child = command.spawn().map_err(|e| failed(&e))?;
    match Process::of(&child) {
        Ok(process) => drop(begun.send(process)),
        Err(error) => {
            // Nobody could end it.
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(&error));
        }
    }
    // The daemon may be the last that the kernel ends for want of memory; this one need not.
    let _ = std::fs::write(format!("/proc/{}/oom_score_adj", child.id()), "0");
    let (out, err) = (child.stdout.take().expect("it is a pipe"), child.stderr.take().expect("it is a pipe"));
    let answering = std::thread::spawn(move || {
        let mut answer = Vec::new();
        out.take(LONGEST_ANSWER).read_to_end(&mut answer).map(|_| answer)
    });
    let mut said = VecDeque::new();
    for line in BufReader::new(err).lines() {
        let Ok(line) = line else { break };
        match serde_json::from_str::<Line>(&line) {
            Ok(line) => tell(line.progress),
            Err(_) => {
                said.push_back(line);
                if said.len() > KEPT_LINES {
                    said.pop_front();
                }
            }
        }
    }
    let answer = answering.join().expect("reading does not panic");
    let status = child.wait().map_err(|e| failed(&e))?;
    match status.code() {
        Some(0) => {
            let answer = answer.map_err(|e| failed(&e))?;
            serde_json::from_slice(&answer)
                .map_err(|e| Error::failed("cannot read what a backup answered").cause(e))
        }
        Some(code) => Err(error(code, &said)),
        None => Err(Error::failed("the process was ended from outside").cause(status)),
    }
}

/// From the lines that the program ends with.
fn error(code: i32, said: &VecDeque<String>) -> Error {
    let kind = match code {
        2 => ErrorKind::Invalid,
        3 => ErrorKind::Unreachable,
        4 => ErrorKind::Refused,
        _ => ErrorKind::Failed,
    };
    let last = |label: &str| {
        let found = said.iter().rev().find_map(|line| line.strip_prefix(label));
        found.map(|text| text.trim().to_owned())
    };
    let message = last("error:").or_else(|| said.back().cloned());
    let message = message.unwrap_or_else(|| format!("it ended with {code} and said nothing"));
    Error { kind, message, cause: last("cause:"), hint: last("hint:") }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shell(script: &str) -> (Result<serde_json::Value, Error>, Vec<Progress>) {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let mut told = Vec::new();
        (work(command, oneshot::channel().0, |progress| told.push(progress)), told)
    }

    #[tokio::test]
    async fn what_a_process_says_is_understood() {
        let line = r#"{"progress":{"phase":"p","done_bytes":1,"total_bytes":2,"new_bytes":null}}"#;
        let (answer, told) = shell(&format!("echo '{line}' >&2; echo '{{\"point\":7}}'")).await;
        assert_eq!(answer.unwrap()["point"], 7);
        assert_eq!(told.iter().map(|progress| progress.total_bytes).collect::<Vec<_>>(), [2]);
        let (answer, _) = shell("echo 'error: no' >&2; echo 'cause: because' >&2; exit 3").await;
        let expected = Error::unreachable("no").cause("because");
        assert_eq!(answer.unwrap_err(), expected);
        let (answer, _) = shell("kill -KILL $$").await;
        assert!(answer.unwrap_err().cause.unwrap().contains("signal"));
        let (answer, _) = shell("exit 101").await;
        assert!(answer.unwrap_err().message.contains("101"));
        let (answer, _) = shell("echo nonsense").await;
        answer.expect_err("no answer");
    }

    #[tokio::test]
    async fn it_stands_behind_others() {
        let (answer, _) = shell("cut -d' ' -f19 /proc/$$/stat").await;
        let here = rustix::process::getpriority_process(None).unwrap();
        assert_eq!(answer.unwrap(), (here + NICE).min(19));
    }
}

//! One network namespace: a machine as far as networking and killing are concerned.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::workspace::{output, run};

/// Ended processes leave `/proc` within this time, unless the kernel holds them.
const DEATH_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    pub fn create(name: String) -> Result<Namespace> {
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let namespace = Namespace { name };
        namespace.ip(&["link set lo up".to_owned()])?;
        Ok(namespace)
    }

    /// A namespace that exists, to be destroyed.
    pub fn existing(name: String) -> Namespace {
        Namespace { name }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that will run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        // `ip netns exec` also mounts this namespace's /sys, and replaces itself: the child's id is the program's.
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs `ip` commands inside, in one process.
    pub fn ip(&self, commands: &[String]) -> Result<()> {
        self.batch("ip", &["-n", &self.name, "-batch", "-"], &commands.join("\n"))
    }

    pub fn nft(&self, script: &str) -> Result<()> {
        self.batch("ip", &["netns", "exec", &self.name, "nft", "-f", "-"], script)
    }

    pub fn tc(&self, arguments: &str) -> Result<()> {
        output(Command::new("tc").args(["-n", &self.name]).args(arguments.split(' '))).map(drop)
    }

    fn batch(&self, program: &str, arguments: &[&str], script: &str) -> Result<()> {
        use std::io::Write;
        use std::process::Stdio;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {program}"))?;
        child.stdin.take().expect("piped").write_all(script.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("in namespace {}:\n{script}\n{}", self.name, said.trim_end());
        }
        Ok(())
    }

    /// Runs `work` on a thread that is inside; sockets it makes stay inside wherever they are used.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
        let path = format!("/run/netns/{}", self.name);
        let entered = || {
            let file = File::open(&path)?;
            // SAFETY: a valid descriptor; affects this thread only, which ends after the work.
            if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            work()
        };
        let result = thread::scope(|scope| scope.spawn(entered).join().expect("no panic in the namespace"));
        result.with_context(|| format!("in namespace {}", self.name))
    }

    /// Ids of the processes inside.
    pub fn processes(&self) -> Vec<i32> {
        let Ok(inside) = fs::metadata(format!("/run/netns/{}", self.name)) else { return Vec::new() };
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Ok(id) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            if id == std::process::id() as i32 {
                continue;
            }
            if let Ok(its) = fs::metadata(format!("/proc/{id}/ns/net"))
                && (its.dev(), its.ino()) == (inside.dev(), inside.ino())
            {
                found.push(id);
            }
        }
        found
    }

    /// Ids of the processes inside whose program's file name starts with `program`.
    pub fn running(&self, program: &str) -> Vec<i32> {
        let mut found = self.processes();
        found.retain(|id| {
            let Ok(path) = fs::read_link(format!("/proc/{id}/exe")) else { return false };
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(program))
        });
        found
    }

    /// Sends a signal to everything inside, again until no process is left that has not got it.
    pub fn signal_all(&self, signal: i32) {
        let mut signalled = Vec::new();
        loop {
            let fresh: Vec<_> = self.processes().into_iter().filter(|id| !signalled.contains(id)).collect();
            if fresh.is_empty() {
                return;
            }
            for id in fresh {
                send_signal(id, signal);
                signalled.push(id);
            }
        }
    }

    /// Kills everything inside and returns when it is gone.
    pub fn kill_all(&self) -> Result<()> {
        let deadline = Instant::now() + DEATH_DEADLINE;
        loop {
            let left = self.processes();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("processes {left:?} in namespace {} outlive SIGKILL", self.name);
            }
            for id in left {
                send_signal(id, libc::SIGKILL);
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends everything inside and removes the namespace with its devices. For clean-up: errors are printed.
    pub fn destroy(&self) {
        let ended = self.kill_all();
        let removed = run(Command::new("ip").args(["netns", "delete", &self.name]));
        for result in [ended, removed] {
            if let Err(error) = result {
                eprintln!("lab: clean up: {error:#}");
            }
        }
    }
}

pub fn send_signal(id: i32, signal: i32) {
    // SAFETY: kill has no memory effects; a process that is gone is no error here.
    unsafe { libc::kill(id, signal) };
}

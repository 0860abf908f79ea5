//! Processes in the lab's servers, and what happens to a whole server.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Host, Lab, Link, Side, namespace::send_signal};

/// A process we started; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it with no input and its output appended to `log`. It dies with the thread that starts it.
    pub fn start(command: &mut Command, log: &Path) -> Result<Process> {
        let file = File::options().create(true).append(true).open(log);
        let file = file.with_context(|| format!("open {}", log.display()))?;
        // SAFETY: prctl is async-signal-safe and touches only the new process.
        unsafe {
            command.pre_exec(|| {
                // Should we be killed, nothing of ours stays behind.
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 {
                    Ok(())
                } else {
                    Err(std::io::Error::last_os_error())
                }
            })
        };
        let child = command
            .stdin(Stdio::null())
            // A terminal's Ctrl-C is for us; we end it in order.
            .process_group(0)
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {}", crate::workspace::shown(command)))?;
        Ok(Process { child, log: log.to_owned() })
    }

    pub fn id(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn signal(&self, signal: i32) {
        send_signal(self.id(), signal);
    }

    /// Whether it still runs; collects its exit status if not.
    pub fn has_exited(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Kills it and returns when it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to stop and waits for that.
    pub fn stop(&mut self, deadline: Duration) -> Result<()> {
        self.signal(libc::SIGTERM);
        let end = Instant::now() + deadline;
        while self.has_exited()?.is_none() {
            if Instant::now() > end {
                self.kill()?;
                bail!("process {} did not stop within {deadline:?}; see {}", self.id(), self.log.display());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Lab {
    /// The machine dies as machines do: its links go down first, so that no peer sees a connection close, then
    /// everything on it is killed.
    pub fn power_off(&self, host: Host) -> Result<()> {
        self.set_cables(host, false)?;
        self.host(host).kill_all()
    }

    /// Everything on the machine is killed while its network works: peers see their connections reset.
    pub fn reset(&self, host: Host) -> Result<()> {
        self.host(host).kill_all()?;
        self.forget_runtime_state(host)
    }

    /// The machine is back with its cables, and nothing runs on it yet.
    pub fn power_on(&self, host: Host) -> Result<()> {
        self.forget_runtime_state(host)?;
        self.set_cables(host, true)
    }

    fn set_cables(&self, host: Host, up: bool) -> Result<()> {
        for link in Link::ALL.into_iter().filter(|link| link.ends().contains(&host)) {
            if up { self.restore(link)? } else { self.cut(link)? }
        }
        for side in Side::ALL.into_iter().filter(|side| side.host() == host) {
            let state = if up { "up" } else { "down" };
            self.observer(side).ip(&[format!("link set eth0 {state}")])?;
        }
        Ok(())
    }

    /// What a restart of the machine would have lost: network devices and packet filters that programs made.
    fn forget_runtime_state(&self, host: Host) -> Result<()> {
        let namespace = self.host(host);
        let list =
            crate::workspace::output(Command::new("ip").args(["-n", namespace.name(), "-json", "link"]))?;
        let devices: serde_json::Value = serde_json::from_str(&list).context("parse ip's list of devices")?;
        let ours: Vec<_> = Link::ALL.into_iter().map(Link::device).chain(["lo", "br0", "obs"]).collect();
        for device in devices.as_array().into_iter().flatten() {
            let name = device["ifname"].as_str().unwrap_or_default();
            if !ours.contains(&name) {
                // The kernel takes a dead program's devices away by itself, perhaps at this moment.
                match namespace.ip(&[format!("link delete {name}")]) {
                    Err(error) if !format!("{error:#}").contains("Cannot find device") => return Err(error),
                    _ => {}
                }
            }
        }
        namespace.nft("flush ruleset")
    }
}

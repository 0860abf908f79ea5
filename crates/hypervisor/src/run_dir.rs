//! A machine's run directory: what the driver, the guard and QEMU leave there for each other.
//!
//! | file | written by | for |
//! |---|---|---|
//! | `launch.json` | driver, before the guard starts | the guard: what to run, under which lease |
//! | `lock` | guard, locked for its whole life | nobody starts the machine twice |
//! | `state.json` | guard | a later daemon: which processes these are |
//! | `guard.sock` | guard | the daemon |
//! | `exit.json` | guard, when QEMU is gone | a later daemon: how it ended |
//! | `guard.log`, `qemu.log` | guard, QEMU | people |
//! | `qmp.sock`, `console.sock`, `agent.sock`, `console.log`, `qemu.pid` | QEMU | the daemon, people |
//! | `nvram.fd` | driver, then QEMU | the firmware's variables |
//!
//! It belongs on a file system that is emptied at boot (`/run`), and is readable by its owner only: who can open
//! `guard.sock` owns the machine.

use crate::error::{Error, ErrorKind, Result};
use crate::machine::{ExitRecord, Lease};
use crate::process::ProcessIdentity;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Version of `launch.json` and `state.json`. The guard is started by the daemon that wrote the first; a guard of an
/// older version may have written the second.
pub(crate) const FILES_VERSION: u32 = 1;

/// A unix socket's path has 107 bytes; the longest name in here needs 13.
const LONGEST_RUN_DIR: usize = 90;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunDir {
    path: PathBuf,
}

/// What the guard is to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Launch {
    pub version: u32,
    pub machine: String,
    /// QEMU's program and arguments; the guard adds its own monitor and the TAP devices.
    pub command: Vec<String>,
    pub taps: Vec<TapLaunch>,
    pub lease: Lease,
    pub guard_stop_ms: u64,
    pub run_vcpus: bool,
    pub network_gate: bool,
    pub watchdog: Option<PathBuf>,
    /// User and group.
    pub run_as: Option<(u32, u32)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TapLaunch {
    pub interface: String,
    pub bridge: String,
    /// What QEMU's NIC device calls it.
    pub netdev: String,
    /// Move frames in the kernel.
    pub vhost: bool,
}

/// Which processes these are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub version: u32,
    pub machine: String,
    pub guard: ProcessIdentity,
    /// None before it was started.
    pub qemu: Option<ProcessIdentity>,
}

impl RunDir {
    pub(crate) fn new(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let action = || format!("use `{}` as a run directory", path.display());
        if path.as_os_str().len() > LONGEST_RUN_DIR {
            let detail = format!("sockets are in it, so its path has at most {LONGEST_RUN_DIR} bytes");
            return Err(Error::new(ErrorKind::InvalidDefinition, action(), detail));
        }
        let Some(text) = path.to_str().filter(|_| path.is_absolute()) else {
            return Err(Error::new(
                ErrorKind::InvalidDefinition,
                action(),
                "it is not an absolute path of UTF-8",
            ));
        };
        if text.contains(',') {
            // QEMU separates its options with it.
            return Err(Error::new(ErrorKind::InvalidDefinition, action(), "there is a comma in it"));
        }
        Ok(Self { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn create(&self) -> Result<()> {
        let mut builder = std::fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(|error| Error::io(format!("make `{}`", self.path.display()), error))
    }

    /// Takes the lock that says a guard lives here; None if another holds it.
    pub(crate) fn lock(&self) -> Result<Option<File>> {
        let action = || format!("lock `{}`", self.path.display());
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.file("lock"))
            .map_err(|error| Error::io(action(), error))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(error)) => Err(Error::io(action(), error)),
        }
    }

    pub(crate) fn read_launch(&self) -> Result<Launch> {
        let launch: Launch = self.read("launch.json")?.ok_or_else(|| {
            Error::new(
                ErrorKind::NotRunning,
                format!("read `{}`", self.file("launch.json").display()),
                "no such file",
            )
        })?;
        check_version(launch.version)?;
        Ok(launch)
    }

    pub(crate) fn write_launch(&self, launch: &Launch) -> Result<()> {
        self.write_json("launch.json", launch)
    }

    pub(crate) fn read_state(&self) -> Result<Option<State>> {
        let state: Option<State> = self.read("state.json")?;
        state.map(|state| check_version(state.version).map(|()| state)).transpose()
    }

    pub(crate) fn write_state(&self, state: &State) -> Result<()> {
        self.write_json("state.json", state)
    }

    pub(crate) fn read_exit(&self) -> Result<Option<ExitRecord>> {
        self.read("exit.json")
    }

    pub(crate) fn write_exit(&self, record: &ExitRecord) -> Result<()> {
        self.write_json("exit.json", record)
    }

    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        match std::fs::remove_file(self.file(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove `{}`", self.file(name).display()), error))
            }
            _ => Ok(()),
        }
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let action = || format!("read `{}`", self.file(name).display());
        let bytes = match std::fs::read(self.file(name)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(action(), error)),
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::new(ErrorKind::Protocol, action(), error.to_string()))
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        let bytes = serde_json::to_vec(value).expect("these have only strings for keys");
        self.write(name, &bytes)
    }

    /// Replaces a file as a whole, so that no reader sees half of it. It is gone after a power loss, as is what it
    /// speaks of: hence no fsync.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let target = self.file(name);
        let draft = self.file(&format!("{name}.new"));
        let write = || {
            let mut file =
                OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
            file.write_all(bytes)?;
            std::fs::rename(&draft, &target)
        };
        write().map_err(|error| Error::io(format!("write `{}`", target.display()), error))
    }

    /// The end of a log, for an error message: its last lines, at most 500 bytes.
    pub(crate) fn log_tail(&self, name: &str) -> String {
        let bytes = std::fs::read(self.file(name)).unwrap_or_default();
        let tail = &bytes[bytes.len().saturating_sub(500)..];
        let text = String::from_utf8_lossy(tail);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(3)..].join("; ")
    }
}

fn check_version(version: u32) -> Result<()> {
    if version == FILES_VERSION {
        return Ok(());
    }
    let detail = format!("its files have version {version}, this program knows {FILES_VERSION}");
    Err(Error::new(ErrorKind::Protocol, "use this run directory", detail))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(dir.path()).unwrap();
        let held = run_dir.lock().unwrap();
        assert!(held.is_some());
        assert!(run_dir.lock().unwrap().is_none());
        drop(held);
        assert!(run_dir.lock().unwrap().is_some());
    }

    #[test]
    fn a_state_of_another_version_is_refused_and_garbage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(dir.path()).unwrap();
        assert_eq!(run_dir.read_state().unwrap(), None);
        run_dir
            .write(
                "state.json",
                br#"{"version":9,"machine":"a","qemu":null,"guard":{"pid":1,"start_ticks":1,"boot_id":""}}"#,
            )
            .unwrap();
        assert_eq!(
            run_dir.read_state().unwrap_err().detail(),
            "its files have version 9, this program knows 1"
        );
        run_dir.write("state.json", b"\0\0\0").unwrap();
        assert_eq!(run_dir.read_state().unwrap_err().kind(), ErrorKind::Protocol);
    }

    #[test]
    fn paths_that_cannot_hold_sockets_are_refused() {
        assert!(RunDir::new(format!("/{}", "a".repeat(95))).is_err());
        assert!(RunDir::new("relative").is_err());
        assert!(RunDir::new("/a,b").is_err());
    }
}

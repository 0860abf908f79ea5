//! Commands that go on until they are ended, and other people's programs beside them.

use crate::backup::Vault;
use serde_json::Value;
use std::fs::File;
use std::io::{PipeReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Far above what anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that a pipe holds.
const PIPE: usize = 64 * 1024;

pub struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Until it says, on stderr, that it is ready.
    pub fn start(vault: &Vault, arguments: &[&str], ready: &str) -> Running {
        let log = vault.rack.path(&format!("{}.log", arguments[0]));
        let child = vault.command(arguments).stderr(File::create(&log).unwrap()).spawn().unwrap();
        let mut running = Running { child, log };
        running.until("it is ready", |running| {
            let ended = running.child.try_wait().unwrap();
            let is_ready = running.log().contains(ready);
            assert!(is_ready || ended.is_none(), "{arguments:?} ended: {}", running.log());
            is_ready
        });
        running
    }

    /// The same with `--json`: what it said.
    pub fn start_json(vault: &Vault, arguments: &[&str]) -> (Running, Value) {
        let log = vault.rack.path(&format!("{}.log", arguments[0]));
        let mut command = vault.command(&[arguments, &["--json"]].concat());
        command.stdout(Stdio::piped()).stderr(File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let mut values = serde_json::Deserializer::from_reader(child.stdout.take().unwrap()).into_iter();
        let running = Running { child, log };
        match values.next() {
            Some(Ok(value)) => (running, value),
            other => panic!("{arguments:?} said {other:?}: {}", running.log()),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// One that stands still as soon as it says something on stderr, until somebody reads that.
    pub fn start_unheard(vault: &Vault, arguments: &[&str]) -> (Running, PipeReader) {
        Running::unheard(vault, vault.command(arguments))
    }

    pub fn unheard(vault: &Vault, mut command: Command) -> (Running, PipeReader) {
        let log = vault.rack.path("unheard.log");
        File::create(&log).unwrap();
        let (said, mut full) = std::io::pipe().unwrap();
        full.write_all(&[b'\n'; PIPE]).unwrap();
        let child = command.stderr(full).spawn().unwrap();
        (Running { child, log }, said)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Running) -> bool) {
        let start = Instant::now();
        while !is_so(self) {
            assert!(start.elapsed() < PATIENCE, "waited in vain until {what}: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn terminate(&self) {
        tool(&["kill", "-TERM", &self.child.id().to_string()]);
    }

    /// Its exit code, once it ended by itself.
    pub fn ended(mut self) -> i32 {
        let mut code = None;
        self.until("it ended", |running| {
            code = running.child.try_wait().unwrap();
            code.is_some()
        });
        code.and_then(|status| status.code()).expect("no signal ended it")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn output(command: &[&str]) -> Output {
    let output = Command::new(command[0]).args(&command[1..]).stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("cannot run `{}`: {error}", command[0]))
}

/// What is mounted at a place, until this is dropped.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// `mount` is told these, and the place, which is made.
    #[track_caller]
    pub fn at(place: &Path, arguments: &[&str]) -> Mounted {
        std::fs::create_dir(place).unwrap();
        tool(&[&["mount"], arguments, &[place.to_str().unwrap()]].concat());
        Mounted(place.to_owned())
    }

    /// A new file system in a new file of `bytes` beside the place.
    #[track_caller]
    pub fn image(place: &Path, bytes: u64, mkfs: &[&str]) -> Mounted {
        let image = place.with_extension("img");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        tool(&[mkfs, &[image.to_str().unwrap()]].concat());
        Mounted::at(place, &["-o", "loop", image.to_str().unwrap()])
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy", "--recursive"]).arg(&self.0).status();
    }
}

/// Waits until it is so; for a minute at most.
#[track_caller]
pub fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What a program printed, which has to succeed.
#[track_caller]
pub fn tool(command: &[&str]) -> String {
    let output = output(command);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {}{err}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stdout).unwrap() + &err
}

/// What a program complained of, which has to fail.
#[track_caller]
pub fn refused(command: &[&str]) -> String {
    let output = output(command);
    let told = [output.stdout, output.stderr].concat();
    let told = String::from_utf8_lossy(&told).into_owned();
    assert!(!output.status.success(), "{command:?}: {told}");
    told
}

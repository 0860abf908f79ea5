//! Other people's NBD programs. They are required: a test does not pass because one is missing.

use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A program of `package`, which must be installed. It is killed after a minute.
pub fn tool(program: &str, package: &str) -> Command {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).is_file()));
    assert!(found, "`{program}` is missing: install the package `{package}`, as `cargo xtask setup` does");
    let mut command = Command::new("timeout");
    command.arg("--kill-after=5").arg("60").arg(program);
    command.stdin(Stdio::null());
    command
}

pub fn nbdinfo() -> Command {
    tool("nbdinfo", "libnbd-bin")
}

pub fn nbdcopy() -> Command {
    tool("nbdcopy", "libnbd-bin")
}

pub fn qemu_img() -> Command {
    tool("qemu-img", "qemu-utils")
}

pub fn qemu_io() -> Command {
    tool("qemu-io", "qemu-utils")
}

pub fn fio() -> Command {
    tool("fio", "fio")
}

/// Runs it, and gives what it printed; it must succeed.
pub fn run(command: &mut Command) -> String {
    let output = run_any(command);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} failed ({}):\n{out}{err}", output.status);
    out.into_owned()
}

pub fn run_any(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"))
}

/// `qemu-io` with these commands against `target`.
pub fn qemu_io_commands(target: &str, commands: &[&str]) -> String {
    let mut command = qemu_io();
    command.args(["-f", "raw"]);
    for text in commands {
        command.arg("-c").arg(text);
    }
    run(command.arg(target))
}

/// A server in the background that ends with this value.
pub struct Serving(Pid);

impl Serving {
    /// Starts a server that goes into the background once it listens, and leaves its number in `pid_file`.
    pub fn start(command: &mut Command, pid_file: &Path) -> Serving {
        let status = command.stdout(Stdio::null()).status().unwrap();
        assert!(status.success(), "{command:?} did not start");
        let number = std::fs::read_to_string(pid_file).unwrap();
        Serving(Pid::from_raw(number.trim().parse().unwrap()).unwrap())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}

pub fn text(path: &(impl AsRef<OsStr> + ?Sized)) -> String {
    path.as_ref().to_str().unwrap().to_owned()
}

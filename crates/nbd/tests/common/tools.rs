//! Other people's NBD programs. They are required: a test does not pass because one is missing.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

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

/// A server process that ends with this value.
pub struct Serving(Child);

impl Serving {
    /// Starts a server that writes the file `pid_file` once it listens.
    pub fn start(command: &mut Command, pid_file: &Path) -> Serving {
        // A pipe in place of the file tells the moment it is written, without looking again and again.
        run(Command::new("mkfifo").arg(pid_file));
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let serving = Serving(child);
        let mut line = String::new();
        BufReader::new(std::fs::File::open(pid_file).unwrap()).read_line(&mut line).unwrap();
        assert!(!line.trim().is_empty(), "{command:?} did not start");
        serving
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn text(path: &(impl AsRef<OsStr> + ?Sized)) -> String {
    path.as_ref().to_str().unwrap().to_owned()
}

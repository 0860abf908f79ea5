//! Servers of Python, which keep what they are told as files. Other crates' tests use them, too.

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

pub struct Receiver {
    pub port: u16,
    child: Child,
    home: TempDir,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Receiver {
    pub fn start(program: &str, arguments: &[&str]) -> Receiver {
        let home = TempDir::new().expect("a directory");
        // The one whose modules are Debian's packages, whatever else comes first in the path.
        let mut command = Command::new("/usr/bin/python3");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../notify/tests/it").join(program));
        let mut child =
            command.arg(home.path()).args(arguments).stdout(Stdio::piped()).spawn().expect("it starts");
        let mut line = String::new();
        let said = child.stdout.take().expect("it is a pipe");
        BufReader::new(said).read_line(&mut line).expect("it can be read");
        let port = line.trim().parse().expect("its port; hint: apt-get install python3-aiosmtpd");
        Receiver { port, child, home }
    }

    /// What it was told, in order.
    pub fn kept(&self) -> Vec<Value> {
        let mut paths: Vec<PathBuf> = fs::read_dir(self.home.path())
            .expect("listed")
            .map(|entry| entry.expect("listed").path())
            .collect();
        paths.sort();
        paths
            .iter()
            .map(|path| serde_json::from_slice(&fs::read(path).expect("read")).expect("JSON"))
            .collect()
    }
}

/// A file for its owner only.
pub fn secret(path: &Path, content: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, content).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("set");
}

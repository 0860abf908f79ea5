//! moto, a server that speaks S3, with an empty bucket in its memory.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::lab::send_signal;
use crate::workspace::{lab_dir, run as succeed};

pub const BUCKET: &str = "backups";

/// With one request at a time in it, as the tests start it.
const SERVER: &str = include_str!("../../../crates/objects/tests/it/moto.py");

/// Waits until the server is there, and makes the bucket.
const MAKE_BUCKET: &str = "
import sys, time, urllib.request
sign = 'AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0'
for left in range(600, -1, -1):
    try:
        urllib.request.urlopen(urllib.request.Request(sys.argv[1], method='PUT', headers={'Authorization': sign}))
        break
    except OSError:
        if not left: raise
        time.sleep(0.05)
";

/// The server, until it is dropped.
#[derive(Debug)]
pub struct Moto(Child);

impl Moto {
    /// Each of the two makes the command of a program: where the server is to be, and where its bucket is asked for.
    pub fn start(
        server: impl Fn(PathBuf) -> Command,
        client: impl Fn(PathBuf) -> Command,
        address: &str,
        port: u16,
    ) -> Result<Moto> {
        ensure!(home().join("whole").exists(), "moto is not installed: see what `cargo xtask setup` says");
        let mut command = server(python());
        command.args(["-c", SERVER, "-H", address, "-p", &port.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let moto = Moto(command.spawn().context("start moto")?);
        let bucket = format!("http://{address}:{port}/{BUCKET}");
        succeed(client(python()).args(["-c", MAKE_BUCKET, &bucket]))?;
        Ok(moto)
    }

    pub fn signal(&self, signal: i32) {
        send_signal(self.0.id() as i32, signal);
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The interpreter that moto was installed for.
pub fn python() -> PathBuf {
    home().join("bin/python")
}

fn home() -> PathBuf {
    lab_dir().join("moto")
}

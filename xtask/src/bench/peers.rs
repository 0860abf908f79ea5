//! The peers: QEMU's storage daemon with one copy, and its quorum driver with two, one of them behind TCP.

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::client::Client;
use super::server::Server;
use crate::interrupt;
use crate::lab::Process;

pub const SINGLE: &str = "qemu, one copy";
pub const QUORUM: &str = "qemu, quorum of two";
const EXPORT: &str = "disk";
const DISK_BYTES: usize = 1 << 30;
const START_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Peers {
    single: (Process, PathBuf),
    quorum: (Process, PathBuf),
    remote: Process,
}

impl Peers {
    pub fn start(folder: &Path) -> Result<Peers> {
        fs::create_dir_all(folder)?;
        for disk in ["single", "local", "remote"] {
            preallocate(&folder.join(disk))?;
        }
        let file = |name: &str| {
            format!(
                "driver=file,node-name={name},filename={},cache.direct=on,aio=io_uring",
                folder.join(name).display()
            )
        };
        let unix = |name: &str| format!("addr.type=unix,addr.path={}", folder.join(name).display());
        // Free when asked; whoever takes it in between makes the start fail, not the figures.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let tcp = format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port}");
        let export = |node: &str| format!("type=nbd,id=export,node-name={node},name={EXPORT},writable=on");
        let start = |arguments: &[&str]| {
            Process::start(Command::new("qemu-storage-daemon").args(arguments), &folder.join("log"))
        };

        let single_socket = folder.join("single.sock");
        let single = start(&[
            "--blockdev",
            &file("single"),
            "--nbd-server",
            &unix("single.sock"),
            "--export",
            &export("single"),
        ])?;
        let remote =
            start(&["--blockdev", &file("remote"), "--nbd-server", &tcp, "--export", &export("remote")])?;
        wait_until("the remote copy listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok())?;
        let quorum_socket = folder.join("quorum.sock");
        let quorum = start(&[
            "--blockdev",
            &file("local"),
            "--blockdev",
            &format!(
                "driver=nbd,node-name=far,server.type=inet,server.host=127.0.0.1,server.port={port},export={EXPORT}"
            ),
            "--blockdev",
            "driver=quorum,node-name=both,children.0=local,children.1=far,vote-threshold=2",
            "--nbd-server",
            &unix("quorum.sock"),
            "--export",
            &export("both"),
        ])?;
        for socket in [&single_socket, &quorum_socket] {
            wait_until("the peers serve", || Client::connect(socket, EXPORT).is_ok())
                .with_context(|| fs::read_to_string(folder.join("log")).unwrap_or_default())?;
        }
        Ok(Peers { single: (single, single_socket), quorum: (quorum, quorum_socket), remote })
    }

    pub fn single(&self) -> Server {
        let (process, socket) = &self.single;
        Server { name: SINGLE, socket: socket.clone(), export: EXPORT, processes: vec![process.id()] }
    }

    pub fn quorum(&self) -> Server {
        let (process, socket) = &self.quorum;
        let processes = vec![process.id(), self.remote.id()];
        Server { name: QUORUM, socket: socket.clone(), export: EXPORT, processes }
    }
}

fn wait_until(what: &str, ready: impl Fn() -> bool) -> Result<()> {
    let end = Instant::now() + START_DEADLINE;
    while !ready() {
        interrupt::check()?;
        if Instant::now() > end {
            bail!("waited {START_DEADLINE:?} in vain until {what}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Written, not only allocated: a first write into allocated space costs the file system a journal commit.
fn preallocate(path: &Path) -> Result<()> {
    let mut file = File::options().create(true).write(true).truncate(true).mode(0o600).open(path)?;
    let zeroes = vec![0; 1 << 20];
    for _ in 0..DISK_BYTES / zeroes.len() {
        file.write_all(&zeroes)?;
    }
    file.sync_all().with_context(|| format!("write {}", path.display()))
}

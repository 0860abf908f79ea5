//! The peers: QEMU's storage daemon with one copy, and its quorum driver with two, one of them on the other node.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::disk;
use super::server::Server;
use crate::bench::client::Client;
use crate::interrupt;
use crate::lab::{Host, Lab, Process};

pub const SINGLE: &str = "qemu, one copy";
pub const QUORUM: &str = "qemu, quorum of two";
const EXPORT: &str = "disk";
const PORT: u16 = 10809;
const START_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Peers {
    single: (Process, PathBuf),
    quorum: (Process, PathBuf),
    remote: Process,
}

impl Peers {
    /// In the same lab as ours, so that their bytes take the same way between the nodes.
    pub fn start(lab: &Lab) -> Result<Peers> {
        let folder = lab.folder().join("peers");
        fs::create_dir_all(&folder)?;
        for name in ["single", "local", "remote"] {
            disk::preallocate(&folder.join(name), disk::BYTES)?;
        }
        let file = |name: &str| {
            format!(
                "driver=file,node-name={name},filename={},cache.direct=on,aio=io_uring",
                folder.join(name).display()
            )
        };
        let unix = |name: &str| format!("addr.type=unix,addr.path={}", folder.join(name).display());
        let far = Host::B.address();
        let tcp = format!("addr.type=inet,addr.host={far},addr.port={PORT}");
        let export = |node: &str| format!("type=nbd,id=export,node-name={node},name={EXPORT},writable=on");
        let start = |host: Host, arguments: &[&str]| {
            let mut command = lab.host(host).command("qemu-storage-daemon");
            Process::start(command.args(arguments), &folder.join("log"))
        };

        let single_socket = folder.join("single.sock");
        let single = start(
            Host::A,
            &[
                "--blockdev",
                &file("single"),
                "--nbd-server",
                &unix("single.sock"),
                "--export",
                &export("single"),
            ],
        )?;
        let remote = start(
            Host::B,
            &["--blockdev", &file("remote"), "--nbd-server", &tcp, "--export", &export("remote")],
        )?;
        let address: SocketAddr = format!("{far}:{PORT}").parse().expect("an address");
        let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(1));
        wait_until("the remote copy listens", || lab.host(Host::A).within(connect).is_ok())?;
        let quorum_socket = folder.join("quorum.sock");
        let quorum = start(
            Host::A,
            &[
                "--blockdev",
                &file("local"),
                "--blockdev",
                &format!(
                    "driver=nbd,node-name=far,server.type=inet,server.host={far},server.port={PORT},export={EXPORT}"
                ),
                "--blockdev",
                "driver=quorum,node-name=both,children.0=local,children.1=far,vote-threshold=2",
                "--nbd-server",
                &unix("quorum.sock"),
                "--export",
                &export("both"),
            ],
        )?;
        for socket in [&single_socket, &quorum_socket] {
            wait_until("the peers serve", || Client::connect(socket, EXPORT).is_ok())
                .with_context(|| fs::read_to_string(folder.join("log")).unwrap_or_default())?;
        }
        Ok(Peers { single: (single, single_socket), quorum: (quorum, quorum_socket), remote })
    }

    pub fn single(&self) -> Server {
        let (process, socket) = &self.single;
        let (socket, processes) = (socket.clone(), vec![process.id()]);
        // Acknowledged is on the disk: it keeps no log.
        Server { name: SINGLE, socket, export: EXPORT, processes, images: Vec::new() }
    }

    pub fn quorum(&self) -> Server {
        let (process, socket) = &self.quorum;
        let processes = vec![process.id(), self.remote.id()];
        Server { name: QUORUM, socket: socket.clone(), export: EXPORT, processes, images: Vec::new() }
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

//! A QEMU that somebody else runs, disks with a model of what is on them, and readers of a view.

use crate::lab::PATIENCE;
use rempart_hypervisor::qemu::backup::{Changes, LiveView, Options, Tracker, TrackingToken, ViewDisk};
use rempart_hypervisor::qmp::Client;
use rempart_nbd::client::{self, ConnectOptions};
use serde_json::json;
use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::sync::Notify;

pub const SIZE: u64 = 24 << 20;

/// A directory for images, views and monitors.
pub struct Host {
    dir: TempDir,
}

impl Host {
    pub fn new() -> Self {
        Self { dir: TempDir::with_prefix_in("bk", "/tmp").unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn monitor(&self) -> PathBuf {
        self.path("qmp")
    }

    pub fn image(&self, name: &str, format: &str) -> String {
        let path = self.path(name).display().to_string();
        run("qemu-img", &["create", "-q", "-f", format, &path, &SIZE.to_string()]);
        path
    }

    pub fn options(&self, tracker: &str) -> Options {
        let mut options = Options::new(Tracker::new(tracker).unwrap(), self.path("views"));
        options.scratch_bytes = 64 << 20;
        options
    }

    pub async fn open(&self, tracker: &str, known: &BTreeMap<String, TrackingToken>) -> LiveView {
        LiveView::open(&self.monitor(), &self.options(tracker), known).await.unwrap()
    }

    /// Starts QEMU with one monitor for views and one for the test.
    pub async fn start(&self, arguments: &[&str]) -> Vm {
        let (monitor, control) = (self.monitor(), self.path("control"));
        for socket in [&monitor, &control] {
            let _ = std::fs::remove_file(socket);
        }
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-M", "q35", "-accel", "tcg,tb-size=128", "-cpu", "max"])
            .args(["-m", "192", "-display", "none"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", control.display())])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut vm = Vm { child, control: None };
        let end = std::time::Instant::now() + PATIENCE;
        let client = loop {
            match Client::connect(&control, PATIENCE).await {
                Ok(client) => break client,
                Err(error) => {
                    assert_eq!(vm.child.try_wait().unwrap(), None, "QEMU ended");
                    assert!(std::time::Instant::now() < end, "{error}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        };
        vm.control = Some(client);
        vm
    }
}

/// A running QEMU, killed at the end.
pub struct Vm {
    child: Child,
    control: Option<Client>,
}

impl Vm {
    pub fn control(&self) -> &Client {
        self.control.as_ref().unwrap()
    }

    /// A device's own request, as if the guest had made it: `device` by id or path. QEMU does not tell here how it went:
    /// only what is on the disk afterwards does.
    pub async fn io(&self, device: &str, command: &str) {
        let line = format!("qemu-io -d {device} \"{command}\"");
        let arguments = json!({ "command-line": line });
        let said = self.control().execute("human-monitor-command", arguments, PATIENCE).await.unwrap();
        assert_eq!(said, "");
    }

    /// Ends QEMU in order, so that it keeps what it keeps.
    pub async fn quit(mut self) {
        self.control().quit().await.unwrap();
        self.child.wait().unwrap();
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Everything in QEMU that has our prefix, but for the bitmaps that record.
    pub async fn leavings(&self) -> Vec<String> {
        let (nodes, exports) = (
            self.control().query_named_block_nodes().await.unwrap(),
            self.control().query_block_exports().await.unwrap(),
        );
        let mut found: Vec<String> = exports.into_iter().map(|export| export.id).collect();
        for node in nodes {
            if node.node_name.starts_with("rempart-") {
                found.push(node.node_name.clone());
            }
            let bitmaps = node.bitmaps.into_iter().filter(|bitmap| bitmap.name.starts_with("rempart-view"));
            found.extend(bitmaps.map(|bitmap| bitmap.name));
        }
        found
    }

    /// The bitmaps on all nodes, by name.
    pub async fn bitmaps(&self) -> Vec<String> {
        let nodes = self.control().query_named_block_nodes().await.unwrap();
        let mut names: Vec<String> =
            nodes.into_iter().flat_map(|node| node.bitmaps).map(|bitmap| bitmap.name).collect();
        names.sort();
        names.dedup();
        names
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Small and repeatable; good enough to choose blocks.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// What was written to a device, byte for byte.
pub struct Model {
    pub device: &'static str,
    pub bytes: Vec<u8>,
}

impl Model {
    pub fn new(device: &'static str) -> Self {
        Self { device, bytes: vec![0; SIZE as usize] }
    }

    pub async fn write(&mut self, vm: &Vm, offset: u64, length: u64, byte: u8) {
        vm.io(self.device, &format!("write -P {byte} {offset} {length}")).await;
        self.bytes[offset as usize..][..length as usize].fill(byte);
    }

    pub async fn discard(&mut self, vm: &Vm, offset: u64, length: u64) {
        vm.io(self.device, &format!("write -z -u {offset} {length}")).await;
        self.bytes[offset as usize..][..length as usize].fill(0);
    }

    /// Some requests of all kinds, anywhere.
    pub async fn scribble(&mut self, vm: &Vm, random: &mut Random) {
        for _ in 0..12 {
            let sectors = self.bytes.len() as u64 / 512;
            let length = 1 + random.below(200);
            let offset = random.below(sectors - length);
            if random.below(5) == 0 {
                self.discard(vm, offset * 512, length * 512).await;
            } else {
                self.write(vm, offset * 512, length * 512, 1 + random.below(255) as u8).await;
            }
        }
    }
}

pub type Reader = client::Client<UnixStream>;

pub fn reader(disk: &ViewDisk) -> Reader {
    let mut options = ConnectOptions::new(&disk.export);
    if let Changes::Since { context, .. } = &disk.changes {
        options.contexts.push(context.clone());
    }
    options.timeout = PATIENCE;
    client::Client::connect_unix(&disk.socket, &options).unwrap()
}

/// The whole disk.
pub fn read_all(disk: &ViewDisk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size_bytes as usize];
    let mut reader = reader(disk);
    for (index, chunk) in bytes.chunks_mut(1 << 20).enumerate() {
        reader.read((index as u64) << 20, chunk).unwrap();
    }
    bytes
}

/// Brings a copy of the earlier view up to this one; returns how many bytes had to be read.
pub fn apply_changes(disk: &ViewDisk, copy: &mut [u8]) -> u64 {
    let Changes::Since { context, .. } = &disk.changes else {
        panic!("changes of {} are not known: {:?}", disk.id, disk.changes)
    };
    let mut reader = reader(disk);
    let (mut at, mut read) = (0, 0);
    for extent in reader.map(context, 0, disk.size_bytes).unwrap() {
        let end = at + extent.length;
        if extent.flags & 1 != 0 {
            for offset in (at..end).step_by(1 << 20) {
                let length = (end - offset).min(1 << 20);
                reader.read(offset, &mut copy[offset as usize..][..length as usize]).unwrap();
            }
            read += extent.length;
        }
        at = end;
    }
    assert_eq!(at, disk.size_bytes);
    read
}

/// The tokens of a view that was stored.
pub fn tokens(view: &LiveView) -> BTreeMap<String, TrackingToken> {
    view.disks().iter().map(|disk| (disk.id.clone(), disk.next.clone())).collect()
}

pub fn disk<'a>(view: &'a LiveView, id: &str) -> &'a ViewDisk {
    view.disks().iter().find(|disk| disk.id == id).unwrap_or_else(|| panic!("no disk {id}: {view:?}"))
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What an independent reader finds.
pub fn copied_by_nbdcopy(disk: &ViewDisk, to: &Path) -> Vec<u8> {
    run("nbdcopy", &[&uri(disk), &to.display().to_string()]);
    std::fs::read(to).unwrap()
}

pub fn uri(disk: &ViewDisk) -> String {
    format!("nbd+unix:///{}?socket={}", disk.export, disk.socket.display())
}

/// Stands between a client and QEMU's monitor, and holds the first command of one kind back: its sender waits, for ever
/// unless it is let go.
pub struct Swallower {
    pub socket: PathBuf,
    held: tokio::sync::oneshot::Receiver<()>,
    let_go: Arc<Notify>,
}

impl Swallower {
    pub fn new(host: &Host, command: &'static str) -> Self {
        let (socket, monitor) = (host.path("between"), host.monitor());
        let _ = std::fs::remove_file(&socket);
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let (hold, held) = tokio::sync::oneshot::channel();
        let (hold, let_go) = (Arc::new(Mutex::new(Some(hold))), Arc::new(Notify::new()));
        let swallower = Self { socket, held, let_go: let_go.clone() };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let qemu = tokio::net::UnixStream::connect(&monitor).await.unwrap();
                let ((from_client, mut to_client), (mut from_qemu, mut to_qemu)) =
                    (client.into_split(), qemu.into_split());
                tokio::spawn(async move { tokio::io::copy(&mut from_qemu, &mut to_client).await });
                let (hold, let_go) = (hold.clone(), let_go.clone());
                tokio::spawn(async move {
                    let mut lines = BufReader::new(from_client).lines();
                    let mut kept = None;
                    loop {
                        let line = tokio::select! {
                            line = lines.next_line() => match line {
                                Ok(Some(line)) => line,
                                _ => return,
                            },
                            () = let_go.notified(), if kept.is_some() => kept.take().unwrap(),
                        };
                        if line.contains(command)
                            && let Some(first) = hold.lock().unwrap().take()
                        {
                            first.send(()).unwrap();
                            kept = Some(line);
                            continue;
                        }
                        to_qemu.write_all(format!("{line}\n").as_bytes()).await.unwrap();
                    }
                });
            }
        });
        swallower
    }

    /// Waits until the command came.
    pub async fn held(&mut self) {
        tokio::time::timeout(PATIENCE, &mut self.held).await.expect("the command does not come").unwrap();
    }

    /// It goes on its way after all.
    pub fn let_go(self) {
        self.let_go.notify_one();
    }
}

//! An image in any format that QEMU reads, through a `qemu-storage-daemon` of our own.

use super::{NbdEndpoint, NbdSource, Reader, Source, SourceError};
use crate::ChunkSet;
use serde_json::json;
use std::io::Read as _;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The daemon is there within so long, or something is wrong with it.
const START: Duration = Duration::from_secs(20);
const EXPORT: &str = "disk";

/// An image that `qemu-storage-daemon` reads for us, at the lowest privilege that works: read-only, without a network.
#[derive(Debug)]
pub struct QemuImage {
    // Dropped in this order: the connection's other end, the process, its folder.
    source: NbdSource,
    _daemon: Daemon,
    _folder: TempDir,
}

/// The process, and the thread that started it: the kernel ends the one when the other ends, however that comes about.
#[derive(Debug)]
struct Daemon {
    child: Arc<Mutex<Child>>,
    /// Dropped first: the thread waits for that.
    keep: Option<mpsc::Sender<()>>,
    keeper: Option<JoinHandle<()>>,
}

impl Daemon {
    fn start(mut command: Command) -> std::io::Result<Daemon> {
        let (started, child) = mpsc::channel();
        let (keep, kept) = mpsc::channel::<()>();
        // SAFETY: only an async-signal-safe call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
                Ok(())
            });
        }
        let keeper = std::thread::Builder::new().name("image".into()).spawn(move || {
            let child = command.spawn().map(|child| Arc::new(Mutex::new(child)));
            let own = child.as_ref().ok().cloned();
            let _ = started.send(child);
            let Some(child) = own else { return };
            let _ = kept.recv();
            let mut child = child.lock().expect("no holder panics");
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let child = child.recv().map_err(|_| std::io::Error::other("the thread that starts it ended"))??;
        Ok(Daemon { child, keep: Some(keep), keeper: Some(keeper) })
    }

    /// What it said, if it has ended.
    fn ended(&self) -> std::io::Result<Option<String>> {
        let mut child = self.child.lock().expect("no holder panics");
        let Some(status) = child.try_wait()? else { return Ok(None) };
        let mut said = String::new();
        if let Some(stderr) = child.stderr.as_mut() {
            let _ = stderr.take(4096).read_to_string(&mut said);
        }
        let said = said.trim().trim_start_matches("qemu-storage-daemon: ");
        Ok(Some(format!("qemu-storage-daemon ended with {status}: {said}")))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.keep.take();
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
    }
}

impl QemuImage {
    /// `format` is a name of QEMU's block drivers, as `qcow2`; what the image says of itself is not trusted with the choice.
    pub fn open(path: &Path, format: &str) -> Result<QemuImage, SourceError> {
        let fail = |source: Box<dyn std::error::Error + Send + Sync>| SourceError {
            action: "open",
            disk: path.display().to_string(),
            offset: None,
            source,
        };
        let path = std::path::absolute(path).map_err(|why| fail(why.into()))?;
        let name = path.to_str().ok_or_else(|| fail("its path is not valid UTF-8".into()))?;
        let folder = tempfile::Builder::new().prefix("rempart-").tempdir().map_err(|why| fail(why.into()))?;
        let socket = folder.path().join("nbd");
        let file = json!({ "driver": "file", "filename": name, "read-only": true, "node-name": "file" });
        let image = json!({ "driver": format, "file": "file", "read-only": true, "node-name": "image" });
        let server = json!({ "addr": { "type": "unix", "path": &socket }, "max-connections": 0 });
        let export =
            json!({ "type": "nbd", "id": "export", "node-name": "image", "name": EXPORT, "writable": false });
        let mut command = Command::new("qemu-storage-daemon");
        for (option, value) in
            [("--blockdev", file), ("--blockdev", image), ("--nbd-server", server), ("--export", export)]
        {
            command.arg(option).arg(value.to_string());
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let daemon = Daemon::start(command).map_err(|why| {
            fail(
                format!("start qemu-storage-daemon (package qemu-system-common, or qemu-utils): {why}")
                    .into(),
            )
        })?;
        let endpoint = NbdEndpoint { socket, export: EXPORT.to_owned() };
        let deadline = Instant::now() + START;
        loop {
            if let Some(why) = daemon.ended().map_err(|why| fail(why.into()))? {
                return Err(fail(why.into()));
            }
            match NbdSource::open(endpoint.clone()) {
                Ok(source) => return Ok(QemuImage { source, _daemon: daemon, _folder: folder }),
                Err(why) if Instant::now() >= deadline => return Err(fail(why.into())),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

impl Source for QemuImage {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn reader(&self) -> Result<Box<dyn Reader + '_>, SourceError> {
        self.source.reader()
    }

    fn data(&self, chunk_len: u64) -> Result<ChunkSet, SourceError> {
        self.source.data(chunk_len)
    }
}

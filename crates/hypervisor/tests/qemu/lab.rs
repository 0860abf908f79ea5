//! Machines to try things on, and what is left of them taken away.

use rempart_hypervisor::accelerator::Accelerator;
use rempart_hypervisor::{
    Definition, DiskExport, FirstState, Hypervisor, Lease, Machine, MachineEvent, MachineEvents, Qemu,
    QemuConfig, StartRequest, VmUuid, clock,
};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

pub const HELPER: &str = env!("CARGO_BIN_EXE_rempart-hypervisor-test-helper");

/// Far above what anything here takes: it only ends a test that would never end.
pub const PATIENCE: Duration = Duration::from_secs(150);

pub struct Lab {
    dir: TempDir,
    pub qemu: Qemu,
}

impl Lab {
    pub fn new() -> Self {
        Self::with(|_| ())
    }

    pub fn with(change: impl FnOnce(&mut QemuConfig)) -> Self {
        let mut config = QemuConfig::new(vec![HELPER.into(), "leashed-guard".into()]);
        config.accelerator = Some(Accelerator::Tcg);
        change(&mut config);
        let dir = TempDir::with_prefix_in("hv", "/tmp").unwrap();
        // QEMU may run as another user.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        Self { dir, qemu: Qemu::new(config) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    /// A machine that runs its BIOS, and nothing after that.
    pub fn definition(&self) -> Definition {
        Definition::new("probe", VmUuid(std::process::id().into()), 64 << 20, 1)
    }

    pub fn request(&self, definition: Definition, lease: Lease) -> StartRequest {
        let disks = definition.disks.iter().map(|disk| DiskExport {
            disk: disk.index,
            socket: self.path("nbd.sock"),
            export_name: format!("disk-{}", disk.index),
        });
        StartRequest {
            disks: disks.collect(),
            definition,
            run_dir: self.run_dir(),
            nvram: None,
            lease,
            guard_stop: Duration::from_secs(1),
            first_state: FirstState::Running,
        }
    }

    pub async fn start(&self, lease: Lease) -> Arc<dyn Machine> {
        self.start_defined(self.definition(), lease).await
    }

    pub async fn start_defined(&self, definition: Definition, lease: Lease) -> Arc<dyn Machine> {
        self.qemu.start(self.request(definition, lease)).await.unwrap()
    }

    /// The guard's process, as its state file has it.
    pub fn guard_pid(&self) -> Option<i32> {
        pid_in(&self.run_dir(), "guard")
    }
}

fn pid_in(run_dir: &Path, process: &str) -> Option<i32> {
    let state = std::fs::read(run_dir.join("state.json")).ok()?;
    let state: serde_json::Value = serde_json::from_slice(&state).ok()?;
    i32::try_from(state[process]["pid"].as_i64()?).ok()
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for log in ["guard.log", "qemu.log", "console.log"] {
                let text = std::fs::read_to_string(self.run_dir().join(log)).unwrap_or_default();
                eprintln!(
                    "--- {log}\n{}",
                    text.chars().rev().take(2000).collect::<Vec<_>>().iter().rev().collect::<String>()
                );
            }
        }
        // QEMU dies with its guard. A guard that ended by itself has taken its socket away.
        if self.run_dir().join("guard.sock").exists()
            && let Some(guard) = self.guard_pid()
        {
            signal(guard, libc::SIGKILL);
        }
    }
}

pub fn signal(pid: i32, signal: i32) {
    // SAFETY: kill takes plain numbers.
    unsafe { libc::kill(pid, signal) };
}

/// Whether this process still does something: a zombie does not.
pub fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.trim_start().starts_with(['Z', 'X']))
}

pub fn lease_of(millis: u64) -> Lease {
    Lease::until(clock::boottime() + Duration::from_millis(millis))
}

/// The first event that `choose` takes.
pub async fn event<T>(events: &mut MachineEvents, mut choose: impl FnMut(&MachineEvent) -> Option<T>) -> T {
    let wait = async {
        loop {
            let event = events.next().await.expect("the machine's events ended");
            if let Some(chosen) = choose(&event) {
                return chosen;
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("the event did not come")
}

/// An NBD server that is not ours.
pub struct NbdServer {
    child: Child,
}

impl NbdServer {
    /// Serves `image` as export `disk-N` on the lab's socket.
    pub fn start(lab: &Lab, image: &Path, export: &str) -> Self {
        let socket = lab.path("nbd.sock");
        // It does not take over the socket of one that was killed.
        let _ = std::fs::remove_file(&socket);
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("driver=file,node-name=image,filename={}", image.display())])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
            .args(["--export", &format!("type=nbd,id=export,node-name=image,name={export},writable=on")])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child }
    }

    /// The same on a socket that outlives it, as the guard keeps the daemon's. It grows the image first.
    pub fn on_listener(listener: &UnixListener, image: &Path, export: &str, size: u64) -> Self {
        std::fs::OpenOptions::new().write(true).open(image).unwrap().set_len(size).unwrap();
        let socket = listener.as_raw_fd();
        // The process's own number is part of how such a socket is handed over (sd_listen_fds(3)).
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                "export LISTEN_PID=$$ LISTEN_FDS=1; exec qemu-nbd -t -f raw -x \"$0\" \"$1\"",
                export,
            ])
            .arg(image)
            .stdin(Stdio::null());
        // SAFETY: dup2 is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                if socket == 3 {
                    libc::fcntl(3, libc::F_SETFD, 0);
                } else {
                    libc::dup2(socket, 3);
                }
                Ok(())
            });
        }
        Self { child: command.spawn().unwrap() }
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

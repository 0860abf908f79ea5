//! The daemon: `rempart node init` and `rempart node run`.

use crate::config::{AcceleratorChoice, NodeConfig, check_name};
use crate::identity::Identity;
use crate::node::Node;
use crate::paths::Paths;
use crate::{
    cannot, cannot_listen, durable, http, links, make_private_dir, membership, metrics, notify_ready,
    remote_exports, schedule, watchdog,
};
use rempart_api::{Error, Severity};
use rempart_engine::Command;
use rempart_hypervisor::accelerator::Accelerator;
use rempart_hypervisor::{Qemu, QemuConfig};
use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

/// How long the copies may take to write everything back when the daemon stops.
const CLOSE_DEADLINE: Duration = Duration::from_secs(20);
/// The witness is looked at this often, for people.
const PROBE_EVERY: Duration = Duration::from_secs(5);

fn failed(what: &str) -> impl Fn(&dyn std::fmt::Display) -> Error {
    let what = what.to_owned();
    move |cause| Error::failed(format!("cannot {what}")).cause(cause)
}

/// Writes a commented configuration and draws this node's identity.
pub fn init(
    config_path: &Path,
    name: &str,
    listen: SocketAddr,
    data_dir: &Path,
    run_dir: &Path,
) -> Result<(), Error> {
    check_name(name).map_err(Error::invalid)?;
    for dir in [data_dir, run_dir] {
        if !dir.is_absolute() {
            return Err(Error::invalid(format!("`{}` is not an absolute path", dir.display())));
        }
    }
    if config_path.exists() {
        return Err(Error::conflict(format!("`{}` exists already", config_path.display()))
            .hint("edit it, or remove it to start anew"));
    }
    make_private_dir(data_dir).map_err(cannot("make the node's directory", data_dir))?;
    let paths = Paths::new(data_dir, run_dir);
    Identity::load_or_create(&paths).map_err(cannot("keep the node's identity in", &paths.identity()))?;
    if let Some(parent) = config_path.parent() {
        std::fs::create_dir_all(parent).map_err(cannot("make the configuration's directory", parent))?;
    }
    let text = NodeConfig::template(name, listen, data_dir, run_dir);
    durable::write(config_path, text.as_bytes()).map_err(cannot("write the configuration", config_path))
}

/// Runs until `stop` turns true. Virtual machines go on under their guards.
pub async fn run(
    config: NodeConfig,
    config_path: &Path,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Error> {
    config.timing.to_cluster().validate().map_err(|e| {
        Error::invalid(format!("`{}`: the times in [timing] do not fit together", config_path.display()))
            .cause(e)
    })?;
    if !rustix::process::geteuid().is_root() {
        return Err(Error::failed(
            "the daemon needs root: it makes network devices and owns the machines' disks",
        )
        .hint("run it by systemd, or with sudo"));
    }
    let paths = Paths::new(&config.node.data_dir, &config.node.run_dir);
    let failed = failed("start the daemon");
    for dir in [paths.data_dir(), paths.run_dir()] {
        make_private_dir(dir).map_err(cannot("make the daemon's directory", dir))?;
    }
    let _lock = lock(&paths)?;
    let hypervisor = Arc::new(Qemu::new(qemu_config(&config)?));
    let peers_listener = TcpListener::bind(config.node.listen)
        .await
        .map_err(|e| cannot_listen(config.node.listen, "node.listen", &e))?;
    let metrics_listener = match config.metrics.listen {
        Some(address) => {
            Some(TcpListener::bind(address).await.map_err(|e| cannot_listen(address, "metrics.listen", &e))?)
        }
        None => None,
    };
    let exports = config.nbd;
    let exports_listener = match exports.listen {
        Some(address) => {
            Some(TcpListener::bind(address).await.map_err(|e| cannot_listen(address, "nbd.listen", &e))?)
        }
        None => None,
    };
    let (node, links_wanted) = Node::open(config, hypervisor).await?;
    tokio::spawn(links::keep(node.clone(), links_wanted));
    tokio::spawn(http::serve_peers(node.clone(), peers_listener));
    node.open_vms().await?;
    let api = api_socket(&paths).map_err(|e| failed(&e))?;
    tokio::spawn(membership::keep(node.clone()));
    tokio::spawn(probe_witness(node.clone()));
    if let Some(listener) = exports_listener {
        tokio::spawn(remote_exports::serve(node.clone(), listener, exports.writable));
    }
    if let Some(listener) = metrics_listener {
        tokio::spawn(metrics::serve(node.clone(), listener));
    }
    // Only now: it starts a guest to see whether KVM runs one, and machines that an earlier daemon left behind have
    // leases that end meanwhile.
    let report = node.host_report().await?;
    tracing::info!(
        node = node.name(),
        id = %node.id(),
        version = env!("CARGO_PKG_VERSION"),
        accelerator = report.accelerator,
        why = report.accelerator_reason,
        "the daemon runs"
    );
    notify_ready();
    watchdog();
    tokio::spawn(schedule::keep(node.clone()));
    tokio::select! {
        served = http::serve_local(node.clone(), api) => served.map_err(|e| failed(&e))?,
        _ = stop.wait_for(|stop| *stop) => {}
    }
    tracing::info!("stopping; virtual machines go on under their guards until their leases end");
    close(&node).await;
    Ok(())
}

/// One daemon per data directory.
fn lock(paths: &Paths) -> Result<File, Error> {
    let failed = |e: &dyn std::fmt::Display| {
        Error::failed(format!("cannot lock `{}`", paths.lock().display())).cause(e)
    };
    let file = File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .open(paths.lock())
        .map_err(|e| failed(&e))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|e| match e {
        rustix::io::Errno::WOULDBLOCK => {
            Error::conflict(format!("another daemon runs on `{}`", paths.data_dir().display()))
        }
        e => failed(&e),
    })?;
    Ok(file)
}

fn qemu_config(config: &NodeConfig) -> Result<QemuConfig, Error> {
    let program = std::env::current_exe().map_err(|e| failed("find this program")(&e))?;
    let mut qemu = QemuConfig::new(vec![program.into_os_string(), "guard".into()]);
    qemu.qemu_program = config.vm.qemu.clone();
    qemu.network_gate = config.vm.network_gate;
    qemu.watchdog = config.vm.watchdog.clone();
    qemu.accelerator = match config.vm.accelerator {
        AcceleratorChoice::Auto => None,
        AcceleratorChoice::Kvm => Some(Accelerator::Kvm),
        AcceleratorChoice::Tcg => Some(Accelerator::Tcg),
    };
    Ok(qemu)
}

fn api_socket(paths: &Paths) -> std::io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let path = paths.api_socket();
    // The lock is held: whoever bound it before is gone.
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn probe_witness(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(PROBE_EVERY);
    loop {
        ticks.tick().await;
        if let Some(witness) = node.host.registers.witness() {
            match node.registers_on_witness() {
                Ok(registers) => witness.probe(&registers).await,
                Err(error) => {
                    tracing::warn!(%error, "cannot tell which registers this node has on the witness")
                }
            }
        }
    }
}

/// Ends the copies without a machine cleanly; one whose machine runs is left as a crash would leave it, which loses
/// nothing either and keeps its guest's I/O waiting for the next daemon.
async fn close(node: &Arc<Node>) {
    let mut closing = tokio::task::JoinSet::new();
    for vm in node.vms() {
        if vm.shown().machine.is_some() {
            continue;
        }
        closing.spawn(async move {
            if let Err(error) = vm.group.command(Command::Stop).await {
                vm.events.note(&vm.name(), Severity::Warning, format!("not stopped cleanly: {error}"));
            }
        });
    }
    let all = async { while closing.join_next().await.is_some() {} };
    if tokio::time::timeout(CLOSE_DEADLINE, all).await.is_err() {
        tracing::warn!("some copies were not written back in time; they recover at the next start");
    }
}

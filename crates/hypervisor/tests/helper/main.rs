//! What the tests need as processes of their own: a guard, a daemon that starts a machine and a taker of views, which can
//! be killed.

mod log;

use rempart_hypervisor::guest_agent::{FreezeOptions, GuestAgent};
use rempart_hypervisor::qemu::backup::{Options, Otherwise, Policy, Prepared, Saving, Tracker};
use rempart_hypervisor::{
    Definition, FirstState, Hypervisor, Lease, Qemu, QemuConfig, StartRequest, VmUuid, clock, guard,
};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        // Ends with the thread of its test, even if that is killed.
        ["leashed-guard", "--run-dir", run_dir] => {
            // SAFETY: prctl takes plain numbers here.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            run_guard(run_dir)
        }
        ["guard", "--run-dir", run_dir] => run_guard(run_dir),
        ["daemon", run_dir, lease_ms] => {
            daemon(run_dir.into(), Duration::from_millis(lease_ms.parse().unwrap()))
        }
        ["view", how, known, monitor, directory] => view(how, known, monitor.as_ref(), directory.as_ref()),
        ["freeze", agent, mark] => freeze(agent.as_ref(), mark.as_ref()),
        _ => panic!("unknown arguments {words:?}"),
    }
}

fn run_guard(run_dir: &str) {
    tracing::subscriber::set_global_default(log::ToStderr).unwrap();
    std::process::exit(guard::run(guard::Args { run_dir: run_dir.into() }))
}

/// Starts a machine without disks, leaves a socket with its guard, says so, and waits to be killed.
#[tokio::main(flavor = "current_thread")]
async fn daemon(run_dir: PathBuf, lease: Duration) {
    let this = std::env::current_exe().unwrap();
    let mut config = QemuConfig::new(vec![this.into(), "guard".into()]);
    config.accelerator = Some(rempart_hypervisor::accelerator::Accelerator::Tcg);
    let listener = std::os::unix::net::UnixListener::bind(run_dir.with_extension("kept")).unwrap();
    let request = StartRequest {
        definition: Definition::new("adopted", VmUuid(5), 64 << 20, 1),
        disks: Vec::new(),
        run_dir,
        nvram: None,
        lease: Lease::until(clock::boottime() + lease),
        guard_stop: Duration::from_secs(1),
        first_state: FirstState::Running,
    };
    let machine = Qemu::new(config).start(request).await.unwrap();
    machine.keep_listener("nbd".into(), listener.into()).await.unwrap();
    println!("started");
    std::io::stdout().flush().unwrap();
    std::future::pending::<()>().await;
}

/// Goes some way to a view of somebody's QEMU, says so, and waits to be killed.
#[tokio::main(flavor = "current_thread")]
async fn view(how: &str, known: &str, monitor: &Path, directory: &Path) {
    let mut options = Options::new(Tracker::new("nightly").unwrap(), directory);
    options.scratch_bytes = 64 << 20;
    let prepared = Prepared::new(monitor, &options, &serde_json::from_str(known).unwrap()).await.unwrap();
    match how {
        "prepared" => {
            ready();
            std::future::pending::<()>().await;
            drop(prepared);
        }
        "taken" => {
            let view = prepared.take().await.unwrap();
            ready();
            std::future::pending::<()>().await;
            drop(view);
        }
        _ if how.starts_with("saved") => {
            let limit = if how.contains("briefly") { 5 } else { 600 };
            let mut saving = Saving::new(Duration::from_secs(limit));
            if how.contains("slowly") {
                saving.bandwidth = 1 << 20;
            }
            let otherwise = Otherwise::SaveState { saving, or_crash: false };
            let taken = prepared.take_consistently(&Policy { agent: Err("not asked"), otherwise }).await;
            match taken {
                Ok(_) => ready(),
                Err(ref error) => println!("refused: {error}"),
            }
            std::future::pending::<()>().await;
            drop(taken);
        }
        _ => panic!("unknown way {how}"),
    }
}

fn ready() {
    println!("ready");
    std::io::stdout().flush().unwrap();
}

/// Freezes a guest's file systems, says so, and waits to be killed.
#[tokio::main(flavor = "current_thread")]
async fn freeze(agent: &Path, mark: &Path) {
    let agent = GuestAgent::connect(agent, Duration::from_secs(60)).await.unwrap();
    let options = FreezeOptions { limit: Duration::from_secs(600), ..FreezeOptions::new(mark) };
    let frozen = agent.freeze(options).await.unwrap();
    ready();
    std::future::pending::<()>().await;
    drop(frozen);
}

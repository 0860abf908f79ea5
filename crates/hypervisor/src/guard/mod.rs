//! The guard: one small process per running machine, parent of its QEMU and owner of its lease.
//!
//! The daemon renews the lease over a socket; when it does not (dead, stopped, slow, or cut off from its peer), the
//! guard pauses the vCPUs, and kills QEMU if it cannot show in time that they stand still. QEMU dies with its guard.
//! So a machine never runs without someone watching its lease:
//!
//! | what fails | what happens |
//! |---|---|
//! | daemon killed or stopped | the lease runs out, the vCPUs are paused; a new daemon resumes or kills the machine |
//! | daemon back in time | it renews; the guest sees a pause of its I/O at most |
//! | the same, while the guest's I/O hangs | QEMU is frozen by a signal: `stop` would wait for that I/O |
//! | QEMU stopped by somebody | killed at the end of the lease and the time to stop |
//! | guard killed | the kernel kills QEMU ([`spawn`]) |
//! | guard stopped alone | the daemon's renewals get no answer: it kills QEMU itself |
//! | all stopped, then continued | the guard kills at once; frames are dropped by the kernel meanwhile ([`gate`]) |
//! | the host resets | nothing is left |
//!
//! The guard must not die with the daemon's service: it is a session of its own, and the service needs
//! `KillMode=process`, or the guard is started through `systemd-run --scope`.
//!
//! [`watch`] decides, [`event_loop`] carries out; one thread, no runtime, and nothing in it waits for anybody.

pub(crate) mod client;
pub(crate) mod connection;
mod event_loop;
mod gate;
pub(crate) mod protocol;
mod spawn;
mod watch;
mod watchdog;

use crate::error::{Error, ErrorKind};
use crate::run_dir::RunDir;
use protocol::StartReport;
use std::io::Write;
use std::path::PathBuf;

/// Arguments of `rempart guard`.
#[derive(Debug, Clone)]
pub struct Args {
    /// The machine's run directory, with the launch file that the driver wrote.
    pub run_dir: PathBuf,
}

/// Runs a guard until its QEMU is gone. Call it first thing in a process that has one thread and nothing else to
/// do; returns the process's exit status. It reports its start on stdout, in one line, to the driver.
pub fn run(args: Args) -> i32 {
    let outcome = start_and_watch(args);
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(%error, "the guard gives up");
            // If the start was reported already, nobody reads this.
            report(&match error.kind() {
                ErrorKind::AlreadyRunning => StartReport::AlreadyRunning,
                ErrorKind::MissingOnHost => StartReport::MissingOnHost { detail: error.to_string() },
                _ => StartReport::Failed { detail: error.to_string() },
            });
            1
        }
    }
}

fn start_and_watch(args: Args) -> crate::error::Result<()> {
    let run_dir = RunDir::new(args.run_dir)?;
    let Some(lock) = run_dir.lock()? else {
        return Err(Error::new(ErrorKind::AlreadyRunning, "start the machine", "another guard has it"));
    };
    settle_in();
    let outcome = event_loop::Guard::start(run_dir).and_then(event_loop::Guard::run);
    drop(lock);
    outcome
}

/// Makes sure that a busy host does not stop the one process that must be in time.
fn settle_in() {
    // Without the privilege it works as well, on a host with memory to spare.
    let _ = rustix::mm::mlockall(
        rustix::mm::MlockAllFlags::CURRENT
            | rustix::mm::MlockAllFlags::FUTURE
            | rustix::mm::MlockAllFlags::ONFAULT,
    );
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
}

/// Tells the driver how the start went, and hangs up.
fn report(report: &StartReport) {
    let mut stdout = std::io::stdout().lock();
    // The driver may be gone already; the machine is not.
    let _ = stdout.write_all(&protocol::line(report));
    let _ = stdout.flush();
    drop(stdout);
    if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(null);
    }
}

/// Whether the gate can be set up here: tried in a table of its own, without an interface.
pub(crate) fn gate_works() -> bool {
    gate::is_possible()
}

/// Takes a gate's table away, if there is one. For machines whose guard could not.
pub(crate) fn remove_gate(machine: &str) {
    gate::remove(machine);
}

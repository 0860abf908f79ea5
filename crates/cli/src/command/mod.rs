mod cluster;
mod compare;
mod failover;
mod protect;
mod schedule;
mod status;
pub(crate) mod vm;

use crate::Output;
use clap::Subcommand;
use rempart_api::{Client, Error};

/// Subcommands that talk to the daemon on this machine.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The nodes and the witness that work together.
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Virtual machines: bring in, start, stop, look at, change.
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Mirror a virtual machine's disks to a peer, also while it runs.
    Protect(protect::Protect),
    /// Stop mirroring; the primary's copy stays, the peer's is deleted.
    Unprotect(protect::Unprotect),
    /// How each virtual machine and its copies are.
    Status(status::StatusCommand),
    /// Move a virtual machine to this node, planned or by force.
    Failover(failover::Failover),
    /// Move a virtual machine back to this node by a planned handover.
    Failback(failover::Failback),
    /// After a forced takeover elsewhere: give up what only this copy holds, and follow.
    Rejoin(failover::Rejoin),
    /// Backups by the clock, as this node's configuration has them.
    #[command(subcommand)]
    Schedule(schedule::ScheduleCommand),
    /// Check both copies of a virtual machine's disks byte for byte, while it runs.
    Compare(compare::Compare),
}

/// Runs one command against the daemon behind `client`.
pub async fn run(command: Command, client: &Client, output: Output) -> Result<(), Error> {
    match command {
        Command::Cluster(command) => cluster::run(command, client, output).await,
        Command::Vm(command) => vm::run(command, client, output).await,
        Command::Protect(command) => protect::protect(command, client, output).await,
        Command::Unprotect(command) => protect::unprotect(command, client, output).await,
        Command::Status(command) => status::run(command, client, output).await,
        Command::Failover(command) => failover::failover(command, client, output).await,
        Command::Failback(command) => failover::failback(command, client, output).await,
        Command::Rejoin(command) => failover::rejoin(command, client, output).await,
        Command::Schedule(command) => schedule::run(command, client, output).await,
        Command::Compare(command) => compare::run(command, client, output).await,
    }
}

/// Waits for a job with its progress shown; prints the result with `--json`, `done` for people otherwise.
async fn finish_job(
    client: &Client,
    output: Output,
    job: rempart_api::Job,
    done: &str,
) -> Result<serde_json::Value, Error> {
    let mut show = output.progress();
    let result = client.wait(job.id, |progress| show.show(progress)).await;
    show.finish();
    let value = result?;
    if output.json {
        output.print_json(&value)?;
    } else if !done.is_empty() {
        output.tell(done);
    }
    Ok(value)
}

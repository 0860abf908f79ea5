use crate::{Output, output::bytes};
use clap::Args;
use rempart_api::{Client, Error, ReplicaRole, Severity, Status, VmState, VmStatus};
use std::io::{IsTerminal, Write};
use std::time::Duration;

#[derive(Debug, Args)]
pub struct StatusCommand {
    /// One virtual machine only, with its recent events.
    name: Option<String>,
    /// Show it again each second.
    #[arg(long)]
    watch: bool,
}

/// The daemon's status of one virtual machine.
pub async fn find(client: &Client, name: &str) -> Result<VmStatus, Error> {
    let status: Status = client.get("/v1/status").await?;
    select(status, name)
}

fn select(status: Status, name: &str) -> Result<VmStatus, Error> {
    if let Some(unopened) = status.unopened.into_iter().find(|vm| vm.name == name) {
        return Err(unopened.error);
    }
    status.vms.into_iter().find(|vm| vm.name == name).ok_or_else(|| {
        Error::not_found(format!("there is no virtual machine `{name}` on this node"))
            .hint("`rempart vm list` shows them")
    })
}

pub async fn run(command: StatusCommand, client: &Client, output: Output) -> Result<(), Error> {
    loop {
        let status: Status = client.get("/v1/status").await?;
        if command.watch && !output.json && std::io::stdout().is_terminal() {
            let _ = write!(std::io::stdout(), "\x1b[2J\x1b[H");
        }
        match &command.name {
            Some(name) => one(output, &select(status, name)?)?,
            None if output.json => output.print_json(&status)?,
            None => all(output, &status)?,
        }
        if !command.watch {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn all(output: Output, status: &Status) -> Result<(), Error> {
    for condition in &status.node.conditions {
        output.tell(&format!("{}: {}", severity(condition.severity), condition.text));
    }
    output.table(
        &["vm", "state", "role", "copies", "epoch", "lag", "resync"],
        status.vms.iter().map(|vm| row(vm).to_vec()).collect(),
    )?;
    for vm in &status.vms {
        for condition in &vm.conditions {
            output.tell(&format!("{}: `{}`: {}", severity(condition.severity), vm.name, condition.text));
        }
    }
    Ok(())
}

fn one(output: Output, vm: &VmStatus) -> Result<(), Error> {
    if output.json {
        return output.print_json(vm);
    }
    output.table(&["vm", "state", "role", "copies", "epoch", "lag", "resync"], vec![row(vm).to_vec()])?;
    for condition in &vm.conditions {
        output.tell(&format!("{}: {}", severity(condition.severity), condition.text));
    }
    for event in &vm.events {
        output.tell(&format!("{}  {}", clock(event.since_unix_ms), event.text));
    }
    Ok(())
}

fn row(vm: &VmStatus) -> [String; 7] {
    let copies = match (vm.role, vm.mirrored, vm.protected_by.is_empty()) {
        (_, true, _) => "mirrored".to_owned(),
        (_, false, true) => "single copy".to_owned(),
        (ReplicaRole::Primary, false, false) => "NOT MIRRORED".to_owned(),
        _ => "not in sync".to_owned(),
    };
    let resync = vm.resync.as_ref().filter(|r| r.running).map_or("-".to_owned(), |r| {
        format!("{} %, {} sent", 100 * r.bytes_examined / r.bytes_total.max(1), bytes(r.bytes_sent))
    });
    [
        vm.name.clone(),
        if vm.frozen { "FROZEN".to_owned() } else { state(vm.state).to_owned() },
        role(vm.role).to_owned(),
        copies,
        vm.epoch.to_string(),
        bytes(vm.lag_bytes),
        resync,
    ]
}

pub fn state(state: VmState) -> &'static str {
    match state {
        VmState::Stopped => "stopped",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Stopping => "stopping",
        VmState::Failed => "FAILED",
    }
}

fn role(role: ReplicaRole) -> &'static str {
    match role {
        ReplicaRole::Primary => "primary",
        ReplicaRole::Secondary => "secondary",
        ReplicaRole::Undecided => "undecided",
    }
}

fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Info => "note",
        Severity::Warning => "warning",
        Severity::Critical => "critical",
    }
}

/// Time of day in UTC.
fn clock(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000 % 86400;
    format!("{:02}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60, unix_ms % 1000)
}

//! Carries news between a group's thread, its register, its runner and the people.

use super::record::VmConfig;
use super::runner::{Allowed, Told, Wanted};
use super::{LinkWanted, Vm, report};
use crate::group::{FromGroup, ToGroup};
use crate::registers::Knowledge;
use rempart_api::Severity;
use rempart_engine::{Command, VmAction, VmFact};
use rempart_hypervisor::{Lease, MachineEvent};
use rempart_types::MonotonicTime;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::mpsc;

/// The log takes a stopped machine's UEFI variables in within this time, or goes on without.
const NVRAM_PATIENCE: Duration = Duration::from_secs(2);

/// What the replica wants from the world around it.
pub async fn group_events(vm: Arc<Vm>, mut events: mpsc::UnboundedReceiver<FromGroup>) {
    while let Some(event) = events.recv().await {
        let name = vm.name();
        match event {
            FromGroup::Register(request) => {
                // Beside everything else: an unreachable witness must not delay a lease.
                let vm = vm.clone();
                tokio::spawn(async move {
                    let (place, replicas) = vm.with_record(|record| {
                        let replicas = record.config.replicas.iter().copied().collect();
                        (record.place_of(request.register()), replicas)
                    });
                    let knowledge = Knowledge { me: vm.host.me, replicas, cluster: vm.host.names.cluster() };
                    let answer = vm.host.registers.carry_out(place, request, knowledge).await;
                    if let Some(reply) = answer {
                        vm.group.send(ToGroup::Register(reply));
                    }
                });
            }
            FromGroup::Vm(action) => vm_action(&vm, action),
            FromGroup::Report(told) => {
                let (severity, text) = report::describe(&vm, &told);
                vm.events.note(&name, severity, text);
            }
            FromGroup::LinkDown { peer, why } => {
                tracing::info!(vm = name, %peer, why, "link to the peer is down");
                let _ = vm.host.links.send(LinkWanted { group: vm.group_id(), peer });
            }
            FromGroup::Config(content) => match VmConfig::decode(&content) {
                Ok(config) => {
                    if let Err(error) = vm.adopt_config(config) {
                        vm.events.note(&name, Severity::Critical, error.to_string());
                    }
                }
                Err(why) => {
                    let text = format!("the log holds a definition that cannot be read: {why}");
                    vm.events.note(&name, Severity::Critical, text);
                }
            },
            FromGroup::Ended { failure } => {
                let failure_text = failure.clone();
                if let Some(failure) = failure {
                    // One group's defect stops that group. Its machine must not go on without its disks' owner
                    // for longer than its lease; the guard sees to that.
                    vm.events.note(
                        &name,
                        Severity::Critical,
                        format!("this copy is out of service: {failure}"),
                    );
                }
                vm.ended(failure_text);
                return;
            }
        }
    }
}

fn vm_action(vm: &Vm, action: VmAction) {
    match action {
        VmAction::Run { .. } | VmAction::Resume => vm.control(|control| control.allowed = Allowed::Run),
        VmAction::RenewLease { until } => {
            let lease =
                if until == MonotonicTime::FAR_FUTURE { Lease::Unlimited } else { Lease::until(until) };
            vm.lease.send_replace(lease);
        }
        VmAction::Pause => vm.control(|control| control.allowed = Allowed::Paused),
        VmAction::ShutDown => {
            let grace = Duration::from_secs(vm.host.config.vm.shutdown_timeout_s);
            vm.control(|control| {
                control.allowed = Allowed::ShutDown { grace };
                control.ends += 1;
            });
        }
        VmAction::Kill => vm.control(|control| {
            control.allowed = Allowed::No;
            control.ends += 1;
        }),
    }
}

/// What became of the machine here. Orders to the replica may wait for the very facts that follow here, so none is
/// waited for.
pub async fn told(vm: Weak<Vm>, mut told: mpsc::UnboundedReceiver<Told>) {
    while let Some(news) = told.recv().await {
        let Some(vm) = vm.upgrade() else { return };
        let name = vm.name();
        match news {
            Told::Fact(fact) => {
                if fact == VmFact::Stopped
                    && tokio::time::timeout(NVRAM_PATIENCE, keep_nvram(&vm)).await.is_err()
                {
                    vm.events.note(
                        &name,
                        Severity::Warning,
                        "UEFI variables were not kept: the log takes nothing in",
                    );
                }
                vm.group.send(ToGroup::Vm(fact));
            }
            Told::GuestShutDown => {
                vm.events.note(
                    &name,
                    Severity::Info,
                    "the guest shut itself down; it stays off until it is started",
                );
                vm.control(|control| control.wanted = Wanted::Stopped { grace: Duration::ZERO });
                let vm = vm.clone();
                tokio::spawn(async move {
                    if let Err(error) = vm.put_config(|config| config.should_run = false).await {
                        vm.events.note(&vm.name(), Severity::Warning, error.to_string());
                    }
                });
            }
            Told::Restarted { why, attempt } => {
                let text = format!("QEMU ended ({why}); restarting it here, attempt {attempt}");
                vm.events.note(&name, Severity::Warning, text);
            }
            Told::GaveUp { why } => {
                vm.events.note(&name, Severity::Critical, format!("QEMU cannot be kept running here: {why}"));
                let vm = vm.clone();
                tokio::spawn(async move { give_away(&vm).await });
            }
            Told::StartFailed { why } => {
                vm.events.note(&name, Severity::Warning, format!("the machine did not start: {why}"));
            }
            Told::Machine(event) => machine_event(&vm, &name, event),
        }
    }
}

fn machine_event(vm: &Vm, name: &str, event: MachineEvent) {
    let (severity, text) = match event {
        MachineEvent::LeaseExpired => {
            (Severity::Critical, "the lease ran out: the guard stops the machine's processors".to_owned())
        }
        MachineEvent::Exited(record) => (Severity::Info, format!("the machine ended: {record}")),
        MachineEvent::GuestPanicked => (Severity::Critical, "the guest panicked".to_owned()),
        MachineEvent::IoError { disk, write, reason, .. } => {
            let disk = disk.map_or("a disk".to_owned(), |disk| format!("disk {disk}"));
            let what = if write { "write" } else { "read" };
            (Severity::Critical, format!("QEMU could not {what} {disk}: {reason}"))
        }
        MachineEvent::GateFailed(why) => {
            (Severity::Warning, format!("the network gate was not refreshed: {why}"))
        }
        MachineEvent::Reset { by_guest } => {
            (Severity::Info, format!("the machine was reset{}", if by_guest { " by the guest" } else { "" }))
        }
        other => {
            tracing::debug!(vm = name, ?other, "machine event");
            return;
        }
    };
    vm.events.note(name, severity, text);
}

/// QEMU fails here again and again: the peer, if it is in step, may fare better.
async fn give_away(vm: &Vm) {
    let name = vm.name();
    let Some(to) = vm.group.in_sync_peer() else {
        vm.events.note(&name, Severity::Critical, "no peer is in step to run it instead");
        return;
    };
    if let Err(error) = vm.command("hand over", Command::Handover { to }).await {
        vm.events.note(&name, Severity::Critical, error.to_string());
    }
}

/// The guest may have changed its UEFI variables; they travel in the log.
async fn keep_nvram(vm: &Vm) {
    let path = vm.paths.run.join("nvram.fd");
    let Ok(bytes) = tokio::fs::read(&path).await else { return };
    let known = vm.with_record(|record| record.config.nvram.clone());
    if known.as_deref() != Some(&bytes)
        && vm.is_primary()
        && let Err(error) = vm.put_config(|config| config.nvram = Some(bytes)).await
    {
        vm.events.note(&vm.name(), Severity::Warning, format!("UEFI variables were not kept: {error}"));
    }
}

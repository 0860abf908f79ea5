//! Prometheus metrics, in its text format.

use crate::node::Node;
use crate::status;
use axum::Router;
use axum::routing::get;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use rempart_api::{ReplicaRole, ScheduledMachine, VmState};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use tokio::net::TcpListener;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VmLabel {
    vm: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabel {
    vm: String,
    peer: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BackupLabel {
    schedule: String,
    vm: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ScheduleLabel {
    schedule: String,
}

type PerVm = Family<VmLabel, Gauge>;

/// All figures, taken now.
pub fn render(node: &Node) -> String {
    let status = status::of_node(node);
    let mut registry = Registry::with_prefix("rempart");
    let mut per_vm =
        |name: &str, help: &str, unit: Option<Unit>, value: &dyn Fn(&rempart_api::VmStatus) -> i64| {
            let family = PerVm::default();
            for vm in &status.vms {
                family.get_or_create(&VmLabel { vm: vm.name.clone() }).set(value(vm));
            }
            match unit {
                Some(unit) => registry.register_with_unit(name, help, unit, family),
                None => registry.register(name, help, family),
            }
        };
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let yes = i64::from;
    per_vm("vm_running", "The machine runs on this node", None, &|vm| yes(vm.state == VmState::Running));
    per_vm("vm_primary", "This node leads", None, &|vm| yes(vm.role == ReplicaRole::Primary));
    per_vm("vm_mirrored", "Every copy is in sync", None, &|vm| yes(vm.mirrored));
    per_vm("vm_frozen", "The guest's writes wait", None, &|vm| yes(vm.frozen));
    per_vm("vm_epoch", "The register's epoch", None, &|vm| number(vm.epoch));
    per_vm("vm_in_sync_members", "Size of the in-sync set", None, &|vm| number(vm.in_sync.len() as u64));
    per_vm("vm_lag", "Log that the slowest peer does not have", Some(Unit::Bytes), &|vm| {
        number(vm.lag_bytes)
    });
    per_vm("vm_journal", "Journal in use", Some(Unit::Bytes), &|vm| number(vm.journal_bytes));
    per_vm("vm_unapplied", "Log that this node's images do not have yet", Some(Unit::Bytes), &|vm| {
        number(vm.unapplied_bytes)
    });
    per_vm("vm_longest_stall_ms", "Longest wait of a guest's write since the daemon started", None, &|vm| {
        number(vm.longest_stall_ms)
    });
    per_vm("vm_resync_sent", "Sent by the resynchronisation under way", Some(Unit::Bytes), &|vm| {
        number(vm.resync.as_ref().map_or(0, |resync| resync.bytes_sent))
    });
    per_vm("vm_resync_changed", "To be sent by the resynchronisation under way", Some(Unit::Bytes), &|vm| {
        number(vm.resync.as_ref().map_or(0, |resync| resync.bytes_changed))
    });
    let opened = PerVm::default();
    let known = status.vms.iter().map(|vm| (&vm.name, 1));
    for (vm, is_open) in known.chain(status.unopened.iter().map(|vm| (&vm.name, 0))) {
        opened.get_or_create(&VmLabel { vm: vm.clone() }).set(is_open);
    }
    registry.register("vm_opened", "This node's copy could be opened", opened);
    let connected = Family::<PeerLabel, Gauge>::default();
    for vm in &status.vms {
        for peer in &vm.peers {
            let label = PeerLabel { vm: vm.name.clone(), peer: peer.name.clone() };
            connected.get_or_create(&label).set(i64::from(peer.connected));
        }
    }
    registry.register("peer_connected", "There is a connection with the peer's copy", connected);
    backups(node, &mut registry);
    let witness = Gauge::<i64>::default();
    witness.set(i64::from(node.host.registers.witness().is_some_and(|witness| witness.is_reachable())));
    registry.register("witness_reachable", "The witness answers", witness);
    let mut out = String::new();
    text::encode(&mut out, &registry).expect("writing to a string does not fail");
    out
}

/// Of the machines that this node backed up by its schedules.
fn backups(node: &Node, registry: &mut Registry) {
    let machines: Vec<(String, Vec<ScheduledMachine>)> = node.schedules.machines();
    let mut per_machine =
        |name: &str, help: &str, unit: Option<Unit>, value: &dyn Fn(&ScheduledMachine) -> f64| {
            let family = Family::<BackupLabel, Gauge<f64, AtomicU64>>::default();
            for (schedule, machine) in
                machines.iter().flat_map(|(name, all)| all.iter().map(move |vm| (name, vm)))
            {
                let label = BackupLabel { schedule: schedule.clone(), vm: machine.vm.clone() };
                family.get_or_create(&label).set(value(machine));
            }
            match unit {
                Some(unit) => registry.register_with_unit(name, help, unit, family),
                None => registry.register(name, help, family),
            }
        };
    let seconds = |unix_ms: u64| unix_ms as f64 / 1000.0;
    per_machine(
        "backup_last_success_timestamp",
        "When the newest backup ended that succeeded; 0: none did",
        Some(Unit::Seconds),
        &|machine| seconds(machine.last_success_unix_ms.unwrap_or_default()),
    );
    per_machine("backup_failures", "Runs that failed since", None, &|machine| machine.failures as f64);
    per_machine(
        "backup_duration",
        "How long the last one took, tries and pauses included",
        Some(Unit::Seconds),
        &|machine| seconds(machine.last.ended_unix_ms.saturating_sub(machine.last.begun_unix_ms)),
    );
    per_machine("backup_read", "Read by the last one", Some(Unit::Bytes), &|machine| {
        machine.last.read_bytes as f64
    });
    per_machine("backup_new", "Of it, what the repository did not have", Some(Unit::Bytes), &|machine| {
        machine.last.new_bytes as f64
    });
    per_machine(
        "backup_boot_timestamp",
        "When a point of it was last started by `verify --boot`, as the newest backup knew; 0: none was",
        Some(Unit::Seconds),
        &|machine| seconds(machine.last_boot.as_ref().map_or(0, |boot| boot.at_unix_ms)),
    );
    per_machine("backup_boot_passed", "It came up then", None, &|machine| {
        f64::from(u8::from(machine.last_boot.as_ref().is_some_and(|boot| boot.passed)))
    });
    per_machine(
        "backup_boot_recovery",
        "From the point being opened to the first check that held",
        Some(Unit::Seconds),
        &|machine| seconds(machine.last_boot.as_ref().and_then(|boot| boot.answered_ms).unwrap_or_default()),
    );
    let (ended, hanging) =
        (Family::<ScheduleLabel, Gauge>::default(), Family::<ScheduleLabel, Gauge>::default());
    for (schedule, was_ended, processes) in node.schedules.troubles() {
        let label = ScheduleLabel { schedule };
        ended.get_or_create(&label).set(i64::from(was_ended));
        hanging.get_or_create(&label).set(processes as i64);
    }
    let help = "The newest run was ended by its time limit or an operator";
    registry.register("backup_run_ended_early", help, ended);
    registry.register("backup_hanging_processes", "Killed, and not gone", hanging);
}

/// On loopback, for a collector on this machine.
pub async fn serve(node: Arc<Node>, listener: TcpListener) {
    let router = Router::new().route("/metrics", get(move || async move { render(&node) }));
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "metrics are not served any more");
    }
}

//! What the operator sees.

use crate::node::Node;
use crate::vm::{self, Allowed, Vm};
use rempart_api::{
    Condition, Nic, NodeStatus, PeerStatus, ReplicaRole, ResyncStatus, Severity, Status, UnopenedVm,
    VmDetail, VmDisk, VmState, VmStatus,
};
use rempart_engine::Role;
use rempart_hypervisor::RunState;
use rempart_hypervisor::definition::{CpuModel, Firmware};

pub fn of_node(node: &Node) -> Status {
    let report = node.known_host_report();
    let not_known = || "not known yet".to_owned();
    let mut conditions = Vec::new();
    if node.cluster().is_some_and(|cluster| cluster.witness().is_some())
        && !node.host.registers.witness().is_some_and(|witness| witness.is_reachable())
    {
        conditions.push(condition(Severity::Warning, "the witness does not answer"));
    }
    conditions
        .extend(node.schedules.warnings().into_iter().map(|warning| condition(Severity::Warning, warning)));
    let unopened: Vec<_> =
        node.unopened().into_iter().map(|(name, error)| UnopenedVm { name, error }).collect();
    conditions.extend(
        unopened.iter().map(|vm| {
            condition(Severity::Critical, format!("`{}` is out of service: {}", vm.name, vm.error))
        }),
    );
    Status {
        node: NodeStatus {
            id: node.id(),
            name: node.name().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cluster: node.cluster().map(|cluster| cluster.name),
            accelerator: report.map_or_else(not_known, |report| report.accelerator.clone()),
            accelerator_reason: report.map_or_else(not_known, |report| report.accelerator_reason.clone()),
            uptime_s: node.uptime().as_secs(),
            conditions,
        },
        vms: node.vms().iter().map(|vm| of_vm(node, vm)).collect(),
        unopened,
    }
}

fn condition(severity: Severity, text: impl Into<String>) -> Condition {
    Condition { severity, text: text.into(), since_unix_ms: crate::vm::unix_ms() }
}

pub fn of_vm(node: &Node, vm: &Vm) -> VmStatus {
    let group = vm.group.status.borrow().clone();
    let engine = &group.engine;
    let shown = vm.shown();
    let replicas = vm.with_record(|record| record.config.replicas.clone());
    let should_run = vm.with_record(|record| record.config.should_run);
    let primary = matches!(engine.role, Role::Primary | Role::PrimaryFrozen);
    let others: Vec<_> = replicas.iter().filter(|id| **id != node.id()).collect();
    let mirrored = primary && !others.is_empty() && engine.in_sync.len() == replicas.len();
    let frozen = primary && (!engine.serving || engine.frozen.is_some());
    let mut conditions = Vec::new();
    if let Some(failed) = &shown.failed {
        conditions.push(condition(Severity::Critical, format!("it is not kept running: {failed}")));
    }
    if engine.disk_failed {
        conditions.push(condition(Severity::Critical, "this node's copy failed"));
    }
    if engine.disk_full {
        conditions.push(condition(
            Severity::Critical,
            "this node's disk is full: the resynchronisation of its copy waits for room",
        ));
    }
    if let Err(error) = vm.with_record(|record| record.config.refuse_unfinished("start")) {
        conditions.push(condition(Severity::Warning, error.to_string()));
    }
    if let Some(failure) = vm.failure() {
        conditions.push(condition(Severity::Critical, failure));
    }
    if engine.superseded {
        let name = vm.name();
        conditions.push(condition(
            Severity::Critical,
            format!(
                "this copy diverged: the other side was forced to lead; `rempart rejoin {name}` gives it up"
            ),
        ));
    }
    if frozen {
        let why = engine.frozen.map(|why| format!(": {}", vm::why_frozen(why))).unwrap_or_default();
        conditions.push(condition(Severity::Critical, format!("the guest's writes wait{why}")));
    } else if primary && !others.is_empty() && !mirrored {
        conditions.push(condition(
            Severity::Warning,
            "not every copy is in sync: the loss of this node would stop it",
        ));
    }
    if vm.with_record(|record| record.config.timing.is_some())
        && let differences = vm.timing.differences(&node.config.timing)
        && !differences.is_empty()
    {
        let list: Vec<String> = differences
            .iter()
            .map(|(key, agreed, configured)| format!("{key} is {agreed}, configured {configured}"))
            .collect();
        conditions.push(condition(
            Severity::Warning,
            format!(
                "it keeps the times it was protected with ({}); make [timing] the same on every node again, or \
                 unprotect it, restart the daemons with the new times and protect it",
                list.join(", ")
            ),
        ));
    }
    let state = match (&shown.machine, shown.run_state) {
        (Some(_), Some(RunState::Paused | RunState::Pausing)) => VmState::Paused,
        (Some(_), _) if matches!(vm.allowed(), Allowed::ShutDown { .. }) || (primary && !should_run) => {
            VmState::Stopping
        }
        (Some(_), _) => VmState::Running,
        (None, _) if shown.starting => VmState::Starting,
        (None, _) if shown.failed.is_some() => VmState::Failed,
        (None, _) if primary && should_run => VmState::Starting,
        (None, _) => VmState::Stopped,
    };
    let peers: Vec<PeerStatus> = engine
        .peers
        .iter()
        .map(|peer| PeerStatus {
            name: node.name_of(peer.node),
            connected: peer.connected,
            in_sync: peer.in_sync,
            phase: phase(peer).to_owned(),
            lag_bytes: peer.lag_bytes,
        })
        .collect();
    let resyncs = || engine.peers.iter().filter_map(|peer| peer.resync);
    let resync = resyncs().find(|resync| resync.running).or_else(|| resyncs().next());
    let resync = resync.map(|resync| ResyncStatus {
        bytes_sent: resync.sent_bytes,
        bytes_changed: resync.changed_bytes,
        bytes_examined: resync.examined_bytes,
        bytes_total: resync.total_bytes,
        running: resync.running,
    });
    VmStatus {
        name: vm.name(),
        group: vm.group_id(),
        state,
        role: match engine.role {
            Role::Primary | Role::PrimaryFrozen => ReplicaRole::Primary,
            Role::Secondary => ReplicaRole::Secondary,
            Role::Idle => ReplicaRole::Undecided,
        },
        primary: engine.primary.map(|id| node.name_of(id)),
        epoch: engine.epoch.0,
        in_sync: engine.in_sync.iter().map(|id| node.name_of(id)).collect(),
        mirrored,
        frozen,
        protected_by: others.into_iter().map(|id| node.name_of(*id)).collect(),
        lag_bytes: peers.iter().map(|peer| peer.lag_bytes).max().unwrap_or(0),
        peers,
        journal_bytes: engine.journal_used_bytes,
        unapplied_bytes: engine.unapplied_bytes,
        resync,
        longest_stall_ms: u64::try_from(group.longest_stall.as_millis()).unwrap_or(u64::MAX),
        qemu_pid: shown.qemu_pid,
        conditions,
        events: vm.events.list(),
    }
}

fn phase(peer: &rempart_engine::PeerStatus) -> &'static str {
    match peer {
        peer if !peer.connected => "away",
        peer if peer.diverged => "diverged",
        peer if peer.in_sync => "in sync",
        peer if peer.resync.is_some_and(|resync| resync.running) => "extents",
        _ => "log",
    }
}

pub fn detail(node: &Node, vm: &Vm) -> VmDetail {
    let (definition, disks) =
        vm.with_record(|record| (record.config.definition.clone(), record.disks.clone()));
    VmDetail {
        status: of_vm(node, vm),
        memory_bytes: definition.memory_bytes,
        cpus: definition.cpus,
        cpu_model: match &definition.cpu_model {
            CpuModel::Baseline => "baseline".into(),
            CpuModel::Named(name) => name.clone(),
            CpuModel::Host => "host".into(),
            CpuModel::Max => "max".into(),
        },
        machine: definition.machine_type.clone(),
        firmware: match definition.firmware {
            Firmware::Bios => rempart_api::Firmware::Bios,
            Firmware::Uefi => rempart_api::Firmware::Uefi,
        },
        nics: definition
            .nics
            .iter()
            .map(|nic| Nic { bridge: nic.bridge.clone(), mac: Some(nic.mac.to_string()) })
            .collect(),
        disks: disks
            .into_iter()
            .map(|disk| VmDisk { index: disk.index.0, path: disk.path, size_bytes: disk.size_bytes })
            .collect(),
        autostart: definition.autostart,
        console: vm.paths.run.join("console.sock"),
    }
}

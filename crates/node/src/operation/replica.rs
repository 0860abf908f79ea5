//! The peer's side of protection: taking on a copy, and giving it up.

use super::create;
use crate::config::{TimingSection, check_name};
use crate::node::Node;
use crate::vm::record::{DiskFile, RegisterPlace, VmConfig, VmRecord};
use crate::vm::{First, Vm};
use rempart_api::Error;
use rempart_hypervisor::HostReport;
use rempart_hypervisor::definition::CpuModel;
use rempart_store::DiskEntry;
use rempart_types::{DiskIndex, GroupId, NodeId, RegisterId};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A primary asks a peer to keep a copy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReplicaOffer {
    pub group: GroupId,
    pub register: RegisterId,
    pub config: VmConfig,
    /// Bytes, by disk.
    pub disks: Vec<(DiskIndex, u64)>,
    /// The product's version and the accelerator, for the check.
    pub product_version: String,
    pub accelerator: String,
    /// Only tell what would be wrong.
    pub check_only: bool,
}

impl ReplicaOffer {
    /// Refuses what the data directory has no room for.
    pub fn check_space(node: &Node, wanted_bytes: u64) -> Result<(), Error> {
        match free_bytes(node) {
            Ok(free) if free >= wanted_bytes => Ok(()),
            Ok(free) => Err(Error::refused(format!("node `{}` has {free} bytes free", node.name()))
                .cause(format!("{wanted_bytes} are needed"))),
            Err(error) => Err(error),
        }
    }
}

pub(super) fn free_bytes(node: &Node) -> Result<u64, Error> {
    rustix::fs::statvfs(node.paths.data_dir())
        .map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize))
        .map_err(|e| Error::failed(format!("cannot read the free space of node `{}`", node.name())).cause(e))
}

/// Checks that this node can keep and run the copy; then makes an empty one.
pub async fn accept_replica(node: &Arc<Node>, from: NodeId, offer: ReplicaOffer) -> Result<(), Error> {
    let definition = &offer.config.definition;
    let name = definition.name.clone();
    check_name(&name).map_err(Error::invalid)?;
    definition
        .validate()
        .map_err(|e| Error::invalid(format!("the definition of `{name}` is not valid")).cause(e))?;
    if let Some(vm) = node.vm_of_group(offer.group) {
        if !vm.peers().contains(&from) {
            return Err(taken(&name, node));
        }
        // The same offer again, after an answer that was lost; or what an `unprotect` left while this node was away.
        let problems = other_times(&vm.timing, offer.config.timing.as_ref());
        return if problems.is_empty() { Ok(()) } else { Err(left_with_other_times(node, &name, &problems)) };
    }
    // It takes a moment: once for each order is enough, and the host's report tried the baseline already.
    let processor = match offer.check_only && definition.cpu_model != CpuModel::Baseline {
        true => node.host.hypervisor.try_processor(&definition.cpu_model).await,
        false => Ok(()),
    };
    check(node, node.host_report().await?, processor, &offer)?;
    if offer.check_only {
        return Ok(());
    }
    let _claim = node.claims.claim(&name)?;
    let paths = node.paths.vm(&name);
    if paths.record().exists() {
        return Err(taken(&name, node));
    }
    // What a cut-off attempt left is worth nothing.
    let _ = std::fs::remove_dir_all(&paths.data);
    let failed = |e: std::io::Error| Error::failed(format!("cannot make the copy of `{name}`")).cause(e);
    std::fs::create_dir_all(&paths.data).map_err(failed)?;
    let disks: Vec<DiskFile> = offer
        .disks
        .iter()
        .map(|&(index, size_bytes)| DiskFile {
            index,
            path: paths.image(index.0),
            size_bytes,
            adopted: false,
        })
        .collect();
    create::format(&paths.store(), offer.group, &disks, DiskEntry::EMPTY).await?;
    let mut config = offer.config;
    if !config.replicas.contains(&node.id()) {
        config.replicas.push(node.id());
    }
    let record = VmRecord::new(offer.group, offer.register, RegisterPlace::Witness, disks, config);
    record.save(&paths.record()).map_err(failed)?;
    let vm = Vm::open(node.host.clone(), paths, record, First::Nothing).await?;
    node.insert_vm(vm);
    Ok(())
}

/// In what the times of a copy here differ from those that the primary offers.
fn other_times(ours: &TimingSection, theirs: Option<&TimingSection>) -> Vec<String> {
    let Some(theirs) = theirs else { return vec!["the primary does not say by which times it goes".into()] };
    let differences = ours.differences(theirs);
    let told = |(key, ours, theirs)| format!("its timing.{key} is {ours}, the primary's {theirs}");
    differences.into_iter().map(told).collect()
}

/// A copy goes by the times that it was made with: a longer lease at the primary would not be waited out.
fn left_with_other_times(node: &Node, name: &str, problems: &[String]) -> Error {
    Error::refused(format!("node `{}` keeps a copy of `{name}` that goes by other times", node.name()))
        .cause(problems.join("; "))
        .hint("set [timing] on both nodes to that copy's, restart their daemons, `protect` and `unprotect` it; then change the times")
}

fn taken(name: &str, node: &Node) -> Error {
    Error::conflict(format!("node `{}` has a virtual machine `{name}` of its own", node.name()))
        .hint("delete it there, or rename one of them")
}

/// What is left of a copy may be of use to somebody, and is nobody's to delete from afar.
fn not_opened(node: &Node, name: &str, why: &Error) -> Error {
    Error::conflict(format!("node `{}` could not open its copy of `{name}`", node.name())).cause(why).hint(
        format!(
            "mend it there; or stop that daemon, move vms/{name} out of its data_dir, and start it again"
        ),
    )
}

/// Everything that would keep the machine from running here, in one list.
fn check(
    node: &Node,
    report: &HostReport,
    processor: Result<(), String>,
    offer: &ReplicaOffer,
) -> Result<(), Error> {
    let definition = &offer.config.definition;
    let mut problems: Vec<String> = Vec::new();
    if let Some(why) = node.why_not_opened(&definition.name) {
        return Err(not_opened(node, &definition.name, &why));
    }
    if node.vm(&definition.name).is_ok() {
        return Err(taken(&definition.name, node));
    }
    let wanted: u64 = offer.disks.iter().map(|(_, size)| *size).sum();
    match free_bytes(node) {
        Ok(free) if free >= wanted => {}
        Ok(free) => problems.push(format!("the disks need {wanted} bytes and {free} are free")),
        Err(error) => problems.push(error.to_string()),
    }
    for nic in &definition.nics {
        if let Some(owner) = create::owner_of_mac(node, nic.mac) {
            problems.push(format!("its virtual machine `{owner}` has the address {}", nic.mac));
        }
    }
    problems.extend(create::host_problems(report, processor, definition, offer.config.nvram.as_deref()));
    if report.accelerator != offer.accelerator {
        problems.push(format!(
            "it runs guests with {}, the primary with {}",
            report.accelerator, offer.accelerator
        ));
    }
    let major = |version: &str| version.split('.').next().unwrap_or_default().to_owned();
    let times = other_times(&node.config.timing, offer.config.timing.as_ref());
    let differ = offer.config.timing.is_some() && !times.is_empty();
    problems.extend(times);
    if major(&offer.product_version) != major(env!("CARGO_PKG_VERSION")) {
        problems.push(format!(
            "it runs version {}, the primary {}",
            env!("CARGO_PKG_VERSION"),
            offer.product_version
        ));
    }
    if problems.is_empty() {
        return Ok(());
    }
    let error = Error::refused(format!("node `{}` cannot keep a copy of `{}`", node.name(), definition.name))
        .cause(problems.join("; "));
    if !differ {
        return Err(error);
    }
    Err(error.hint("make [timing] the same in the configuration of both nodes and restart their daemons"))
}

/// Gives up the copy of a machine that `from` no longer replicates here.
pub async fn drop_replica(node: &Arc<Node>, from: NodeId, group: GroupId) -> Result<(), Error> {
    let Some(vm) = node.vm_of_group(group) else {
        let unopened = node.records().into_iter().find(|record| record.group == group);
        let why = unopened.and_then(|record| Some((node.why_not_opened(record.name())?, record)));
        return why.map_or_else(
            || node.knows_its_machines(),
            |(why, record)| Err(not_opened(node, record.name(), &why)),
        );
    };
    let name = vm.name();
    if !vm.peers().contains(&from) {
        return Err(Error::refused(format!("`{}` has no copy of `{name}`", node.name_of(from))));
    }
    if vm.is_primary() || vm.shown().machine.is_some() {
        return Err(Error::refused(format!("node `{}` leads `{name}`", node.name())));
    }
    node.remove_vm(&name);
    create::discard(&vm).await
}

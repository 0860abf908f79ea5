//! Mirroring a machine to a peer, and ending it.

use super::ReplicaOffer;
use crate::http::PeerClient;
use crate::jobs::Reporter;
use crate::node::Node;
use crate::vm::Vm;
use rempart_api::{Error, MemberRole, ProtectRequest};
use rempart_engine::Command;
use rempart_hypervisor::HostReport;
use rempart_types::{MonotonicTime, NodeId};
use std::sync::Arc;
use std::time::Duration;

/// A peer that gets nothing for so long will hardly be in sync soon: the operator should look.
const COPY_PATIENCE: Duration = Duration::from_secs(60);
/// The register is asked again and again to let a peer go, for this long.
const LEAVE_DEADLINE: Duration = Duration::from_secs(30);

pub async fn protect(
    node: Arc<Node>,
    vm: Arc<Vm>,
    request: ProtectRequest,
    reporter: Reporter,
) -> Result<serde_json::Value, Error> {
    let name = vm.name();
    let refuse = |why: String| Error::refused(format!("cannot protect `{name}`: {why}"));
    let (cluster, _) = node.cluster_or_refuse()?;
    let peer =
        cluster.by_name(&request.peer).filter(|member| member.role == MemberRole::Node).cloned().ok_or_else(
            || {
                Error::not_found(format!(
                    "cannot protect `{name}`: there is no node `{}` in the cluster",
                    request.peer
                ))
                .hint("`rempart cluster members` lists them")
            },
        )?;
    if peer.id == node.id() {
        return Err(Error::invalid(format!("cannot protect `{name}` by a copy on the same node")));
    }
    if vm.peers().contains(&peer.id) {
        return Err(Error::conflict(format!("`{name}` has a copy on `{}` already", peer.name)));
    }
    if !vm.is_primary() {
        return Err(refuse("this node does not lead it".into()).hint("run it on the node that does"));
    }
    if cluster.witness().is_none() {
        return Err(refuse("the cluster has no witness, and two copies need a third party to decide who leads".into())
            .hint("on a third machine: `rempart witness init`, with a token of `rempart cluster token --role witness`"));
    }
    if let Some(machine) = vm.shown().machine {
        let guard_stop =
            machine.guard_stop().map_err(|e| Error::failed(format!("cannot protect `{name}`")).cause(e))?;
        // The peer would wait too short a time for it.
        let agreed = Duration::from_millis(vm.timing.guard_stop_ms);
        if guard_stop > agreed {
            return Err(refuse(format!(
                "its guard was started with a guard_stop_ms of {}, [timing] says {} now",
                guard_stop.as_millis(),
                agreed.as_millis()
            ))
            .hint(format!("`rempart vm stop {name}`, `rempart vm start {name}`, then protect it")));
        }
        // A guard never shortens a lease that it was given, by an earlier configuration perhaps.
        let latest = MonotonicTime(crate::clock::monotonic().0 + vm.timing.lease_ms * 1_000_000);
        let status = machine.status().await;
        let lease = status.map_err(|e| Error::failed(format!("cannot protect `{name}`")).cause(e))?.lease;
        if !lease.is_over(latest) {
            return Err(refuse(
                "its guard still holds a lease of an earlier configuration, longer than [timing] says now"
                    .into(),
            )
            .hint("try again when it is over, a minute later at most"));
        }
    }
    reporter.phase(format!("checking `{}`", peer.name));
    let client = PeerClient::new(&node, peer.id)?;
    let mut check = offer(node.host_report().await?, &vm, peer.id);
    check.check_only = true;
    client.post::<_, ()>("/peer/v1/replicas", &check).await?;
    // It may have been imported before the cluster had a witness.
    super::move_to_witness(&node, &vm).await?;
    reporter.phase(format!("preparing the copy on `{}`", peer.name));
    let offer = offer(node.host_report().await?, &vm, peer.id);
    client.post::<_, ()>("/peer/v1/replicas", &offer).await?;
    vm.put_config(|config| {
        config.replicas.push(peer.id);
        config.timing = Some(vm.timing);
    })
    .await?;
    vm.command("protect", Command::AddPeer { peer: peer.id }).await?;
    vm.want_link(peer.id);
    if request.wait {
        wait_until_in_sync(&vm, peer.id, &peer.name, &reporter).await?;
    }
    Ok(serde_json::json!({ "name": name, "peer": peer.name, "mirrored": request.wait }))
}

/// Waits until the register names `peer` among those that hold everything. The copying goes on whatever this returns.
async fn wait_until_in_sync(
    vm: &Vm,
    peer: NodeId,
    peer_name: &str,
    reporter: &Reporter,
) -> Result<(), Error> {
    let name = vm.name();
    let not_yet = |cause: String| {
        Error::failed(format!("`{name}` is not mirrored to `{peer_name}` yet"))
            .cause(cause)
            .hint("the copy is made and goes on by itself; `rempart status --watch` follows it")
    };
    let mut status = vm.group.status.clone();
    let mut before = None;
    let mut since = tokio::time::Instant::now();
    loop {
        let now = status.borrow_and_update().clone();
        if now.engine.in_sync.contains(peer) {
            return Ok(());
        }
        if !vm.is_primary() {
            return Err(not_yet("this node no longer leads it".into()));
        }
        let connected = now.connected.contains(&peer);
        let resync = now.engine.peers.iter().find(|other| other.node == peer).and_then(|other| other.resync);
        let reached = now.engine.peers.iter().find(|other| other.node == peer).map(|other| other.accepted);
        let progress = (connected, resync, reached);
        if before != Some(progress) {
            before = Some(progress);
            since = tokio::time::Instant::now();
            let (done, total) = resync.map_or((0, 0), |resync| (resync.examined_bytes, resync.total_bytes));
            reporter.progress(format!("copying to `{peer_name}`"), done, total);
        }
        match tokio::time::timeout_at(since + COPY_PATIENCE, status.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(not_yet("this copy is out of service".into())),
            Err(_) => {
                let what = if connected { "made no progress" } else { "did not answer" };
                return Err(not_yet(format!("`{peer_name}` {what} for {} s", COPY_PATIENCE.as_secs())));
            }
        }
    }
}

fn offer(report: &HostReport, vm: &Vm, peer: NodeId) -> ReplicaOffer {
    let register = vm.group.register().unwrap_or_else(|| vm.with_record(|r| r.register));
    let mut config = vm.with_record(|record| record.config.clone());
    config.replicas.push(peer);
    config.timing = Some(vm.timing);
    vm.with_record(|record| ReplicaOffer {
        group: record.group,
        register,
        config,
        disks: record.disks.iter().map(|disk| (disk.index, disk.size_bytes)).collect(),
        product_version: env!("CARGO_PKG_VERSION").to_owned(),
        accelerator: report.accelerator.clone(),
        check_only: false,
    })
}

/// Ends mirroring. The peers' copies are deleted; one that cannot be reached is named.
pub async fn unprotect(node: Arc<Node>, vm: Arc<Vm>, reporter: Reporter) -> Result<serde_json::Value, Error> {
    let name = vm.name();
    let peers = vm.peers();
    if peers.is_empty() {
        return Err(Error::conflict(format!("`{name}` is not mirrored")));
    }
    if !vm.is_primary() {
        return Err(Error::refused(format!("cannot unprotect `{name}`: this node does not lead it"))
            .hint("run it on the node that does"));
    }
    let mut left = Vec::new();
    for peer in peers {
        reporter.phase(format!("leaving `{}`", node.name_of(peer)));
        vm.command("unprotect", Command::RemovePeer { peer }).await?;
        // Before the register let it go, its copy may be the one that must not be lost.
        wait_until_left(&node, &vm, peer).await?;
        vm.put_config(|config| {
            config.replicas.retain(|replica| *replica != peer);
            if config.replicas.len() == 1 {
                config.timing = None;
            }
        })
        .await?;
        vm.drop_link(peer);
        let path = format!("/peer/v1/replicas/{}", vm.group_id());
        let dropped = match PeerClient::new(&node, peer) {
            Ok(client) => client.delete::<()>(&path).await,
            Err(error) => Err(error),
        };
        if let Err(error) = dropped {
            left.push(format!("`{}`: {error}", node.name_of(peer)));
        }
    }
    if !left.is_empty() {
        let text = format!("copies remain that could not be deleted: {}", left.join("; "));
        vm.events.note(&name, rempart_api::Severity::Warning, text);
    }
    Ok(serde_json::json!({ "name": name, "copies_left": left }))
}

async fn wait_until_left(node: &Node, vm: &Vm, peer: NodeId) -> Result<(), Error> {
    let (name, peer_name) = (vm.name(), node.name_of(peer));
    let mut status = vm.group.status.clone();
    let left = status.wait_for(|status| !status.engine.in_sync.contains(peer));
    match tokio::time::timeout(LEAVE_DEADLINE, left).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) => Err(Error::failed(format!("cannot unprotect `{name}`: this copy is out of service"))),
        Err(_) => {
            let reachable = node.host.registers.witness().is_some_and(|witness| witness.is_reachable());
            let cause =
                if reachable { "the register was not changed" } else { "the witness does not answer" };
            Err(Error::unreachable(format!(
                "`{peer_name}` has not left the in-sync set of `{name}` within {} s; its copy is kept",
                LEAVE_DEADLINE.as_secs()
            ))
            .cause(cause)
            .hint(format!("bring the witness back, then run `rempart unprotect {name}` again")))
        }
    }
}

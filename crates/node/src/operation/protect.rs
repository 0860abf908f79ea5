//! Mirroring a machine to a peer, and ending it.

use super::ReplicaOffer;
use crate::http::PeerClient;
use crate::jobs::Reporter;
use crate::node::Node;
use crate::vm::Vm;
use crate::vm::record::RegisterPlace;
use rempart_api::{Error, MemberRole, ProtectRequest};
use rempart_engine::Command;
use rempart_hypervisor::HostReport;
use std::sync::Arc;

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
    if vm.place() == RegisterPlace::Local {
        return Err(refuse(
            "its register is a file on this node, since the cluster had no witness when it was imported"
                .into(),
        )
        .hint("stop it, import it again from its disk files, and protect that"));
    }
    reporter.phase(format!("checking `{}`", peer.name));
    let client = PeerClient::new(&node, peer.id)?;
    let mut offer = offer(node.host_report().await?, &vm);
    offer.config.replicas.push(peer.id);
    offer.check_only = true;
    client.post::<_, ()>("/peer/v1/replicas", &offer).await?;
    reporter.phase(format!("preparing the copy on `{}`", peer.name));
    offer.check_only = false;
    client.post::<_, ()>("/peer/v1/replicas", &offer).await?;
    vm.put_config(|config| config.replicas.push(peer.id)).await?;
    vm.command("protect", Command::AddPeer { peer: peer.id }).await?;
    vm.want_link(peer.id);
    Ok(serde_json::json!({ "name": name, "peer": peer.name }))
}

fn offer(report: &HostReport, vm: &Vm) -> ReplicaOffer {
    let register = vm.group.register().unwrap_or_else(|| vm.with_record(|r| r.register));
    vm.with_record(|record| ReplicaOffer {
        group: record.group,
        register,
        config: record.config.clone(),
        disks: record.disks.iter().map(|disk| (disk.index, disk.size_bytes)).collect(),
        product_version: env!("CARGO_PKG_VERSION").to_owned(),
        qemu_version: report.qemu_version.clone(),
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
        vm.put_config(|config| config.replicas.retain(|replica| *replica != peer)).await?;
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

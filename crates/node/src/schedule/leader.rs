//! Which node backs a machine up: the one that leads it.

use crate::http::PeerClient;
use crate::node::Node;
use rempart_api::{Error, MemberRole};
use rempart_engine::Role;
use std::sync::Arc;
use std::time::Duration;

/// A machine that changes its leader has one again by then.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_secs(1);
const PEER_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub enum Leader {
    Here,
    Elsewhere,
    /// Nobody backs it up.
    Nobody(Error),
}

/// Whether this node leads it; what a peer asks.
pub fn leads(node: &Node, vm: &str) -> bool {
    role(node, vm).is_some_and(|role| matches!(role, Role::Primary | Role::PrimaryFrozen))
}

fn role(node: &Node, vm: &str) -> Option<Role> {
    node.vm(vm).ok().map(|vm| vm.group.status.borrow().engine.role)
}

/// Waits where that is about to change.
pub async fn of(node: &Arc<Node>, vm: &str) -> Leader {
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        match role(node, vm) {
            Some(Role::Primary | Role::PrimaryFrozen) => return Leader::Here,
            // It hears the leader.
            Some(Role::Secondary) => return Leader::Elsewhere,
            known => {
                let silent = match led_by_a_peer(node, vm).await {
                    Ok(()) => return Leader::Elsewhere,
                    Err(silent) => silent,
                };
                if known.is_none() || tokio::time::Instant::now() >= end {
                    return Leader::Nobody(nobody(node, vm, &silent));
                }
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn nobody(node: &Node, vm: &str, silent: &[String]) -> Error {
    let error = Error::not_found(format!("no node is known to lead `{vm}`"));
    match (node.why_not_opened(vm), silent) {
        (Some(why), _) => error.cause(why),
        (None, []) => error.hint("`rempart vm list` on each node shows the machines that there are"),
        (None, silent) => error.cause(format!("no answer from {}", silent.join(", "))),
    }
}

/// Else the peers that do not answer.
async fn led_by_a_peer(node: &Arc<Node>, vm: &str) -> Result<(), Vec<String>> {
    let mut silent = Vec::new();
    let members = node.cluster().map(|cluster| cluster.members).unwrap_or_default();
    for member in members.iter().filter(|member| member.role == MemberRole::Node && member.id != node.id()) {
        let asked = match PeerClient::new(node, member.id) {
            Ok(peer) => peer.patient(PEER_DEADLINE).post::<_, bool>("/peer/v1/leads", &vm).await,
            Err(error) => Err(error),
        };
        match asked {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(_) => silent.push(format!("`{}`", member.name)),
        }
    }
    Err(silent)
}

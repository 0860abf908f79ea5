//! Moving a machine: planned, back, and by force.

use crate::http::PeerClient;
use crate::jobs::Reporter;
use crate::node::Node;
use crate::vm::{First, Vm, unix_ms};
use rempart_api::{Error, FailoverMode, FailoverRequest};
use rempart_cluster::FrozenWhy;
use rempart_engine::Command;
use rempart_types::{Lsn, NodeId, RegisterId};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// After the register named this node, its machine should run within this time.
const START_DEADLINE: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HandOver {
    pub to: NodeId,
}

/// Brings a machine to this node.
pub async fn failover(
    node: Arc<Node>,
    mut vm: Arc<Vm>,
    request: FailoverRequest,
    reporter: Reporter,
) -> Result<serde_json::Value, Error> {
    let name = vm.name();
    let leads = vm.is_primary();
    if leads && (request.mode == FailoverMode::Planned || !is_cut_off(&vm)) {
        return Err(Error::conflict(format!("this node leads `{name}` already")));
    }
    match request.mode {
        FailoverMode::Planned => {
            let from = vm.group.primary().ok_or_else(|| {
                Error::refused(format!("cannot move `{name}`: this node does not know who leads it"))
                    .hint("if the other side is lost for good, see `rempart failover --force`")
            })?;
            reporter.phase(format!("waiting for `{}` to shut it down and hand over", node.name_of(from)));
            let client = PeerClient::new(&node, from)?.patient(grace(&node) + Duration::from_secs(60));
            let path = format!("/peer/v1/vms/{}/handover", vm.group_id());
            client.post::<_, ()>(&path, &HandOver { to: node.id() }).await?;
        }
        FailoverMode::Force => {
            let set_aside = vm.group.status.borrow().engine.set_aside;
            if set_aside.is_some_and(|kept| kept.lsn == Lsn::ZERO) {
                return Err(Error::refused(format!("there is nothing of `{name}` to start on this node"))
                    .cause("its first copy was never finished"));
            }
            let loss = if leads { loss_of_primary(&node, &vm) } else { loss(&node, &vm) };
            if !request.confirm_fenced {
                return Err(Error::refused(format!("a forced takeover of `{name}` may lose data")).cause(loss).hint(
                    "make sure that the other side cannot run it (power it off), then add --confirm-fenced",
                ));
            }
            if set_aside.is_some() {
                reporter.phase("returning to the last consistent state");
                vm.close().await;
                vm = node.reopen_vm(&vm, First::RollBack).await?;
            }
            reporter.phase("taking over by force");
            let id =
                crate::identity::random_u128().map_err(|e| Error::failed("cannot draw an id").cause(e))?;
            let old_register_lost =
                !node.host.registers.witness().is_some_and(|witness| witness.is_reachable());
            let order =
                Command::Force { confirmed_fenced: true, new_register: RegisterId(id), old_register_lost };
            vm.command("take over", order).await?;
            vm.events.note(&name, rempart_api::Severity::Critical, format!("forced takeover: {loss}"));
        }
    }
    reporter.phase("starting it here");
    wait_until_it_runs(&vm).await?;
    Ok(serde_json::json!({ "name": name, "node": node.name() }))
}

/// Moves a machine back: to this node if it follows, away from it if it leads.
pub async fn failback(node: Arc<Node>, vm: Arc<Vm>, reporter: Reporter) -> Result<serde_json::Value, Error> {
    if !vm.is_primary() {
        let request = FailoverRequest { mode: FailoverMode::Planned, confirm_fenced: false };
        return failover(node, vm, request, reporter).await;
    }
    let name = vm.name();
    let to = vm.group.in_sync_peer().ok_or_else(|| {
        Error::refused(format!("cannot move `{name}`: no peer holds everything"))
            .hint("wait until `rempart status` says mirrored")
    })?;
    reporter.phase(format!("shutting it down and handing over to `{}`", node.name_of(to)));
    hand_over(&vm, to).await?;
    Ok(serde_json::json!({ "name": name, "node": node.name_of(to) }))
}

/// On the primary: gives the machine to `to`.
pub async fn hand_over(vm: &Vm, to: NodeId) -> Result<(), Error> {
    vm.command("hand over", Command::Handover { to }).await.map(drop)
}

fn grace(node: &Node) -> Duration {
    Duration::from_secs(node.config.vm.shutdown_timeout_s)
}

/// What a forced takeover gives up, as far as this side can know.
fn loss(node: &Node, vm: &Vm) -> String {
    let status = vm.group.status.borrow().clone();
    let engine = &status.engine;
    let heard = match status.primary_heard_unix_ms {
        Some(at) => {
            format!("last contact with the primary was {} s ago", unix_ms().saturating_sub(at) / 1000)
        }
        None => "there was no contact with the primary since this daemon started".to_owned(),
    };
    let what = match engine.set_aside {
        Some(kept) => format!(
            "the copy on `{}` is unfinished; its last consistent state ends at log position {} of term {}",
            node.name(),
            kept.lsn,
            kept.term
        ),
        None => {
            format!(
                "the copy on `{}` ends at log position {} of epoch {}",
                node.name(),
                engine.end,
                engine.epoch
            )
        }
    };
    format!("{what}; {heard}; whatever was acknowledged elsewhere after that is lost")
}

/// Whether neither a peer nor the witness can tell this primary that it still leads.
fn is_cut_off(vm: &Vm) -> bool {
    use FrozenWhy::{LeaseExpired, Refused, RegisterOutOfReach};
    matches!(vm.group.status.borrow().engine.frozen, Some(LeaseExpired | Refused | RegisterOutOfReach))
}

/// The same on a primary that is frozen because nobody can tell it whether a peer took over.
fn loss_of_primary(node: &Node, vm: &Vm) -> String {
    let peers: Vec<String> = vm.peers().into_iter().map(|peer| format!("`{}`", node.name_of(peer))).collect();
    let peers = peers.join(" or ");
    format!(
        "`{}` was cut off from {peers} and the witness while it led; if {peers} took over since, whatever was \
         acknowledged there is lost",
        node.name(),
    )
}

async fn wait_until_it_runs(vm: &Vm) -> Result<(), Error> {
    let name = vm.name();
    let mut status = vm.group.status.clone();
    let mut shown = vm.shown_watch();
    let reached = async {
        let _ = status.wait_for(|status| status.serves()).await;
        if vm.with_record(|record| record.config.should_run) {
            let _ = shown.wait_for(|shown| shown.machine.is_some() || shown.failed.is_some()).await;
        }
        shown.borrow().failed.clone()
    };
    match tokio::time::timeout(START_DEADLINE, reached).await {
        Ok(None) => Ok(()),
        Ok(Some(why)) => Err(Error::failed(format!("`{name}` does not start here")).cause(why)),
        Err(_) => {
            Err(Error::failed(format!("`{name}` does not run here after {} s", START_DEADLINE.as_secs()))
                .hint("`rempart status` tells what it waits for"))
        }
    }
}

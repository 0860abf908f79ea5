//! The cores' reports in an operator's words.

use super::Vm;
use rempart_api::Severity;
use rempart_cluster::{Condition, FrozenWhy, HandoverFailure, RefusedWhy};
use rempart_engine::Report;
use rempart_types::NodeId;

pub fn describe(vm: &Vm, report: &Report) -> (Severity, String) {
    let name = |node: &NodeId| format!("`{}`", vm.host.names.name_of(*node));
    match report {
        Report::LocalDiskFailed { what } => (Severity::Critical, format!("this node's disk failed: {what}")),
        Report::DiskFull { what } => (
            Severity::Critical,
            format!(
                "this node's disk is full, the resynchronisation waits for room, and goes on by itself: {what}"
            ),
        ),
        Report::DiskHasRoom => {
            (Severity::Info, "this node's disk has room again, the resynchronisation goes on".into())
        }
        Report::Cluster(condition) => cluster(condition, name),
        Report::Replication(report) => replication(report, name),
    }
}

fn cluster(condition: &Condition, name: impl Fn(&NodeId) -> String) -> (Severity, String) {
    use Severity::{Critical, Info, Warning};
    match condition {
        Condition::Leading { term } => (Info, format!("this node leads, term {term}")),
        Condition::WaitsToLead => (
            Critical,
            "this node led last; it waits for the register, or for every other copy, to tell that none leads since"
                .into(),
        ),
        Condition::Following { primary, term } => (Info, format!("follows {} in term {term}", name(primary))),
        Condition::PrimarySuspected { primary } => {
            (Warning, format!("{} has not been heard for too long; asking the register", name(primary)))
        }
        Condition::TakingOver { from, epoch } => (
            Warning,
            format!("takes over from {} at epoch {epoch}; waits until its lease is over", name(from)),
        ),
        Condition::Fenced { by, epoch } => {
            (Critical, format!("{} leads at epoch {epoch}: this node no longer does", name(by)))
        }
        Condition::Left { node, epoch } => {
            (Warning, format!("{} left the in-sync set at epoch {epoch}", name(node)))
        }
        Condition::Joined { node, epoch } => {
            (Info, format!("{} joined the in-sync set at epoch {epoch}", name(node)))
        }
        Condition::JoinHeldBack { node, .. } => (
            Info,
            format!("{} is ready, but left too lately or too often; it joins a little later", name(node)),
        ),
        Condition::Frozen { why } => (Critical, format!("frozen: {}", why_frozen(*why))),
        Condition::Thawed => (Info, "no longer frozen".into()),
        Condition::RegisterOutOfReach => (Warning, "the register does not answer".into()),
        Condition::RegisterBack => (Info, "the register answers again".into()),
        Condition::RegisterAmnesiac => (
            Critical,
            "the register lost its state; it serves nobody until every replica told what it knows".into(),
        ),
        Condition::RegisterWentBack { known, found } => (
            Critical,
            match found {
                Some(found) => format!(
                    "the register is at epoch {found}, but {known} was seen: it was reset or exchanged"
                ),
                None => format!(
                    "the register holds nothing, but epoch {known} was seen: it was reset or exchanged"
                ),
            },
        ),
        Condition::CopyUnusable => (Critical, "this node should lead, but its copy is not whole".into()),
        Condition::LocalDiskFailed => (Critical, "this node's disk failed".into()),
        Condition::Superseded { successor } => (
            Critical,
            format!(
                "diverged: the other side was forced to lead (register {successor}); what only this copy holds waits \
                 for `rempart rejoin`"
            ),
        ),
        Condition::Forced { epoch, .. } => (Critical, format!("forced to lead at epoch {epoch}")),
        Condition::RegisterMoved { epoch, register } => {
            (Info, format!("its register is on the witness now: {register}, epoch {epoch}"))
        }
        Condition::HandedOver { to, epoch } => {
            (Info, format!("handed over to {} at epoch {epoch}", name(to)))
        }
        Condition::HandoverFailed { to, why } => (
            Warning,
            format!(
                "the handover to {} did not happen: {}",
                name(to),
                match why {
                    HandoverFailure::DestinationLost => "it was lost",
                    HandoverFailure::Deadline => "it took too long",
                }
            ),
        ),
        Condition::Refused { command, why } => (Warning, format!("`{command}` refused: {}", refused(*why))),
    }
}

pub fn refused(why: RefusedWhy) -> &'static str {
    match why {
        RefusedWhy::NotPrimary => "this node does not lead",
        RefusedWhy::AlreadyPrimary => "this node leads already",
        RefusedWhy::PeerNotInSync => "the peer is not in sync",
        RefusedWhy::AlreadyCreated => "it exists already",
        RefusedWhy::Busy => "another order is being carried out",
        RefusedWhy::NotConfirmed => "nobody confirmed that the other side is fenced",
        RefusedWhy::CopyUnusable => "this copy is not whole",
        RefusedWhy::RegisterOutOfReach => "the register does not answer",
        RefusedWhy::NotAlone => "it has peers",
        RefusedWhy::RegisterTaken => "the new register holds somebody else's value",
        RefusedWhy::NotSuperseded => "there is nothing to rejoin",
    }
}

fn replication(report: &rempart_replication::Report, name: impl Fn(&NodeId) -> String) -> (Severity, String) {
    use rempart_replication::Report;
    match report {
        Report::Diverged { peer, common, peer_end } => (
            Severity::Critical,
            format!(
                "{} holds {} records of its own after {common}",
                name(peer),
                peer_end.0.saturating_sub(common.0)
            ),
        ),
        Report::CatchUpStarted { peer, after, end } => {
            (Severity::Info, format!("sends {} the log after {after}, to {end}", name(peer)))
        }
        Report::ResyncStarted { peer, .. } => (Severity::Info, format!("resynchronises {}", name(peer))),
        Report::ResyncFinished { peer, bytes_sent, .. } => {
            (Severity::Info, format!("{} is resynchronised; {bytes_sent} bytes were sent", name(peer)))
        }
        Report::Lost { peer, end, upto } => (
            Severity::Critical,
            format!(
                "this copy lost records that were on its disk: its log ends at {end}, {} knows it to reach {upto}; it \
                 gives way and is resynchronised",
                name(peer)
            ),
        ),
        Report::Adopted { from, first, last } => {
            (Severity::Info, format!("took the records {first} to {last} that {} still had", name(from)))
        }
        Report::InStep { peer } => (Severity::Info, format!("{} is in step", name(peer))),
    }
}

/// Completes "frozen: …".
pub fn why_frozen(why: FrozenWhy) -> &'static str {
    match why {
        FrozenWhy::RegisterOutOfReach => "a member is lost and the register does not answer",
        FrozenWhy::Refused => "a peer promised a newer epoch and the register does not answer",
        FrozenWhy::LeaseExpired => "the lease ran out; the machine is paused",
        FrozenWhy::HandingOver => "handing over",
    }
}

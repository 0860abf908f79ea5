//! Names under which a campaign counts what the cores reported.

use crate::coverage::{Coverage, Kind};
use crate::faults::Fault;
use rempart_cluster::{Condition, FrozenWhy};
use rempart_replication::{Report, ResyncMode};

pub(crate) fn condition(condition: &Condition) -> &'static str {
    match condition {
        Condition::Leading { .. } => "leading",
        Condition::WaitsToLead => "waits to lead",
        Condition::Following { .. } => "following",
        Condition::PrimarySuspected { .. } => "primary suspected",
        Condition::TakingOver { .. } => "taking over",
        Condition::Fenced { .. } => "fenced",
        Condition::Left { .. } => "member left",
        Condition::Joined { .. } => "member joined",
        Condition::JoinHeldBack { .. } => "join held back",
        Condition::Frozen { why: FrozenWhy::RegisterOutOfReach } => "frozen: register out of reach",
        Condition::Frozen { why: FrozenWhy::Refused } => "frozen: refused",
        Condition::Frozen { why: FrozenWhy::LeaseExpired } => "frozen: lease expired",
        Condition::Frozen { why: FrozenWhy::HandingOver } => "frozen: handing over",
        Condition::Thawed => "thawed",
        Condition::RegisterOutOfReach => "register out of reach",
        Condition::RegisterBack => "register back",
        Condition::RegisterAmnesiac => "register amnesiac",
        Condition::RegisterWentBack { .. } => "register went back",
        Condition::CopyUnusable => "copy unusable",
        Condition::LocalDiskFailed => "cluster: local disk failed",
        Condition::Superseded { .. } => "superseded",
        Condition::Forced { .. } => "forced",
        Condition::RegisterMoved { .. } => "register moved",
        Condition::HandedOver { .. } => "handed over",
        Condition::HandoverFailed { .. } => "handover failed",
        Condition::Refused { .. } => "command refused",
    }
}

pub(crate) fn replication(report: &Report) -> &'static str {
    match report {
        Report::Diverged { .. } => "diverged",
        Report::CatchUpStarted { .. } => "catch-up from the log",
        Report::ResyncStarted { mode: ResyncMode::Changed, .. } => "resync of changed extents",
        Report::ResyncStarted { mode: ResyncMode::Compare, .. } => "resync by comparison",
        Report::ResyncFinished { .. } => "resync finished",
        Report::InStep { .. } => "peer in step",
        Report::Lost { .. } => "lost what was flushed",
        Report::Adopted { .. } => "longer log adopted",
    }
}

/// What a campaign must have met.
const MUST: [&str; 42] = [
    "VM started again",
    "longer log adopted",
    "leading",
    "following",
    "primary suspected",
    "taking over",
    "fenced",
    "member left",
    "member joined",
    "join held back",
    "frozen: register out of reach",
    "frozen: refused",
    "frozen: lease expired",
    "frozen: handing over",
    "thawed",
    "register out of reach",
    "register back",
    "register amnesiac",
    "amnesiac witness restored",
    "copy unusable",
    "local disk failed",
    "superseded",
    "forced",
    "handed over",
    "handover failed",
    "command refused",
    "catch-up from the log",
    "resync of changed extents",
    "resync by comparison",
    "resync finished",
    "peer in step",
    "guard stopped the VM",
    "VM adopted",
    "VM booted",
    "session closed for silence",
    "replica replaced by an empty one",
    "term led",
    "converged",
    "damaged copy refused",
    "two VMs within the excused second",
    "view: changes known",
    "view: lost",
];

/// What recovery can find; with a letter: rows of the table in docs/formats/store.md.
pub(crate) const RECOVERY: [&str; 18] = [
    "A: the log's clean end",
    "B: torn tail",
    "C: half a batch",
    "D: goes on in the next segment",
    "J: unclaimed segment unreadable",
    "M: segment of a dropped log",
    "O: no superblock copy",
    "P: rolled back",
    "Q: syncing",
    "R: image touched",
    "clean",
    "unclean",
    "redo needed",
    "damaged",
    "syncing: extents",
    "syncing: log",
    "images changed",
    "refused to open",
];

/// Rows of the recovery table that these worlds meet too seldom to ask for a number: the store's own tests make them.
const SELDOM: [&str; 10] = [
    "E: old batch behind the end",
    "F: cutting off goes on",
    "G: claimed, missing",
    "H: synced, missing",
    "I: claimed, segment unreadable",
    "K: redo segment missing",
    "L: blank segment",
    "N: one superblock copy",
    "S: change map page unsound",
    "T: snapshot map page unsound",
];

/// The row's name of a letter in docs/formats/store.md.
pub(crate) fn recovery_row(letter: char) -> &'static str {
    RECOVERY
        .iter()
        .chain(&SELDOM)
        .find(|name| name.starts_with(letter) && name[1..].starts_with(':'))
        .expect("every row has a name")
}

const CHECKED: [&str; 8] = [
    "images equal",
    "image + redo is a prefix",
    "changed extents are reported",
    "flushed data on every member",
    "disks read back by the guest",
    "compare command",
    "backup",
    "promise kept",
];

/// Declares everything, so that what never happened shows as 0.
pub fn declare(coverage: &mut Coverage) {
    coverage.declare(Kind::Fault, &Fault::ALL.map(Fault::name));
    coverage.declare(Kind::Fault, &["witness: lost request", "witness: lost reply", "witness: late request"]);
    coverage.declare(Kind::Reached, &MUST);
    coverage.declare(Kind::Recovery, &RECOVERY);
    coverage.note(Kind::Recovery, &SELDOM);
    coverage.declare(Kind::Checked, &CHECKED);
}

//! Mistakes that can be planted, each the breach of one rule. The checkers must find every one of them.

/// One deliberate mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bug {
    /// Rule 12: a takeover asks the register before its promise is on disk.
    SwapBeforePromise,
    /// Rule 12: a replica that promised a newer epoch goes on acknowledging beacons.
    AckAfterPromise,
    /// Rule 12: whoever suspects the primary takes over, in sync or not.
    OutsiderTakesOver,
    /// Rule 12: a restart without the register forgets that an own swap may still land.
    RestartForgetsAttempts,
    /// Rule 16: a primary that was alone and switched off leads again without having asked anybody.
    RestartAsksNobody,
    /// Rule 16: a replica that was ordered to lead, and restarted before it did, says that it lives where it did before.
    OrderUntold,
    /// Rule 2: a restart without the register opens the same term again.
    SameTermAgain,
    /// Rule 9: only the known in-sync set acknowledges while a swap is open.
    NoUnion,
    /// Rule 9: a swap without an answer counts as if it never happened.
    UnknownIsLost,
    /// Rule 13: a peer is admitted without holding everything.
    AdmitEarly,
    /// Rule 13: a peer that was caught up for an attempt that came to nothing still counts as caught up.
    JoinOutlivesAttempt,
    /// Rule 13: what a peer held when this replica led last still counts when it leads again.
    CaughtUpOutlivesTerm,
    /// Rule 14: an unusable copy leads.
    UnusableLeads,
    /// Rule 15: the source of a handover with unknown outcome takes its machine back without a swap.
    SourceTakesBack,
    /// Rule 15: the machine is not stopped before the primacy is given away.
    HandoverWithMachine,
    /// Rule 19: the lease of a mirrored primary goes on as long as its own register looks unchanged.
    LeaseWithoutPeer,
    /// Rule 19: the takeover's wait counts from the suspicion, not from the register's answer.
    WaitFromSuspicion,
    /// Rule 19: the machine starts as soon as the register agreed.
    NoWait,
    /// Rule 19, solo: the primary renews its own lease although an admission may have landed.
    SoloLeaseWhileAdmitting,
}

impl Bug {
    pub const ALL: [Bug; 19] = [
        Bug::SwapBeforePromise,
        Bug::AckAfterPromise,
        Bug::OutsiderTakesOver,
        Bug::JoinOutlivesAttempt,
        Bug::RestartForgetsAttempts,
        Bug::RestartAsksNobody,
        Bug::OrderUntold,
        Bug::SameTermAgain,
        Bug::NoUnion,
        Bug::UnknownIsLost,
        Bug::AdmitEarly,
        Bug::CaughtUpOutlivesTerm,
        Bug::UnusableLeads,
        Bug::SourceTakesBack,
        Bug::HandoverWithMachine,
        Bug::LeaseWithoutPeer,
        Bug::WaitFromSuspicion,
        Bug::NoWait,
        Bug::SoloLeaseWhileAdmitting,
    ];
}

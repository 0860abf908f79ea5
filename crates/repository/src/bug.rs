//! Mistakes that can be planted, each the breach of one rule of the log. The simulation must find every one of them.

/// One deliberate mistake. Rule numbers are those of the table in `docs/testing.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bug {
    /// Rule 1: who loses a slot appends the same behind the other's entry, and nobody looks whether it is right there.
    NotValidatedAgain,
    /// Rule 1: who creates what is there replaces it, as a rename would.
    SlotReplaced,
    /// Rule 2: no answer is taken for success.
    UnknownIsDone,
    /// Rule 3: what a fenced session says counts.
    FenceIgnored,
    /// Rule 4: a pack that was condemned becomes live again when its writer puts and names it again.
    NameUsedAgain,
    /// Rule 5: a backup may require whatever is not condemned: also what was cleared away.
    NotCondemnedIsEnough,
    /// Rule 5: a backup may continue one that was forgotten, and whatever that one alone required.
    BaseNotLookedFor,
    /// Rule 6: a backup may require what is condemned and still there.
    CondemnedIsRequired,
    /// Rule 6: what is condemned is gone once its removal was asked for, seen or not.
    GoneUnseen,
    /// Rule 7: a collector that lost its slot condemns without having followed the backups that came in between.
    NewRootsNotFollowed,
    /// Rule 7: a collector that lost its slot to another one keeps what it chose before.
    ChoiceOutlivesCondemnation,
    /// Rule 7: of chunks that lie twice, nothing is said about which copy survives.
    SurvivorsUntold,
    /// Rule 8: the log is read first, then the list.
    ListedAfterLog,
    /// Rule 8: what is not live is an orphan, even while its session goes on.
    OpenSessionsOrphaned,
    /// Rule 9: an entry that was created is in the log, whatever was freed.
    FreedSlotCounts,
    /// Rule 9: an empty slot is the head.
    EmptySlotIsHead,
    /// Rule 9: entries are removed before it is told where the checkpoint is.
    TruncatedBeforePublished,
    /// Rule 10: packs are condemned that a repack copied, before the copies are live.
    RepackedBeforeLive,
    /// Readers: what somebody reads may be forgotten.
    InUseForgotten,
    /// Readers: what was forgotten may be had in use.
    ForgottenIsRead,
    /// Readers: what a session has in use is what it said first.
    FirstReadCounts,
    /// Readers: a checkpoint does not say who reads.
    ReadsNotFolded,
    /// Readers: who is gone has in use what it had.
    UseOutlivesSession,
    /// Undeleting: what a backup that is brought back requires may be condemned by then.
    UndeletedUnchecked,
    /// Undeleting: the entry in which a backup was brought back is freed as one that nobody needs.
    UndeletedEntryFreed,
    /// Undeleting: a checkpoint does not say in which entry a backup was brought back.
    UndeletedNotFolded,
    /// Copies: what reading begins with is read once only, whole or not.
    CopyNotRead,
    /// Trust: what takes the maintenance key counts by any key.
    AnyKeyMaintains,
    /// Trust: a backup may require what a writer of another domain put.
    OtherDomainsRequired,
    /// Trust: any key puts into any domain.
    AnyKeyInAnyDomain,
    /// Trust: who required something condemned requires what survives of all domains.
    SurvivorsOfAnyDomain,
}

impl Bug {
    pub const ALL: [Bug; 31] = [
        Bug::NotValidatedAgain,
        Bug::SlotReplaced,
        Bug::UnknownIsDone,
        Bug::FenceIgnored,
        Bug::NameUsedAgain,
        Bug::NotCondemnedIsEnough,
        Bug::BaseNotLookedFor,
        Bug::CondemnedIsRequired,
        Bug::GoneUnseen,
        Bug::NewRootsNotFollowed,
        Bug::ChoiceOutlivesCondemnation,
        Bug::SurvivorsUntold,
        Bug::ListedAfterLog,
        Bug::OpenSessionsOrphaned,
        Bug::FreedSlotCounts,
        Bug::EmptySlotIsHead,
        Bug::TruncatedBeforePublished,
        Bug::RepackedBeforeLive,
        Bug::InUseForgotten,
        Bug::ForgottenIsRead,
        Bug::FirstReadCounts,
        Bug::ReadsNotFolded,
        Bug::UseOutlivesSession,
        Bug::UndeletedUnchecked,
        Bug::UndeletedEntryFreed,
        Bug::UndeletedNotFolded,
        Bug::CopyNotRead,
        Bug::AnyKeyMaintains,
        Bug::OtherDomainsRequired,
        Bug::AnyKeyInAnyDomain,
        Bug::SurvivorsOfAnyDomain,
    ];
}

#[cfg(feature = "planted-bugs")]
mod switch {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// From now on this thread makes that mistake, and no other.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    /// Whether that mistake is to be made here.
    pub fn planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}

#[cfg(not(feature = "planted-bugs"))]
mod switch {
    /// Never: mistakes are for simulations.
    pub const fn planted(_: super::Bug) -> bool {
        false
    }
}

#[cfg(feature = "planted-bugs")]
pub use switch::plant;
pub use switch::planted;

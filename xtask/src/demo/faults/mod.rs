//! The failure table: one scenario a row.
//!
//! A scenario begins with the machine running and mirrored, breaks something, checks what must follow, mends it, and
//! ends with the machine running and mirrored again, so that another one can follow on the same stage.

mod backups;
mod disks;
mod isolation;
mod nodes;
mod peers;
mod resync;

use anyhow::Result;
use clap::ValueEnum;

use super::play::Play;
use super::rack::{Setting, Stage};
use crate::lab::Side;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// The node dies with its VM, silently
    NodeSilent,
    /// The node dies with its VM, connections are reset
    NodeReset,
    /// QEMU is killed, again and again
    QemuKilled,
    /// The daemon is killed under the running VM and comes back
    DaemonKilled,
    /// The daemon is killed and does not come back
    DaemonKilledStaysDead,
    /// The peer is killed
    PeerKilled,
    /// The link to the peer is cut
    PeerLinkCut,
    /// Everything on the peer is stopped (SIGSTOP)
    PeerFrozen,
    /// The link to the peer swallows one direction, then the other
    PeerBlackhole,
    /// The primary is cut off from peer and witness
    PrimaryIsolated,
    /// Everything on the primary is stopped, taken over, then continued
    PrimaryFrozenContinued,
    /// The witness is lost, both nodes up
    WitnessLost,
    /// The witness is lost when the primary is alone already
    WitnessLostSolo,
    /// Witness and peer are lost while mirrored
    WitnessAndPeerLost,
    /// The link flaps every second for a minute
    LinkFlapping,
    /// The secondary's disk is full
    DiskFullSecondary,
    /// The primary's disk is full
    DiskFullPrimary,
    /// The secondary's fsync fails
    FsyncErrorSecondary,
    /// The primary's fsync fails
    FsyncErrorPrimary,
    /// The primary dies while the peer is resynchronising
    PrimaryDiesInResync,
    /// A solo primary is overtaken by force and returns
    ForcedTakeoverDivergence,
    /// Both nodes lose power together
    BothLosePower,
    /// The peer returns when the journal is trimmed
    LongOutageTrimmed,
    /// It is backed up while it runs, and after a kill, a grown disk, a restart and a move; each point is restored
    BackedUp,
    /// Every row
    All,
}

/// A journal that a short outage outruns, and a resync slow enough to be interrupted.
const SMALL_JOURNAL: &[Setting] = &[
    ("replication", "journal_bytes", "4194304"),
    ("replication", "window_bytes", "1048576"),
    ("replication", "resync_limit_bytes_per_s", "4194304"),
];
const SMALL_WINDOW: &[Setting] =
    &[("replication", "journal_bytes", "8388608"), ("replication", "window_bytes", "2097152")];

impl Fault {
    /// Every row of the table, in its order.
    pub fn rows() -> Vec<Fault> {
        Fault::value_variants().iter().copied().filter(|fault| *fault != Fault::All).collect()
    }

    pub fn name(self) -> String {
        self.to_possible_value().expect("no variant is hidden").get_name().to_owned()
    }

    pub fn description(self) -> String {
        let value = self.to_possible_value().expect("no variant is hidden");
        let help = value.get_help().map(ToString::to_string).unwrap_or_default();
        format!("{}: {help}", value.get_name())
    }

    /// What the stage needs for it.
    pub fn stage(self) -> Stage {
        match self {
            Fault::DiskFullPrimary | Fault::FsyncErrorPrimary => {
                Stage { fragile: Some(Side::A), settings: SMALL_WINDOW, ..Stage::default() }
            }
            Fault::DiskFullSecondary | Fault::FsyncErrorSecondary => {
                Stage { fragile: Some(Side::B), settings: SMALL_WINDOW, ..Stage::default() }
            }
            Fault::PrimaryDiesInResync | Fault::LongOutageTrimmed => {
                Stage { settings: SMALL_JOURNAL, ..Stage::default() }
            }
            Fault::BackedUp => Stage { scattered: true, ..Stage::default() },
            _ => Stage::default(),
        }
    }

    /// Whether both copies are equal again at the end, and of the size that they began with. After a loss that an operator
    /// accepted, or on a disk that failed, the stage is used up.
    pub fn ends_with_two_copies(self) -> bool {
        !self.uses_up_the_stage()
    }

    fn uses_up_the_stage(self) -> bool {
        matches!(
            self,
            Fault::ForcedTakeoverDivergence
                | Fault::PrimaryDiesInResync
                | Fault::DiskFullPrimary
                | Fault::DiskFullSecondary
                | Fault::FsyncErrorPrimary
                | Fault::FsyncErrorSecondary
                | Fault::BackedUp
        )
    }

    /// Plays it.
    pub fn perform(self, play: &mut Play) -> Result<()> {
        match self {
            Fault::NodeSilent => nodes::node_silent(play),
            Fault::NodeReset => nodes::node_reset(play),
            Fault::QemuKilled => nodes::qemu_killed(play),
            Fault::DaemonKilled => nodes::daemon_killed(play),
            Fault::DaemonKilledStaysDead => nodes::daemon_killed_stays_dead(play),
            Fault::BothLosePower => nodes::both_lose_power(play),
            Fault::PeerKilled => peers::peer_killed(play),
            Fault::PeerLinkCut => peers::peer_link_cut(play),
            Fault::PeerFrozen => peers::peer_frozen(play),
            Fault::PeerBlackhole => peers::peer_blackhole(play),
            Fault::LinkFlapping => peers::link_flapping(play),
            Fault::PrimaryIsolated => isolation::primary_isolated(play),
            Fault::PrimaryFrozenContinued => isolation::primary_frozen_continued(play),
            Fault::WitnessLost => isolation::witness_lost(play),
            Fault::WitnessLostSolo => isolation::witness_lost_solo(play),
            Fault::WitnessAndPeerLost => isolation::witness_and_peer_lost(play),
            Fault::DiskFullSecondary => disks::secondary(play, disks::Failure::Full),
            Fault::DiskFullPrimary => disks::primary(play, disks::Failure::Full),
            Fault::FsyncErrorSecondary => disks::secondary(play, disks::Failure::Fsync),
            Fault::FsyncErrorPrimary => disks::primary(play, disks::Failure::Fsync),
            Fault::PrimaryDiesInResync => resync::primary_dies_in_resync(play),
            Fault::ForcedTakeoverDivergence => resync::forced_takeover_divergence(play),
            Fault::LongOutageTrimmed => resync::long_outage_trimmed(play),
            Fault::BackedUp => backups::backed_up(play),
            Fault::All => unreachable!("`all` is replaced by the rows before anything is played"),
        }
    }
}

/// Groups faults that can follow each other on one stage, in the order given.
pub fn on_one_stage(faults: &[Fault]) -> Vec<Vec<Fault>> {
    let mut groups: Vec<Vec<Fault>> = Vec::new();
    for fault in faults {
        let fits = |group: &&mut Vec<Fault>| {
            group.iter().all(|other| other.stage() == fault.stage() && !other.uses_up_the_stage())
        };
        // Those that use it up come last on a stage that others can use first.
        match groups.iter_mut().find(fits) {
            Some(group) => group.push(*fault),
            None => groups.push(vec![*fault]),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_played_once_and_on_a_stage_that_fits() {
        let groups = on_one_stage(&Fault::rows());
        let mut played: Vec<_> = groups.concat().into_iter().map(Fault::name).collect();
        played.sort();
        let mut rows: Vec<_> = Fault::rows().into_iter().map(Fault::name).collect();
        rows.sort();
        assert_eq!(played, rows);
        for group in groups {
            assert!(group.iter().all(|fault| fault.stage() == group[0].stage()));
            let used_up = group.iter().position(|fault| fault.uses_up_the_stage());
            assert!(used_up.is_none_or(|at| at + 1 == group.len()), "{group:?}");
        }
    }

    #[test]
    fn every_row_is_explained_to_operators() {
        let page = std::fs::read_to_string(crate::workspace::root().join("docs/failures.md")).unwrap();
        for row in Fault::rows() {
            assert!(page.contains(&format!("`{}`", row.name())), "docs/failures.md lacks `{}`", row.name());
        }
    }
}

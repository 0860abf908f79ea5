//! Who this replica is, and its times.

use rempart_types::{GroupId, NodeId, NodeSet, RegisterId};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::time::Duration;

/// One replica's place in its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub me: NodeId,
    pub group: GroupId,
    /// The other nodes that hold, or are to hold, a replica. Grows and shrinks by `Command::AddPeer` and
    /// `Command::RemovePeer`; the caller remembers it across restarts.
    pub peers: NodeSet,
    /// The register to use while none is recorded in the store. A group is created in it by `Command::Lead`.
    pub register: RegisterId,
    pub timing: Timing,
    /// Where this life's nonces start: a fresh random number at every start.
    pub nonce_seed: u128,
}

/// Only what differs between the members of one exploration is worth hashing.
impl Hash for Config {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.me.hash(state);
        self.peers.hash(state);
        self.nonce_seed.hash(state);
    }
}

/// The times of one group. Every node of a group uses the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Timing {
    /// Primary to each connected peer.
    pub beacon_interval: Duration,
    /// A member whose newest answered beacon was sent longer ago leaves the in-sync set.
    pub peer_deadline: Duration,
    /// A follower that hears no beacon that long starts a takeover.
    pub suspect_after: Duration,
    /// L: counted from sending the beacon that was acknowledged.
    pub lease: Duration,
    /// W: what the guard needs to stop the vCPUs.
    pub guard_stop: Duration,
    /// ρ: bound on the drift between two machines' clocks, in parts per million.
    pub clock_drift_ppm: u32,
    /// ε: granularity of clocks and timers.
    pub clock_grain: Duration,
    /// Per request to the register. The register's adapter answers within it; a little later this crate goes on
    /// as if the outcome were unknown.
    pub register_deadline: Duration,
    /// Pause between two tries to reach the register; doubles up to `register_retry_most`.
    pub register_retry: Duration,
    pub register_retry_most: Duration,
    /// A replica with nothing to change looks at its register that often, only to report that it is out of reach,
    /// to learn of a forced takeover, and to tell a register that lost its state what it knows. Zero: never.
    pub register_check: Duration,
    /// A primary that restarts while its register is out of reach tries that long before it goes on without. Short
    /// enough that the machine's lease, given by an earlier life, has not ended by then.
    pub register_patience: Duration,
    /// A peer that left the in-sync set comes back no sooner than this after it left; doubles each time it
    /// leaves again, up to `readmit_most`, and starts anew once it stayed for `readmit_forget`.
    pub readmit_after: Duration,
    pub readmit_most: Duration,
    pub readmit_forget: Duration,
    /// A planned handover that has not reached the register by then is given up and the machine runs on here.
    pub handover_deadline: Duration,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            beacon_interval: Duration::from_millis(250),
            peer_deadline: Duration::from_millis(1500),
            suspect_after: Duration::from_secs(2),
            lease: Duration::from_secs(3),
            guard_stop: Duration::from_secs(1),
            clock_drift_ppm: 5_000,
            clock_grain: Duration::from_millis(50),
            register_deadline: Duration::from_secs(1),
            register_retry: Duration::from_millis(200),
            register_retry_most: Duration::from_secs(2),
            register_check: Duration::from_secs(10),
            register_patience: Duration::from_millis(1500),
            readmit_after: Duration::from_secs(1),
            readmit_most: Duration::from_secs(60),
            readmit_forget: Duration::from_secs(120),
            handover_deadline: Duration::from_secs(120),
        }
    }
}

/// Times that cannot keep the promises together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TimingError {
    Zero {
        field: &'static str,
    },
    DriftTooLarge,
    /// Fewer than three beacons fit into the peer deadline: one lost packet would degrade the group.
    BeaconTooSlow,
    /// The primary must give up on a silent peer before that peer gives up on it, or each cut link fails over.
    SuspectsTooEarly,
    /// Degrading (deadline, one beacon, one register request) must end before the lease does, or each cut link
    /// pauses the machine, and well before a takeover could end.
    DegradeOutlastsLease,
    /// A limit that is below its start: `register_retry_most`, `readmit_most`.
    LimitBelowStart {
        field: &'static str,
    },
}

impl fmt::Display for TimingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TimingError::Zero { field } => write!(f, "`{field}` must not be zero"),
            TimingError::DriftTooLarge => f.write_str("`clock_drift` must be below 10 %"),
            TimingError::BeaconTooSlow => {
                f.write_str("`beacon_interval` must fit three times into `peer_deadline`")
            }
            TimingError::SuspectsTooEarly => {
                f.write_str("`suspect_after` must exceed `peer_deadline` by a beacon interval")
            }
            TimingError::DegradeOutlastsLease => f.write_str(
                "`peer_deadline` + `beacon_interval` + `register_deadline` must not exceed `lease`",
            ),
            TimingError::LimitBelowStart { field } => {
                write!(f, "`{field}` must not be below what it limits")
            }
        }
    }
}

impl std::error::Error for TimingError {}

impl Timing {
    /// G: how long a takeover waits before the machine may start, so that the old primary's guard has stopped it.
    /// (L + W)(1 + ρ)/(1 − ρ) + ε.
    pub fn takeover_wait(&self) -> Duration {
        let ppm = u128::from(self.clock_drift_ppm);
        let nanos = (self.lease + self.guard_stop).as_nanos();
        let stretched = (nanos * (1_000_000 + ppm)).div_ceil(1_000_000 - ppm);
        Duration::from_nanos(u64::try_from(stretched).unwrap_or(u64::MAX)) + self.clock_grain
    }

    /// Refuses times that break a promise or make every hiccup an outage.
    pub fn validate(&self) -> Result<(), TimingError> {
        for (field, value) in [
            ("beacon_interval", self.beacon_interval),
            ("peer_deadline", self.peer_deadline),
            ("suspect_after", self.suspect_after),
            ("lease", self.lease),
            ("guard_stop", self.guard_stop),
            ("register_deadline", self.register_deadline),
            ("register_retry", self.register_retry),
            ("handover_deadline", self.handover_deadline),
        ] {
            if value.is_zero() {
                return Err(TimingError::Zero { field });
            }
        }
        if self.clock_drift_ppm >= 100_000 {
            return Err(TimingError::DriftTooLarge);
        }
        if self.beacon_interval * 3 > self.peer_deadline {
            return Err(TimingError::BeaconTooSlow);
        }
        if self.peer_deadline + self.beacon_interval > self.suspect_after {
            return Err(TimingError::SuspectsTooEarly);
        }
        if self.peer_deadline + self.beacon_interval + self.register_deadline > self.lease {
            return Err(TimingError::DegradeOutlastsLease);
        }
        if self.register_retry_most < self.register_retry {
            return Err(TimingError::LimitBelowStart { field: "register_retry_most" });
        }
        if self.readmit_most < self.readmit_after {
            return Err(TimingError::LimitBelowStart { field: "readmit_most" });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_times_keep_the_promises() {
        let timing = Timing::default();
        assert_eq!(timing.validate(), Ok(()));
        let wait = timing.takeover_wait();
        assert!(wait > Duration::from_millis(4_080) && wait < Duration::from_millis(4_100), "{wait:?}");
    }

    #[test]
    fn times_that_break_a_promise_are_refused() {
        let with = |change: fn(&mut Timing)| {
            let mut timing = Timing::default();
            change(&mut timing);
            timing.validate()
        };
        assert_eq!(
            with(|t| t.register_deadline = Duration::from_secs(2)),
            Err(TimingError::DegradeOutlastsLease)
        );
        assert_eq!(with(|t| t.suspect_after = t.peer_deadline), Err(TimingError::SuspectsTooEarly));
        assert_eq!(with(|t| t.beacon_interval = Duration::from_secs(1)), Err(TimingError::BeaconTooSlow));
        assert_eq!(with(|t| t.clock_drift_ppm = 100_000), Err(TimingError::DriftTooLarge));
        assert_eq!(with(|t| t.guard_stop = Duration::ZERO), Err(TimingError::Zero { field: "guard_stop" }));
    }
}

//! A virtual machine's process, the guard beside it, and its connection to the daemon.

use crate::guest::Workload;
use crate::history::Life;
use crate::pattern::Tag;
use rempart_types::MonotonicTime;
use std::collections::BTreeSet;

/// One process of the machine on one node, from its launch to its end.
#[derive(Debug)]
pub struct Machine {
    /// Unlike any other process of the run: the nonce that a real guest would answer with.
    pub nonce: u64,
    /// It has booted: its vCPUs run unless something below says no.
    pub booted: bool,
    /// The daemon ordered its vCPUs to stop.
    pub paused: bool,
    /// Its guard stopped the vCPUs, for good: the process will be ended.
    pub stopped_by_guard: bool,
    pub guard: Guard,
    pub connection: Connection,
    /// Its place in the history, from its first connection on.
    pub life: Option<Life>,
    pub workload: Workload,
    /// Its next burst of requests is planned.
    pub burst_planned: bool,
}

/// The small process that owns the lease.
#[derive(Debug, Default)]
pub struct Guard {
    /// On its node's clock; without one the vCPUs do not start.
    pub lease_until: Option<MonotonicTime>,
    /// Stopped by a signal until continued.
    pub frozen: bool,
    /// The number of the timer that counts; older ones are stale.
    pub timer: u64,
}

/// The machine's side of the block device connection.
#[derive(Debug, Default)]
pub struct Connection {
    pub open: bool,
    /// Requests handed to the daemon over this connection and not answered.
    pub sent: BTreeSet<Tag>,
}

impl Machine {
    pub fn new(nonce: u64, workload: Workload) -> Machine {
        Machine {
            nonce,
            booted: false,
            paused: false,
            stopped_by_guard: false,
            guard: Guard::default(),
            connection: Connection::default(),
            life: None,
            workload,
            burst_planned: false,
        }
    }

    /// Its vCPUs execute instructions, as far as the machine and its guard decide.
    pub fn runs(&self) -> bool {
        self.booted && !self.paused && !self.stopped_by_guard && self.guard.lease_until.is_some()
    }
}

//! What kind of world a seed draws: sizes, limits, habits. Times are the defaults that ship, because the promises
//! are made for them.

use crate::guest::Workload;
use crate::rng::Rng;
use rempart_cluster::Timing;
use rempart_types::{EXTENT_SIZE, GroupId, RegisterId, SECTOR_SIZE};
use std::ops::Range;
use std::time::Duration;

/// One world's make.
#[derive(Debug, Clone)]
pub struct Setup {
    pub nodes: usize,
    pub group: GroupId,
    pub register: RegisterId,
    /// Bytes of each disk.
    pub disks: Vec<u64>,
    pub segment_size: u64,
    pub segments: u64,
    pub timing: Timing,
    pub replication: rempart_replication::Config,
    pub limits: rempart_store::Limits,
    pub disk_latency: Range<Duration>,
    /// Nanoseconds a second that each node's clock gains.
    pub drift_ppb: Vec<i64>,
    /// How long faults are played.
    pub fault_phase: Duration,
    /// The workload; drawn anew at each start of the machine if `None`.
    pub workload: Option<Workload>,
}

impl Setup {
    /// A world without surprises, for scenarios.
    pub fn plain() -> Setup {
        Setup {
            nodes: 2,
            group: GroupId(0x6),
            register: RegisterId(0x1),
            disks: vec![6 * EXTENT_SIZE, 4 * EXTENT_SIZE + 9 * SECTOR_SIZE],
            segment_size: 256 * 1024,
            segments: 3,
            timing: Timing::default(),
            replication: rempart_replication::Config::default(),
            limits: rempart_store::Limits::immediate(),
            disk_latency: Duration::from_micros(20)..Duration::from_micros(200),
            drift_ppb: vec![0, 0],
            fault_phase: Duration::from_secs(30),
            workload: None,
        }
    }

    pub fn draw(rng: &mut Rng) -> Setup {
        let mut setup = Setup::plain();
        let disks = 1 + rng.index(2);
        setup.disks = (0..disks)
            .map(|_| EXTENT_SIZE * rng.between(1..5) + SECTOR_SIZE * *rng.pick(&[0, 0, 1, 17, 127]))
            .collect();
        setup.segment_size = *rng.pick(&[128, 128, 256]) * 1024;
        setup.segments = rng.between(2..4);
        let limits = &mut setup.limits;
        limits.window = *rng.pick(&[64, 256, 1024]) * 1024;
        limits.sync_delay = *rng.pick(&[Duration::from_millis(10), Duration::from_millis(300)]);
        limits.apply_delay = *rng.pick(&[Duration::ZERO, Duration::from_millis(250)]);
        limits.apply_round = *rng.pick(&[16, 64, 256]) * 1024;
        limits.checkpoint_every = *rng.pick(&[64, 256, 1024]) * 1024;
        limits.checkpoint_delay = *rng.pick(&[Duration::from_millis(50), Duration::from_secs(3)]);
        limits.retention = *rng.pick(&[0, 0, 256 * 1024, 4096 * 1024]);
        limits.pin_bound = *rng.pick(&[256, 1024]) * 1024;
        let replication = &mut setup.replication;
        replication.peer_window_bytes = *rng.pick(&[32, 256, 16 << 10]) * 1024;
        replication.log_read_bytes = *rng.pick(&[16, 64, 1024]) * 1024;
        replication.extent_read_bytes = *rng.pick(&[64, 256]) * 1024;
        replication.resync_checkpoint_bytes = *rng.pick(&[64, 256, 1024]) * 1024;
        replication.resync_regions_ahead = 1 + rng.index(4);
        replication.resync_window_bytes = *rng.pick(&[64, 256, 8 << 10]) * 1024;
        replication.resync_bytes_per_second = *rng.pick(&[None, None, Some(1 << 20)]);
        let slowest = *rng.pick(&[200, 200, 1_000, 5_000]);
        setup.disk_latency = Duration::from_micros(10)..Duration::from_micros(slowest);
        // Both clocks inside the promised bound of half a percent between them.
        setup.drift_ppb = (0..setup.nodes).map(|_| rng.below(5_000_001) as i64 - 2_500_000).collect();
        setup.fault_phase = Duration::from_secs(rng.between(4..20));
        setup
    }

    pub fn workload(&self, rng: &mut Rng) -> Workload {
        let sectors = self.disks.iter().map(|size| size / SECTOR_SIZE).collect();
        self.workload.clone().unwrap_or_else(|| Workload::draw(rng, sectors))
    }
}

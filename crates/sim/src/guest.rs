//! What the simulated machine does with its disks.

use crate::history::{Request, Span};
use crate::rng::Rng;
use rempart_types::{DiskIndex, EXTENT_SIZE, SECTOR_SIZE};
use std::time::Duration;

/// One seed's habits: which requests, how large, how many at once, how often.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Write, FUA write, zero, discard, read, flush.
    weights: [u32; 6],
    /// Requests in flight at most.
    pub depth: usize,
    /// Pause between bursts, at most.
    pause: Duration,
    burst: u64,
    largest_sectors: u64,
    /// Where most requests go: overlaps are what breaks things.
    hot_sectors: u64,
    hot_per_mille: u32,
    disks: Vec<u64>,
}

impl Workload {
    /// `disks`: sectors of each.
    pub fn draw(rng: &mut Rng, disks: Vec<u64>) -> Workload {
        let mut weight = |most: u64| if rng.chance(150) { 0 } else { rng.below(most) as u32 + 1 };
        let weights = [1 + weight(100), weight(20), weight(15), weight(15), weight(60), weight(30)];
        Workload {
            weights,
            depth: *rng.pick(&[1, 2, 4, 8, 16]),
            pause: Duration::from_millis(*rng.pick(&[100, 400, 1000, 2000])),
            burst: *rng.pick(&[1, 2, 6, 12]),
            largest_sectors: *rng.pick(&[1, 1, 4, 8, 16, 48, 136]),
            hot_sectors: *rng.pick(&[4, 16, 64, 256]),
            hot_per_mille: *rng.pick(&[0, 500, 900, 1000]),
            disks,
        }
    }

    /// The even stream of all kinds of requests that scenarios use.
    pub fn steady(disks: Vec<u64>) -> Workload {
        Workload {
            weights: [60, 10, 4, 4, 40, 20],
            depth: 8,
            pause: Duration::from_millis(20),
            burst: 3,
            largest_sectors: 16,
            hot_sectors: 64,
            hot_per_mille: 500,
            disks,
        }
    }

    /// How long until the next burst.
    pub fn pause(&self, rng: &mut Rng) -> Duration {
        rng.duration(Duration::from_micros(10)..self.pause)
    }

    pub fn burst(&self, rng: &mut Rng) -> u64 {
        1 + rng.below(self.burst)
    }

    pub fn request(&self, rng: &mut Rng) -> Request {
        let kind = rng.weighted(&self.weights).expect("writes always weigh something");
        if kind == 5 {
            return Request::Flush;
        }
        let disk = rng.index(self.disks.len());
        let all = self.disks[disk];
        let span = if (2..=3).contains(&kind) && rng.chance(300) {
            // Discards come in whole extents, often.
            let extents = all * SECTOR_SIZE / EXTENT_SIZE;
            let per = EXTENT_SIZE / SECTOR_SIZE;
            let first = rng.below(extents) * per;
            Span { disk: DiskIndex(disk as u16), sectors: first..(first + per).min(all) }
        } else {
            let reach = if rng.chance(self.hot_per_mille) { self.hot_sectors.min(all) } else { all };
            let first = rng.below(reach);
            let count = 1 + rng.below(self.largest_sectors.min(all - first));
            Span { disk: DiskIndex(disk as u16), sectors: first..first + count }
        };
        match kind {
            0 => Request::Write { span, fua: false },
            1 => Request::Write { span, fua: true },
            2 => Request::Zero { span, discard: false },
            3 => Request::Zero { span, discard: true },
            _ => Request::Read { span },
        }
    }
}

//! Many seeds, and what came of them.

use crate::world::World;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a campaign must meet: one that does not says little.
const MUST_MEET: [&str; 25] = [
    "a commit found packs that are not live",
    "a reader was ended by force",
    "a use was taken away",
    "base forgotten: everything looked up",
    "brought back",
    "brought back from condemned packs",
    "chunks put again: their pack is not live any more",
    "committed",
    "committed incrementally",
    "condemned after a repack",
    "condemned after a repack in an agent's domain",
    "condemned, followed",
    "condemned, not followed",
    "crashed",
    "crashed, a reader",
    "damaged",
    "fenced: starts over",
    "forgotten before it was in use",
    "in use: not forgotten",
    "landed late",
    "not brought back: a pack is gone",
    "not brought back: condemned meanwhile",
    "read",
    "read again: packs were condemned meanwhile",
    "truncated",
];

/// What came of a campaign.
#[derive(Debug, Default)]
pub struct Report {
    pub seeds: u64,
    /// The lowest failing seed met, and what broke.
    pub failure: Option<(u64, String)>,
    pub met: BTreeMap<&'static str, u64>,
    pub elapsed: Duration,
}

impl Report {
    /// What must be met, and was met less than so many times.
    pub fn too_seldom(&self, least: u64) -> Vec<(&'static str, u64)> {
        let met = |what| self.met.get(what).copied().unwrap_or(0);
        MUST_MEET.into_iter().map(|what| (what, met(what))).filter(|(_, times)| *times < least).collect()
    }
}

/// Runs `seeds`, until one fails.
pub fn campaign(seeds: Range<u64>, threads: usize) -> Report {
    let begin = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let failed = AtomicBool::new(false);
    let worker = || {
        let mut report = Report::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end || failed.load(Ordering::Relaxed) {
                return report;
            }
            let mut world = World::new(seed, false);
            let result = world.run();
            report.seeds += 1;
            for (what, times) in world.met() {
                *report.met.entry(what).or_insert(0) += times;
            }
            if let Err(broken) = result {
                failed.store(true, Ordering::Relaxed);
                report.failure = Some((seed, broken));
            }
        }
    };
    let mut total = Report::default();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            let report = worker.join().expect("panics of worlds are caught");
            total.seeds += report.seeds;
            for (what, times) in report.met {
                *total.met.entry(what).or_insert(0) += times;
            }
            let failures = [total.failure.take(), report.failure];
            total.failure = failures.into_iter().flatten().min();
        }
    });
    total.elapsed = begin.elapsed();
    total
}

/// The first of `seeds` whose world keeps its promises without a mistake and breaks one with it.
#[cfg(feature = "planted-bugs")]
pub fn hunt(bug: rempart_repository::Bug, seeds: Range<u64>) -> Option<(u64, String)> {
    use rempart_repository::plant;
    for seed in seeds {
        plant(Some(bug));
        let result = World::new(seed, false).run();
        plant(None);
        if let Err(broken) = result
            && World::new(seed, false).run().is_ok()
        {
            return Some((seed, broken));
        }
    }
    None
}

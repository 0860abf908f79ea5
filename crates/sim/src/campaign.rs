//! Many seeds, and what came of them.

use crate::coverage::Coverage;
use crate::faults::Planted;
use crate::reached;
use crate::trace::Verbosity;
use crate::violation::{Promise, Violation};
use crate::world::{Options, World};
use std::cell::RefCell;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How a campaign is run.
#[derive(Debug, Clone)]
pub struct CampaignOptions {
    pub threads: usize,
    /// Ends at the first failing seeds, after so many.
    pub failures: usize,
    pub planted: Option<Planted>,
    /// Stop early after so long.
    pub time: Option<Duration>,
}

impl Default for CampaignOptions {
    fn default() -> CampaignOptions {
        CampaignOptions { threads: 1, failures: 1, planted: None, time: None }
    }
}

/// What came of a campaign.
#[derive(Debug, Default)]
pub struct Report {
    pub seeds: u64,
    pub coverage: Coverage,
    /// Failing seeds, lowest first.
    pub failures: Vec<(u64, Violation)>,
    pub elapsed: Duration,
    /// Events handled.
    pub steps: u64,
    /// Time simulated.
    pub simulated: Duration,
}

thread_local! {
    /// What the last panic on this thread said, and where.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
    /// Panics are caught and told as violations here.
    static CATCHING: RefCell<bool> = const { RefCell::new(false) };
}

fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CATCHING.with_borrow(|catching| *catching) {
                return usual(info);
            }
            PANIC.set(Some(info.to_string()));
        }));
    });
}

/// Runs `story` on `stage`; a panic of a core is a broken promise like any other.
pub fn run_caught<T>(
    stage: &mut T,
    story: impl FnOnce(&mut T) -> Result<(), Violation>,
) -> Result<(), Violation> {
    install_hook();
    CATCHING.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(|| story(stage)));
    CATCHING.set(false);
    result.unwrap_or_else(|_| {
        let text = PANIC.take().unwrap_or_default();
        Err(Violation::new(Promise::CoreAssertion, text))
    })
}

/// One seed, from the beginning to the end.
pub fn run_seed(seed: u64, options: Options) -> (World, Result<(), Violation>) {
    install_hook();
    CATCHING.set(true);
    let world = panic::catch_unwind(|| World::new(seed, options.clone()));
    CATCHING.set(false);
    match world {
        Ok(mut world) => {
            let result = run_caught(&mut world, World::run);
            (world, result)
        }
        Err(_) => panic!("seed {seed} cannot even begin: {}", PANIC.take().unwrap_or_default()),
    }
}

/// Runs all `seeds`, or as many as it takes to fail.
pub fn campaign(seeds: Range<u64>, options: &CampaignOptions) -> Report {
    let begin = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let failed = AtomicU64::new(0);
    let worker = || {
        let mut report = Report::default();
        reached::declare(&mut report.coverage);
        loop {
            let enough = failed.load(Ordering::Relaxed) >= options.failures as u64
                || options.time.is_some_and(|time| begin.elapsed() > time);
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if enough || seed >= seeds.end {
                return report;
            }
            let run = Options { verbosity: Verbosity::Silent, planted: options.planted };
            let (world, result) = run_seed(seed, run);
            report.seeds += 1;
            report.steps += world.steps();
            report.simulated += world.now().since(crate::agenda::Moment::START);
            report.coverage.merge(world.coverage());
            if let Err(violation) = result {
                failed.fetch_add(1, Ordering::Relaxed);
                report.failures.push((seed, violation));
            }
        }
    };
    let mut total = Report::default();
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..options.threads.max(1)).map(|_| scope.spawn(worker)).collect();
        for handle in handles {
            let report = handle.join().expect("a worker catches the panics of its worlds");
            total.seeds += report.seeds;
            total.steps += report.steps;
            total.simulated += report.simulated;
            total.coverage.merge(&report.coverage);
            total.failures.extend(report.failures);
        }
    });
    total.failures.sort_by_key(|&(seed, _)| seed);
    total.elapsed = begin.elapsed();
    total
}

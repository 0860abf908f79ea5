//! `cargo xtask bench mirror`: our mirror against QEMU's, the same loads, in one run.
//!
//! All servers speak NBD on a unix socket to the same client, and send to their second copies over the same link. Loads
//! are interleaved, so that a machine that slows down slows everybody; what counts are ratios of medians.

mod backed_up;
pub(super) mod disk;
mod load;
mod ours;
mod peers;
mod server;

use std::path::PathBuf;

use anyhow::Result;

use super::program;
use super::report::{Against, Report, median};
use crate::interrupt;
use crate::lab::Lab;
use crate::setup;

pub use backed_up::run as backed_up;

use load::{Load, Measured};
use ours::Ours;
use peers::Peers;
use server::Server;

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    #[command(flatten)]
    run: Run,
    /// Only loads whose name contains this; `idle` and `resynchronisation` are names, too
    #[arg(long)]
    only: Option<String>,
}

#[derive(Debug, Clone, clap::Args)]
pub struct Run {
    /// One JSON object a line: figure, unit, ours, peer, theirs, ratio
    #[arg(long)]
    pub json: bool,
    /// Rounds; each figure is the median over them
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Seconds a load runs at least
    #[arg(long, default_value_t = 5)]
    pub seconds: u64,
    /// Measure this build of the program instead of building it
    #[arg(long)]
    pub program: Option<PathBuf>,
}

/// Megabits per second of the line that a resynchronisation has to fill.
const LINE: u64 = 1000;

/// Everything one server did in all rounds, by load.
#[derive(Debug)]
struct Contestant {
    server: Server,
    measured: Vec<Vec<Measured>>,
}

pub fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    let ours = Ours::start(Lab::build(false)?, &program(options.run.program.as_deref())?)?;
    let peers = Peers::start(ours.lab())?;
    let wanted = |name: &str| options.only.as_ref().is_none_or(|only| name.contains(only));
    let loads: Vec<Load> = Load::ALL.into_iter().filter(|load| wanted(load.name)).collect();
    let servers = [ours.two_copies(), peers.quorum(), ours.one_copy(), peers.single()];
    let mut contestants =
        servers.map(|server| Contestant { server, measured: vec![Vec::new(); loads.len()] });
    if !loads.is_empty() {
        contestants.iter().try_for_each(|contestant| Load::warm_up(&contestant.server))?;
    }
    let scratch = ours.lab().folder().join("disk-alone");
    let mut disk_alone = Vec::new();
    if loads.contains(&Load::SEQUENTIAL) {
        disk::preallocate(&scratch, disk::BYTES)?;
    }
    for round in 1..=options.run.rounds {
        for (index, load) in loads.iter().enumerate() {
            // In turns: a machine that grows slower within a round is not always slower for the same one.
            let mut order: Vec<&mut Contestant> = contestants.iter_mut().collect();
            if round.is_multiple_of(2) {
                order.reverse();
            }
            for contestant in order {
                interrupt::check()?;
                contestant.measured[index].push(load.run(&contestant.server, options.run.seconds)?);
            }
            if *load == Load::SEQUENTIAL {
                disk_alone.push(disk::sequential_writes(&scratch, options.run.seconds)?);
            }
            ours.must_be_mirrored()?;
            eprintln!("round {round} of {}: {}", options.run.rounds, load.name);
        }
    }
    let mut report = Report { json: options.run.json };
    let [two_copies, quorum, one_copy, single] = &contestants;
    loads_of(&mut report, &loads, two_copies, quorum);
    loads_of(&mut report, &loads, one_copy, single);
    if let Some(index) = loads.iter().position(|load| *load == Load::SEQUENTIAL) {
        let disk = ("the disk alone", median(disk_alone));
        // Each copy writes to its log and to its image.
        let written = 4.0 * median(two_copies.column(index, |measured| measured.per_second));
        let figure = "rempart, two copies, what sequential writes put on the disk";
        report.figure(figure, "MiB/s", written, Some(Against::once(written, disk)));
    }
    drop(peers);
    if wanted("idle") {
        let idle = ours.idle()?;
        let mib = idle.memory_per_group as f64 / f64::from(1 << 20);
        report.figure("memory of an idle group", "MiB", mib, None);
        report.figure("processor of both idle nodes", "s/s", idle.processor_share, None);
    }
    if wanted("resynchronisation") {
        let resync = ours.resync(LINE)?;
        let line = ("the line", resync.line_bytes_per_second / 1e6);
        let rate = resync.bytes_per_second / 1e6;
        report.figure("resynchronisation", "MB/s", rate, Some(Against::once(rate, line)));
    }
    Ok(())
}

impl Contestant {
    /// One value a round.
    fn column(&self, load: usize, pick: impl Fn(&Measured) -> f64) -> Vec<f64> {
        self.measured[load].iter().map(pick).collect()
    }
}

/// A figure of a load: name, unit, what to take.
type Column = (&'static str, &'static str, fn(&Measured) -> f64);

const COLUMNS: &[Column] = &[
    ("rate", "1/s", |measured| measured.per_second),
    ("p50", "us", |measured| measured.p50_us),
    ("p99", "us", |measured| measured.p99_us),
    ("processor", "s/GiB", |measured| measured.processor_s_per_gib),
];

fn loads_of(report: &mut Report, loads: &[Load], ours: &Contestant, theirs: &Contestant) {
    for (index, load) in loads.iter().enumerate() {
        for (column, unit, pick) in COLUMNS {
            let figure = format!("{}, {} {column}", ours.server.name, load.name);
            let ours = ours.column(index, pick);
            let against = Against::in_rounds(theirs.server.name, &ours, theirs.column(index, pick));
            report.figure(&figure, unit, median(ours), Some(against));
        }
    }
}

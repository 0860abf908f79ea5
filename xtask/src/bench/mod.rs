//! `cargo xtask bench mirror`: our mirror against QEMU's, the same loads, in one run.
//!
//! All servers speak NBD on a unix socket to the same client, and send to their second copies over the same link. Loads
//! are interleaved, so that a machine that slows down slows everybody; what counts are ratios of medians.

mod client;
mod disk;
mod load;
mod ours;
mod peers;
mod server;

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use crate::interrupt;
use crate::lab::Lab;
use crate::setup;
use crate::workspace::{self, Profile};

use load::{Load, Measured};
use ours::Ours;
use peers::Peers;
use server::Server;

#[derive(Debug, clap::Subcommand)]
pub enum Bench {
    /// Synchronous mirror and single copy, against QEMU's
    Mirror(Options),
}

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// One JSON object a line: figure, unit, ours, peer, theirs, ratio
    #[arg(long)]
    json: bool,
    /// Rounds; each figure is the median over them
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds a load runs at least
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Only loads whose name contains this; `idle` and `resynchronisation` are names, too
    #[arg(long)]
    only: Option<String>,
    /// Measure this build of the program instead of building it
    #[arg(long)]
    program: Option<PathBuf>,
}

/// Megabits per second of the line that a resynchronisation has to fill.
const LINE: u64 = 1000;

/// Everything one server did in all rounds, by load.
#[derive(Debug)]
struct Contestant {
    server: Server,
    measured: Vec<Vec<Measured>>,
}

pub fn run(bench: &Bench) -> Result<()> {
    let Bench::Mirror(options) = bench;
    setup::ensure()?;
    let program = match &options.program {
        Some(program) => std::path::absolute(program)?,
        None => workspace::build_rempart(Profile::Release)?,
    };
    let ours = Ours::start(Lab::build(false)?, &program)?;
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
        disk::preallocate(&scratch)?;
    }
    for round in 1..=options.rounds {
        for (index, load) in loads.iter().enumerate() {
            for contestant in &mut contestants {
                interrupt::check()?;
                contestant.measured[index].push(load.run(&contestant.server, options.seconds)?);
            }
            if *load == Load::SEQUENTIAL {
                disk_alone.push(disk::sequential_writes(&scratch, options.seconds)?);
            }
            ours.must_be_mirrored()?;
            eprintln!("round {round} of {}: {}", options.rounds, load.name);
        }
    }
    let mut report = Report { json: options.json };
    let [two_copies, quorum, one_copy, single] = &contestants;
    report.loads(&loads, two_copies, quorum);
    report.loads(&loads, one_copy, single);
    if let Some(index) = loads.iter().position(|load| *load == Load::SEQUENTIAL) {
        let disk = ("the disk alone", median(disk_alone));
        // Each copy writes to its log and to its image.
        let written = 4.0 * two_copies.median(index, |measured| measured.per_second);
        report.figure(
            "rempart, two copies, what sequential writes put on the disk",
            "MiB/s",
            written,
            Some(disk),
        );
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
        report.figure("resynchronisation", "MB/s", resync.bytes_per_second / 1e6, Some(line));
    }
    Ok(())
}

impl Contestant {
    fn median(&self, load: usize, pick: impl Fn(&Measured) -> f64) -> f64 {
        median(self.measured[load].iter().map(pick).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A figure of a load: name, unit, what to take.
type Column = (&'static str, &'static str, fn(&Measured) -> f64);

const COLUMNS: &[Column] = &[
    ("rate", "1/s", |measured| measured.per_second),
    ("p50", "us", |measured| measured.p50_us),
    ("p99", "us", |measured| measured.p99_us),
    ("processor", "s/GiB", |measured| measured.processor_s_per_gib),
];

/// One line a figure.
#[derive(Debug)]
struct Report {
    json: bool,
}

impl Report {
    fn loads(&mut self, loads: &[Load], ours: &Contestant, theirs: &Contestant) {
        for (index, load) in loads.iter().enumerate() {
            for (column, unit, pick) in COLUMNS {
                let figure = format!("{}, {} {column}", ours.server.name, load.name);
                let theirs = (theirs.server.name, theirs.median(index, pick));
                self.figure(&figure, unit, ours.median(index, pick), Some(theirs));
            }
        }
    }

    fn figure(&mut self, figure: &str, unit: &str, ours: f64, theirs: Option<(&str, f64)>) {
        let ratio = theirs.map(|(_, theirs)| ours / theirs);
        if self.json {
            let (peer, theirs) = theirs.unzip();
            let line = json!({
                "figure": figure, "unit": unit, "ours": rounded(ours),
                "peer": peer, "theirs": theirs.map(rounded), "ratio": ratio.map(rounded),
            });
            println!("{line}");
            return;
        }
        let compared = theirs.zip(ratio).map_or(String::new(), |((peer, theirs), ratio)| {
            format!("{peer:20} {theirs:>10.2}  ratio {ratio:.2}")
        });
        println!("{figure:58} {ours:>10.2} {unit:6} {compared}");
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

//! `cargo xtask bench mirror`: our mirror against QEMU's, the same loads, in one run.
//!
//! All servers speak NBD on a unix socket to the same client. Loads are interleaved round by round, so that a machine
//! that slows down slows everybody; what counts are ratios of medians.

mod client;
mod load;
mod peers;
mod server;

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde_json::json;

use crate::interrupt;
use crate::lab::remove_stale_folders;
use crate::setup;
use crate::workspace::lab_dir;

use load::{Load, Measured};
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
    /// Unix socket of our NBD export of a mirrored, idle disk of at least 1 GiB; its contents are overwritten
    #[arg(long)]
    ours: Option<PathBuf>,
    /// Unix socket of our NBD export of a disk with one copy
    #[arg(long)]
    ours_single: Option<PathBuf>,
}

/// Everything one server did in all rounds.
#[derive(Debug)]
struct Contestant {
    server: Server,
    rounds: Vec<Vec<Measured>>,
}

pub fn run(bench: &Bench) -> Result<()> {
    let Bench::Mirror(options) = bench;
    setup::ensure()?;
    let benches = lab_dir().join("bench");
    remove_stale_folders(&benches);
    let folder = benches.join(std::process::id().to_string());
    let result = mirror(options, &folder);
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    result
}

fn mirror(options: &Options, folder: &std::path::Path) -> Result<()> {
    let peers = Peers::start(folder)?;
    let mut contestants = vec![contestant(peers.single()), contestant(peers.quorum())];
    contestants.extend(options.ours.clone().map(|socket| contestant(Server::at(OURS, socket))));
    contestants.extend(options.ours_single.clone().map(|socket| contestant(Server::at(OURS_SINGLE, socket))));
    for round in 1..=options.rounds {
        for contestant in &mut contestants {
            let mut measured = Vec::new();
            for load in Load::ALL {
                interrupt::check()?;
                measured.push(load.run(&contestant.server, options.seconds)?);
            }
            eprintln!("round {round} of {}: {}", options.rounds, contestant.server.name);
            contestant.rounds.push(measured);
        }
    }
    report(&contestants, options.json);
    Ok(())
}

const OURS: &str = "rempart, two copies";
const OURS_SINGLE: &str = "rempart, one copy";

fn contestant(server: Server) -> Contestant {
    Contestant { server, rounds: Vec::new() }
}

impl Contestant {
    fn median(&self, load: usize, pick: impl Fn(&Measured) -> f64) -> f64 {
        let mut values: Vec<_> = self.rounds.iter().map(|round| pick(&round[load])).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
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

/// One line a figure: each of ours against its peer, or the peers alone.
fn report(contestants: &[Contestant], json: bool) {
    let by_name = |name: &str| contestants.iter().find(|contestant| contestant.server.name == name);
    for (ours, theirs) in [(OURS, peers::QUORUM), (OURS_SINGLE, peers::SINGLE)] {
        let Some(theirs) = by_name(theirs) else { continue };
        let ours = by_name(ours);
        for (index, load) in Load::ALL.iter().enumerate() {
            for (column, unit, pick) in COLUMNS {
                let their_value = theirs.median(index, pick);
                let our_value = ours.map(|ours| ours.median(index, pick));
                let ratio = our_value.map(|ours| ours / their_value);
                let figure = format!("{} {column}", load.name);
                if json {
                    let line = json!({
                        "figure": figure, "unit": unit, "ours": our_value.map(rounded),
                        "peer": theirs.server.name, "theirs": rounded(their_value), "ratio": ratio.map(rounded),
                    });
                    println!("{line}");
                } else {
                    let shown = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.2}"));
                    println!(
                        "{figure:34} {:>12} {unit:6} {:24} {their_value:>12.2}  ratio {}",
                        shown(our_value),
                        theirs.server.name,
                        shown(ratio)
                    );
                }
            }
        }
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Fails early on a socket that nobody made.
fn must_exist(socket: &std::path::Path) -> Result<()> {
    if !socket.exists() {
        bail!("there is no socket `{}`", socket.display());
    }
    Ok(())
}

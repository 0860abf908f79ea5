//! `cargo xtask bench backed-up`: what a guest feels of a backup whose repository is slow, or dead.
//!
//! The repository is a bucket of a real S3 server on the witness's machine. The link to it is shaped by a token bucket, or
//! swallows all that the server says. Flushed writes of the machine that is backed up are measured meanwhile.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::Run;
use super::load::{Load, Measured};
use super::ours::Ours;
use crate::bench::moto::{BUCKET, Moto};
use crate::bench::program;
use crate::bench::report::{Against, Report, median};
use crate::interrupt;
use crate::lab::{Host, Lab, Link, Side};
use crate::setup;
use crate::workspace::run as succeed;

/// A megabyte a second.
const SLOW_MEGABITS: u64 = 8;
const LINK: Link = Link::Witness(Side::A);
const PORT: u16 = 5000;

pub fn run(options: &Run) -> Result<()> {
    setup::ensure()?;
    let ours = Ours::start(Lab::build(false)?, &program(options.program.as_deref())?)?;
    let lab = ours.lab();
    let (server, client) = (lab.host(Host::Witness), lab.host(Host::A));
    let _store = Moto::start(
        |program| server.command(program),
        |program| client.command(program),
        Host::Witness.address(),
        PORT,
    )?;
    let server = ours.two_copies();
    Load::warm_up(&server)?;
    let address = Host::Witness.address();
    let repository = format!("s3://{BUCKET}/shop?endpoint=http://{address}:{PORT}&allow_http=true");
    let key = lab.folder().join("repository.key");
    create(ours.on_repository(&["repo", "create", &repository]), &key)?;
    let [load, ..] = &Load::ALL;
    let (mut idle, mut slow, mut dead) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        interrupt::check()?;
        idle.push(load.run(&server, options.seconds)?);

        lab.shape(LINK, SLOW_MEGABITS)?;
        let mut backup = ours.start_backup(&repository, &key)?;
        slow.push(load.run(&server, options.seconds)?);
        backup.must_be_under_way()?;
        drop(backup);
        lab.unshape(LINK)?;

        let mut backup = ours.start_backup(&repository, &key)?;
        lab.swallow_from(Host::Witness, LINK)?;
        dead.push(load.run(&server, options.seconds)?);
        backup.must_be_under_way()?;
        drop(backup);
        lab.swallow_nothing()?;
        ours.must_be_mirrored()?;
        eprintln!("round {round} of {}", options.rounds);
    }
    let mut report = Report { json: options.json };
    let p99 = |all: &[Measured]| -> Vec<f64> { all.iter().map(|measured| measured.p99_us).collect() };
    for (repository, measured) in [("slow", &slow), ("dead", &dead)] {
        let figure = format!("{} p99, backed up, repository {repository}", load.name);
        let ours = p99(measured);
        let against = Against::in_rounds("not backed up", &ours, p99(&idle));
        report.figure(&figure, "us", median(ours), Some(against));
    }
    Ok(())
}

fn create(mut command: Command, key: &Path) -> Result<()> {
    succeed(command.arg("--new-key-file").arg(key)).context("make a repository in the bucket")
}

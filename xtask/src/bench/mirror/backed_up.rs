//! `cargo xtask bench backed-up`: what a guest feels of a backup whose repository is slow, or dead.
//!
//! The repository is a bucket of a real S3 server on the witness's machine. The link to it is shaped by a token bucket, or
//! swallows all that the server says. Flushed writes of the machine that is backed up are measured meanwhile.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::Run;
use super::load::{Load, Measured};
use super::ours::Ours;
use crate::bench::program;
use crate::bench::report::{Against, Report, median};
use crate::interrupt;
use crate::lab::{Host, Lab, Link, Side};
use crate::setup;
use crate::workspace::{lab_dir, run as succeed};

/// A megabyte a second.
const SLOW_MEGABITS: u64 = 8;
const LINK: Link = Link::Witness(Side::A);
const PORT: &str = "5000";
const BUCKET: &str = "backups";

/// Waits until the server is there, and makes the bucket.
const MAKE_BUCKET: &str = "
import sys, time, urllib.request
sign = 'AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0'
for left in range(600, -1, -1):
    try:
        urllib.request.urlopen(urllib.request.Request(sys.argv[1], method='PUT', headers={'Authorization': sign}))
        break
    except OSError:
        if not left: raise
        time.sleep(0.05)
";

/// The server of the bucket.
#[derive(Debug)]
struct Store {
    child: Child,
}

impl Store {
    fn start(lab: &Lab) -> Result<Store> {
        let home = lab_dir().join("moto");
        ensure!(home.join("whole").exists(), "moto is not installed: see what `cargo xtask setup` says");
        let host = Host::Witness;
        let mut command = lab.host(host).command(home.join("bin/moto_server"));
        command.args(["-H", host.address(), "-p", PORT]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let store = Store { child: command.spawn().context("start moto")? };
        let bucket = format!("http://{}:{PORT}/{BUCKET}", host.address());
        succeed(lab.host(Host::A).command(home.join("bin/python")).args(["-c", MAKE_BUCKET, &bucket]))?;
        Ok(store)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn run(options: &Run) -> Result<()> {
    setup::ensure()?;
    let ours = Ours::start(Lab::build(false)?, &program(options.program.as_deref())?)?;
    let lab = ours.lab();
    let _store = Store::start(lab)?;
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

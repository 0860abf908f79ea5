//! `cargo xtask bench large-repository`: the memory that commands take in a repository of many TiB.
//!
//! Its index, log and trees are as if disks of that size had been backed up; the chunks themselves are not there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::measure;
use crate::bench::report::{Against, Report};
use crate::workspace::{self, cargo, target_dir};

const MIB: f64 = (1 << 20) as f64;
/// MiB of anonymous memory that no command shall take more of.
const PROMISED: f64 = 256.0;
/// Bytes of the disk that is backed up into it.
const DISK: usize = 256 << 20;

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// One JSON object a line: figure, unit, ours, peer, theirs, ratio
    #[arg(long)]
    json: bool,
    /// TiB of disks whose chunks are in the repository
    #[arg(long, default_value_t = 10)]
    tib: u64,
    /// Where it is made, and removed again: 0.6 GiB a TiB, with what the program keeps of it
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Measure this build of the program instead of building it
    #[arg(long)]
    program: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<()> {
    let program = crate::bench::program(options.program.as_deref())?;
    let folder = options.folder.clone().unwrap_or_else(|| target_dir().join("large-repository"));
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    fs::create_dir_all(&folder)?;
    let measured = measure_all(options, &program, &folder);
    fs::remove_dir_all(&folder)?;
    measured
}

fn measure_all(options: &Options, program: &Path, folder: &Path) -> Result<()> {
    let (repository, passphrase) = (folder.join("repository"), folder.join("passphrase"));
    fs::write(&passphrase, "bench\n")?;
    let mut make = cargo();
    make.args(["run", "-q", "-p", "rempart-repository", "--example", "large_repository", "--"]);
    make.args([&repository, &passphrase]).arg(options.tib.to_string());
    workspace::run(&mut make)?;
    let disk = folder.join("disk.raw");
    // No two chunks of it alike, and none that it has.
    let mut random = crate::bench::random::Random::new(7);
    let mut content = vec![0; DISK];
    random.fill(&mut content);
    fs::write(&disk, content)?;
    let mut report = Report { json: options.json };
    let disk = disk.to_str().context("the folder's name is no text")?;
    let steps: [(&str, &[&str]); 6] = [
        ("first backup, with the index made", &["backup", "disk", "--disk", disk]),
        ("second backup", &["backup", "disk", "--disk", disk]),
        ("points", &["points"]),
        ("gc --dry-run", &["gc", "--dry-run"]),
        ("gc", &["gc"]),
        ("third backup, with the index made anew", &["backup", "disk", "--disk", disk]),
    ];
    for (name, arguments) in steps {
        let mut command = Command::new(program);
        command.env("REMPART_REPOSITORY", &repository).env("REMPART_PASSPHRASE_FILE", &passphrase);
        command.env("REMPART_CACHE_DIR", folder.join("cache")).args(arguments);
        let taken = measure::run(&mut command)?;
        let memory = taken.anonymous_bytes as f64 / MIB;
        let promised = Some(Against::once(memory, ("promised at most", PROMISED)));
        report.figure(&format!("{} TiB, {name}, anonymous memory", options.tib), "MiB", memory, promised);
        report.figure(&format!("{} TiB, {name}", options.tib), "s", taken.seconds, None);
    }
    Ok(())
}

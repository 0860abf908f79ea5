//! `cargo xtask bench large-repository`: the memory that commands take in a repository of many TiB.
//!
//! Its index, log and trees are as if disks of that size had been backed up; the chunks themselves are not there. What the
//! commands add and remove is real: a disk that is backed up, changed, backed up again, and restored.

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
/// Bytes that are not zeroes of the disk that is backed up into it.
const DISK: usize = 256 << 20;
/// Bytes of a chunk, if none is said.
const CHUNK: usize = 128 << 10;

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// One JSON object a line: figure, unit, ours, peer, theirs, ratio
    #[arg(long)]
    json: bool,
    /// TiB of disks whose chunks are in the repository
    #[arg(long, default_value_t = 10)]
    tib: u64,
    /// Points of the disk of that size that are in it
    #[arg(long, default_value_t = 1000)]
    points: u64,
    /// Where it is made, and removed again: 1.4 GiB a TiB, with what the program keeps of it
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Begin with hard links to this repository, which the example `large_repository` made of so many TiB and points, passphrase `bench`
    #[arg(long)]
    made: Option<PathBuf>,
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
    match &options.made {
        // Objects are never changed.
        Some(made) => workspace::run(Command::new("cp").arg("-al").args([made, &repository]))?,
        None => {
            let mut make = cargo();
            make.args(["run", "-q", "-p", "rempart-repository", "--example", "large_repository", "--"]);
            make.args([&repository, &passphrase]).args([options.tib.to_string(), options.points.to_string()]);
            workspace::run(&mut make)?;
        }
    }
    let disk = folder.join("disk.raw");
    // No two chunks of it alike, and none that it has.
    let mut random = crate::bench::random::Random::new(7);
    let mut content = vec![0; DISK];
    random.fill(&mut content);
    write_disk(&disk, &content, options.tib)?;
    // Nine of ten chunks are others after that, in every pack: what is left of the first point's is written anew.
    let changed = folder.join("changed.raw");
    for (place, chunk) in content.chunks_mut(CHUNK).enumerate() {
        if place % 10 != 0 {
            random.fill(chunk);
        }
    }
    write_disk(&changed, &content, options.tib)?;
    drop(content);
    let mut report = Report { json: options.json };
    let text = |path: &Path| {
        Ok::<_, anyhow::Error>(path.to_str().context("the folder's name is no text")?.to_owned())
    };
    let (disk, changed, restored) = (text(&disk)?, text(&changed)?, text(&folder.join("restored"))?);
    let first = ["backup", "disk", "--disk", &disk];
    let steps: [(&str, &[&str], i32); 14] = [
        ("first backup, with the index made", &first, 0),
        ("backup", &first, 0),
        ("points", &["points"], 0),
        ("verify", &["verify", "disk"], 0),
        ("restore", &["restore", "disk", "--to", &restored], 0),
        // The packs of the disks that were not there are missing: the most that it may have to tell.
        ("repo check", &["repo", "check"], 1),
        ("gc --dry-run", &["gc", "--dry-run"], 0),
        ("gc that condemns", &["gc"], 0),
        ("backup of another content", &["backup", "disk", "--disk", &changed], 0),
        ("retain", &["retain", "disk", "--keep-last", "1"], 0),
        ("gc that writes anew", &["gc"], 0),
        ("gc with nothing to do", &["gc"], 0),
        ("verify after it", &["verify", "disk"], 0),
        ("backup, with the index made anew", &["backup", "disk", "--disk", &changed], 0),
    ];
    for (step, (name, arguments, status)) in steps.into_iter().enumerate() {
        if step == steps.len() - 1 {
            fs::remove_dir_all(folder.join("cache"))?;
        }
        let mut command = Command::new(program);
        command.env("REMPART_REPOSITORY", &repository).env("REMPART_PASSPHRASE_FILE", &passphrase);
        command.env("REMPART_CACHE_DIR", folder.join("cache")).args(arguments);
        let taken = measure::run_to_status(&mut command, status)?;
        let memory = taken.anonymous_bytes as f64 / MIB;
        let promised = Some(Against::once(memory, ("promised at most", PROMISED)));
        report.figure(&format!("{} TiB, {name}, anonymous memory", options.tib), "MiB", memory, promised);
        report.figure(&format!("{} TiB, {name}", options.tib), "s", taken.seconds, None);
    }
    Ok(())
}

/// Writes a disk of so many TiB of which the beginning is not a hole.
fn write_disk(path: &Path, content: &[u8], tib: u64) -> Result<()> {
    fs::write(path, content)?;
    fs::OpenOptions::new().write(true).open(path)?.set_len(tib << 40)?;
    Ok(())
}

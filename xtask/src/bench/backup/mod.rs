//! `cargo xtask bench backup`: full and incremental backups, restores and checks of one disk, against restic, borg and rustic.
//!
//! Everybody backs up the same image in the same run, and in turns; every repository is encrypted and on the same file
//! system. What counts are ratios.

mod bucket;
mod image;
pub mod large;
mod measure;
mod recovery;
mod served;
mod tool;
mod tracked;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::report::{Against, Report, median};
use crate::lab::Lab;
use crate::setup::{self, Kernel};
use crate::workspace::output;

use bucket::Bucket;
use image::{Change, Image};
use measure::Taken;
use recovery::Recovery;
use served::Served;
use tool::{Program, Tool};
use tracked::Machine;

const MIB: f64 = (1 << 20) as f64;
/// One boot under emulation tells little.
const LEAST_RECOVERIES: u32 = 3;
/// Debian has them; rustic is measured where somebody installed it.
const PACKAGES: &[&str] = &["borgbackup", "restic", "zstd"];

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// One JSON object a line: figure, unit, ours, peer, theirs, ratio
    #[arg(long)]
    json: bool,
    /// Rounds, each with new repositories; each figure is the median over them
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// GiB of the disk, which holds this machine's /usr
    #[arg(long, default_value_t = 6)]
    size: u64,
    /// Only against these, of restic, borg and rustic
    #[arg(long, value_delimiter = ',')]
    peers: Option<Vec<String>>,
    /// The chunk size of our repository, instead of the default
    #[arg(long)]
    chunk_size: Option<String>,
    /// Leave out the machine whose changes are tracked
    #[arg(long)]
    no_machine: bool,
    /// Only how soon a machine answers that is recovered at once; three rounds at least
    #[arg(long)]
    only_recovery: bool,
    /// Only backups into a bucket
    #[arg(long)]
    only_bucket: bool,
    /// An empty folder for the disk, the repositories and what is restored, on the file system that is to be measured
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Measure this build of the program instead of building it
    #[arg(long)]
    program: Option<PathBuf>,
}

/// What is measured of each program.
const STEPS: [Step; 6] = [
    Step::Full,
    Step::Again(Change::Scattered),
    Step::Again(Change::Clustered),
    Step::Restore,
    Step::Synced,
    Step::Check,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Full,
    /// After one per cent of the blocks changed.
    Again(Change),
    Restore,
    /// The same, until all that was restored is on stable storage.
    Synced,
    Check,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Step::Full => "full",
            Step::Again(Change::Scattered) => "1 % changed, scattered",
            Step::Again(Change::Clustered) => "1 % changed, clustered",
            Step::Restore => "restore",
            Step::Synced => "restore and sync",
            Step::Check => "check",
        }
    }

    fn place(self) -> usize {
        STEPS.iter().position(|step| *step == self).expect("it is one of them")
    }
}

/// All rounds of one program, by step.
#[derive(Debug)]
struct Column {
    name: &'static str,
    taken: Vec<Vec<Taken>>,
    /// Bytes that the repository grew by.
    grown: Vec<Vec<f64>>,
}

impl Column {
    fn new(name: &'static str) -> Column {
        Column { name, taken: vec![Vec::new(); STEPS.len()], grown: vec![Vec::new(); STEPS.len()] }
    }

    fn add(&mut self, step: Step, taken: Taken, grown: u64) {
        self.taken[step.place()].push(taken);
        self.grown[step.place()].push(grown as f64);
        eprintln!("{:24} {:9} {:7.2} s", step.name(), self.name, taken.seconds);
    }

    /// MiB of the disk a second.
    fn rates(&self, step: Step, image: &Image) -> Vec<f64> {
        self.taken[step.place()].iter().map(|taken| image.bytes as f64 / MIB / taken.seconds).collect()
    }

    fn has(&self, step: Step) -> bool {
        !self.taken[step.place()].is_empty()
    }
}

pub fn run(options: &Options) -> Result<()> {
    let kernel = setup::ensure()?;
    let program = super::program(options.program.as_deref())?;
    let ours = Program::Rempart { program: program.clone(), chunk_size: options.chunk_size.clone() };
    if options.only_recovery {
        return recover(options, &kernel, &program, ours, Lab::build(false)?.folder());
    }
    if options.only_bucket {
        return bucket(options, &program, Lab::build(false)?.folder());
    }
    setup::ensure_packages(PACKAGES)?;
    let mut programs = vec![ours.clone()];
    for peer in [Program::Restic, Program::Borg, Program::Rustic] {
        let wanted = options.peers.as_ref().is_none_or(|peers| peers.iter().any(|name| name == peer.name()));
        if wanted && peer.is_installed() {
            programs.push(peer);
        } else if wanted {
            eprintln!("{} is not installed: left out", peer.name());
        }
    }
    let lab = Lab::build(false)?;
    let folder = options.folder.clone().unwrap_or_else(|| lab.folder().join("backup"));
    std::fs::create_dir_all(&folder)?;
    let image = Image::make(&folder.join("disk.raw"), options.size << 30)?;
    recover(options, &kernel, &program, ours.clone(), lab.folder())?;
    let machine = match options.no_machine {
        true => None,
        false => Some(Machine::start(lab, &program, &image)?),
    };
    let mut columns: Vec<Column> = programs.iter().map(|program| Column::new(program.name())).collect();
    let mut tracked = Column::new("tracked");
    let (mut limits, mut served) = (Limits::default(), Vec::new());
    for round in 1..=options.rounds {
        limits.measure(&image, &folder)?;
        let folder = folder.join(format!("round{round}"));
        let mut tools = Vec::new();
        for program in &programs {
            tools.push(Tool::new(program.clone(), &folder)?);
        }
        let repository = Tool::new(ours.clone(), &folder.join("tracked"))?;
        for step in STEPS.into_iter().filter(|step| *step != Step::Synced) {
            if let Step::Again(change) = step {
                let changes = image.changes(change, u64::from(round));
                image.write(&changes)?;
                if let Some(machine) = &machine {
                    machine.write(&changes)?;
                }
            }
            let mut order: Vec<(&mut Tool, &mut Column)> = tools.iter_mut().zip(&mut columns).collect();
            if round.is_multiple_of(2) {
                order.reverse();
            }
            for (tool, column) in order {
                let before = tool.stored()?;
                settle()?;
                match step {
                    Step::Full | Step::Again(_) => image.warm()?,
                    Step::Restore | Step::Synced | Step::Check => forget(tool)?,
                }
                measure::have_memory_at_hand()?;
                let taken = match step {
                    Step::Full | Step::Again(_) => tool.back_up(&image)?,
                    Step::Restore | Step::Synced => {
                        let (taken, synced) = tool.restore(&image)?;
                        column.add(Step::Synced, synced, 0);
                        taken
                    }
                    Step::Check => tool.check()?,
                };
                column.add(step, taken, tool.stored()?.saturating_sub(before));
            }
            if let Some(machine) = &machine
                && matches!(step, Step::Full | Step::Again(_))
            {
                let before = repository.stored()?;
                settle()?;
                measure::have_memory_at_hand()?;
                let taken = machine.back_up(&repository)?;
                tracked.add(step, taken, repository.stored()?.saturating_sub(before));
            }
        }
        served.push(served::measure(&tools[0], &image)?);
        std::fs::remove_dir_all(&folder)?;
    }
    tell(options, &image, &columns, &tracked, &limits);
    tell_served(options, &served);
    bucket(options, &program, &folder)
}

/// Has all that was written before on the disk: nobody waits for what others left in memory.
fn settle() -> Result<()> {
    output(&mut Command::new("sync")).map(drop)
}

/// Takes out of the page cache all but the program: who restores has not backed up the minute before, and not every program leaves
/// there what it wrote.
fn forget(tool: &Tool) -> Result<()> {
    std::fs::write("/proc/sys/vm/drop_caches", "1")?;
    output(&mut tool.command(&["--help"])).map(drop)
}

fn tell_served(options: &Options, served: &[Served]) {
    let mut report = Report { json: options.json };
    let rates = |of: fn(&Served) -> f64| median(served.iter().map(of).collect());
    report.figure("served: 4 KiB at random, in memory", "/s", rates(|served| served.warm), None);
    report.figure("served: 4 KiB at random, anywhere", "/s", rates(|served| served.anywhere), None);
}

/// A backup into a bucket, and a plain upload.
fn bucket(options: &Options, program: &Path, folder: &Path) -> Result<()> {
    let Bucket { ours, plain } = Bucket::measure(program, folder, options.rounds)?;
    let rates =
        |taken: &[Taken]| -> Vec<f64> { taken.iter().map(|taken| Bucket::MIB / taken.seconds).collect() };
    let ours = rates(&ours);
    let against = Against::in_rounds("plain upload", &ours, rates(&plain));
    let figure = "full into a bucket, cannot be compressed, rate";
    Report { json: options.json }.figure(figure, "MiB/s", median(ours), Some(against));
    Ok(())
}

/// How soon a guest answers from a repository, and from its disks.
fn recover(options: &Options, kernel: &Kernel, program: &Path, ours: Program, folder: &Path) -> Result<()> {
    let folder = folder.join("recovery");
    std::fs::create_dir_all(&folder)?;
    let repository = Tool::new(ours, &folder)?;
    let rounds = options.rounds.max(LEAST_RECOVERIES);
    let Recovery { ours, raw } = Recovery::measure(kernel, program, &repository, &folder, rounds)?;
    std::fs::remove_dir_all(&folder)?;
    let (figure, seconds) = ("recovery: first answer", median(ours.clone()));
    Report { json: options.json }.figure(
        figure,
        "s",
        seconds,
        Some(Against::in_rounds("raw disk", &ours, raw)),
    );
    Ok(())
}

/// What the machine can do, whatever the program.
#[derive(Debug, Default)]
struct Limits {
    zstd: Vec<Taken>,
    copy: Vec<Taken>,
}

impl Limits {
    fn measure(&mut self, image: &Image, folder: &Path) -> Result<()> {
        image.warm()?;
        measure::have_memory_at_hand()?;
        self.zstd.push(measure::run(Command::new("zstd").args(["-1", "-T2", "-c"]).arg(&image.path))?);
        let copy = folder.join("copy");
        let script = r#"cp --sparse=never "$1" "$2" && sync "$2""#;
        let mut command = Command::new("sh");
        measure::have_memory_at_hand()?;
        self.copy.push(measure::run(command.args(["-c", script, "sh"]).args([&image.path, &copy]))?);
        std::fs::remove_file(copy)?;
        eprintln!("{:24} {:9} {:7.2} s", "limit", "zstd", self.zstd.last().expect("just measured").seconds);
        eprintln!("{:24} {:9} {:7.2} s", "limit", "cp", self.copy.last().expect("just measured").seconds);
        Ok(())
    }
}

fn tell(options: &Options, image: &Image, columns: &[Column], tracked: &Column, limits: &Limits) {
    let mut report = Report { json: options.json };
    let (ours, peers) = columns.split_first().expect("ours is one");
    let of_limit = |taken: &[Taken]| -> Vec<f64> {
        taken.iter().map(|taken| image.bytes as f64 / MIB / taken.seconds).collect()
    };
    for step in STEPS {
        for peer in peers {
            let rates = ours.rates(step, image);
            let against = Against::in_rounds(peer.name, &rates, peer.rates(step, image));
            report.figure(&format!("{}, rate", step.name()), "MiB/s", median(rates), Some(against));
        }
        let limit = match step {
            Step::Full => Some(("zstd -1 -T2", &limits.zstd)),
            Step::Synced => Some(("cp, sync", &limits.copy)),
            _ => None,
        };
        if let Some((name, limit)) = limit {
            let rates = ours.rates(step, image);
            let against = Against::in_rounds(name, &rates, of_limit(limit));
            report.figure(&format!("{}, rate", step.name()), "MiB/s", median(rates), Some(against));
        }
    }
    for step in STEPS.into_iter().filter(|step| tracked.has(*step)) {
        for peer in peers {
            let rates = tracked.rates(step, image);
            let against = Against::in_rounds(peer.name, &rates, peer.rates(step, image));
            let figure = format!("{} on a tracked machine, rate", step.name());
            report.figure(&figure, "MiB/s", median(rates), Some(against));
        }
    }
    for step in [Step::Full, Step::Again(Change::Scattered), Step::Again(Change::Clustered)] {
        for peer in peers {
            let grown =
                |column: &Column| column.grown[step.place()].iter().map(|bytes| bytes / MIB).collect();
            let ours: Vec<f64> = grown(ours);
            let against = Against::in_rounds(peer.name, &ours, grown(peer));
            report.figure(&format!("{}, stored", step.name()), "MiB", median(ours), Some(against));
        }
    }
    for peer in peers {
        let most = |column: &Column| {
            let all = column.taken.iter().flatten();
            all.map(|taken| taken.anonymous_bytes).max().unwrap_or(0) as f64 / MIB
        };
        let figure = "anonymous memory of any step, at most";
        report.figure(figure, "MiB", most(ours), Some(Against::once(most(ours), (peer.name, most(peer)))));
    }
    for peer in peers {
        let used = |column: &Column| -> Vec<f64> {
            column.taken[Step::Full.place()].iter().map(|taken| taken.processor_seconds).collect()
        };
        let against = Against::in_rounds(peer.name, &used(ours), used(peer));
        report.figure("full, processor", "s", median(used(ours)), Some(against));
    }
}

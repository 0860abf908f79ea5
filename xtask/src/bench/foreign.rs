//! `cargo xtask bench backed-up-qemu`: what the guest of a QEMU that is not ours feels of a backup through its monitor.
//!
//! A guest writes pages anywhere on its disk and flushes each; it measures that itself and says it on its serial port. It
//! is left alone, and backed up into a directory beside its disk, and into a bucket behind a line that is slow, or that
//! swallows all answers, or whose server stops for a while. What the processors and the disk do to it without a backup is
//! measured, too: a busy process for each processor, and a copy of its image by `cp`.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::mirror::{Run, disk};
use super::moto::{BUCKET, Moto};
use super::program;
use super::report::{Against, Report, median};
use crate::guest;
use crate::interrupt;
use crate::lab::{Host, Lab, Link, Process, Side};
use crate::setup::{self, Kernel};
use crate::workspace::{output, run as succeed};

/// Large enough that nearly all writes of a round are the first ones to what they hit, which cost a view most.
const DISK_BYTES: u64 = 4 << 30;
/// A megabyte a second.
const SLOW_MEGABITS: u64 = 8;
const LINK: Link = Link::Witness(Side::A);
const PORT: u16 = 5000;
/// Far above what an emulated guest takes to boot, and a backup to open its view and to take it away.
const PATIENCE: Duration = Duration::from_secs(120);
/// Bytes that a scratch image has for itself; with more, the guest's writes are being copied.
const COPYING: u64 = 1 << 20;
const POLL: Duration = Duration::from_millis(5);
/// Below this nothing is said about one write of a hundred.
const LEAST_WRITES: usize = 100;

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    #[command(flatten)]
    run: Run,
    /// Of the guest's disk: `raw` or `qcow2`
    #[arg(long, default_value = "raw")]
    format: String,
    /// QEMU reads and writes it through the host's page cache
    #[arg(long)]
    page_cache: bool,
    /// Only what contains this: `directory`, `slow`, `dead`, `stopped`, `processors`, `cp`
    #[arg(long)]
    only: Option<String>,
}

/// What goes on while the guest's writes are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    Directory,
    Slow,
    Dead,
    Stopped,
    Processors,
    Copied,
}

impl Meanwhile {
    const ALL: [Meanwhile; 6] = [
        Meanwhile::Directory,
        Meanwhile::Slow,
        Meanwhile::Dead,
        Meanwhile::Stopped,
        Meanwhile::Processors,
        Meanwhile::Copied,
    ];

    fn name(self) -> &'static str {
        match self {
            Meanwhile::Directory => "backed up into a directory",
            Meanwhile::Slow => "backed up, repository slow",
            Meanwhile::Dead => "backed up, repository dead",
            Meanwhile::Stopped => "backed up, repository's server stopped for a while",
            Meanwhile::Processors => "not backed up, all processors busy",
            Meanwhile::Copied => "not backed up, its image copied by cp",
        }
    }
}

/// Microseconds of each flushed write.
type Writes = Vec<f64>;

pub fn run(options: &Options) -> Result<()> {
    let kernel = setup::ensure()?;
    let program = program(options.run.program.as_deref())?;
    let lab = Lab::build(false)?;
    let foreign = Foreign::start(options, &kernel, &lab, &program)?;
    let wanted = |what: &Meanwhile| options.only.as_ref().is_none_or(|only| what.name().contains(only));
    let wanted: Vec<Meanwhile> = Meanwhile::ALL.into_iter().filter(wanted).collect();
    let time = Duration::from_secs(options.run.seconds);
    let mut idle: Vec<[Writes; 2]> = Vec::new();
    let mut measured: Vec<Vec<Writes>> = vec![Vec::new(); wanted.len()];
    foreign.alone(time)?;
    for round in 1..=options.run.rounds {
        let before = foreign.alone(time)?;
        // In turns: a machine that grows slower within a round is not always slower for the same one.
        let mut order: Vec<usize> = (0..wanted.len()).collect();
        if round.is_multiple_of(2) {
            order.reverse();
        }
        for which in order {
            interrupt::check()?;
            let writes = foreign.measure(wanted[which], time).with_context(|| wanted[which].name())?;
            ensure!(writes.len() >= LEAST_WRITES, "{}: {} writes", wanted[which].name(), writes.len());
            measured[which].push(writes);
        }
        idle.push([before, foreign.alone(time)?]);
        eprintln!("round {round} of {}", options.run.rounds);
    }
    let mut report = Report { json: options.run.json };
    let alone: Vec<Writes> = idle.iter().map(|both| both.concat()).collect();
    for (name, at) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("longest", 1.0)] {
        let all =
            |rounds: &[Writes]| -> Vec<f64> { rounds.iter().map(|writes| quantile(writes, at)).collect() };
        let [first, second] =
            [0, 1].map(|which| -> Writes { idle.iter().map(|both| quantile(&both[which], at)).collect() });
        let mut figure = |what: &str, ours: Writes, peer, theirs| {
            let figure = format!("4 KiB write+flush {name}, {what}");
            report.figure(&figure, "us", median(ours.clone()), Some(Against::in_rounds(peer, &ours, theirs)));
        };
        // What two measurements of the same differ by here.
        figure("alone, at a round's end", second, "at its begin", first);
        for (what, rounds) in wanted.iter().zip(&measured) {
            figure(what.name(), all(rounds), "alone", all(&alone));
        }
    }
    Ok(())
}

fn quantile(writes: &[f64], at: f64) -> f64 {
    let mut writes = writes.to_owned();
    writes.sort_by(f64::total_cmp);
    writes[((writes.len() - 1) as f64 * at) as usize]
}

/// A QEMU that somebody else runs, with a guest that measures, and a bucket.
struct Foreign<'a> {
    lab: &'a Lab,
    program: &'a Path,
    image: PathBuf,
    store: Moto,
    bucket: String,
    key: PathBuf,
    _qemu: Process,
}

impl<'a> Foreign<'a> {
    fn start(options: &Options, kernel: &Kernel, lab: &'a Lab, program: &'a Path) -> Result<Foreign<'a>> {
        let (server, client) = (lab.host(Host::Witness), lab.host(Host::A));
        let store = Moto::start(
            |program| server.command(program),
            |program| client.command(program),
            Host::Witness.address(),
            PORT,
        )?;
        let raw = lab.folder().join("disk.raw");
        disk::preallocate(&raw, DISK_BYTES)?;
        let image = match &*options.format {
            "raw" => raw,
            "qcow2" => {
                let image = lab.folder().join("disk.qcow2");
                let mut convert = Command::new("qemu-img");
                convert.args(["convert", "-t", "none", "-T", "none", "-O", "qcow2"]);
                output(convert.arg(&raw).arg(&image))?;
                fs::remove_file(&raw)?;
                image
            }
            other => bail!("`{other}` is neither `raw` nor `qcow2`"),
        };
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-M",
            "q35",
            "-accel",
            "tcg,tb-size=128",
            "-cpu",
            "max",
        ]);
        qemu.args(["-m", "192", "-display", "none", "-serial"]);
        qemu.arg(format!("file:{}", lab.folder().join("console").display()));
        qemu.arg("-qmp").arg(format!("unix:{},server=on,wait=off", lab.folder().join("qmp").display()));
        let (cache, aio) = if options.page_cache { ("off", "threads") } else { ("on", "io_uring") };
        qemu.arg("-blockdev").arg(format!(
            "driver={},node-name=disk,file.driver=file,file.filename={},cache.direct={cache},\
             file.cache.direct={cache},file.aio={aio}",
            options.format,
            image.display()
        ));
        qemu.args(["-device", "virtio-blk-pci,drive=disk,id=disk"]);
        qemu.args(guest::boot_to_measure(kernel, lab.folder())?);
        let qemu = Process::start(&mut qemu, &lab.folder().join("qemu.log"))?;
        let bucket =
            format!("s3://{BUCKET}/shop?endpoint=http://{}:{PORT}&allow_http=true", Host::Witness.address());
        let key = lab.folder().join("repository.key");
        let foreign = Foreign { lab, program, image, store, bucket, key, _qemu: qemu };
        foreign.create(&foreign.bucket, &foreign.key)?;
        let end = Instant::now() + PATIENCE;
        while foreign.said(0)?.len() < LEAST_WRITES {
            interrupt::check()?;
            ensure!(Instant::now() < end, "the guest does not write");
            thread::sleep(POLL);
        }
        Ok(foreign)
    }

    fn rempart(&self, arguments: &[&str]) -> Command {
        let mut command = self.lab.host(Host::A).command(self.program);
        command.args(arguments).env("REMPART_CACHE_DIR", self.lab.folder().join("cache"));
        command.env("AWS_ACCESS_KEY_ID", "id").env("AWS_SECRET_ACCESS_KEY", "secret");
        command
    }

    fn create(&self, repository: &str, key: &Path) -> Result<()> {
        let mut create = self.rempart(&["repo", "create", repository, "--new-key-file"]);
        succeed(create.arg(key)).context("make a repository")
    }

    /// How far the guest's serial port was written to.
    fn console(&self) -> Result<u64> {
        Ok(fs::metadata(self.lab.folder().join("console"))?.len())
    }

    /// The writes that it told of from there on, whole lines only.
    fn said(&self, from: u64) -> Result<Writes> {
        let mut text = Vec::new();
        if let Ok(mut console) = File::open(self.lab.folder().join("console")) {
            console.seek(SeekFrom::Start(from))?;
            console.read_to_end(&mut text)?;
        }
        let text = String::from_utf8_lossy(&text);
        ensure!(!text.contains("BROKEN"), "the guest complains: {text}");
        let (lines, _) = text.rsplit_once('\n').unwrap_or_default();
        let lines = lines.lines().skip(usize::from(from > 0));
        Ok(lines.filter_map(|line| line.trim().strip_prefix("flush ")?.parse().ok()).collect())
    }

    fn alone(&self, time: Duration) -> Result<Writes> {
        let from = self.console()?;
        thread::sleep(time);
        self.said(from)
    }

    fn measure(&self, what: Meanwhile, time: Duration) -> Result<Writes> {
        let writes = match what {
            Meanwhile::Directory => return self.in_directories(time),
            Meanwhile::Processors => {
                return self.beside(
                    time,
                    || {
                        let mut busy = Command::new("sh");
                        busy.args(["-c", "while :; do :; done"]);
                        busy
                    },
                    thread::available_parallelism()?.get(),
                );
            }
            Meanwhile::Copied => {
                return self.beside(
                    time,
                    || {
                        let mut copy = Command::new("sh");
                        copy.args(["-c", "while :; do cp --sparse=never \"$0\" \"$1\"; done"]);
                        copy.args([&self.image, &self.lab.folder().join("copy")]);
                        copy
                    },
                    1,
                );
            }
            Meanwhile::Slow => {
                self.lab.shape(LINK, SLOW_MEGABITS)?;
                let mut backup = self.back_up(&self.bucket, &self.key)?;
                thread::sleep(time);
                let writes = self.said(backup.from)?;
                backup.must_be_under_way()?;
                backup.end()?;
                self.lab.unshape(LINK)?;
                writes
            }
            Meanwhile::Dead => {
                let mut backup = self.back_up(&self.bucket, &self.key)?;
                self.lab.swallow_from(Host::Witness, LINK)?;
                thread::sleep(time);
                let writes = self.said(backup.from)?;
                backup.must_be_under_way()?;
                backup.end()?;
                self.lab.swallow_nothing()?;
                writes
            }
            Meanwhile::Stopped => {
                self.lab.shape(LINK, SLOW_MEGABITS)?;
                let mut backup = self.back_up(&self.bucket, &self.key)?;
                self.store.signal(libc::SIGSTOP);
                thread::sleep(time * 2 / 3);
                self.store.signal(libc::SIGCONT);
                thread::sleep(time / 3);
                let writes = self.said(backup.from)?;
                backup.must_be_under_way()?;
                backup.end()?;
                self.lab.unshape(LINK)?;
                writes
            }
        };
        Ok(writes)
    }

    fn beside(&self, time: Duration, command: impl Fn() -> Command, processes: usize) -> Result<Writes> {
        let log = self.lab.folder().join("beside.log");
        let start = |_| Process::start(&mut command(), &log);
        let running = (0..processes).map(start).collect::<Result<Vec<_>>>()?;
        let writes = self.alone(time);
        // `cp` in its middle, too: the shell's process group.
        running.iter().for_each(|process| crate::lab::send_signal(-process.id(), libc::SIGKILL));
        writes
    }

    /// As many backups one after the other as the time takes, each into a repository that has nothing yet.
    fn in_directories(&self, time: Duration) -> Result<Writes> {
        let (mut writes, mut seen) = (Writes::new(), Duration::ZERO);
        while seen < time {
            interrupt::check()?;
            let [repository, key] = ["repository", "directory.key"].map(|name| self.lab.folder().join(name));
            self.create(&repository.display().to_string(), &key)?;
            let mut backup = self.back_up(&repository.display().to_string(), &key)?;
            let begun = Instant::now();
            while !backup.is_over()? && seen + begun.elapsed() < time {
                thread::sleep(POLL);
            }
            writes.extend(self.said(backup.from)?);
            seen += begun.elapsed();
            backup.end()?;
            fs::remove_dir_all(&repository)?;
            fs::remove_file(&key)?;
        }
        Ok(writes)
    }

    /// Starts a backup, and returns when its view is being opened.
    fn back_up(&self, repository: &str, key: &Path) -> Result<Backup> {
        let views = self.lab.folder().join("views");
        let mut command = self.rempart(&["backup", "shop", "--repo", repository, "--qmp"]);
        command.arg(self.lab.folder().join("qmp")).arg("--scratch-dir").arg(&views);
        command.arg("--key-file").arg(key);
        let log = self.lab.folder().join("backup.log");
        let mut backup = Backup { process: Process::start(&mut command, &log)?, log, from: 0 };
        let end = Instant::now() + PATIENCE;
        loop {
            backup.from = self.console()?;
            thread::sleep(POLL);
            if is_viewed(&views) {
                return Ok(backup);
            }
            interrupt::check()?;
            backup.must_be_under_way()?;
            ensure!(Instant::now() < end, "there is no view");
        }
    }
}

fn is_viewed(views: &Path) -> bool {
    let machines = fs::read_dir(views).into_iter().flatten().flatten();
    let mut scratch = machines.filter_map(|machine| fs::read_dir(machine.path().join("scratch")).ok());
    scratch.any(|mut files| {
        files
            .any(|file| file.and_then(|file| file.metadata()).is_ok_and(|file| file.blocks() * 512 > COPYING))
    })
}

struct Backup {
    process: Process,
    log: PathBuf,
    /// What the guest told from there on, it wrote while its view was taken or later.
    from: u64,
}

impl Backup {
    /// An error if it failed.
    fn is_over(&mut self) -> Result<bool> {
        match self.process.has_exited()? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => bail!("{status}: {}", fs::read_to_string(&self.log)?),
        }
    }

    /// Fails if it is over: then nothing was measured of it.
    fn must_be_under_way(&mut self) -> Result<()> {
        ensure!(!self.is_over()?, "the backup ended before it was measured");
        Ok(())
    }

    /// It takes its view out of QEMU.
    fn end(mut self) -> Result<()> {
        if self.process.has_exited()?.is_none() {
            self.process.stop(PATIENCE)?;
        }
        Ok(())
    }
}

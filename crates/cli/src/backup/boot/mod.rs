//! `rempart verify --boot`: machines are started from the repository, apart from everything, and asked whether they live.

mod check;
mod guest;
mod report;
mod room;
mod scratch;

use super::access::{chain, describe, now};
use super::hardware::{Hardware, parse_definition};
use super::serve::{Memory, SocketFile, disk_reader, tell_unreadable};
use crate::output::bytes;
use crate::{Output, parse};
use check::{Check, Probe, unchecked};
use clap::Args;
use guest::{Guest, GuestAddress, Start};
use rempart_api::Error;
use rempart_backup::{ChunkCache, DiskReader, DiskServer, Listener};
use rempart_hypervisor::qmp::{Event, EventStream, Heard};
use rempart_notify::{MailConfig, Mailer};
use rempart_repository::{Point, Repository};
use report::{Checked, Verified};
use room::Room;
use rustix::thread::UnshareFlags;
use scratch::Scratch;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Between two looks at a machine, where nothing happens.
const TICK: Duration = Duration::from_millis(100);
/// Of what its serial console said last.
const TOLD: usize = 4096;
/// Ranges that could not be read, at most.
const MOST_UNREADABLE: usize = 20;

/// How machines are started, and what is asked of them.
#[derive(Debug, Args)]
pub struct Boot {
    /// Start each machine from the repository, apart from every network, and see whether it comes up. Nothing that it writes
    /// is kept. Without a name: the newest point of every machine.
    #[arg(long)]
    pub boot: bool,
    /// What has to hold, each of several: `agent` (the guest agent answers), `exec:COMMAND` (which the agent runs, and which ends
    /// with 0), `tcp:PORT` (the guest takes a connection), `tcp:PORT=TEXT` (and says that), `serial:TEXT` (the serial console
    /// says that) or `quiet` (it read a system from its disks, and came to rest). Without any: `agent` where the agent took part
    /// in the backup, or else `quiet`.
    #[arg(long = "check", value_name = "CHECK", requires = "boot")]
    checks: Vec<Check>,
    /// Start so many machines at once, as far as their memory fits into what this host has free; one at least. Without it: one for
    /// every two processors.
    #[arg(long, value_name = "MACHINES", requires = "boot", value_parser = clap::value_parser!(u16).range(1..))]
    parallel: Option<u16>,
    /// How long a machine may take from its power-on until all checks hold.
    #[arg(long, requires = "boot", default_value = "5m", value_parser = parse::seconds)]
    timeout: u64,
    /// Give each machine no more memory than this.
    #[arg(long, value_name = "BYTES", requires = "boot", value_parser = parse::byte_count)]
    vm_memory: Option<u64>,
    /// The address that the guest has, for `tcp` checks of one that does not ask for it by DHCP.
    #[arg(long, value_name = "ADDRESS/PREFIX", requires = "boot")]
    guest_address: Option<GuestAddress>,
    /// A report, to be read in a browser.
    #[arg(long, value_name = "FILE", requires = "boot")]
    report: Option<PathBuf>,
    /// Mail the report, as this TOML file says: `server`, `from`, `to`, and where needed `tls`, `user`, `password_file` and
    /// `ca_file`.
    #[arg(long, value_name = "FILE", requires = "boot")]
    mail_config: Option<PathBuf>,
    /// A folder for a picture of each machine's screen.
    #[arg(long, value_name = "FOLDER", requires = "boot")]
    screenshots: Option<PathBuf>,
    /// What the machine writes lies in a folder there meanwhile.
    #[arg(long, requires = "boot", default_value = "/var/tmp")]
    scratch_dir: PathBuf,
    /// How much it may write to each of its disks.
    #[arg(long, requires = "boot", default_value = "8G", value_parser = parse::byte_count)]
    scratch_size: u64,
    /// The program that runs it.
    #[arg(long, requires = "boot", default_value = "qemu-system-x86_64")]
    qemu: String,
    #[command(flatten)]
    memory: Memory,
    /// QEMU's arguments, where the point has no definition: `{disk0}` in them is the block node of the disk of that name;
    /// chardevs `console` and `agent` and the network `nic-net-0` are there to be used.
    #[arg(last = true, requires = "boot")]
    arguments: Vec<String>,
}

/// Of the points that nobody named, those of machines: a disk, or files, without a definition are nothing to be started.
pub fn those_that_run(command: &Boot, points: Vec<(u64, Point)>, output: Output) -> Vec<(u64, Point)> {
    let runs = |point: &Point| {
        !command.arguments.is_empty()
            || point.definition.as_ref().is_some_and(|found| found.kind == "rempart")
    };
    let (run, left): (Vec<_>, Vec<_>) = points.into_iter().partition(|(_, point)| runs(point));
    for (root, point) in left {
        output.tell(&format!("{}@{root}: left out, it has no definition of a machine", point.vm));
    }
    run
}

/// Starts the machines, some of them at once. An error if any of them failed.
pub fn run(
    command: &Boot,
    repository: &Arc<Repository>,
    points: &[(u64, Point)],
    output: Output,
) -> Result<(), Error> {
    let mailer = command.mail_config.as_deref().map(mailer).transpose()?;
    let cache = command.memory.cache(repository)?;
    for folder in command.screenshots.iter().chain([&command.scratch_dir]) {
        let made = std::fs::create_dir_all(folder);
        made.map_err(|e| Error::failed(format!("cannot make `{}`", folder.display())).cause(e))?;
    }
    let (room, next) = (Room::available(), AtomicUsize::new(0));
    let verified: Vec<Mutex<Option<Verified>>> = points.iter().map(|_| Mutex::new(None)).collect();
    let work = || -> Result<(), Error> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some((root, point)) = points.get(number) else { return Ok(()) };
            let memory = command.memory_of(point);
            let wait =
                || output.tell(&format!("{}@{root}: it waits for {} of memory", point.vm, bytes(memory)));
            let _place = room.take(memory, wait);
            let found = one(command, repository, &cache, (*root, point), output)?;
            *verified[number].lock().expect("no holder panics") = Some(found);
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..command.at_once().min(points.len())).map(|_| scope.spawn(work)).collect();
        let ended = work();
        others.into_iter().fold(ended, |ended, other| ended.and(other.join().expect("it does not panic")))
    })?;
    let verified = verified.into_iter().filter_map(|found| found.into_inner().expect("no holder panics"));
    let verified: Vec<Verified> = verified.collect();
    let page = report::page(repository.objects().url(), &verified);
    if let Some(file) = &command.report {
        let written = std::fs::write(file, &page);
        written.map_err(|e| Error::failed(format!("cannot write `{}`", file.display())).cause(e))?;
    }
    if output.json {
        output.print_json(&verified)?;
    }
    if let Some(mailer) = mailer {
        let sent = mailer.send(&report::mail(page, &verified));
        sent.map_err(|e| Error::failed("cannot mail the report").cause(e))?;
    }
    match verified.iter().filter(|found| !found.passed).count() {
        0 => Ok(()),
        failed => Err(Error::failed(format!("{failed} of {} machines did not come up", verified.len()))),
    }
}

impl Boot {
    fn at_once(&self) -> usize {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        self.parallel.map_or((processors / 2).max(1), usize::from)
    }

    /// Bytes that its machine will have; all there are where nobody can tell.
    fn memory_of(&self, point: &Point) -> u64 {
        if !self.arguments.is_empty() {
            return room::of_arguments(&self.arguments).unwrap_or(u64::MAX);
        }
        let definition =
            point.definition.as_ref().map(|definition| parse_definition(&definition.content, ""));
        // Where it makes no sense, nothing is started.
        let memory = definition.and_then(Result::ok).map_or(0, |definition| definition.memory_bytes);
        self.vm_memory.map_or(memory, |most| memory.min(most))
    }
}

/// One machine, and what there is to keep of it.
fn one(
    command: &Boot,
    repository: &Repository,
    cache: &Arc<ChunkCache>,
    (root, point): (u64, &Point),
    output: Output,
) -> Result<Verified, Error> {
    let mut found = Verified::of(root, point);
    output.tell(&format!("{}@{root}: it is started", point.vm));
    match machine(command, cache, point, &mut found, output) {
        Ok(()) => found.passed = found.why.is_none(),
        Err(error) => found.why = Some(error.cause.unwrap_or(error.message)),
    }
    match repository.keep_boot(root, &found.result(), now()) {
        Ok(()) => found.kept = true,
        Err(error) => {
            let name = format!("{}@{root}", point.vm);
            output.tell(&format!("{name}: the repository does not keep what came of it: {}", chain(&error)));
        }
    }
    if let Some(folder) = &command.screenshots
        && !found.screenshot.is_empty()
    {
        let file = folder.join(format!("{}@{root}.png", point.vm.replace('/', "%2F")));
        let written = std::fs::write(&file, &found.screenshot);
        written.map_err(|e| Error::failed(format!("cannot write `{}`", file.display())).cause(e))?;
        found.screenshot_file = Some(file);
    }
    found.tell(output);
    Ok(found)
}

fn mailer(file: &Path) -> Result<Mailer, Error> {
    let what = || format!("cannot mail by `{}`", file.display());
    let text = std::fs::read_to_string(file).map_err(|e| Error::invalid(what()).cause(e))?;
    let config: MailConfig = toml::from_str(&text).map_err(|e| Error::invalid(what()).cause(e.message()))?;
    Mailer::new(&config).map_err(|e| Error::invalid(what()).cause(e))
}

/// One machine, from its point to the end of its checks.
fn machine(
    command: &Boot,
    cache: &Arc<ChunkCache>,
    point: &Point,
    found: &mut Verified,
    output: Output,
) -> Result<(), Error> {
    let began = Instant::now();
    let what = format!("cannot start `{}@{}`", point.vm, found.point);
    let failed = |e: &dyn std::fmt::Display| Error::failed(&what).cause(e);
    let runtime = runtime().map_err(|e| failed(&e))?;
    let mut hardware = runtime.block_on(Hardware::of(point, &command.arguments, &command.qemu, &what))?;
    if let Some(bytes) = command.vm_memory {
        hardware.limit_memory(bytes);
    }
    found.accelerator = hardware.accelerator().map(|accelerator| accelerator.to_string());
    let scratch = Scratch::create(&command.scratch_dir).map_err(|e| failed(&e))?;
    let unreadable = Arc::new(Mutex::new(Vec::new()));
    let told = (unreadable.clone(), tell_unreadable(output));
    let (_socket, listener) = SocketFile::listen(&scratch.file("nbd.sock"))?;
    let disks: Vec<DiskReader> = point.disks.iter().map(|disk| disk_reader(cache, disk)).collect();
    let told = move |error: &_| {
        told.1(error);
        let mut unreadable = told.0.lock().expect("no holder panics");
        if unreadable.len() < MOST_UNREADABLE {
            unreadable.push(chain(error));
        }
    };
    let server = DiskServer::start(disks, Listener::Unix(listener), Box::new(told));
    let server = server.map_err(|e| failed(&chain(&e)))?;
    let nvram = point.nvram.as_ref().map(|(chunks, len)| cache.content(chunks, *len)).transpose();
    let nvram = nvram.map_err(|e| describe(&what, &e))?;
    let checks = match command.checks.is_empty() {
        true => vec![Check::of(point)],
        false => command.checks.clone(),
    };
    let mut ports: Vec<u16> = checks.iter().filter_map(Check::port).collect();
    ports.sort_unstable();
    ports.dedup();
    found.unchecked = unchecked(&checks);
    let mut probes: Vec<Probe> = checks.into_iter().map(Probe::new).collect();
    let start = Start {
        hardware: &hardware,
        disks: &point.disks,
        nvram: nvram.as_deref(),
        qemu: &command.qemu,
        scratch: &scratch,
        scratch_bytes: command.scratch_size,
        ports: &ports,
        address: command.guest_address,
        what: &what,
    };
    let timeout = Duration::from_secs(command.timeout);
    // On a thread of its own, whose network nobody else has; QEMU dies with that thread.
    let ran = std::thread::scope(|scope| {
        let attend = || {
            found.isolation = isolate(!ports.is_empty());
            runtime.block_on(attend(&start, &mut probes, began, timeout, found))
        };
        scope.spawn(attend).join().expect("it does not panic")
    });
    drop(server);
    found.checks = probes.into_iter().map(Checked::from).collect();
    found.unreadable = std::mem::take(&mut unreadable.lock().expect("no holder panics"));
    ran
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Gives this thread, and what it starts, a network of its own where nobody is. Says how far apart it is then.
fn isolate(has_network: bool) -> &'static str {
    // SAFETY: descriptors are shared as before.
    let apart = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) };
    // Its loopback is for those who ask the guest.
    let mut up = Command::new("ip");
    up.args(["link", "set", "lo", "up"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match (apart.is_ok(), has_network) {
        (true, false) => "no network; QEMU in a network namespace of its own",
        (true, true) => {
            // A failure shows: no connection reaches the guest.
            let _ = up.status();
            "a network of its own that leads nowhere; QEMU in a network namespace of its own"
        }
        (false, false) => "no network",
        (false, true) => "a network of its own that leads nowhere; its ports are open to this host meanwhile",
    }
}

/// Lets it run until all checks hold, or one cannot any more. An error: it was not started.
async fn attend(
    start: &Start<'_>,
    probes: &mut [Probe],
    began: Instant,
    timeout: Duration,
    found: &mut Verified,
) -> Result<(), Error> {
    let mut guest = start.machine().await?;
    let failed = |e: rempart_hypervisor::Error| Error::failed(start.what).cause(e);
    let mut events = guest.client.events();
    if guest.client.query_status().await.map_err(failed)?.status == "prelaunch" {
        guest.client.cont().await.map_err(failed)?;
    }
    let on = Instant::now();
    found.powered_on_ms = Some(milliseconds(began.elapsed()));
    found.why = loop {
        guest.console.listen();
        for probe in probes.iter_mut().filter(|probe| probe.held.is_none()) {
            if probe.look(&mut guest).await {
                probe.held = Some(began.elapsed());
            }
        }
        if probes.iter().all(|probe| probe.held.is_some()) {
            break None;
        }
        if on.elapsed() >= timeout {
            break Some(format!("not all checks held within {} s", timeout.as_secs()));
        }
        if let Ok(why) = tokio::time::timeout(TICK, end(&mut events, &mut found.resets)).await {
            break Some(why.unwrap_or_else(|| guest.ended()));
        }
    };
    found.ended_ms = Some(milliseconds(began.elapsed()));
    let held = probes.iter().filter_map(|probe| probe.held);
    found.answered_ms = held.min().map(milliseconds);
    see(&mut guest, found).await;
    Ok(())
}

/// What is left to be seen of it.
async fn see(guest: &mut Guest<'_>, found: &mut Verified) {
    found.disks_read_bytes = guest.read_bytes().await;
    if let Some((screenshot, is_blank)) = guest.screenshot().await {
        (found.screenshot, found.screen_is_blank) = (screenshot, Some(is_blank));
    }
    guest.console.listen();
    found.console = String::from_utf8_lossy(guest.console.tail(TOLD)).into_owned();
}

/// Waits for what it cannot go on after; none says that QEMU is gone.
async fn end(events: &mut EventStream, resets: &mut u32) -> Option<String> {
    loop {
        match events.next().await? {
            Heard::Event(Event::GuestPanicked) => return Some("its kernel panicked".to_owned()),
            Heard::Event(Event::Shutdown { by_guest: true, .. }) => {
                return Some("it switched itself off".to_owned());
            }
            Heard::Event(Event::BlockIoError { node_name, write, action, reason, .. })
                if action == "stop" =>
            {
                let what = if write { "written" } else { "read" };
                return Some(format!("`{node_name}` could not be {what}: {reason}"));
            }
            Heard::Event(Event::Reset { by_guest: true }) => *resets += 1,
            _ => {}
        }
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

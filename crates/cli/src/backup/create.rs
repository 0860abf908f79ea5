//! `rempart backup`.

use super::access::{Access, chain, now};
use super::consistency::ConsistencyArgs;
use super::leave_out::LeaveOutArgs;
use super::machine::{self, Machine};
use super::qemu::{Qemu, QemuArgs};
use crate::{Output, output::bytes, parse};
use clap::Args;
use rempart_api::{Client, Error, LastBoot, Progress as Shown};
use rempart_backup::{
    BackupError, Changes, DiskJob, FileSource, Pace, Progress, QemuImage, Source, back_up_disk,
};
use rempart_repository::{
    BackupWriter, ChunkSize, Consistency, ConsistencyLevel, Definition, MEMORY, Point, PointDisk, Repository,
    Written,
};
use rempart_types::WallTime;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What was removed by a collection in between, this many times in a row, is not bad luck.
const TRIES: u32 = 3;

/// Backs up virtual machines of this node, running or not, those of other QEMUs, or disks that nobody writes to.
#[derive(Debug, Args)]
pub struct Backup {
    #[command(flatten)]
    access: Access,
    /// The virtual machines: their restore points go by these names.
    #[arg(value_name = "VM", required_unless_present = "all")]
    vms: Vec<String>,
    /// Every virtual machine that this node leads; its peers have the others.
    #[arg(long, conflicts_with_all = ["vms", "disks", "qmp"])]
    all: bool,
    /// But for this one.
    #[arg(long, value_name = "VM", requires = "all")]
    exclude: Vec<String>,
    /// An image file or a block device instead of the machine's own disks; once a disk, in its order. Nobody may write to
    /// it meanwhile.
    #[arg(long = "disk")]
    disks: Vec<PathBuf>,
    /// The images' format, by QEMU's name of it, such as `qcow2` or `vmdk`.
    #[arg(long, default_value = "raw", requires = "disks")]
    format: String,
    #[command(flatten)]
    qemu: QemuArgs,
    #[command(flatten)]
    consistency: ConsistencyArgs,
    #[command(flatten)]
    how: How,
}

/// What holds for every machine of one command.
#[derive(Debug, Default, Args)]
struct How {
    /// What the point is for, as a note of it.
    #[arg(skip)]
    note: Option<String>,
    /// Send no more than so many bytes a second to the repository, such as `10M`.
    #[arg(long, value_name = "RATE", value_parser = parse::byte_count)]
    bandwidth: Option<u64>,
    #[command(flatten)]
    leave_out: LeaveOutArgs,
}

pub fn run(
    command: &Backup,
    client: impl FnOnce() -> Result<Client, Error>,
    output: Output,
) -> Result<(), Error> {
    let repository = command.access.open()?;
    match command.vms.as_slice() {
        [vm] => {
            let what = format!("cannot back up `{vm}`");
            let taker = match command.qemu.qemu(&command.consistency, &repository, vm)? {
                Some(qemu) => Taker::Qemu(Box::new(qemu)),
                None if command.disks.is_empty() => {
                    Taker::Machine(Machine::new(client()?, &command.consistency)?)
                }
                None => Taker::Images(open_images(command, &what)?),
            };
            let (written, point) = back_up_named(&repository, vm, &taker, &command.how, output)?;
            if output.json {
                return output.print_json(&shape(&repository, &written, &point));
            }
            tell(&written, &point, output);
            Ok(())
        }
        vms if command.qemu.is_wanted() || !command.disks.is_empty() => {
            Err(Error::invalid(format!("these disks are of one machine, and {} are named", vms.len())))
        }
        _ => back_up_many(command, &repository, Machine::new(client()?, &command.consistency)?, output),
    }
}

/// Backs up a machine of this node before it is changed; `note` says why. Returns the new point's number.
pub fn back_up_before(
    repository: &Arc<Repository>,
    client: Client,
    vm: &str,
    note: String,
    output: Output,
) -> Result<u64, Error> {
    let taker = Taker::Machine(Machine::new(client, &ConsistencyArgs::default())?);
    let how = How { note: Some(note), ..How::default() };
    let (written, point) = back_up_named(repository, vm, &taker, &how, output)?;
    tell(&written, &point, output);
    Ok(written.root)
}

/// Each machine is a point of its own, and one that cannot be backed up does not keep the others from it.
fn back_up_many(
    command: &Backup,
    repository: &Arc<Repository>,
    machine: Machine,
    output: Output,
) -> Result<(), Error> {
    let vms = if command.all { machine.led_here(&command.exclude)? } else { command.vms.clone() };
    let taker = Taker::Machine(machine);
    let (mut told, mut failed) = (Vec::new(), Vec::new());
    for vm in &vms {
        match back_up_named(repository, vm, &taker, &command.how, output) {
            Ok((written, point)) => {
                tell(&written, &point, output);
                told.push(shape(repository, &written, &point));
            }
            Err(error) => {
                output.tell(&error.to_string());
                told.push(json!({ "vm": vm, "error": error }));
                failed.push(vm.as_str());
            }
        }
    }
    if output.json {
        output.print_json(&told)?;
    }
    match failed.len() {
        0 => Ok(()),
        count => {
            let message = format!("{count} of {} machines were not backed up", vms.len());
            Err(Error::failed(message).cause(failed.join(", ")))
        }
    }
}

fn back_up_named(
    repository: &Arc<Repository>,
    vm: &str,
    taker: &Taker,
    how: &How,
    output: Output,
) -> Result<(Written, Point), Error> {
    for attempt in 1.. {
        match back_up(repository, vm, taker, how, output) {
            Err(Failure::Backup(error)) if error.is_stale() && attempt < TRIES => {
                output.tell("what it built on was removed meanwhile; once more");
            }
            ended => return ended.map_err(|e| e.tell(&format!("cannot back up `{vm}`"))),
        }
    }
    unreachable!("the last attempt returns")
}

/// A disk's name, and the disk.
type Image = (String, Box<dyn Source>);

/// Where the disks come from.
enum Taker {
    Images(Vec<Image>),
    Machine(Machine),
    Qemu(Box<Qemu>),
}

/// What is backed up at once: disks that stay as they are, and what else there is to keep.
pub struct Taken<'a> {
    /// The moment.
    pub at: WallTime,
    pub disks: Vec<TakenDisk<'a>>,
    pub definition: Option<Definition>,
    pub nvram: Option<Vec<u8>>,
    /// The guest's memory.
    pub memory: Option<&'a dyn Source>,
    pub consistency: Consistency,
    /// For people: what is not as it should be.
    pub notes: Vec<String>,
    /// Why the disks can be read no more, if that happened.
    pub lost: Box<dyn Fn() -> Option<Error> + 'a>,
}

pub struct TakenDisk<'a> {
    pub name: String,
    pub source: &'a dyn Source,
    pub position: Option<String>,
    pub changes: Changes<'a>,
}

enum Failure {
    Backup(BackupError),
    /// Who has the disks says so.
    Machine(Error),
}

impl<E: Into<BackupError>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Backup(error.into())
    }
}

impl Failure {
    fn tell(self, what: &str) -> Error {
        match self {
            Failure::Backup(error) => Error::failed(what).cause(chain(&error)),
            Failure::Machine(error) => {
                Error { hint: error.hint.clone(), ..Error::new(error.kind, what).cause(&error) }
            }
        }
    }
}

fn open_images(command: &Backup, what: &str) -> Result<Vec<Image>, Error> {
    let mut sources: Vec<Image> = Vec::new();
    for (number, path) in command.disks.iter().enumerate() {
        let opened = match command.format.as_str() {
            "raw" => FileSource::open(path).map(|source| Box::new(source) as Box<dyn Source>),
            format => QemuImage::open(path, format).map(|source| Box::new(source) as Box<dyn Source>),
        };
        let source = opened.map_err(|e| Error::invalid(what).cause(chain(&e)))?;
        sources.push((format!("disk{number}"), source));
    }
    Ok(sources)
}

/// Tells that the point before cannot be built on.
pub fn unreadable(vm: &str, output: Output) -> impl FnOnce(u64, &rempart_repository::Error) {
    move |root, error| {
        let why = chain(error);
        output.tell(&format!("the point before, `{vm}@{root}`, cannot be read, and everything is: {why}"));
    }
}

fn back_up(
    repository: &Arc<Repository>,
    vm: &str,
    taker: &Taker,
    how: &How,
    output: Output,
) -> Result<(Written, Point), Failure> {
    let mut writer = BackupWriter::open(repository.clone())?;
    writer.limit(how.bandwidth);
    if writer.is_of_a_writer(vm)? {
        // Whoever stole that key could pass newer points off as this machine's.
        return Err(Failure::Machine(
            Error::refused(format!("a key of the repository only adds restore points of `{vm}`"))
                .hint("back it up under another name, or remove that key: `rempart repo key list`"),
        ));
    }
    let chain = repository.chain(vm);
    let (base, before) = writer.before(chain, unreadable(vm, output))?.unzip();
    let before = before.as_ref();
    let chunk_len = u64::from(repository.chunk_size().bytes());
    match taker {
        Taker::Images(sources) => {
            let disks = sources.iter().map(|(name, source)| TakenDisk {
                name: name.clone(),
                source: &**source,
                position: None,
                changes: Changes::Unknown("nothing tells what changed in an image file".to_owned()),
            });
            let taken = Taken {
                at: now(),
                disks: disks.collect(),
                definition: None,
                nvram: None,
                memory: None,
                consistency: Consistency { level: ConsistencyLevel::Stopped, why: None, pause_ms: None },
                notes: Vec::new(),
                lost: Box::new(|| None),
            };
            store(repository, writer, vm, None, taken, &how.leave_out, output)
        }
        Taker::Machine(machine) => {
            let view = machine.view(vm, before.and_then(machine::position_of)).map_err(Failure::Machine)?;
            let mut taken = view.take(before, chunk_len)?;
            taken.notes.extend(how.note.clone());
            store(repository, writer, vm, base, taken, &how.leave_out, output)
        }
        Taker::Qemu(qemu) => {
            let view = qemu.view(before).map_err(Failure::Machine)?;
            let taken = view.take(before, chunk_len).map_err(Failure::Backup);
            let stored =
                taken.and_then(|taken| store(repository, writer, vm, base, taken, &how.leave_out, output));
            // Where it is not known whether the point is there, nothing is forgotten.
            qemu.end(stored.is_ok(), output);
            stored.map_err(|error| match error {
                Failure::Backup(error @ BackupError::Source(_)) => Failure::Machine(qemu.unreadable(&error)),
                error => error,
            })
        }
    }
}

fn store(
    repository: &Arc<Repository>,
    writer: BackupWriter,
    vm: &str,
    before: Option<u64>,
    taken: Taken<'_>,
    leave_out: &LeaveOutArgs,
    output: Output,
) -> Result<(Written, Point), Failure> {
    let builds_on = taken.disks.iter().any(|disk| matches!(disk.changes, Changes::Known { .. }));
    let sources = taken.disks.iter().map(|disk| disk.source).chain(taken.memory);
    let total = sources.map(Source::size).sum();
    let progress = Progress::default();
    let (mut disks, mut memory): (Vec<PointDisk>, _) = (Vec::new(), None);
    let mut notes = taken.notes;
    let phase = format!("back up {vm}");
    let new = || Some(writer.new_bytes());
    let stored = shown_with(output, &phase, total, &progress, new, || {
        let looked: Vec<_> = taken.disks.iter().map(|disk| (&disk.name[..], disk.source)).collect();
        let (left_out, remarks) = match taken.memory {
            // A guest that goes on from here needs all that it had.
            Some(_) => (vec![Vec::new(); looked.len()], Vec::new()),
            None => leave_out.look(&looked, taken.consistency.level, repository.chunk_size())?,
        };
        notes.extend(remarks);
        for (TakenDisk { name, source, position, changes }, left_out) in
            taken.disks.into_iter().zip(&left_out)
        {
            let job = DiskJob { name: &name, source, changes, position, left_out };
            disks.push(back_up_disk(&writer, repository.chunk_size(), &job, Pace::default(), &progress)?);
        }
        if let Some(source) = taken.memory {
            memory = Some(back_up_memory(&writer, repository.chunk_size(), source, &progress)?);
        }
        Ok(())
    });
    if let Err(error) = stored {
        // Why nothing can be read is more than that nothing can be read.
        return Err((taken.lost)().map_or(Failure::Backup(error), Failure::Machine));
    }
    let nvram = taken.nvram.map(|content| writer.keep(&content)).transpose()?;
    let point = Point {
        vm: vm.to_owned(),
        host: host_name(),
        taken: taken.at,
        ended: now(),
        consistency: taken.consistency,
        disks,
        definition: taken.definition,
        nvram,
        notes,
        files: None,
        memory,
    };
    let written = writer.commit(repository.chain(vm), before.filter(|_| builds_on), &point, None)?;
    Ok((written, point))
}

/// Stores a guest's memory as a disk is. Nothing of it is where it was the last time.
pub fn back_up_memory(
    writer: &BackupWriter,
    chunk_size: ChunkSize,
    source: &dyn Source,
    progress: &Progress,
) -> Result<PointDisk, BackupError> {
    let changes = Changes::Unknown("memory is stored whole each time".to_owned());
    let job = DiskJob { name: MEMORY, source, changes, position: None, left_out: &[] };
    back_up_disk(writer, chunk_size, &job, Pace::default(), progress)
}

/// Does something with its progress shown.
pub fn shown<T>(
    output: Output,
    phase: &str,
    total_bytes: u64,
    progress: &Progress,
    work: impl FnOnce() -> Result<T, BackupError>,
) -> Result<T, BackupError> {
    shown_with(output, phase, total_bytes, progress, || None, work)
}

/// Tells what of it is new to the repository, too.
fn shown_with<T>(
    output: Output,
    phase: &str,
    total_bytes: u64,
    progress: &Progress,
    new_bytes: impl Fn() -> Option<u64> + Sync,
    work: impl FnOnce() -> Result<T, BackupError>,
) -> Result<T, BackupError> {
    let told = || {
        let done_bytes = progress.done();
        let total_bytes = total_bytes.saturating_sub(progress.skipped()).max(done_bytes);
        Shown { phase: phase.to_owned(), done_bytes, total_bytes, new_bytes: new_bytes() }
    };
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let showing = scope.spawn(|| {
            let mut show = output.progress();
            while !over.load(Ordering::Acquire) {
                show.show(&told());
                std::thread::park_timeout(Duration::from_millis(200));
            }
            show.end(&told());
        });
        let ended = work();
        over.store(true, Ordering::Release);
        showing.thread().unpark();
        ended
    })
}

fn shape(repository: &Repository, written: &Written, point: &Point) -> serde_json::Value {
    json!({
        "repository": repository.id().to_string(),
        "vm": point.vm,
        "point": written.root,
        "read_bytes": point.contents().map(|disk| disk.how.read).sum::<u64>(),
        "new_bytes": written.new_bytes,
        "stored_bytes": written.stored_bytes,
        "seconds": point.ended.0.saturating_sub(point.taken.0) as f64 / 1000.0,
        "consistency": point.consistency,
        "notes": point.notes,
        "last_boot": written.last_boot.as_ref().map(|(point, result)| LastBoot {
            point: *point,
            at_unix_ms: result.at.0,
            passed: result.passed,
            answered_ms: result.answered_ms,
            why: result.why.clone(),
        }),
        "memory": point.memory.as_ref().map(|memory| json!({
            "size_bytes": memory.size, "new_bytes": memory.how.new,
        })),
        "disks": point.disks.iter().map(|disk| json!({
            "disk": disk.name, "size_bytes": disk.size, "read_bytes": disk.how.read,
            "new_bytes": disk.how.new, "full_because": disk.how.full_because,
            "left_out_bytes": disk.excluded.iter().map(|one| one.len).sum::<u64>(),
        })).collect::<Vec<_>>(),
    })
}

fn tell(written: &Written, point: &Point, output: Output) {
    output.tell(&format!(
        "`{vm}@{}`: read {}, of it new {}, stored {}",
        written.root,
        bytes(point.contents().map(|disk| disk.how.read).sum()),
        bytes(written.new_bytes),
        bytes(written.stored_bytes),
        vm = point.vm
    ));
    for disk in &point.disks {
        if let Some(why) = &disk.how.full_because {
            output.tell(&format!("`{}` was read in full: {why}", disk.name));
        }
    }
    tell_left_out(&point.disks, output);
    if let Some(memory) = &point.memory {
        let size = bytes(memory.size);
        output.tell(&format!("memory: {size}; without it the disks are as after a power cut"));
    }
    let Consistency { level, why, pause_ms } = &point.consistency;
    let why = why.as_ref().map_or(String::new(), |why| format!(": {why}"));
    let pause = pause_ms.map_or(String::new(), |pause| format!("; the guest stood still for {pause} ms"));
    output.tell(&format!("consistency: {}{why}{pause}", level_name(*level)));
    for note in &point.notes {
        output.tell(&format!("note: {note}"));
    }
}

pub fn tell_left_out(disks: &[PointDisk], output: Output) {
    for disk in disks {
        let left_out: u64 = disk.excluded.iter().map(|one| one.len).sum();
        if left_out > 0 {
            let reasons: BTreeSet<&str> = disk.excluded.iter().map(|one| one.reason.as_str()).collect();
            let reasons = Vec::from_iter(reasons).join(", ");
            output.tell(&format!("`{}`: {} were left out ({reasons})", disk.name, bytes(left_out)));
        }
    }
}

/// As in JSON.
pub fn level_name(level: ConsistencyLevel) -> String {
    let name = serde_json::to_value(level).expect("a level is plain data");
    name.as_str().expect("it is a text").to_owned()
}

pub fn host_name() -> String {
    let read = std::fs::read_to_string("/proc/sys/kernel/hostname");
    read.map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

//! `rempart agent`: backups from within a machine.

use super::access::{Access, chain, now};
use super::create::{host_name, level_name, shown, tell_left_out};
use super::files::shown_path;
use super::leave_out::LeaveOutArgs;
use crate::{Output, output::bytes, parse};
use clap::{Args, Subcommand, ValueEnum};
use rempart_api::Error;
use rempart_backup::{
    BackupError, Changes, DiskJob, FileSource, FilesJob, FreezeError, FrozenDevices, FrozenSource, Pace,
    Progress, Selection, Source, StoredFiles, Thawed, VolumeSnapshot, back_up_disk, back_up_files,
    thaw_file_systems,
};
use rempart_repository::{
    BackupWriter, Consistency, ConsistencyLevel, FileTree, HowRead, Point, PointDisk, Repository, WriterName,
    Written,
};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// The hidden command of the process that thaws what was frozen.
pub const THAW: &str = "thaw-file-systems";

/// What was removed by a collection in between, this many times in a row, is not bad luck.
const TRIES: u32 = 3;

/// Subcommands of `rempart agent`.
#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Back up files and block devices of the machine that this runs in.
    Backup(Box<AgentBackup>),
}

/// Backs up files and block devices of the machine that this runs in, for machines whose host cannot. A key is enough that
/// only adds: `rempart repo key add --write-only`.
///
/// Of files that did not change since the backup before nothing is read. They are read one after the other, while the
/// machine goes on.
#[derive(Debug, Args)]
pub struct AgentBackup {
    #[command(flatten)]
    access: Access,
    /// Restore points go by this name. A key that only adds has one; without either it is the host's.
    #[arg(long)]
    name: Option<String>,
    /// A folder with all that is in it on its file system, or a file. Of a btrfs subvolume a snapshot is made for the time that
    /// it is read.
    #[arg(long = "path", value_name = "PATH", required_unless_present = "devices")]
    paths: Vec<PathBuf>,
    /// A block device, whole. Of a logical volume (LVM) a snapshot is made for the time that it is read.
    #[arg(long = "device", value_name = "DEVICE")]
    devices: Vec<PathBuf>,
    /// Room of such a snapshot for what is overwritten meanwhile; without it, a tenth of the volume. A volume on which more is
    /// overwritten is not backed up.
    #[arg(long, value_name = "SIZE", value_parser = parse::byte_count, requires = "devices")]
    snapshot_size: Option<u64>,
    /// Read logical volumes and btrfs subvolumes as they are, without a snapshot.
    #[arg(long, conflicts_with = "snapshot_size")]
    no_snapshot: bool,
    /// Freeze the file systems on devices of which no snapshot is made, for as long as these are read: nobody can write to them
    /// meanwhile. Never that of the root, nor one that the repository, the cache or the output of this command is on.
    #[arg(long, requires = "devices")]
    freeze: bool,
    /// How long they may stay frozen, such as `5m`. They are thawed then, whatever happens.
    #[arg(long, value_name = "DURATION", value_parser = parse::seconds, default_value = "60s", requires = "freeze")]
    freeze_timeout: u64,
    /// What is good enough where they cannot be frozen, or not until all is read.
    #[arg(long = "else", value_enum, default_value = "nothing", requires = "freeze")]
    otherwise: Enough,
    #[command(flatten)]
    leave_out: LeaveOutArgs,
    /// Leave out what a pattern matches: one without a slash that of names, such as `*.tmp`, others that of whole paths, such as
    /// `/var/cache/**`.
    #[arg(long, value_name = "PATTERN", requires = "paths")]
    exclude: Vec<String>,
    /// Leave folders empty that say that they are caches, by a file `CACHEDIR.TAG`.
    #[arg(long, requires = "paths")]
    exclude_caches: bool,
    /// Send no more than so many bytes a second to the repository, such as `10M`.
    #[arg(long, value_name = "RATE", value_parser = parse::byte_count)]
    bandwidth: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Enough {
    /// Nothing: there is no backup then.
    Nothing,
    /// The devices as they are read, one part after the other, while they are in use.
    Live,
}

/// What is backed up.
struct Job {
    name: String,
    selection: Option<Selection>,
    devices: Vec<Device>,
    freeze: Option<Freeze>,
    /// Why a file system is read without a snapshot, or without being frozen.
    no_better: Option<String>,
    leave_out: LeaveOutArgs,
    bandwidth: Option<u64>,
}

struct Device {
    name: String,
    path: PathBuf,
    /// What is read in its place.
    snapshot: Option<VolumeSnapshot>,
}

impl Device {
    fn open(&self) -> Result<FileSource, BackupError> {
        let read = self.snapshot.as_ref().map_or(self.path.as_path(), VolumeSnapshot::path);
        Ok(FileSource::open(read)?)
    }
}

struct Freeze {
    limit: Duration,
    /// What is written to meanwhile.
    written: Vec<(&'static str, PathBuf)>,
}

impl Freeze {
    fn of(command: &AgentBackup, repository: &Repository) -> Result<Freeze, Error> {
        let what = "cannot tell what is written to";
        let cache = repository.cache_folder().map_err(|e| Error::failed(what).cause(chain(&e)))?;
        let mut written = vec![
            ("the cache", cache),
            ("the standard output", PathBuf::from("/proc/self/fd/1")),
            ("the standard error", PathBuf::from("/proc/self/fd/2")),
        ];
        // In a bucket nothing here is.
        if let Ok(folder) = std::fs::canonicalize(command.access.place()?.url()) {
            written.insert(0, ("the repository", folder));
        }
        Ok(Freeze { limit: Duration::from_secs(command.freeze_timeout), written })
    }

    /// Those devices that no snapshot was made of.
    fn freeze(&self, devices: &[Device]) -> Result<Option<FrozenDevices>, FreezeError> {
        let devices: Vec<&Path> =
            devices.iter().filter(|device| device.snapshot.is_none()).map(|device| &*device.path).collect();
        if devices.is_empty() {
            return Ok(None);
        }
        // This program, also where another one has taken its place since.
        let mut child = Command::new("/proc/self/exe");
        FrozenDevices::freeze(&devices, &self.written, child.arg(THAW), self.limit).map(Some)
    }
}

struct Made {
    written: Written,
    point: Point,
    unread: Vec<(Vec<u8>, String)>,
}

pub fn run(command: AgentCommand, output: Output) -> Result<(), Error> {
    let AgentCommand::Backup(command) = command;
    let repository = command.access.open_to_add()?;
    let name = name(&command, &repository)?;
    let what = format!("cannot back up `{name}`");
    let devices = devices(&command, &what)?;
    let mut selection = selection(&command)?;
    let failed = selection.as_mut().filter(|_| !command.no_snapshot).and_then(Selection::take_snapshots);
    let no_better = failed.map(|error| chain(&error));
    let freeze = command.freeze.then(|| Freeze::of(&command, &repository)).transpose()?;
    let (leave_out, bandwidth) = (command.leave_out, command.bandwidth);
    let mut job = Job { name, selection, devices, freeze, no_better, leave_out, bandwidth };
    let mut attempt = 1;
    let made = loop {
        match back_up(&repository, &job, output) {
            Err(BackupError::Freeze(error)) if command.otherwise == Enough::Live => {
                output.tell(&format!("{error}: it is read as it is"));
                job.freeze = None;
                job.no_better = Some(error.to_string());
            }
            Err(BackupError::Freeze(error)) => {
                let hint = if error.hint.is_empty() { "`--else live` reads it as it is" } else { error.hint };
                return Err(Error::refused(&what).cause(&error).hint(hint));
            }
            Err(error) if error.is_stale() && attempt < TRIES => {
                output.tell("what it built on was removed meanwhile; once more");
                attempt += 1;
            }
            ended => break ended.map_err(|e| Error::failed(&what).cause(chain(&e)))?,
        }
    };
    if output.json {
        output.print_json(&shape(&repository, &made))?;
    }
    tell(&made, output);
    let unread = made.point.files.as_ref().map_or(0, |files| files.unread);
    if unread == 0 {
        return Ok(());
    }
    let (path, why) = made.unread.first().expect("the first ones are named");
    let point = format!("{}@{}", made.point.vm, made.written.root);
    Err(Error::failed(format!("{unread} files or folders could not be read, and are not in `{point}`"))
        .cause(format!("{}: {why}", shown_path(path)))
        .hint(format!("all else is; `rempart files {point}` marks them")))
}

fn name(command: &AgentBackup, repository: &Repository) -> Result<String, Error> {
    let of_key = repository.writer().name().map(WriterName::as_str);
    match (of_key, &command.name) {
        (Some(of_key), Some(name)) if name != of_key => {
            Err(Error::invalid(format!("the key adds restore points of `{of_key}`, and of nothing else")))
        }
        (Some(of_key), _) => Ok(of_key.to_owned()),
        (None, Some(name)) => Ok(name.clone()),
        (None, None) => Ok(host_name()),
    }
}

fn selection(command: &AgentBackup) -> Result<Option<Selection>, Error> {
    if command.paths.is_empty() {
        return Ok(None);
    }
    let excluded = Selection::patterns(&command.exclude).map_err(|e| Error::invalid(chain(&e)))?;
    let selection = Selection::new(&command.paths, excluded, command.exclude_caches);
    selection.map(Some).map_err(|e| Error::invalid("cannot back up what is not there").cause(chain(&e)))
}

fn devices(command: &AgentBackup, what: &str) -> Result<Vec<Device>, Error> {
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut names: Vec<String> = command.devices.iter().map(name).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::invalid(what).cause(format!("two devices have the name `{}`", twice[0])));
    }
    if !command.devices.is_empty() && !command.no_snapshot {
        // Of one that was killed.
        VolumeSnapshot::remove_leftovers();
    }
    let open = |path: &PathBuf| {
        let snapshot = if command.no_snapshot {
            None
        } else {
            let made = VolumeSnapshot::of(path, command.snapshot_size);
            made.map_err(|e| {
                Error::failed(what).cause(chain(&e)).hint("`--no-snapshot` reads the volume as it is")
            })?
        };
        let device = Device { name: name(path), path: path.clone(), snapshot };
        device.open().map_err(|e| Error::invalid(what).cause(chain(&e)))?;
        Ok(device)
    };
    command.devices.iter().map(open).collect()
}

fn consistency(job: &Job, thawed: Option<&Thawed>) -> Consistency {
    let of_files = job.selection.as_ref().map_or(Some(0), Selection::snapshots);
    let of_devices = job.devices.iter().filter(|device| device.snapshot.is_some()).count();
    let all_stand_still = of_devices == job.devices.len() || thawed.is_some();
    let snapshots = of_files.filter(|_| all_stand_still).map(|files| files + of_devices);
    let (level, why) = match (snapshots, thawed) {
        (None, _) => (
            ConsistencyLevel::Live,
            "read one part after the other, while it may have been in use".to_owned(),
        ),
        (Some(0), Some(Thawed { file_systems, .. })) if file_systems.is_empty() => {
            (ConsistencyLevel::FileSystem, "nothing on it was mounted, nor could be meanwhile".to_owned())
        }
        (Some(0), Some(Thawed { file_systems, .. })) => {
            let points: Vec<_> = file_systems.iter().map(|point| format!("`{}`", point.display())).collect();
            let why = format!("{} frozen while they were read; no application was told", points.join(", "));
            (ConsistencyLevel::FileSystem, why)
        }
        (Some(1), None) => {
            (ConsistencyLevel::Crash, "a snapshot; nothing in the machine was told".to_owned())
        }
        (Some(_), None) => {
            let why = "snapshots, made one after the other; nothing in the machine was told";
            (ConsistencyLevel::Crash, why.to_owned())
        }
        (Some(_), Some(_)) => {
            let why = "snapshots, and file systems that were frozen after that; no application was told";
            (ConsistencyLevel::Crash, why.to_owned())
        }
    };
    let why = match &job.no_better {
        Some(failed) => format!("{why}: {failed}"),
        None => why,
    };
    let frozen_for = thawed.filter(|thawed| !thawed.file_systems.is_empty()).map(|thawed| thawed.frozen_for);
    Consistency { level, why: Some(why), pause_ms: frozen_for.map(|time| time.as_millis() as u64) }
}

fn back_up(repository: &Arc<Repository>, job: &Job, output: Output) -> Result<Made, BackupError> {
    let mut writer = BackupWriter::open(repository.clone())?;
    writer.limit(job.bandwidth);
    let frozen = job.freeze.as_ref().map(|freeze| freeze.freeze(&job.devices)).transpose()?.flatten();
    let taken = now();
    let read = read_devices(repository, &writer, job, frozen.as_ref(), output);
    let thawed = match frozen {
        // Why nothing can be read any more is more than that nothing can be read.
        Some(frozen) if frozen.is_over() || read.is_ok() => Some(frozen.thaw()?),
        _ => None,
    };
    let (disks, remarks) = read?;
    let files = match &job.selection {
        Some(selection) => Some(read_files(repository, &writer, selection, output)?),
        None => None,
    };
    let (tree, unread, mut notes, known) = match files {
        Some(StoredFiles { tree, unread, notes, known }) => (Some(tree), unread, notes, Some(known)),
        None => Default::default(),
    };
    notes.extend(remarks);
    let point = Point {
        vm: job.name.clone(),
        host: host_name(),
        taken,
        ended: now(),
        consistency: consistency(job, thawed.as_ref()),
        disks,
        definition: None,
        nvram: None,
        notes,
        files: tree,
        memory: None,
    };
    let written = writer.commit(repository.chain(&job.name), None, &point, None)?;
    if let Some(Err(error)) = known.map(|known| known.keep()) {
        // The point is there all the same.
        output.tell(&format!("the next backup reads all files: {}", chain(&error)));
    }
    Ok(Made { written, point, unread })
}

/// The devices, and remarks on what was left out of them.
fn read_devices(
    repository: &Repository,
    writer: &BackupWriter,
    job: &Job,
    frozen: Option<&FrozenDevices>,
    output: Output,
) -> Result<(Vec<PointDisk>, Vec<String>), BackupError> {
    // Not before they stand still: who opens a device forgets what was cached of it.
    let opened = job.devices.iter().map(Device::open).collect::<Result<Vec<_>, _>>()?;
    let still: Vec<Option<FrozenSource<'_>>> = job
        .devices
        .iter()
        .zip(&opened)
        .map(|(device, source)| frozen.filter(|_| device.snapshot.is_none()).map(|it| it.source(source)))
        .collect();
    let mut sources: Vec<(&str, &dyn Source)> = Vec::new();
    for ((device, source), still) in job.devices.iter().zip(&opened).zip(&still) {
        sources.push((&device.name, still.as_ref().map_or(source as &dyn Source, |still| still)));
    }
    let level = match (job.devices.iter().filter(|device| device.snapshot.is_some()).count(), frozen) {
        (0, Some(_)) => ConsistencyLevel::FileSystem,
        (snapshots, None) if snapshots < job.devices.len() => ConsistencyLevel::Live,
        _ => ConsistencyLevel::Crash,
    };
    let (left_out, remarks) = if sources.is_empty() {
        Default::default()
    } else {
        job.leave_out.look(&sources, level, repository.chunk_size())?
    };
    let mut disks: Vec<PointDisk> = Vec::new();
    for ((name, source), left_out) in sources.into_iter().zip(&left_out) {
        let progress = Progress::default();
        let changes = Changes::Unknown("nothing tells what changed on a device".to_owned());
        let job = DiskJob { name, source, changes, position: None, left_out };
        disks.push(shown(output, &format!("read {name}"), source.size(), &progress, || {
            back_up_disk(writer, repository.chunk_size(), &job, Pace::default(), &progress)
        })?);
    }
    Ok((disks, remarks))
}

/// The process that thaws.
pub fn thaw() -> Result<(), Error> {
    thaw_file_systems().map_err(|e| Error::failed("cannot watch over what is frozen").cause(e))
}

fn read_files(
    repository: &Repository,
    writer: &BackupWriter,
    selection: &Selection,
    output: Output,
) -> Result<StoredFiles, BackupError> {
    let cache = repository.cache_folder()?;
    let files = FilesJob { selection, cache: &cache };
    let progress = Progress::default();
    // How much there is to read is known when it is read.
    shown(output, "read files", 0, &progress, || back_up_files(writer, &files, Pace::default(), &progress))
}

fn shape(repository: &Repository, made: &Made) -> serde_json::Value {
    let Made { written, point, unread } = made;
    let unread = unread.iter().map(|(path, why)| json!({ "path": shown_path(path), "why": why }));
    let read = |how: &HowRead| json!({ "read_bytes": how.read, "new_bytes": how.new, "full_because": how.full_because });
    json!({
        "repository": repository.id().to_string(),
        "vm": point.vm,
        "point": written.root,
        "new_bytes": written.new_bytes,
        "stored_bytes": written.stored_bytes,
        "seconds": point.ended.0.saturating_sub(point.taken.0) as f64 / 1000.0,
        "consistency": point.consistency,
        "notes": point.notes,
        "files": point.files.as_ref().map(|files| json!({
            "entries": files.entries, "size_bytes": files.bytes, "unread": files.unread, "how": read(&files.how),
        })),
        "unread": unread.collect::<Vec<_>>(),
        "disks": point.disks.iter().map(|disk| json!({
            "disk": disk.name, "size_bytes": disk.size, "how": read(&disk.how),
            "left_out_bytes": disk.excluded.iter().map(|one| one.len).sum::<u64>(),
        })).collect::<Vec<_>>(),
    })
}

fn tell(made: &Made, output: Output) {
    let Made { written, point, unread } = made;
    let hows = point.files.iter().map(|files| &files.how).chain(point.disks.iter().map(|disk| &disk.how));
    output.tell(&format!(
        "`{}@{}`: read {}, of it new {}, stored {}",
        point.vm,
        written.root,
        bytes(hows.clone().map(|how| how.read).sum()),
        bytes(written.new_bytes),
        bytes(written.stored_bytes)
    ));
    tell_left_out(&point.disks, output);
    if let Some(FileTree { entries, bytes: size, how, .. }) = &point.files {
        output.tell(&format!("{entries} files and folders, {}", bytes(*size)));
        if let Some(why) = &how.full_because {
            output.tell(&format!("every file was read: {why}"));
        }
    }
    let Consistency { level, why, pause_ms } = &point.consistency;
    let pause = pause_ms.map_or(String::new(), |pause| format!("; nobody could write for {pause} ms"));
    output.tell(&format!(
        "consistency: {}: {}{pause}",
        level_name(*level),
        why.as_deref().unwrap_or_default()
    ));
    for (path, why) in unread {
        output.tell(&format!("not read: {}: {why}", shown_path(path)));
    }
    for note in &point.notes {
        output.tell(&format!("note: {note}"));
    }
}

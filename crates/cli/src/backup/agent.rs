//! `rempart agent`: backups from within a machine.

use super::access::{Access, chain, now};
use super::create::{host_name, level_name, shown};
use super::files::shown_path;
use crate::{Output, output::bytes, parse};
use clap::{Args, Subcommand};
use rempart_api::Error;
use rempart_backup::{
    BackupError, Changes, DiskJob, FileSource, FilesJob, Pace, Progress, Selection, StoredFiles,
    VolumeSnapshot, back_up_disk, back_up_files,
};
use rempart_repository::{
    BackupWriter, Consistency, ConsistencyLevel, FileTree, HowRead, Point, PointDisk, Repository, WriterName,
    Written,
};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;

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

/// What is backed up.
struct Job {
    name: String,
    selection: Option<Selection>,
    devices: Vec<Device>,
    /// Why a file system is read without one.
    no_snapshot: Option<String>,
    bandwidth: Option<u64>,
}

struct Device {
    name: String,
    source: FileSource,
    /// What is read in its place. Dropped last.
    snapshot: Option<VolumeSnapshot>,
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
    let no_snapshot = failed.map(|error| chain(&error));
    let job = Job { selection, devices, no_snapshot, bandwidth: command.bandwidth, name };
    let mut attempt = 1;
    let made = loop {
        match back_up(&repository, &job, output) {
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
        let read = snapshot.as_ref().map_or(path.as_path(), VolumeSnapshot::path);
        let source = FileSource::open(read).map_err(|e| Error::invalid(what).cause(chain(&e)))?;
        Ok(Device { name: name(path), source, snapshot })
    };
    command.devices.iter().map(open).collect()
}

fn consistency(job: &Job) -> Consistency {
    let of_files = job.selection.as_ref().map_or(Some(0), Selection::snapshots);
    let of_devices =
        job.devices.iter().map(|device| device.snapshot.as_ref().map(|_| 1)).sum::<Option<usize>>();
    let (level, why) = match of_files.zip(of_devices).map(|(files, devices)| files + devices) {
        None => (ConsistencyLevel::Live, "read one part after the other, while it may have been in use"),
        Some(1) => (ConsistencyLevel::Crash, "a snapshot; nothing in the machine was told"),
        Some(_) => {
            (ConsistencyLevel::Crash, "snapshots, made one after the other; nothing in the machine was told")
        }
    };
    let why = match &job.no_snapshot {
        Some(failed) => format!("{why}: {failed}"),
        None => why.to_owned(),
    };
    Consistency { level, why: Some(why), pause_ms: None }
}

fn back_up(repository: &Arc<Repository>, job: &Job, output: Output) -> Result<Made, BackupError> {
    let taken = now();
    let mut writer = BackupWriter::open(repository.clone())?;
    writer.limit(job.bandwidth);
    let mut disks: Vec<PointDisk> = Vec::new();
    for Device { name, source, .. } in &job.devices {
        let progress = Progress::default();
        let changes = Changes::Unknown("nothing tells what changed on a device".to_owned());
        let job = DiskJob { name, source, changes, position: None, left_out: &[] };
        let total = rempart_backup::Source::size(source);
        disks.push(shown(output, &format!("read {name}"), total, &progress, || {
            back_up_disk(&writer, repository.chunk_size(), &job, Pace::default(), &progress)
        })?);
    }
    let files = match &job.selection {
        Some(selection) => Some(read_files(repository, &writer, selection, output)?),
        None => None,
    };
    let (tree, unread, notes, known) = match files {
        Some(StoredFiles { tree, unread, notes, known }) => (Some(tree), unread, notes, Some(known)),
        None => Default::default(),
    };
    let point = Point {
        vm: job.name.clone(),
        host: host_name(),
        taken,
        ended: now(),
        consistency: consistency(job),
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
    if let Some(FileTree { entries, bytes: size, how, .. }) = &point.files {
        output.tell(&format!("{entries} files and folders, {}", bytes(*size)));
        if let Some(why) = &how.full_because {
            output.tell(&format!("every file was read: {why}"));
        }
    }
    let Consistency { level, why, .. } = &point.consistency;
    output.tell(&format!("consistency: {}: {}", level_name(*level), why.as_deref().unwrap_or_default()));
    for (path, why) in unread {
        output.tell(&format!("not read: {}: {why}", shown_path(path)));
    }
    for note in &point.notes {
        output.tell(&format!("note: {note}"));
    }
}

//! `rempart backup`.

use super::access::{Access, chain, now};
use crate::{Output, output::bytes};
use clap::Args;
use rempart_api::{Error, Progress as Shown};
use rempart_backup::{
    BackupError, Changes, DiskJob, FileSource, Pace, Progress, QemuImage, Source, back_up_disk,
};
use rempart_repository::{
    BackupWriter, Consistency, ConsistencyLevel, Point, PointDisk, Repository, Written,
};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What was removed by a collection in between, this many times in a row, is not bad luck.
const TRIES: u32 = 3;

/// Backs up disks that nobody writes to meanwhile.
#[derive(Debug, Args)]
pub struct Backup {
    #[command(flatten)]
    access: Access,
    /// The virtual machine that the disks are of: its restore points go by this name.
    vm: String,
    /// An image file or a block device; once a disk, in the machine's order. Nobody may write to it meanwhile.
    #[arg(long = "disk", required = true)]
    disks: Vec<PathBuf>,
    /// The images' format, by QEMU's name of it, such as `qcow2` or `vmdk`.
    #[arg(long, default_value = "raw")]
    format: String,
}

pub fn run(command: &Backup, output: Output) -> Result<(), Error> {
    let repository = command.access.open()?;
    let what = format!("cannot back up `{}`", command.vm);
    let mut sources: Vec<(String, Box<dyn Source>)> = Vec::new();
    for (number, path) in command.disks.iter().enumerate() {
        let opened = match command.format.as_str() {
            "raw" => FileSource::open(path).map(|source| Box::new(source) as Box<dyn Source>),
            format => QemuImage::open(path, format).map(|source| Box::new(source) as Box<dyn Source>),
        };
        let source = opened.map_err(|e| Error::invalid(&what).cause(chain(&e)))?;
        sources.push((format!("disk{number}"), source));
    }
    for _ in 1..TRIES {
        match back_up(&repository, &command.vm, &sources, output) {
            Err(error) if error.is_stale() => {
                output.tell("what it built on was removed meanwhile; once more")
            }
            ended => return tell(command, &repository, ended.map_err(|e| failed(&what, &e))?, output),
        }
    }
    let ended = back_up(&repository, &command.vm, &sources, output);
    tell(command, &repository, ended.map_err(|e| failed(&what, &e))?, output)
}

fn failed(what: &str, error: &BackupError) -> Error {
    Error::failed(what).cause(chain(error))
}

fn back_up(
    repository: &Arc<Repository>,
    vm: &str,
    sources: &[(String, Box<dyn Source>)],
    output: Output,
) -> Result<(Written, Point), BackupError> {
    let taken = now();
    let writer = BackupWriter::open(repository.clone())?;
    let total: u64 = sources.iter().map(|(_, source)| source.size()).sum();
    let mut disks: Vec<PointDisk> = Vec::new();
    let progress = Progress::default();
    shown(output, "read", total, &progress, || {
        for (name, source) in sources {
            let why = "nothing tells what changed in an image file".to_owned();
            let job = DiskJob { name, source: &**source, changes: Changes::Unknown(why), position: None };
            let disk = back_up_disk(&writer, repository.chunk_size(), &job, Pace::default(), &progress)?;
            disks.push(disk);
        }
        Ok(())
    })?;
    let point = Point {
        vm: vm.to_owned(),
        host: host_name(),
        taken,
        ended: now(),
        consistency: Consistency { level: ConsistencyLevel::Stopped, why: None, pause_ms: None },
        disks,
        definition: None,
        nvram: None,
        notes: Vec::new(),
    };
    let written = writer.commit(repository.chain(vm), None, &point, None)?;
    Ok((written, point))
}

/// Does something with its progress shown.
pub fn shown<T>(
    output: Output,
    phase: &str,
    total_bytes: u64,
    progress: &Progress,
    work: impl FnOnce() -> Result<T, BackupError>,
) -> Result<T, BackupError> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let showing = scope.spawn(|| {
            let mut show = output.progress();
            while !over.load(Ordering::Acquire) {
                let done_bytes = progress.done();
                show.show(&Shown { phase: phase.to_owned(), done_bytes, total_bytes });
                std::thread::park_timeout(Duration::from_millis(200));
            }
            show.finish();
        });
        let ended = work();
        over.store(true, Ordering::Release);
        showing.thread().unpark();
        ended
    })
}

fn tell(
    command: &Backup,
    repository: &Repository,
    (written, point): (Written, Point),
    output: Output,
) -> Result<(), Error> {
    let read: u64 = point.disks.iter().map(|disk| disk.how.read).sum();
    if output.json {
        return output.print_json(&json!({
            "repository": repository.id().to_string(),
            "vm": command.vm,
            "point": written.root,
            "read_bytes": read,
            "new_bytes": written.new_bytes,
            "stored_bytes": written.stored_bytes,
            "seconds": point.ended.0.saturating_sub(point.taken.0) as f64 / 1000.0,
            "consistency": point.consistency.level,
            "disks": point.disks.iter().map(|disk| json!({
                "disk": disk.name, "size_bytes": disk.size, "read_bytes": disk.how.read,
                "new_bytes": disk.how.new, "full_because": disk.how.full_because,
            })).collect::<Vec<_>>(),
        }));
    }
    output.tell(&format!(
        "`{vm}@{}`: read {}, of it new {}, stored {}",
        written.root,
        bytes(read),
        bytes(written.new_bytes),
        bytes(written.stored_bytes),
        vm = command.vm
    ));
    Ok(())
}

fn host_name() -> String {
    let read = std::fs::read_to_string("/proc/sys/kernel/hostname");
    read.map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

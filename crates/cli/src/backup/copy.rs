//! `rempart copy`.

use super::access::{Access, CommandLineFirst, KeyArgs, KeyOptions, chain, describe, now};
use super::create::{back_up_memory, shown, unreadable};
use super::in_use::InUse;
use super::points::{all, find, open_log, time};
use crate::{Output, output::bytes, parse};
use clap::Args;
use rempart_api::Error;
use rempart_backup::{
    BackupError, Changes, ChunkCache, Content, DiskJob, Pace, PointSource, Progress, back_up_disk, copy_files,
};
use rempart_repository::log::Log;
use rempart_repository::{
    BackupWriter, BlobReader, Decompressor, FileTree, Point, PointDisk, Repository, RepositoryId, Written,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Chunks of the first repository that are kept in memory.
const MEMORY: u64 = 64 << 20;
/// What was removed by a collection in between, this many times in a row, is not bad luck.
const TRIES: u32 = 3;

/// Copies restore points into a second repository, with keys of its own. What is there already is not sent again: after an
/// interruption the same command goes on. A point that follows one that was copied reads only what differs.
#[derive(Debug, Args)]
pub struct Copy {
    #[command(flatten)]
    access: Access,
    /// `VM` for its newest point, or `VM@POINT`.
    #[arg(required_unless_present = "all")]
    points: Vec<String>,
    /// Every point that is not there yet, the oldest first.
    #[arg(long, conflicts_with = "points")]
    all: bool,
    /// The second repository.
    #[arg(long, value_name = "REPO", env = "REMPART_COPY_REPOSITORY")]
    to: String,
    #[command(flatten)]
    key: CommandLineFirst<ToKey>,
    /// Credentials of the second repository's bucket, as `--credentials`.
    #[arg(long, value_name = "FILE", env = "REMPART_COPY_CREDENTIALS_FILE")]
    to_credentials: Option<PathBuf>,
    /// Send no more than so many bytes a second, such as `2M`.
    #[arg(long, value_name = "RATE", value_parser = parse::byte_count)]
    bandwidth: Option<u64>,
}

#[derive(Debug, Clone, Args)]
struct ToKey {
    /// A key file of the second repository.
    #[arg(long, value_name = "FILE", env = "REMPART_COPY_KEY_FILE")]
    to_key_file: Option<PathBuf>,
    /// A file whose first line is the second repository's passphrase.
    #[arg(long, value_name = "FILE", env = "REMPART_COPY_PASSPHRASE_FILE")]
    to_passphrase_file: Option<PathBuf>,
}

impl KeyOptions for ToKey {
    const NAMES: [&str; 2] = ["to_key_file", "to_passphrase_file"];

    fn files(&mut self) -> [&mut Option<PathBuf>; 2] {
        [&mut self.to_key_file, &mut self.to_passphrase_file]
    }
}

/// Where a copy is from; in place of a disk's position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    pub copied_from: RepositoryId,
    pub point: u64,
}

impl Origin {
    pub fn of(point: &Point) -> Option<Origin> {
        let disks = point.disks.iter().filter_map(|disk| disk.position.as_deref());
        let positions = disks.chain(point.files.iter().filter_map(|files| files.position.as_deref()));
        positions.filter_map(|position| serde_json::from_str(position).ok()).next()
    }
}

/// What is copied from.
pub struct Origins {
    pub repository: Arc<Repository>,
    pub log: Log,
    pub reader: BlobReader,
    pub cache: Arc<ChunkCache>,
}

pub fn run(command: &Copy, output: Output) -> Result<(), Error> {
    let repository = command.access.open()?;
    let key = KeyArgs {
        key_file: command.key.to_key_file.clone(),
        passphrase_file: command.key.to_passphrase_file.clone(),
        credentials: command.to_credentials.clone(),
        ..command.access.key_args().clone()
    };
    let target = Access::of(command.to.clone(), key).open()?;
    if target.id() == repository.id() {
        return Err(Error::invalid(format!("`{}` is the same repository", command.to)));
    }
    let mut there = copies(&target, output)?;
    let is_there = |root: u64| there.contains_key(&Origin { copied_from: repository.id(), point: root });
    let found = |log: &Log| {
        let wanted = match command.all {
            true => all(&repository, log, output)?,
            false => {
                let found = command.points.iter().map(|wanted| find(&repository, log, wanted));
                found.collect::<Result<Vec<_>, _>>()?
            }
        };
        let read = wanted.iter().map(|(root, _)| *root).filter(|root| !is_there(*root));
        Ok((read.collect(), wanted))
    };
    let (_in_use, log, wanted) = InUse::until_stopped(&repository, "copy", output, found)?;
    let from = Origins::of(repository, log)?;
    let mut told = Vec::new();
    for (root, point) in &wanted {
        let what = format!("cannot copy `{}@{root}`", point.vm);
        let failed = |error: BackupError| Error::failed(&what).cause(chain(&error));
        let origin = Origin { copied_from: from.repository.id(), point: *root };
        if let Some(copy) = there.get(&origin) {
            output.tell(&format!("`{}@{root}` is there: point {copy}", point.vm));
            let shape = json!({
                "vm": point.vm, "point": root, "copy": copy, "sent_bytes": 0, "was_there": true,
            });
            told.push(shape);
            continue;
        }
        let mut attempt = 1;
        let Written { root: new, stored_bytes, .. } = loop {
            match copy(&from, &target, origin, point, command.bandwidth, output) {
                Err(error) if error.is_stale() && attempt < TRIES => attempt += 1,
                ended => break ended.map_err(failed)?,
            }
        };
        there.insert(origin, new);
        output.tell(&format!("`{}@{root}` is point {new} there: sent {}", point.vm, bytes(stored_bytes)));
        told.push(json!({
            "vm": point.vm, "point": root, "copy": new, "sent_bytes": stored_bytes, "was_there": false,
        }));
    }
    if output.json { output.print_json(&told) } else { Ok(()) }
}

impl Origins {
    pub fn open(access: &Access) -> Result<Origins, Error> {
        let repository = access.open()?;
        let log = open_log(&repository)?;
        Origins::of(repository, log)
    }

    fn of(repository: Arc<Repository>, log: Log) -> Result<Origins, Error> {
        let failed = |e| describe("cannot read the index", &e);
        let reader = BlobReader::following(&repository, log.state()).map_err(failed)?;
        let cache = ChunkCache::new(repository.clone(), MEMORY).map_err(failed)?;
        Ok(Origins { repository, log, reader, cache })
    }

    pub fn content(&self, disk: &PointDisk) -> Content {
        let chunk_size = self.repository.chunk_size();
        Content { tree: disk.tree(chunk_size), chunk_size, size: disk.size }
    }

    /// What the disk was when it was copied last, if it is still known.
    fn earlier(&self, origin: Option<Origin>, name: &str) -> Option<Content> {
        let origin = origin.filter(|origin| origin.copied_from == self.repository.id())?;
        let point = self.repository.point(&self.log, origin.point).ok()?;
        point.disk(name).map(|disk| self.content(disk))
    }

    pub fn nvram(&self, point: &Point) -> Result<Option<Vec<u8>>, BackupError> {
        let Some((chunks, len)) = &point.nvram else { return Ok(None) };
        let chunk_len = self.repository.chunk_size().bytes() as usize;
        let mut content = vec![0; chunks.len() * chunk_len];
        self.reader.read_many(chunks, &mut Decompressor::new(), |place, plain| {
            content[place * chunk_len..][..plain.len()].copy_from_slice(plain);
            Ok(())
        })?;
        content.truncate(usize::try_from(*len).unwrap_or(usize::MAX));
        Ok(Some(content))
    }
}

/// What was copied into a repository, and which points it is there.
fn copies(target: &Repository, output: Output) -> Result<HashMap<Origin, u64>, Error> {
    let points = all(target, &open_log(target)?, output)?;
    Ok(points.iter().filter_map(|(root, point)| Some((Origin::of(point)?, *root))).collect())
}

fn copy(
    from: &Origins,
    target: &Arc<Repository>,
    origin: Origin,
    point: &Point,
    bandwidth: Option<u64>,
    output: Output,
) -> Result<Written, BackupError> {
    let machine = target.chain(&point.vm);
    let mut writer = BackupWriter::open(target.clone())?;
    writer.limit(bandwidth);
    let before = writer.before(machine, unreadable(&point.vm, output))?;
    let last_origin = before.as_ref().and_then(|(_, point)| Origin::of(point));
    let chunk_len = u64::from(target.chunk_size().bytes());
    let position = serde_json::to_string(&origin).expect("it is plain data");
    let (mut disks, mut memory, mut base) = (Vec::new(), None, None);
    let progress = Progress::default();
    let total = point.contents().map(|disk| disk.size).sum();
    shown(output, &format!("copy {}@{}", point.vm, origin.point), total, &progress, || {
        for disk in &point.disks {
            let source = PointSource::new(&from.cache, &from.reader, &disk.name, from.content(disk));
            let earlier = from.earlier(last_origin, &disk.name);
            let known = before.as_ref().and_then(|(root, point)| Some((*root, point.disk(&disk.name)?)));
            let changed = match earlier.map(|earlier| source.changed_since(earlier, chunk_len)) {
                // Nothing has the earlier point in use: it may be forgotten by now, and removed. What this one lost shows when it is
                // read.
                Some(Err(error)) if error.is_loss() => None,
                changed => changed.transpose()?,
            };
            let changes = match (known, changed) {
                (Some((there, before)), Some(changed)) => {
                    base = Some(there);
                    Changes::Known { before, changed }
                }
                _ => Changes::Unknown("the point before is no copy of one that is still there".to_owned()),
            };
            let job = DiskJob {
                name: &disk.name,
                source: &source,
                changes,
                position: Some(position.clone()),
                left_out: &disk.excluded,
            };
            disks.push(back_up_disk(&writer, target.chunk_size(), &job, Pace::default(), &progress)?);
        }
        if let Some(from_there) = &point.memory {
            let source =
                PointSource::new(&from.cache, &from.reader, &from_there.name, from.content(from_there));
            memory = Some(back_up_memory(&writer, target.chunk_size(), &source, &progress)?);
        }
        Ok(())
    })?;
    let files = match &point.files {
        Some(files) => {
            Some(shown(output, &format!("copy {} files", point.vm), files.bytes, &progress, || {
                let copied = copy_files(&writer, &from.reader, files, &progress)?;
                Ok(FileTree { position: Some(position.clone()), ..copied })
            })?)
        }
        None => None,
    };
    let nvram = from.nvram(point)?.map(|content| writer.keep(&content)).transpose()?;
    let mut notes = point.notes.clone();
    notes.push(format!(
        "copied {} from point {} of repository {}",
        time(now()),
        origin.point,
        origin.copied_from
    ));
    let copied = Point { disks, files, nvram, memory, notes, ended: now(), ..point.clone() };
    Ok(writer.commit(machine, base, &copied, None)?)
}

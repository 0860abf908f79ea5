//! `rempart repo repair`.

use super::access::{Access, KeyArgs, chain, now};
use super::copy::{Origin, Origins};
use super::create::shown;
use super::in_use::InUse;
use super::points::{all, find};
use crate::{Output, output::bytes};
use clap::Args;
use rempart_api::Error;
use rempart_backup::{
    BackupError, Changes, Checked, ChunkSet, Content, DiskJob, Pace, PointSource, Progress, back_up_disk,
    check_disk, check_files, check_kept, copy_files,
};
use rempart_repository::log::Log;
use rempart_repository::{BackupWriter, BlobReader, Point, PointDisk, Repository};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Mends restore points from a second repository that has the same: into which they were copied, or from which they came.
///
/// Every chunk is read. What is damaged or missing is taken from the other repository, compared with what it must be, and
/// stored anew.
#[derive(Debug, Args)]
pub struct Repair {
    #[command(flatten)]
    access: Access,
    /// `VM` for its newest point, or `VM@POINT`; without any, all.
    points: Vec<String>,
    /// The second repository.
    #[arg(long, value_name = "REPO")]
    from: String,
    /// A key file of the second repository.
    #[arg(long, value_name = "FILE", conflicts_with = "from_passphrase_file")]
    from_key_file: Option<PathBuf>,
    /// A file whose first line is the second repository's passphrase.
    #[arg(long, value_name = "FILE")]
    from_passphrase_file: Option<PathBuf>,
    /// Credentials of the second repository's bucket, as `--credentials`.
    #[arg(long, value_name = "FILE")]
    from_credentials: Option<PathBuf>,
}

/// Times that a point is looked at again after it was mended.
const ROUNDS: u32 = 4;

/// What is damaged of a point.
enum Part<'a> {
    Disk(&'a PointDisk, Checked),
    Files { damaged: usize },
    Nvram(Checked),
}

pub fn run(command: &Repair, output: Output) -> Result<(), Error> {
    let repository = command.access.open()?;
    let key = KeyArgs {
        key_file: command.from_key_file.clone(),
        passphrase_file: command.from_passphrase_file.clone(),
        credentials: command.from_credentials.clone(),
        ..command.access.key_args().clone()
    };
    let other = Origins::open(&Access::of(command.from.clone(), key))?;
    if other.repository.id() == repository.id() {
        return Err(Error::invalid(format!("`{}` is the same repository", command.from)));
    }
    let found = |log: &Log| {
        let points: Vec<(u64, Point)> = match command.points.as_slice() {
            [] => all(&repository, log, output)?,
            wanted => wanted.iter().map(|wanted| find(&repository, log, wanted)).collect::<Result<_, _>>()?,
        };
        Ok((points.iter().map(|(root, _)| *root).collect(), points))
    };
    let (_in_use, _, points) = InUse::until_stopped(&repository, "repo repair", output, found)?;
    let copies = all(&other.repository, &other.log, output)?;
    let (mut told, mut unmended) = (Vec::new(), 0);
    for (root, point) in &points {
        let copy = the_same(&repository, *root, point, &other, &copies);
        let parts = repair(&repository, *root, point, &other, copy, output)
            .map_err(|e| Error::failed(format!("cannot repair `{}@{root}`", point.vm)).cause(chain(&e)))?;
        for ((_, name), Outcome { damaged, refusal }) in parts {
            let outcome = refusal.as_ref().map_or("mended".to_owned(), |why| format!("not mended: {why}"));
            output.tell(&format!("{}@{root}, {name}: {damaged}, {outcome}", point.vm));
            unmended += usize::from(refusal.is_some());
            told.push(json!({
                "vm": point.vm, "point": root, "part": name, "damaged": damaged, "mended": refusal.is_none(),
                "why": refusal,
            }));
        }
    }
    if output.json {
        output.print_json(&told)?;
    }
    match unmended {
        0 => Ok(()),
        parts => Err(Error::failed(format!("{parts} disks, sets of files, or NVRAMs are still damaged"))
            .hint("the next backup of these machines stores anew what they still hold")),
    }
}

/// What came of a disk, or of a point's files or NVRAM, that were damaged.
struct Outcome {
    damaged: String,
    /// Why it still is.
    refusal: Option<String>,
}

/// Mends all of a point, and looks at it again: behind a node that was lost there may be more.
fn repair(
    repository: &Arc<Repository>,
    root: u64,
    point: &Point,
    other: &Origins,
    copy: Option<&Point>,
    output: Output,
) -> Result<BTreeMap<(u8, String), Outcome>, BackupError> {
    let mut outcomes = BTreeMap::new();
    for round in 0..=ROUNDS {
        // What was mended before is whole for this one.
        let log = repository.log()?;
        let reader = BlobReader::following(repository, log.state())?;
        let parts = damaged_parts(repository, &reader, root, point, output)?;
        let mut mended = false;
        for part in &parts {
            let ended = match copy {
                _ if round == ROUNDS => Err("it was, and is damaged again".to_owned()),
                Some(copy) => mend(repository, point, part, other, copy, output)?,
                None => Err("the other repository has no copy of it".to_owned()),
            };
            mended |= ended.is_ok();
            let damaged = part.damaged();
            let outcome = outcomes.entry(part.key()).or_insert(Outcome { damaged, refusal: None });
            outcome.refusal = ended.err();
        }
        if !mended {
            break;
        }
    }
    Ok(outcomes)
}

impl Part<'_> {
    /// In which order it is told, and its name. A disk may have any.
    fn key(&self) -> (u8, String) {
        match self {
            Part::Disk(disk, _) => (0, disk.name.clone()),
            Part::Files { .. } => (1, "files".to_owned()),
            Part::Nvram(_) => (2, "nvram".to_owned()),
        }
    }

    fn damaged(&self) -> String {
        match self {
            Part::Disk(_, checked) | Part::Nvram(checked) => {
                let lens = checked.damaged.iter().map(|range| range.end - range.start);
                format!("{} damaged", bytes(lens.sum()))
            }
            Part::Files { damaged } => format!("{damaged} files damaged"),
        }
    }
}

/// The point of the other repository that holds the same.
fn the_same<'a>(
    repository: &Repository,
    root: u64,
    point: &Point,
    other: &Origins,
    copies: &'a [(u64, Point)],
) -> Option<&'a Point> {
    let here = Origin { copied_from: repository.id(), point: root };
    let origin = Origin::of(point);
    let found = copies.iter().find(|(number, copy)| {
        let there = Origin { copied_from: other.repository.id(), point: *number };
        let of_copy = Origin::of(copy);
        of_copy == Some(here) || origin == Some(there) || (origin.is_some() && of_copy == origin)
    });
    found.map(|(_, copy)| copy)
}

fn damaged_parts<'a>(
    repository: &Repository,
    reader: &BlobReader,
    root: u64,
    point: &'a Point,
    output: Output,
) -> Result<Vec<Part<'a>>, BackupError> {
    let (mut parts, mut lost) = (Vec::new(), Vec::new());
    for disk in point.contents() {
        let content = Content::of(disk, repository.chunk_size());
        let progress = Progress::default();
        let phase = format!("verify {}@{root} {}", point.vm, disk.name);
        let checked = shown(output, &phase, disk.size, &progress, || {
            check_disk(reader, content, Pace::default().threads, &progress)
        })?;
        if !checked.damaged.is_empty() {
            lost.extend(&checked.chunks);
            parts.push(Part::Disk(disk, checked));
        }
    }
    if let Some(files) = &point.files {
        let progress = Progress::default();
        let checked =
            shown(output, &format!("verify {}@{root} files", point.vm), files.bytes, &progress, || {
                check_files(reader, files, &progress)
            })?;
        if !checked.damaged.is_empty() {
            lost.extend(&checked.chunks);
            parts.push(Part::Files { damaged: checked.damaged.len() });
        }
    }
    if let Some(nvram) = &point.nvram {
        let checked = check_kept(reader, repository.chunk_size(), nvram)?;
        if !checked.damaged.is_empty() {
            lost.extend(&checked.chunks);
            parts.push(Part::Nvram(checked));
        }
    }
    if !lost.is_empty() {
        // Stored anew from here on, by whoever has them.
        repository.report_damaged(&lost, now())?;
    }
    Ok(parts)
}

/// Stores anew what is damaged, from `copy`. The second error says why that is not the same.
fn mend(
    repository: &Arc<Repository>,
    point: &Point,
    part: &Part<'_>,
    other: &Origins,
    copy: &Point,
    output: Output,
) -> Result<Result<(), String>, BackupError> {
    let writer = BackupWriter::open(repository.clone())?;
    let progress = Progress::default();
    let is_same = match part {
        Part::Disk(disk, checked) => {
            let Some(there) = copy.disk(&disk.name).filter(|there| there.size == disk.size) else {
                return Ok(Err("its copy has no such disk".to_owned()));
            };
            let source = PointSource::new(&other.cache, &other.reader, &there.name, other.content(there));
            let chunk_len = u64::from(repository.chunk_size().bytes());
            let mut changed = ChunkSet::none(disk.size, chunk_len);
            checked.damaged.iter().for_each(|range| changed.insert_bytes(range.start..range.end));
            let job = DiskJob {
                name: &disk.name,
                source: &source,
                changes: Changes::Known { before: disk, changed },
                position: None,
                left_out: &disk.excluded,
            };
            // Where a node of the tree is lost all is read.
            let pace = Pace { audit: 0, ..Pace::default() };
            shown(output, &format!("mend {}", disk.name), disk.size, &progress, || {
                back_up_disk(&writer, repository.chunk_size(), &job, pace, &progress)
            })?
            .root
                == disk.root
        }
        Part::Files { .. } => {
            let (Some(files), Some(there)) = (&point.files, &copy.files) else {
                return Ok(Err("its copy has no files".to_owned()));
            };
            writer.store_nodes_anew();
            let copied = shown(output, "mend files", there.bytes, &progress, || {
                copy_files(&writer, &other.reader, there, &progress)
            })?;
            (copied.pages, copied.contents, &copied.starts) == (files.pages, files.contents, &files.starts)
        }
        Part::Nvram(_) => {
            let Some(there) = other.nvram(copy)? else {
                return Ok(Err("its copy has no NVRAM".to_owned()));
            };
            Some(writer.keep(&there)?) == point.nvram
        }
    };
    writer.finish()?;
    let why = "what the other repository has is not the same, or its machine has a key of its own";
    Ok(if is_same { Ok(()) } else { Err(why.to_owned()) })
}

//! `rempart verify` and `rempart repo check`.

use super::access::{Access, chain, describe, now};
use super::boot::{self, Boot};
use super::create::shown;
use super::files::shown_path;
use super::in_use::InUse;
use super::points::{find, newest};
use crate::{Output, output::bytes};
use clap::Args;
use rempart_api::Error;
use rempart_backup::{Checked, Content, DamagedFile, Pace, Progress, check_disk, check_files, check_kept};
use rempart_repository::log::Log;
use rempart_repository::{BlobReader, Point, check};
use serde_json::{Value, json};

/// Reads every chunk of restore points; or, with --boot, starts their machines and sees whether they come up.
#[derive(Debug, Args)]
pub struct Verify {
    #[command(flatten)]
    access: Access,
    /// `VM` for its newest point, or `VM@POINT`.
    #[arg(required_unless_present = "boot")]
    points: Vec<String>,
    #[command(flatten)]
    boot: Boot,
}

pub fn run(command: &Verify, output: Output) -> Result<(), Error> {
    let repository = command.access.open()?;
    let named = |log: &Log| {
        let points = command.points.iter().map(|wanted| find(&repository, log, wanted));
        points.collect::<Result<Vec<_>, _>>()
    };
    let numbered = |points: Vec<(u64, Point)>| (points.iter().map(|(root, _)| *root).collect(), points);
    if command.boot.boot {
        let found = |log: &Log| {
            let points = match command.points.is_empty() {
                true => boot::those_that_run(&command.boot, newest(&repository, log, output)?, output),
                false => named(log)?,
            };
            Ok(numbered(points))
        };
        let (_in_use, _, points) = InUse::begin(&repository, "verify --boot", output, found)?;
        return boot::run(&command.boot, &repository, &points, output);
    }
    let found = |log: &Log| named(log).map(numbered);
    let (_in_use, log, points) = InUse::until_stopped(&repository, "verify", output, found)?;
    let reader = BlobReader::following(&repository, log.state());
    let reader = reader.map_err(|e| describe("cannot read the index", &e))?;
    let (mut checked, mut damaged, mut lost) = (Vec::new(), 0, Vec::new());
    for (root, point) in points {
        for disk in point.contents() {
            let chunk_size = repository.chunk_size();
            let content = Content::of(disk, chunk_size);
            let progress = Progress::default();
            let phase = format!("verify {}@{root} {}", point.vm, disk.name);
            let found = shown(output, &phase, disk.size, &progress, || {
                check_disk(&reader, content, Pace::default().threads, &progress)
            });
            let what = format!("cannot verify `{}@{root}`", point.vm);
            let found = found.map_err(|e| Error::failed(what).cause(chain(&e)))?;
            damaged += found.damaged.len();
            lost.extend(&found.chunks);
            checked.push(json!({
                "vm": point.vm, "point": root, "disk": disk.name, "sound_bytes": found.sound,
                "damaged": tell_ranges(&format!("{}@{root}", point.vm), &disk.name, &found, output),
            }));
        }
        if let Some(tree) = &point.files {
            let what = format!("cannot verify the files of `{}@{root}`", point.vm);
            let progress = Progress::default();
            let phase = format!("verify {}@{root} files", point.vm);
            let found =
                shown(output, &phase, tree.bytes, &progress, || check_files(&reader, tree, &progress));
            let found = found.map_err(|e| Error::failed(&what).cause(chain(&e)))?;
            damaged += found.damaged.len();
            lost.extend(found.chunks);
            let told = |file: &DamagedFile| {
                (shown_path(&file.path), shown_path(file.why.as_bytes())[1..].to_owned())
            };
            for (path, why) in found.damaged.iter().map(told) {
                output.tell(&format!("{}@{root}, {path}: {why}", point.vm));
            }
            checked.push(json!({
                "vm": point.vm, "point": root, "files": found.entries, "sound_bytes": found.sound,
                "damaged": found.damaged.iter().map(told).map(|(path, why)| json!({ "path": path, "why": why })).collect::<Vec<_>>(),
            }));
            output.tell(&format!("{}@{root} files: {} as they were", point.vm, bytes(found.sound)));
        }
        if let Some(nvram) = &point.nvram {
            let found = check_kept(&reader, repository.chunk_size(), nvram);
            let what = format!("cannot verify the NVRAM of `{}@{root}`", point.vm);
            let found = found.map_err(|e| Error::failed(what).cause(chain(&e)))?;
            damaged += found.damaged.len();
            lost.extend(&found.chunks);
            checked.push(json!({
                "vm": point.vm, "point": root, "nvram_bytes": nvram.1, "sound_bytes": found.sound,
                "damaged": tell_ranges(&format!("{}@{root}", point.vm), "nvram", &found, output),
            }));
        }
    }
    if output.json {
        output.print_json(&checked)?;
    }
    if !log.state().damaged().is_empty() {
        let settled = repository.settle_mended(&reader, now());
        settled.map_err(|e| describe("cannot write down what is whole again", &e))?;
    }
    if !lost.is_empty() {
        let told = repository.report_damaged(&lost, now());
        told.map_err(|e| describe("cannot write down what is damaged, so that it is stored anew", &e))?;
    }
    match damaged {
        0 => Ok(()),
        ranges => Err(Error::failed(format!("{ranges} ranges of bytes, or files, cannot be restored"))
            .hint("back the machine up again: what it still holds is stored anew")),
    }
}

/// Tells what was found of a disk, or of NVRAM, of the point `whose`; the same of what is damaged as JSON.
fn tell_ranges(whose: &str, name: &str, found: &Checked, output: Output) -> Vec<Value> {
    for range in &found.damaged {
        output.tell(&format!("{whose}, {name}, bytes {} to {}: {}", range.start, range.end, range.why));
    }
    output.tell(&format!("{whose} {name}: {} as they were", bytes(found.sound)));
    let damaged = found.damaged.iter();
    damaged.map(|range| json!({ "start": range.start, "end": range.end, "why": range.why })).collect()
}

/// Holds all objects of a repository against hashes, checksums and signatures.
pub fn all_objects(access: &Access, output: Output) -> Result<(), Error> {
    let place = access.place()?;
    // Of a place that lost everything there are many names: they are remembered only where they are to be told together.
    let (mut damaged, mut names) = (0u64, Vec::new());
    let checked = check(&place, &mut |error| {
        output.tell(&chain(&error));
        damaged += 1;
        if output.json {
            names.push(error.object);
        }
    });
    let checked =
        checked.map_err(|e| describe(&format!("cannot check the repository `{}`", access.name()), &e))?;
    if output.json {
        output.print_json(&json!({
            "sound_packs": checked.packs, "sound_segments": checked.segments, "sound_points": checked.points,
            "sound_keys": checked.keys, "read_bytes": checked.bytes, "damaged": names,
        }))?;
    }
    output.tell(&format!(
        "{} packs and {} segments of the index, {}, {} restore points' entries and {} keys are what was written",
        checked.packs,
        checked.segments,
        bytes(checked.bytes),
        checked.points,
        checked.keys
    ));
    match damaged {
        0 => Ok(()),
        objects => Err(Error::failed(format!("{objects} objects are damaged or missing"))
            .hint("`rempart verify` tells which restore points lost something of their packs")),
    }
}

//! `rempart points`, and finding the one that is meant.

use super::access::{Access, chain, describe};
use super::create::level_name;
use super::undelete;
use crate::{Output, output::bytes};
use clap::Args;
use rempart_api::Error;
use rempart_repository::log::{Content, Log, Status};
use rempart_repository::{BootResult, Point, Repository};
use serde_json::json;
use std::collections::BTreeMap;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

#[derive(Debug, Args)]
pub struct Points {
    #[command(flatten)]
    access: Access,
    /// Only of this virtual machine.
    vm: Option<String>,
    /// Those that were forgotten, and what is left of them: `rempart undelete` brings them back.
    #[arg(long)]
    forgotten: bool,
}

/// Every point that can be read, the newest last. The others are told.
pub fn all(repository: &Repository, log: &Log, output: Output) -> Result<Vec<(u64, Point)>, Error> {
    Ok(all_and_lost(repository, log, output)?.0)
}

/// The same, and how many of the owner's own cannot be read. Whoever has a key of their own may write what is no restore point.
fn all_and_lost(
    repository: &Repository,
    log: &Log,
    output: Output,
) -> Result<(Vec<(u64, Point)>, usize), Error> {
    let own = repository.writer().domain().id();
    let (mut points, mut lost) = (Vec::new(), 0);
    for (root, record) in log.state().roots() {
        match repository.point(log, *root) {
            Ok(point) => points.push((*root, point)),
            Err(error) if record.domain != own && error.is_loss() => {
                let why = chain(&error);
                output.tell(&format!("point {root}, by key {}, counts for nothing: {why}", record.key));
            }
            Err(error) if error.is_loss() => {
                output.tell(&format!("point {root} cannot be read: {}", chain(&error)));
                lost += 1;
            }
            Err(error) => return Err(describe("cannot read the restore points", &error)),
        }
    }
    for (number, remark) in log.remarks().iter().filter(|(_, remark)| remark.may_have_been_an_entry()) {
        let name = rempart_repository::log::name(*number);
        output.tell(&format!("`{name}` counts for nothing, and may have been a restore point: {remark}"));
    }
    Ok((points, lost))
}

/// The point that `VM` or `VM@POINT` means. Refuses `VM` where its newest point cannot be read.
pub fn find(repository: &Repository, log: &Log, wanted: &str) -> Result<(u64, Point), Error> {
    let (vm, number) = match wanted.rsplit_once('@') {
        Some((vm, number)) => {
            let parsed = number.parse::<u64>();
            let parsed =
                parsed.map_err(|_| Error::invalid(format!("`{number}` is no restore point's number")))?;
            (vm, Some(parsed))
        }
        None => (wanted, None),
    };
    let (own, chain) = (repository.writer().domain().id(), repository.chain(vm));
    let mut doubtful = log.remarks().iter().filter(|(_, remark)| remark.may_have_been_an_entry());
    let doubtful = doubtful.next_back().filter(|_| number.is_none());
    for (root, record) in log.state().roots().iter().rev() {
        if number.is_some_and(|number| number != *root) {
            continue;
        }
        match repository.point(log, *root) {
            Ok(point) if point.vm == vm => match doubtful.filter(|(slot, _)| slot > root) {
                None => return Ok((*root, point)),
                Some((slot, remark)) => {
                    let name = rempart_repository::log::name(*slot);
                    return Err(Error::failed(format!(
                        "cannot tell which restore point of `{vm}` is the newest"
                    ))
                    .cause(format!("`{name}` counts for nothing, and may have been one: {remark}"))
                    .hint(format!("`{vm}@{root}` is the newest that can be read")));
                }
            },
            Err(error) if !error.is_loss() => return Err(describe("cannot read the restore points", &error)),
            // Who asks for the newest shall not be given an older one unasked.
            Err(error) if record.domain == own && (number.is_some() || record.chain == chain) => {
                return Err(describe(&format!("cannot read the restore point `{vm}@{root}`"), &error).hint(
                    format!("`rempart points {vm}` lists those that can be read; `rempart forget @{root}` gives this one up"),
                ));
            }
            _ => {}
        }
    }
    Err(Error::not_found(format!("there is no restore point `{wanted}`")).hint("`rempart points` lists them"))
}

/// The newest point of every machine, by name.
pub fn newest(repository: &Repository, log: &Log, output: Output) -> Result<Vec<(u64, Point)>, Error> {
    let points = all(repository, log, output)?.into_iter();
    let newest: BTreeMap<String, _> = points.map(|(root, point)| (point.vm.clone(), (root, point))).collect();
    Ok(newest.into_values().collect())
}

pub fn open_log(repository: &Repository) -> Result<Log, Error> {
    repository.log().map_err(|e| describe("cannot read the repository's log", &e))
}

/// As `2026-11-22T13:04:45Z`.
pub fn time(at: rempart_types::WallTime) -> String {
    let seconds =
        i64::try_from(at.0 / 1000).ok().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    seconds.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_else(|| "no time".to_owned())
}

pub fn run(command: &Points, output: Output) -> Result<(), Error> {
    let repository = command.access.open()?;
    if command.forgotten {
        return undelete::list(&repository, command.vm.as_deref(), output);
    }
    let log = open_log(&repository)?;
    let (points, lost) = all_and_lost(&repository, &log, output)?;
    list(command, &repository, &log, points, output)?;
    match lost {
        0 => Ok(()),
        lost => Err(Error::failed(format!("{lost} restore points cannot be read")).hint(
            "they are passed over; `rempart forget @POINT` gives one up, and a backup of its machine makes a new one",
        )),
    }
}

fn list(
    command: &Points,
    repository: &Repository,
    log: &Log,
    mut points: Vec<(u64, Point)>,
    output: Output,
) -> Result<(), Error> {
    if let Some(vm) = &command.vm {
        points.retain(|(_, point)| point.vm == *vm);
    }
    let booted = |root: u64| {
        repository.boot(log.state(), root).unwrap_or_else(|error| {
            output.tell(&chain(&error));
            None
        })
    };
    if output.json {
        let points = points.iter().map(|(root, point)| {
            json!({
                "vm": point.vm, "point": root, "taken_unix_ms": point.taken.0, "host": point.host,
                "consistency": point.consistency, "notes": point.notes, "disks": point.disks,
                "files": point.files.as_ref().map(|files| json!({
                    "entries": files.entries, "size_bytes": files.bytes, "unread": files.unread,
                })),
                "definition": point.definition.as_ref().map(|definition| definition.kind.as_str()),
                "memory": point.memory.as_ref().map(|memory| json!({ "size_bytes": memory.size })),
                "nvram_bytes": point.nvram.as_ref().map(|(_, length)| length),
                "boot": booted(*root),
            })
        });
        return output.print_json(&points.collect::<Vec<_>>());
    }
    let rows = points.iter().map(|(root, point)| {
        let disks: u64 = point.contents().map(|disk| disk.size).sum();
        let size = disks + point.files.as_ref().map_or(0, |files| files.bytes);
        vec![
            format!("{}@{root}", point.vm),
            time(point.taken),
            point.disks.len().to_string(),
            bytes(size),
            level_name(point.consistency.level),
            booted(*root).map_or_else(|| "never".to_owned(), |result| came_up(&result)),
        ]
    });
    output.table(&["point", "taken", "disks", "size", "consistency", "booted"], rows.collect())
}

fn came_up(result: &BootResult) -> String {
    let when = time(result.at);
    match (result.passed, result.answered_ms) {
        (true, Some(ms)) => format!("{when}, came up in {:.1} s", ms as f64 / 1000.0),
        (true, None) => format!("{when}, came up"),
        (false, _) => format!("{when}, did not come up"),
    }
}

/// `rempart repo show`.
pub fn show(access: &Access, output: Output) -> Result<(), Error> {
    let repository = access.open()?;
    let log = open_log(&repository)?;
    let state = log.state();
    let packs = state
        .objects()
        .filter(|object| matches!(object.content, Content::Pack(_)) && object.status == Status::Live);
    let packs = packs.count();
    if output.json {
        return output.print_json(&json!({
            "repository": repository.id().to_string(),
            "url": repository.objects().url(),
            "chunk_bytes": repository.chunk_size().bytes(),
            "created_unix_ms": repository.description().created.0,
            "kept_ms": repository.description().kept_ms,
            "points": state.roots().len(),
            "packs": packs,
            "log_entries": state.next(),
        }));
    }
    let kept = match repository.description().kept_ms {
        0 => "no".to_owned(),
        kept_ms => format!("{} s from each backup on", kept_ms / 1000),
    };
    let rows = [
        ("repository", repository.id().to_string()),
        ("place", repository.objects().url()),
        ("chunks", repository.chunk_size().to_string()),
        ("created", time(repository.description().created)),
        ("immutable", kept),
        ("restore points", state.roots().len().to_string()),
        ("packs", packs.to_string()),
    ];
    output.table(&["what", "value"], rows.map(|(what, value)| vec![what.to_owned(), value]).to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_types::WallTime;

    #[test]
    fn times_read_as_everywhere() {
        for (unix_ms, text) in
            [(0, "1970-01-01T00:00:00Z"), (1_795_352_685_999, "2026-11-22T13:04:45Z"), (u64::MAX, "no time")]
        {
            assert_eq!(time(WallTime(unix_ms)), text);
        }
    }
}

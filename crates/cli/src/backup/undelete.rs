//! `rempart points --forgotten` and `rempart undelete`.

use super::access::{Access, describe, now};
use super::points::{self, open_log, time};
use crate::{Output, output::bytes};
use clap::Args;
use rempart_api::{Error, ErrorKind};
use rempart_objects::Name;
use rempart_repository::{ForgottenPoint, Forgottens, Remains, Repository};
use serde_json::json;

/// Brings back restore points that were forgotten, as long as what they hold is still there: until `rempart gc` removed it,
/// and in a repository with object lock at least until that is over. `rempart points --forgotten` lists them.
#[derive(Debug, Args)]
pub struct Undelete {
    #[command(flatten)]
    access: Access,
    /// `VM@POINT`; or `VM` for all of a machine's that can be brought back.
    #[arg(required_unless_present = "all")]
    points: Vec<String>,
    /// All that can be brought back, of every machine.
    #[arg(long, conflicts_with = "points")]
    all: bool,
}

/// Lists what was forgotten, of one machine or all.
pub fn list(repository: &Repository, vm: Option<&str>, output: Output) -> Result<(), Error> {
    let mut forgotten = find(repository, output)?;
    let hidden = hidden(repository)?;
    if !hidden.is_empty() {
        output.tell(&format!(
            "{} objects are hidden by markers of deletion: `rempart undelete` takes those away",
            hidden.len()
        ));
    }
    forgotten.points.retain(|point| vm.is_none_or(|vm| point.point.vm == vm));
    if output.json {
        let points = forgotten.points.iter().map(|forgotten| {
            let ForgottenPoint { root, point, by, kept_until, remains, .. } = forgotten;
            json!({
                "vm": point.vm, "point": root, "taken_unix_ms": point.taken.0, "host": point.host,
                "forgotten_unix_ms": by.map(|by| by.written.0),
                "forgotten_by_key": by.map(|by| by.key.to_string()),
                "forgotten_by_entry": by.map(|by| by.entry),
                "kept_until_unix_ms": kept_until.map(|until| until.0),
                "can_be_brought_back": remains.is_good(),
                "remains": match remains {
                    Remains::Whole => json!({ "state": "whole" }),
                    Remains::Condemned { packs, bytes } => {
                        json!({ "state": "condemned", "packs": packs, "size_bytes": bytes })
                    }
                    Remains::Removed { packs, of } => {
                        json!({ "state": "removed", "packs": packs, "of_packs": of })
                    }
                    Remains::OtherDomain { packs } => json!({ "state": "foreign", "packs": packs }),
                },
            })
        });
        return output.print_json(&points.collect::<Vec<_>>());
    }
    let rows = forgotten.points.iter().map(|forgotten| {
        vec![
            name(forgotten),
            time(forgotten.point.taken),
            forgotten.by.map_or_else(|| "nobody knows when".to_owned(), |by| time(by.written)),
            forgotten.kept_until.map_or_else(|| "not".to_owned(), time),
            match forgotten.remains.is_good() {
                true => told(&forgotten.remains),
                false => format!("cannot be: {}", told(&forgotten.remains)),
            },
        ]
    });
    output.table(&["point", "taken", "forgotten", "locked until", "to bring back"], rows.collect())
}

pub fn run(command: &Undelete, output: Output) -> Result<(), Error> {
    let repository = command.access.open()?;
    reveal(&repository, output)?;
    let forgotten = find(&repository, output)?;
    let mut chosen: Vec<&ForgottenPoint> = Vec::new();
    for wanted in &command.points {
        let of_it = |point: &&ForgottenPoint| name(point) == *wanted || point.point.vm == *wanted;
        let before = chosen.len();
        chosen.extend(forgotten.points.iter().filter(of_it));
        if chosen.len() == before {
            // As for who was killed, and begins again.
            if is_there(&repository, wanted)? {
                output.tell(&format!("`{wanted}` is a restore point"));
                continue;
            }
            return Err(Error::not_found(format!("there is no forgotten restore point `{wanted}`"))
                .hint("`rempart points --forgotten` lists them; nothing was brought back"));
        }
        if let Some(lost) = chosen.iter().find(|point| name(point) == *wanted && !point.remains.is_good()) {
            return Err(Error::refused(format!("cannot bring back `{wanted}`"))
                .cause(told(&lost.remains))
                .hint("nothing was brought back"));
        }
    }
    if command.all {
        chosen.extend(&forgotten.points);
    }
    chosen.sort_unstable_by_key(|point| point.root);
    chosen.dedup_by_key(|point| point.root);
    for lost in chosen.extract_if(.., |point| !point.remains.is_good()) {
        output.tell(&format!("`{}` cannot be brought back: {}", name(lost), told(&lost.remains)));
    }
    let mut done = Vec::new();
    let ended = repository.undelete(&chosen, now(), |point| {
        output.tell(&format!("`{}` is a restore point again", name(point)));
        done.push(json!({ "vm": point.point.vm, "point": point.root, "taken_unix_ms": point.point.taken.0 }));
    });
    if chosen.is_empty() {
        output.tell("nothing was brought back");
    }
    let of = chosen.len();
    ended.map_err(|error| {
        describe(&format!("cannot bring back all of {of} restore points: {} were", done.len()), &error)
            .hint("`rempart points --forgotten` tells what is left of the others")
    })?;
    if output.json {
        return output.print_json(&done);
    }
    Ok(())
}

/// Whether `VM@POINT` is a restore point, so that there is nothing to bring back.
fn is_there(repository: &Repository, wanted: &str) -> Result<bool, Error> {
    if !wanted.contains('@') {
        return Ok(false);
    }
    match points::find(repository, &open_log(repository)?, wanted) {
        Ok(_) => Ok(true),
        Err(error) if error.kind == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes away the markers of deletion that somebody put on what the place keeps.
fn reveal(repository: &Repository, output: Output) -> Result<(), Error> {
    let hidden = hidden(repository)?;
    let revealed = hidden.iter().try_for_each(|name| repository.objects().reveal(name));
    revealed.map_err(|e| describe("cannot take away markers of deletion", &e.into()))?;
    if !hidden.is_empty() {
        output.tell(&format!(
            "{} objects were hidden by markers of deletion, and are not any more",
            hidden.len()
        ));
    }
    Ok(())
}

fn hidden(repository: &Repository) -> Result<Vec<Name>, Error> {
    repository.hidden().map_err(|e| describe("cannot look for markers of deletion", &e))
}

/// What cannot be read of is told.
fn find(repository: &Repository, output: Output) -> Result<Forgottens, Error> {
    let log = open_log(repository)?;
    let forgotten = repository.forgotten(&log);
    let forgotten = forgotten.map_err(|e| describe("cannot read what was forgotten", &e))?;
    for (point, error) in &forgotten.unreadable {
        output.tell(&format!("point {point} was forgotten, and cannot be brought back: {error}"));
    }
    Ok(forgotten)
}

fn name(forgotten: &ForgottenPoint) -> String {
    format!("{}@{}", forgotten.point.vm, forgotten.root)
}

fn told(remains: &Remains) -> String {
    match remains {
        Remains::Whole => "nothing is missing".to_owned(),
        Remains::Condemned { packs, bytes: size } => {
            format!("{packs} packs, {}, are stored anew", bytes(*size))
        }
        Remains::Removed { packs, of } => format!("{packs} of its {of} packs were removed"),
        Remains::OtherDomain { packs } => {
            format!("{packs} packs are to be removed, and only the machine's own key could store them anew")
        }
    }
}

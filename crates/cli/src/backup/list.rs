//! `rempart repo list`.

use super::access::{Access, CommandLineFirst, KeyArgs, describe, open_place};
use super::points::{open_log, time};
use crate::{Output, output::bytes};
use clap::Args;
use rempart_api::Error;
use rempart_objects::{ErrorKind as PlaceError, Name, Objects, pages};
use rempart_repository::Description;
use rempart_types::WallTime;
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Objects that are looked at below a place, to find repositories.
const MOST_LOOKED_AT: usize = 1_000_000;
/// Behind everything that a repository has.
const BEHIND_PARTS: &str = "writers/g";
/// By which a repository may be known.
const PARTS: [&str; 8] =
    ["checkpoints", "copies", "keys", "log", "packs", "repository", "segments", "writers"];

/// The repositories that this node's schedules name, or those that lie in places.
///
/// What one holds is told where it can be opened: those of schedules by what opens them there, the others by --key-file or
/// --passphrase-file. Nobody is asked for a passphrase.
#[derive(Debug, Args)]
pub struct List {
    /// A directory, or the URL of a bucket, container or of a prefix in one: every repository there and below.
    #[arg(value_name = "URL")]
    places: Vec<String>,
    #[command(flatten)]
    key: CommandLineFirst<KeyArgs>,
}

/// A repository, as somebody named it or as it was found.
struct Named {
    url: String,
    /// Which name it.
    schedules: Vec<String>,
    key: KeyArgs,
}

/// What can be told of one.
#[derive(Default)]
struct Told {
    description: Option<Description>,
    /// Bytes of all its objects.
    size: Option<u64>,
    points: Option<usize>,
    last: Option<WallTime>,
    /// Why not all is told.
    error: Option<Error>,
}

/// Of the node's configuration.
#[derive(Deserialize)]
struct Sections {
    #[serde(default)]
    backup: Vec<Section>,
}

#[derive(Deserialize)]
struct Section {
    name: String,
    repository: String,
    key_file: Option<PathBuf>,
    passphrase_file: Option<PathBuf>,
    credentials_file: Option<PathBuf>,
    cache_dir: Option<PathBuf>,
}

pub fn run(command: &List, config: &Path, output: Output) -> Result<(), Error> {
    let mut failed = Vec::new();
    let mut named = Vec::new();
    if command.places.is_empty() {
        named = of_schedules(&command.key, config)?;
    }
    for place in &command.places {
        match below(place, &command.key) {
            Ok(found) => named.extend(found),
            Err(error) => {
                output.tell(&error.to_string());
                failed.push((place.clone(), error));
            }
        }
    }
    let looked_at = named.len() + failed.len();
    let mut shown: Vec<_> = failed.iter().map(|(url, error)| json!({ "url": url, "error": error })).collect();
    let mut rows = Vec::new();
    for one in &named {
        let told = look(one);
        if let Some(error) = &told.error {
            output.tell(&format!("`{}`: {error}", one.url));
            failed.push((one.url.clone(), error.clone()));
        }
        shown.push(shape(one, &told));
        rows.push(row(one, &told));
    }
    if output.json {
        output.print_json(&shown)?;
    } else {
        output
            .table(&["url", "repository", "created", "points", "size", "last backup", "schedules"], rows)?;
    }
    match failed.len() {
        0 => Ok(()),
        count => Err(Error::failed(format!("{count} of {looked_at} could not be looked at whole"))
            .cause(failed.iter().map(|(url, _)| url.as_str()).collect::<Vec<_>>().join(", "))),
    }
}

/// Each once, whichever schedules use it.
fn of_schedules(key: &KeyArgs, config: &Path) -> Result<Vec<Named>, Error> {
    let failed = |what: &str| Error::failed(format!("cannot {what} `{}`", config.display()));
    let text = std::fs::read_to_string(config).map_err(|e| {
        failed("read").cause(e).hint("name the node's configuration with --config, or a place")
    })?;
    let sections: Sections =
        toml::from_str(&text).map_err(|e| failed("read the schedules of").cause(e.to_string().trim_end()))?;
    let mut all: BTreeMap<String, Named> = BTreeMap::new();
    for section in sections.backup {
        let known = all.entry(section.repository.clone()).or_insert_with(|| Named {
            url: section.repository,
            schedules: Vec::new(),
            key: KeyArgs {
                key_file: section.key_file,
                passphrase_file: section.passphrase_file,
                credentials: section.credentials_file,
                cache_dir: section.cache_dir.unwrap_or_else(|| key.cache_dir.clone()),
            },
        });
        known.schedules.push(section.name);
    }
    Ok(all.into_values().collect())
}

/// The repositories in a place and below it.
fn below(url: &str, key: &KeyArgs) -> Result<Vec<Named>, Error> {
    let place = open_place(url, key)?;
    let found = folders_below(&*place).map_err(|e| {
        let cause = super::access::chain(&e);
        Error::unreachable(format!("cannot look for repositories in `{url}`")).cause(cause)
    })?;
    let named = found.iter().map(|folder| Named {
        url: joined(&place.url(), folder),
        schedules: Vec::new(),
        key: key.clone(),
    });
    Ok(named.collect())
}

/// In which folders there is a repository, seen from the place; empty for the place itself. Below one none is looked
/// for.
fn folders_below(place: &dyn Objects) -> Result<Vec<String>, rempart_objects::Error> {
    let mut found: Vec<String> = Vec::new();
    let mut after: Option<Name> = None;
    let mut looked_at = 0;
    'pages: loop {
        let page = place.list("", after.as_ref())?;
        if page.is_empty() || looked_at > MOST_LOOKED_AT {
            return Ok(found);
        }
        looked_at += page.len();
        let mut not_there: Option<&str> = None;
        for object in &page {
            let parts: Vec<usize> = std::iter::once(0)
                .chain(object.name.as_str().match_indices('/').map(|(at, _)| at + 1))
                .collect();
            for at in parts {
                let (folder, rest) = object.name.as_str().split_at(at);
                let part = rest.split('/').next().expect("a text has a first part");
                if found.last().is_some_and(|found| found == folder.trim_end_matches('/')) {
                    break;
                }
                let description = format!("{folder}repository");
                if !PARTS.contains(&part) || not_there == Some(folder) {
                    continue;
                }
                let Ok(name) = Name::new(description) else { continue };
                match place.len(&name) {
                    Ok(_) => {
                        found.push(folder.trim_end_matches('/').to_owned());
                        // All that it has sorts before.
                        let behind = Name::new(format!("{folder}{BEHIND_PARTS}")).ok();
                        after = behind.max(Some(object.name.clone()));
                        continue 'pages;
                    }
                    Err(error) if error.kind == PlaceError::Missing => not_there = Some(folder),
                    Err(error) => return Err(error),
                }
            }
        }
        after = page.last().map(|object| object.name.clone());
    }
}

/// The URL of a folder of a place.
fn joined(url: &str, folder: &str) -> String {
    let (path, options) = match url.split_once('?').filter(|_| url.contains("://")) {
        Some((path, options)) => (path, format!("?{options}")),
        None => (url, String::new()),
    };
    let path = path.trim_end_matches('/');
    if folder.is_empty() { url.to_owned() } else { format!("{path}/{folder}{options}") }
}

fn look(named: &Named) -> Told {
    let mut told = Told::default();
    if let Err(error) = look_at(named, &mut told) {
        told.error = Some(error);
    }
    told
}

fn look_at(named: &Named, told: &mut Told) -> Result<(), Error> {
    let place = open_place(&named.url, &named.key)?;
    let what = "cannot look at it";
    let failed = |e: rempart_objects::Error| describe(what, &e.into());
    let bytes = place.get(&Description::name(), Description::LEN).map_err(|e| match e.kind {
        PlaceError::Missing => Error::not_found("there is no repository").cause(super::access::chain(&e)),
        _ => failed(e),
    })?;
    told.description = Some(Description::decode(&bytes).map_err(|e| describe(what, &e))?);
    if named.key.key_file.is_some() || named.key.passphrase_file.is_some() {
        let repository = Access::of(named.url.clone(), named.key.clone()).open()?;
        let log = open_log(&repository)?;
        let roots = log.state().roots();
        told.points = Some(roots.len());
        told.last = roots.values().map(|root| root.written).max();
    }
    let mut size = 0;
    for page in pages(&*place, "") {
        size += page.map_err(failed)?.iter().map(|object| object.len).sum::<u64>();
    }
    told.size = Some(size);
    Ok(())
}

fn shape(named: &Named, told: &Told) -> serde_json::Value {
    let description = told.description.as_ref();
    json!({
        "url": named.url,
        "schedules": named.schedules,
        "repository": description.map(|known| known.keys.repository.to_string()),
        "created_unix_ms": description.map(|known| known.created.0),
        "points": told.points,
        "size_bytes": told.size,
        "last_backup_unix_ms": told.last.map(|last| last.0),
        "error": told.error,
    })
}

fn row(named: &Named, told: &Told) -> Vec<String> {
    let description = told.description.as_ref();
    let unknown = || "?".to_owned();
    let last = match (told.points, told.last) {
        (Some(_), None) => "none".to_owned(),
        (_, last) => last.map_or_else(unknown, time),
    };
    vec![
        named.url.clone(),
        description.map_or_else(unknown, |known| known.keys.repository.to_string()),
        description.map_or_else(unknown, |known| time(known.created)),
        told.points.map_or_else(unknown, |points| points.to_string()),
        told.size.map_or_else(unknown, bytes),
        last,
        named.schedules.join(", "),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_objects::Memory;

    fn place(names: &[&str]) -> Memory {
        let place = Memory::default();
        for name in names {
            place.create(&Name::new(*name).unwrap(), &[b"1"], None).unwrap();
        }
        place
    }

    #[test]
    fn repositories_are_found_where_they_are_and_nothing_below_them() {
        let none: &[&str] = &[];
        for (names, expected) in [
            (none, none),
            (&["repository", "keys/a", "packs/b/repository"], &[""]),
            (
                &[
                    "a/b/keys/1",
                    "a/b/log/1",
                    "a/b/packs/x/y",
                    "a/b/repository",
                    "a/b/writers/ff",
                    "a/c/log/1",
                    "packs/host/repository",
                    "packs/host/log/1",
                    "readme",
                    "z/repository",
                    "zz/segments/1",
                ],
                &["a/b", "packs/host", "z"],
            ),
            // Others' things in one.
            (&["a/log/1", "a/repository", "a/writers/z", "a/zoo/repository", "b/repository"], &["a", "b"]),
        ] {
            assert_eq!(folders_below(&place(names)).unwrap(), expected, "{names:?}");
        }
    }

    #[test]
    fn the_url_of_a_folder_keeps_the_options() {
        for (url, folder, expected) in [
            ("/srv/backups", "a/b", "/srv/backups/a/b"),
            ("/srv/what?", "a", "/srv/what?/a"),
            ("s3://bucket?endpoint=http://h", "a", "s3://bucket/a?endpoint=http://h"),
            ("az://account/box/in", "", "az://account/box/in"),
        ] {
            assert_eq!(joined(url, folder), expected);
        }
    }
}

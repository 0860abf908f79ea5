//! Files inside the disks of restore points.

use super::access::{chain, describe};
use super::files::{self, shown_path};
use super::serve::{Memory, disk_reader};
use crate::Output;
use crate::output::{self, printable};
use rempart_api::Error;
use rempart_backup::{
    ChunkCache, Entry, GuestDisks, GuestReaders, GuestVolume, Pace, Progress, ReadLimits, RestoredFiles,
    Volume, list_guest_files, read_files, restore_guest_files,
};
use rempart_repository::{Point, Repository};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

/// The hidden command of the process that reads a guest's file system.
pub const READ: &str = "read-guest-files";
/// What cannot be shown is told once each; past so many, no more.
const TOLD: usize = 1000;

/// The process that reads.
pub fn run() -> Result<(), Error> {
    read_files().map_err(|e| Error::failed("cannot read the file system").cause(e))
}

/// Processes that read file systems; what they cannot read is told.
pub fn readers(output: Output) -> Arc<GuestReaders> {
    let told = Mutex::new(BTreeSet::new());
    // This program, also where another one has taken its place since.
    let command = || {
        let mut command = Command::new("/proc/self/exe");
        command.arg(READ);
        command
    };
    let tell = move |what: &str| {
        let mut told = told.lock().expect("no holder panics");
        if told.len() < TOLD && told.insert(what.to_owned()) {
            output.tell(&shown_path(what.as_bytes())[1..]);
        }
    };
    GuestReaders::new(Box::new(command), ReadLimits::default(), Box::new(tell))
}

/// A volume of a point.
struct Found {
    disk: String,
    volume: Volume,
    opened: Option<GuestVolume>,
}

/// What lies on the disk of that name, or on all.
fn volumes(
    repository: &Arc<Repository>,
    root: u64,
    point: &Point,
    disk: Option<&str>,
    what: &str,
    output: Output,
) -> Result<Vec<Found>, Error> {
    if let Some(name) = disk.filter(|name| point.disk(name).is_none()) {
        let names: Vec<&str> = point.disks.iter().map(|disk| disk.name.as_str()).collect();
        return Err(Error::not_found(format!("{what}: it has no disk `{name}`"))
            .hint(format!("it has {}", names.join(", "))));
    }
    let cache = ChunkCache::new(repository.clone(), Memory::DEFAULT).map_err(|e| describe(what, &e))?;
    let disks = point.disks.iter().map(|disk| Arc::new(disk_reader(&cache, disk))).collect();
    let disks = GuestDisks::new(&readers(output), format!("`{}@{root}`", point.vm), disks);
    let mut found = Vec::new();
    for (number, name) in disks.names().enumerate().filter(|(_, name)| disk.is_none_or(|disk| disk == *name))
    {
        let volumes = disks.volumes(number).map_err(|e| Error::failed(what).cause(chain(&e)))?;
        found.extend(volumes.into_iter().map(|(volume, opened)| Found {
            disk: name.to_owned(),
            volume,
            opened,
        }));
    }
    Ok(found)
}

/// Lists what lies on the disks.
pub fn list_volumes(
    repository: &Arc<Repository>,
    root: u64,
    point: &Point,
    disk: Option<&str>,
    what: &str,
    output: Output,
) -> Result<(), Error> {
    let found = volumes(repository, root, point, disk, what, output)?;
    if output.json {
        let shapes = found.iter().map(|Found { disk, volume, .. }| {
            json!({
                "disk": disk, "volume": volume.name, "file_system": volume.kind.map(|kind| kind.name()),
                "size_bytes": volume.map.as_ref().map(|map| map.len()), "note": volume.note,
            })
        });
        return output.print_json(&shapes.collect::<Vec<Value>>());
    }
    for Found { disk, volume, .. } in &found {
        let kind = volume.kind.map_or("-", |kind| kind.name());
        let size = volume.map.as_ref().map_or("-".to_owned(), |map| output::bytes(map.len()));
        let note = volume.note.as_ref().map_or(String::new(), |note| format!("  {}", printable(note)));
        output.print(&format!("{disk}  {}  {kind}  {size}{note}", printable(&volume.name)))?;
    }
    Ok(())
}

/// The one file system that has such a file.
fn locate(found: Vec<Found>, name: Option<&str>, wanted: &[u8], what: &str) -> Result<GuestVolume, Error> {
    let shown = shown_path(wanted);
    let named = found.iter().filter(|found| name.is_none_or(|name| found.volume.name == name));
    let mut readable: Vec<GuestVolume> = named.filter_map(|found| found.opened.clone()).collect();
    if readable.is_empty() {
        let what = format!(
            "{what}: there is no file system{} that can be read",
            match name {
                Some(name) => format!(" `{name}`"),
                None => String::new(),
            }
        );
        return Err(Error::not_found(what).hint("`rempart files` without a path lists what is on the disks"));
    }
    if readable.len() > 1 {
        // Those that cannot be read are told.
        readable.retain(|volume| volume.has(wanted).unwrap_or(false));
    }
    match &readable[..] {
        [one] => Ok(one.clone()),
        [] => Err(Error::not_found(format!("{what}: no file system has `{shown}`"))),
        several => {
            let names: Vec<&str> = several.iter().map(GuestVolume::name).collect();
            Err(Error::invalid(format!("{what}: `{shown}` is in {} file systems", several.len()))
                .cause(names.join("; "))
                .hint("name one with --disk and --volume"))
        }
    }
}

/// What of a point's disks is wanted.
pub struct Wanted<'a> {
    pub disk: Option<&'a str>,
    pub volume: Option<&'a str>,
    pub path: &'a [u8],
}

impl Wanted<'_> {
    fn locate(
        &self,
        repository: &Arc<Repository>,
        root: u64,
        point: &Point,
        what: &str,
        output: Output,
    ) -> Result<GuestVolume, Error> {
        locate(volumes(repository, root, point, self.disk, what, output)?, self.volume, self.path, what)
    }

    /// Gives each file to `each`.
    pub fn list(
        &self,
        repository: &Arc<Repository>,
        root: u64,
        point: &Point,
        what: &str,
        output: Output,
        mut each: impl FnMut(Entry),
    ) -> Result<(), Error> {
        let volume = self.locate(repository, root, point, what, output)?;
        let mut lost = 0;
        let listed = list_guest_files(
            &volume,
            self.path,
            |entry| {
                each(entry);
                Ok(())
            },
            |path, why| {
                lost += 1;
                output.tell(&format!("{}: {}", shown_path(path), chain(why)));
            },
        );
        match listed.map_err(|e| Error::failed(what).cause(chain(&e)))? {
            false => Err(Error::not_found(format!("{what}: there is no `{}`", shown_path(self.path)))),
            true if lost > 0 => {
                Err(Error::failed(format!("{lost} files or folders cannot be read")).cause(what))
            }
            true => Ok(()),
        }
    }

    /// Restores what is there into a folder.
    pub fn restore(
        &self,
        repository: &Arc<Repository>,
        root: u64,
        point: &Point,
        to: &Path,
        what: &str,
        output: Output,
    ) -> Result<(RestoredFiles, Value), Error> {
        let volume = self.locate(repository, root, point, what, output)?;
        files::restored(to, 0, what, output, |progress: &Progress| {
            restore_guest_files(&volume, self.path, to, Pace::default().threads, progress)
        })
    }
}

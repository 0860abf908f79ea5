//! Files of restore points: listing them, and bringing them back.

use super::access::{Access, chain, describe};
use super::create::shown;
use super::guest_files::{self, Wanted};
use super::points::{find, open_log, time};
use crate::Output;
use clap::Args;
use rempart_api::Error;
use rempart_backup::{BackupError, Entry, FileReader, Kind, Pace, Progress, RestoredFiles, restore_files};
use rempart_repository::{BlobReader, FileTree, Point};
use rempart_types::WallTime;
use serde_json::{Value, json};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Lists the files of a restore point: those that `rempart agent` backed up, or those inside a disk.
///
/// Of a point with disks, without a path, it lists the file systems that are on them.
#[derive(Debug, Args)]
pub struct Files {
    #[command(flatten)]
    access: Access,
    /// `VM` for its newest point, or `VM@POINT`.
    point: String,
    /// Only this, and what is below it.
    path: Option<std::path::PathBuf>,
    /// Files inside this disk.
    #[arg(long)]
    disk: Option<String>,
    /// Inside this file system of a disk: `rempart files` lists them.
    #[arg(long)]
    volume: Option<String>,
}

/// The path of an entry, as a person names it.
pub fn entry_path(path: &Path) -> Vec<u8> {
    let bytes = path.as_os_str().as_bytes();
    let parts = bytes.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    parts.collect::<Vec<_>>().join(&b'/')
}

pub fn shown_path(path: &[u8]) -> String {
    format!("/{}", crate::output::printable(&String::from_utf8_lossy(path)))
}

/// The files that a point has.
pub fn of(point: &Point, what: &str) -> Result<FileTree, Error> {
    point.files.clone().ok_or_else(|| {
        Error::not_found(format!("{what}: it has disks, and no files"))
            .hint("name a file inside a disk with --path, or see `rempart mount`")
    })
}

pub fn run(command: &Files, output: Output) -> Result<(), Error> {
    let repository = command.access.open()?;
    let log = open_log(&repository)?;
    let (root, point) = find(&repository, &log, &command.point)?;
    let what = format!("cannot list the files of `{}@{root}`", point.vm);
    let (disk, volume) = (command.disk.as_deref(), command.volume.as_deref());
    if disk.is_some() || volume.is_some() || point.files.is_none() {
        drop(log);
        let Some(path) = command.path.as_deref().or(volume.map(|_| Path::new("/"))) else {
            return guest_files::list_volumes(&repository, root, &point, disk, &what, output);
        };
        let (mut shapes, mut refused) = (Vec::new(), Ok(()));
        let path = entry_path(path);
        let listed =
            Wanted { disk, volume, path: &path }.list(&repository, root, &point, &what, output, |entry| {
                if output.json {
                    shapes.push(shape(&entry));
                } else if refused.is_ok() {
                    refused = output.print(&line(&entry));
                }
            });
        refused?;
        if output.json && (listed.is_ok() || !shapes.is_empty()) {
            output.print_json(&shapes)?;
        }
        return listed;
    }
    let tree = of(&point, &what)?;
    let reader = BlobReader::following(&repository, log.state()).map_err(|e| describe(&what, &e))?;
    let files = FileReader::new(&reader, &tree).map_err(|e| describe(&what, &e))?;
    let wanted = command.path.as_deref().map(entry_path).unwrap_or_default();
    let (mut shapes, mut found) = (Vec::new(), false);
    let mut refused = Ok(());
    let listed = files.below(&wanted, |entry| {
        found = true;
        if output.json {
            shapes.push(shape(&entry));
        } else if refused.is_ok() {
            refused = output.print(&line(&entry));
        }
        Ok(())
    });
    listed.map_err(|e| Error::failed(&what).cause(chain(&e)))?;
    refused?;
    if !found && !wanted.is_empty() {
        return Err(Error::not_found(format!("{what}: there is no `{}`", shown_path(&wanted))));
    }
    if output.json { output.print_json(&shapes) } else { Ok(()) }
}

fn kind(entry: &Entry) -> (char, &'static str) {
    match entry.kind {
        Kind::Folder => ('d', "folder"),
        Kind::File { .. } => ('-', "file"),
        Kind::Again { .. } => ('-', "hard-link"),
        Kind::Link { .. } => ('l', "link"),
        Kind::CharacterDevice { .. } => ('c', "character-device"),
        Kind::BlockDevice { .. } => ('b', "block-device"),
        Kind::Pipe => ('p', "pipe"),
        Kind::Socket => ('s', "socket"),
        Kind::Unknown => ('?', "unknown"),
    }
}

fn size(entry: &Entry) -> Option<u64> {
    match entry.kind {
        Kind::File { size } => Some(size),
        _ => None,
    }
}

/// Where it leads.
fn leads_to(entry: &Entry) -> Option<String> {
    match &entry.kind {
        Kind::Link { target } => Some(shown_path(target)[1..].to_owned()),
        Kind::Again { of } => Some(shown_path(of)),
        _ => None,
    }
}

fn shape(entry: &Entry) -> Value {
    json!({
        "path": shown_path(&entry.path), "kind": kind(entry).1, "size_bytes": size(entry), "to": leads_to(entry),
        "mode": format!("{:04o}", entry.mode), "owner": entry.owner, "group": entry.group,
        "modified_unix_ns": i128::from(entry.modified.seconds) * 1_000_000_000 + i128::from(entry.modified.nanoseconds),
        "attributes": entry.attributes.iter().map(|(key, _)| shown_path(key)[1..].to_owned()).collect::<Vec<_>>(),
        "unread": entry.unread,
    })
}

/// As `ls -l` shows it.
fn line(entry: &Entry) -> String {
    let may = |bits: u32, at: usize| {
        let letter = ['r', 'w', 'x'][at];
        if bits & (4 >> at) != 0 { letter } else { '-' }
    };
    let mode: String =
        [6, 3, 0].iter().flat_map(|by| (0..3).map(move |at| may(entry.mode >> by & 7, at))).collect();
    let modified = u64::try_from(entry.modified.seconds).unwrap_or_default().saturating_mul(1000);
    let to = leads_to(entry).map_or(String::new(), |to| format!(" -> {to}"));
    let unread = entry
        .unread
        .as_ref()
        .map_or(String::new(), |why| format!(" (not read: it {})", &shown_path(why.as_bytes())[1..]));
    format!(
        "{}{mode} {:>5} {:>5} {:>12} {} {}{to}{unread}",
        kind(entry).0,
        entry.owner,
        entry.group,
        size(entry).unwrap_or(0),
        time(WallTime(modified)),
        shown_path(&entry.path)
    )
}

/// Restores files into a folder. What was not restored is told, and is an error at the end.
pub fn restore(
    reader: &BlobReader,
    point: &Point,
    wanted: Option<&Path>,
    to: &Path,
    what: &str,
    output: Output,
) -> Result<(RestoredFiles, Value), Error> {
    let tree = of(point, what)?;
    let files = FileReader::new(reader, &tree).map_err(|e| describe(what, &e))?;
    let wanted = wanted.map(entry_path).unwrap_or_default();
    let total = if wanted.is_empty() { tree.bytes } else { 0 };
    restored(to, total, what, output, |progress| {
        restore_files(&files, &wanted, to, Pace::default().threads, progress)
    })
}

/// Has `work` restore files into `to`, and tells what came of it.
pub fn restored(
    to: &Path,
    total: u64,
    what: &str,
    output: Output,
    work: impl FnOnce(&Progress) -> Result<RestoredFiles, BackupError>,
) -> Result<(RestoredFiles, Value), Error> {
    let progress = Progress::default();
    let restored = shown(output, "restore files", total, &progress, || work(&progress));
    let restored = restored.map_err(|e| Error::failed(what).cause(chain(&e)))?;
    for (path, why) in &restored.named {
        output.tell(&format!("{}: {}", shown_path(path), &shown_path(why.as_bytes())[1..]));
    }
    output.tell(&format!(
        "`{}`: {} files and folders, {}",
        to.display(),
        restored.entries,
        crate::output::bytes(restored.bytes)
    ));
    let failed = restored.named.iter().map(|(path, why)| json!({ "path": shown_path(path), "why": why }));
    let told = json!({
        "path": to, "entries": restored.entries, "size_bytes": restored.bytes, "not_restored": restored.failed,
        "named": failed.collect::<Vec<_>>(),
    });
    Ok((restored, told))
}

/// Whether all was restored.
pub fn judge(restored: &RestoredFiles, what: &str) -> Result<(), Error> {
    match restored.failed {
        0 => Ok(()),
        failed => Err(Error::failed(format!("{failed} files or folders were not restored as they were"))
            .cause(what.to_owned())
            .hint("all others were")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_write_on_terminals() {
        assert_eq!(shown_path(b"a/\x1b[2J\nb"), "/a/\\u{1b}[2J\\nb");
        assert_eq!(shown_path("büro/x y".as_bytes()), "/büro/x y");
    }

    #[test]
    fn paths_are_meant_from_the_root() {
        for (given, path) in
            [("/etc/fstab", "etc/fstab"), ("etc//fstab/", "etc/fstab"), ("/", ""), ("./a", "a")]
        {
            assert_eq!(entry_path(Path::new(given)), path.as_bytes(), "{given}");
        }
    }
}

//! `rempart mount`.

use super::access::{Access, chain};
use super::guest_files::readers;
use super::in_use::InUse;
use super::points::{all, find};
use super::serve::{Memory, tell_unreadable};
use super::stop::Stop;
use crate::Output;
use clap::Args;
use rempart_api::Error;
use rempart_backup::PointFiles;
use rempart_repository::log::Log;
use serde_json::json;
use std::path::PathBuf;
use tokio::sync::oneshot;

/// Shows restore points as files, read-only, until it is unmounted or ended by SIGTERM or SIGINT: VM/POINT/DISK.raw, and the
/// files in a disk below VM/POINT/DISK.files.
#[derive(Debug, Args)]
pub struct Mount {
    #[command(flatten)]
    access: Access,
    /// An empty folder to mount it on.
    folder: PathBuf,
    /// Only this one: `VM` for its newest point, or `VM@POINT`. Without it, all that there are now.
    point: Option<String>,
    #[command(flatten)]
    memory: Memory,
}

pub fn run(command: &Mount, output: Output) -> Result<(), Error> {
    let mut stop = Stop::new()?;
    let what = format!("cannot mount on `{}`", command.folder.display());
    let mut entries = std::fs::read_dir(&command.folder).map_err(|e| Error::invalid(&what).cause(e))?;
    if entries.next().is_some() {
        return Err(Error::refused(what).cause("the folder is not empty"));
    }
    drop(entries);
    let repository = command.access.open()?;
    let found = |log: &Log| {
        let points = match &command.point {
            Some(wanted) => vec![find(&repository, log, wanted)?],
            None => all(&repository, log, output)?,
        };
        Ok((points.iter().map(|(root, _)| *root).collect(), points))
    };
    let (_in_use, _, points) = InUse::begin(&repository, "mount", output, found)?;
    let cache = command.memory.cache(&repository)?;
    let owner = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let mut files = PointFiles::new(cache, owner, readers(output), Box::new(tell_unreadable(output)));
    for (root, point) in &points {
        files.add(*root, point);
    }
    let (ended, over) = oneshot::channel();
    let mounted = files.mount(
        &command.folder,
        Box::new(move || {
            // Nobody waits any more if it is ended by a signal.
            let _ = ended.send(());
        }),
    );
    let mounted = mounted.map_err(|e| {
        Error::failed(&what)
            .cause(chain(&e))
            .hint("this takes root and /dev/fuse, or the program `fusermount3`")
    })?;
    if output.json {
        output.print_json(&json!({ "folder": command.folder, "points": points.len() }))?;
    }
    output.tell(&format!("{} restore points are in `{}`", points.len(), command.folder.display()));
    let by_itself = stop.wait_or(over);
    if mounted.unmount() && !by_itself {
        output.tell("somebody still had files open there: they get errors from here on");
    }
    Ok(())
}

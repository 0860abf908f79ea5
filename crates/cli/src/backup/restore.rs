//! `rempart restore`.

use super::access::{Access, chain, describe};
use super::create::shown;
use super::points::{find, open_log};
use crate::{Output, output::bytes};
use clap::Args;
use rempart_api::Error;
use rempart_backup::{Content, FileTarget, Pace, Progress, restore_disk};
use rempart_repository::BlobReader;
use serde_json::json;
use std::path::PathBuf;

/// Restores disks as raw images, or one disk onto a block device.
#[derive(Debug, Args)]
pub struct Restore {
    #[command(flatten)]
    access: Access,
    /// `VM` for its newest point, or `VM@POINT`.
    point: String,
    /// Only this disk.
    #[arg(long)]
    disk: Option<String>,
    /// A folder in which a raw image is made of each disk.
    #[arg(long, required_unless_present = "device", conflicts_with = "device")]
    to: Option<PathBuf>,
    /// A block device that the disk is written to; all it holds is lost.
    #[arg(long, requires = "yes")]
    device: Option<PathBuf>,
    /// Overwrite the device.
    #[arg(long)]
    yes: bool,
}

pub fn run(command: &Restore, output: Output) -> Result<(), Error> {
    let repository = command.access.open()?;
    let log = open_log(&repository)?;
    let (root, point) = find(&repository, &log, &command.point)?;
    let what = format!("cannot restore `{}@{root}`", point.vm);
    let disks: Vec<_> = match &command.disk {
        Some(name) => vec![point.disk(name).ok_or_else(|| {
            let names: Vec<&str> = point.disks.iter().map(|disk| disk.name.as_str()).collect();
            Error::not_found(format!("{what}: it has no disk `{name}`"))
                .hint(format!("it has {}", names.join(", ")))
        })?],
        None => point.disks.iter().collect(),
    };
    if command.device.is_some() && disks.len() != 1 {
        return Err(
            Error::invalid(format!("{what}: it has {} disks", disks.len())).hint("name one with --disk")
        );
    }
    let index = repository.index(log.state()).map_err(|e| describe(&what, &e))?;
    let reader = BlobReader::new(&repository, log.state(), index);
    let failed = |e: rempart_backup::BackupError| Error::failed(&what).cause(chain(&e));
    let mut restored = Vec::new();
    for disk in disks {
        let (path, target) = match (&command.to, &command.device) {
            (Some(folder), _) => {
                std::fs::create_dir_all(folder)
                    .map_err(|e| Error::failed(&what).cause(format!("make `{}`: {e}", folder.display())))?;
                let path = folder.join(format!("{}.raw", disk.name));
                (path.clone(), FileTarget::create(&path, disk.size).map_err(failed)?)
            }
            (None, Some(device)) => (device.clone(), FileTarget::device(device, disk.size).map_err(failed)?),
            (None, None) => unreachable!("the arguments ask for one of both"),
        };
        let chunk_size = repository.chunk_size();
        let content = Content { tree: disk.tree(chunk_size), chunk_size, size: disk.size };
        let progress = Progress::default();
        let phase = format!("restore {}", disk.name);
        shown(output, &phase, disk.size, &progress, || {
            restore_disk(&reader, content, &target, Pace::default().threads, &progress)
        })
        .map_err(failed)?;
        output.tell(&format!("`{}`: {}", path.display(), bytes(disk.size)));
        restored.push(json!({ "disk": disk.name, "path": path, "size_bytes": disk.size }));
    }
    if output.json {
        return output.print_json(&json!({ "vm": point.vm, "point": root, "disks": restored }));
    }
    Ok(())
}

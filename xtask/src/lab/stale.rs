//! Names that say which run they belong to, and the removal of what dead runs left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::Namespace;
use super::volume;
use crate::workspace::{lab_dir, output};

const PREFIX: &str = "rempart-lab";

pub fn namespace_of_run(run: u32, part: &str) -> String {
    format!("{PREFIX}-{run}-{part}")
}

pub fn folder_of_run(run: u32) -> PathBuf {
    lab_dir().join("run").join(run.to_string())
}

/// Removes the namespaces, processes, mounts and files of runs whose process is gone.
pub fn clean_up() -> Result<()> {
    let listing = output(Command::new("ip").args(["netns", "list"])).context("list namespaces")?;
    for line in listing.lines() {
        let name = line.split(' ').next().unwrap_or_default();
        let run = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('-')?.split('-').next());
        if let Some(run) = run.and_then(|run| run.parse().ok())
            && !is_running(run)
        {
            eprintln!("lab: removing what run {run} left: {name}");
            Namespace::existing(name.to_owned()).destroy();
        }
    }
    remove_stale_folders(&lab_dir().join("run"));
    Ok(())
}

/// Removes the folders in `folder` that are named after processes that are gone.
fn remove_stale_folders(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if let Ok(run) = entry.file_name().to_string_lossy().parse()
            && !is_running(run)
        {
            remove_folder(&entry.path());
        }
    }
}

fn is_running(run: u32) -> bool {
    let Ok(program) = fs::read_link(format!("/proc/{run}/exe")) else { return false };
    program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("xtask"))
}

/// Removes a run's files, unmounting its volumes first.
pub fn remove_folder(folder: &Path) {
    volume::unmount_below(folder);
    if let Err(error) = fs::remove_dir_all(folder)
        && folder.exists()
    {
        eprintln!("lab: remove {}: {error}", folder.display());
    }
}

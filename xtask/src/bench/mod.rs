//! `cargo xtask bench`: what we do against what the peers do, in one run on one machine.

mod backup;
pub mod client;
mod foreign;
mod mirror;
mod moto;
mod random;
mod report;

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::workspace::{self, Profile};

#[derive(Debug, clap::Subcommand)]
pub enum Bench {
    /// Synchronous mirror and single copy, against QEMU's
    Mirror(mirror::Options),
    /// A guest's flushed writes while it is backed up into a repository that is slow, or dead, against none
    BackedUp(mirror::Run),
    /// Flushed writes of a guest in a QEMU that is not ours, while it is backed up, against those without
    BackedUpQemu(foreign::Options),
    /// Backups, restores and checks of a disk, against restic, borg and rustic
    Backup(backup::Options),
    /// Memory of backups and collections in a repository of many TiB, none of whose chunks are there
    LargeRepository(backup::large::Options),
}

pub fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Mirror(options) => mirror::run(options),
        Bench::BackedUp(run) => mirror::backed_up(run),
        Bench::BackedUpQemu(options) => foreign::run(options),
        Bench::Backup(options) => backup::run(options),
        Bench::LargeRepository(options) => backup::large::run(options),
    }
}

/// The one that is to be measured: a release build, or one that the user names.
fn program(named: Option<&Path>) -> Result<PathBuf> {
    match named {
        Some(program) => Ok(std::path::absolute(program)?),
        None => workspace::build_rempart(Profile::Release),
    }
}

//! The programs that are measured, each with a repository of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::image::{Image, are_equal, bytes_below};
use super::measure::{self, Taken};
use crate::workspace;

pub const NAME: &str = "disk";
pub const PASSPHRASE: &str = "bench";

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    Rempart { program: PathBuf, chunk_size: Option<String> },
    Restic,
    Borg,
    Rustic,
}

#[derive(Debug)]
pub struct Tool {
    program: Program,
    /// The repository, and what else the program keeps.
    folder: PathBuf,
    points: u32,
}

impl Program {
    pub fn name(&self) -> &'static str {
        match self {
            Program::Rempart { .. } => "rempart",
            Program::Restic => "restic",
            Program::Borg => "borg",
            Program::Rustic => "rustic",
        }
    }

    pub fn is_installed(&self) -> bool {
        let told = Command::new(self.name()).arg("--help").output();
        told.is_ok_and(|output| output.status.success())
    }
}

impl Tool {
    /// With a new, empty repository below `folder`.
    pub fn new(program: Program, folder: &Path) -> Result<Tool> {
        let folder = folder.join(program.name());
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("passphrase"), format!("{PASSPHRASE}\n"))?;
        let tool = Tool { program, folder, points: 0 };
        let mut init = match &tool.program {
            Program::Rempart { chunk_size, .. } => {
                let mut command = tool.command(&["repo", "create"]);
                command.arg(tool.repository());
                if let Some(size) = chunk_size {
                    command.args(["--chunk-size", size]);
                }
                command
            }
            Program::Restic => tool.command(&["init", "--repository-version", "2"]),
            Program::Borg => {
                let mut command = tool.command(&["init", "-e", "repokey-blake2"]);
                command.arg(tool.repository());
                command
            }
            // As near to ours as it comes: disks are cut at fixed places.
            Program::Rustic => tool.command(&[
                "init",
                "--set-chunker",
                "fixed_size",
                "--set-chunk-size",
                "1MiB",
                "--set-compression",
                "1",
            ]),
        };
        workspace::output(&mut init).context("make a repository")?;
        Ok(tool)
    }

    pub fn name(&self) -> &'static str {
        self.program.name()
    }

    /// The repository, and what else the program keeps.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn repository(&self) -> PathBuf {
        self.folder.join("repository")
    }

    /// With what opens its repository, and a cache of its own.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let program = match &self.program {
            Program::Rempart { program, .. } => program.as_path(),
            peer => Path::new(peer.name()),
        };
        let mut command = Command::new(program);
        self.environment(&mut command);
        match self.program {
            Program::Rempart { .. } | Program::Borg => {}
            Program::Restic => {
                command.arg("-q");
            }
            Program::Rustic => {
                command.args(["--no-progress", "--log-level", "error"]);
            }
        }
        command.args(arguments);
        command
    }

    /// Tells a command which repository it is, and what opens it.
    pub fn environment(&self, command: &mut Command) {
        let (repository, cache) = (self.repository(), self.folder.join("cache"));
        match self.program {
            Program::Rempart { .. } => {
                command.env("REMPART_REPOSITORY", repository).env("REMPART_CACHE_DIR", cache);
                command.env("REMPART_PASSPHRASE_FILE", self.folder.join("passphrase"));
            }
            Program::Restic => {
                command.env("RESTIC_REPOSITORY", repository).env("RESTIC_CACHE_DIR", cache);
                command.env("RESTIC_PASSWORD", PASSPHRASE);
            }
            Program::Borg => {
                command.env("BORG_PASSPHRASE", PASSPHRASE).env("BORG_BASE_DIR", cache);
            }
            Program::Rustic => {
                command.env("RUSTIC_REPOSITORY", repository).env("RUSTIC_CACHE_DIR", cache);
                command.env("RUSTIC_PASSWORD", PASSPHRASE);
            }
        }
    }

    pub fn back_up(&mut self, image: &Image) -> Result<Taken> {
        self.points += 1;
        let mut command = match self.program {
            Program::Rempart { .. } => self.command(&["backup", NAME, "--disk"]),
            Program::Restic | Program::Rustic => self.command(&["backup"]),
            Program::Borg => {
                let mut command =
                    self.command(&["create", "--chunker-params", "fixed,1048576", "-C", "zstd,1"]);
                command.arg(format!("{}::{}", self.repository().display(), self.points));
                command
            }
        };
        measure::run(command.arg(&image.path))
    }

    /// Restores the newest point to a file, which has to be as the image is. Ends as the program does, and, second, when all is
    /// on stable storage: not every program waits for that.
    pub fn restore(&self, image: &Image) -> Result<(Taken, Taken)> {
        let to = self.folder.join("restored");
        fs::create_dir_all(&to)?;
        let below = to.join(image.path.strip_prefix("/").expect("it is absolute"));
        let (mut command, file) = match self.program {
            Program::Rempart { .. } => (self.command(&["restore", NAME, "--to"]), to.join("disk0.raw")),
            Program::Restic => (self.command(&["restore", "latest", "--target"]), below),
            Program::Rustic => (self.command(&["restore", "latest"]), below),
            Program::Borg => {
                let mut command = self.command(&["extract"]);
                command.arg(format!("{}::{}", self.repository().display(), self.points));
                command.current_dir(&to);
                (command, below)
            }
        };
        if self.program != Program::Borg {
            command.arg(&to);
        }
        let taken = measure::run(&mut command)?;
        let synced = taken.and(measure::run(Command::new("sync").arg(&file))?);
        ensure!(are_equal(&file, &image.path)?, "{} restored something else", self.name());
        fs::remove_dir_all(&to)?;
        Ok((taken, synced))
    }

    /// Reads all of the repository's data.
    pub fn check(&self) -> Result<Taken> {
        let mut command = match self.program {
            Program::Rempart { .. } => self.command(&["verify", NAME]),
            Program::Restic | Program::Rustic => self.command(&["check", "--read-data"]),
            Program::Borg => {
                let mut command = self.command(&["check", "--verify-data"]);
                command.arg(self.repository());
                command
            }
        };
        measure::run(&mut command)
    }

    pub fn stored(&self) -> Result<u64> {
        bytes_below(&self.repository())
    }
}

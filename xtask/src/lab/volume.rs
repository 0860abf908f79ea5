//! A small disk that can be made to fail: ext4 on a loop device on a file in a tmpfs.
//!
//! A file in the ext4 fills it: writes get "no space". A file in the tmpfs takes away the space under the loop device:
//! blocks not written before cannot be, and fsync returns an I/O error.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::workspace::{output, run};

#[derive(Debug)]
pub struct Volume {
    /// Where the tmpfs is mounted.
    below: PathBuf,
    mount: PathBuf,
}

impl Volume {
    /// Mounts a volume of `mebibytes` at `mount`.
    pub fn create(mount: &Path, mebibytes: u64) -> Result<Volume> {
        let volume = Volume { below: mount.with_extension("below"), mount: mount.to_owned() };
        fs::create_dir_all(&volume.below)?;
        fs::create_dir_all(&volume.mount)?;
        let size = format!("size={}m", mebibytes + 16);
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "rempart-lab"]).arg(&volume.below))?;
        let image = volume.below.join("image");
        File::create(&image)?.set_len(mebibytes << 20)?;
        output(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image))?;
        run(Command::new("mount").args(["-o", "loop,errors=continue"]).arg(&image).arg(&volume.mount))?;
        Ok(volume)
    }

    /// Fills the file system: writers get "no space left".
    pub fn fill(&self) -> Result<()> {
        fill(&self.mount.join("ballast"))
    }

    /// Takes the space under the file system: fsync of newly used blocks fails.
    pub fn fail_fsync(&self) -> Result<()> {
        fill(&self.below.join("ballast"))
    }

    /// Undoes either.
    pub fn relieve(&self) -> Result<()> {
        for ballast in [self.mount.join("ballast"), self.below.join("ballast")] {
            if ballast.exists() {
                fs::remove_file(&ballast).with_context(|| format!("remove {}", ballast.display()))?;
            }
        }
        Ok(())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        unmount_below(&self.mount);
        unmount_below(&self.below);
    }
}

fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    for size in [1 << 20, 4096] {
        let block = vec![0x5A; size];
        loop {
            match file.write_all(&block).and_then(|()| file.sync_data()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                Err(error) => return Err(error).with_context(|| format!("fill {}", path.display())),
            }
        }
    }
    Ok(())
}

/// Unmounts everything mounted at or below a folder, the newest first; loop devices go with their mounts.
pub fn unmount_below(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points: Vec<_> =
        mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from).collect();
    for point in points.iter().rev().filter(|point| point.starts_with(folder)) {
        if let Err(error) = run(Command::new("umount").arg("-l").arg(point)) {
            eprintln!("lab: {error:#}");
        }
    }
}

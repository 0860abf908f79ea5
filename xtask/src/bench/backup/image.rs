//! The disk that everybody backs up: an ext4 file system full of this machine's programs, and what changes on it.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::bench::random::Random;
use crate::workspace;

/// What changes is written in blocks of it.
const BLOCK: u64 = 4096;

#[derive(Debug)]
pub struct Image {
    pub path: PathBuf,
    pub bytes: u64,
}

/// Where one per cent of a disk's blocks is written anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Each somewhere else.
    Scattered,
    /// One after the other.
    Clustered,
}

impl Image {
    /// Made of `/usr`, by the program that makes file systems.
    pub fn make(path: &Path, bytes: u64) -> Result<Image> {
        File::create(path)
            .and_then(|file| file.set_len(bytes))
            .with_context(|| format!("make {}", path.display()))?;
        let mut format = Command::new("mke2fs");
        format.args(["-q", "-t", "ext4", "-d", "/usr"]).arg(path);
        workspace::output(&mut format).context("put /usr on a disk; --size gives it another size")?;
        Ok(Image { path: path.to_owned(), bytes })
    }

    /// Into the page cache, where nobody's reading waits for the disk.
    pub fn warm(&self) -> Result<()> {
        let file = File::open(&self.path)?;
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < self.bytes {
            at += file.read_at(&mut buffer, at)?.max(1) as u64;
        }
        Ok(())
    }

    /// What [`Change`] writes, by offset. The same for the same seed.
    pub fn changes(&self, change: Change, seed: u64) -> Vec<(u64, Vec<u8>)> {
        let blocks = self.bytes / BLOCK;
        let count = blocks / 100;
        let mut random = Random::new(seed);
        let places: BTreeSet<u64> = match change {
            Change::Scattered => (0..count).map(|_| random.next() % blocks).collect(),
            Change::Clustered => {
                let first = random.next() % (blocks - count);
                (first..first + count).collect()
            }
        };
        let noise = |block| {
            let mut bytes = vec![0; BLOCK as usize];
            random.fill(&mut bytes);
            (block * BLOCK, bytes)
        };
        places.into_iter().map(noise).collect()
    }

    pub fn write(&self, changes: &[(u64, Vec<u8>)]) -> Result<()> {
        let file = File::options().write(true).open(&self.path)?;
        changes.iter().try_for_each(|(at, bytes)| file.write_all_at(bytes, *at))?;
        Ok(file.sync_all()?)
    }
}

/// Bytes of all files below a folder.
pub fn bytes_below(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { bytes_below(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

/// Whether two files are the same, byte by byte.
pub fn are_equal(one: &Path, other: &Path) -> Result<bool> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    let bytes = one.metadata()?.len();
    if other.metadata()?.len() != bytes {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < bytes {
        let here = (bytes - at).min(1 << 20) as usize;
        one.read_exact_at(&mut left[..here], at)?;
        other.read_exact_at(&mut right[..here], at)?;
        if left[..here] != right[..here] {
            return Ok(false);
        }
        at += here as u64;
    }
    Ok(true)
}

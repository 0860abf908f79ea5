//! The disks that all of them serve.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::load::Random;

pub const BYTES: u64 = 1 << 30;

/// Written, not only allocated: a first write into allocated space costs the file system a journal commit. Noise, so that
/// nothing of it can be skipped or compressed when it is copied. Not left in the page cache.
pub fn preallocate(path: &Path) -> Result<()> {
    let mut file = File::options().create(true).write(true).truncate(true).mode(0o600).open(path)?;
    let mut random = Random::new(BYTES);
    let mut bytes = vec![0; 1 << 20];
    for _ in 0..BYTES / bytes.len() as u64 {
        random.fill(&mut bytes);
        file.write_all(&bytes)?;
    }
    file.sync_all().with_context(|| format!("write {}", path.display()))?;
    // SAFETY: the descriptor is open for the call.
    let refused = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    ensure!(refused == 0, "drop `{}` from the page cache: error {refused}", path.display());
    Ok(())
}

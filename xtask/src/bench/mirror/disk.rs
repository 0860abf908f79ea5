//! The disks that all of them serve.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::bench::random::Random;

pub const BYTES: u64 = 1 << 30;

/// Written, not only allocated: a first write into allocated space costs the file system a journal commit. Noise, so that
/// nothing of it can be skipped or compressed when it is copied. Not left in the page cache.
pub fn preallocate(path: &Path, len: u64) -> Result<()> {
    let mut file = File::options().create(true).write(true).truncate(true).mode(0o600).open(path)?;
    let mut random = Random::new(len);
    let mut bytes = vec![0; 1 << 20];
    for _ in 0..len / bytes.len() as u64 {
        random.fill(&mut bytes);
        file.write_all(&bytes)?;
    }
    file.sync_all().with_context(|| format!("write {}", path.display()))?;
    // SAFETY: the descriptor is open for the call.
    let refused = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    ensure!(refused == 0, "drop `{}` from the page cache: error {refused}", path.display());
    Ok(())
}

/// What the disk takes from nobody else: 1 MiB writes past the page cache, in order, 4 at a time. Writes a second.
pub fn sequential_writes(path: &Path, seconds: u64) -> Result<f64> {
    const BLOCK: u64 = 1 << 20;
    const IN_FLIGHT: u64 = 4;
    let file = File::options().write(true).custom_flags(libc::O_DIRECT).open(path)?;
    let begun = Instant::now();
    let write = |first: u64| -> Result<u64> {
        // Begins a page.
        let mut bytes = vec![0; BLOCK as usize + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        let bytes = &mut bytes[start..start + BLOCK as usize];
        Random::new(first).fill(bytes);
        let mut written = 0;
        while begun.elapsed() < Duration::from_secs(seconds) {
            file.write_all_at(bytes, (first + written * IN_FLIGHT) * BLOCK % BYTES)?;
            written += 1;
        }
        Ok(written)
    };
    let written: Result<u64> = thread::scope(|scope| {
        let threads: Vec<_> = (0..IN_FLIGHT).map(|first| scope.spawn(move || write(first))).collect();
        threads.into_iter().map(|thread| thread.join().expect("it does not panic")).sum()
    });
    let written = written.with_context(|| format!("write to `{}`", path.display()))?;
    file.sync_data()?;
    Ok(written as f64 / begun.elapsed().as_secs_f64())
}

//! Something that serves a disk over NBD on a unix socket, and what it costs.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::interrupt;

const DRAIN_DEADLINE: Duration = Duration::from_secs(60);
const DRAIN_POLL: Duration = Duration::from_millis(10);

#[derive(Debug, Clone)]
pub struct Server {
    pub name: &'static str,
    pub socket: PathBuf,
    /// Export name to ask for.
    pub export: &'static str,
    /// Processes that together do the serving; their processor time is counted.
    pub processes: Vec<i32>,
    /// Where what was flushed is on its way to.
    pub images: Vec<Image>,
}

/// An image that follows a log.
#[derive(Debug, Clone)]
pub struct Image {
    pub file: PathBuf,
    /// The node's API, which tells how far behind it is.
    pub api: PathBuf,
    pub vm: &'static str,
}

impl Server {
    /// Processor time used so far by all its processes, in seconds.
    pub fn processor_seconds(&self) -> Result<f64> {
        self.processes.iter().map(|&id| processor_seconds(id)).sum()
    }

    /// Returns when every image has everything, on the disk.
    pub fn drain(&self) -> Result<()> {
        let end = Instant::now() + DRAIN_DEADLINE;
        for image in &self.images {
            while image.is_behind()? {
                interrupt::check()?;
                if Instant::now() > end {
                    bail!("`{}` does not get all of the log", image.file.display());
                }
                thread::sleep(DRAIN_POLL);
            }
            File::open(&image.file)
                .and_then(|file| file.sync_data())
                .with_context(|| format!("sync {}", image.file.display()))?;
        }
        Ok(())
    }
}

impl Image {
    fn is_behind(&self) -> Result<bool> {
        let metrics = get(&self.api, "/metrics").context("ask a node for its metrics")?;
        let wanted = format!("rempart_vm_unapplied_bytes{{vm=\"{}\"}} ", self.vm);
        let value = metrics.lines().find_map(|line| line.strip_prefix(&wanted));
        let value = value.with_context(|| format!("the metrics do not tell of `{}`", self.vm))?;
        Ok(value.trim().parse::<u64>().context("parse a metric")? > 0)
    }
}

/// Asks over HTTP on a unix socket.
fn get(socket: &Path, path: &str) -> Result<String> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Processor time that a process has used so far, in seconds.
pub fn processor_seconds(id: i32) -> Result<f64> {
    // SAFETY: sysconf has no preconditions.
    let ticks_per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).context("read a server's processor time")?;
    // The name, in parentheses, may hold anything; utime and stime are fields 14 and 15 (proc(5)).
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let mut ticks = 0;
    for field in after_name.split_whitespace().skip(11).take(2) {
        ticks += field.parse::<u64>().context("parse a server's processor time")?;
    }
    Ok(ticks as f64 / ticks_per_second)
}

/// Memory that a process has to itself: not its program, nor the page cache.
pub fn private_bytes(id: i32) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{id}/smaps_rollup")).context("read a server's memory")?;
    let anonymous = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:"));
    let kib = anonymous.and_then(|rest| rest.trim().strip_suffix(" kB")).context("find `Anonymous:`")?;
    Ok(kib.trim().parse::<u64>().context("parse a server's memory")? * 1024)
}

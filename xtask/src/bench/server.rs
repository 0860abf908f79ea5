//! Something that serves a disk over NBD on a unix socket, and what it costs.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

#[derive(Debug, Clone)]
pub struct Server {
    pub name: &'static str,
    pub socket: PathBuf,
    /// Export name to ask for.
    pub export: &'static str,
    /// Processes that together do the serving; their processor time is counted.
    pub processes: Vec<i32>,
}

impl Server {
    /// A server whose processes nobody told us.
    pub fn at(name: &'static str, socket: PathBuf) -> Server {
        Server { name, socket, export: "", processes: Vec::new() }
    }

    /// Processor time used so far by all its processes, in seconds.
    pub fn processor_seconds(&self) -> Result<f64> {
        // SAFETY: sysconf has no preconditions.
        let ticks_per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
        let mut ticks = 0;
        for id in &self.processes {
            let stat =
                fs::read_to_string(format!("/proc/{id}/stat")).context("read a server's processor time")?;
            // The name, in parentheses, may hold anything; utime and stime are fields 14 and 15 (proc(5)).
            let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            let fields: Vec<_> = after_name.split_whitespace().collect();
            for field in &fields[11..13] {
                ticks += field.parse::<u64>().context("parse a server's processor time")?;
            }
        }
        Ok(ticks as f64 / ticks_per_second)
    }
}

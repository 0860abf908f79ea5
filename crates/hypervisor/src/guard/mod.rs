//! The guard: one small process per running machine, parent of its QEMU and owner of its lease.

use std::path::PathBuf;

/// Arguments of `rempart guard`.
#[derive(Debug, Clone)]
pub struct Args {
    /// The machine's run directory, with the launch file that the driver wrote.
    pub run_dir: PathBuf,
}

/// Runs a guard until its QEMU is gone. Call it first thing in a process that has one thread and nothing else to
/// do; returns the process's exit status. It reports its start on stdout, in one line, to the driver.
pub fn run(_args: Args) -> i32 {
    unimplemented!()
}

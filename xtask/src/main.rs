//! What a developer runs: `cargo xtask …`.

mod guest;
mod interrupt;
mod lab;
mod lab_check;
mod observer;
mod setup;
mod verify;
mod workspace;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Set-up, demo, tests and benchmarks of Rempart")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what the other tasks need (Debian 12, as root)
    Setup,
    /// Try the lab itself: the guest under plain QEMU, cuts, a power failure
    Lab,
}

fn main() -> Result<()> {
    interrupt::install();
    match Arguments::parse().task {
        Task::Setup => setup::ensure().map(drop),
        Task::Lab => lab_check::run(&setup::ensure()?),
    }
}

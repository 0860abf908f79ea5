//! What a developer runs: `cargo xtask …`.

mod bench;
mod demo;
mod fuzz;
mod guest;
mod interrupt;
mod kill;
mod lab;
mod lab_check;
mod layers;
mod observer;
mod setup;
mod sim;
mod suites;
mod verify;
mod workspace;

use std::process::ExitCode;

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
    /// A VM survives the loss of its server, live; or any other row of the failure table
    Demo(demo::Options),
    /// Run every test; prints seconds per suite and `N passed, N failed`
    Test(suites::Options),
    /// Measure against the peers
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Feed the parsers what nobody meant them to read
    Fuzz(fuzz::Options),
    /// Play simulated worlds: `cargo xtask sim --seeds 100000`
    Sim(sim::Options),
    /// Kill the real program at each step of its backups, collections and copies
    Kill(kill::Options),
    /// Check who depends on whom against docs/architecture.md
    Layers,
    /// Try the lab itself: the guest under plain QEMU, cuts, a power failure
    Lab,
}

fn main() -> ExitCode {
    interrupt::install();
    let result = match Arguments::parse().task {
        Task::Setup => setup::ensure().map(drop),
        Task::Demo(options) => demo::run(&options),
        Task::Test(options) => suites::run_all(&options),
        Task::Bench(bench) => bench::run(&bench),
        Task::Fuzz(options) => fuzz::run_targets(&options),
        Task::Sim(options) => sim::play(&options),
        Task::Kill(options) => kill::run_all(&options),
        Task::Layers => layers::check(),
        Task::Lab => setup::ensure().and_then(|kernel| lab_check::run(&kernel)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            for cause in error.chain().skip(1) {
                eprintln!("cause: {cause}");
            }
            ExitCode::FAILURE
        }
    }
}

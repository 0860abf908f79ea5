//! `cargo xtask sim`: the simulator, built as it should be for many worlds.

use std::process::Command;

use anyhow::Result;

use crate::workspace::{cargo, run};

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Repositories, their writers and collectors, instead of mirrored machines
    #[arg(long)]
    repository: bool,
    /// Passed on to the simulator: `--seeds 100000`, `--seed 42 --verbose`, `--table`; see `cargo xtask sim -- --help`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub fn play(options: &Options) -> Result<()> {
    let mut command: Command = cargo();
    command.args(["run", "--quiet", "--release", "-p"]);
    if options.repository {
        // Hostile writers are behind the same feature as mistakes.
        command.args(["rempart-repository-sim", "--features", "planted-bugs"]);
    } else {
        command.arg("rempart-sim");
    }
    command.arg("--").args(&options.arguments);
    run(&mut command)
}

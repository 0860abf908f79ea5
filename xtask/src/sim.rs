//! `cargo xtask sim`: the simulator, built as it should be for many worlds.

use std::process::Command;

use anyhow::Result;

use crate::workspace::{cargo, run};

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Passed on to the simulator: `--seeds 100000`, `--seed 42 --verbose`, `--table`; see `cargo xtask sim -- --help`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub fn play(options: &Options) -> Result<()> {
    let mut command: Command = cargo();
    command.args(["run", "--quiet", "--release", "-p", "rempart-sim", "--"]).args(&options.arguments);
    run(&mut command)
}

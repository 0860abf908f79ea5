//! `cargo xtask kill`: the real program, killed before each change that it makes to a repository.

use anyhow::Result;

use crate::workspace::{cargo, run};

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Kill at one step of so many
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
    /// Rounds in which one of those that run at once is killed
    #[arg(long, default_value_t = 100)]
    rounds: u64,
    /// Only `backup`, `collection`, `copy`, `forget` (and `retain`), `undelete`, `repair` or `key`, in directories; or `buckets`; or
    /// `at_once`
    #[arg(default_value = "")]
    only: String,
}

pub fn run_all(options: &Options) -> Result<()> {
    let mut command = cargo();
    command.env("REMPART_KILL_EVERY", options.every.to_string());
    command.env("REMPART_ROUNDS_AT_ONCE", options.rounds.to_string());
    command.args(["test", "--quiet", "-p", "rempart", "--test", "it", "--"]);
    // A module of stories.
    command.arg(format!("killed::{}", options.only)).arg("--nocapture");
    run(&mut command)
}

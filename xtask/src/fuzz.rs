//! `cargo xtask fuzz`: the fuzz targets, on the stable toolchain.
//!
//! `-C passes=sancov-module` and LLVM's options give libFuzzer the coverage it steers by; no sanitizer is needed for that.
//! What the tests replay is the corpus in `fuzz/corpus`; what a run finds goes to a working copy below the target
//! directory, so that it does not grow by itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::interrupt;
use crate::workspace::{cargo, output, root, run, target_dir};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const FLAGS: &[&str] = &[
    "--cfg",
    "fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Clink-dead-code",
];
/// Of any input: a batch with a payload, several frames.
const MAX_INPUT_BYTES: u32 = 16 << 10;
/// An input that takes longer is a finding.
const MAX_INPUT_SECONDS: u32 = 10;
const MAX_MEMORY_MIB: u32 = 1024;

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Only this target; all of them, one after the other, when absent
    target: Option<String>,
    /// How long each target runs
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Put what reaches new code into `fuzz/corpus`, as few inputs as possible
    #[arg(long)]
    keep: bool,
}

pub fn run_targets(options: &Options) -> Result<()> {
    let known = targets()?;
    let wanted = match &options.target {
        Some(target) if !known.contains(target) => {
            bail!("there is no fuzz target `{target}`\nhint: the targets are {}", known.join(", "))
        }
        Some(target) => vec![target.clone()],
        None => known,
    };
    if output(Command::new("c++").arg("--version")).is_err() {
        bail!("libFuzzer is built by a C++ compiler; as root, run:\n  apt-get install g++");
    }
    let programs = build()?;
    let mut failed = Vec::new();
    for target in &wanted {
        println!("\n── {target}");
        if let Err(error) = play(&programs, target, options) {
            println!("FAILED: {error:#}");
            failed.push(target.as_str());
        }
        interrupt::check()?;
    }
    if !failed.is_empty() {
        bail!("found something: {}; inputs are in {}", failed.join(", "), artifacts().display());
    }
    println!("\n{} targets, {} s each, nothing found", wanted.len(), options.seconds);
    Ok(())
}

fn targets() -> Result<Vec<String>> {
    let folder = root().join("fuzz/fuzz_targets");
    let mut names: Vec<String> = fs::read_dir(&folder)
        .with_context(|| format!("read {}", folder.display()))?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned))
        .collect();
    names.sort();
    Ok(names)
}

fn home() -> PathBuf {
    target_dir().join("fuzz")
}

fn artifacts() -> PathBuf {
    home().join("artifacts")
}

/// Builds every target and returns the folder with the programs.
fn build() -> Result<PathBuf> {
    let mut command = cargo();
    command.current_dir(root().join("fuzz"));
    // The target is named, although it is the host's, so that the flags stay away from build scripts and macros.
    command.args(["build", "--release", "--target", TARGET, "--target-dir"]).arg(home());
    command.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}")).env_remove("RUSTFLAGS");
    run(&mut command)?;
    Ok(home().join(TARGET).join("release"))
}

fn play(programs: &Path, target: &str, options: &Options) -> Result<()> {
    let committed = root().join("fuzz/corpus").join(target);
    let working = home().join("corpus").join(target);
    let artifacts = artifacts().join(target);
    for folder in [&committed, &working, &artifacts] {
        fs::create_dir_all(folder)?;
    }
    let fuzzer = || {
        let mut command = Command::new(programs.join(target));
        command.arg(format!("-max_len={MAX_INPUT_BYTES}"));
        command
    };
    run(fuzzer()
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-timeout={MAX_INPUT_SECONDS}"))
        .arg(format!("-rss_limit_mb={MAX_MEMORY_MIB}"))
        .arg("-print_final_stats=1")
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args([&working, &committed]))?;
    if options.keep {
        run(fuzzer().arg("-merge=1").args([&committed, &working]))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_corpus_and_is_declared() {
        let manifest = fs::read_to_string(root().join("fuzz/Cargo.toml")).unwrap();
        let targets = targets().unwrap();
        assert!(targets.len() >= 7, "{targets:?}");
        for target in targets {
            assert!(manifest.contains(&format!("name = \"{target}\"")), "{target} is not declared");
            let corpus = root().join("fuzz/corpus").join(&target);
            assert!(
                fs::read_dir(corpus).is_ok_and(|mut files| files.next().is_some()),
                "{target} has no corpus"
            );
        }
    }
}

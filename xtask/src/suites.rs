//! `cargo xtask test`: everything, with seconds a suite, ending in one line that counts.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::demo::{self, Fault};
use crate::workspace::{cargo, run};
use crate::{lab_check, layers, setup};

/// The rows of the failure table played each time; `--all-faults` plays them all, for twenty minutes.
const SLICE: &[Fault] = &[
    Fault::NodeSilent,
    Fault::QemuKilled,
    Fault::DaemonKilled,
    Fault::PeerLinkCut,
    Fault::PrimaryIsolated,
    Fault::ForcedTakeoverDivergence,
    Fault::BackedUp,
];

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Only these suites
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Suite>,
    /// Play every row of the failure table, not seven
    #[arg(long)]
    all_faults: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    /// Formatting, lints, layers
    Source,
    /// Unit, property, simulation and integration tests of every crate
    Workspace,
    /// The lab's own instruments
    Lab,
    /// Scenarios on real virtual machines
    Scenarios,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
}

impl Count {
    fn of(result: Result<()>) -> Count {
        match result {
            Ok(()) => Count { passed: 1, failed: 0 },
            Err(error) => {
                println!("FAILED: {error:#}");
                Count { passed: 0, failed: 1 }
            }
        }
    }

    fn add(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

pub fn run_all(options: &Options) -> Result<()> {
    let kernel = setup::ensure()?;
    let mut done: Vec<(&str, Duration, Count)> = Vec::new();
    let mut suite = |name: &'static str, kind: Suite, work: &mut dyn FnMut() -> Count| {
        if options.only.is_empty() || options.only.contains(&kind) {
            println!("\n══ {name}");
            let started = Instant::now();
            let count = work();
            done.push((name, started.elapsed(), count));
        }
    };
    suite("formatting", Suite::Source, &mut || Count::of(run(cargo().args(["fmt", "--all", "--check"]))));
    suite("lints", Suite::Source, &mut || {
        Count::of(run(cargo().args([
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--",
            "-Dwarnings",
        ])))
    });
    suite("layers", Suite::Source, &mut || Count::of(layers::check()));
    suite("licences and banned crates", Suite::Source, &mut licences);
    suite("build", Suite::Workspace, &mut || {
        Count::of(run(cargo().args(["build", "--quiet", "--workspace", "--all-targets"])))
    });
    suite("tests of the workspace", Suite::Workspace, &mut tests_of_workspace);
    suite("planted mistakes of the cluster core", Suite::Workspace, &mut || {
        counted(cargo().args([
            "test",
            "--quiet",
            "-p",
            "rempart-cluster",
            "--features",
            "planted-bugs",
            "planted",
        ]))
    });
    suite("planted mistakes of the repository's log", Suite::Workspace, &mut || {
        counted(cargo().args([
            "test",
            "--quiet",
            "-p",
            "rempart-repository-sim",
            "--features",
            "planted-bugs",
            "planted",
        ]))
    });
    suite("documentation tests", Suite::Workspace, &mut || {
        counted(cargo().args(["test", "--quiet", "--workspace", "--doc", "--no-fail-fast"]))
    });
    suite("lab instruments", Suite::Lab, &mut || Count::of(lab_check::run(&kernel)));
    suite("scenarios", Suite::Scenarios, &mut || {
        let faults = if options.all_faults { Fault::rows() } else { SLICE.to_vec() };
        match demo::play_faults(faults, &kernel) {
            Ok((passed, failed)) => Count { passed, failed },
            Err(error) => Count::of(Err(error)),
        }
    });

    println!();
    let mut total = Count::default();
    for (name, took, count) in done {
        println!("{:8.1} s  {name}: {} passed, {} failed", took.as_secs_f64(), count.passed, count.failed);
        total.add(count);
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed > 0 || total.passed == 0 {
        bail!("not everything passed");
    }
    Ok(())
}

/// Takes minutes to install, so it is checked where somebody did.
fn licences() -> Count {
    if !cargo().args(["deny", "--version"]).output().is_ok_and(|output| output.status.success()) {
        println!("not checked: cargo-deny is not installed (`cargo install --locked cargo-deny`)");
        return Count::default();
    }
    let checks = ["deny", "--offline", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"];
    Count::of(run(cargo().args(checks)))
}

fn tests_of_workspace() -> Count {
    let has_nextest =
        cargo().args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success());
    if has_nextest {
        let plain =
            ["nextest", "run", "--workspace", "--no-fail-fast", "--hide-progress-bar", "--color", "never"];
        counted(cargo().args(plain).args(["--status-level", "fail", "--final-status-level", "slow"]))
    } else {
        counted(cargo().args(["test", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast"]))
    }
}

/// Runs a test runner, shows what it prints, and counts.
fn counted(command: &mut Command) -> Count {
    let mut count = Count::default();
    let result = (|| {
        // Both outputs go into one pipe: runners differ in where they print their summary.
        let (reader, writer) = std::io::pipe()?;
        command.stdout(writer.try_clone()?).stderr(writer).stdin(Stdio::null());
        let mut child = command.spawn().context("start the test runner")?;
        // Our copies of the writing end must go, or the end of the output never comes.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        for line in BufReader::new(reader).lines() {
            let line = line?;
            println!("{line}");
            if let Some(found) = counts_of(&line) {
                count.add(found);
            }
        }
        let status = child.wait()?;
        if !status.success() && count.failed == 0 {
            bail!("the test runner failed: {status}");
        }
        Ok(())
    })();
    if let Err(error) = result {
        count.add(Count::of(Err(error)));
    }
    count
}

/// The counts in a closing line of nextest (`Summary [1.2s] 9 tests run: 8 passed, 1 failed`) or of the built-in
/// harness (`test result: ok. 8 passed; 1 failed; …`).
fn counts_of(line: &str) -> Option<Count> {
    // One runner shows, indented, what the other said of a test that failed.
    if !line.trim_start().starts_with("Summary [") && !line.starts_with("test result: ") {
        return None;
    }
    let words: Vec<_> =
        line.split(|c: char| c.is_whitespace() || ",;".contains(c)).filter(|w| !w.is_empty()).collect();
    let before = |names: &[&str]| {
        let pairs = words.windows(2).filter(|pair| names.contains(&pair[1]));
        pairs.filter_map(|pair| pair[0].parse::<u64>().ok()).sum()
    };
    Some(Count { passed: before(&["passed"]), failed: before(&["failed", "timed"]) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_both_runners_are_read() {
        let count = |passed, failed| Some(Count { passed, failed });
        assert_eq!(
            counts_of("     Summary [   0.013s] 11 tests run: 10 passed (1 slow), 1 failed, 2 skipped"),
            None.or(count(10, 1))
        );
        assert_eq!(counts_of("test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured"), count(5, 0));
        assert_eq!(counts_of("Summary [ 9s] 3 tests run: 2 passed, 1 timed out, 0 skipped"), count(2, 1));
        assert_eq!(counts_of("    test result: FAILED. 0 passed; 1 failed; 0 ignored"), None);
        assert_eq!(counts_of("5 passed"), None);
    }
}

//! `cargo xtask sim --repository`: campaigns over simulated repositories.

use rempart_repository_sim::{World, campaign};
use std::process::ExitCode;

/// Seeds from which on a campaign must meet everything.
const LARGE: u64 = 100_000;

const USAGE: &str = "\
usage: rempart-repository-sim [--seeds N] [--from N] [--threads N] [--least N]   a campaign; from 100000 seeds on all that it
                                                                                 must meet, 1000 times or N
       rempart-repository-sim --seed N [--verbose]                               one world, and what happened in it
       rempart-repository-sim --planted all|NAME [--seeds N]                     mistakes that must be found";

#[derive(Debug, Default)]
struct Arguments {
    seed: Option<u64>,
    seeds: Option<u64>,
    from: u64,
    threads: usize,
    least: Option<u64>,
    verbose: bool,
    planted: Option<String>,
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(why) => {
            eprintln!("error: {why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match (&arguments.planted, arguments.seed) {
        (Some(name), _) => planted(name, &arguments),
        (None, Some(seed)) => one(seed, arguments.verbose),
        (None, None) => many(&arguments),
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments { threads: 1, ..Arguments::default() };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("`{word}` needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("`{text}` is no number"));
        match word.as_str() {
            "--seed" => arguments.seed = Some(number(value()?)?),
            "--seeds" => arguments.seeds = Some(number(value()?)?),
            "--from" => arguments.from = number(value()?)?,
            "--threads" => arguments.threads = number(value()?)? as usize,
            "--least" => arguments.least = Some(number(value()?)?),
            "--planted" => arguments.planted = Some(value()?),
            "--verbose" => arguments.verbose = true,
            _ => return Err(format!("`{word}` is not known")),
        }
    }
    Ok(arguments)
}

fn one(seed: u64, verbose: bool) -> ExitCode {
    let mut world = World::new(seed, true);
    let result = world.run();
    let trace = world.trace();
    let shown = if verbose { trace.len() } else { 60 };
    trace[trace.len().saturating_sub(shown)..].iter().for_each(|line| println!("{line}"));
    match result {
        Ok(()) => {
            println!("seed {seed}: every promise kept");
            ExitCode::SUCCESS
        }
        Err(broken) => {
            println!("seed {seed} FAILED: {broken}");
            ExitCode::FAILURE
        }
    }
}

fn many(arguments: &Arguments) -> ExitCode {
    let seeds = arguments.from..arguments.from + arguments.seeds.unwrap_or(1000);
    let report = campaign(seeds, arguments.threads);
    for (what, times) in &report.met {
        println!("{times:10}  {what}");
    }
    let seconds = report.elapsed.as_secs_f64();
    let failed = u64::from(report.failure.is_some());
    println!(
        "{} seeds in {seconds:.1} s ({:.0} a second), {failed} failed",
        report.seeds,
        report.seeds as f64 / seconds
    );
    let least = arguments.least.unwrap_or(if report.seeds >= LARGE { 1000 } else { 0 });
    let seldom = report.too_seldom(least);
    match report.failure {
        None if seldom.is_empty() => ExitCode::SUCCESS,
        None => {
            println!("met less than {least} times: {seldom:?}");
            ExitCode::FAILURE
        }
        Some((seed, broken)) => {
            println!(
                "seed {seed} FAILED: {broken}\nreplay: cargo xtask sim --repository --seed {seed} --verbose"
            );
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(feature = "planted-bugs"))]
fn planted(_: &str, _: &Arguments) -> ExitCode {
    eprintln!("error: mistakes can be planted only with the feature `planted-bugs`");
    ExitCode::from(2)
}

#[cfg(feature = "planted-bugs")]
fn planted(name: &str, arguments: &Arguments) -> ExitCode {
    use rempart_repository::Bug;
    let seeds = arguments.from..arguments.from + arguments.seeds.unwrap_or(20_000);
    let mut missed = Vec::new();
    for bug in Bug::ALL.into_iter().filter(|bug| name == "all" || name == format!("{bug:?}")) {
        let begin = std::time::Instant::now();
        match rempart_repository_sim::hunt(bug, seeds.clone()) {
            Some((seed, broken)) => {
                println!("{bug:?}: seed {seed}, {:.1} s: {broken}", begin.elapsed().as_secs_f64());
            }
            None => missed.push(bug),
        }
    }
    if missed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("not found in seeds {seeds:?}: {missed:?}");
    ExitCode::FAILURE
}

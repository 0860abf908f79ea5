//! Runs simulated worlds: `rempart-sim --seeds 100000`, or one of them again: `rempart-sim --seed 42 --verbose`.

use rempart_sim::campaign::{CampaignOptions, campaign, run_seed};
use rempart_sim::coverage::Coverage;
use rempart_sim::faults::Planted;
use rempart_sim::hunt::{self, Found};
use rempart_sim::reached;
use rempart_sim::scenario::SCENARIOS;
use rempart_sim::trace::Verbosity;
use rempart_sim::world::Options;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "\
usage: rempart-sim [--seeds N] [--from SEED] [--threads N] [--failures N] [--time SECONDS] [--least N]
       rempart-sim --seed SEED [--verbose]
       rempart-sim --table
       rempart-sim --sum FILE [--sum FILE ...] [--least N]

  --seeds N     worlds to run (default 1000)
  --from SEED   the first of them (default 0)
  --threads N   worlds at once (default: all processors)
  --failures N  stop after so many failing seeds (default 1)
  --time S      stop after so many seconds
  --least N     fail if anything that must be met was met less often (default: 1000 from 100000 seeds on,
                below that it is only told what was never met)
  --planted BUG plant a bug in the world: some seed must fail; `all`: hunt one after the other, each in so many worlds
                (default 2000), and fail if one is not found
  --seed SEED   run one world and tell how it ended; with --verbose, everything that happened
  --table       the failure table: what each fault costs the machine, in virtual time
  --sum FILE    add up what campaigns over parts of the seeds printed, one file each (least: 1000)";

#[derive(Debug)]
struct Arguments {
    seeds: Option<u64>,
    from: u64,
    seed: Option<u64>,
    verbose: bool,
    table: bool,
    sum: Vec<String>,
    least: Option<u64>,
    hunt: bool,
    options: CampaignOptions,
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut parsed = Arguments {
        seeds: None,
        from: 0,
        seed: None,
        verbose: false,
        table: false,
        sum: Vec::new(),
        least: None,
        hunt: false,
        options: CampaignOptions { threads, ..CampaignOptions::default() },
    };
    let mut arguments = arguments;
    while let Some(name) = arguments.next() {
        match name.as_str() {
            "--verbose" => {
                parsed.verbose = true;
                continue;
            }
            "--table" => {
                parsed.table = true;
                continue;
            }
            _ => {}
        }
        let value = arguments.next().ok_or_else(|| format!("`{name}` needs a value"))?;
        if name == "--sum" {
            parsed.sum.push(value);
            continue;
        }
        if name == "--planted" {
            parsed.hunt = value == "all";
            let bug = Planted::ALL.into_iter().find(|bug| format!("{bug:?}") == value);
            if bug.is_none() && !parsed.hunt {
                return Err(format!("`--planted` is `all` or one of {:?}", Planted::ALL));
            }
            parsed.options.planted = bug;
            continue;
        }
        let number: u64 = value.parse().map_err(|_| format!("`{value}` is not a number"))?;
        match name.as_str() {
            "--seeds" => parsed.seeds = Some(number),
            "--from" => parsed.from = number,
            "--threads" => parsed.options.threads = number as usize,
            "--failures" => parsed.options.failures = number as usize,
            "--time" => parsed.options.time = Some(Duration::from_secs(number)),
            "--least" => parsed.least = Some(number),
            "--seed" => parsed.seed = Some(number),
            _ => return Err(format!("`{name}` is not known")),
        }
    }
    Ok(parsed)
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("error: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if arguments.table {
        return table();
    }
    if arguments.hunt {
        return hunt_all(&arguments);
    }
    if !arguments.sum.is_empty() {
        return sum(&arguments);
    }
    match arguments.seed {
        Some(seed) => one(seed, &arguments),
        None => many(&arguments),
    }
}

fn table() -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for scenario in SCENARIOS {
        match scenario.measure(20) {
            Ok(measures) if measures.is_empty() => println!("{:<40} kept", scenario.name),
            Ok(measures) => {
                for measure in measures {
                    println!("{:<40} {measure}", scenario.name);
                }
            }
            Err((seed, violation)) => {
                println!("{:<40} BROKEN (seed {seed}): {violation}", scenario.name);
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

fn hunt_all(arguments: &Arguments) -> ExitCode {
    let seeds = arguments.from..arguments.from.saturating_add(arguments.seeds.unwrap_or(2000));
    let mut missed = Vec::new();
    for bug in Planted::ALL {
        let begin = std::time::Instant::now();
        match hunt::in_worlds(bug, seeds.clone()) {
            Some(Found { after, seed, violation }) => {
                let seconds = begin.elapsed().as_secs_f64();
                let said: String = violation.to_string().chars().take(120).collect();
                let said = said.replace('\n', " ");
                println!("{bug:?}: in world {after} (seed {seed}), {seconds:.1} s: {said}");
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

/// Adds up the tables and the last lines of several campaigns.
fn sum(arguments: &Arguments) -> ExitCode {
    let mut coverage = Coverage::default();
    reached::declare(&mut coverage);
    let (mut seeds, mut failed) = (0, 0);
    for file in &arguments.sum {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) => {
                eprintln!("error: cannot read `{file}`: {error}");
                return ExitCode::from(2);
            }
        };
        coverage.add_printed(&text);
        let Some(end) = text.lines().find(|line| line.contains(" seeds in ")) else {
            eprintln!("error: `{file}` does not tell how the campaign ended");
            return ExitCode::from(2);
        };
        let words: Vec<&str> = end.split(' ').collect();
        let number = |word: Option<&&str>| word.and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        seeds += number(words.first());
        failed += number(words.iter().rev().nth(1));
    }
    print!("{coverage}");
    println!("{seeds} seeds, {failed} failed");
    let short: Vec<_> = coverage.below(arguments.least.unwrap_or(1000)).collect();
    for (kind, name, times) in &short {
        println!("seldom: {kind} `{name}` {times} times");
    }
    if failed == 0 && short.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn one(seed: u64, arguments: &Arguments) -> ExitCode {
    let verbosity = if arguments.verbose { Verbosity::Everything } else { Verbosity::Tail };
    let (world, result) = run_seed(seed, Options { verbosity, planted: arguments.options.planted });
    match result {
        Ok(()) => {
            println!("seed {seed}: every promise kept, {} events, until {}", world.steps(), world.now());
            ExitCode::SUCCESS
        }
        Err(violation) => {
            for line in world.trace().tail() {
                println!("{line}");
            }
            println!("seed {seed} FAILED at {}: {violation}", world.now());
            ExitCode::FAILURE
        }
    }
}

fn many(arguments: &Arguments) -> ExitCode {
    let count = arguments.seeds.unwrap_or(1000);
    let seeds = arguments.from..arguments.from.saturating_add(count);
    let report = campaign(seeds, &arguments.options);
    print!("{}", report.coverage);
    let seconds = report.elapsed.as_secs_f64();
    println!(
        "{} seeds in {seconds:.1} s ({:.0} a second), {} events, {:.1} days simulated, {} failed",
        report.seeds,
        report.seeds as f64 / seconds,
        report.steps,
        report.simulated.as_secs_f64() / 86_400.0,
        report.failures.len()
    );
    let least = arguments.least.unwrap_or(if count >= 100_000 { 1000 } else { 0 });
    let short: Vec<_> = report.coverage.below(least.max(1)).collect();
    for (kind, name, times) in &short {
        println!("seldom: {kind} `{name}` {times} times");
    }
    for (seed, violation) in &report.failures {
        println!("\nseed {seed} FAILED: {violation}");
        println!("replay: cargo run --release -p rempart-sim -- --seed {seed} --verbose");
    }
    if let Some((seed, _)) = report.failures.first() {
        println!("\nthe end of seed {seed}'s story:");
        let options = Options { verbosity: Verbosity::Tail, planted: arguments.options.planted };
        let (world, _) = run_seed(*seed, options);
        let lines: Vec<_> = world.trace().tail().collect();
        for line in &lines[lines.len().saturating_sub(60)..] {
            println!("  {line}");
        }
    }
    if !report.failures.is_empty() || (least > 0 && !short.is_empty()) {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

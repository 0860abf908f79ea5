//! `cargo xtask demo`: the main job, live, on a real virtual machine.
//!
//! - [`rack`]: the program on the lab's servers, driven through its command line;
//! - [`play`]: one performance: stage, waits, checks, figures;
//! - [`faults`]: what goes wrong, and what must happen then;
//! - [`story`]: what is told on the way and at the end.

mod faults;
mod play;
pub mod rack;
mod status;
mod story;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::setup::Kernel;
use crate::workspace::{self, Profile};
use crate::{interrupt, setup};

pub use faults::Fault;

use play::Play;
use story::{Report, Story};

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Print the final tables as one JSON value on stdout; the story goes to stderr
    #[arg(long)]
    json: bool,
    /// What goes wrong: one or more rows of the failure table, or `all`
    #[arg(long, value_enum, value_delimiter = ',')]
    fault: Vec<Fault>,
    /// Play everything this many times
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// By which the guest of `backed-up` writes at random; drawn, and told, if absent
    #[arg(long)]
    seed: Option<u64>,
    /// Keep logs and disks
    #[arg(long)]
    keep: bool,
    /// Use the optimised build
    #[arg(long)]
    release: bool,
    /// Play with this build of the program instead of building it
    #[arg(long, conflicts_with = "release")]
    program: Option<PathBuf>,
}

/// Sets up, builds and plays; an error when a promise broke.
pub fn run(options: &Options) -> Result<()> {
    let kernel = setup::ensure()?;
    let profile = if options.release { Profile::Release } else { Profile::Debug };
    let program = match &options.program {
        Some(program) => std::path::absolute(program)?,
        None => workspace::build_rempart(profile)?,
    };
    let reports = play(options, &kernel, &program)?;
    if options.json {
        println!("{:#}", story::as_json(&reports));
    }
    let broken = reports.iter().filter(|report| !report.is_good()).count();
    if broken > 0 {
        bail!("{broken} of {} scenarios broke a promise", reports.len());
    }
    Ok(())
}

/// Plays faults for a test run; returns how many kept every promise and how many did not.
pub fn play_faults(faults: Vec<Fault>, kernel: &Kernel) -> Result<(u64, u64)> {
    let program = workspace::build_rempart(Profile::Debug)?;
    let options = Options {
        json: false,
        fault: faults,
        rounds: 1,
        seed: None,
        keep: false,
        release: false,
        program: None,
    };
    let reports = play(&options, kernel, &program)?;
    let good = reports.iter().filter(|report| report.is_good()).count();
    Ok((good as u64, (reports.len() - good) as u64))
}

/// Plays the faults of `options` and returns a report on each.
fn play(options: &Options, kernel: &Kernel, program: &Path) -> Result<Vec<Report>> {
    let mut faults = options.fault.clone();
    if faults.is_empty() {
        faults.push(Fault::NodeSilent);
    }
    if faults.contains(&Fault::All) {
        faults = Fault::rows();
    }
    let story = Story::new(options.json);
    let mut reports = Vec::new();
    for round in 1..=options.rounds {
        if options.rounds > 1 {
            story.title(&format!("round {round} of {}", options.rounds));
        }
        for group in faults::on_one_stage(&faults) {
            reports.extend(perform(&group, options, kernel, program, &story)?);
            interrupt::check()?;
        }
    }
    Ok(reports)
}

/// One stage, the faults of `group` one after the other, and the examination of both copies at the end.
fn perform(
    group: &[Fault],
    options: &Options,
    kernel: &Kernel,
    program: &Path,
    story: &Story,
) -> Result<Vec<Report>> {
    let mut reports = Vec::new();
    let mut play = Play::new(group[0].stage(), program, story, options.seed, options.keep)?;
    story.title("the stage");
    let mut staged = Some(play.set_stage(kernel));
    for (index, fault) in group.iter().enumerate() {
        story.title(&fault.description());
        let is_last = index + 1 == group.len();
        let staged = staged.take().unwrap_or(Ok(()));
        let mut result = staged.and_then(|()| play.ready()).and_then(|()| fault.perform(&mut play));
        if result.is_ok() && is_last && fault.ends_with_two_copies() {
            result = play.examine_both_copies();
        }
        interrupt::check()?;
        let report = play.report(*fault, result);
        story.table(&report);
        let stop = !report.is_good();
        reports.push(report);
        if stop {
            story.tell(&play.tail_of_logs());
            for skipped in &group[index + 1..] {
                reports.push(Report::not_played(*skipped));
            }
            break;
        }
    }
    Ok(reports)
}

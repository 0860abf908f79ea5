//! `rempart schedule`: backups by the clock, as this node's configuration has them.

use crate::backup::time;
use crate::{Output, output::bytes};
use clap::{Args, Subcommand};
use rempart_api::{
    BackupRun, Client, EndedBy, Error, Job, MachineBackup, MachineOutcome, RunResult, RunTrigger, Schedule,
};
use rempart_types::WallTime;
use std::time::Duration;

#[derive(Debug, Subcommand)]
pub enum ScheduleCommand {
    /// The schedules: when they run next, and what came of them.
    List,
    /// One schedule, its machines, and how far it is.
    Show(Named),
    /// Run one now, whatever time it is, and wait for its end.
    Run(Run),
    /// End the run that is under way, and wait for that. What it did not get done is not tried again.
    Stop(Named),
    /// The runs of one that ended, the newest last.
    History(History),
}

#[derive(Debug, Args)]
pub struct Named {
    name: String,
}

#[derive(Debug, Args)]
pub struct Run {
    name: String,
    /// Return as soon as it runs.
    #[arg(long)]
    no_wait: bool,
}

#[derive(Debug, Args)]
pub struct History {
    name: String,
    /// The newest N runs only.
    #[arg(long, value_name = "N")]
    last: Option<usize>,
}

pub async fn run(command: ScheduleCommand, client: &Client, output: Output) -> Result<(), Error> {
    match command {
        ScheduleCommand::List => list(client, output).await,
        ScheduleCommand::Show(Named { name }) => show(&name, client, output).await,
        ScheduleCommand::Run(command) => run_now(command, client, output).await,
        ScheduleCommand::Stop(Named { name }) => stop(&name, client, output).await,
        ScheduleCommand::History(command) => history(command, client, output).await,
    }
}

fn at(unix_ms: u64) -> String {
    time(WallTime(unix_ms))
}

async fn list(client: &Client, output: Output) -> Result<(), Error> {
    let schedules: Vec<Schedule> = client.get("/v1/schedules").await?;
    if output.json {
        return output.print_json(&schedules);
    }
    let rows = schedules.iter().map(|schedule| {
        let next = schedule.next_unix_ms.first().map_or_else(|| "never".to_owned(), |next| at(*next));
        let last = match (&schedule.running, &schedule.last) {
            (Some(_), _) => "runs now".to_owned(),
            (None, Some(last)) => told(last),
            (None, None) => "none yet".to_owned(),
        };
        vec![schedule.name.clone(), schedule.schedule.clone(), schedule.time_zone.clone(), next, last]
    });
    output.table(&["schedule", "when", "time zone", "next", "last"], rows.collect())?;
    for schedule in &schedules {
        warn(schedule, output);
    }
    Ok(())
}

fn warn(schedule: &Schedule, output: Output) {
    if let Some(problem) = &schedule.problem {
        output.tell(&format!("warning: `{}`: {problem}", schedule.name));
    }
    for pid in &schedule.hanging {
        let name = &schedule.name;
        output.tell(&format!(
            "warning: `{name}`: process {pid} was killed and hangs in the kernel; no machine is begun before it is gone"
        ));
    }
}

async fn show(name: &str, client: &Client, output: Output) -> Result<(), Error> {
    let schedule: Schedule = client.get(&format!("/v1/schedules/{name}")).await?;
    if output.json {
        return output.print_json(&schedule);
    }
    let next: Vec<_> = schedule.next_unix_ms.iter().map(|next| at(*next)).collect();
    output.print(&format!(
        "{name}: `{}` in {}, into {}",
        schedule.schedule, schedule.time_zone, schedule.repository
    ))?;
    if let Some(window) = &schedule.window {
        output.print(&format!("machines are begun from {}", window.replace('-', " to ")))?;
    }
    let next = if next.is_empty() { "never".to_owned() } else { next.join(", ") };
    output.print(&format!("next: {next}"))?;
    for run in schedule.running.iter().chain(&schedule.last) {
        output.print(&format!("run {}: {}", run.run, told(run)))?;
        for error in &run.errors {
            output.print(&format!("  {error}"))?;
        }
        for error in &run.not_told {
            output.print(&format!("  nobody was told: {error}"))?;
        }
    }
    for machine in &schedule.progress {
        let progress = &machine.progress;
        output.print(&format!(
            "{}: {} of {}, new {}",
            machine.vm,
            bytes(progress.done_bytes),
            bytes(progress.total_bytes),
            bytes(progress.new_bytes.unwrap_or_default())
        ))?;
    }
    let rows = schedule.machines.iter().map(|machine| {
        let last = machine.last_success_unix_ms.map_or_else(|| "never".to_owned(), at);
        let booted = machine.last_boot.as_ref().map_or_else(
            || "never".to_owned(),
            |boot| {
                let came = if boot.passed { "came up" } else { "DID NOT COME UP" };
                format!("point {} {came} {}", boot.point, at(boot.at_unix_ms))
            },
        );
        vec![machine.vm.clone(), last, machine.failures.to_string(), booted, said(&machine.last)]
    });
    output.table(&["vm", "last success", "failures since", "booted", "last time"], rows.collect())?;
    warn(&schedule, output);
    Ok(())
}

fn told(run: &BackupRun) -> String {
    let good = run.machines.iter().filter(|machine| machine.outcome == MachineOutcome::Success).count();
    let result = match run.result {
        Some(RunResult::Success) => "success",
        Some(RunResult::Failure) => "FAILURE",
        None => "runs",
    };
    let when = at(run.ended_unix_ms.unwrap_or(run.begun_unix_ms));
    let trigger = match run.trigger {
        RunTrigger::Schedule => "",
        RunTrigger::CatchUp => ", late",
        RunTrigger::Operator => ", by hand",
    };
    let ended = match run.ended_by {
        None => "",
        Some(EndedBy::TimeLimit) => ", ended by its time limit",
        Some(EndedBy::Operator) => ", ended by an operator",
    };
    format!("{result} {when}, {good} machines{trigger}{ended}")
}

fn said(machine: &MachineBackup) -> String {
    match machine.outcome {
        MachineOutcome::Success => format!(
            "point {}, read {}, new {}, {} s{}",
            machine.point.unwrap_or_default(),
            bytes(machine.read_bytes),
            bytes(machine.new_bytes),
            machine.ended_unix_ms.saturating_sub(machine.begun_unix_ms) / 1000,
            machine.copy.map_or_else(String::new, |copy| format!(", copied as point {copy}"))
        ),
        MachineOutcome::Failed => {
            machine.error.as_ref().map_or_else(|| "failed".to_owned(), |error| format!("FAILED: {error}"))
        }
        MachineOutcome::Elsewhere => "another node leads it".to_owned(),
        MachineOutcome::NotBegun => {
            let why = machine.error.as_ref().map(ToString::to_string);
            format!("NOT BEGUN: {}", why.as_deref().unwrap_or("the window closed before"))
        }
    }
}

async fn run_now(command: Run, client: &Client, output: Output) -> Result<(), Error> {
    let name = &command.name;
    let job: Job = client.post(&format!("/v1/schedules/{name}/run"), &()).await?;
    if command.no_wait {
        if output.json {
            return output.print_json(&job);
        }
        output.tell(&format!("`{name}` runs; follow it with `rempart schedule show {name}`"));
        return Ok(());
    }
    let value = super::finish_job(client, output, job, "").await?;
    let run: BackupRun = serde_json::from_value(value)
        .map_err(|e| Error::failed("cannot read what came of the run").cause(e))?;
    for machine in &run.machines {
        output.tell(&format!("{}: {}", machine.vm, said(machine)));
    }
    match run.result {
        Some(RunResult::Success) => Ok(()),
        _ => {
            let is_bad = |machine: &&MachineBackup| {
                matches!(machine.outcome, MachineOutcome::Failed | MachineOutcome::NotBegun)
            };
            let bad = run.machines.iter().filter(is_bad).count();
            let causes = run.machines.iter().filter_map(|machine| machine.error.as_ref()).chain(&run.errors);
            let cause = causes.map(ToString::to_string).next().unwrap_or_default();
            let what = match bad {
                0 => "the machines were backed up, and not all else was done".to_owned(),
                bad => format!("{bad} of {} machines were not backed up", run.machines.len()),
            };
            Err(Error::failed(what).cause(cause))
        }
    }
}

async fn stop(name: &str, client: &Client, output: Output) -> Result<(), Error> {
    let job: Job = client.post(&format!("/v1/schedules/{name}/stop"), &()).await?;
    let value = super::finish_job(client, output, job, "").await?;
    let run: BackupRun = serde_json::from_value(value)
        .map_err(|e| Error::failed("cannot read what came of the run").cause(e))?;
    output.tell(&format!("run {}: {}", run.run, told(&run)));
    for machine in &run.machines {
        output.tell(&format!("{}: {}", machine.vm, said(machine)));
    }
    Ok(())
}

async fn history(command: History, client: &Client, output: Output) -> Result<(), Error> {
    let newest = command.last.map_or_else(String::new, |newest| format!("?newest={newest}"));
    let runs: Vec<BackupRun> = client.get(&format!("/v1/schedules/{}/history{newest}", command.name)).await?;
    if output.json {
        return output.print_json(&runs);
    }
    let rows = runs.iter().flat_map(|run| {
        let seconds = run.ended_unix_ms.unwrap_or_default().saturating_sub(run.begun_unix_ms);
        let whole = vec![
            run.run.to_string(),
            at(run.begun_unix_ms),
            Duration::from_millis(seconds).as_secs().to_string(),
        ];
        let machines = run.machines.iter().map(|machine| format!("{}: {}", machine.vm, said(machine)));
        let mut lines: Vec<String> = machines.chain(run.errors.iter().map(ToString::to_string)).collect();
        lines.insert(0, told(run));
        lines.into_iter().enumerate().map(move |(line, text)| {
            let mut row = if line == 0 { whole.clone() } else { vec![String::new(); 3] };
            row.push(text);
            row
        })
    });
    output.table(&["run", "begun", "seconds", "result"], rows.collect())
}

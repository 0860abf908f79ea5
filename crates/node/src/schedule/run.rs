//! One run of a schedule.

use super::config::Notify;
use super::leader::{self, Leader};
use super::{Machines, Schedule, hold};
use crate::clock;
use crate::node::Node;
use rempart_api::{
    BackupRun, EndedBy, Error, MachineBackup, MachineOutcome, Progress, RunResult, RunTrigger,
};
use rempart_types::WallTime;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// How far a run is, for whoever waits for it.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Writes down that a run has begun.
pub fn begin(schedule: &Schedule, trigger: RunTrigger, due: WallTime) {
    let run = hold(&schedule.history).begin(BackupRun {
        run: 0,
        trigger,
        due_unix_ms: due.0,
        begun_unix_ms: clock::wall().0,
        ended_unix_ms: None,
        result: None,
        ended_by: None,
        machines: Vec::new(),
        errors: Vec::new(),
        not_told: Vec::new(),
    });
    tracing::info!(schedule = schedule.section.name, run = run.run, ?trigger, "a run of backups begins");
}

/// Brings the run under way to its end, also one that an earlier daemon began.
pub async fn go_on(
    node: &Arc<Node>,
    schedule: &Arc<Schedule>,
    tell: &mut (dyn FnMut(Progress) + Send),
) -> BackupRun {
    schedule.begin_or_go_on();
    let mut limit = JoinSet::new();
    if schedule.section.time_limit_s > 0 {
        let schedule = schedule.clone();
        limit.spawn(async move {
            tokio::time::sleep(Duration::from_secs(schedule.section.time_limit_s)).await;
            schedule.end_early(EndedBy::TimeLimit);
        });
    }
    back_up_all(node, schedule, tell).await;
    let mut errors = copy_all(node, schedule, tell).await;
    errors.extend(tidy_up(node, schedule, &under_way(schedule)).await);
    limit.shutdown().await;
    let mut run = under_way(schedule);
    if errors.is_empty() {
        // Why it was ended is said for the run as a whole, too.
        errors.extend(schedule.why_ended().filter(|_| run.ended_by.is_some()));
    }
    run.errors = errors;
    let is_bad = |machine: &MachineBackup| {
        matches!(machine.outcome, MachineOutcome::Failed | MachineOutcome::NotBegun)
    };
    let failed = run.machines.iter().any(is_bad) || !run.errors.is_empty();
    run.result = Some(if failed { RunResult::Failure } else { RunResult::Success });
    run.ended_unix_ms = Some(clock::wall().0);
    let is_told = match schedule.section.notify {
        Notify::Never => false,
        Notify::Failure => failed,
        // A node that leads none of the machines leaves it to the one that does.
        Notify::Always => failed || run.machines.iter().any(|done| done.outcome != MachineOutcome::Elsewhere),
    };
    if is_told {
        run.not_told = told(node, schedule, &run).await;
    }
    tracing::info!(schedule = schedule.section.name, run = run.run, result = ?run.result, "a run of backups ended");
    hold(&schedule.history).end(run.clone());
    run
}

fn under_way(schedule: &Schedule) -> BackupRun {
    hold(&schedule.history).running().expect("it is under way").clone()
}

/// The machines that the schedule names, those first that have waited longest for a backup.
fn wanted(node: &Node, schedule: &Schedule) -> Vec<String> {
    let section = &schedule.section;
    let names: BTreeSet<String> = match &section.machines {
        Machines::Named(names) => names.iter().cloned().collect(),
        Machines::All(_) => {
            let unopened = node.unopened().into_iter().map(|(name, _)| name);
            node.vms().iter().map(|vm| vm.name()).chain(unopened).collect()
        }
    };
    let history = hold(&schedule.history);
    let done = history.running().map_or(&[][..], |run| &run.machines);
    let is_left =
        |name: &String| !section.exclude.contains(name) && !done.iter().any(|done| done.vm == *name);
    let mut names: Vec<_> = names.into_iter().filter(is_left).collect();
    names.sort_by_key(|name| history.last_success(name));
    names
}

async fn back_up_all(node: &Arc<Node>, schedule: &Arc<Schedule>, tell: &mut (dyn FnMut(Progress) + Send)) {
    let trigger = under_way(schedule).trigger;
    let names = wanted(node, schedule);
    let at_once = Arc::new(Semaphore::new(schedule.section.parallel));
    let mut at_work = JoinSet::new();
    // An operator who says now means now.
    let may_begin = move |schedule: &Schedule| trigger == RunTrigger::Operator || schedule.is_window_open();
    for vm in names {
        let place = loop {
            match tokio::time::timeout(LOOK_EVERY, at_once.clone().acquire_owned()).await {
                Ok(place) => break place.expect("it is never closed"),
                Err(_) => tell(schedule.sum("back up")),
            }
        };
        let ended = schedule.why_ended();
        if ended.is_some() || !may_begin(schedule) {
            let mut left = MachineBackup::begun(vm, clock::wall());
            left.outcome = MachineOutcome::NotBegun;
            left.error = ended;
            hold(&schedule.history).machine(left);
            continue;
        }
        let (node, schedule) = (node.clone(), schedule.clone());
        at_work.spawn(async move {
            let done = back_up(&node, &schedule, vm, may_begin).await;
            hold(&schedule.progress).remove(&done.vm);
            hold(&schedule.history).machine(done);
            drop(place);
        });
    }
    while !at_work.is_empty() {
        if tokio::time::timeout(LOOK_EVERY, at_work.join_next()).await.is_err() {
            tell(schedule.sum("back up"));
        }
    }
}

impl Schedule {
    /// Over all machines that something is done about.
    fn sum(&self, what: &str) -> Progress {
        let progress = hold(&self.progress);
        let names: Vec<_> = progress.keys().map(String::as_str).collect();
        Progress {
            phase: format!("{what} {}", names.join(", ")),
            done_bytes: progress.values().map(|progress| progress.done_bytes).sum(),
            total_bytes: progress.values().map(|progress| progress.total_bytes).sum(),
            new_bytes: Some(progress.values().filter_map(|progress| progress.new_bytes).sum()),
        }
    }
}

/// One machine, tried as often as the schedule says.
async fn back_up(
    node: &Arc<Node>,
    schedule: &Arc<Schedule>,
    vm: String,
    may_begin: impl Fn(&Schedule) -> bool,
) -> MachineBackup {
    let section = &schedule.section;
    let mut done = MachineBackup::begun(vm, clock::wall());
    for attempt in 0..=section.retries {
        if attempt > 0 {
            let pause = tokio::time::sleep(Duration::from_secs(section.retry_delay_s));
            if let Err(ended) = unless_ended(schedule, pause).await {
                done.error = Some(match done.error.take() {
                    Some(error) => Error { hint: error.hint.clone(), ..ended.cause(error) },
                    None => ended,
                });
                break;
            }
            if !may_begin(schedule) {
                break;
            }
        }
        done.tries += 1;
        let leader = async {
            // Whom others run belongs to whoever has the schedule.
            if section.is_foreign() { Leader::Here } else { leader::of(node, &done.vm).await }
        };
        match unless_ended(schedule, leader).await {
            Ok(Leader::Here) => {}
            Ok(Leader::Elsewhere) => {
                done.outcome = MachineOutcome::Elsewhere;
                break;
            }
            Ok(Leader::Nobody(error)) => {
                done.error = Some(error);
                continue;
            }
            Err(ended) => {
                done.error = Some(ended);
                break;
            }
        }
        match try_once(node, schedule, &mut done).await {
            Ok(()) => {
                done.outcome = MachineOutcome::Success;
                done.error = None;
                *hold(&schedule.problem) = None;
                break;
            }
            Err(error) => {
                tracing::warn!(schedule = section.name, vm = done.vm, attempt, %error, "a backup failed");
                done.error = Some(error);
                if schedule.why_ended().is_some() {
                    break;
                }
            }
        }
    }
    done.ended_unix_ms = clock::wall().0;
    done
}

/// What comes of `work`, unless the run is to end before.
async fn unless_ended<T>(schedule: &Schedule, work: impl Future<Output = T>) -> Result<T, Error> {
    tokio::select! {
        biased;
        why = schedule.to_end() => Err(why),
        done = work => Ok(done),
    }
}

async fn try_once(node: &Arc<Node>, schedule: &Arc<Schedule>, done: &mut MachineBackup) -> Result<(), Error> {
    let section = &schedule.section;
    let program = &node.schedules.program;
    let tell = || progress_of(schedule, &done.vm);
    if let [pid, ..] = schedule.hanging.pids()[..] {
        return Err(Error::failed(format!("process {pid} of an earlier run hangs in the kernel"))
            .hint("see why the repository's place does not answer; another one would hang as well"));
    }
    let run = |arguments, tell| program.run(arguments, schedule.to_end(), &schedule.hanging, tell);
    let made = run(section.backup_arguments(&done.vm), tell()).await?;
    let number = |key: &str| made[key].as_u64();
    let point = number("point").ok_or_else(|| Error::failed("a backup did not say which point it made"))?;
    done.point = Some(point);
    done.read_bytes = number("read_bytes").unwrap_or_default();
    done.new_bytes = number("new_bytes").unwrap_or_default();
    done.stored_bytes = number("stored_bytes").unwrap_or_default();
    done.consistency = made["consistency"]["level"].as_str().map(str::to_owned);
    done.last_boot = serde_json::from_value(made["last_boot"].clone()).unwrap_or_default();
    if section.verify {
        let name = format!("{}@{point}", done.vm);
        run(section.arguments(&["verify", &name]), tell()).await.map_err(|error| {
            let hint = error.hint.clone();
            Error { hint, ..Error::failed(format!("`{name}` was made, and does not verify")).cause(error) }
        })?;
    }
    Ok(())
}

/// Has what a process tells be that machine's progress.
fn progress_of(schedule: &Arc<Schedule>, vm: &str) -> impl FnMut(Progress) + Send + 'static {
    let (schedule, vm) = (schedule.clone(), vm.to_owned());
    move |progress| {
        hold(&schedule.progress).insert(vm.clone(), progress);
    }
}

/// Copies the new points to the second repository, one after the other: a line carries no more for several. What failed.
async fn copy_all(
    node: &Arc<Node>,
    schedule: &Arc<Schedule>,
    tell: &mut (dyn FnMut(Progress) + Send),
) -> Vec<Error> {
    let mut errors = Vec::new();
    for done in under_way(schedule).machines {
        let is_left = done.outcome == MachineOutcome::Success && done.copy.is_none();
        let Some(point) = done.point.filter(|_| is_left && schedule.why_ended().is_none()) else { continue };
        let name = format!("{}@{point}", done.vm);
        let copied = {
            let copying = copy(node, schedule, &done.vm, &name);
            tokio::pin!(copying);
            loop {
                match tokio::time::timeout(LOOK_EVERY, &mut copying).await {
                    Ok(copied) => break copied,
                    Err(_) => tell(schedule.sum("copy")),
                }
            }
        };
        hold(&schedule.progress).remove(&done.vm);
        match copied {
            Ok(None) => {}
            Ok(Some(copy)) => hold(&schedule.history).copied(&done.vm, copy),
            Err(error) => {
                tracing::warn!(schedule = schedule.section.name, point = name, %error, "a copy failed");
                let hint = error.hint.clone();
                let what = format!("`{name}` is not in the second repository");
                errors.push(Error { hint, ..Error::failed(what).cause(error) });
            }
        }
    }
    errors
}

/// One point, tried as often as the schedule says; its number there. `None` if the schedule copies none.
async fn copy(
    node: &Arc<Node>,
    schedule: &Arc<Schedule>,
    vm: &str,
    point: &str,
) -> Result<Option<u64>, Error> {
    let section = &schedule.section;
    let Some(arguments) = section.copy_arguments(point) else { return Ok(None) };
    let mut attempt = 0;
    let told = loop {
        let tell = progress_of(schedule, vm);
        let program = &node.schedules.program;
        match program.run(arguments.clone(), schedule.to_end(), &schedule.hanging, tell).await {
            Err(_) if attempt < section.retries && schedule.why_ended().is_none() => {
                attempt += 1;
                let pause = tokio::time::sleep(Duration::from_secs(section.retry_delay_s));
                unless_ended(schedule, pause).await?;
            }
            ended => break ended?,
        }
    };
    let copy = told[0]["copy"].as_u64();
    copy.map(Some).ok_or_else(|| Error::failed("a copy did not say which point it made"))
}

/// Forgets and collects, for the machines that have a new point. Where a backup failed, its old points stay. What failed of
/// it.
async fn tidy_up(node: &Arc<Node>, schedule: &Schedule, run: &BackupRun) -> Option<Error> {
    let good = run.machines.iter().filter(|machine| machine.outcome == MachineOutcome::Success);
    let names: Vec<&str> = good.map(|machine| machine.vm.as_str()).collect();
    if names.is_empty() || run.ended_by.is_some() {
        return None;
    }
    let section = &schedule.section;
    let retain = section.retain_arguments(&names)?;
    let collect = section.gc.then(|| section.arguments(&["gc"]));
    for arguments in [Some(retain), collect].into_iter().flatten() {
        let done = node.schedules.program.run(arguments, schedule.to_end(), &schedule.hanging, |_| {});
        if let Err(error) = done.await {
            tracing::warn!(schedule = section.name, %error, "tidying up after backups failed");
            return Some(error);
        }
    }
    None
}

/// Why somebody could not be told.
async fn told(node: &Arc<Node>, schedule: &Schedule, run: &BackupRun) -> Vec<String> {
    let receivers = node.schedules.receivers.clone();
    let (name, run) = (node.name().to_owned(), run.clone());
    let (schedule, repository) = (schedule.section.name.clone(), schedule.section.repository.clone());
    let telling =
        tokio::task::spawn_blocking(move || receivers.tell(&name, &schedule, &repository, &run)).await;
    let failed = telling.unwrap_or_default();
    for error in &failed {
        tracing::warn!(%error, "somebody was not told of backups");
    }
    failed.iter().map(ToString::to_string).collect()
}

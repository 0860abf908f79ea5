//! Backups by the clock: which machines, when, how often tried, and who is told. The work itself is done by this program
//! as a process of its own.
//!
//! A schedule may stand in the configuration of every node: each backs up the machines that it leads.

mod child;
mod config;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod history;
mod leader;
mod plan;
mod report;
mod run;

pub use config::BackupSection;
pub use leader::leads;

use crate::config::NodeConfig;
use crate::node::Node;
use crate::paths::Paths;
use crate::{clock, vm};
use child::{Hanging, Program};
use config::Machines;
use history::History;
use plan::{Calendar, Due, Window};
use rempart_api::{
    BackupRun, EndedBy, Error, Job, MachineProgress, Progress, RunResult, RunTrigger, ScheduledMachine,
};
use report::Receivers;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The clock may be set, and the machine may sleep: it is looked at anew this often.
const LOOK_EVERY: Duration = Duration::from_secs(30);
const LOOK_AT_WINDOW_EVERY: Duration = Duration::from_secs(1);
/// A repository that does not open in this time is told.
const TRY_OUT_LIMIT: Duration = Duration::from_secs(120);
/// Coming runs that are shown.
const SHOWN_AHEAD: usize = 3;

#[derive(Debug)]
pub struct Schedules {
    all: Vec<Arc<Schedule>>,
    program: Program,
    receivers: Receivers,
    /// What is wrong with all of them.
    problems: Mutex<Vec<String>>,
}

#[derive(Debug)]
struct Schedule {
    section: BackupSection,
    calendar: Calendar,
    window: Option<Window>,
    history: Mutex<History>,
    /// Of the machines that are being backed up.
    progress: Mutex<BTreeMap<String, Progress>>,
    /// Held while it runs.
    busy: Arc<tokio::sync::Mutex<()>>,
    problem: Mutex<Option<Error>>,
    /// Of the run under way, once it is to end.
    ended_by: watch::Sender<Option<EndedBy>>,
    hanging: Hanging,
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("held for a moment only, and nothing panics meanwhile")
}

impl Schedules {
    /// None of them keeps the daemon from starting: one that cannot be followed is told.
    pub fn open(config: &NodeConfig, paths: &Paths) -> Result<Schedules, Error> {
        let program = Program::new(&paths.api_socket())
            .map_err(|e| Error::failed("cannot find this program").cause(e))?;
        let mut all = Vec::new();
        let mut problems = Vec::new();
        for section in &config.backups {
            let (calendar, window) = section.calendar().map_err(|wrong| Error::invalid(wrong.to_string()))?;
            match History::open(&paths.schedule(&section.name), clock::wall()) {
                Ok(history) => all.push(Arc::new(Schedule {
                    section: section.clone(),
                    calendar,
                    window,
                    history: Mutex::new(history),
                    progress: Mutex::default(),
                    busy: Arc::default(),
                    problem: Mutex::default(),
                    ended_by: watch::Sender::default(),
                    hanging: Hanging::default(),
                })),
                Err(error) => {
                    tracing::error!(schedule = section.name, %error, "not followed: its history cannot be opened");
                    problems.push(format!(
                        "backup schedule `{}` is not followed: its history cannot be opened: {error}",
                        section.name
                    ));
                }
            }
        }
        Ok(Schedules { all, program, receivers: Receivers::new(config), problems: Mutex::new(problems) })
    }

    fn find(&self, name: &str) -> Result<&Arc<Schedule>, Error> {
        self.all.iter().find(|schedule| schedule.section.name == name).ok_or_else(|| {
            Error::not_found(format!("this node follows no backup schedule `{name}`")).hint(
                "`rempart schedule list` shows those of its configuration; it is read when the daemon starts",
            )
        })
    }

    pub fn shown(&self) -> Vec<rempart_api::Schedule> {
        self.all.iter().map(|schedule| schedule.shown()).collect()
    }

    pub fn one(&self, name: &str) -> Result<rempart_api::Schedule, Error> {
        self.find(name).map(|schedule| schedule.shown())
    }

    /// The newest runs that ended, oldest first.
    pub fn history(&self, name: &str, newest: usize) -> Result<Vec<BackupRun>, Error> {
        let history = hold(&self.find(name)?.history);
        let runs = history.runs();
        Ok(runs[runs.len().saturating_sub(newest)..].to_vec())
    }

    /// By schedule.
    pub fn machines(&self) -> Vec<(String, Vec<ScheduledMachine>)> {
        let known = self.all.iter().map(|schedule| {
            let history = hold(&schedule.history);
            (schedule.section.name.clone(), history.machines().cloned().collect())
        });
        known.collect()
    }

    /// By schedule: whether its newest run was ended before its work was done, and processes that hang.
    pub fn troubles(&self) -> Vec<(String, bool, usize)> {
        let known = self.all.iter().map(|schedule| {
            let history = hold(&schedule.history);
            let was_ended = history.runs().last().is_some_and(|run| run.ended_by.is_some());
            (schedule.section.name.clone(), was_ended, schedule.hanging.pids().len())
        });
        known.collect()
    }

    /// What an operator should know.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = hold(&self.problems).clone();
        for schedule in &self.all {
            let name = &schedule.section.name;
            for pid in schedule.hanging.pids() {
                warnings.push(format!(
                    "backup schedule `{name}`: process {pid} was killed and hangs in the kernel; no machine is begun before it is \
                     gone"
                ));
            }
            if let Some(problem) = &*hold(&schedule.problem) {
                warnings.push(format!("backup schedule `{name}`: {problem}"));
            } else if hold(&schedule.history)
                .runs()
                .last()
                .is_some_and(|run| run.result == Some(RunResult::Failure))
            {
                warnings.push(format!(
                    "backup schedule `{name}`: its last run failed; `rempart schedule show {name}` says why"
                ));
            }
        }
        warnings
    }
}

impl Schedule {
    fn now_due(&self) -> Due {
        let since = hold(&self.history).since();
        self.calendar.due(since, clock::wall(), self.section.catch_up)
    }

    fn is_window_open(&self) -> bool {
        self.window.is_none_or(|window| window.is_open(&self.calendar, clock::wall()))
    }

    fn shown(&self) -> rempart_api::Schedule {
        let mut next = Vec::new();
        let mut time = clock::wall();
        while let Some(then) = self.calendar.after(time).filter(|_| next.len() < SHOWN_AHEAD) {
            next.push(then.0);
            time = then;
        }
        let history = hold(&self.history);
        let progress = hold(&self.progress);
        let progress = progress
            .iter()
            .map(|(vm, progress)| MachineProgress { vm: vm.clone(), progress: progress.clone() });
        rempart_api::Schedule {
            name: self.section.name.clone(),
            repository: self.section.repository.clone(),
            schedule: self.section.schedule.clone(),
            time_zone: self.calendar.zone_name().to_owned(),
            window: self.section.window.clone(),
            next_unix_ms: next,
            running: history.running().cloned(),
            progress: progress.collect(),
            last: history.runs().last().cloned(),
            machines: history.machines().cloned().collect(),
            problem: hold(&self.problem).clone(),
            hanging: self.hanging.pids(),
        }
    }

    fn end_early(&self, by: EndedBy) -> Option<u64> {
        let mut history = hold(&self.history);
        let run = history.end_early(by)?;
        self.ended_by.send_replace(history.running().and_then(|running| running.ended_by));
        Some(run)
    }

    /// Whether the run under way is to end is known from what was written down.
    fn begin_or_go_on(&self) {
        let history = hold(&self.history);
        self.ended_by.send_replace(history.running().and_then(|running| running.ended_by));
    }

    /// Why the run under way is to end.
    fn why_ended(&self) -> Option<Error> {
        self.ended_by.borrow().map(|by| match by {
            EndedBy::TimeLimit => Error::failed(format!(
                "the run was ended by its time limit of {} s",
                self.section.time_limit_s
            )),
            EndedBy::Operator => Error::failed("the run was ended by an operator"),
        })
    }

    /// Waits until the run under way is to end.
    async fn to_end(&self) -> Error {
        // The sender is here.
        let _ = self.ended_by.subscribe().wait_for(Option::is_some).await;
        self.why_ended().expect("it was said")
    }
}

/// Follows all schedules until the daemon ends.
pub async fn keep(node: Arc<Node>) {
    for schedule in &node.schedules.all {
        tokio::spawn(follow(node.clone(), schedule.clone()));
    }
    try_out(&node).await;
}

/// Says what is known to fail before the night in which it would.
async fn try_out(node: &Arc<Node>) {
    let schedules = &node.schedules;
    let mut tried = JoinSet::new();
    for schedule in schedules.all.iter().cloned() {
        let program = schedules.program.clone();
        // One that hangs holds up no other.
        tried.spawn(async move {
            let section = &schedule.section;
            let until = || async {
                tokio::time::sleep(TRY_OUT_LIMIT).await;
                Error::unreachable(format!("it does not open within {} s", TRY_OUT_LIMIT.as_secs()))
            };
            for arguments in [Some(section.arguments(&["repo", "show"])), section.show_copy_arguments()] {
                let Some(arguments) = arguments else { continue };
                let opened = program.run(arguments, until(), &schedule.hanging, |_| {});
                if let Err(error) = opened.await {
                    let hint = error.hint.as_deref().unwrap_or_default();
                    tracing::warn!(schedule = section.name, %error, hint, "the repository of a backup schedule does not open");
                    hold(&schedule.problem).get_or_insert(error);
                }
            }
        });
    }
    let receivers = schedules.receivers.clone();
    let checked = tokio::task::spawn_blocking(move || receivers.check()).await;
    for error in checked.into_iter().flatten() {
        tracing::warn!(%error, "nobody will be told of backups");
        hold(&schedules.problems).push(format!("nobody will be told of backups: {error}"));
    }
    tried.join_all().await;
}

/// Begun, by this daemon or one before.
fn is_under_way(schedule: &Schedule) -> bool {
    hold(&schedule.history).running().is_some()
}

async fn follow(node: Arc<Node>, schedule: Arc<Schedule>) {
    loop {
        let before = hold(&schedule.history).since();
        let due = schedule.now_due();
        let wait = match due {
            _ if is_under_way(&schedule) => Duration::ZERO,
            Due::Now { .. } => Duration::ZERO,
            Due::At(then) => Duration::from_millis(then.0.saturating_sub(vm::unix_ms())).min(LOOK_EVERY),
            Due::Never => LOOK_EVERY,
        };
        if wait > Duration::ZERO {
            tokio::time::sleep(wait).await;
            continue;
        }
        // Nothing is under way meanwhile: an operator need not wait for the window.
        while !is_under_way(&schedule) && !schedule.is_window_open() {
            tokio::time::sleep(LOOK_AT_WINDOW_EVERY).await;
        }
        let _busy = schedule.busy.lock().await;
        if !is_under_way(&schedule) {
            // Who had it before may have done what was due.
            let is_done = hold(&schedule.history).since() != before;
            match due {
                Due::Now { since, missed } if !is_done => {
                    let trigger = if missed { RunTrigger::CatchUp } else { RunTrigger::Schedule };
                    run::begin(&schedule, trigger, since);
                }
                _ => continue,
            }
        }
        run::go_on(&node, &schedule, &mut |_| {}).await;
    }
}

/// Runs one now, whatever time it is.
pub fn run_now(node: &Arc<Node>, name: &str) -> Result<Job, Error> {
    let schedule = node.schedules.find(name)?.clone();
    let busy = schedule.busy.clone().try_lock_owned().map_err(|_| {
        Error::conflict(format!("backup schedule `{name}` runs already"))
            .hint(format!("`rempart schedule show {name}` tells how far it is"))
    })?;
    let node = node.clone();
    let shared = node.clone();
    Ok(node.jobs.start(format!("run backup schedule `{name}`"), move |reporter| async move {
        let _busy = busy;
        if hold(&schedule.history).running().is_none() {
            run::begin(&schedule, RunTrigger::Operator, clock::wall());
        }
        let run = run::go_on(&shared, &schedule, &mut |progress| reporter.tell(progress)).await;
        serde_json::to_value(run).map_err(|e| Error::failed("cannot write what came of the run").cause(e))
    }))
}

/// Ends the run under way, and waits for that.
pub fn stop(node: &Arc<Node>, name: &str) -> Result<Job, Error> {
    let schedule = node.schedules.find(name)?.clone();
    let run = schedule
        .end_early(EndedBy::Operator)
        .ok_or_else(|| Error::conflict(format!("no run of backup schedule `{name}` is under way")))?;
    Ok(node.jobs.start(format!("end run {run} of backup schedule `{name}`"), move |_| async move {
        loop {
            // Whoever has it under way.
            drop(schedule.busy.lock().await);
            let ended = hold(&schedule.history).runs().iter().rfind(|ended| ended.run == run).cloned();
            if let Some(ended) = ended {
                return serde_json::to_value(ended)
                    .map_err(|e| Error::failed("cannot write what came of the run").cause(e));
            }
            tokio::time::sleep(LOOK_AT_WINDOW_EVERY).await;
        }
    }))
}

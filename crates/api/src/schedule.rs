use crate::{Error, Progress};
use rempart_types::WallTime;
use serde::{Deserialize, Serialize};

/// What `GET /v1/schedules` answers a list of: a schedule of backups, as this node follows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    pub name: String,
    pub repository: String,
    /// In cron's form.
    pub schedule: String,
    pub time_zone: String,
    #[serde(default)]
    pub window: Option<String>,
    /// The next few times; empty where it is never due again.
    pub next_unix_ms: Vec<u64>,
    #[serde(default)]
    pub running: Option<BackupRun>,
    /// How far the machines of the running one are.
    #[serde(default)]
    pub progress: Vec<MachineProgress>,
    /// The run that ended last.
    #[serde(default)]
    pub last: Option<BackupRun>,
    /// Every machine that this node backed up, or tried to.
    pub machines: Vec<ScheduledMachine>,
    /// Why no run can succeed, as far as is known.
    #[serde(default)]
    pub problem: Option<Error>,
    /// Processes that were killed and hang in the kernel. No machine is begun before they are gone.
    #[serde(default)]
    pub hanging: Vec<u32>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineProgress {
    pub vm: String,
    #[serde(flatten)]
    pub progress: Progress,
}

/// What a schedule knows of a machine over all its runs on this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScheduledMachine {
    pub vm: String,
    #[serde(default)]
    pub last_success_unix_ms: Option<u64>,
    /// In a row, up to now.
    pub failures: u64,
    /// As the newest backup found it in the repository, or an earlier one, if its point was forgotten since.
    #[serde(default)]
    pub last_boot: Option<LastBoot>,
    pub last: MachineBackup,
}

/// What the repository keeps of the newest `rempart verify --boot` of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastBoot {
    pub point: u64,
    pub at_unix_ms: u64,
    /// Whether it came up.
    pub passed: bool,
    /// To the first check that held: the recovery time.
    #[serde(default)]
    pub answered_ms: Option<u64>,
    /// Why it did not come up.
    #[serde(default)]
    pub why: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunTrigger {
    Schedule,
    /// It was due while no daemon ran.
    CatchUp,
    Operator,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunResult {
    Success,
    Failure,
}

/// What ended a run before its work was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndedBy {
    TimeLimit,
    Operator,
}

/// One run of a schedule on this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupRun {
    /// Counts this schedule's runs on this node.
    pub run: u64,
    pub trigger: RunTrigger,
    pub due_unix_ms: u64,
    pub begun_unix_ms: u64,
    #[serde(default)]
    pub ended_unix_ms: Option<u64>,
    /// None while it runs.
    #[serde(default)]
    pub result: Option<RunResult>,
    /// None where it went to its end.
    #[serde(default)]
    pub ended_by: Option<EndedBy>,
    /// Those that are done with.
    pub machines: Vec<MachineBackup>,
    /// What failed besides machines: forgetting by rule, collecting.
    #[serde(default)]
    pub errors: Vec<Error>,
    /// Why somebody was not told.
    #[serde(default)]
    pub not_told: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineOutcome {
    Success,
    Failed,
    /// Another node leads it, and backs it up.
    Elsewhere,
    /// The window closed before, or the run was ended, as the error says then.
    NotBegun,
}

/// What a run did about one machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineBackup {
    pub vm: String,
    pub outcome: MachineOutcome,
    #[serde(default)]
    pub begun_unix_ms: u64,
    #[serde(default)]
    pub ended_unix_ms: u64,
    /// How often it was tried.
    #[serde(default)]
    pub tries: u32,
    #[serde(default)]
    pub point: Option<u64>,
    #[serde(default)]
    pub read_bytes: u64,
    #[serde(default)]
    pub new_bytes: u64,
    #[serde(default)]
    pub stored_bytes: u64,
    /// The level that the point reached, such as `application`.
    #[serde(default)]
    pub consistency: Option<String>,
    /// Its number in the schedule's second repository, once it is there.
    #[serde(default)]
    pub copy: Option<u64>,
    /// The newest by then; none if no point that is there was ever started.
    #[serde(default)]
    pub last_boot: Option<LastBoot>,
    #[serde(default)]
    pub error: Option<Error>,
}

impl MachineBackup {
    /// Not backed up so far.
    pub fn begun(vm: String, now: WallTime) -> MachineBackup {
        MachineBackup {
            vm,
            outcome: MachineOutcome::Failed,
            begun_unix_ms: now.0,
            ended_unix_ms: now.0,
            tries: 0,
            point: None,
            read_bytes: 0,
            new_bytes: 0,
            stored_bytes: 0,
            consistency: None,
            copy: None,
            last_boot: None,
            error: None,
        }
    }
}

//! What came of a schedule's runs, kept on this node: a line of JSON for each run that ended, and beside it what is not
//! over. Whatever kills the daemon, at most the run under way is gone on with.

use crate::durable;
use rempart_api::{BackupRun, EndedBy, MachineBackup, MachineOutcome, ScheduledMachine};
use rempart_types::WallTime;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A history that is longer is cut to half of that.
const LONGEST: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    /// What was due before counts as done.
    since_unix_ms: u64,
    next_run: u64,
    #[serde(default)]
    running: Option<BackupRun>,
    machines: BTreeMap<String, ScheduledMachine>,
}

#[derive(Debug)]
pub struct History {
    folder: PathBuf,
    state: State,
    /// Oldest first.
    runs: Vec<BackupRun>,
    /// Of the file.
    len: usize,
}

impl History {
    /// Opens what there is of it. What cannot be read is told and left behind: it only is the past.
    pub fn open(folder: &Path, now: WallTime) -> io::Result<History> {
        crate::make_private_dir(folder)?;
        let (runs, len) = read_runs(&runs_path(folder))?;
        let known = durable::read_json::<State>(&state_path(folder)).unwrap_or_else(|error| {
            tracing::warn!(%error, "a schedule's state cannot be read, and begins anew");
            None
        });
        let is_new = known.is_none();
        let state = known.unwrap_or_else(|| State {
            since_unix_ms: runs.last().and_then(|run| run.ended_unix_ms).unwrap_or(now.0),
            next_run: runs.last().map_or(1, |run| run.run + 1),
            running: None,
            machines: BTreeMap::new(),
        });
        let mut history = History { folder: folder.to_owned(), state, runs, len };
        let ended = history.runs.last().map(|run| run.run);
        if history.state.running.as_ref().is_some_and(|running| Some(running.run) == ended) {
            // The daemon ended between the two.
            history.close();
        } else if is_new {
            history.save();
        }
        Ok(history)
    }

    /// A full disk ends no backup: it is told, and kept with the next change.
    fn save(&self) {
        self.told(durable::write_json(&state_path(&self.folder), &self.state));
    }

    fn told(&self, kept: io::Result<()>) {
        if let Err(error) = kept {
            let folder = self.folder.display();
            tracing::error!(%error, %folder, "what came of a schedule's run cannot be kept");
        }
    }

    /// What was due before counts as done.
    pub fn since(&self) -> WallTime {
        WallTime(self.state.since_unix_ms)
    }

    pub fn running(&self) -> Option<&BackupRun> {
        self.state.running.as_ref()
    }

    pub fn runs(&self) -> &[BackupRun] {
        &self.runs
    }

    pub fn machines(&self) -> impl Iterator<Item = &ScheduledMachine> {
        self.state.machines.values()
    }

    pub fn last_success(&self, vm: &str) -> Option<u64> {
        self.state.machines.get(vm).and_then(|machine| machine.last_success_unix_ms)
    }

    /// Begins a run; its number is given here.
    pub fn begin(&mut self, mut run: BackupRun) -> BackupRun {
        assert!(self.state.running.is_none(), "a schedule's runs do not overlap");
        run.run = self.state.next_run;
        self.state.next_run += 1;
        self.state.running = Some(run.clone());
        self.save();
        run
    }

    /// A machine of the run is done with.
    pub fn machine(&mut self, done: MachineBackup) {
        let running = self.state.running.as_mut().expect("a run is under way");
        running.machines.push(done.clone());
        if matches!(done.outcome, MachineOutcome::Success | MachineOutcome::Failed) {
            let known = self.state.machines.remove(&done.vm);
            let (last_success, failures, last_boot) = known.map_or((None, 0, None), |known| {
                (known.last_success_unix_ms, known.failures, known.last_boot)
            });
            let (last_success_unix_ms, failures) = match done.outcome {
                MachineOutcome::Success => (Some(done.ended_unix_ms), 0),
                _ => (last_success, failures + 1),
            };
            let last_boot = done.last_boot.clone().or(last_boot);
            let machine = ScheduledMachine {
                vm: done.vm.clone(),
                last_success_unix_ms,
                failures,
                last_boot,
                last: done,
            };
            self.state.machines.insert(machine.vm.clone(), machine);
        }
        self.save();
    }

    /// The point that the run under way made of a machine is in the second repository, as `copy`.
    pub fn copied(&mut self, vm: &str, copy: u64) {
        let running = self.state.running.as_mut().expect("a run is under way");
        let done = running.machines.iter_mut().filter(|done| done.vm == vm);
        let known = self.state.machines.get_mut(vm).map(|known| &mut known.last);
        done.chain(known).for_each(|done| done.copy = Some(copy));
        self.save();
    }

    /// The run under way is to end, for this reason if there is none yet; its number.
    pub fn end_early(&mut self, by: EndedBy) -> Option<u64> {
        let running = self.state.running.as_mut()?;
        running.ended_by.get_or_insert(by);
        let run = running.run;
        self.save();
        Some(run)
    }

    /// The run is over.
    pub fn end(&mut self, run: BackupRun) {
        assert_eq!(self.state.running.as_ref().map(|running| running.run), Some(run.run), "it is under way");
        self.runs.push(run);
        let kept = self.append();
        self.told(kept);
        self.close();
    }

    /// Writes the newest run behind the others.
    fn append(&mut self) -> io::Result<()> {
        let line = line(self.runs.last().expect("one ended"))?;
        if self.len + line.len() > LONGEST {
            return self.rewrite();
        }
        let path = runs_path(&self.folder);
        let is_new = !path.exists();
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
        // What was left of a line that did not fit.
        file.set_len(self.len as u64)?;
        file.write_all(&line)?;
        file.sync_all()?;
        if is_new {
            durable::sync_dir(&self.folder)?;
        }
        self.len += line.len();
        Ok(())
    }

    fn close(&mut self) {
        self.state.running = None;
        let ended = self.runs.last().and_then(|run| run.ended_unix_ms);
        self.state.since_unix_ms = ended.unwrap_or(self.state.since_unix_ms);
        self.save();
    }

    /// Keeps the newest runs.
    fn rewrite(&mut self) -> io::Result<()> {
        let mut lines = Vec::new();
        let mut len = 0;
        for run in self.runs.iter().rev() {
            let line = line(run)?;
            if !lines.is_empty() && len + line.len() > LONGEST / 2 {
                break;
            }
            len += line.len();
            lines.push(line);
        }
        self.runs.drain(..self.runs.len() - lines.len());
        lines.reverse();
        durable::write(&runs_path(&self.folder), &lines.concat())?;
        self.len = len;
        Ok(())
    }
}

fn line(run: &BackupRun) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(run)?;
    line.push(b'\n');
    Ok(line)
}

fn state_path(folder: &Path) -> PathBuf {
    folder.join("state.json")
}

fn runs_path(folder: &Path) -> PathBuf {
    folder.join("history.jsonl")
}

/// All runs, and the length of the file. A last line that was not written to its end is cut off.
fn read_runs(path: &Path) -> io::Result<(Vec<BackupRun>, usize)> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e),
    };
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    if whole < bytes.len() {
        let file = OpenOptions::new().write(true).open(path)?;
        file.set_len(whole as u64)?;
        file.sync_all()?;
    }
    let mut runs = Vec::new();
    for line in bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        match serde_json::from_slice(line) {
            Ok(run) => runs.push(run),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "a line of a history cannot be read")
            }
        }
    }
    Ok((runs, whole))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_api::{RunResult, RunTrigger};

    fn run(at: u64) -> BackupRun {
        BackupRun {
            run: 0,
            trigger: RunTrigger::Schedule,
            due_unix_ms: at,
            begun_unix_ms: at,
            ended_unix_ms: None,
            result: None,
            ended_by: None,
            machines: Vec::new(),
            errors: Vec::new(),
            not_told: Vec::new(),
        }
    }

    fn machine(vm: &str, outcome: MachineOutcome, at: u64) -> MachineBackup {
        MachineBackup { outcome, ended_unix_ms: at + 1, ..MachineBackup::begun(vm.to_owned(), WallTime(at)) }
    }

    /// Plays a run to its end.
    fn play(history: &mut History, at: u64, outcome: MachineOutcome) {
        history.begin(run(at));
        history.machine(machine("shop", outcome, at));
        let mut ended = history.running().unwrap().clone();
        ended.ended_unix_ms = Some(at + 5);
        ended.result = Some(RunResult::Success);
        history.end(ended);
    }

    #[test]
    fn what_is_kept_is_there_again() {
        let home = tempfile::tempdir().unwrap();
        let open = || History::open(home.path(), WallTime(10)).unwrap();
        let mut history = open();
        assert_eq!(history.since(), WallTime(10));
        play(&mut history, 100, MachineOutcome::Success);
        play(&mut history, 200, MachineOutcome::Failed);
        play(&mut history, 300, MachineOutcome::Failed);
        for history in [history, open()] {
            assert_eq!(history.since(), WallTime(305));
            assert_eq!(history.runs().iter().map(|run| run.run).collect::<Vec<_>>(), [1, 2, 3]);
            let shop = history.machines().next().unwrap();
            assert_eq!((shop.last_success_unix_ms, shop.failures), (Some(101), 2));
        }
    }

    /// Killed anywhere in the middle of a write, or between two.
    #[test]
    fn a_run_that_was_cut_off_is_gone_on_with_and_none_is_lost() {
        let home = tempfile::tempdir().unwrap();
        let mut history = History::open(home.path(), WallTime(10)).unwrap();
        play(&mut history, 100, MachineOutcome::Success);
        history.begin(run(200));
        history.machine(machine("shop", MachineOutcome::Success, 200));
        let under_way = fs::read(state_path(home.path())).unwrap();
        let first = fs::read(runs_path(home.path())).unwrap();
        let mut ended = history.running().unwrap().clone();
        ended.ended_unix_ms = Some(205);
        history.end(ended);
        let both = fs::read(runs_path(home.path())).unwrap();
        for cut in first.len()..=both.len() {
            fs::write(state_path(home.path()), &under_way).unwrap();
            fs::write(runs_path(home.path()), &both[..cut]).unwrap();
            let history = History::open(home.path(), WallTime(999)).unwrap();
            if cut < both.len() {
                assert_eq!(history.running().map(|run| run.machines.len()), Some(1), "{cut}");
                assert_eq!(history.runs().len(), 1, "{cut}");
                assert_eq!(fs::read(runs_path(home.path())).unwrap(), first, "{cut}");
            } else {
                assert_eq!(history.running(), None);
                assert_eq!((history.runs().len(), history.since()), (2, WallTime(205)));
            }
        }
    }

    #[test]
    fn garbage_is_told_and_left_behind() {
        let home = tempfile::tempdir().unwrap();
        let mut history = History::open(home.path(), WallTime(10)).unwrap();
        play(&mut history, 100, MachineOutcome::Success);
        let good = fs::read(runs_path(home.path())).unwrap();
        fs::write(runs_path(home.path()), [b"{\xff\n[]\n", &good[..], b"{\"run\":"].concat()).unwrap();
        fs::write(state_path(home.path()), b"{}").unwrap();
        let mut history = History::open(home.path(), WallTime(999)).unwrap();
        assert_eq!((history.runs().len(), history.since()), (1, WallTime(105)));
        play(&mut history, 2000, MachineOutcome::Success);
        assert_eq!(history.runs().last().unwrap().run, 2, "numbers go on");
    }

    #[test]
    fn a_long_history_is_cut() {
        let home = tempfile::tempdir().unwrap();
        let mut history = History::open(home.path(), WallTime(10)).unwrap();
        for at in 0..40 {
            history.begin(run(at));
            let mut ended = history.running().unwrap().clone();
            ended.ended_unix_ms = Some(at);
            ended.not_told = vec!["x".repeat(50_000)];
            history.end(ended);
            assert!(fs::metadata(runs_path(home.path())).unwrap().len() <= LONGEST as u64);
        }
        let again = History::open(home.path(), WallTime(10)).unwrap();
        assert_eq!(again.runs(), history.runs());
        assert_eq!((again.runs().last().unwrap().run, again.len), (40, history.len));
        assert!(again.runs().len() >= 10);
    }
}

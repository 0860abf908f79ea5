//! A machine of a QEMU that others run: seen through its monitor, while it runs on.

use super::access::{chain, now};
use super::consistency::{ConsistencyArgs, Enough, Wanted};
use super::create::{Taken, TakenDisk};
use crate::{Output, output::bytes, parse};
use clap::Args;
use rempart_api::{Error, ErrorKind};
use rempart_backup::{
    BackupError, Changes, Connections, FileSource, NbdEndpoint, NbdSource, Source, SourceError,
};
use rempart_hypervisor::guest_agent::Level;
use rempart_hypervisor::qemu::backup::{
    Agent, Changes as Told, LiveView, Options, Otherwise, Policy, Prepared, Reached, Saving, Tracker,
    TrackingToken, ViewDisk, ViewVariables,
};
use rempart_repository::{
    Consistency, ConsistencyLevel, Definition, MEMORY, Point, PointDisk, Repository, RepositoryId,
};
use rempart_types::WallTime;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;

/// In the metadata context of a bitmap: the range was written.
const DIRTY: u64 = 1;
/// Characters of a disk's name that are kept.
const LONGEST_NAME: usize = 100;
/// Firmware keeps far less.
const MOST_VARIABLES: u64 = 64 << 20;

#[derive(Debug, Args)]
pub struct QemuArgs {
    /// The monitor (QMP) of a QEMU that is not this node's: the machine's own disks are read while it runs on.
    #[arg(long, conflicts_with = "disks")]
    qmp: Option<PathBuf>,
    /// That machine's channel to its guest agent.
    #[arg(long, requires = "qmp", conflicts_with = "disks")]
    agent: Option<PathBuf>,
    /// A local directory that QEMU can reach. What the guest overwrites meanwhile is kept aside there.
    #[arg(long, requires = "qmp", conflicts_with = "disks", default_value = "/var/cache/rempart-views")]
    scratch_dir: PathBuf,
    /// How much of it, for each disk. A guest that overwrites more ends the backup and is not held up.
    #[arg(long, requires = "qmp", conflicts_with = "disks", default_value = "4G", value_parser = parse::byte_count)]
    scratch_size: u64,
}

/// A QEMU, asked from threads that block.
pub struct Qemu {
    monitor: PathBuf,
    options: Options,
    policy: Policy,
    /// What is open in QEMU, for whoever takes it away.
    open: Arc<Mutex<Option<Opened>>>,
    runtime: tokio::runtime::Runtime,
}

/// A view, and the connections that its disks are read by.
struct Opened {
    view: LiveView,
    connections: Vec<Connections>,
}

/// All disks at one moment, until [`Qemu::end`].
pub struct QemuView {
    disks: Vec<ViewDisk>,
    sources: Vec<NbdSource>,
    definition: Vec<u8>,
    nvram: Option<Vec<u8>>,
    memory: Option<FileSource>,
    consistency: Consistency,
    notes: Vec<String>,
    at: WallTime,
}

/// What a point keeps of a disk's instant.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Position {
    /// As QEMU calls it.
    disk: String,
    token: TrackingToken,
}

fn position(disk: &PointDisk) -> Option<Position> {
    serde_json::from_str(disk.position.as_deref()?).ok()
}

/// Each repository, and each name of a machine in it, has periods of its own.
fn tracker(repository: &RepositoryId, chain: impl std::fmt::Display) -> Tracker {
    Tracker::new(&format!("{:.32}-{:.31}", repository.to_string(), chain.to_string()))
        .expect("digits of identifiers are a tracker's name")
}

/// As a person reads it.
fn told(error: &rempart_hypervisor::Error) -> Error {
    use rempart_hypervisor::ErrorKind as From;
    let kind = match error.kind() {
        From::Refused | From::MissingOnHost => ErrorKind::Refused,
        From::AlreadyRunning => ErrorKind::Conflict,
        From::NotRunning | From::Deadline => ErrorKind::Unreachable,
        From::InvalidDefinition => ErrorKind::Invalid,
        _ => ErrorKind::Failed,
    };
    Error::new(kind, error.to_string())
}

impl QemuArgs {
    pub fn is_wanted(&self) -> bool {
        self.qmp.is_some()
    }

    pub fn qemu(
        &self,
        consistency: &ConsistencyArgs,
        repository: &Repository,
        vm: &str,
    ) -> Result<Option<Qemu>, Error> {
        let Some(monitor) = &self.qmp else { return Ok(None) };
        let mut options = Options::new(tracker(&repository.id(), repository.chain(vm)), &self.scratch_dir);
        options.scratch_bytes = self.scratch_size;
        let wanted = consistency.wanted(self.agent.is_some());
        let save =
            |or_crash| Otherwise::SaveState { saving: Saving::new(consistency.longest_pause()), or_crash };
        let otherwise = match (wanted, consistency.otherwise()) {
            (Wanted::Crash, _) | (Wanted::Application, Enough::Crash) => Otherwise::Crash,
            (Wanted::SavedState, Enough::Crash) => save(true),
            (Wanted::SavedState, _) | (Wanted::Application, Enough::SavedState) => save(false),
            (Wanted::Application, Enough::Nothing) => Otherwise::Refuse,
        };
        let agent = match (wanted, &self.agent) {
            (Wanted::Application, None) => {
                return Err(Error::invalid(
                    "`--consistency application` needs the guest's agent, and it is not known where it is",
                )
                .hint("name the host's end of its channel with --agent"));
            }
            (Wanted::Application, Some(agent)) => Ok(Agent::new(agent)),
            _ => Err("the guest was not asked to take part"),
        };
        let failed = |e: &dyn std::fmt::Display| Error::failed("cannot start the runtime").cause(e);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|e| failed(&e))?;
        let open = Arc::new(Mutex::new(None));
        let listening = runtime.block_on(async { take_away_at_the_end(open.clone()) });
        listening.map_err(|e| failed(&e))?;
        let policy = Policy { agent, otherwise };
        Ok(Some(Qemu { monitor: monitor.clone(), options, policy, open, runtime }))
    }
}

/// A program that is told to end takes its view out of QEMU first. One that is killed leaves that to the next backup.
fn take_away_at_the_end(open: Arc<Mutex<Option<Opened>>>) -> std::io::Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::spawn(async move {
        let code = tokio::select! {
            _ = interrupt.recv() => 130,
            _ = terminate.recv() => 143,
        };
        // Held to the end: nobody else reports what is the consequence of this one.
        let mut open = open.lock().await;
        if let Some(Opened { view, connections }) = open.take() {
            // Who reads it may be held up by the repository, and QEMU by who reads.
            connections.iter().for_each(Connections::end);
            let _ = view.close().await;
        }
        std::process::exit(code)
    });
    Ok(())
}

impl Qemu {
    /// Opens a view, with what changed since the point before.
    pub fn view(&self, before: Option<&Point>) -> Result<QemuView, Error> {
        let positions = before.into_iter().flat_map(|point| &point.disks).filter_map(position);
        let known: BTreeMap<String, TrackingToken> =
            positions.map(|position| (position.disk, position.token)).collect();
        let opened = self.runtime.block_on(async {
            let mut open = self.open.lock().await;
            let prepared = Prepared::new(&self.monitor, &self.options, &known).await?;
            let (view, reached) = prepared.take_consistently(&self.policy).await?;
            let opened = open.insert(Opened { view, connections: Vec::new() });
            let read = QemuView::new(&opened.view, &reached);
            let sources = read.iter().flat_map(|read| &read.sources);
            opened.connections = sources.map(NbdSource::connections).collect();
            Ok(read)
        });
        let opened = opened.map_err(|e: rempart_hypervisor::Error| told(&e))?;
        if opened.is_err() {
            self.end(false, Output::silent());
        }
        opened.map_err(|e| Error::failed("cannot read the view").cause(chain(&e)))
    }

    /// Takes the view away. Only when the point is known to be stored, the time before it is forgotten.
    pub fn end(&self, is_stored: bool, output: Output) {
        let ended = self.runtime.block_on(async {
            match self.open.lock().await.take() {
                Some(opened) if is_stored => opened.view.retire().await,
                Some(opened) => opened.view.close().await,
                None => Ok(()),
            }
        });
        if let Err(error) = ended {
            output.tell(&format!("the view is still in QEMU, and the next backup takes it away: {error}"));
        }
    }

    /// Why the disks cannot be read.
    pub fn unreadable(&self, error: &BackupError) -> Error {
        let room = bytes(self.options.scratch_bytes);
        Error::failed("its disks can be read no more").cause(chain(error)).hint(format!(
            "what the guest overwrites meanwhile has {room} of room for each disk, if the file system has: if that was \
             not enough, see --scratch-size and --scratch-dir"
        ))
    }
}

impl QemuView {
    fn new(view: &LiveView, reached: &Reached) -> Result<QemuView, BackupError> {
        let open = |disk: &ViewDisk| {
            NbdSource::open_gently(NbdEndpoint { socket: disk.socket.clone(), export: disk.export.clone() })
        };
        let sources = view.disks().iter().map(open).collect::<Result<_, _>>()?;
        let lost = view.skipped().iter().filter(|device| device.reason.loses_data());
        let mut notes: Vec<String> =
            lost.map(|device| format!("`{}` is not in it: {}", device.id, device.reason)).collect();
        let with_snapshots = view.disks().iter().filter(|disk| disk.snapshots > 0);
        notes.extend(with_snapshots.map(|disk| {
            format!(
                "of `{}` only the disk is in it, not the snapshots in its image: {}",
                disk.id, disk.snapshots
            )
        }));
        let not_thawed = reached.hooks.iter().flat_map(|report| report.not_thawed());
        notes.extend(not_thawed.map(|hook| format!("hook `{hook}` in the guest could not undo what it did")));
        let variables = view.variables().map(|shown| match shown {
            Ok(shown) => read_variables(shown),
            Err(error) => Err(error.to_string()),
        });
        let nvram = variables.and_then(|read| {
            read.map_err(|why| notes.push(format!("the firmware's variables are not in it: {why}"))).ok()
        });
        notes.extend(hidden(view.description()));
        let memory = view.memory().map(|memory| {
            let failed = |source: std::io::Error| SourceError {
                action: "open",
                disk: MEMORY.to_owned(),
                offset: None,
                source: Box::new(source),
            };
            FileSource::of(memory.file.try_clone().map_err(failed)?, Path::new(MEMORY))
        });
        let pause = reached.frozen_for.or(view.pause());
        Ok(QemuView {
            disks: view.disks().to_vec(),
            sources,
            definition: serde_json::to_vec(view.description()).expect("it was JSON"),
            nvram,
            memory: memory.transpose()?,
            consistency: Consistency {
                level: match reached.level {
                    Level::Crash => ConsistencyLevel::Crash,
                    Level::SavedState => ConsistencyLevel::SavedState,
                    Level::FileSystem => ConsistencyLevel::FileSystem,
                    Level::Application => ConsistencyLevel::Application,
                },
                why: Some(reached.why.clone()),
                pause_ms: pause.map(|pause| pause.as_millis() as u64),
            },
            notes,
            at: WallTime(now().0.saturating_sub(view.instant().elapsed().as_millis() as u64)),
        })
    }

    pub fn take<'a>(&'a self, before: Option<&'a Point>, chunk_len: u64) -> Result<Taken<'a>, BackupError> {
        let mut names = BTreeSet::from([MEMORY.to_owned()]);
        let mut disks = Vec::new();
        for (disk, source) in self.disks.iter().zip(&self.sources) {
            let position = |token: &TrackingToken| Position { disk: disk.id.clone(), token: token.clone() };
            let changes = match &disk.changes {
                Told::Unknown(why) => Changes::Unknown(why.to_string()),
                Told::Since { token, context } => {
                    let then = Some(position(token));
                    let earlier = before
                        .and_then(|point| point.disks.iter().find(|disk| self::position(disk) == then))
                        .expect("the token came from this point");
                    let changed = source.chunks_by(context, chunk_len, |flags| flags & DIRTY != 0)?;
                    Changes::Known { before: earlier, changed }
                }
            };
            let next = serde_json::to_string(&position(&disk.next)).expect("a position is plain data");
            disks.push(TakenDisk {
                name: name(&disk.id, &mut names),
                source: source as &dyn Source,
                position: Some(next),
                changes,
            });
        }
        Ok(Taken {
            at: self.at,
            disks,
            definition: Some(Definition { kind: "qemu".to_owned(), content: self.definition.clone() }),
            nvram: self.nvram.clone(),
            memory: self.memory.as_ref().map(|memory| memory as &dyn Source),
            consistency: self.consistency.clone(),
            notes: self.notes.clone(),
            lost: Box::new(|| None),
        })
    }
}

/// What is not kept of what QEMU tells of a machine, for people.
pub fn hidden(description: &serde_json::Value) -> impl Iterator<Item = String> {
    let hidden = description["left_out"].as_array().into_iter().flatten();
    hidden.filter_map(|what| Some(format!("not kept of QEMU's command line: {}", what.as_str()?)))
}

fn read_variables(shown: &ViewVariables) -> Result<Vec<u8>, String> {
    if shown.size_bytes > MOST_VARIABLES {
        return Err(format!("they are {}", bytes(shown.size_bytes)));
    }
    let endpoint = NbdEndpoint { socket: shown.socket.clone(), export: shown.export.clone() };
    let read = || {
        let source = NbdSource::open(endpoint)?;
        let mut content = vec![0; source.size().min(MOST_VARIABLES) as usize];
        source.reader()?.read(0, &mut content)?;
        Ok(content)
    };
    read().map_err(|e: rempart_backup::SourceError| chain(&e))
}

/// A disk's name in the point, which is a file's name where it is restored: QEMU may call it by a path.
fn name(id: &str, taken: &mut BTreeSet<String>) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let plain: String = id.chars().take(LONGEST_NAME).map(plain).collect();
    let plain = match plain.trim_matches(['-', '.']) {
        "" => "disk",
        plain => plain,
    };
    let numbered = (2..).map(|number| format!("{plain}-{number}"));
    let mut names = std::iter::once(plain.to_owned()).chain(numbered);
    let free = names.find(|name| !taken.contains(name)).expect("numbers do not end");
    taken.insert(free.clone());
    free
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_have_names_of_files_each_its_own() {
        let mut taken = BTreeSet::new();
        for (id, expected) in [
            ("vda", "vda"),
            ("/machine/unattached/device[4]", "machine-unattached-device-4"),
            ("../vda", "vda-2"),
            ("vda", "vda-3"),
            ("..", "disk"),
            ("", "disk-2"),
        ] {
            assert_eq!(name(id, &mut taken), expected, "{id}");
        }
    }

    #[test]
    fn each_repository_and_machine_has_its_own_tracker() {
        let (one, other) = (RepositoryId([1; 16]), RepositoryId([2; 16]));
        let all = [tracker(&one, "aa"), tracker(&one, "ab"), tracker(&other, "aa")];
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 3);
    }
}

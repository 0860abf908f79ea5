//! A virtual machine on this node: its replica's thread, its runner, and what joins them.

mod dispatch;
mod events;
mod hold;
pub mod import;
mod partition;
pub mod record;
mod report;
mod runner;

pub use events::{EventLog, unix_ms};
pub use hold::Hold;
pub use report::why_frozen;
pub use runner::{Allowed, Wanted};

use crate::config::{NodeConfig, TimingSection};
use crate::group::{self, GroupHandle, GroupParams, ToGroup};
use crate::members::Cluster;
use crate::paths::VmPaths;
use crate::registers::Registers;
use record::{RegisterPlace, VmConfig, VmRecord};
use rempart_api::{Error, Severity};
use rempart_engine::{Bytes, Command, CommandError};
use rempart_hypervisor::{Adopted, DiskExport, FirstState, Hypervisor, Lease, StartRequest};
use rempart_types::{GroupId, NodeId};
use runner::{Control, Runner, Shown, StartSource};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// The name under which the guard keeps the NBD server's listening socket.
const NBD_LISTENER: &str = "nbd";

/// How long a copy may take to write everything back.
const CLOSE_DEADLINE: Duration = Duration::from_secs(20);
/// A primary is frozen for a moment now and then: while its in-sync set changes.
const THAW_PATIENCE: Duration = Duration::from_secs(10);
/// For the record that a machine shall not run, once it does not.
const RECORD_PATIENCE: Duration = Duration::from_secs(5);

/// What every machine on this node shares.
#[derive(Debug, Clone)]
pub struct Host {
    pub me: NodeId,
    pub config: Arc<NodeConfig>,
    pub hypervisor: Arc<dyn Hypervisor>,
    pub registers: Arc<Registers>,
    pub names: Arc<Names>,
    /// Asked when a link to a peer is wanted.
    pub links: mpsc::UnboundedSender<LinkWanted>,
}

/// The cluster's members, for whoever shows a node to people or dials it.
#[derive(Debug)]
pub struct Names {
    me: NodeId,
    /// This node has a name before it is in a cluster.
    name: String,
    cluster: RwLock<Option<Cluster>>,
}

impl Names {
    pub fn new(me: NodeId, name: String, cluster: Option<Cluster>) -> Names {
        Names { me, name, cluster: RwLock::new(cluster) }
    }

    pub fn cluster(&self) -> Option<Cluster> {
        self.cluster.read().expect("held for a moment only").clone()
    }

    pub fn set(&self, cluster: Cluster) {
        *self.cluster.write().expect("held for a moment only") = Some(cluster);
    }

    pub fn name_of(&self, id: NodeId) -> String {
        match self.cluster() {
            Some(cluster) => cluster.name_of(id),
            None if id == self.me => self.name.clone(),
            None => id.to_string(),
        }
    }
}

/// A group has no connection with this peer and wants one.
#[derive(Debug)]
pub struct LinkWanted {
    pub group: GroupId,
    pub peer: NodeId,
}

/// What comes before a replica is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    Nothing,
    /// It is the first of its group.
    Create,
    /// It is unfinished, and returns to what it was before its resync began.
    RollBack,
}

#[derive(Debug)]
pub struct Vm {
    pub host: Host,
    pub paths: VmPaths,
    pub group: GroupHandle,
    /// The times that this copy goes by since it was opened.
    pub timing: TimingSection,
    pub events: EventLog,
    record: Mutex<VmRecord>,
    /// Held across a change of the definition, which builds on the one before.
    changing: tokio::sync::Mutex<()>,
    control: watch::Sender<Control>,
    /// Whoever has the machine stand still.
    holder: Arc<tokio::sync::Mutex<()>>,
    lease: watch::Sender<Lease>,
    shown: watch::Receiver<Shown>,
    failure: Mutex<Option<String>>,
    /// The thread ended.
    over: watch::Sender<bool>,
}

impl Vm {
    /// Recovers the replica, adopts a machine that still runs, and starts everything around them.
    pub async fn open(host: Host, paths: VmPaths, record: VmRecord, first: First) -> Result<Arc<Vm>, Error> {
        let name = record.name().to_owned();
        let failed = |what: &str, cause: &dyn std::error::Error| {
            Error::failed(format!("cannot {what} of `{name}`")).cause(crate::whole_chain(cause))
        };
        create_private_dir(&paths.run).map_err(|e| failed("make the run directory", &e))?;
        crate::operation::remove_left_views(&paths);
        let adopted = match host.hypervisor.adopt(&paths.run).await {
            Ok(Adopted::Running(machine)) => Some(machine),
            Ok(Adopted::Gone(_)) => None,
            Err(error) => return Err(failed("look for a running machine", &error)),
        };
        let kept = match &adopted {
            Some(machine) => machine.kept_listeners().await.unwrap_or_default(),
            None => Vec::new(),
        };
        let listener = match kept.into_iter().find(|(kept, _)| kept == NBD_LISTENER) {
            Some((_, listener)) => listener,
            None => listen(&paths).map_err(|e| failed("open the NBD socket", &e))?,
        };
        let listener_copy = listener.try_clone().map_err(|e| failed("open the NBD socket", &e))?;
        let peers = record.config.replicas.iter().copied().filter(|node| *node != host.me).collect();
        let timing = record.config.timing.unwrap_or(host.config.timing);
        let params = GroupParams {
            me: host.me,
            group: record.group,
            register: record.register,
            peers,
            store_dir: paths.store(),
            config: host.config.clone(),
            timing,
            listener,
            roll_back: first == First::RollBack,
        };
        let opened = tokio::task::spawn_blocking(move || group::open(params))
            .await
            .map_err(|e| failed("recover the copy", &e))?
            .map_err(|e| failed("recover the copy", &e))?;

        let wanted = wanted(&record.config, &host);
        let (control, control_receiver) =
            watch::channel(Control { allowed: Allowed::Undecided, wanted, attempt: 0, ends: 0, held: false });
        let (lease, lease_receiver) = watch::channel(Lease::UntilBoottimeNs(0));
        let (shown_sender, shown) = watch::channel(Shown::default());
        let (tell, told) = mpsc::unbounded_channel();
        let vm = Arc::new(Vm {
            host: host.clone(),
            paths: paths.clone(),
            group: opened.handle,
            timing,
            events: EventLog::default(),
            record: Mutex::new(record),
            changing: tokio::sync::Mutex::default(),
            control,
            holder: Arc::default(),
            lease,
            shown,
            failure: Mutex::default(),
            over: watch::channel(false).0,
        });
        let runner = Runner {
            hypervisor: host.hypervisor.clone(),
            adopted,
            listener: Arc::new(listener_copy),
            request: Arc::new(VmStart { vm: Arc::downgrade(&vm) }),
            control: control_receiver,
            lease: lease_receiver,
            tell,
            shown: shown_sender,
            max_restarts: host.config.vm.restarts,
        };
        tokio::spawn(runner.run());
        tokio::spawn(dispatch::told(Arc::downgrade(&vm), told));
        tokio::spawn(dispatch::group_events(vm.clone(), opened.events));
        for note in opened.notes {
            vm.events.note(&name, Severity::Warning, note);
        }
        if first == First::Create {
            vm.command("create", Command::Create).await?;
        }
        Ok(vm)
    }

    pub fn name(&self) -> String {
        self.with_record(|record| record.name().to_owned())
    }

    pub fn group_id(&self) -> GroupId {
        self.with_record(|record| record.group)
    }

    pub fn peers(&self) -> Vec<NodeId> {
        let me = self.host.me;
        self.with_record(|record| record.config.replicas.iter().copied().filter(|node| *node != me).collect())
    }

    pub fn place(&self) -> RegisterPlace {
        self.with_record(|record| record.place)
    }

    pub fn with_record<R>(&self, look: impl FnOnce(&VmRecord) -> R) -> R {
        look(&self.record.lock().expect("nothing panics while it holds the record"))
    }

    /// Changes this node's record, durably.
    pub fn change_record(&self, change: impl FnOnce(&mut VmRecord)) -> Result<(), Error> {
        let mut record = self.record.lock().expect("nothing panics while it holds the record");
        let mut next = record.clone();
        change(&mut next);
        if next != *record {
            next.save(&self.paths.record()).map_err(|e| {
                Error::failed(format!("cannot save the record of `{}`", next.name())).cause(e)
            })?;
            *record = next;
        }
        Ok(())
    }

    pub fn is_primary(&self) -> bool {
        self.group.is_primary()
    }

    pub fn allowed(&self) -> Allowed {
        self.control.borrow().allowed
    }

    /// Why this copy is out of service.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().expect("held for a moment only").clone()
    }

    fn ended(&self, failure: Option<String>) {
        *self.failure.lock().expect("held for a moment only") = failure;
        self.over.send_replace(true);
    }

    /// Has a connection made with this peer.
    pub fn want_link(&self, peer: NodeId) {
        let _ = self.host.links.send(LinkWanted { group: self.group_id(), peer });
    }

    pub fn drop_link(&self, peer: NodeId) {
        self.group.send(ToGroup::Unlink { peer });
    }

    /// Writes everything back and ends the thread. The machine must be gone.
    pub async fn close(&self) {
        let stopped = self.group.command(Command::Stop);
        if tokio::time::timeout(CLOSE_DEADLINE, stopped).await.is_err() {
            tracing::warn!(vm = self.name(), "not written back in time");
        }
        self.group.send(ToGroup::End);
        let mut over = self.over.subscribe();
        let _ = tokio::time::timeout(CLOSE_DEADLINE, over.wait_for(|over| *over)).await;
    }

    pub fn shown(&self) -> Shown {
        self.shown.borrow().clone()
    }

    pub fn shown_watch(&self) -> watch::Receiver<Shown> {
        self.shown.clone()
    }

    /// Gives the engine an order and its refusal a name.
    pub async fn command(
        &self,
        what: &str,
        command: Command,
    ) -> Result<rempart_engine::CommandOutput, Error> {
        self.group.command(command).await.map_err(|error| {
            let message = format!("cannot {what} `{}`", self.name());
            match error {
                CommandError::NotPrimary => {
                    Error::conflict(message).cause(error).hint("run it on the node that leads")
                }
                CommandError::PeerNotReady | CommandError::Refused(_) => Error::refused(message).cause(error),
                CommandError::Busy => Error::conflict(message).cause(error),
                CommandError::Aborted(_) => Error::failed(message).cause(error),
            }
        })
    }

    /// Puts a changed definition into the log, and follows it here.
    pub async fn put_config(&self, change: impl FnOnce(&mut VmConfig)) -> Result<(), Error> {
        let change = |config: &mut VmConfig| {
            change(config);
            Ok(())
        };
        self.change_config(change).await
    }

    /// The same, unless `change` refuses.
    pub async fn change_config(
        &self,
        change: impl FnOnce(&mut VmConfig) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let _one = self.changing.lock().await;
        let mut config = self.with_record(|record| record.config.clone());
        change(&mut config)?;
        config
            .definition
            .validate()
            .map_err(|e| Error::invalid(format!("cannot change `{}`", config.definition.name)).cause(e))?;
        self.command("change", Command::PutConfig { content: Bytes::from(config.encode()) }).await?;
        self.adopt_config(config)
    }

    /// The log holds this definition now.
    pub fn adopt_config(&self, config: VmConfig) -> Result<(), Error> {
        let wanted = wanted(&config, &self.host);
        self.change_record(|record| record.config = config)?;
        self.control.send_if_modified(|control| {
            // A stop with its own patience is not replaced by the general one.
            let same = matches!((control.wanted, wanted), (Wanted::Stopped { .. }, Wanted::Stopped { .. }));
            let changed = !same && control.wanted != wanted;
            if changed {
                control.wanted = wanted;
            }
            changed
        });
        Ok(())
    }

    /// Changes what the runner is told.
    fn control(&self, change: impl FnOnce(&mut Control)) {
        self.control.send_if_modified(|control| {
            let before = control.clone();
            change(control);
            *control != before
        });
    }

    /// Has it started here, and waits until its process runs.
    pub async fn start(&self) -> Result<(), Error> {
        let name = self.name();
        if !self.is_primary() {
            return Err(self.not_here("start"));
        }
        let started = |config: &mut VmConfig| {
            config.refuse_unfinished("start")?;
            config.should_run = true;
            Ok(())
        };
        self.change_config(started).await?;
        self.control(|control| {
            control.wanted = Wanted::Running;
            control.attempt += 1;
        });
        let mut shown = self.shown.clone();
        let waiting = shown.wait_for(|shown| shown.machine.is_some() || shown.failed.is_some());
        let result = match tokio::time::timeout(Duration::from_secs(60), waiting).await {
            Ok(Ok(shown)) => shown.failed.clone(),
            Ok(Err(_)) => Some("the daemon is ending".into()),
            Err(_) => Some("it did not start within 60 s".into()),
        };
        match result {
            None => Ok(()),
            Some(why) => Err(Error::failed(format!("cannot start `{name}`")).cause(why)),
        }
    }

    /// Has it stopped, and waits until no process of it is left. That it shall not run is written into its log first.
    pub async fn stop(&self, grace: Duration) -> Result<(), Error> {
        if !self.is_primary() {
            return Err(self.not_here("stop"));
        }
        let mut status = self.group.status.clone();
        let thawed = status.wait_for(|status| status.engine.serving && status.engine.frozen.is_none());
        if tokio::time::timeout(THAW_PATIENCE, thawed).await.is_err() {
            return Err(Error::conflict(format!("cannot stop `{}` now: it is frozen", self.name()))
                .cause(self.why_frozen())
                .hint(
                    "that it shall not run is written into its log, which takes nothing until then; `--force` \
                     ends its process at once",
                ));
        }
        self.put_config(|config| config.should_run = false).await?;
        self.end_process(grace).await
    }

    /// Ends its process at once, whatever state its log is in; then that it shall not run is recorded, when it can be.
    pub async fn stop_by_force(self: &Arc<Self>) -> Result<(), Error> {
        if !self.is_primary() {
            return Err(self.not_here("stop"));
        }
        self.end_process(Duration::ZERO).await?;
        let vm = self.clone();
        let recording = tokio::spawn(async move { vm.put_config(|config| config.should_run = false).await });
        match tokio::time::timeout(RECORD_PATIENCE, recording).await {
            Ok(Ok(recorded)) => recorded,
            Ok(Err(error)) => {
                Err(Error::failed(format!("cannot record that `{}` is stopped", self.name())).cause(error))
            }
            Err(_) => Err(Error::failed(format!(
                "`{}` is stopped, but that it shall not run cannot be recorded yet",
                self.name()
            ))
            .cause(self.why_frozen())
            .hint(
                "it is recorded as soon as its log takes it; if a peer takes over before, it starts there",
            )),
        }
    }

    fn why_frozen(&self) -> &'static str {
        self.group.status.borrow().engine.frozen.map_or("its log is not served yet", why_frozen)
    }

    async fn end_process(&self, grace: Duration) -> Result<(), Error> {
        self.control(|control| control.wanted = Wanted::Stopped { grace });
        let mut shown = self.shown.clone();
        let gone = shown.wait_for(|shown| shown.machine.is_none() && !shown.starting);
        match tokio::time::timeout(grace + Duration::from_secs(15), gone).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::failed(format!("`{}` did not stop", self.name()))),
        }
    }

    fn not_here(&self, what: &str) -> Error {
        Error::conflict(format!("cannot {what} `{}` on this node: it does not lead", self.name()))
            .hint("`rempart status` names the node that does; run it there, or `rempart failover` here")
    }
}

/// What a definition says should be.
fn wanted(config: &VmConfig, host: &Host) -> Wanted {
    if config.should_run {
        Wanted::Running
    } else {
        Wanted::Stopped { grace: Duration::from_secs(host.config.vm.shutdown_timeout_s) }
    }
}

fn create_private_dir(path: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn listen(paths: &VmPaths) -> std::io::Result<OwnedFd> {
    let path = paths.nbd_socket();
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    Ok(listener.into())
}

#[derive(Debug)]
struct VmStart {
    vm: std::sync::Weak<Vm>,
}

impl StartSource for VmStart {
    fn start_request(&self, lease: Lease) -> Option<StartRequest> {
        let vm = self.vm.upgrade()?;
        let config = vm.with_record(|record| record.config.clone());
        let socket = vm.paths.nbd_socket();
        let export = |disk: &rempart_hypervisor::definition::Disk| DiskExport {
            disk: disk.index,
            socket: socket.clone(),
            export_name: group::export_name(disk.index),
        };
        Some(StartRequest {
            disks: config.definition.disks.iter().map(export).collect(),
            definition: config.definition,
            run_dir: vm.paths.run.clone(),
            nvram: config.nvram,
            lease,
            guard_stop: Duration::from_millis(vm.timing.guard_stop_ms),
            first_state: FirstState::Running,
        })
    }
}

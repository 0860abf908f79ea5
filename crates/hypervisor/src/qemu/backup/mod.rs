//! A consistent view of a running QEMU's disks, and what changed since an earlier one.
//!
//! For VMs that somebody else runs: all that is needed is a socket of QEMU's monitor. The guest goes on writing; what
//! it overwrites is copied to a scratch image of bounded size first, and the view is served read-only over NBD.
//!
//! | step | done by | when it is lost half way |
//! |---|---|---|
//! | leftovers of killed processes are removed | [`teardown`] | the next view does it |
//! | per disk: a node that only passes requests on is put under the device; scratch image and copying node are made beside it | `blockdev-add`, `qom-set` | the guest does not notice |
//! | the bitmaps of the next period start, on all disks | one `transaction` | they are bitmaps of a period that no commit knows: the next view of the tracker removes them |
//! | **the view's instant**: on all disks at once, requests pass the copying node | one `blockdev-reopen` | the guest goes on; a full scratch image ends the view, not the guest |
//! | the last period's bitmaps are copied for the readers | one `transaction` | removed with the view |
//! | exports | `block-export-add` | |
//!
//! A view with the guest's memory is taken as `memory` says.
//!
//! QEMU can neither put its copying filter in by a transaction nor tell it, in a backup job, to prefer the guest to the
//! view; a reopen of all top nodes is what it does at one instant. Bitmaps need no such instant: the next period's
//! starts a little before the view's, the last one's is copied a little after it, so that a write in between is in
//! both. To read something twice is harmless.
//!
//! The last period's bitmap goes on recording until [`LiveView::retire`]: whoever dies before that leaves it as it was,
//! and the next view finds all changes in it.
//!
//! The monitor is connected to only while a view is made or taken away: QEMU serves one client at a time on a socket. A VM
//! with several monitors is always viewed by the same one, whose path its directory is found by.

mod changes;
mod consistency;
pub(super) mod description;
mod directory;
mod graph;
mod memory;
mod names;
mod teardown;

pub use super::saved_memory::SavedMemory;
pub use changes::{Changes, TrackingToken, WhyUnknown};
pub use consistency::{Agent, Otherwise, Policy, Reached};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use graph::fuzz as fuzz_graph;
pub use graph::{SkipReason, SkippedDevice};
pub use memory::Saving;
pub use names::Tracker;

use crate::error::{Error, ErrorKind, Result};
use crate::qmp::Client;
use directory::ViewDirectory;
use graph::{Disk, Graph, Variables};
use names::{Role, ViewId};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use teardown::pass_on;

/// `on-cbw-error` came with 7.1, `snapshot-access` with 7.0.
const OLDEST_QEMU: (u32, u32) = (7, 1);

/// For a guest that an earlier view left standing still.
const THOROUGH: Duration = Duration::from_secs(60);

/// Below this a scratch image has hardly room for its own tables.
const LEAST_SCRATCH: u64 = 4 << 20;

/// How to take a view.
#[derive(Debug, Clone)]
pub struct Options {
    pub tracker: Tracker,
    /// Where scratch images and the socket are made, on a local file system: a directory of its own, the same for every
    /// view of the VM.
    pub directory: PathBuf,
    /// What the guest may overwrite, per disk, before the view breaks.
    pub scratch_bytes: u64,
    /// How long a guest's write may wait for the scratch image before the view breaks.
    pub copy_timeout: Duration,
    /// Bytes that one bit of a new bitmap stands for: a power of two from 512 on.
    pub granularity: u32,
    /// How long to wait for QEMU's monitor, which may have another client.
    pub connect_timeout: Duration,
}

impl Options {
    /// 4 GiB of scratch a disk, 5 s, 64 KiB, 10 s.
    pub fn new(tracker: Tracker, directory: impl Into<PathBuf>) -> Self {
        Self {
            tracker,
            directory: directory.into(),
            scratch_bytes: 4 << 30,
            copy_timeout: Duration::from_secs(5),
            granularity: 64 << 10,
            connect_timeout: Duration::from_secs(10),
        }
    }
}

/// One disk of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewDisk {
    /// Name of the drive, id of its device, or the device's path in QEMU: what tokens are stored under.
    pub id: String,
    /// QEMU's block node that holds the data.
    pub node: String,
    /// `qcow2`, `raw` …
    pub format: String,
    pub file: Option<PathBuf>,
    pub size_bytes: u64,
    /// So many snapshots are in its image, which the view does not show.
    pub snapshots: usize,
    /// NBD server on a unix socket.
    pub socket: PathBuf,
    pub export: String,
    pub changes: Changes,
    /// For the next view, if this one's data was stored.
    pub next: TrackingToken,
}

/// The firmware's variables, as they are while the view is open: the guest may change them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewVariables {
    pub size_bytes: u64,
    /// NBD server on a unix socket.
    pub socket: PathBuf,
    pub export: String,
}

/// A view that is ready to be taken: the guest is not affected yet.
#[derive(Debug)]
pub struct Prepared {
    view: Held,
    client: Client,
    /// Nobody else edits QEMU's graph meanwhile.
    _editing: File,
    disks: Vec<(Disk, Option<TrackingToken>)>,
    skipped: Vec<SkippedDevice>,
    variables: Option<Variables>,
    description: Value,
    options: Options,
    /// QEMU's user and group.
    owner: (u32, u32),
}

/// A view that is being read.
///
/// If it is dropped, its nodes are removed from QEMU and nothing is forgotten: neither the period that ended nor the
/// one that began.
#[derive(Debug)]
pub struct LiveView {
    view: Held,
    tracker: Tracker,
    disks: Vec<ViewDisk>,
    skipped: Vec<SkippedDevice>,
    variables: Option<Result<ViewVariables>>,
    description: Value,
    instant: Instant,
    stall: Duration,
    pause: Option<Duration>,
    memory: Option<SavedMemory>,
}

/// When a view's instant was, how long it held the guest's writes, and the disks.
type Cut = (Instant, Duration, Vec<ViewDisk>);

/// What keeps others from taking a view for a leftover; removes it when dropped.
#[derive(Debug)]
struct Held {
    monitor: PathBuf,
    directory: ViewDirectory,
    id: ViewId,
    connect_timeout: Duration,
    /// None once nothing is left in QEMU.
    locks: Option<[File; 2]>,
}

impl LiveView {
    /// Prepares a view and takes it while the guest runs. `known` holds the token of each disk's last view whose data was
    /// stored, by [`ViewDisk::id`].
    pub async fn open(
        monitor: &Path,
        options: &Options,
        known: &BTreeMap<String, TrackingToken>,
    ) -> Result<Self> {
        Prepared::new(monitor, options, known).await?.take().await
    }

    pub fn disks(&self) -> &[ViewDisk] {
        &self.disks
    }

    pub fn skipped(&self) -> &[SkippedDevice] {
        &self.skipped
    }

    /// Where the firmware keeps its variables, if it does, or why they cannot be read.
    pub fn variables(&self) -> Option<&Result<ViewVariables>> {
        self.variables.as_ref()
    }

    /// What QEMU tells of the VM, and by which command line it was started, where that can be seen.
    pub fn description(&self) -> &Value {
        &self.description
    }

    /// When the view's instant was over.
    pub fn instant(&self) -> Instant {
        self.instant
    }

    /// How long taking the view held the guest's writes, at most.
    pub fn stall(&self) -> Duration {
        self.stall
    }

    /// How long the guest stood still for it, if it did.
    pub fn pause(&self) -> Option<Duration> {
        self.pause
    }

    /// The guest's memory and devices at that instant, if they were kept.
    pub fn memory(&self) -> Option<&SavedMemory> {
        self.memory.as_ref()
    }

    /// Ends the view; the caller's commit, which holds [`ViewDisk::next`], is known to be stored. The next view tells what
    /// changed since this one.
    pub async fn retire(self) -> Result<()> {
        let others = |disk: &ViewDisk, bitmap: &str| self.tracker.owns(bitmap) && bitmap != disk.next.bitmap;
        let ended = |node: &str, bitmap: &str| {
            self.disks.iter().any(|disk| disk.node == node && others(disk, bitmap))
        };
        self.view.end(ended).await
    }

    /// Ends the view where nobody knows whether its data was stored: the next one is told what changed since this one or
    /// since the one before, by the token that the caller brings.
    pub async fn close(self) -> Result<()> {
        self.view.end(|_, _| false).await
    }

    /// Ends the view as if it had not been: the next one tells what changed since the one before.
    pub async fn abandon(self) -> Result<()> {
        let begun = |node: &str, bitmap: &str| {
            self.disks.iter().any(|disk| disk.node == node && disk.next.bitmap == bitmap)
        };
        self.view.end(begun).await
    }
}

impl Held {
    /// Removes the view, then the bitmaps that `chosen` takes, by node and name.
    async fn end(mut self, chosen: impl Fn(&str, &str) -> bool) -> Result<()> {
        let (client, _editing) = self.remove().await?;
        let graph = Graph::read(&client).await?;
        for (node, bitmap) in graph.bitmaps().filter(|(node, bitmap)| chosen(node, &bitmap.name)) {
            client.remove_bitmap(node, &bitmap.name).await?;
        }
        Ok(())
    }

    async fn remove(&mut self) -> Result<(Client, File)> {
        let editing = self.directory.edit().await?;
        let client = connect(&self.monitor, self.connect_timeout).await?;
        teardown::remove(&client, &self.directory, self.id).await?;
        self.locks = None;
        Ok((client, editing))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(locks) = self.locks.take() else { return };
        // Without a runtime, the next view of the VM finds it.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let mut held =
            Held { monitor: self.monitor.clone(), directory: self.directory.clone(), locks: None, ..*self };
        runtime.spawn(async move {
            let result = held.remove().await;
            drop(locks);
            if let Err(error) = result {
                tracing::warn!(view = %held.id, %error, "cannot remove a view from QEMU: the next view of the VM will");
            }
        });
    }
}

impl Prepared {
    /// Makes what a view needs beside the guest's disks. `known` as in [`LiveView::open`].
    pub async fn new(
        monitor: &Path,
        options: &Options,
        known: &BTreeMap<String, TrackingToken>,
    ) -> Result<Self> {
        check_options(options)?;
        let directory = ViewDirectory::open(&options.directory, monitor)?;
        let tracker = directory.hold_tracker(&options.tracker)?;
        let editing = directory.edit().await?;
        let client = connect(monitor, options.connect_timeout).await?;
        check_version(client.version())?;
        continue_a_stopped_guest(&client, &directory).await?;
        teardown::remove_leftovers(&client, &directory).await?;
        let owner = client.peer_pid().and_then(user_of).unwrap_or_else(own_user);
        directory.hand_to(owner.0, owner.1)?;
        let description = description::describe(&client).await;
        let graph = Graph::read(&client).await?;
        let (disks, skipped) = graph.disks()?;
        if disks.is_empty() {
            let detail = "it has no disk that the guest can write to";
            return Err(Error::new(ErrorKind::Refused, "take a view of this VM", detail));
        }
        let id = ViewId(random()? as u32);
        let view = Held {
            monitor: monitor.to_owned(),
            directory: directory.clone(),
            id,
            connect_timeout: options.connect_timeout,
            locks: Some([directory.hold_view(id)?, tracker]),
        };
        let with_tokens = disks.into_iter().map(|disk| {
            let token = known.get(&disk.id).cloned();
            (disk, token)
        });
        let prepared = Self {
            view,
            client,
            _editing: editing,
            disks: with_tokens.collect(),
            skipped,
            variables: graph.variables(),
            description,
            options: options.clone(),
            owner,
        };
        // From here on, what was made is taken away if the rest fails.
        let made = match prepared.forget_unknown_periods().await {
            Ok(()) => prepared.make().await,
            Err(error) => Err(error),
        };
        match made {
            Ok(()) => Ok(prepared),
            Err(error) => Err(prepared.undo(error).await),
        }
    }

    pub fn skipped(&self) -> &[SkippedDevice] {
        &self.skipped
    }

    async fn make(&self) -> Result<()> {
        start_server(&self.client, &self.view.directory).await?;
        let id = self.view.id;
        for (index, (disk, _)) in self.disks.iter().enumerate() {
            let node = |role| names::node(id, role, index);
            let scratch_bytes = self.options.scratch_bytes;
            self.view.directory.make_scratch(id, index, scratch_bytes, self.owner)?;
            self.add_store(index).await?;
            let image = json!({ "driver": "qcow2", "file": node(Role::Store), "size": disk.size_bytes });
            self.client.blockdev_create(&names::create_job(id, index), image).await?;
            self.add_copying(index, disk).await?;
            self.client.blockdev_add(pass_on(&node(Role::Top), &disk.root)).await?;
            self.client.qom_set(&disk.path, "drive", json!(node(Role::Top))).await?;
        }
        Ok(())
    }

    /// The file that a disk's scratch image is in.
    async fn add_store(&self, index: usize) -> Result<()> {
        let file = self.view.directory.scratch_file(self.view.id, index);
        self.client
            .blockdev_add(json!({
                "driver": "raw", "node-name": names::node(self.view.id, Role::Store, index),
                "size": self.options.scratch_bytes,
                "file": { "driver": "file", "filename": file, "cache": cache(), "discard": "unmap" },
            }))
            .await
    }

    /// What keeps a disk's old bytes aside, beside the guest's path.
    async fn add_copying(&self, index: usize, disk: &Disk) -> Result<()> {
        let node = |role| names::node(self.view.id, role, index);
        self.client
            .blockdev_add(json!({
                "driver": "qcow2", "node-name": node(Role::Scratch), "file": node(Role::Store),
                "cache": cache(),
            }))
            .await?;
        self.client.blockdev_add(pass_on(&node(Role::Base), &disk.root)).await?;
        self.client
            .blockdev_add(json!({
                "driver": "copy-before-write", "node-name": node(Role::Copy), "file": node(Role::Base),
                "target": node(Role::Scratch), "on-cbw-error": "break-snapshot",
                "cbw-timeout": self.options.copy_timeout.as_secs().max(1),
            }))
            .await
    }

    /// Undoes both for all disks, before the view is taken. Scratch images stay as they are.
    async fn remove_copying(&self) -> Result<()> {
        for role in [Role::Copy, Role::Base, Role::Scratch, Role::Store] {
            for index in 0..self.disks.len() {
                self.client.blockdev_del(&names::node(self.view.id, role, index)).await?;
            }
        }
        Ok(())
    }

    /// Makes everything anew, after an attempt to take the view that may have ended anywhere.
    async fn begin_again(&mut self) -> Result<()> {
        let directory = &self.view.directory;
        teardown::remove(&self.client, directory, self.view.id).await?;
        let id = ViewId(random()? as u32);
        let lock = directory.hold_view(id)?;
        self.view.id = id;
        if let Some(locks) = &mut self.view.locks {
            locks[0] = lock;
        }
        self.make().await
    }

    /// Bitmaps of this tracker that no caller knows of: of views that were not stored, or were given up.
    async fn forget_unknown_periods(&self) -> Result<()> {
        for (disk, token) in &self.disks {
            for bitmap in &disk.bitmaps {
                let known = token.as_ref().is_some_and(|token| token.bitmap == bitmap.name);
                if self.options.tracker.owns(&bitmap.name) && !known && !bitmap.busy {
                    self.client.remove_bitmap(&disk.data, &bitmap.name).await?;
                }
            }
        }
        Ok(())
    }

    /// Takes the view while the guest runs.
    pub async fn take(self) -> Result<LiveView> {
        match self.cut().await {
            Ok(cut) => Ok(self.into_view(cut, None).await),
            Err(error) => Err(self.undo(error).await),
        }
    }

    async fn into_view(
        self,
        (instant, stall, disks): Cut,
        saved: Option<(SavedMemory, Duration)>,
    ) -> LiveView {
        let (memory, pause) = saved.unzip();
        let variables = match &self.variables {
            Some(variables) => Some(self.show(variables).await),
            None => None,
        };
        LiveView {
            view: self.view,
            tracker: self.options.tracker,
            disks,
            skipped: self.skipped,
            variables,
            description: self.description,
            instant,
            stall,
            pause,
            memory,
        }
    }

    /// The export goes when the view goes.
    async fn show(&self, variables: &Variables) -> Result<ViewVariables> {
        let export = names::export(self.view.id, self.disks.len());
        let options = json!({
            "type": "nbd", "id": export, "name": export, "node-name": variables.root, "writable": false,
        });
        self.client.block_export_add(options).await?;
        Ok(ViewVariables { size_bytes: variables.size_bytes, socket: self.view.directory.socket(), export })
    }

    async fn undo(mut self, error: Error) -> Error {
        match teardown::remove(&self.client, &self.view.directory, self.view.id).await {
            Ok(()) => self.view.locks = None,
            Err(left) => {
                tracing::warn!(view = %self.view.id, error = %left, "cannot remove a view from QEMU: the next view of the VM will");
            }
        }
        error
    }

    async fn cut(&self) -> Result<Cut> {
        let ((instant, stall), next) = self.switch().await?;
        let rest = self.finish(&next).await;
        self.or_forget(&next, rest).await.map(|disks| (instant, stall, disks))
    }

    /// The view's instant.
    async fn switch(&self) -> Result<((Instant, Duration), Vec<TrackingToken>)> {
        let id = self.view.id;
        let next = self.start_period().await?;
        let switched = (0..self.disks.len()).map(|index| {
            let [top, copy] = [Role::Top, Role::Copy].map(|role| names::node(id, role, index));
            pass_on(&top, &copy)
        });
        let before = Instant::now();
        let result = self.client.blockdev_reopen(switched.collect()).await;
        let instant = Instant::now();
        self.or_forget(&next, result).await.map(|()| ((instant, instant - before), next))
    }

    /// The periods that just began are of no use to anybody if the view fails.
    async fn or_forget<T>(&self, next: &[TrackingToken], result: Result<T>) -> Result<T> {
        if result.is_err() {
            for ((disk, _), token) in self.disks.iter().zip(next) {
                let _ = self.client.remove_bitmap(&disk.data, &token.bitmap).await;
            }
        }
        result
    }

    /// Starts the bitmap of the next period on every disk.
    async fn start_period(&self) -> Result<Vec<TrackingToken>> {
        let (mut tokens, mut actions) = (Vec::new(), Vec::new());
        for (disk, _) in &self.disks {
            let bitmap = self.options.tracker.bitmap(random()?);
            actions.push(action(
                "block-dirty-bitmap-add",
                json!({
                    "node": disk.data, "name": bitmap, "granularity": self.options.granularity,
                    "persistent": disk.keeps_bitmaps,
                }),
            ));
            tokens.push(TrackingToken { bitmap, size_bytes: disk.size_bytes });
        }
        self.client.transaction(actions).await?;
        Ok(tokens)
    }

    /// Copies the last period's bitmaps and serves everything.
    async fn finish(&self, next: &[TrackingToken]) -> Result<Vec<ViewDisk>> {
        let id = self.view.id;
        let bitmap = names::view_bitmap(id);
        // As it is now: a bitmap that went away since the view was prepared is not to be trusted.
        let (now, _) = Graph::read(&self.client).await?.disks()?;
        let mut actions = Vec::new();
        let mut changes = Vec::new();
        for (disk, token) in &self.disks {
            let found = now.iter().find(|found| found.id == disk.id && found.data == disk.data);
            let judged = changes::judge(&self.options.tracker, found.unwrap_or(disk), token.as_ref());
            changes.push(match (judged, token) {
                (Ok(()), Some(token)) => {
                    let granularity = found
                        .and_then(|found| found.bitmaps.iter().find(|known| known.name == token.bitmap))
                        .map_or(self.options.granularity, |known| known.granularity);
                    let (node, ended) = (&disk.data, &token.bitmap);
                    let options =
                        json!({ "node": node, "name": bitmap, "granularity": granularity, "disabled": true });
                    actions.push(action("block-dirty-bitmap-add", options));
                    let options = json!({ "node": node, "target": bitmap, "bitmaps": [ended] });
                    actions.push(action("block-dirty-bitmap-merge", options));
                    Changes::Since { token: token.clone(), context: format!("qemu:dirty-bitmap:{bitmap}") }
                }
                (Err(why), _) => Changes::Unknown(why),
                (Ok(()), None) => Changes::Unknown(WhyUnknown::FirstView),
            });
        }
        if !actions.is_empty() {
            self.client.transaction(actions).await?;
        }
        let mut disks = Vec::new();
        for (index, (((disk, _), changes), next)) in self.disks.iter().zip(changes).zip(next).enumerate() {
            let access = names::node(id, Role::Access, index);
            self.client
                .blockdev_add(json!({
                    "driver": "snapshot-access", "node-name": access, "file": names::node(id, Role::Copy, index),
                }))
                .await?;
            let export = names::export(id, index);
            let mut options = json!({
                "type": "nbd", "id": export, "name": export, "node-name": access, "writable": false,
            });
            if let Changes::Since { .. } = changes {
                options["bitmaps"] = json!([{ "node": disk.data, "name": bitmap }]);
            }
            self.client.block_export_add(options).await?;
            disks.push(ViewDisk {
                id: disk.id.clone(),
                node: disk.data.clone(),
                format: disk.driver.clone(),
                file: disk.file.clone(),
                size_bytes: disk.size_bytes,
                snapshots: disk.snapshots,
                socket: self.view.directory.socket(),
                export,
                changes,
                next: next.clone(),
            });
        }
        Ok(disks)
    }
}

async fn connect(monitor: &Path, timeout: Duration) -> Result<Client> {
    Client::connect(monitor, timeout).await.map_err(|error| match error.kind() {
        ErrorKind::Deadline => {
            let detail = format!("{}; it serves one client at a time, and may have another", error.detail());
            Error::new(
                ErrorKind::Deadline,
                format!("connect to QEMU's monitor `{}`", monitor.display()),
                detail,
            )
        }
        _ => error,
    })
}

fn cache() -> Value {
    json!({ "direct": false, "no-flush": true })
}

fn action(name: &str, data: Value) -> Value {
    json!({ "type": name, "data": data })
}

fn check_options(options: &Options) -> Result<()> {
    let refuse = |detail: String| Err(Error::new(ErrorKind::InvalidDefinition, "take a view", detail));
    if options.scratch_bytes < LEAST_SCRATCH {
        return refuse(format!("{} bytes of scratch are less than {LEAST_SCRATCH}", options.scratch_bytes));
    }
    if !options.granularity.is_power_of_two() || options.granularity < 512 {
        return refuse(format!("a granularity of {} is no power of two from 512 on", options.granularity));
    }
    Ok(())
}

fn check_version(version: &str) -> Result<()> {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    if (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= OLDEST_QEMU {
        return Ok(());
    }
    let (major, minor) = OLDEST_QEMU;
    let detail = format!("QEMU is {version}, and {major}.{minor} is the first that can do it");
    Err(Error::new(ErrorKind::MissingOnHost, "take a view of this VM", detail))
}

/// QEMU serves all views of a VM by one server, which others may have started for themselves.
async fn start_server(client: &Client, directory: &ViewDirectory) -> Result<()> {
    let socket = directory.socket();
    if teardown::is_served(&socket).await {
        return Ok(());
    }
    let _ = std::fs::remove_file(&socket);
    client.nbd_server_start(&socket).await.map_err(|error| {
        let hint = if error.detail().contains("already running") {
            "; another program uses it: try again when that has ended"
        } else {
            ""
        };
        let action = "start QEMU's NBD server for a view";
        Error::new(error.kind(), action, format!("{}{hint}", error.detail()))
    })?;
    directory.close_socket()
}

/// User and group of a process.
fn user_of(pid: u32) -> Option<(u32, u32)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    // Real, effective, saved and file system's.
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    Some((field("Uid:")?, field("Gid:")?))
}

fn own_user() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

fn random() -> Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Error::io("draw a random number", error))?;
    Ok(u64::from_le_bytes(bytes))
}

/// A process that stopped the guest for a view, and died before it let it go on.
async fn continue_a_stopped_guest(client: &Client, directory: &ViewDirectory) -> Result<()> {
    if directory.is_marked_paused() {
        let status = client.query_status().await?.status;
        if memory::OURS.contains(&status.as_str()) {
            tracing::warn!("the guest was left stopped by an earlier view: it goes on");
            memory::go_on(client, THOROUGH).await?;
        }
        directory.unmark_paused();
    }
    Ok(())
}

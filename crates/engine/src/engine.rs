//! The composition: facts go round between the three cores until nothing follows from them.

use crate::commands::Commands;
use crate::compare::Compares;
use crate::configs::Configs;
use crate::control::Control;
use crate::flush_habit::FlushHabit;
use crate::requests::Requests;
use crate::resync::ResyncJobs;
use crate::route::ENGINE_RECEIPT;
use crate::status::ResyncStatus;
use crate::view::Views;
use crate::work::{Beside, Work};
use crate::{Action, Bytes, Input, OpenError, Params, RegisterReply, Report, VmFact};
use rempart_cluster::{Event as ClusterEvent, Member};
use rempart_replication::{BatchInfo, Event as ReplicationEvent, LogState, Replication, Syncing};
use rempart_store::{Batch, BatchBuilder, Health, Output, Store, SyncingPhase, Token};
use rempart_types::{DiskIndex, Epoch, ExtentIndex, Lsn, MonotonicTime, NodeId, WallTime};
use std::collections::{BTreeMap, VecDeque};

/// Tokens of the engine's own reads of the log. Peers' are below.
pub(crate) const CONFIG_SCAN: Token = Token(u64::MAX);

/// One replica of one group.
#[derive(Debug)]
pub struct Engine {
    pub(crate) params: Params,
    pub(crate) store: Store,
    pub(crate) member: Member,
    pub(crate) replication: Replication,
    pub(crate) builder: BatchBuilder,
    /// A request in the open batch waits for the disk.
    pub(crate) sync_open_batch: bool,
    pub(crate) flush_habit: FlushHabit,
    pub(crate) now: MonotonicTime,
    pub(crate) wall: WallTime,
    pub(crate) queue: VecDeque<Work>,
    pub(crate) out: Vec<Action>,
    pub(crate) requests: Requests,
    pub(crate) control: Control,
    /// Control states on their way to the superblock, and the promise in each.
    pub(crate) persisting: VecDeque<(u64, Epoch)>,
    pub(crate) configs: Configs,
    pub(crate) resync: ResyncJobs,
    pub(crate) last_resyncs: BTreeMap<NodeId, ResyncStatus>,
    pub(crate) compares: Compares,
    pub(crate) views: Views,
    pub(crate) newest_snapshot: u64,
    pub(crate) commands: Commands,
    /// Reads of the log for peers: token, peer and session, and where they began.
    pub(crate) log_reads: VecDeque<LogRead>,
    pub(crate) next_token: u64,
    pub(crate) disk_sizes: Vec<u64>,
    pub(crate) disk_change: crate::disks::DiskChange,
    /// Requests may be served: the term's tail is committed.
    pub(crate) serving: bool,
    /// Nothing may be acknowledged or appended.
    pub(crate) frozen: bool,
    pub(crate) draining: Option<rempart_types::Term>,
    /// Why the store is out.
    pub(crate) failure: Option<String>,
    pub(crate) images_changed: bool,
    /// The log's end when an image was found changed by others: of that change no map and no record tells.
    pub(crate) images_changed_at: Option<Lsn>,
    usable: bool,
    io: Output,
    cluster_actions: Vec<rempart_cluster::Action>,
    replication_actions: Vec<rempart_replication::Action>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct LogRead {
    pub token: Token,
    pub peer: NodeId,
    pub session: rempart_types::SessionId,
    pub after: rempart_types::Lsn,
}

pub(crate) fn sizes(disks: &[rempart_store::DiskEntry]) -> Vec<u64> {
    let mut sizes = Vec::new();
    for disk in disks {
        let index = usize::from(disk.index.0);
        if sizes.len() <= index {
            sizes.resize(index + 1, 0);
        }
        sizes[index] = disk.size;
    }
    sizes
}

impl Engine {
    /// Recovers the store and starts. Nothing is served yet; `out` gets the first actions.
    pub fn open<D: rempart_store::Disk>(
        disk: &mut D,
        params: Params,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) -> Result<Engine, OpenError> {
        let (store, recovered) = Store::open(disk, &params.store).map_err(OpenError::Store)?;
        let mut control = Control::decode(&recovered.control).ok_or(OpenError::Control)?;
        if recovered.rolled_back || !matches!(recovered.health, Health::Syncing(_)) {
            control.resync = None;
        }
        let me = params.cluster.me;
        // With an attempt under way that names a peer, that peer had to acknowledge everything from then on.
        let leads = control.cluster.known.as_ref().is_some_and(|known| known.primary == me);
        let alone = leads && control.cluster.named().len() == 1;
        let syncing = match recovered.health {
            // Without the base nothing can be concluded.
            Health::Syncing(SyncingPhase::Extents) => {
                let resync = control
                    .resync
                    .unwrap_or(crate::control::ResyncBase { whole: true, ..Default::default() });
                Some(Syncing { base: resync.base, whole: resync.whole, levels: Vec::new() })
            }
            _ => None,
        };
        let damaged = matches!(recovered.health, Health::Damaged(_));
        let images_changed = !recovered.images_changed.is_empty();
        let state = LogState {
            lineage: recovered.lineage.clone(),
            end: recovered.log_end.lsn,
            durable: recovered.log_end.lsn,
            stable: recovered.stable.min(recovered.log_end.lsn),
            applied: recovered.applied,
            wrote_alone: alone,
            image_unknown: damaged || images_changed,
            blank_start: recovered.disks.iter().all(|disk| disk.base == rempart_store::DiskEntry::EMPTY),
            may_overwrite: control.may_overwrite,
            syncing,
        };
        let whole = recovered.health == Health::Good;
        let replication = rempart_replication::Recovered {
            state,
            applied_chain: store.applied_chain().map(|chain| chain.0),
            journal_start: store.oldest_available_lsn(),
            promise: control.cluster.promise,
            whole,
            disks: sizes(&recovered.disks),
        };
        let replication = Replication::new(me, params.replication.clone(), replication);
        // Its image is what the machine left, whoever changed it: alone it leads, and compares its peers.
        let usable = whole && (!images_changed || alone);
        let member = Member::new(params.cluster.clone(), control.cluster.clone(), usable, now);
        let mut engine = Engine {
            builder: BatchBuilder::new(store.max_batch_len()),
            disk_sizes: sizes(&recovered.disks),
            disk_change: crate::disks::DiskChange::default(),
            configs: Configs::new(recovered.config.clone()),
            params,
            store,
            member,
            replication,
            sync_open_batch: false,
            flush_habit: FlushHabit::new(),
            now,
            wall: WallTime(0),
            queue: VecDeque::new(),
            out: Vec::new(),
            requests: Requests::default(),
            control,
            persisting: VecDeque::new(),
            resync: ResyncJobs::default(),
            last_resyncs: BTreeMap::new(),
            compares: Compares::default(),
            views: Views::default(),
            newest_snapshot: 0,
            commands: Commands::default(),
            log_reads: VecDeque::new(),
            next_token: 0,
            serving: false,
            frozen: false,
            draining: None,
            failure: None,
            images_changed,
            images_changed_at: images_changed.then_some(recovered.log_end.lsn),
            usable,
            io: Output::default(),
            cluster_actions: Vec::new(),
            replication_actions: Vec::new(),
        };
        engine.queue.push_back(Work::Cluster(ClusterEvent::LogChanged { lineage: recovered.lineage }));
        if recovered.log_end.lsn > recovered.applied {
            engine.with_store(|store, io| store.read_log(CONFIG_SCAN, recovered.applied, 1 << 20, io));
        }
        engine.resume_resync_end();
        engine.pump();
        out.append(&mut engine.out);
        Ok(engine)
    }

    /// Takes one fact.
    pub fn handle(&mut self, input: Input, now: MonotonicTime, out: &mut Vec<Action>) {
        self.now = self.now.max(now);
        self.store.now_is(self.now);
        match input {
            Input::Connected { peer, session } => {
                self.compares_disconnected(peer);
                self.cluster(ClusterEvent::PeerConnected { node: peer, session });
                self.replication(ReplicationEvent::Connected { peer, session });
            }
            Input::Disconnected { peer, session } => {
                self.compares_disconnected(peer);
                self.cluster(ClusterEvent::PeerDisconnected { node: peer, session });
                self.replication(ReplicationEvent::Disconnected { peer, session });
            }
            Input::Message { peer, session, message } => self.received(peer, session, message),
            Input::Io(completion) => self.with_store(|store, io| store.complete(completion, io)),
            Input::Register(RegisterReply::Read { request, outcome }) => {
                self.cluster(ClusterEvent::RegisterRead { request, outcome });
            }
            Input::Register(RegisterReply::Swapped { request, outcome }) => {
                self.cluster(ClusterEvent::RegisterSwapped { request, outcome });
            }
            Input::Vm(VmFact::Running) => self.cluster(ClusterEvent::VmRunning),
            Input::Vm(VmFact::Stopped) => self.cluster(ClusterEvent::VmStopped),
            Input::Digested { job, digests } => self.digested(job, digests),
            Input::Command { id, command } => self.command(id, command),
            Input::ReadView { view, token, extents } => self.read_view(view, token, extents),
            Input::Tick => self.tick(),
        }
        self.pump();
        out.append(&mut self.out);
    }

    fn tick(&mut self) {
        let now = self.now;
        if self.member.next_wake().is_some_and(|at| at <= now) {
            self.cluster(ClusterEvent::Tick);
        }
        // Not asked whether it is due: a wait that is over is no reason to be woken any more.
        self.replication(ReplicationEvent::Tick);
        if self.store.next_wake().is_some_and(|at| at <= now) {
            self.with_store(|store, io| store.tick(now, io));
        }
    }

    /// Everything that is ready was handed in: what was written becomes one batch, reads are answered,
    /// acknowledgements go out. `wall` is written into the batch.
    pub fn end_turn(&mut self, now: MonotonicTime, wall: WallTime, out: &mut Vec<Action>) {
        self.now = self.now.max(now);
        self.store.now_is(self.now);
        self.wall = wall;
        self.pump();
        self.release_held();
        self.seal();
        self.pump();
        let mut actions = std::mem::take(&mut self.replication_actions);
        self.replication.end_turn(self.now, &mut actions);
        for action in actions.drain(..) {
            self.perform_replication(action, &Beside::Nothing);
        }
        self.replication_actions = actions;
        self.pump();
        out.append(&mut self.out);
    }

    /// When `Input::Tick` is wanted next.
    pub fn next_wake(&self) -> Option<MonotonicTime> {
        let cores = [self.member.next_wake(), self.replication.next_wake(self.now), self.store.next_wake()];
        cores.into_iter().flatten().min()
    }

    /// The runs of terms in this replica's log.
    pub fn lineage(&self) -> &rempart_types::Lineage {
        self.replication.lineage()
    }

    /// Sizes of the disks in bytes, by index; 0 where there is none.
    pub fn disk_sizes(&self) -> &[u64] {
        &self.disk_sizes
    }

    /// Extents of `disk` that hold or held something, and the record that touched each last, from `from` on, at most
    /// `limit`. The second value is where to go on; a superset after crashes, never less.
    pub fn changed_extents(
        &self,
        disk: DiskIndex,
        from: ExtentIndex,
        limit: usize,
    ) -> (Vec<(ExtentIndex, Lsn)>, Option<ExtentIndex>) {
        self.store.changed_since(disk, Lsn::ZERO, from, limit)
    }

    /// Records to here are in the images.
    pub fn applied(&self) -> Lsn {
        self.store.applied()
    }

    /// Where the image of `disk` is.
    pub fn image_location(&self, disk: DiskIndex) -> Option<&str> {
        self.store.disks().iter().find(|entry| entry.index == disk).map(|entry| entry.location.as_str())
    }

    /// The latest definition of the virtual machine in the log of this replica.
    pub fn config(&self) -> Option<&Bytes> {
        self.configs.latest()
    }

    // --- between the cores ---

    pub(crate) fn cluster(&mut self, event: ClusterEvent) {
        self.queue.push_back(Work::Cluster(event));
    }

    pub(crate) fn replication(&mut self, event: ReplicationEvent) {
        self.queue.push_back(Work::Replication(event, Beside::Nothing));
    }

    /// Calls the store; what follows from it is done or queued.
    pub(crate) fn with_store<R>(&mut self, call: impl FnOnce(&mut Store, &mut Output) -> R) -> R {
        let mut io = std::mem::take(&mut self.io);
        let result = call(&mut self.store, &mut io);
        self.out.extend(io.commands.drain(..).map(Action::Io));
        self.queue.extend(io.events.drain(..).map(Work::Store));
        self.io = io;
        result
    }

    /// Hands facts round until nothing follows.
    pub(crate) fn pump(&mut self) {
        while let Some(work) = self.queue.pop_front() {
            match work {
                Work::Store(event) => self.store_event(event),
                Work::Cluster(event) => self.run_cluster(event),
                Work::Replication(event, beside) => self.run_replication(event, &beside),
                Work::Compare { peer, session, message } => self.compare_message(peer, session, message),
                Work::Seal => self.seal_now(),
            }
        }
    }

    fn run_cluster(&mut self, event: ClusterEvent) {
        let mut actions = std::mem::take(&mut self.cluster_actions);
        self.member.handle(event, self.now, &mut actions);
        for action in actions.drain(..) {
            self.perform_cluster(action);
        }
        self.cluster_actions = actions;
    }

    fn run_replication(&mut self, event: ReplicationEvent, beside: &Beside) {
        let mut actions = std::mem::take(&mut self.replication_actions);
        self.replication.handle(event, self.now, &mut actions);
        for action in actions.drain(..) {
            self.perform_replication(action, beside);
        }
        self.replication_actions = actions;
    }

    /// Closes the open batch, if it holds anything.
    pub(crate) fn seal(&mut self) {
        self.pump();
        self.seal_now();
        self.pump();
    }

    fn seal_now(&mut self) {
        if self.builder.is_empty() {
            return;
        }
        let Some(term) = self.replication.leads_in() else {
            // Stepped down with an open batch: nobody was told anything about it.
            self.discard_open_batch();
            return;
        };
        // A frozen leader appends nothing, but for the record that starts its term and what it drains.
        let held = self.frozen && self.serving && self.draining.is_none();
        if held || self.failure.is_some() {
            return;
        }
        let batch = self.builder.seal(&self.store.next_place(term, self.wall));
        let asked = std::mem::take(&mut self.sync_open_batch);
        let sync = self.flush_habit.sealed() || asked;
        self.configs.appended(&batch);
        let event = ReplicationEvent::Sealed { batch: info(&batch), sync };
        // The peers' copies leave before the local one is written: both are on their way at once.
        let beside = Beside::Batches(vec![batch]);
        self.run_replication(event, &beside);
        let Beside::Batches(batches) = &beside else { unreachable!("just made") };
        if let Err(error) = self.with_store(|store, io| store.append(&batches[0], io)) {
            assert!(self.store.failure().is_some(), "the store refuses its own leader's batch: {error}");
        }
    }

    pub(crate) fn discard_open_batch(&mut self) {
        self.builder = BatchBuilder::new(self.store.max_batch_len());
        self.sync_open_batch = false;
    }

    pub(crate) fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Writes the control state. `receipt` comes back as `Persisted`.
    pub(crate) fn persist_control(&mut self, receipt: u64) {
        self.persist(receipt, None);
    }

    fn persist(&mut self, receipt: u64, lost_to: Option<Lsn>) {
        let change = rempart_store::SuperblockChange {
            register: self.control.cluster.register,
            control: Some(self.control.encode()),
            lost_to,
            ..Default::default()
        };
        self.persisting.push_back((receipt, self.control.cluster.promise));
        self.with_store(|store, io| store.persist(Token(receipt), change, io));
    }

    /// Tells cluster when this copy becomes fit to lead, or unfit.
    pub(crate) fn usable_is(&mut self, usable: bool) {
        if self.usable != usable {
            self.usable = usable;
            self.cluster(ClusterEvent::CopyUsable(usable));
        }
    }

    /// A member knows that records to `upto` were durable here. They are not: the copy is damaged, also for whoever
    /// starts with it next, and leads no more.
    pub(crate) fn copy_lost(&mut self, upto: Lsn) {
        if self.failure.is_none() {
            self.persist(ENGINE_RECEIPT, Some(upto));
        }
        self.usable_is(false);
    }

    pub(crate) fn store_failed(&mut self, failure: &rempart_store::StoreFailure) {
        let what = failure.to_string();
        self.failure = Some(what.clone());
        self.out.push(Action::Report(Report::LocalDiskFailed { what }));
        self.cluster(ClusterEvent::LocalDiskFailed);
        self.disk_change_failed();
        self.end_views("the local disk failed");
        self.not_stopped();
    }
}

/// A batch without its bytes.
pub(crate) fn info(batch: &Batch) -> BatchInfo {
    BatchInfo { term: batch.term(), first: batch.first(), last: batch.last(), bytes: batch.byte_len() as u64 }
}

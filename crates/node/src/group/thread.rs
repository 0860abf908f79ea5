//! The loop of one group's thread. Everything that is ready goes in, the engine's turn ends, its actions are carried
//! out; whatever completes at once goes in again before anything is waited for.

use super::link::{LinkEnd, LinkTimes, Links};
use super::nbd_server::NbdServer;
use super::spin::Spin;
use super::views::{ExtentsWanted, ServedViews};
use super::{FromGroup, GroupHandle, GroupStatus, ToGroup, for_control};
use crate::clock;
use crate::config::{NodeConfig, TimingSection};
use rempart_engine::{
    Action, Command, CommandId, CommandOutput, DigestJob, Engine, Input, OpenedView, Params, Role, Token,
};
use rempart_nbd::poller::{Poller, Ready};
use rempart_replication::Digest;
use rempart_store::file::{Executor, FileDisk, release_memory};
use rempart_store::{IoClass, Limits, OpenOptions};
use rempart_types::{GroupId, MonotonicTime, NodeId, NodeSet, RegisterId};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc as async_mpsc, oneshot, watch};

const KEY_WAKE: u64 = 0;
const KEY_EXECUTOR: u64 = 1;
const KEY_FIRST_LINK: u64 = 16;
const KEY_LAST_LINK: u64 = u32::MAX as u64;
const KEY_FIRST_NBD: u64 = 1 << 32;

/// Figures for people are not fresher than this.
const STATUS_EVERY: Duration = Duration::from_millis(50);
/// A group that did nothing for so long gives its spare memory back.
const IDLE_AFTER: Duration = Duration::from_secs(3);
/// Threads of one group that execute what would block its loop.
const IO_WORKERS: usize = 3;
/// Messages from the control plane taken in one turn.
const MAX_INBOX: usize = 64;

/// What a replica is opened with.
#[derive(Debug)]
pub struct GroupParams {
    pub me: NodeId,
    pub group: GroupId,
    pub register: RegisterId,
    pub peers: NodeSet,
    pub store_dir: PathBuf,
    pub config: Arc<NodeConfig>,
    /// The group's, not always those in `config`.
    pub timing: TimingSection,
    pub listener: OwnedFd,
    /// An unfinished copy returns to what it was before its resync began.
    pub roll_back: bool,
}

#[derive(Debug)]
pub struct OpenedGroup {
    pub handle: GroupHandle,
    pub events: async_mpsc::UnboundedReceiver<FromGroup>,
    /// What recovery found worth telling.
    pub notes: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenGroupError {
    #[error("open the copy's files: {0}")]
    Files(#[source] rempart_store::IoError),
    #[error(transparent)]
    Engine(#[from] rempart_engine::OpenError),
    #[error("set up the thread: {0}")]
    System(#[from] std::io::Error),
}

/// Recovers the replica and starts its thread. Blocks while it recovers.
pub fn open(params: GroupParams) -> Result<OpenedGroup, OpenGroupError> {
    let wake =
        Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(std::io::Error::from)?);
    let poller = Poller::new()?;
    poller.add(&wake, KEY_WAKE, false)?;
    let mut disk = FileDisk::open(&params.store_dir).map_err(OpenGroupError::Files)?;
    let now = clock::monotonic();
    let mut actions = Vec::new();
    let engine = Engine::open(&mut disk, engine_params(&params)?, now, &mut actions)?;
    let executor = Executor::new(disk, IO_WORKERS)?;
    poller.add(executor.wake_fd(), KEY_EXECUTOR, false)?;
    let served_sizes = engine.disk_sizes().to_vec();
    let nbd = NbdServer::new(params.listener, engine.disk_sizes(), &poller, KEY_FIRST_NBD)?;
    let (sender, inbox) = mpsc::channel();
    let (outbox, events) = async_mpsc::unbounded_channel();
    let status = GroupStatus {
        engine: engine.status(now),
        longest_stall: Duration::ZERO,
        connected: Vec::new(),
        primary_heard_unix_ms: None,
    };
    let (status_sender, status) = watch::channel(status);
    let timing = params.timing;
    let times = LinkTimes {
        silence: Duration::from_millis(timing.peer_deadline_ms),
        alive_every: Duration::from_millis(timing.beacon_interval_ms.max(10)),
    };
    let handle = GroupHandle { sender, wake: wake.clone(), status };
    let thread = GroupThread {
        engine,
        executor,
        poller,
        spin: Spin::default(),
        wake,
        inbox,
        outbox: outbox.clone(),
        links: Links::new(KEY_FIRST_LINK, KEY_LAST_LINK, times),
        nbd,
        views: ServedViews::default(),
        commands: BTreeMap::new(),
        next_command: 0,
        digester: None,
        handle: handle.clone(),
        done: Vec::new(),
        status: status_sender,
        status_stale: false,
        status_at: now,
        worked: (0, now),
        holds_memory: true,
        longest_stall: Duration::ZERO,
        primary_heard_unix_ms: None,
        config_seen: None,
        served_sizes,
        ended: false,
    };
    let name = format!("group-{:08x}", params.group.0 as u32);
    std::thread::Builder::new().name(name).spawn(move || {
        // A defect in one group's cores must not take the other groups with it.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || thread.run(actions)));
        let failure = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(crate::whole_chain(&error)),
            Err(panic) => Some(panic_text(&*panic)),
        };
        let _ = outbox.send(FromGroup::Ended { failure });
    })?;
    Ok(OpenedGroup { handle, events, notes: Vec::new() })
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    format!("a defect of the program: {}", text.unwrap_or("unknown"))
}

fn engine_params(params: &GroupParams) -> std::io::Result<Params> {
    let config = &params.config;
    let cluster = rempart_cluster::Config {
        me: params.me,
        group: params.group,
        peers: params.peers.clone(),
        register: params.register,
        timing: params.timing.to_cluster(),
        nonce_seed: crate::identity::random_u128()?,
    };
    let limit = config.replication.resync_limit_bytes_per_s;
    let replication = rempart_replication::Config {
        commit_deadline: Duration::from_millis(params.timing.peer_deadline_ms),
        resync_bytes_per_second: (limit > 0).then_some(limit),
        ..rempart_replication::Config::default()
    };
    let limits = Limits {
        window: config.replication.window_bytes,
        retention: config.replication.journal_bytes,
        ..Limits::default()
    };
    let store = OpenOptions { limits, roll_back: params.roll_back };
    Ok(Params { cluster, replication, store })
}

type CommandResult = Result<CommandOutput, rempart_engine::CommandError>;
type CommandReply = oneshot::Sender<CommandResult>;

struct GroupThread {
    engine: Engine,
    executor: Executor,
    poller: Poller,
    spin: Spin,
    wake: Arc<OwnedFd>,
    inbox: mpsc::Receiver<ToGroup>,
    outbox: async_mpsc::UnboundedSender<FromGroup>,
    links: Links,
    nbd: NbdServer,
    views: ServedViews,
    commands: BTreeMap<CommandId, CommandReply>,
    next_command: u64,
    digester: Option<mpsc::Sender<(DigestJob, Vec<Vec<rempart_engine::Bytes>>)>>,
    handle: GroupHandle,
    done: Vec<(CommandReply, CommandResult)>,
    status: watch::Sender<GroupStatus>,
    /// Something changed that people and the control plane wait for.
    status_stale: bool,
    status_at: MonotonicTime,
    /// Commands that the store had issued when it was last seen at work, and when that was.
    worked: (u64, MonotonicTime),
    /// Spare memory may be held.
    holds_memory: bool,
    longest_stall: Duration,
    primary_heard_unix_ms: Option<u64>,
    config_seen: Option<rempart_engine::Bytes>,
    served_sizes: Vec<u64>,
    ended: bool,
}

impl GroupThread {
    fn run(mut self, first: Vec<Action>) -> std::io::Result<()> {
        let mut actions = first;
        let mut ready: Vec<Ready> = Vec::new();
        let mut completions = Vec::new();
        let mut ended_links = Vec::new();
        while !self.ended {
            let mut now = clock::monotonic();
            // One turn: whatever follows at once is part of it.
            loop {
                self.engine.end_turn(now, clock::wall(), &mut actions);
                let any = !actions.is_empty();
                for action in actions.drain(..) {
                    self.carry_out(action, now, &mut ended_links);
                }
                self.executor.completions(&mut completions);
                // What follows from a completion may be held back until the turn ends (an acknowledgement to the
                // primary, say), and nothing else would wake this loop for it.
                let completed = !completions.is_empty();
                for completion in completions.drain(..) {
                    self.engine.handle(Input::Io(completion), now, &mut actions);
                }
                let resumed = self.nbd.resume(&mut self.engine, &self.poller);
                if !any && !completed && !resumed && actions.is_empty() {
                    break;
                }
            }
            self.nbd.send(&mut self.engine, &self.poller);
            self.links.flush(now, &self.poller, &mut ended_links);
            let ended = !ended_links.is_empty();
            self.tell_ended_links(&mut ended_links, now, &mut actions);
            self.executor.after_replies();
            self.publish(now);
            // Sending makes room for requests that no socket will tell of again.
            if ended || !actions.is_empty() || self.nbd.resume(&mut self.engine, &self.poller) {
                continue;
            }

            self.wait(&mut ready)?;
            now = clock::monotonic();
            for event in &ready {
                self.take(*event, now, &mut actions, &mut ended_links);
            }
            self.tell_ended_links(&mut ended_links, now, &mut actions);
            if self.engine.next_wake().is_some_and(|at| at <= now) {
                self.engine.handle(Input::Tick, now, &mut actions);
            }
        }
        Ok(())
    }

    /// Waits until something is ready or due.
    fn wait(&mut self, ready: &mut Vec<Ready>) -> std::io::Result<()> {
        let started = Instant::now();
        while started.elapsed() < self.spin.window() {
            self.poller.wait(Some(Duration::ZERO), ready)?;
            if !ready.is_empty() || self.executor.has_completed() {
                return Ok(());
            }
            // What is waited for may need this very processor.
            std::thread::yield_now();
        }
        let timeout = self.next_wake().map(|at| at.since(clock::monotonic()));
        self.poller.wait(timeout, ready)?;
        self.spin.waited(started.elapsed());
        Ok(())
    }

    fn next_wake(&self) -> Option<MonotonicTime> {
        let status = Some(self.status_at + Duration::from_millis(500));
        [self.engine.next_wake(), self.links.next_wake(), status].into_iter().flatten().min()
    }

    fn take(
        &mut self,
        event: Ready,
        now: MonotonicTime,
        actions: &mut Vec<Action>,
        ended: &mut Vec<LinkEnd>,
    ) {
        if event.key == KEY_WAKE {
            let _ = rustix::io::read(self.wake.as_fd(), &mut [0; 8]);
            self.take_inbox(now, actions, ended);
        } else if event.key == KEY_EXECUTOR {
            // The completions are taken at the start of the turn that follows.
            self.executor.reset_wake();
        } else if self.links.owns(event.key) {
            let engine = &mut self.engine;
            ended.extend(self.links.ready(event, now, &self.poller, |peer, session, message| {
                engine.handle(Input::Message { peer, session, message }, now, actions);
            }));
        } else if self.nbd.owns(event.key) {
            self.nbd.ready(event, &mut self.engine, &self.poller);
        }
    }

    fn take_inbox(&mut self, now: MonotonicTime, actions: &mut Vec<Action>, ended: &mut Vec<LinkEnd>) {
        for taken in 0.. {
            if taken == MAX_INBOX {
                let _ = rustix::io::write(self.wake.as_fd(), &1u64.to_ne_bytes());
                return;
            }
            let Ok(message) = self.inbox.try_recv() else { return };
            match message {
                ToGroup::Link { peer, connection } => {
                    let (old, new) = self.links.add(peer, *connection, now, &self.poller);
                    if let Some(old) = old {
                        // Its successor is here: nobody needs to dial.
                        let (peer, session) = (old.peer, old.session);
                        self.engine.handle(Input::Disconnected { peer, session }, now, actions);
                    }
                    match new {
                        Ok(session) => {
                            self.engine.handle(Input::Connected { peer, session }, now, actions);
                            // What came with the greeting is here already, and wakes nobody.
                            let key = self.links.key_of(peer).expect("it was just added");
                            self.take(Ready { key, readable: true, writable: false }, now, actions, ended);
                        }
                        Err(why) => self.tell(FromGroup::LinkDown { peer, why }),
                    }
                }
                ToGroup::Unlink { peer } => {
                    ended.extend(self.links.end(peer, None, "it is not wanted", &self.poller))
                }
                ToGroup::Register(reply) => self.engine.handle(Input::Register(reply), now, actions),
                ToGroup::Vm(fact) => self.engine.handle(Input::Vm(fact), now, actions),
                ToGroup::Command { command, reply } => {
                    self.next_command += 1;
                    let id = CommandId(self.next_command);
                    if let Command::AddDisk { entry } = &command {
                        self.executor.locate_image(entry.index, &entry.location);
                    }
                    if let Command::Stop = command {
                        self.nbd.close_all(&mut self.engine, &self.poller);
                    }
                    self.commands.insert(id, reply);
                    self.engine.handle(Input::Command { id, command }, now, actions);
                }
                ToGroup::Digested { job, digests } => {
                    self.engine.handle(Input::Digested { job, digests }, now, actions);
                }
                ToGroup::ServeView { view, served } => {
                    self.views.serve(view, served);
                    if !self.engine.is_view_open(view) {
                        self.views.ended(view, "it ended as it began".into());
                    }
                }
                ToGroup::CloseView { view } => {
                    self.views.close(view);
                    self.next_command += 1;
                    let (id, command) = (CommandId(self.next_command), Command::CloseView { view });
                    self.engine.handle(Input::Command { id, command }, now, actions);
                }
                ToGroup::ViewRead { view, wanted } => {
                    for ExtentsWanted { token, extents } in wanted {
                        let token = Token(token);
                        self.engine.handle(Input::ReadView { view, token, extents }, now, actions);
                    }
                }
                ToGroup::ViewStatus { view, wanted } => self.views.status(&self.engine, view, &wanted),
                ToGroup::End => self.ended = true,
            }
        }
    }

    fn tell(&self, message: FromGroup) {
        // The listener is gone only while the daemon ends.
        let _ = self.outbox.send(message);
    }

    fn tell_ended_links(&mut self, ended: &mut Vec<LinkEnd>, now: MonotonicTime, actions: &mut Vec<Action>) {
        for LinkEnd { peer, session, why } in ended.drain(..) {
            self.engine.handle(Input::Disconnected { peer, session }, now, actions);
            self.tell(FromGroup::LinkDown { peer, why });
        }
    }

    fn carry_out(&mut self, action: Action, now: MonotonicTime, ended: &mut Vec<LinkEnd>) {
        match action {
            Action::Io(command) => {
                // The peers' copies leave before the local one is written: both are on their way at once.
                if matches!(command.class, IoClass::JournalWrite { .. }) && self.links.has_unsent() {
                    self.links.flush(now, &self.poller, ended);
                }
                self.executor.submit(command);
            }
            Action::Send { peer, session, message } => {
                ended.extend(self.links.send(peer, session, &message, &self.poller));
            }
            Action::CloseSession { peer, session, why } => {
                ended.extend(self.links.end(peer, Some(session), why, &self.poller));
            }
            Action::Reply { token, reply } => self.nbd.reply(token, reply, &mut self.engine, &self.poller),
            Action::Digest { job, parts } => self.digest(job, parts),
            Action::ViewRead { view, token, result } => self.views.read(view, token.0, result),
            Action::ViewEnded { view, why } => self.views.ended(view, why),
            Action::CommandDone { id, result } => {
                // Told once the status shows it.
                self.done.extend(self.commands.remove(&id).map(|reply| (reply, result)));
            }
            Action::Report(report) => {
                self.status_stale = true;
                self.tell(FromGroup::Report(report));
            }
            other => {
                if let Some(message) = for_control(other) {
                    self.tell(message);
                }
            }
        }
    }

    fn digest(&mut self, job: DigestJob, parts: Vec<Vec<rempart_engine::Bytes>>) {
        let handle = self.handle.clone();
        let digester = self.digester.get_or_insert_with(|| {
            let (sender, receiver) = mpsc::channel::<(DigestJob, Vec<Vec<rempart_engine::Bytes>>)>();
            // Ends when the group's thread drops the sender.
            let worker = move || {
                rempart_store::keep_no_spares();
                while let Ok((job, parts)) = receiver.recv() {
                    let digests = parts.iter().map(|part| digest_of(part)).collect();
                    handle.send(ToGroup::Digested { job, digests });
                }
            };
            if let Err(error) = std::thread::Builder::new().name("digest".into()).spawn(worker) {
                tracing::error!(%error, "cannot start a thread for digests");
            }
            sender
        });
        let _ = digester.send((job, parts));
    }

    fn publish(&mut self, now: MonotonicTime) {
        if self.engine.disk_sizes() != self.served_sizes {
            self.served_sizes = self.engine.disk_sizes().to_vec();
            self.views.disks_changed();
            if let Err(error) = self.nbd.refresh(&self.served_sizes, &mut self.engine, &self.poller) {
                tracing::error!(%error, "the disks cannot be served in their new sizes");
            }
        }
        if self.engine.config() != self.config_seen.as_ref()
            && let Some(config) = self.engine.config().cloned()
        {
            self.config_seen = Some(config.clone());
            self.tell(FromGroup::Config(config));
        }
        // Who waits for the image to have everything shall not wait for the next figures as well.
        let drained = self.engine.unapplied_bytes() == 0 && self.status.borrow().engine.unapplied_bytes > 0;
        let stale = std::mem::take(&mut self.status_stale) || !self.done.is_empty() || drained;
        if now < self.status_at + STATUS_EVERY && !stale {
            return;
        }
        self.status_at = now;
        self.rest(now);
        let engine = self.engine.status(now);
        self.longest_stall = self.longest_stall.max(engine.stall);
        let connected: Vec<NodeId> =
            engine.peers.iter().map(|peer| peer.node).filter(|node| self.links.connected(*node)).collect();
        if engine.role == Role::Secondary
            && engine.primary.is_some_and(|primary| self.links.connected(primary))
        {
            self.primary_heard_unix_ms = Some(clock::wall().0);
        }
        self.status.send_replace(GroupStatus {
            engine,
            longest_stall: self.longest_stall,
            connected,
            primary_heard_unix_ms: self.primary_heard_unix_ms,
        });
        for (reply, result) in self.done.drain(..) {
            // Whoever ordered a view and did not wait for it does not close it either.
            if let Err(Ok(CommandOutput::ViewOpened(OpenedView { view, .. }))) = reply.send(result) {
                self.handle.send(ToGroup::CloseView { view });
            }
        }
    }

    /// Gives spare memory back once nothing was done for a while.
    fn rest(&mut self, now: MonotonicTime) {
        let (commands, since) = self.worked;
        if self.executor.submitted() != commands {
            self.worked = (self.executor.submitted(), now);
            self.holds_memory = true;
        } else if self.holds_memory && now >= since + IDLE_AFTER {
            self.holds_memory = false;
            release_memory();
        }
    }
}

fn digest_of(part: &[rempart_engine::Bytes]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for bytes in part {
        hasher.update(bytes);
    }
    Digest(*hasher.finalize().as_bytes())
}

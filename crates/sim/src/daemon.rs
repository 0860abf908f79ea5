//! A daemon around the real engine: its loop, its start and its ends.

use crate::agenda::Moment;
use crate::coverage::Kind;
use crate::reached::recovery_row;
use crate::violation::{Promise, Violation};
use crate::world::{Daemon, DaemonEvent, Event, World};
use rempart_engine::{Action, CommandOutput, Engine, Input, Params, Report, VmFact};
use rempart_replication::Digest;
use rempart_store::{IoClass, IoCompletion};
use rempart_types::{MonotonicTime, NodeSet};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

impl World {
    fn reading(&self, node: usize) -> MonotonicTime {
        self.nodes[node].clock.reading(self.now())
    }

    /// Who a node's engine is, and how it is tuned.
    fn params(&mut self, node: usize) -> Params {
        let me = self.nodes[node].id;
        let configured = &self.operator.peers;
        let peers: NodeSet =
            self.nodes.iter().map(|node| node.id).filter(|id| configured.contains(*id)).collect();
        Params {
            cluster: rempart_cluster::Config {
                me,
                group: self.setup.group,
                peers: peers.without(me),
                register: self.setup.register,
                timing: self.setup.timing.clone(),
                nonce_seed: self.rng.u128(),
            },
            replication: self.setup.replication.clone(),
            store: rempart_store::OpenOptions {
                limits: self.setup.limits.clone(),
                roll_back: self.nodes[node].roll_back,
            },
        }
    }

    /// The daemon's process starts: it recovers the store and tells what it found of the machine.
    pub(crate) fn start_daemon(&mut self, node: usize) {
        if self.nodes[node].daemon.is_some() || !self.nodes[node].powered || self.nodes[node].stays_down {
            return;
        }
        self.audit_recovery(node);
        let params = self.params(node);
        let now = self.reading(node);
        let mut out = Vec::new();
        let opened = Engine::open(&mut self.nodes[node].drive.disk, params, now, &mut out);
        let engine = match opened {
            Ok(engine) => engine,
            Err(error) => {
                self.tell(|| format!("node {node}: daemon cannot open: {}", with_sources(&error)));
                if matches!(error, rempart_engine::OpenError::Store(rempart_store::OpenError::Superblock)) {
                    self.coverage.count(Kind::Recovery, recovery_row('O'));
                }
                return self.refused_to_open(node);
            }
        };
        let state = &mut self.nodes[node];
        state.roll_back = false;
        state.lives += 1;
        let life = state.lives;
        state.daemon = Some(Daemon {
            engine,
            life,
            frozen: state.frozen,
            backlog: VecDeque::new(),
            out,
            turn_planned: false,
            wake_at: Moment::NEVER,
            inbox: VecDeque::new(),
            leftover: BTreeSet::new(),
            zombies: VecDeque::new(),
            io: BTreeMap::new(),
        });
        let fact = if state.machine.is_some() { VmFact::Running } else { VmFact::Stopped };
        self.tell(|| format!("node {node}: daemon life {life} started, VM {fact:?}"));
        self.feed(node, Input::Vm(fact));
        self.turn(node);
    }

    /// The daemon's process is gone at once; the page cache stays.
    pub(crate) fn crash_daemon(&mut self, node: usize) {
        let Some(daemon) = self.nodes[node].daemon.take() else { return };
        self.nodes[node].vm_may_run = false;
        self.nodes[node].lease = None;
        self.tell(|| format!("node {node}: daemon life {} crashed", daemon.life));
        let rng = &mut self.rng;
        self.nodes[node].drive.disk.crash_process(&mut || rng.u64());
        self.lose_sessions(node, true);
        if let Some(machine) = &mut self.nodes[node].machine {
            machine.connection.open = false;
            machine.connection.sent.clear();
            let nonce = machine.nonce;
            self.after(Duration::from_millis(50), Event::Reconnect { node, nonce });
        }
    }

    /// Its sessions die with it. If its kernel lives, the peers are told so.
    fn lose_sessions(&mut self, node: usize, kernel_lives: bool) {
        for session in self.network.alive_at(node) {
            let peer = self.network.peer(session, node).expect("alive");
            if kernel_lives && self.network.reaches(node, peer) {
                let delay = self.network.delay(node, peer, &mut self.rng);
                self.tell_daemon(peer, delay, DaemonEvent::SessionClosed { session, peer: node });
            }
            self.network.break_session(session);
        }
        for session in self.network.open_at(node) {
            self.network.close(session, node);
        }
    }

    /// The machine the node is made of loses power.
    pub(crate) fn power_off(&mut self, node: usize) {
        if !self.nodes[node].powered {
            return;
        }
        self.tell(|| format!("node {node}: power lost"));
        self.end_machine(node);
        self.nodes[node].daemon = None;
        self.lose_sessions(node, false);
        let rng = &mut self.rng;
        let state = &mut self.nodes[node];
        state.drive.disk.lose_power(&mut || rng.u64());
        state.powered = false;
        state.vm_may_run = false;
        state.lease = None;
        state.frozen = false;
        state.boots += 1;
        // A primary that comes back may lead from its own log when no other member is heard: with the machine that
        // died with it went what no flush covers, as on any host.
        let leads = self.witness.current().is_some_and(|value| value.primary == self.nodes[node].id);
        let mask = if leads { 1 << node } else { self.in_sync_mask() };
        let now = self.now();
        self.history.memory_wiped(node, mask, now);
    }

    pub(crate) fn power_on(&mut self, node: usize) {
        if self.nodes[node].powered {
            return;
        }
        self.tell(|| format!("node {node}: power is back"));
        let now = self.now();
        let reading = MonotonicTime(self.rng.below(1 << 40));
        let state = &mut self.nodes[node];
        state.powered = true;
        state.clock.reboot(now, reading);
        let boot = state.boots;
        let delay = self.rng.duration(Duration::from_millis(50)..Duration::from_secs(2));
        self.after(delay, Event::StartDaemon { node, boot });
    }

    /// Stops or continues the daemon's process by a signal.
    pub(crate) fn freeze_daemon(&mut self, node: usize, frozen: bool) {
        let Some(daemon) = &mut self.nodes[node].daemon else { return };
        daemon.frozen = frozen;
        if frozen {
            return;
        }
        let life = daemon.life;
        let backlog = std::mem::take(&mut daemon.backlog);
        self.tell(|| format!("node {node}: daemon continues with {} things to do", backlog.len()));
        for what in backlog {
            if self.nodes[node].daemon.as_ref().is_some_and(|daemon| daemon.life == life) {
                self.daemon_event(node, what);
            }
        }
    }

    pub(crate) fn daemon_event(&mut self, node: usize, what: DaemonEvent) {
        let Some(daemon) = &mut self.nodes[node].daemon else { return };
        if daemon.frozen {
            return daemon.backlog.push_back(what);
        }
        match what {
            DaemonEvent::Turn => {
                daemon.turn_planned = false;
                return self.turn(node);
            }
            DaemonEvent::Io(id) => {
                if let Some(started) = daemon.io.remove(&id) {
                    let completion = self.nodes[node].drive.finish(id, started);
                    self.feed(node, Input::Io(completion));
                }
                return;
            }
            DaemonEvent::GuestRequests => {
                self.take_guest_requests(node);
                return self.plan_turn(node);
            }
            DaemonEvent::Wake => daemon.wake_at = Moment::NEVER,
            DaemonEvent::SessionOpen { session, .. } if !self.session_opened(node, session) => return,
            DaemonEvent::SessionClosed { session, .. } => {
                self.network.close(session, node);
            }
            _ => {}
        }
        if self.trace.is_on() && !matches!(what, DaemonEvent::Wake | DaemonEvent::Message { .. }) {
            let line = format!("node {node}: << {}", brief(&format!("{what:?}")));
            self.tell(|| line);
        }
        let ids: Vec<_> = self.nodes.iter().map(|node| node.id).collect();
        if let Some(input) = what.into_input(|peer| ids[peer]) {
            self.feed(node, input);
        }
    }

    /// Hands one input to the engine; what follows from it is done in the next turn.
    pub(crate) fn feed(&mut self, node: usize, input: Input) {
        let now = self.reading(node);
        let Some(daemon) = &mut self.nodes[node].daemon else { return };
        daemon.engine.handle(input, now, &mut daemon.out);
        self.plan_turn(node);
    }

    pub(crate) fn plan_turn(&mut self, node: usize) {
        let Some(daemon) = &mut self.nodes[node].daemon else { return };
        if !std::mem::replace(&mut daemon.turn_planned, true) {
            let delay = Duration::from_nanos(self.rng.below(30_000));
            self.tell_daemon(node, delay, DaemonEvent::Turn);
        }
    }

    /// One turn of the daemon's loop: what is ready went in, now everything that follows is done.
    fn turn(&mut self, node: usize) {
        loop {
            let now = self.reading(node);
            let wall = self.nodes[node].clock.wall(self.now());
            let Some(daemon) = &mut self.nodes[node].daemon else { return };
            let mut out = std::mem::take(&mut daemon.out);
            daemon.engine.end_turn(now, wall, &mut out);
            let mut finished = Vec::new();
            for action in out {
                self.execute(node, action, &mut finished);
            }
            if finished.is_empty() {
                break;
            }
            let Some(daemon) = &mut self.nodes[node].daemon else { return };
            for completion in finished {
                daemon.engine.handle(Input::Io(completion), now, &mut daemon.out);
            }
        }
        self.take_guest_requests(node);
        self.check_node(node);
        self.plan_wake(node);
    }

    fn plan_wake(&mut self, node: usize) {
        let slack = Duration::from_nanos(self.rng.below(200_000));
        let now = self.now();
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let Some(reading) = daemon.engine.next_wake() else { return };
        let at = self.nodes[node].clock.moment_of(reading).max(now) + slack;
        let daemon = self.nodes[node].daemon.as_mut().expect("just seen");
        if at < daemon.wake_at {
            daemon.wake_at = at;
            self.tell_daemon(node, at.since(now), DaemonEvent::Wake);
        }
    }

    fn execute(&mut self, node: usize, action: Action, finished: &mut Vec<IoCompletion>) {
        match action {
            Action::Io(command) => {
                let lineage = self.nodes[node].daemon.as_ref().map(|daemon| daemon.engine.lineage());
                let result = self.checker.io_command(node, &command, lineage, &mut self.book);
                self.must(result);
                let inline = matches!(command.class, IoClass::JournalWrite { .. })
                    && !self.nodes[node].drive.is_slow()
                    && self.rng.chance(850);
                let id = command.id;
                let drive = &mut self.nodes[node].drive;
                if inline {
                    let started = drive.start(command, &mut self.rng);
                    finished.push(drive.finish(id, started));
                } else {
                    let delay = drive.latency(&command, &mut self.rng);
                    let started = drive.start(command, &mut self.rng);
                    if let Some(daemon) = &mut self.nodes[node].daemon {
                        daemon.io.insert(id, started);
                    }
                    self.tell_daemon(node, delay, DaemonEvent::Io(id));
                }
                if std::mem::take(&mut self.nodes[node].drive.lost_pages) {
                    let (mask, now) = (self.in_sync_mask(), self.now());
                    self.history.sync_failed(node, mask, now);
                }
            }
            Action::Send { peer, session, message } => {
                if self.trace.is_on() {
                    let line = format!("node {node}: -> {:x} {}", peer.0, brief(&format!("{message:?}")));
                    self.tell(|| line);
                }
                self.send(node, session, message);
            }
            Action::CloseSession { session, why, .. } => {
                self.tell(|| format!("node {node}: closes session {}: {why}", session.0));
                self.reached("session closed by the engine");
                self.close_session(node, session);
            }
            Action::Reply { token, reply } => self.reply(node, token, reply),
            Action::Register(request) => {
                if self.trace.is_on() {
                    let line = format!("node {node}: asks witness {}", brief(&format!("{request:?}")));
                    self.tell(|| line);
                }
                self.ask_witness(node, request);
            }
            Action::Vm(action) => self.vm_action(node, action),
            Action::Digest { job, parts } => {
                let digests = parts.iter().map(|part| digest(part.iter().map(|bytes| &bytes[..]))).collect();
                let delay = self.rng.duration(Duration::from_micros(10)..Duration::from_millis(2));
                self.tell_daemon(node, delay, DaemonEvent::Digested { job, digests });
            }
            Action::CommandDone { id, result } => {
                self.tell(|| format!("node {node}: command {} {result:?}", id.0));
                if let Ok(CommandOutput::Compared { differing, .. }) = &result {
                    self.coverage.count(Kind::Checked, "compare command");
                    if !differing.is_empty() {
                        let detail =
                            format!("compare finds {} differing extents: {differing:?}", differing.len());
                        self.broken(crate::violation::Violation::new(
                            crate::violation::Promise::ImagesEqual,
                            detail,
                        ));
                    }
                }
                self.command_done(node, id, result);
            }
            Action::ViewRead { view, token, result } => self.view_read(node, view, token, result),
            Action::ViewEnded { view, why } => {
                self.tell(|| format!("node {node}: a view is lost: {why}"));
                self.view_ended(node, view);
            }
            Action::Report(report) => {
                self.tell(|| format!("node {node}: {}", brief(&format!("{report:?}"))));
                self.reported(node, report);
            }
        }
    }

    fn reported(&mut self, node: usize, report: Report) {
        match report {
            Report::Cluster(condition) => {
                self.reached(crate::reached::condition(&condition));
                self.operator_sees_condition(condition);
            }
            Report::Replication(report) => {
                self.reached(crate::reached::replication(&report));
                self.strike_a_resync(node, &report);
                if matches!(report, rempart_replication::Report::Lost { .. }) && !self.nodes[node].spoilt {
                    let detail = format!("node {node}, whose disk is sound, is said to have lost records");
                    self.broken(Violation::new(Promise::DamageRefused, detail));
                }
            }
            Report::DiskFull { .. } | Report::DiskHasRoom => {}
            Report::LocalDiskFailed { .. } => {
                self.reached("local disk failed");
                self.disk_failed(node);
            }
        }
    }
}

/// Debug text, cut to a length that a person reads.
pub(crate) fn brief(text: &str) -> String {
    const MOST: usize = 900;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// Stands for SHA-256: as strong as a simulation needs, and much faster.
fn digest<'a>(parts: impl Iterator<Item = &'a [u8]>) -> Digest {
    let mut lanes =
        [0x243f_6a88_85a3_08d3_u64, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0, 0x082e_fa98_ec4e_6c89];
    for (place, byte) in parts.flatten().copied().enumerate() {
        let lane = &mut lanes[place % 4];
        *lane = (*lane ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23) ^ place as u64;
    }
    let mut bytes = [0; 32];
    for (chunk, lane) in bytes.chunks_exact_mut(8).zip(lanes) {
        chunk.copy_from_slice(&lane.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    Digest(bytes)
}

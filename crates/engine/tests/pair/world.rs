//! A small deterministic world: engines on simulated disks, a network of sessions, a register, guards, one guest.
//!
//! Virtual time, one agenda, one seeded generator. A failing seed replays exactly.

use crate::guest::Guest;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rempart_cluster::{Config as ClusterConfig, ReadOutcome, SwapOutcome, Timing};
use rempart_engine::{
    Action, Bytes, Command, CommandError, CommandId, CommandOutput, Digest, DigestJob, Engine, Input, Params,
    PeerMessage, RegisterReply, RegisterRequest, Report, Token, ViewId, ViewReadError, VmAction, VmFact,
};
use rempart_store::simulated::SimulatedDisk;
use rempart_store::{DiskEntry, FormatParams, IoClass, IoId, Limits, OpenOptions, Store};
use rempart_types::{
    DiskIndex, GroupId, MonotonicTime, NodeId, NodeSet, RegisterId, RegisterValue, SessionId, WallTime,
};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::time::Duration;

pub const DISK_SIZE: u64 = 2 << 20;
pub const DISKS: u16 = 2;

#[derive(Debug)]
enum Event {
    Turn { node: usize, life: u64 },
    Wake { node: usize, life: u64, at: u64 },
    Io { node: usize, life: u64, id: IoId },
    Connect { a: usize, b: usize },
    Connected { node: usize, peer: usize, session: SessionId },
    Disconnected { node: usize, peer: usize, session: SessionId },
    Deliver { node: usize, peer: usize, session: SessionId, meta: Vec<u8>, payload: Vec<u8> },
    Register { node: usize, life: u64, reply: RegisterReply },
    Digested { node: usize, life: u64, job: DigestJob, digests: Vec<Digest> },
    VmStarted { node: usize, order: u64 },
    VmStopped { node: usize, order: u64 },
    Guard { node: usize },
    GuestConnects { node: usize },
    GuestThinks { node: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Session {
    id: SessionId,
    a: usize,
    b: usize,
}

pub struct Node {
    pub disk: SimulatedDisk,
    pub engine: Option<Engine>,
    pub life: u64,
    out: Vec<Action>,
    turn_planned: bool,
    pub powered: bool,
    /// The machine's process exists here.
    pub vm: bool,
    pub paused: bool,
    lease: u64,
    vm_order: u64,
    pub roll_back: bool,
}

pub struct World {
    pub seed: u64,
    pub now: u64,
    pub rng: SmallRng,
    sequence: u64,
    agenda: BTreeMap<(u64, u64), Event>,
    pub nodes: Vec<Node>,
    sessions: Vec<Session>,
    next_session: u64,
    /// Pairs that do not hear each other.
    pub cut: Vec<(usize, usize)>,
    /// Nodes that do not hear the register.
    pub register_cut: Vec<usize>,
    /// In thousandths: answers of the register that get lost, whether the swap landed or not.
    pub register_unknown: u32,
    /// In thousandths: messages that are lost, or come twice, although their session lives. No TCP does that; an
    /// engine must survive it all the same.
    pub unfaithful: u32,
    pub registers: BTreeMap<RegisterId, RegisterValue>,
    pub guest: Guest,
    pub results: BTreeMap<CommandId, Result<CommandOutput, CommandError>>,
    next_command: u64,
    pub reports: Vec<(usize, Report)>,
    pub view_reads: BTreeMap<Token, Result<Option<Bytes>, ViewReadError>>,
    pub views_ended: Vec<(ViewId, String)>,
    pub trace: bool,
    /// Last delivery time per session and direction: a session keeps its order.
    last_delivery: BTreeMap<(u64, usize), u64>,
    pub extent_bytes: u64,
    /// Of every store that starts from now on.
    pub limits: Limits,
}

pub fn node_id(node: usize) -> NodeId {
    NodeId(0xa + node as u128)
}

fn node_index(id: NodeId) -> usize {
    (id.0 - 0xa) as usize
}

pub const REGISTER: RegisterId = RegisterId(0x77);

impl World {
    pub fn new(seed: u64, nodes: usize) -> World {
        let bases = vec![DiskEntry::EMPTY; nodes];
        World::with_bases(seed, &bases)
    }

    /// One node for each base: whether its images are said to have come with content.
    pub fn with_bases(seed: u64, bases: &[rempart_types::Lsn]) -> World {
        let rng = SmallRng::seed_from_u64(seed);
        let mut world = World {
            seed,
            now: 1_000_000_000,
            rng,
            sequence: 0,
            agenda: BTreeMap::new(),
            nodes: Vec::new(),
            sessions: Vec::new(),
            next_session: 1,
            cut: Vec::new(),
            register_cut: Vec::new(),
            register_unknown: 0,
            unfaithful: 0,
            registers: BTreeMap::new(),
            guest: Guest::default(),
            results: BTreeMap::new(),
            next_command: 1,
            reports: Vec::new(),
            view_reads: BTreeMap::new(),
            views_ended: Vec::new(),
            trace: std::env::var_os("REMPART_TRACE").is_some(),
            last_delivery: BTreeMap::new(),
            extent_bytes: 0,
            limits: Limits { pin_bound: 64 << 20, ..Limits::immediate() },
        };
        for &base in bases {
            let mut disk = SimulatedDisk::new();
            let entries = (0..DISKS).map(|index| DiskEntry {
                index: DiskIndex(index),
                size: DISK_SIZE,
                location: String::new(),
                base,
            });
            let mut format = FormatParams::new(GroupId(7), entries.collect());
            format.segment_size = 256 * 1024;
            if base == DiskEntry::EXISTING {
                for index in 0..DISKS {
                    let file = rempart_store::FileId::Image(DiskIndex(index));
                    disk.overwrite(file, 0, &vec![0; DISK_SIZE as usize]);
                }
            }
            Store::format(&mut disk, &format).expect("a new store");
            world.nodes.push(Node {
                disk,
                engine: None,
                life: 0,
                out: Vec::new(),
                turn_planned: false,
                powered: true,
                vm: false,
                paused: false,
                lease: 0,
                vm_order: 0,
                roll_back: false,
            });
        }
        world
    }

    fn monotonic(&self) -> MonotonicTime {
        MonotonicTime(self.now)
    }

    fn tell(&self, line: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>10.3} ms  {}", self.now as f64 / 1e6, line());
        }
    }

    fn at(&mut self, delay: u64, event: Event) {
        self.sequence += 1;
        self.agenda.insert((self.now + delay, self.sequence), event);
    }

    // --- daemons ---

    pub fn start(&mut self, node: usize) {
        assert!(self.nodes[node].engine.is_none() && self.nodes[node].powered);
        let peers = (0..self.nodes.len()).filter(|&peer| peer != node).map(node_id).collect::<NodeSet>();
        let cluster = ClusterConfig {
            me: node_id(node),
            group: GroupId(7),
            peers,
            register: REGISTER,
            timing: Timing::default(),
            nonce_seed: self.rng.random(),
        };
        let replication = rempart_replication::Config {
            peer_window_bytes: 256 << 10,
            log_read_bytes: 128 << 10,
            extent_read_bytes: 128 << 10,
            resync_window_bytes: 256 << 10,
            ..Default::default()
        };
        let roll_back = std::mem::take(&mut self.nodes[node].roll_back);
        let store = OpenOptions { limits: self.limits.clone(), roll_back };
        let params = Params { cluster, replication, store };
        let now = self.monotonic();
        let state = &mut self.nodes[node];
        state.life += 1;
        let life = state.life;
        let mut out = Vec::new();
        let engine = Engine::open(&mut state.disk, params, now, &mut out).expect("the store opens");
        state.engine = Some(engine);
        state.out = out;
        state.turn_planned = false;
        let fact = if state.vm { VmFact::Running } else { VmFact::Stopped };
        self.tell(|| format!("{node}: started, life {life}"));
        self.feed(node, Input::Vm(fact));
        for peer in (0..self.nodes.len()).filter(|&peer| peer != node) {
            self.plan_connect(node, peer);
        }
        if self.nodes[node].vm {
            self.at(20_000_000, Event::GuestConnects { node });
        }
    }

    pub fn is_up(&self, node: usize) -> bool {
        self.nodes[node].engine.is_some()
    }

    pub fn engine(&self, node: usize) -> &Engine {
        self.nodes[node].engine.as_ref().expect("it is up")
    }

    /// The daemon dies; the machine and the page cache live on.
    pub fn crash(&mut self, node: usize) {
        self.tell(|| format!("{node}: daemon crashes"));
        self.nodes[node].engine = None;
        self.nodes[node].out.clear();
        let rng = &mut self.rng;
        self.nodes[node].disk.crash_process(&mut || rng.random());
        self.guest.disconnected(node);
        self.drop_sessions(node, true);
    }

    pub fn lose_power(&mut self, node: usize) {
        self.tell(|| format!("{node}: power lost"));
        self.nodes[node].engine = None;
        self.nodes[node].out.clear();
        self.nodes[node].powered = false;
        self.nodes[node].vm = false;
        self.nodes[node].lease = 0;
        self.nodes[node].vm_order += 1;
        let rng = &mut self.rng;
        self.nodes[node].disk.lose_power(&mut || rng.random());
        self.guest.machine_died(node);
        self.guest.power_was_lost = true;
        self.drop_sessions(node, false);
    }

    pub fn power_on(&mut self, node: usize) {
        self.nodes[node].powered = true;
        self.start(node);
    }

    fn drop_sessions(&mut self, node: usize, told: bool) {
        let gone: Vec<Session> =
            self.sessions.iter().copied().filter(|s| s.a == node || s.b == node).collect();
        self.sessions.retain(|s| s.a != node && s.b != node);
        for session in gone {
            let peer = session.a + session.b - node;
            let delay = if told { 1_000_000 } else { 3_000_000_000 };
            self.at(delay, Event::Disconnected { node: peer, peer: node, session: session.id });
        }
    }

    pub fn cut(&mut self, a: usize, b: usize) {
        self.tell(|| format!("link {a}-{b} cut"));
        self.cut.push((a.min(b), a.max(b)));
    }

    pub fn heal(&mut self) {
        self.tell(|| "healed".into());
        self.cut.clear();
        self.register_cut.clear();
        self.register_unknown = 0;
        if std::mem::take(&mut self.unfaithful) > 0 {
            for session in self.sessions.clone() {
                self.end_session(session.id);
            }
        }
    }

    fn is_cut(&self, a: usize, b: usize) -> bool {
        self.cut.contains(&(a.min(b), a.max(b)))
    }

    fn plan_connect(&mut self, a: usize, b: usize) {
        let delay = self.rng.random_range(1_000_000..300_000_000);
        self.at(delay, Event::Connect { a: a.min(b), b: a.max(b) });
    }

    fn connect(&mut self, a: usize, b: usize) {
        let up = self.is_up(a) && self.is_up(b);
        let open = self.sessions.iter().any(|s| s.a == a && s.b == b);
        if open || !up {
            return;
        }
        if self.is_cut(a, b) {
            return self.plan_connect(a, b);
        }
        let id = SessionId(self.next_session);
        self.next_session += 1;
        self.sessions.push(Session { id, a, b });
        for (node, peer) in [(a, b), (b, a)] {
            let delay = self.delay();
            self.last_delivery.insert((id.0, node), self.now + delay);
            self.at(delay, Event::Connected { node, peer, session: id });
        }
    }

    /// The session ends; both ends learn of it, sooner or later.
    fn end_session(&mut self, id: SessionId) {
        let Some(place) = self.sessions.iter().position(|s| s.id == id) else { return };
        let Session { a, b, .. } = self.sessions.remove(place);
        for (node, peer) in [(a, b), (b, a)] {
            let delay = self.delay();
            self.at(delay, Event::Disconnected { node, peer, session: id });
        }
    }

    /// What the two have between them.
    pub fn session(&self) -> Option<SessionId> {
        self.sessions.first().map(|session| session.id)
    }

    fn delay(&mut self) -> u64 {
        self.rng.random_range(20_000..400_000)
    }

    pub fn feed(&mut self, node: usize, input: Input) {
        let now = self.monotonic();
        let state = &mut self.nodes[node];
        let Some(engine) = &mut state.engine else { return };
        engine.handle(input, now, &mut state.out);
        self.plan_turn(node);
    }

    pub fn plan_turn(&mut self, node: usize) {
        let life = self.nodes[node].life;
        if !std::mem::replace(&mut self.nodes[node].turn_planned, true) {
            let delay = self.rng.random_range(0..20_000);
            self.at(delay, Event::Turn { node, life });
        }
    }

    pub fn command(&mut self, node: usize, command: Command) -> CommandId {
        let id = CommandId(self.next_command);
        self.next_command += 1;
        self.tell(|| format!("{node}: command {command:?}"));
        self.feed(node, Input::Command { id, command });
        id
    }

    fn turn(&mut self, node: usize) {
        self.nodes[node].turn_planned = false;
        self.guest_turn(node);
        loop {
            let now = self.monotonic();
            let wall = WallTime(self.now / 1_000_000);
            let state = &mut self.nodes[node];
            let Some(engine) = &mut state.engine else { return };
            let mut out = std::mem::take(&mut state.out);
            engine.end_turn(now, wall, &mut out);
            let mut finished = Vec::new();
            for action in out {
                self.execute(node, action, &mut finished);
            }
            if finished.is_empty() {
                break;
            }
            let state = &mut self.nodes[node];
            let Some(engine) = &mut state.engine else { return };
            for completion in finished {
                engine.handle(Input::Io(completion), now, &mut state.out);
            }
        }
        let life = self.nodes[node].life;
        if let Some(at) = self.engine(node).next_wake() {
            let delay = at.0.saturating_sub(self.now).max(1_000);
            if delay < 1_000_000_000_000 {
                self.at(delay, Event::Wake { node, life, at: at.0 });
            }
        }
    }

    fn execute(&mut self, node: usize, action: Action, finished: &mut Vec<rempart_store::IoCompletion>) {
        let life = self.nodes[node].life;
        match action {
            Action::Io(command) => {
                let (id, class) = (command.id, command.class);
                self.nodes[node].disk.submit(command);
                if matches!(class, IoClass::JournalWrite { .. }) && self.rng.random_ratio(4, 5) {
                    finished.push(self.run_io(node, id));
                } else {
                    let delay = self.rng.random_range(10_000..1_000_000);
                    self.at(delay, Event::Io { node, life, id });
                }
            }
            Action::Send { peer, session, message } => {
                let peer = node_index(peer);
                if !self.sessions.iter().any(|s| s.id == session) {
                    return;
                }
                self.tell(|| {
                    let text = format!("{message:?}");
                    format!("{node} -> {peer}: {}", &text[..text.len().min(240)])
                });
                let meta = message.encode();
                let payload = message.payload().concat();
                if message.is_resync() {
                    self.extent_bytes += payload.len() as u64;
                }
                let at = self.now + self.delay();
                let last = self.last_delivery.entry((session.0, peer)).or_default();
                *last = at.max(*last + 1);
                let delay = *last - self.now;
                self.at(delay, Event::Deliver { node: peer, peer: node, session, meta, payload });
            }
            Action::CloseSession { session, why, .. } => {
                self.tell(|| format!("{node}: closes session: {why}"));
                self.end_session(session);
            }
            Action::Reply { token, reply } => self.guest_reply(node, token, reply),
            Action::Register(request) => self.register(node, request),
            Action::Vm(action) => self.vm(node, action),
            Action::Digest { job, parts } => {
                let digest = |part: &Vec<Bytes>| {
                    let mut hash = Sha256::new();
                    part.iter().for_each(|bytes| hash.update(bytes));
                    Digest(hash.finalize().into())
                };
                let digests = parts.iter().map(digest).collect();
                let delay = self.delay();
                self.at(delay, Event::Digested { node, life, job, digests });
            }
            Action::CommandDone { id, result } => {
                self.tell(|| format!("{node}: command {} {result:?}", id.0));
                self.results.insert(id, result);
            }
            Action::ViewRead { token, result, .. } => {
                self.view_reads.insert(token, result);
            }
            Action::ViewEnded { view, why } => {
                self.tell(|| format!("{node}: view {} ended: {why}", view.0));
                self.views_ended.push((view, why));
            }
            Action::Report(report) => {
                self.tell(|| format!("{node}: {report:?}"));
                self.reports.push((node, report));
            }
        }
    }

    fn run_io(&mut self, node: usize, id: IoId) -> rempart_store::IoCompletion {
        let disk = &mut self.nodes[node].disk;
        let index = disk.queued().iter().position(|command| command.id == id).expect("it is queued");
        disk.run(index)
    }

    // --- register ---

    fn register(&mut self, node: usize, request: RegisterRequest) {
        let (life, delay) = (self.nodes[node].life, self.rng.random_range(200_000..5_000_000));
        let cut = self.register_cut.contains(&node);
        let unknown = self.rng.random_ratio(self.register_unknown, 1000);
        let reply = match request {
            RegisterRequest::Read { request, register } => {
                let outcome = if cut || unknown {
                    ReadOutcome::Unreachable
                } else {
                    ReadOutcome::Value(self.registers.get(&register).cloned())
                };
                RegisterReply::Read { request, outcome }
            }
            RegisterRequest::Swap { request, register, expected, value } => {
                let holds = self.registers.get(&register).map(|value| value.epoch);
                let lands = holds == expected;
                let outcome = if cut || (unknown && self.rng.random()) {
                    SwapOutcome::Unknown
                } else if lands {
                    self.tell(|| format!("register: {} {:?} by {node}", value.epoch, value.in_sync));
                    self.registers.insert(register, value);
                    if unknown { SwapOutcome::Unknown } else { SwapOutcome::Won }
                } else {
                    SwapOutcome::Lost(self.registers.get(&register).cloned())
                };
                RegisterReply::Swapped { request, outcome }
            }
            RegisterRequest::Inform { .. } => return,
        };
        let delay = if cut { 900_000_000 } else { delay };
        self.at(delay, Event::Register { node, life, reply });
    }

    // --- the machine ---

    fn vm(&mut self, node: usize, action: VmAction) {
        self.tell(|| format!("{node}: {action:?}"));
        match action {
            VmAction::Run { .. } => {
                self.nodes[node].vm_order += 1;
                let order = self.nodes[node].vm_order;
                if !self.nodes[node].vm {
                    self.at(20_000_000, Event::VmStarted { node, order });
                } else if !self.guest.is_connected(node) {
                    self.at(5_000_000, Event::GuestConnects { node });
                }
            }
            VmAction::RenewLease { until } => {
                self.nodes[node].lease = until.0;
                self.at(until.0.saturating_sub(self.now), Event::Guard { node });
            }
            VmAction::Pause => self.nodes[node].paused = true,
            VmAction::Resume => {
                self.nodes[node].paused = false;
                if !self.nodes[node].vm {
                    self.nodes[node].vm_order += 1;
                    let order = self.nodes[node].vm_order;
                    self.at(20_000_000, Event::VmStarted { node, order });
                }
            }
            VmAction::ShutDown | VmAction::Kill => {
                self.nodes[node].vm_order += 1;
                let order = self.nodes[node].vm_order;
                self.at(10_000_000, Event::VmStopped { node, order });
            }
        }
    }

    fn vm_gone(&mut self, node: usize) {
        if std::mem::take(&mut self.nodes[node].vm) {
            self.tell(|| format!("{node}: machine stopped"));
            self.guest.machine_died(node);
            self.abandon_guest(node);
        }
        self.nodes[node].paused = false;
        self.feed(node, Input::Vm(VmFact::Stopped));
    }

    // --- running ---

    /// Runs for `duration` of virtual time.
    pub fn run_for(&mut self, duration: Duration) {
        let end = self.now + duration.as_nanos() as u64;
        while let Some((&(at, _), _)) = self.agenda.first_key_value()
            && at <= end
        {
            self.step();
        }
        self.now = end;
    }

    /// Runs until `done`, or panics after `limit` of virtual time.
    pub fn run_until(&mut self, what: &str, limit: Duration, mut done: impl FnMut(&World) -> bool) {
        let end = self.now + limit.as_nanos() as u64;
        while !done(self) {
            assert!(self.now < end, "seed {}: not within {limit:?}: {what}\n{}", self.seed, self.picture());
            self.step();
        }
    }

    pub fn picture(&self) -> String {
        let now = self.monotonic();
        let node = |(index, node): (usize, &Node)| match &node.engine {
            Some(engine) => format!("{index}: vm {} {:#?}", node.vm, engine.status(now)),
            None => format!("{index}: down"),
        };
        let nodes: Vec<String> = self.nodes.iter().enumerate().map(node).collect();
        format!("{}\nregister {:#?}", nodes.join("\n"), self.registers)
    }

    fn step(&mut self) {
        let ((at, _), event) = self.agenda.pop_first().expect("something always happens");
        self.now = self.now.max(at);
        match event {
            Event::Turn { node, life } => {
                if self.nodes[node].life == life && self.is_up(node) {
                    self.turn(node);
                }
            }
            Event::Wake { node, life, at } => {
                let due = self.nodes[node].engine.as_ref().and_then(Engine::next_wake);
                if self.nodes[node].life == life && due.is_some_and(|due| due.0 <= self.now.max(at)) {
                    self.feed(node, Input::Tick);
                }
            }
            Event::Io { node, life, id } => {
                if self.nodes[node].life == life && self.is_up(node) {
                    let completion = self.run_io(node, id);
                    self.feed(node, Input::Io(completion));
                }
            }
            Event::Connect { a, b } => self.connect(a, b),
            Event::Connected { node, peer, session } => {
                if self.sessions.iter().any(|s| s.id == session) {
                    self.feed(node, Input::Connected { peer: node_id(peer), session });
                }
            }
            Event::Disconnected { node, peer, session } => {
                self.feed(node, Input::Disconnected { peer: node_id(peer), session });
                self.plan_connect(node, peer);
            }
            Event::Deliver { node, peer, session, meta, payload } => {
                if !self.sessions.iter().any(|s| s.id == session) {
                    return;
                }
                if self.is_cut(node, peer) {
                    // TCP repeats for a while, then gives up.
                    if self.rng.random_ratio(1, 3) {
                        self.end_session(session);
                    } else {
                        let last = self.now + 200_000_000;
                        self.last_delivery.insert((session.0, node), last);
                        self.at(200_000_000, Event::Deliver { node, peer, session, meta, payload });
                    }
                    return;
                }
                if self.unfaithful > 0 && self.rng.random_ratio(self.unfaithful, 1000) {
                    if self.rng.random() {
                        self.tell(|| format!("lost on the way to {node}"));
                        return;
                    }
                    let (meta, payload) = (meta.clone(), payload.clone());
                    self.at(self.now % 3_000_000, Event::Deliver { node, peer, session, meta, payload });
                }
                let message = PeerMessage::decode(&meta, Bytes::from(payload)).expect("what was encoded");
                self.feed(node, Input::Message { peer: node_id(peer), session, message });
            }
            Event::Register { node, life, reply } => {
                if self.nodes[node].life == life {
                    self.feed(node, Input::Register(reply));
                }
            }
            Event::Digested { node, life, job, digests } => {
                if self.nodes[node].life == life {
                    self.feed(node, Input::Digested { job, digests });
                }
            }
            Event::VmStarted { node, order } => {
                if self.nodes[node].vm_order == order && !self.nodes[node].vm && self.nodes[node].powered {
                    if self.nodes[node].lease <= self.now {
                        return self.at(50_000_000, Event::VmStarted { node, order });
                    }
                    let others = self.nodes.iter().enumerate().filter(|(other, _)| *other != node);
                    for (other, state) in others {
                        assert!(!state.vm, "seed {}: machine on {node} and {other}", self.seed);
                    }
                    self.tell(|| format!("{node}: machine started"));
                    self.nodes[node].vm = true;
                    self.nodes[node].paused = false;
                    self.guest.boot(node);
                    self.at(1_000_000, Event::GuestConnects { node });
                    self.feed(node, Input::Vm(VmFact::Running));
                }
            }
            Event::VmStopped { node, order } => {
                if self.nodes[node].vm_order == order {
                    self.vm_gone(node);
                }
            }
            Event::Guard { node } => {
                if self.nodes[node].vm && self.nodes[node].lease <= self.now {
                    self.tell(|| format!("{node}: guard stops the machine"));
                    self.vm_gone(node);
                }
            }
            Event::GuestThinks { node } => self.plan_turn(node),
            Event::GuestConnects { node } => {
                if self.nodes[node].vm && self.is_up(node) && !self.guest.is_connected(node) {
                    self.guest.connected(node);
                    self.plan_turn(node);
                }
            }
        }
    }

    /// The guest does something again after a while.
    pub fn guest_thinks(&mut self, node: usize) {
        let delay = self.rng.random_range(200_000..30_000_000);
        self.at(delay, Event::GuestThinks { node });
    }

    pub fn guest_reconnects(&mut self, node: usize) {
        self.at(50_000_000, Event::GuestConnects { node });
    }

    // --- checks ---

    /// Who leads and serves.
    pub fn primary(&self) -> Option<usize> {
        let now = self.monotonic();
        (0..self.nodes.len())
            .find(|&node| self.nodes[node].engine.as_ref().is_some_and(|engine| engine.status(now).serving))
    }

    pub fn in_sync(&self) -> usize {
        let now = self.monotonic();
        self.primary().map_or(0, |node| self.engine(node).status(now).in_sync.len())
    }

    /// Everything that is up holds and has applied the same.
    pub fn is_settled(&self) -> bool {
        let now = self.monotonic();
        let states: Vec<_> =
            self.nodes.iter().filter_map(|n| n.engine.as_ref()).map(|e| e.status(now)).collect();
        states.windows(2).all(|w| w[0].end == w[1].end)
            && states.iter().all(|s| s.applied == s.end && s.in_flight == 0)
    }

    pub fn image(&self, node: usize, disk: u16) -> Vec<u8> {
        let file = rempart_store::FileId::Image(DiskIndex(disk));
        let mut bytes = self.nodes[node].disk.content(file).unwrap_or_default();
        bytes.resize(DISK_SIZE as usize, 0);
        bytes
    }

    /// I5: after quiesce, all images are byte-equal.
    pub fn assert_images_equal(&self) {
        for disk in 0..DISKS {
            let first = self.image(0, disk);
            for node in 1..self.nodes.len() {
                let other = self.image(node, disk);
                if let Some(at) = (0..first.len()).find(|&at| first[at] != other[at]) {
                    panic!("seed {}: disk {disk} differs on 0 and {node} at byte {at}", self.seed);
                }
            }
        }
    }

    /// Brings the group into being and both replicas in sync, with the machine running.
    pub fn mirrored(&mut self) {
        for node in 0..self.nodes.len() {
            self.start(node);
        }
        self.command(0, Command::Create);
        let all = self.nodes.len();
        self.run_until("mirrored", Duration::from_secs(30), |w| w.in_sync() == all && w.nodes[0].vm);
    }
}

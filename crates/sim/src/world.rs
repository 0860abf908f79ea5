//! One world: its nodes, what connects them, the machine that lives on them, and the order of events.

use crate::agenda::{Agenda, Moment};
use crate::backups::Backups;
use crate::book::Book;
use crate::check::Checker;
use crate::clock::Clock;
use crate::coverage::{Coverage, Kind};
use crate::drive::Drive;
use crate::faults::{Ending, Fault, FaultPlan, Planted};
use crate::history::History;
use crate::machine::Machine;
use crate::network::{Delivery, Network};
use crate::operator::{Operator, formatted};
use crate::rng::Rng;
use crate::setup::Setup;
use crate::trace::{Trace, Verbosity};
use crate::violation::{Promise, Violation};
use crate::wire::WitnessPath;
use crate::witness::Witness;
use rempart_engine::{Action, DigestJob, Engine, Input, PeerMessage, Token, ViewId, ViewedExtents, VmFact};
use rempart_replication::Digest;
use rempart_store::IoId;
use rempart_types::{NodeId, SessionId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// What happens, when it is due.
#[derive(Debug)]
pub(crate) enum Event {
    /// To the daemon of one node, in one of its lives.
    Daemon {
        node: usize,
        life: u64,
        what: DaemonEvent,
    },
    Connect {
        a: usize,
        b: usize,
    },
    /// A message of a session is due at its receiver.
    Deliver {
        delivery: Delivery,
        message: PeerMessage,
    },
    /// Each end looks now and then whether the other still lives.
    KeepAlive {
        node: usize,
        session: SessionId,
    },
    AtWitness {
        node: usize,
        life: u64,
        request: crate::wire::WitnessRequest,
    },
    StartDaemon {
        node: usize,
        boot: u64,
    },
    PowerOn {
        node: usize,
    },
    Boot {
        node: usize,
        nonce: u64,
    },
    /// The guard's timer number `timer` rings.
    Guard {
        node: usize,
        nonce: u64,
        timer: u64,
    },
    /// The guard, having stopped the vCPUs, ends the process.
    GuardKills {
        node: usize,
        nonce: u64,
    },
    /// The daemon starts a machine again whose process died.
    StartAgain {
        node: usize,
        life: u64,
    },
    /// The guest makes a few requests.
    Burst {
        node: usize,
        nonce: u64,
    },
    Reconnect {
        node: usize,
        nonce: u64,
    },
    /// The daemon's process ends: it stopped in order, or took too long to.
    Exit {
        node: usize,
        life: u64,
        clean: bool,
    },
    NextFault,
    /// A fault that was aimed at what just began.
    Strike {
        node: usize,
        fault: Fault,
    },
    /// The operator looks how far a forced takeover is.
    TendTakeover,
    EndFault(Ending),
    NextOrder,
    /// A moment at which checkers look although nothing else happens.
    Look,
}

/// What a daemon is told.
#[derive(Debug)]
pub(crate) enum DaemonEvent {
    Wake,
    Turn,
    Io(IoId),
    SessionOpen { session: SessionId, peer: usize },
    SessionClosed { session: SessionId, peer: usize },
    Message { session: SessionId, peer: usize, message: PeerMessage },
    Register(rempart_engine::RegisterReply),
    Digested { job: DigestJob, digests: Vec<Digest> },
    Vm(VmFact),
    Command(rempart_engine::CommandId, rempart_engine::Command),
    ReadView { view: ViewId, token: Token, extents: ViewedExtents },
    GuestRequests,
}

/// A running daemon.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub engine: Engine,
    pub life: u64,
    /// Stopped by a signal: what happens to it meanwhile waits here.
    pub frozen: bool,
    pub backlog: VecDeque<DaemonEvent>,
    pub out: Vec<Action>,
    pub turn_planned: bool,
    pub wake_at: Moment,
    /// Guest requests in its socket, not yet taken.
    pub inbox: VecDeque<crate::pattern::Tag>,
    /// Requests of a connection that is gone, on their way into the log.
    pub leftover: BTreeSet<Token>,
    /// What a planted bug does again.
    pub zombies: VecDeque<crate::pattern::Tag>,
    pub io: BTreeMap<IoId, crate::drive::Started>,
}

/// One server.
#[derive(Debug)]
pub(crate) struct Node {
    pub id: NodeId,
    pub clock: Clock,
    pub powered: bool,
    /// All its processes are stopped by a signal.
    pub frozen: bool,
    /// Until when a machine that was continued may overlap with its successor.
    pub excused_until: Moment,
    pub boots: u64,
    pub lives: u64,
    pub drive: Drive,
    pub daemon: Option<Daemon>,
    pub machine: Option<Machine>,
    pub witness: WitnessPath,
    /// Nobody starts its daemon: it is fenced, or was taken out of the group.
    pub stays_down: bool,
    /// Its store reported that it cannot go on.
    pub disk_failed: bool,
    /// The engine wants the machine to run here: its process is started again when it dies.
    pub vm_may_run: bool,
    /// The lease as the daemon last gave it.
    pub lease: Option<rempart_types::MonotonicTime>,
    /// Bits of its disk flipped, or somebody wrote to its image.
    pub rotten: bool,
    /// Bytes of its disk changed. Old parts of a journal are read only when a peer needs them, so what is there is not
    /// noticed before.
    pub spoilt: bool,
    /// Once its daemon has stopped in order, somebody writes to the image.
    pub to_be_touched: bool,
    /// The next start goes back to what the copy was before an unfinished resync.
    pub roll_back: bool,
}

/// What one run of a world is asked for.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub verbosity: Verbosity,
    /// A bug to plant outside the cores.
    pub planted: Option<Planted>,
}

/// The simulated world around real engines.
#[derive(Debug)]
pub struct World {
    pub(crate) agenda: Agenda<Event>,
    pub(crate) rng: Rng,
    pub(crate) setup: Setup,
    pub(crate) options: Options,
    pub(crate) nodes: Vec<Node>,
    pub(crate) network: Network,
    pub(crate) held: Vec<(Delivery, PeerMessage)>,
    pub(crate) witness: Witness,
    pub(crate) history: History,
    pub(crate) book: Book,
    /// The longest any request of the guest waited for its answer.
    pub(crate) longest_stall: Duration,
    pub(crate) checker: Checker,
    pub(crate) faults: FaultPlan,
    pub(crate) operator: Operator,
    pub(crate) backups: Backups,
    pub(crate) nonces: u64,
    pub(crate) quiet: bool,
    /// The faults are over.
    pub(crate) healed: bool,
    pub(crate) coverage: Coverage,
    pub(crate) trace: Trace,
    moments: BTreeMap<&'static str, Moment>,
    violation: Option<Violation>,
    steps_at_this_moment: u32,
    pub(crate) answered: usize,
    steps: u64,
}

impl World {
    /// Events at one moment, past which a core spins.
    const SPIN: u32 = 200_000;

    pub fn new(seed: u64, options: Options) -> World {
        let mut rng = Rng::new(seed);
        let setup = Setup::draw(&mut rng.fork());
        World::with_setup(seed, setup, options)
    }

    /// A world drawn by hand, for scenarios.
    pub fn with_setup(seed: u64, mut setup: Setup, options: Options) -> World {
        if options.planted == Some(Planted::ClockBeyondDrift) {
            let slow = seed as usize % setup.nodes;
            let drift = |node| if node == slow { -450_000_000 } else { 450_000_000 };
            setup.drift_ppb = (0..setup.nodes).map(drift).collect();
        }
        let mut rng = Rng::new(seed ^ 0x5eed);
        let ids: Vec<NodeId> = (0..setup.nodes).map(|index| NodeId(0xa + index as u128)).collect();
        let sectors: Vec<u64> = setup.disks.iter().map(|size| size / rempart_types::SECTOR_SIZE).collect();
        let network = Network::new(setup.nodes, &mut rng);
        let faults = FaultPlan::draw(&mut rng.fork(), &setup);
        let disk = formatted(&setup);
        let node = |(index, &id)| Node::new(id, index, &setup, disk.clone(), options.planted, &mut rng);
        let nodes = ids.iter().enumerate().map(node).collect();
        let mut world = World {
            agenda: Agenda::default(),
            witness: Witness::default(),
            history: History::new(&sectors),
            book: Book::default(),
            longest_stall: Duration::ZERO,
            checker: Checker::new(setup.nodes),
            network,
            held: Vec::new(),
            faults,
            operator: Operator::default(),
            backups: Backups::default(),
            nodes,
            nonces: 0,
            quiet: false,
            healed: false,
            coverage: Coverage::default(),
            trace: Trace::new(options.verbosity),
            moments: BTreeMap::new(),
            violation: None,
            steps_at_this_moment: 0,
            answered: 0,
            steps: 0,
            rng,
            setup,
            options,
        };
        world.begin();
        world
    }

    pub fn now(&self) -> Moment {
        self.agenda.now()
    }

    /// Events handled so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    pub fn coverage(&self) -> &Coverage {
        &self.coverage
    }

    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    pub(crate) fn tell(&mut self, line: impl FnOnce() -> String) {
        let now = self.now();
        self.trace.note(now, line);
    }

    pub(crate) fn reached(&mut self, name: &'static str) {
        self.coverage.count(Kind::Reached, name);
        self.moments.insert(name, self.agenda.now());
    }

    /// Requests of the guest answered so far.
    pub fn requests_answered(&self) -> usize {
        self.answered
    }

    /// How long the oldest unanswered request of a running guest has waited.
    pub fn oldest_request(&self) -> Duration {
        let lives = self.nodes.iter().filter_map(|node| node.machine.as_ref().and_then(|m| m.life));
        let oldest = lives.filter_map(|life| self.history.in_flight(life).first());
        oldest.map(|&tag| self.now().since(self.history.started(tag))).max().unwrap_or_default()
    }

    pub fn longest_excused_overlap(&self) -> Duration {
        self.checker.excused
    }

    pub fn machine_nonce(&self, node: usize) -> Option<u64> {
        self.nodes[node].machine.as_ref().map(|machine| machine.nonce)
    }

    pub fn cut(&mut self, from: usize, to: usize) {
        self.network.cut(from, to);
    }

    pub fn limit_resync(&mut self, node: usize, bytes_per_second: u64) {
        let command = rempart_engine::Command::LimitResync { bytes_per_second: Some(bytes_per_second) };
        self.order(node, "limit resync", command);
    }

    /// When something of that name happened last.
    pub fn when(&self, name: &str) -> Option<Moment> {
        self.moments.get(name).copied()
    }

    /// Notes the first broken promise; the run ends with it.
    pub(crate) fn broken(&mut self, violation: Violation) {
        self.tell(|| format!("BROKEN  {violation}"));
        self.violation.get_or_insert(violation);
    }

    pub(crate) fn must(&mut self, result: Result<(), Violation>) {
        if let Err(violation) = result {
            self.broken(violation);
        }
    }

    pub(crate) fn index_of(&self, id: NodeId) -> usize {
        self.nodes.iter().position(|node| node.id == id).expect("only known nodes are named")
    }

    pub(crate) fn after(&mut self, delay: Duration, event: Event) {
        let tie = self.rng.u64() as u32;
        let at = self.now() + delay;
        self.agenda.at(at, tie, event);
    }

    pub(crate) fn tell_daemon(&mut self, node: usize, delay: Duration, what: DaemonEvent) {
        if let Some(daemon) = &self.nodes[node].daemon {
            let life = daemon.life;
            self.after(delay, Event::Daemon { node, life, what });
        }
    }

    /// Lets the world go on until `until`, or a promise breaks.
    pub fn run_until(&mut self, until: Moment) -> Result<(), Violation> {
        self.run_while(until, |_| true)
    }

    /// Lets the world go on while `condition` holds, at most until `until`.
    pub fn run_while(
        &mut self,
        until: Moment,
        mut condition: impl FnMut(&World) -> bool,
    ) -> Result<(), Violation> {
        loop {
            if let Some(violation) = &self.violation {
                return Err(violation.clone());
            }
            if !condition(self) {
                return Ok(());
            }
            if self.agenda.next_at().is_none_or(|at| at > until) {
                self.agenda.advance(until);
                return Ok(());
            }
            self.step();
        }
    }

    fn step(&mut self) {
        let before = self.now();
        let Some((now, event)) = self.agenda.pop() else { return };
        self.steps += 1;
        self.steps_at_this_moment = if now == before { self.steps_at_this_moment + 1 } else { 0 };
        if self.steps_at_this_moment > Self::SPIN {
            return self.broken(Violation::new(Promise::CoreAssertion, "a core spins without time going on"));
        }
        self.dispatch(event);
        self.look();
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::Daemon { node, life, what } => {
                if self.nodes[node].daemon.as_ref().is_some_and(|daemon| daemon.life == life) {
                    self.daemon_event(node, what);
                }
            }
            Event::Connect { a, b } => self.connect(a, b),
            Event::Deliver { delivery, message } => self.deliver(delivery, message),
            Event::KeepAlive { node, session } => self.keep_alive(node, session),
            Event::AtWitness { node, life, request } => self.at_witness(node, life, request),
            Event::StartDaemon { node, boot } => {
                if self.nodes[node].boots == boot {
                    self.start_daemon(node);
                }
            }
            Event::PowerOn { node } => self.power_on(node),
            Event::Boot { node, nonce } => self.machine_boots(node, nonce),
            Event::Guard { node, nonce, timer } => self.guard_rings(node, nonce, timer),
            Event::GuardKills { node, nonce } => self.guard_kills(node, nonce),
            Event::StartAgain { node, life } => self.start_again(node, life),
            Event::Burst { node, nonce } => self.burst(node, nonce),
            Event::Reconnect { node, nonce } => self.reconnect(node, nonce),
            Event::Exit { node, life, clean } => self.daemon_exits(node, life, clean),
            Event::NextFault => self.next_fault(),
            Event::Strike { node, fault } => self.strike(fault, node),
            Event::TendTakeover => self.tend_forced_takeover(),
            Event::EndFault(ending) => self.end_fault(ending),
            Event::NextOrder => self.next_order(),
            Event::Look => {}
        }
    }
}

impl DaemonEvent {
    /// What the engine is handed for it, where it is an input as it stands.
    pub(crate) fn into_input(self, peer_id: impl Fn(usize) -> NodeId) -> Option<Input> {
        Some(match self {
            DaemonEvent::Wake => Input::Tick,
            DaemonEvent::SessionOpen { session, peer } => Input::Connected { peer: peer_id(peer), session },
            DaemonEvent::SessionClosed { session, peer } => {
                Input::Disconnected { peer: peer_id(peer), session }
            }
            DaemonEvent::Message { session, peer, message } => {
                Input::Message { peer: peer_id(peer), session, message }
            }
            DaemonEvent::Register(reply) => Input::Register(reply),
            DaemonEvent::Digested { job, digests } => Input::Digested { job, digests },
            DaemonEvent::Vm(fact) => Input::Vm(fact),
            DaemonEvent::Command(id, command) => Input::Command { id, command },
            DaemonEvent::ReadView { view, token, extents } => Input::ReadView { view, token, extents },
            DaemonEvent::Io(_) | DaemonEvent::Turn | DaemonEvent::GuestRequests => return None,
        })
    }
}

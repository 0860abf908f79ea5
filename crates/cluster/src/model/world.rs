//! The world around the members, and what each action does to it.

use crate::model::check::{Ghost, Violation};
use crate::timers::Timer;
use crate::{Action, Config, Event, Member, Message, PersistentState, Receipt, SwapOutcome, Timing};
use rempart_types::{
    Epoch, GroupId, Intent, MonotonicTime, NodeId, NodeSet, RegisterId, RegisterValue, SessionId, Term,
};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// The moment it always is.
pub(super) const NOW: MonotonicTime = MonotonicTime(1_000_000_000_000);
pub(super) const REGISTER: RegisterId = RegisterId(1);
/// Where the group may move, or be forced to.
pub(super) const TARGET: RegisterId = RegisterId(2);
const SESSION: SessionId = SessionId(1);
/// Messages under way in one direction at most; what does not fit is held back by its sender, which repeats it.
const QUEUE: usize = 4;

/// How often each thing may happen on one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bounds {
    pub nodes: u8,
    /// Changes of the register after the start.
    pub epochs: u8,
    /// Records the guest writes.
    pub writes: u8,
    /// The process dies; page cache and machine stay.
    pub crashes: u8,
    /// The machine dies; what was not synced is gone.
    pub power_cuts: u8,
    /// Answers of the register that do not come.
    pub silences: u8,
    pub disconnects: u8,
    /// Orders to hand over.
    pub handovers: u8,
    /// Deadlines that pass with no better reason than that they may.
    pub deadlines: u8,
    /// Disks that fail.
    pub disk_failures: u8,
    /// Copies that turn out unusable, at a restart or when they begin to lead.
    pub spoilt_copies: u8,
    /// Orders to move to another register.
    pub moves: u8,
    /// Orders to lead by force, given to the only one that is up.
    pub forces: u8,
}

impl Bounds {
    /// Two replicas, three changes of the register, and nothing goes wrong.
    pub const NOTHING: Bounds = Bounds {
        nodes: 2,
        epochs: 3,
        writes: 0,
        crashes: 0,
        power_cuts: 0,
        silences: 0,
        disconnects: 0,
        handovers: 0,
        deadlines: 0,
        disk_failures: 0,
        spoilt_copies: 0,
        moves: 0,
        forces: 0,
    };
}

/// Where an exploration begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Start {
    /// The first node leads, all are in sync, the machine runs.
    Mirrored,
    /// The first node leads alone, the others are connected and catching up.
    Alone,
    /// The first node leads, and there are no others until the register has moved.
    Unprotected,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Wire {
    pub(super) message: Message,
    /// The waits that began after this beacon, or the beacon this answers, was sent.
    pub(super) covers: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Pending {
    Read(RegisterId),
    Swap,
    ReadDone(Option<RegisterValue>),
    SwapDone(SwapOutcome),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Vm {
    Absent,
    Running,
    Paused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Flow {
    Open,
    Draining,
    Frozen,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Lead {
    pub(super) term: Term,
    pub(super) acknowledgers: NodeSet,
    pub(super) flow: Flow,
    /// The recovered log is committed and the member was told.
    pub(super) serving: bool,
    /// What each peer acknowledged in this term: accepted, durable.
    pub(super) views: BTreeMap<u8, (usize, usize)>,
    /// Whom the member was told to be caught up.
    pub(super) ready: Vec<u8>,
}

impl Lead {
    /// Who stops acknowledging must be told anew to be caught up.
    fn need(&mut self, acknowledgers: NodeSet) {
        let before = std::mem::replace(&mut self.acknowledgers, acknowledgers);
        let now = &self.acknowledgers;
        self.ready.retain(|&peer| now.contains(id(peer)) || !before.contains(id(peer)));
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Node {
    pub(super) member: Option<Member>,
    pub(super) persisted: PersistentState,
    pub(super) writing: Option<(PersistentState, Receipt)>,
    pub(super) pending: Option<Pending>,
    pub(super) log: Vec<Term>,
    pub(super) durable: usize,
    pub(super) lead: Option<Lead>,
    pub(super) follow: Option<(u8, Term)>,
    pub(super) vm: Vm,
    /// The machine was told to go, and has not gone yet.
    pub(super) dying: bool,
    /// The guard's lease: the waits that began after what it rests on.
    pub(super) lease: Option<u8>,
    /// The waits that began after the newest acknowledgement of each peer was sent.
    pub(super) last_ack: BTreeMap<u8, u8>,
    /// The waits that began after the newest beacon from each peer was sent.
    pub(super) heard: BTreeMap<u8, u8>,
    pub(super) usable: bool,
}

/// A swap that may land.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Swap {
    pub(super) node: u8,
    /// Its author still waits for the answer.
    pub(super) awaited: bool,
    pub(super) expected: Option<Epoch>,
    pub(super) nonce: u128,
    pub(super) value: OrdValue,
}

/// A register value that sorts by its nonce.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct OrdValue(pub(super) RegisterValue);

impl PartialOrd for OrdValue {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for OrdValue {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.nonce.cmp(&other.0.nonce)
    }
}

/// Everything there is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub(super) nodes: Vec<Node>,
    pub(super) register: Option<RegisterValue>,
    /// The register to move to.
    pub(super) target: Option<RegisterValue>,
    /// Nodes that are replicas: all, or only the first.
    pub(super) replicas: u8,
    pub(super) swaps: Vec<Swap>,
    /// Open connections, and what is under way on each, by (from, to).
    pub(super) wires: BTreeMap<(u8, u8), VecDeque<Wire>>,
    pub(super) left: Bounds,
    pub(super) last_epoch: Epoch,
    pub(super) ghost: Ghost,
    #[cfg(feature = "planted-bugs")]
    pub(super) bug: Option<crate::Bug>,
}

/// Why a member's turn came, as far as its lease depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    Beacon,
    Other,
}

pub(super) fn id(index: u8) -> NodeId {
    NodeId(u128::from(index) + 1)
}

pub(super) fn index(node: NodeId) -> u8 {
    u8::try_from(node.0 - 1).expect("few nodes")
}

impl World {
    /// Nobody was ever here.
    pub(super) fn empty(bounds: Bounds) -> World {
        let node = || Node {
            member: None,
            persisted: PersistentState::default(),
            writing: None,
            pending: None,
            log: Vec::new(),
            durable: 0,
            lead: None,
            follow: None,
            vm: Vm::Absent,
            dying: false,
            lease: None,
            last_ack: BTreeMap::new(),
            heard: BTreeMap::new(),
            usable: true,
        };
        World {
            nodes: (0..bounds.nodes).map(|_| node()).collect(),
            register: None,
            target: None,
            replicas: bounds.nodes,
            swaps: Vec::new(),
            wires: BTreeMap::new(),
            left: bounds,
            last_epoch: Epoch(u64::MAX),
            ghost: Ghost::default(),
            #[cfg(feature = "planted-bugs")]
            bug: None,
        }
    }

    fn config(&self, me: u8) -> Config {
        // Every pause is as long as its limit, so that how often something failed does not tell worlds apart.
        let second = Duration::from_secs(1);
        let timing = Timing {
            register_retry: second,
            register_retry_most: second,
            register_check: Duration::ZERO,
            readmit_after: second,
            readmit_most: second,
            ..Timing::default()
        };
        let peers = (0..self.replicas).filter(|&other| other != me).map(id).collect();
        Config {
            me: id(me),
            group: GroupId(1),
            peers,
            register: if self.has_moved() { TARGET } else { REGISTER },
            timing,
            nonce_seed: self.free_nonce(me),
        }
    }

    /// The lowest nonce of this node's own that nothing mentions.
    fn free_nonce(&self, me: u8) -> u128 {
        let mut used: Vec<u128> = self.swaps.iter().map(|swap| swap.nonce).collect();
        let states = self.nodes.iter().flat_map(|node| {
            let wanted = node.member.iter().map(Member::wanted);
            std::iter::once(&node.persisted).chain(node.writing.iter().map(|(state, _)| state)).chain(wanted)
        });
        for state in states {
            used.extend(state.known.iter().map(|known| known.nonce.0));
            used.extend(state.attempts.iter().map(|attempt| attempt.value.nonce.0));
        }
        used.extend(self.register.iter().chain(&self.target).map(|value| value.nonce.0));
        for pending in self.nodes.iter().filter_map(|node| node.pending.as_ref()) {
            if let Pending::ReadDone(Some(value)) | Pending::SwapDone(SwapOutcome::Lost(Some(value))) =
                pending
            {
                used.push(value.nonce.0);
            }
        }
        let base = (u128::from(me) + 1) * 1000;
        (base..).find(|nonce| !used.contains(nonce)).expect("there are many")
    }

    /// A swap to this epoch is within the bounds. The epochs of a forced register count anew.
    pub(super) fn may_reach(&self, epoch: Epoch) -> bool {
        if epoch.generation() == 0 { epoch <= self.last_epoch } else { epoch.0 & 0xffff <= self.last_epoch.0 }
    }

    /// An order to lead by force is being carried out: whoever was confirmed to be switched off stays so.
    pub(super) fn is_being_forced(&self) -> bool {
        let forcing = |node: &Node| node.member.as_ref().is_some_and(|m| m.role() == crate::Role::Forcing);
        let closes = |swap: &Swap| matches!(swap.value.0.intent, Intent::Tombstone { .. });
        self.nodes.iter().any(forcing) || self.swaps.iter().any(closes)
    }

    /// The target counts once its replica has that on disk.
    pub(super) fn has_moved(&self) -> bool {
        self.nodes.iter().any(|node| node.persisted.register == Some(TARGET))
    }

    /// The register that counts.
    pub(super) fn present_register(&self) -> &Option<RegisterValue> {
        if self.has_moved() { &self.target } else { &self.register }
    }

    pub(super) fn register_of(&self, register: RegisterId) -> &Option<RegisterValue> {
        if register == TARGET { &self.target } else { &self.register }
    }

    /// Nobody waits for swaps that lost already.
    pub(super) fn forget_lost_swaps(&mut self) {
        let reached = |value: &Option<RegisterValue>| value.as_ref().map(|value| value.epoch);
        let (first, target) = (reached(&self.register), reached(&self.target));
        self.swaps.retain(|swap| {
            let reached = if swap.value.0.register == TARGET { target } else { first };
            swap.awaited || swap.expected == reached
        });
    }

    pub(super) fn node(&mut self, index: u8) -> &mut Node {
        &mut self.nodes[usize::from(index)]
    }

    pub(super) fn start(&mut self, me: u8) -> Result<(), Violation> {
        let config = self.config(me);
        let node = self.node(me);
        let member = Member::new(config, node.persisted.clone(), node.usable, NOW);
        node.member = Some(member);
        #[cfg(feature = "planted-bugs")]
        if let (Some(bug), Some(member)) = (self.bug, &mut self.nodes[usize::from(me)].member) {
            member.plant(bug);
        }
        let seen = if self.node(me).vm == Vm::Absent { Event::VmStopped } else { Event::VmRunning };
        self.give(me, seen, Cause::Other)
    }

    /// Its process ends. `written`: the superblock that was being written made it.
    pub(super) fn crash(&mut self, me: u8, power: bool, written: bool) -> Result<(), Violation> {
        let node = self.node(me);
        node.member = None;
        node.lead = None;
        node.follow = None;
        node.pending = None;
        node.last_ack.clear();
        node.heard.clear();
        if let Some((state, _)) = node.writing.take()
            && written
        {
            node.persisted = state;
        }
        if power {
            node.log.truncate(node.durable);
            node.vm = Vm::Absent;
            node.dying = false;
            node.lease = None;
            self.ghost.power_was_lost = true;
        }
        for swap in self.swaps.iter_mut().filter(|swap| swap.node == me) {
            swap.awaited = false;
        }
        let peers: Vec<u8> = self.peers_connected(me).collect();
        for peer in peers {
            self.disconnect(me, peer)?;
        }
        self.forget_wait(me);
        self.ghost.promise_survived(me, self.nodes[usize::from(me)].persisted.promise)
    }

    pub(super) fn peers_connected(&self, me: u8) -> impl Iterator<Item = u8> + '_ {
        self.wires.keys().filter(move |(from, _)| *from == me).map(|&(_, to)| to)
    }

    pub(super) fn connect(&mut self, a: u8, b: u8) -> Result<(), Violation> {
        self.wires.insert((a, b), VecDeque::new());
        self.wires.insert((b, a), VecDeque::new());
        self.give(a, Event::PeerConnected { node: id(b), session: SESSION }, Cause::Other)?;
        self.give(b, Event::PeerConnected { node: id(a), session: SESSION }, Cause::Other)
    }

    pub(super) fn disconnect(&mut self, a: u8, b: u8) -> Result<(), Violation> {
        for (here, there) in [(a, b), (b, a)] {
            self.wires.remove(&(here, there));
            if let Some(lead) = &mut self.node(here).lead {
                lead.views.remove(&there);
                lead.ready.retain(|&peer| peer != there);
            }
            self.node(here).last_ack.remove(&there);
            self.node(here).heard.remove(&there);
        }
        self.give(a, Event::PeerDisconnected { node: id(b), session: SESSION }, Cause::Other)?;
        self.give(b, Event::PeerDisconnected { node: id(a), session: SESSION }, Cause::Other)
    }

    pub(super) fn push(&mut self, from: u8, to: u8, wire: Wire) {
        let Some(queue) = self.wires.get_mut(&(from, to)) else { return };
        if queue.back() != Some(&wire) && queue.len() < QUEUE {
            queue.push_back(wire);
        }
    }

    /// Hands an event to a member that is up, and does what it wants.
    pub(super) fn give(&mut self, me: u8, event: Event, cause: Cause) -> Result<(), Violation> {
        let Some(mut member) = self.node(me).member.take() else { return Ok(()) };
        let waited = member.running_timers().any(|timer| timer == Timer::TakeoverWait);
        let mut out = Vec::new();
        // Timers do not go off by themselves here: only `Timer::Start` is ever due.
        member.handle(event, NOW, &mut out);
        self.node(me).member = Some(member);
        self.after_turn(me, waited, out, cause)
    }

    pub(super) fn let_go_off(&mut self, me: u8, timer: Timer, cause: Cause) -> Result<(), Violation> {
        let Some(mut member) = self.node(me).member.take() else { return Ok(()) };
        let waited = member.running_timers().any(|timer| timer == Timer::TakeoverWait);
        let mut out = Vec::new();
        member.let_go_off(timer, NOW, &mut out);
        self.node(me).member = Some(member);
        self.after_turn(me, waited, out, cause)
    }

    fn after_turn(&mut self, me: u8, waited: bool, out: Vec<Action>, cause: Cause) -> Result<(), Violation> {
        let waits = |world: &World| {
            let member = world.nodes[usize::from(me)].member.as_ref();
            member.is_some_and(|member| member.running_timers().any(|timer| timer == Timer::TakeoverWait))
        };
        let waits_now = waits(self);
        if waits_now && !waited {
            self.begin_wait(me);
        } else if waited && !waits_now {
            self.forget_wait(me);
        }
        for action in out {
            self.perform(me, action, cause)?;
        }
        self.normalise(me);
        Ok(())
    }

    /// Everything sent so far was sent before this wait.
    fn begin_wait(&mut self, me: u8) {
        self.change_covers(|covers| *covers |= 1 << me);
    }

    fn forget_wait(&mut self, me: u8) {
        self.change_covers(|covers| *covers &= !(1 << me));
    }

    /// The wait is over: so much time has passed that nothing sent before it carries a lease any more.
    pub(super) fn end_wait(&mut self, me: u8) {
        let bit = 1 << me;
        for node in &mut self.nodes {
            let old: Vec<u8> =
                node.last_ack.iter().filter(|&(_, c)| c & bit != 0).map(|(&peer, _)| peer).collect();
            for peer in old {
                node.last_ack.remove(&peer);
                if let Some(member) = &mut node.member {
                    member.age_acknowledgement(id(peer));
                }
            }
        }
        for node in self.nodes.iter_mut().filter(|node| node.heard.values().any(|c| c & bit != 0)) {
            if let Some(member) = &mut node.member {
                member.age_beacon();
            }
        }
        for wire in self.wires.values_mut().flatten() {
            if let Message::Beacon { sent_ns, .. } | Message::BeaconAck { sent_ns, .. } = &mut wire.message
                && wire.covers & bit != 0
            {
                *sent_ns = 0;
            }
        }
    }

    fn change_covers(&mut self, change: impl Fn(&mut u8)) {
        for node in &mut self.nodes {
            node.lease.iter_mut().for_each(&change);
            node.last_ack.values_mut().for_each(&change);
            node.heard.values_mut().for_each(&change);
        }
        for wire in self.wires.values_mut().flatten() {
            if let Message::Beacon { .. } | Message::BeaconAck { .. } = wire.message {
                change(&mut wire.covers);
            }
        }
    }

    fn normalise(&mut self, me: u8) {
        let nonce = self.free_nonce(me);
        let node = self.node(me);
        if let Some(member) = &mut node.member {
            member.renumber(nonce);
            if member.awaits().is_none() {
                node.pending = None;
            }
            if let Some((_, receipt)) = &mut node.writing {
                *receipt = Receipt(1);
            }
        }
        self.forget_lost_swaps();
        self.swaps.sort();
        self.swaps.dedup();
    }

    fn perform(&mut self, me: u8, action: Action, cause: Cause) -> Result<(), Violation> {
        let node = self.node(me);
        match action {
            Action::ReadRegister { register, .. } => node.pending = Some(Pending::Read(register)),
            Action::SwapRegister { expected, value, .. } => {
                node.pending = Some(Pending::Swap);
                let persisted = node.persisted.clone();
                for swap in self.swaps.iter_mut().filter(|swap| swap.node == me) {
                    swap.awaited = false;
                }
                self.ghost.swap_sent(me, &value, &persisted)?;
                let nonce = value.nonce.0;
                self.swaps.push(Swap { node: me, awaited: true, expected, nonce, value: OrdValue(value) });
            }
            Action::Persist { state, receipt } => node.writing = Some((state, receipt)),
            Action::Send { to, message, .. } => {
                // The acknowledgement carries the age of its beacon.
                let covers = match &message {
                    Message::BeaconAck { .. } => node.heard.get(&index(to)).copied().unwrap_or(0),
                    _ => 0,
                };
                if let Message::Nack { promise, .. } = message {
                    self.ghost.promised(me, promise);
                }
                self.push(me, index(to), Wire { message, covers });
            }
            Action::Activate { term, acknowledgers } => {
                node.follow = None;
                let lead = Lead {
                    term,
                    acknowledgers,
                    flow: Flow::Open,
                    serving: false,
                    views: BTreeMap::new(),
                    ready: Vec::new(),
                };
                node.lead = Some(lead);
                self.ghost.opened(me, term, self.nodes[usize::from(me)].usable)?;
            }
            Action::ContinueIn { term, acknowledgers } => {
                let lead = node.lead.as_mut().expect("it leads");
                lead.term = term;
                lead.need(acknowledgers);
                self.ghost.opened(me, term, true)?;
            }
            Action::SetAcknowledgers { nodes } => node.lead.as_mut().expect("it leads").need(nodes),
            Action::Freeze => node.lead.as_mut().expect("it leads").flow = Flow::Frozen,
            Action::Thaw => node.lead.as_mut().expect("it leads").flow = Flow::Open,
            Action::Drain { .. } => node.lead.as_mut().expect("it leads").flow = Flow::Draining,
            Action::Follow { primary, term } => {
                node.lead = None;
                node.follow = Some((index(primary), term));
            }
            Action::StepDown => {
                node.lead = None;
                node.follow = None;
            }
            Action::RunVm { .. } => {
                node.dying = false;
                if node.lease.is_some() {
                    node.vm = Vm::Running;
                }
                self.ghost.serves(&self.nodes[usize::from(me)])?;
                self.give(me, Event::VmRunning, Cause::Other)?;
            }
            Action::RenewLease { .. } => {
                // As old as the oldest of the newest acknowledgements it rests on.
                let members = node.member.as_ref().map(|member| member.status().acknowledgers);
                let others = members.iter().flat_map(|members| members.others(id(me)));
                let rests_on = others.map(|peer| node.last_ack.get(&index(peer)).copied().unwrap_or(0));
                let covers = if cause == Cause::Beacon { 0 } else { rests_on.fold(0, |all, one| all | one) };
                // A lease is never shortened by an older acknowledgement.
                node.lease = Some(node.lease.map_or(covers, |old| old & covers));
            }
            Action::PauseVm => {
                if node.vm == Vm::Running {
                    node.vm = Vm::Paused;
                }
            }
            Action::ResumeVm => {
                if node.lease.is_some() {
                    node.vm = Vm::Running;
                }
            }
            Action::ShutDownVm | Action::KillVm => {
                // It takes its time to go; until then only the lease stops it.
                if node.vm == Vm::Absent {
                    node.lease = None;
                    self.give(me, Event::VmStopped, Cause::Other)?;
                } else {
                    node.dying = true;
                }
            }
            Action::CloseSession { why, .. } => {
                return Err(Violation::Assertion { message: format!("an honest peer {why}") });
            }
            Action::InformRegister { .. } | Action::Report(_) => {}
        }
        Ok(())
    }

    /// What replication would tell its member: told in the same turn in which it becomes true.
    pub(super) fn tell_facts(&mut self) -> Result<(), Violation> {
        for me in 0..self.nodes.len() as u8 {
            while let Some(event) = self.next_fact(me) {
                self.give(me, event, Cause::Other)?;
            }
        }
        Ok(())
    }

    fn next_fact(&mut self, me: u8) -> Option<Event> {
        let node = &self.nodes[usize::from(me)];
        let (end, durable) = (node.log.len(), node.durable);
        let committed = self.committed(me)?;
        let stable = self.stable(me)?;
        let connected: Vec<u8> = self.peers_connected(me).collect();
        let lead = self.node(me).lead.as_mut()?;
        for peer in connected {
            let ready = lead.views.get(&peer).is_some_and(|&(a, d)| a == end && d >= stable.min(durable));
            let told = lead.ready.contains(&peer);
            if ready && !told {
                lead.ready.push(peer);
                return Some(Event::PeerCaughtUp { node: id(peer) });
            }
            if !ready && told {
                lead.ready.retain(|&other| other != peer);
                return Some(Event::PeerFellBehind { node: id(peer) });
            }
        }
        if !lead.serving && committed == end {
            lead.serving = true;
            return Some(Event::TailCommitted { term: lead.term });
        }
        if lead.flow == Flow::Draining && stable == end {
            lead.flow = Flow::Frozen;
            return Some(Event::Drained { term: lead.term });
        }
        None
    }

    /// Accepted by every acknowledger.
    pub(super) fn committed(&self, me: u8) -> Option<usize> {
        self.least(me, |node| node.log.len(), |view| view.0)
    }

    /// Durable on every acknowledger.
    pub(super) fn stable(&self, me: u8) -> Option<usize> {
        self.least(me, |node| node.durable, |view| view.1)
    }

    fn least(&self, me: u8, own: fn(&Node) -> usize, view: fn((usize, usize)) -> usize) -> Option<usize> {
        let node = &self.nodes[usize::from(me)];
        let lead = node.lead.as_ref()?;
        let others = lead.acknowledgers.others(id(me));
        let least = others.map(|peer| lead.views.get(&index(peer)).copied().map_or(0, view)).min();
        Some(least.unwrap_or(usize::MAX).min(own(node)))
    }
}

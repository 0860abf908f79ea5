//! What travels: sessions between the daemons, and requests to the witness.

use crate::agenda::Moment;
use crate::coverage::Kind;
use crate::faults::Planted;
use crate::network::{Arrival, Delivery};
use crate::world::{DaemonEvent, Event, Node, World};
use rempart_cluster::{ReadOutcome, RequestId, SwapOutcome};
use rempart_engine::{PeerMessage, RegisterReply, RegisterRequest};
use rempart_types::{NodeSet, SessionId};
use std::time::Duration;

/// The way from one node to the witness and back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WitnessPath {
    pub cut: bool,
    pub delay: std::ops::Range<Duration>,
    /// How many of a thousand requests, and how many answers, get lost.
    pub lost_requests: u32,
    pub lost_replies: u32,
    /// How many of a thousand requests arrive long after their author gave up.
    pub late_requests: u32,
}

impl Default for WitnessPath {
    fn default() -> WitnessPath {
        let delay = Duration::from_micros(200)..Duration::from_millis(2);
        WitnessPath { cut: false, delay, lost_requests: 0, lost_replies: 0, late_requests: 0 }
    }
}

/// A request on its way, with what the adapter needs to answer it.
pub(crate) type WitnessRequest = RegisterRequest;

/// A daemon's transport closes a session on which it heard nothing for so long.
const SILENCE: Duration = Duration::from_secs(5);
const LOOK_FOR_SILENCE: Duration = Duration::from_secs(1);
/// A register's adapter gives up after so long.
const REGISTER_DEADLINE: Duration = Duration::from_secs(1);

impl World {
    /// Tries to make a connection; goes on trying until there is one.
    pub(crate) fn connect(&mut self, a: usize, b: usize) {
        let awake = |node: usize| self.nodes[node].daemon.as_ref().is_some_and(|daemon| !daemon.frozen);
        let possible = awake(a) && awake(b) && self.network.reaches(a, b);
        if possible && self.network.between(a, b).is_none() {
            let now = self.now();
            let session = self.network.connect(a, b, now);
            // Nothing arrives at an end before that end knows of the connection.
            let delay = self.network.delay(a, b, &mut self.rng);
            for node in if self.rng.coin() { [a, b] } else { [b, a] } {
                let peer = if node == a { b } else { a };
                self.tell_daemon(node, delay, DaemonEvent::SessionOpen { session, peer });
            }
        }
        let pause = self.rng.duration(Duration::from_millis(50)..Duration::from_millis(400));
        self.after(pause, Event::Connect { a, b });
    }

    pub(crate) fn session_opened(&mut self, node: usize, session: SessionId) -> bool {
        let now = self.now();
        if !self.network.open(session, node, now) {
            return false;
        }
        self.after(LOOK_FOR_SILENCE, Event::KeepAlive { node, session });
        true
    }

    pub(crate) fn keep_alive(&mut self, node: usize, session: SessionId) {
        let Some(heard) = self.network.last_heard(session, node) else { return };
        let frozen = self.nodes[node].daemon.as_ref().is_none_or(|daemon| daemon.frozen);
        if !frozen && self.now().since(heard) > SILENCE {
            self.coverage.count(Kind::Reached, "session closed for silence");
            return self.reset(session);
        }
        self.after(LOOK_FOR_SILENCE, Event::KeepAlive { node, session });
    }

    /// The connection breaks: each end that can be reached learns of it in its own time.
    pub(crate) fn reset(&mut self, session: SessionId) {
        for node in 0..self.nodes.len() {
            if self.network.is_open(session, node) {
                let peer = self.network.peer(session, node).expect("an open session has two ends");
                let delay = self.rng.duration(Duration::ZERO..Duration::from_millis(3));
                self.tell_daemon(node, delay, DaemonEvent::SessionClosed { session, peer });
            }
        }
        self.network.break_session(session);
    }

    /// The daemon on `node` closes a session by its own will.
    pub(crate) fn close_session(&mut self, node: usize, session: SessionId) {
        let peer = self.network.peer(session, node);
        let was_open = self.network.close(session, node);
        let Some(peer) = peer.filter(|_| was_open) else { return };
        // The other end learns of it if a packet reaches it; else by silence.
        if self.network.reaches(node, peer) && self.network.is_open(session, peer) {
            let delay = self.network.delay(node, peer, &mut self.rng);
            self.tell_daemon(peer, delay, DaemonEvent::SessionClosed { session, peer: node });
        }
        // The engine that closes a session is told that it is closed, as by its transport.
        self.tell_daemon(node, Duration::ZERO, DaemonEvent::SessionClosed { session, peer });
    }

    pub(crate) fn send(&mut self, node: usize, session: SessionId, message: PeerMessage) {
        let now = self.now();
        if !self.network.is_open(session, node) {
            return;
        }
        // What is sent in pieces is received as one.
        let pieces = message.payload().len() > 1;
        let message = if pieces || self.rng.chance(20) { through_the_codec(&message) } else { message };
        if let Some(mut delivery) = self.network.send(session, node, now, &mut self.rng) {
            match self.options.planted {
                Some(Planted::MessagesReordered) if self.rng.chance(300) => {
                    delivery.at = delivery.at + Duration::from_millis(2);
                }
                Some(Planted::MessagesLost) if self.rng.chance(10) => return,
                _ => {}
            }
            let tie = self.rng.u64() as u32;
            self.agenda.at(delivery.at, tie, Event::Deliver { delivery, message });
        }
    }

    pub(crate) fn deliver(&mut self, delivery: Delivery, message: PeerMessage) {
        let now = self.now();
        match self.network.arrives(delivery, now) {
            Arrival::Lost => {
                if self.options.planted == Some(Planted::OldSessionsKept) {
                    self.deliver_to_successor(delivery, message);
                }
            }
            Arrival::Held => self.held.push((delivery, message)),
            Arrival::Now => {
                let Delivery { session, to, .. } = delivery;
                let peer = self.network.peer(session, to).expect("it just arrived");
                self.daemon_event(to, DaemonEvent::Message { session, peer, message });
            }
        }
    }

    /// A bug: it comes out of the session that replaced its own, once there is one.
    fn deliver_to_successor(&mut self, delivery: Delivery, message: PeerMessage) {
        let to = delivery.to;
        let alive = self.network.alive_at(to);
        let successor = self.network.open_at(to).into_iter().find(|session| alive.contains(session));
        match successor {
            Some(session) => {
                let peer = self.network.peer(session, to).expect("open");
                let delay = self.rng.duration(Duration::ZERO..Duration::from_millis(20));
                self.tell_daemon(to, delay, DaemonEvent::Message { session, peer, message });
            }
            None if self.now().since(delivery.at) < Duration::from_secs(5) => {
                self.after(Duration::from_millis(1), Event::Deliver { delivery, message });
            }
            None => {}
        }
    }

    /// The cables between `a` and `b` carry again what is sent from `a`, and what was held back.
    pub(crate) fn heal_direction(&mut self, from: usize, to: usize) {
        self.network.heal(from, to);
        let held = std::mem::take(&mut self.held);
        let mut at = self.now() + Duration::from_micros(10);
        for (delivery, message) in held {
            let same = delivery.to == to && self.network.peer(delivery.session, to) == Some(from);
            if same {
                at = at + Duration::from_nanos(1);
                self.agenda.at(at, 0, Event::Deliver { delivery: Delivery { at, ..delivery }, message });
            } else {
                self.held.push((delivery, message));
            }
        }
    }

    // --- the witness ---

    pub(crate) fn ask_witness(&mut self, node: usize, request: RegisterRequest) {
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let life = daemon.life;
        // The adapter answers in time, whatever becomes of the request.
        if let Some(reply) = no_answer(&request) {
            self.tell_daemon(node, REGISTER_DEADLINE, DaemonEvent::Register(reply));
        }
        let path = self.nodes[node].witness.clone();
        let mut delay = self.rng.duration(path.delay.clone());
        if self.rng.chance(path.late_requests) {
            self.coverage.count(Kind::Fault, "witness: late request");
            delay += self.rng.duration(Duration::from_millis(500)..Duration::from_secs(12));
        } else if path.cut || self.rng.chance(path.lost_requests) {
            self.coverage.count(Kind::Fault, "witness: lost request");
            return;
        }
        self.after(delay, Event::AtWitness { node, life, request });
    }

    pub(crate) fn at_witness(&mut self, node: usize, life: u64, request: RegisterRequest) {
        if !self.witness.up {
            let path = &self.nodes[node].witness;
            if let Some(reply) = no_answer(&request).filter(|_| self.witness.refuses && !path.cut) {
                let delay = self.rng.duration(path.delay.clone());
                self.after(delay, Event::Daemon { node, life, what: DaemonEvent::Register(reply) });
            }
            return;
        }
        let reply = match request {
            RegisterRequest::Read { request, register } => {
                let stale = self.options.planted == Some(Planted::StaleRegister) && self.rng.chance(900);
                let read =
                    if stale { self.witness.read_stale(register) } else { self.witness.read(register) };
                Some(read_reply(request, read))
            }
            RegisterRequest::Swap { request, register, mut expected, value } => {
                let before = self.in_sync_mask();
                if self.options.planted == Some(Planted::SwapIgnoresExpectation) {
                    expected = self.witness.value(register).map(|held| held.epoch);
                }
                let outcome = self.witness.swap(register, expected, &value);
                if outcome == SwapOutcome::Won {
                    self.tell(|| {
                        let members: Vec<String> =
                            value.in_sync.iter().map(|id| format!("{:x}", id.0)).collect();
                        let members = members.join(",");
                        format!(
                            "witness: epoch {} primary {:x} in sync {{{members}}} {:?}",
                            value.epoch, value.primary.0, value.intent
                        )
                    });
                    self.register_changed(before, &value);
                }
                Some(swap_reply(request, outcome))
            }
            RegisterRequest::Inform { register, known, promise } => {
                let id = self.nodes[node].id;
                let amnesiac = self.witness.is_amnesiac(register);
                let replicas = self.replicas();
                self.witness.inform(id, register, known, promise, &replicas);
                if amnesiac && !self.witness.is_amnesiac(register) {
                    self.reached("amnesiac witness restored");
                    // A change that nobody was told of is gone, and its epoch is free again.
                    self.checker.register_restored();
                }
                None
            }
        };
        let path = &self.nodes[node].witness;
        let (cut, lost, delay) = (path.cut, path.lost_replies, path.delay.clone());
        let Some(reply) = reply else { return };
        if cut || self.rng.chance(lost) {
            return self.coverage.count(Kind::Fault, "witness: lost reply");
        }
        let delay = self.rng.duration(delay);
        self.after(delay, Event::Daemon { node, life, what: DaemonEvent::Register(reply) });
    }

    /// The nodes that hold the group: all but one that was taken out and has dropped it.
    fn replicas(&self) -> NodeSet {
        let removed = self.operator.removed();
        let holds = |node: &&Node| !(node.stays_down && removed == Some(node.id));
        self.nodes.iter().filter(holds).map(|node| node.id).collect()
    }

    /// The in-sync set by the register, a bit a node.
    pub(crate) fn in_sync_mask(&self) -> u8 {
        let Some(value) = self.witness.current() else { return 0 };
        self.nodes
            .iter()
            .enumerate()
            .filter(|(_, node)| value.in_sync.contains(node.id))
            .fold(0, |mask, (index, _)| mask | 1 << index)
    }

    fn register_changed(&mut self, before: u8, value: &rempart_types::RegisterValue) {
        let after = self.in_sync_mask();
        for node in (0..self.nodes.len()).filter(|node| after & !before >> node & 1 == 1) {
            self.history.memory_restored(node);
        }
        let now = self.now();
        self.note_lost(after, now);
        let result = self.checker.register_changed(value, now);
        self.must(result);
    }
}

impl World {
    /// A member that lost its power may lead without what no flush covers, before it caught up.
    fn note_lost(&mut self, in_sync: u8, now: Moment) {
        let members = self.nodes.iter().enumerate().filter(|(index, _)| in_sync >> index & 1 == 1);
        let engines: Vec<_> =
            members.filter_map(|(_, node)| node.daemon.as_ref().map(|daemon| &daemon.engine)).collect();
        let book = &self.book;
        let holds = |tag| {
            book.place_of(tag).is_some_and(|(term, lsn)| {
                let held = |engine: &&rempart_engine::Engine| {
                    engine.glance().end >= lsn && engine.lineage().term_at(lsn) == Some(term)
                };
                engines.iter().any(held)
            })
        };
        self.history.in_sync_is(in_sync, now, holds);
    }
}

/// What the adapter says when nobody served it.
fn no_answer(request: &RegisterRequest) -> Option<RegisterReply> {
    match request {
        RegisterRequest::Read { request, .. } => Some(read_reply(*request, ReadOutcome::Unreachable)),
        RegisterRequest::Swap { request, .. } => Some(swap_reply(*request, SwapOutcome::Unknown)),
        RegisterRequest::Inform { .. } => None,
    }
}

fn read_reply(request: RequestId, outcome: ReadOutcome) -> RegisterReply {
    RegisterReply::Read { request, outcome }
}

fn swap_reply(request: RequestId, outcome: SwapOutcome) -> RegisterReply {
    RegisterReply::Swapped { request, outcome }
}

/// As it comes out at the other end of a real connection.
fn through_the_codec(message: &PeerMessage) -> PeerMessage {
    let mut payload = Vec::with_capacity(message.payload_len());
    for piece in message.payload() {
        payload.extend_from_slice(piece);
    }
    let decoded = PeerMessage::decode(&message.encode(), payload.into());
    decoded.expect("what is encoded can be decoded")
}

//! Connections between the nodes.
//!
//! A session is what two daemons see of one connection: its messages arrive in order or not at all. Loss shows as
//! a reset, a cut cable as silence: a message sent into a cut direction arrives when the cable is back, unless the
//! session was closed meanwhile. Two sessions of one pair may overlap, and then their messages interleave.

use crate::agenda::Moment;
use crate::rng::Rng;
use rempart_types::SessionId;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// One direction between two nodes.
#[derive(Debug, Clone)]
struct Direction {
    cut: bool,
    delay: std::ops::Range<Duration>,
}

#[derive(Debug)]
struct End {
    /// Its daemon was told that the session is open, and not yet that it is closed.
    open: bool,
    /// Messages on their way to this end, in order.
    queue: VecDeque<Moment>,
    last_due: Moment,
    last_heard: Moment,
}

#[derive(Debug)]
struct Session {
    nodes: [usize; 2],
    ends: [End; 2],
    /// Nothing arrives any more; the ends learn of it one by one.
    broken: bool,
}

/// A message on its way. The world plans it and asks [`Network::arrives`] when it is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    pub session: SessionId,
    pub to: usize,
    pub at: Moment,
}

/// What becomes of a message when it is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    Now,
    /// The cable is cut: ask again when it is back.
    Held,
    Lost,
}

/// Every cable and every session. It carries no messages: the world keeps those with its planned events.
#[derive(Debug)]
pub struct Network {
    nodes: usize,
    directions: Vec<Direction>,
    sessions: BTreeMap<SessionId, Session>,
    next_session: u64,
    pub counts: NetworkCounts,
}

/// How much the network did, for the end-of-campaign report.
#[derive(Debug, Clone, Copy, Default)]
pub struct NetworkCounts {
    pub delivered: u64,
    pub lost: u64,
    pub held: u64,
}

impl Network {
    pub fn new(nodes: usize, rng: &mut Rng) -> Network {
        let mut direction = || {
            let least = rng.duration(Duration::from_micros(20)..Duration::from_micros(500));
            Direction { cut: false, delay: least..least * 3 }
        };
        let directions = (0..nodes * nodes).map(|_| direction()).collect();
        let counts = NetworkCounts::default();
        Network { nodes, directions, sessions: BTreeMap::new(), next_session: 1, counts }
    }

    fn direction(&mut self, from: usize, to: usize) -> &mut Direction {
        &mut self.directions[from * self.nodes + to]
    }

    pub fn set_delay(&mut self, from: usize, to: usize, delay: std::ops::Range<Duration>) {
        self.direction(from, to).delay = delay;
    }

    pub fn cut(&mut self, from: usize, to: usize) {
        self.direction(from, to).cut = true;
    }

    /// Returns the sessions whose held messages may now arrive at `to`.
    pub fn heal(&mut self, from: usize, to: usize) {
        self.direction(from, to).cut = false;
    }

    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        self.directions[from * self.nodes + to].cut
    }

    /// Both directions work: a connection can be made.
    pub fn reaches(&self, a: usize, b: usize) -> bool {
        !self.is_cut(a, b) && !self.is_cut(b, a)
    }

    pub fn delay(&mut self, from: usize, to: usize, rng: &mut Rng) -> Duration {
        let range = self.direction(from, to).delay.clone();
        rng.duration(range)
    }

    /// A new connection between two nodes. Neither end knows of it yet.
    pub fn connect(&mut self, a: usize, b: usize, now: Moment) -> SessionId {
        let id = SessionId(self.next_session);
        self.next_session += 1;
        let end = || End { open: false, queue: VecDeque::new(), last_due: now, last_heard: now };
        self.sessions.insert(id, Session { nodes: [a, b], ends: [end(), end()], broken: false });
        id
    }

    /// The daemon on `node` is told of the session. False: it broke before.
    pub fn open(&mut self, id: SessionId, node: usize, now: Moment) -> bool {
        let Some(session) = self.sessions.get_mut(&id) else { return false };
        let end = &mut session.ends[usize::from(session.nodes[1] == node)];
        if session.broken {
            return false;
        }
        end.open = true;
        end.last_heard = now;
        true
    }

    /// A live session that both ends know or will know of.
    pub fn between(&self, a: usize, b: usize) -> Option<SessionId> {
        let joins = |session: &Session| session.nodes == [a, b] || session.nodes == [b, a];
        self.sessions.iter().find(|(_, session)| !session.broken && joins(session)).map(|(&id, _)| id)
    }

    /// The node at the other end.
    pub fn peer(&self, id: SessionId, node: usize) -> Option<usize> {
        let session = self.sessions.get(&id)?;
        Some(if session.nodes[0] == node { session.nodes[1] } else { session.nodes[0] })
    }

    /// `from` sends; `None` when the session is no more.
    pub fn send(&mut self, id: SessionId, from: usize, now: Moment, rng: &mut Rng) -> Option<Delivery> {
        let to = self.peer(id, from)?;
        let delay = self.delay(from, to, rng);
        let session = self.sessions.get_mut(&id)?;
        if session.broken {
            self.counts.lost += 1;
            return None;
        }
        let end = &mut session.ends[usize::from(session.nodes[1] == to)];
        end.last_due = (now + delay).max(end.last_due + Duration::from_nanos(1));
        end.queue.push_back(end.last_due);
        Some(Delivery { session: id, to, at: end.last_due })
    }

    /// A message is due: does it arrive?
    pub fn arrives(&mut self, delivery: Delivery, now: Moment) -> Arrival {
        let Some(session) = self.sessions.get(&delivery.session) else {
            self.counts.lost += 1;
            return Arrival::Lost;
        };
        let index = usize::from(session.nodes[1] == delivery.to);
        let from = session.nodes[1 - index];
        if session.broken {
            self.counts.lost += 1;
            return Arrival::Lost;
        }
        if self.is_cut(from, delivery.to) {
            self.counts.held += 1;
            return Arrival::Held;
        }
        let end = &mut self.sessions.get_mut(&delivery.session).expect("found above").ends[index];
        end.queue.pop_front();
        end.last_heard = now;
        self.counts.delivered += 1;
        Arrival::Now
    }

    /// When `node` last heard anything on the session; `None` if it does not have it open.
    pub fn last_heard(&self, id: SessionId, node: usize) -> Option<Moment> {
        let session = self.sessions.get(&id)?;
        let end = &session.ends[usize::from(session.nodes[1] == node)];
        end.open.then_some(end.last_heard)
    }

    pub fn is_open(&self, id: SessionId, node: usize) -> bool {
        self.last_heard(id, node).is_some()
    }

    /// Nothing arrives on it any more; its ends have to be told with [`close`](Network::close).
    pub fn break_session(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.broken = true;
            session.ends.iter_mut().for_each(|end| end.queue.clear());
            self.forget_if_closed(id);
        }
    }

    /// The daemon on `node` closed it, or was told that it broke, or died. True if it had it open.
    pub fn close(&mut self, id: SessionId, node: usize) -> bool {
        let Some(session) = self.sessions.get_mut(&id) else { return false };
        session.broken = true;
        let end = &mut session.ends[usize::from(session.nodes[1] == node)];
        let was_open = std::mem::replace(&mut end.open, false);
        self.forget_if_closed(id);
        was_open
    }

    fn forget_if_closed(&mut self, id: SessionId) {
        if self.sessions.get(&id).is_some_and(|s| s.broken && s.ends.iter().all(|end| !end.open)) {
            self.sessions.remove(&id);
        }
    }

    /// Every session that `node` has open.
    pub fn open_at(&self, node: usize) -> Vec<SessionId> {
        let open = |(&id, _): (&SessionId, &Session)| self.is_open(id, node).then_some(id);
        self.sessions.iter().filter(|(_, s)| s.nodes.contains(&node)).filter_map(open).collect()
    }

    /// Every session of `node` that can still carry messages, known to its daemon or not.
    pub fn alive_at(&self, node: usize) -> Vec<SessionId> {
        let alive = |s: &Session| s.nodes.contains(&node) && !s.broken;
        self.sessions.iter().filter(|(_, s)| alive(s)).map(|(&id, _)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_cable_holds_messages_and_a_reset_loses_them() {
        let mut rng = Rng::new(1);
        let mut network = Network::new(2, &mut rng);
        let id = network.connect(0, 1, Moment(0));
        assert!(network.open(id, 0, Moment(0)) && network.open(id, 1, Moment(0)));
        let first = network.send(id, 0, Moment(5), &mut rng).unwrap();
        let second = network.send(id, 0, Moment(5), &mut rng).unwrap();
        assert!(first.at < second.at, "in order");
        network.cut(0, 1);
        assert_eq!(network.arrives(first, first.at), Arrival::Held);
        network.heal(0, 1);
        assert_eq!(network.arrives(first, second.at), Arrival::Now);
        network.break_session(id);
        assert_eq!(network.arrives(second, second.at), Arrival::Lost);
        assert!(network.is_open(id, 0), "an end learns of the break later");
        assert!(network.close(id, 0) && network.close(id, 1));
        assert_eq!(network.send(id, 0, Moment(9), &mut rng), None);
    }
}

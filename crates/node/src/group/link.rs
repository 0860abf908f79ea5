//! The group's connections with its peers.

use rempart_engine::PeerMessage;
use rempart_nbd::poller::{Poller, Ready};
use rempart_transport::{Connection, Frame, SilenceDetector};
use rempart_types::{MonotonicTime, NodeId, SessionId};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// A message of the engines.
const KIND_MESSAGE: u16 = 16;
/// Nothing but a sign of life.
const KIND_ALIVE: u16 = 17;

/// How long a link may be silent, and how often it is not.
#[derive(Debug, Clone, Copy)]
pub struct LinkTimes {
    pub silence: Duration,
    pub alive_every: Duration,
}

#[derive(Debug)]
struct Link {
    session: SessionId,
    connection: Connection,
    watched: (bool, bool),
    silence: SilenceDetector,
    last_sent: MonotonicTime,
    received_bytes: u64,
    dirty: bool,
}

#[derive(Debug)]
pub struct Links {
    links: BTreeMap<NodeId, Link>,
    next_session: u64,
    first_key: u64,
    last_key: u64,
    times: LinkTimes,
    frames: VecDeque<Frame>,
    /// Messages were queued since the last flush.
    unsent: bool,
}

/// Why a link ended.
#[derive(Debug)]
pub struct LinkEnd {
    pub peer: NodeId,
    pub session: SessionId,
    pub why: String,
}

impl Links {
    /// Keys from `first_key` up to `last_key` are the links' in the poller.
    pub fn new(first_key: u64, last_key: u64, times: LinkTimes) -> Links {
        Links {
            links: BTreeMap::new(),
            next_session: 0,
            first_key,
            last_key,
            times,
            frames: VecDeque::new(),
            unsent: false,
        }
    }

    pub fn owns(&self, key: u64) -> bool {
        (self.first_key..=self.last_key).contains(&key)
    }

    pub fn connected(&self, peer: NodeId) -> bool {
        self.links.contains_key(&peer)
    }

    /// Takes a new connection; an older one with the same peer ends.
    pub fn add(
        &mut self,
        peer: NodeId,
        connection: Connection,
        now: MonotonicTime,
        poller: &Poller,
    ) -> (Option<LinkEnd>, Result<SessionId, String>) {
        let old = self.end(peer, None, "a newer connection replaced it", poller);
        self.next_session += 1;
        let session = SessionId(self.next_session);
        let key = self.key(session);
        if let Err(error) = poller.add(&connection, key, false) {
            return (old, Err(error.to_string()));
        }
        let mut silence = SilenceDetector::new(self.times.silence, now);
        silence.expect(now);
        let watched = (true, false);
        let link =
            Link { session, connection, watched, silence, last_sent: now, received_bytes: 0, dirty: true };
        self.links.insert(peer, link);
        (old, Ok(session))
    }

    /// The key of the link with `peer`, to be read from once when it is new.
    pub fn key_of(&self, peer: NodeId) -> Option<u64> {
        self.links.get(&peer).map(|link| self.key(link.session))
    }

    fn key(&self, session: SessionId) -> u64 {
        self.first_key + session.0 % (self.last_key - self.first_key + 1)
    }

    fn by_key(&self, key: u64) -> Option<NodeId> {
        self.links.iter().find(|(_, link)| self.key(link.session) == key).map(|(peer, _)| *peer)
    }

    /// Ends the link with `peer`, if it is still in `session`.
    pub fn end(
        &mut self,
        peer: NodeId,
        session: Option<SessionId>,
        why: &str,
        poller: &Poller,
    ) -> Option<LinkEnd> {
        let link = self.links.get(&peer)?;
        if session.is_some_and(|session| session != link.session) {
            return None;
        }
        let link = self.links.remove(&peer)?;
        poller.remove(&link.connection);
        Some(LinkEnd { peer, session: link.session, why: why.to_owned() })
    }

    /// Reads what came; messages go to `take`.
    pub fn ready(
        &mut self,
        ready: Ready,
        now: MonotonicTime,
        poller: &Poller,
        mut take: impl FnMut(NodeId, SessionId, PeerMessage),
    ) -> Option<LinkEnd> {
        let peer = self.by_key(ready.key)?;
        let link = self.links.get_mut(&peer)?;
        link.dirty |= ready.writable;
        if !ready.readable {
            return None;
        }
        let session = link.session;
        let result = link.connection.on_readable(&mut self.frames);
        if link.connection.received_bytes() != link.received_bytes {
            link.received_bytes = link.connection.received_bytes();
            link.silence.heard(now);
        }
        link.dirty = true;
        let mut broken = None;
        for frame in self.frames.drain(..) {
            match frame.kind {
                KIND_MESSAGE => match PeerMessage::decode(&frame.meta, frame.payload) {
                    Ok(message) => take(peer, session, message),
                    Err(error) => broken = Some(error.to_string()),
                },
                KIND_ALIVE => {}
                // A newer minor version may say more; what we do not know is not for us.
                _ => {}
            }
        }
        let why = match (result, broken) {
            (_, Some(why)) => why,
            (Ok(rempart_transport::ReadStatus::Closed), _) => "the peer closed it".to_owned(),
            (Err(error), _) => error.to_string(),
            (Ok(_), None) => return None,
        };
        self.end(peer, Some(session), &why, poller)
    }

    /// Queues a message, if `session` is still the one with that peer.
    pub fn send(
        &mut self,
        peer: NodeId,
        session: SessionId,
        message: &PeerMessage,
        poller: &Poller,
    ) -> Option<LinkEnd> {
        let link = self.links.get_mut(&peer).filter(|link| link.session == session)?;
        link.dirty = true;
        self.unsent = true;
        match link.connection.send_parts(KIND_MESSAGE, message.encode(), message.payload()) {
            Ok(()) => None,
            Err(error) => self.end(peer, Some(session), &error.to_string(), poller),
        }
    }

    /// Whether messages wait for [`Links::flush`].
    pub fn has_unsent(&self) -> bool {
        self.unsent
    }

    /// Sends what was queued, and a sign of life where nothing was for a while; ends links that fell silent.
    pub fn flush(&mut self, now: MonotonicTime, poller: &Poller, ended: &mut Vec<LinkEnd>) {
        self.unsent = false;
        let mut broken = Vec::new();
        let alive_every = self.times.alive_every;
        let (first, span) = (self.first_key, self.last_key - self.first_key + 1);
        for (&peer, link) in &mut self.links {
            if link.silence.is_silent(now) {
                broken.push((peer, "the peer was silent for too long".to_owned()));
                continue;
            }
            if now >= link.last_sent + alive_every && link.connection.queued_bytes() == 0 {
                link.dirty = true;
                if let Err(error) = link.connection.send_parts(KIND_ALIVE, Vec::new(), &[]) {
                    broken.push((peer, error.to_string()));
                    continue;
                }
            }
            if !link.dirty {
                continue;
            }
            link.dirty = false;
            let before = link.connection.sent_bytes();
            if let Err(error) = link.connection.on_writable() {
                broken.push((peer, error.to_string()));
                continue;
            }
            if link.connection.sent_bytes() != before {
                link.last_sent = now;
            }
            let interest = link.connection.interest();
            let wanted = (interest.readable, interest.writable);
            if wanted != link.watched {
                link.watched = wanted;
                if let Err(error) =
                    poller.change(&link.connection, first + link.session.0 % span, wanted.0, wanted.1)
                {
                    broken.push((peer, error.to_string()));
                }
            }
        }
        for (peer, why) in broken {
            ended.extend(self.end(peer, None, &why, poller));
        }
    }

    /// When `flush` has something to do even if nothing happens.
    pub fn next_wake(&self) -> Option<MonotonicTime> {
        let wake = |link: &Link| {
            link.silence
                .deadline()
                .map_or(MonotonicTime::FAR_FUTURE, |at| at)
                .min(link.last_sent + self.times.alive_every)
        };
        self.links.values().map(wake).min()
    }
}

//! How a group's log becomes the same on every replica, without I/O, clock or threads.
//!
//! A primary counts what it and its peers hold, derives *committed* and *stable* from it, and takes each peer from
//! an unknown state to the end of its log. A follower checks session, term and order. Guest bytes never pass
//! through here. The rules are those of `docs/architecture.md`.

mod adoption;
mod config;
mod event;
mod follower;
mod leader;
mod link;
mod local;
mod message;
mod quorum;
mod recent;
mod source;
mod status;
mod sync_queue;
mod target;

pub use config::Config;
pub use event::{Action, BatchInfo, Event, FlushId, Report};
pub use message::{
    Digest, ExtentPiece, LogState, Message, REGION_EXTENTS, Region, RegionBits, ResyncMode, Syncing,
};
pub use status::{PeerProgress, PeerStatus, Status};

use follower::Follower;
use leader::Leader;
use local::Local;
use rempart_types::{Epoch, Lineage, Lsn, MonotonicTime, NodeId, SessionId, Term};
use std::collections::BTreeMap;

/// What recovery found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    pub state: LogState,
    /// By what the next batch names what ends where the image is.
    pub applied_chain: Option<u32>,
    /// The first record the journal can still give.
    pub journal_start: Lsn,
    /// Terms of older epochs are refused.
    pub promise: Epoch,
    /// No resync is unfinished.
    pub whole: bool,
    /// Sizes of the disks in bytes, by index.
    pub disks: Vec<u64>,
}

#[derive(Debug)]
enum Role {
    /// Neither leads nor follows.
    Idle,
    Leader(Box<Leader>),
    Follower(Box<Follower>),
}

/// One replica's replication of one group.
#[derive(Debug)]
pub struct Replication {
    local: Local,
    role: Role,
    sessions: BTreeMap<NodeId, SessionId>,
    /// Peers that said in their session that they lead in this term, and were not answered yet.
    probes: BTreeMap<NodeId, Term>,
    /// Whom cluster allows to be followed, and from which term on.
    allowed: Option<(NodeId, Term)>,
}

impl Replication {
    pub fn new(node: NodeId, config: Config, recovered: Recovered) -> Replication {
        Replication {
            local: Local::new(node, config, recovered),
            role: Role::Idle,
            sessions: BTreeMap::new(),
            probes: BTreeMap::new(),
            allowed: None,
        }
    }

    /// Takes one fact; appends what follows from it to `out`.
    pub fn handle(&mut self, event: Event, now: MonotonicTime, out: &mut Vec<Action>) {
        self.dispatch(event, now, out);
        if self.local.sync.submit(self.local.accepted) {
            out.push(Action::Sync);
        }
    }

    fn dispatch(&mut self, event: Event, now: MonotonicTime, out: &mut Vec<Action>) {
        let local = &mut self.local;
        match event {
            Event::Sealed { batch, sync } => {
                let Role::Leader(leader) = &mut self.role else { panic!("only a leader writes records") };
                leader.sealed(&batch, sync, local, now, out);
            }
            Event::Accepted(lsn) => {
                // A completion may come after a truncation was ordered, for what is being dropped.
                local.accepted = local.accepted.max(lsn.min(local.end));
                self.after_store_progress(now, out);
            }
            Event::Durable(lsn) => {
                local.durable = local.durable.max(lsn.min(local.end));
                local.sync.durable(lsn);
                self.after_store_progress(now, out);
            }
            Event::Applied { upto, chain } => {
                if upto > local.applied {
                    (local.applied, local.applied_chain) = (upto, chain);
                }
            }
            Event::Flush { id, all } => {
                let Role::Leader(leader) = &mut self.role else { panic!("only a leader is asked to flush") };
                leader.flush(id, all, local, now, out);
            }
            Event::Received { peer, session, message, bytes } => {
                if self.sessions.get(&peer) == Some(&session) {
                    self.received(peer, session, message, bytes, now, out);
                }
            }
            Event::Connected { peer, session } => {
                self.disconnected(peer, now, out);
                self.sessions.insert(peer, session);
                if let Role::Leader(leader) = &mut self.role {
                    leader.connected(peer, session, now, out);
                }
            }
            Event::Disconnected { peer, session } => {
                if self.sessions.get(&peer) == Some(&session) {
                    self.disconnected(peer, now, out);
                }
            }
            Event::Lead { term, acknowledgers } => {
                assert!(term > local.lineage.last_term(), "a term is opened once, above all that were");
                self.probes.clear();
                self.allowed = None;
                self.role =
                    Role::Leader(Box::new(Leader::new(term, acknowledgers, &self.sessions, local, now, out)));
            }
            Event::Continue { term, acknowledgers } => {
                let Role::Leader(leader) = &mut self.role else { panic!("only a leader goes on leading") };
                leader.continue_in(term, acknowledgers, local, now, out);
            }
            Event::Acknowledgers(nodes) => {
                if let Role::Leader(leader) = &mut self.role {
                    leader.set_acknowledgers(nodes, local, now, out);
                }
            }
            Event::Follow { leader, term } => self.follow(leader, term, out),
            Event::StepDown => {
                if matches!(self.role, Role::Leader(_)) {
                    out.push(Action::KeepJournal { after: None });
                }
                self.role = Role::Idle;
                self.allowed = None;
            }
            Event::Promised { epoch } => local.promise = local.promise.max(epoch),
            Event::HoldBack { peer, until } => {
                if let Role::Leader(leader) = &mut self.role {
                    leader.hold_back(peer, until, local, now, out);
                }
            }
            Event::AppendRefused { end } => {
                local.truncate(end, out);
                match &mut self.role {
                    Role::Leader(leader) => leader.append_refused(local, out),
                    Role::Follower(follower) => follower.close("sent records that do not fit", out),
                    Role::Idle => {}
                }
            }
            Event::StoreRefused { syncing, whole } => {
                local.busy -= 1;
                local.starting_log = None;
                local.syncing.take_if(|_| !syncing);
                local.whole = whole;
                if let Role::Follower(follower) = &mut self.role {
                    follower.close("asks for what this copy cannot do", out);
                    follower.answer(local, out);
                }
            }
            Event::Truncated { end } => {
                local.busy -= 1;
                local.truncate(end, out);
                match &mut self.role {
                    Role::Follower(follower) => follower.truncation_done(end, local, out),
                    Role::Leader(leader) => leader.gather(local, now, out),
                    Role::Idle => {}
                }
            }
            Event::LogRead { peer, session, after, batches } => {
                if self.sessions.get(&peer) == Some(&session) {
                    match &mut self.role {
                        Role::Leader(leader) => {
                            leader.log_read(peer, session, after, &batches, local, now, out)
                        }
                        Role::Follower(follower) if follower.leader == peer => {
                            follower.log_read(&batches, local, out);
                        }
                        _ => {}
                    }
                }
            }
            Event::LogGone { peer, session, after, oldest } => {
                local.journal_start = oldest;
                if let Role::Leader(leader) = &mut self.role {
                    leader.log_gone(peer, session, after, now, out);
                }
            }
            // A round of resync whose log is gone goes on: the next round needs only what changed since it began.
            Event::JournalStart(start) => local.journal_start = start,
            Event::Disks(disks) => local.disks = disks,
            Event::ApproveOverwrite { peer } => {
                if let Role::Leader(leader) = &mut self.role {
                    leader.approve_overwrite(peer, local, now, out);
                }
            }
            Event::MayOverwrite => local.may_overwrite = true,
            Event::LimitResync { bytes_per_second } => local.bucket.set_rate(bytes_per_second),
            Event::Tick => {
                if let Role::Leader(leader) = &mut self.role {
                    leader.tick(local, now, out);
                }
            }
            event => self.resync_event(event, now, out),
        }
    }

    fn resync_event(&mut self, event: Event, now: MonotonicTime, out: &mut Vec<Action>) {
        let local = &mut self.local;
        match event {
            Event::ResyncSetAside { round } => {
                local.busy -= 1;
                if let Role::Follower(follower) = &mut self.role {
                    follower.set_aside(round, local, out);
                }
            }
            Event::RegionKnown { round, region, changed, digests } => {
                if let Role::Follower(follower) = &mut self.role {
                    follower.region_known(round, region, changed, digests, local, out);
                }
            }
            Event::ExtentsWritten { round, sequence } => {
                if let Role::Follower(follower) = &mut self.role {
                    follower.extents_written(round, sequence, local, out);
                }
            }
            Event::ResyncLogStarted { from } => {
                local.busy -= 1;
                local.log_started(from, out);
                if let Role::Follower(follower) = &mut self.role {
                    follower.log_started(from, local, out);
                }
            }
            Event::Whole => local.whole = true,
            Event::RegionRead { round, region, pieces, bytes, next } => {
                if let Role::Leader(leader) = &mut self.role {
                    let term = leader.term;
                    for link in leader.links.values_mut() {
                        link.region_read((round, region), pieces.clone(), bytes, next, term, local, now, out);
                    }
                }
            }
            Event::ResyncBroken { round } => match &mut self.role {
                Role::Leader(leader) => leader.resync_broken(round, now, out),
                Role::Follower(follower) => {
                    follower.send(Message::ResyncFailed { term: follower.term, round }, None, out);
                }
                Role::Idle => {}
            },
            event => unreachable!("{event:?} is handled elsewhere"),
        }
    }

    fn after_store_progress(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        match &mut self.role {
            Role::Leader(leader) => leader.advance(&mut self.local, now, out),
            Role::Follower(follower) => follower.answer(&self.local, out),
            Role::Idle => {}
        }
    }

    fn received(
        &mut self,
        peer: NodeId,
        session: SessionId,
        message: Message,
        bytes: u64,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        if let (Role::Leader(leader), Message::ResyncFailed { .. }) = (&mut self.role, &message) {
            return leader.received(peer, message, bytes, &mut self.local, now, out);
        }
        if message.is_from_leader() || matches!(message, Message::ResyncFailed { .. }) {
            match &mut self.role {
                Role::Follower(follower) if follower.leader == peer && follower.session == session => {
                    follower.received(message, bytes, &mut self.local, now, out);
                }
                _ => match message {
                    Message::Probe { term } => self.probed(peer, session, term, out),
                    // It does not know yet that this replica stopped following it, in this very session.
                    message if message.is_from_leader() => {
                        let (term, promise) = (message.term(), self.highest_promise());
                        let message = Message::Refused { term, promise };
                        out.push(Action::Send { peer, session, message, payload: None });
                    }
                    _ => {}
                },
            }
        } else if let Role::Leader(leader) = &mut self.role {
            leader.received(peer, message, bytes, &mut self.local, now, out);
        }
    }

    /// Nobody below this epoch is followed.
    fn highest_promise(&self) -> Epoch {
        let leading = match &self.role {
            Role::Leader(leader) => leader.term.epoch,
            _ => Epoch::ZERO,
        };
        self.local.promise.max(leading)
    }

    /// Somebody says that it leads. It is answered when cluster allows to follow it.
    fn probed(&mut self, peer: NodeId, session: SessionId, term: Term, out: &mut Vec<Action>) {
        let promise = self.highest_promise();
        let older_incarnation = matches!(&self.role, Role::Leader(leader) if term <= leader.term);
        if term.epoch < promise || older_incarnation {
            let message = Message::Refused { term, promise };
            out.push(Action::Send { peer, session, message, payload: None });
            return;
        }
        self.probes.insert(peer, term);
        self.answer_probe(out);
    }

    fn answer_probe(&mut self, out: &mut Vec<Action>) {
        let Some((leader, from_term)) = self.allowed else { return };
        let (Some(&term), Some(&session)) = (self.probes.get(&leader), self.sessions.get(&leader)) else {
            return;
        };
        if matches!(self.role, Role::Leader(_)) || term < from_term {
            return;
        }
        self.probes.remove(&leader);
        self.role = Role::Follower(Box::new(Follower::new(leader, session, term, &self.local, out)));
    }

    fn follow(&mut self, leader: NodeId, term: Term, out: &mut Vec<Action>) {
        self.allowed = Some((leader, term));
        match &self.role {
            Role::Leader(_) => panic!("a leader steps down before it follows"),
            Role::Follower(follower) if follower.leader != leader => self.role = Role::Idle,
            _ => {}
        }
        self.answer_probe(out);
    }

    fn disconnected(&mut self, peer: NodeId, now: MonotonicTime, out: &mut Vec<Action>) {
        self.sessions.remove(&peer);
        self.probes.remove(&peer);
        match &mut self.role {
            Role::Leader(leader) => leader.disconnected(peer, &mut self.local, now, out),
            Role::Follower(follower) if follower.leader == peer => self.role = Role::Idle,
            _ => {}
        }
    }

    /// Everything ready in this turn was handed in: sends the acknowledgements and requests that were held back
    /// to be sent once.
    pub fn end_turn(&mut self, _now: MonotonicTime, out: &mut Vec<Action>) {
        match &mut self.role {
            Role::Leader(leader) => leader.end_turn(out),
            Role::Follower(follower) => follower.end_turn(&self.local, out),
            Role::Idle => {}
        }
    }

    /// When `Event::Tick` is wanted next.
    pub fn next_wake(&self, now: MonotonicTime) -> Option<MonotonicTime> {
        match &self.role {
            Role::Leader(leader) => leader.next_wake(&self.local, now),
            _ => None,
        }
    }

    pub fn lineage(&self) -> &Lineage {
        &self.local.lineage
    }

    /// The term that records are written in now, by this replica.
    pub fn leads_in(&self) -> Option<Term> {
        match &self.role {
            Role::Leader(leader) => Some(leader.term),
            _ => None,
        }
    }

    /// The session with `peer` now.
    pub fn session(&self, peer: NodeId) -> Option<SessionId> {
        self.sessions.get(&peer).copied()
    }

    /// The last record given to the store, or sealed and about to be.
    pub fn end(&self) -> Lsn {
        self.local.end
    }

    pub fn accepted(&self) -> Lsn {
        self.local.accepted
    }

    pub fn durable(&self) -> Lsn {
        self.local.durable
    }

    pub fn committed(&self) -> Lsn {
        self.local.committed
    }

    pub fn stable(&self) -> Lsn {
        self.local.stable
    }

    pub fn syncing(&self) -> Option<&Syncing> {
        self.local.syncing.as_ref()
    }
}

//! The secondary's side: session, term and order are checked; what was taken is acknowledged.

use crate::local::Local;
use crate::target::Target;
use crate::{Action, BatchInfo, Message};
use rempart_types::{Lsn, MonotonicTime, NodeId, SessionId, Term};

/// How far the session with the leader is.
#[derive(Debug)]
pub(crate) enum Phase {
    /// The leader asked what is here; the answer waits until nothing is on its way to the store.
    Answering,
    /// Told. What the leader wants dropped is dropped before anything else happens.
    Told,
    Truncating {
        to: Lsn,
        stable: Lsn,
    },
    /// This log is a beginning of the leader's.
    Following,
    Syncing(Target),
}

#[derive(Debug)]
pub(crate) struct Follower {
    pub leader: NodeId,
    pub session: SessionId,
    pub term: Term,
    pub phase: Phase,
    /// What the leader said last.
    leader_stable: Lsn,
    /// What it was told last.
    acknowledged: Option<(Lsn, Lsn, Lsn, bool)>,
    /// A leader that starts its term wants this log from here on.
    pulled: Option<Lsn>,
}

impl Follower {
    pub fn new(
        leader: NodeId,
        session: SessionId,
        term: Term,
        local: &Local,
        out: &mut Vec<Action>,
    ) -> Follower {
        let mut follower = Follower {
            leader,
            session,
            term,
            phase: Phase::Answering,
            leader_stable: Lsn::ZERO,
            acknowledged: None,
            pulled: None,
        };
        follower.answer(local, out);
        follower
    }

    pub fn send(&self, message: Message, payload: Option<usize>, out: &mut Vec<Action>) {
        out.push(Action::Send { peer: self.leader, session: self.session, message, payload });
    }

    pub fn close(&self, why: &'static str, out: &mut Vec<Action>) {
        out.push(Action::CloseSession { peer: self.leader, session: self.session, why });
    }

    /// Tells what is here, once that is settled.
    pub fn answer(&mut self, local: &Local, out: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Answering) && local.is_settled() {
            self.phase = Phase::Told;
            self.send(Message::State { term: self.term, state: Box::new(local.state()) }, None, out);
        }
    }

    pub fn received(
        &mut self,
        message: Message,
        bytes: u64,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let term = message.term();
        if term < self.term {
            return;
        }
        if term.epoch < local.promise {
            self.send(Message::Refused { term, promise: local.promise }, None, out);
            return;
        }
        self.term = term;
        match message {
            Message::Probe { .. } => {
                self.phase = Phase::Answering;
                self.acknowledged = None;
                self.pulled = None;
                self.answer(local, out);
            }
            Message::Truncate { to, stable, .. } => self.truncate(to, stable, local, out),
            Message::Append { written, first, last, stable, sync, .. } => {
                self.append(BatchInfo { term: written, first, last, bytes }, stable, sync, local, out);
            }
            Message::Sync { upto, .. } => {
                if matches!(self.phase, Phase::Following) {
                    local.sync.want(upto.min(local.end), local.durable);
                }
            }
            Message::Stable { stable, .. } => {
                if matches!(self.phase, Phase::Following) {
                    self.learn_stable(stable, local, out);
                }
            }
            Message::Pull { from, .. } => {
                if matches!(self.phase, Phase::Told) && from > Lsn::ZERO && from <= local.end {
                    self.pulled = Some(from);
                    self.read_pulled(local, out);
                }
            }
            message @ (Message::ResyncBegin { .. }
            | Message::ResyncFrom { .. }
            | Message::ResyncExtents { .. }
            | Message::ResyncFailed { .. }) => self.resync(message, bytes, local, now, out),
            _ => unreachable!("a follower's message was routed to a follower"),
        }
    }

    fn truncate(&mut self, to: Lsn, stable: Lsn, local: &mut Local, out: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Told) || !local.is_settled() {
            return self.close("truncates a log it has not asked about", out);
        }
        if to > local.end || to < local.applied || to < local.stable {
            return self.close("truncates what it cannot", out);
        }
        if to == local.end {
            return self.truncated(to, stable, local, out);
        }
        self.phase = Phase::Truncating { to, stable };
        local.busy += 1;
        out.push(Action::TruncateAfter(to));
    }

    /// A truncation is durable; `Local` knows.
    pub fn truncation_done(&mut self, end: Lsn, local: &mut Local, out: &mut Vec<Action>) {
        if let Phase::Truncating { to, stable } = self.phase {
            assert_eq!(end, to, "the store truncates where it was told");
            self.truncated(to, stable, local, out);
        } else {
            self.answer(local, out);
        }
    }

    fn truncated(&mut self, end: Lsn, stable: Lsn, local: &mut Local, out: &mut Vec<Action>) {
        self.phase = Phase::Following;
        // From here on nothing that only this replica wrote is left.
        local.wrote_alone = false;
        self.send(Message::Truncated { term: self.term, end }, None, out);
        self.acknowledged = None;
        self.learn_stable(stable, local, out);
    }

    fn append(
        &mut self,
        batch: BatchInfo,
        stable: Lsn,
        sync: bool,
        local: &mut Local,
        out: &mut Vec<Action>,
    ) {
        if !matches!(self.phase, Phase::Following) {
            // Left from before a probe in this session.
            return;
        }
        let sound = batch.first == local.end.next()
            && batch.last >= batch.first
            && batch.term >= local.lineage.last_term()
            && batch.term <= self.term
            && batch.bytes > 0;
        if !sound {
            return self.close("sends records out of order", out);
        }
        local.append(batch.term, batch.first, batch.last, out);
        out.push(Action::AppendForeign { peer: self.leader, session: self.session, batch });
        if sync {
            local.sync.want(batch.last, local.durable);
        }
        self.learn_stable(stable, local, out);
    }

    fn learn_stable(&mut self, stable: Lsn, local: &mut Local, out: &mut Vec<Action>) {
        self.leader_stable = self.leader_stable.max(stable);
        let stable = self.leader_stable.min(local.end);
        if stable > local.stable {
            local.stable = stable;
            local.committed = local.committed.max(stable);
            out.push(Action::Stable(stable));
        }
    }

    fn read_pulled(&mut self, local: &Local, out: &mut Vec<Action>) {
        if let Some(from) = self.pulled {
            out.push(Action::ReadLog {
                peer: self.leader,
                session: self.session,
                after: from.previous(),
                bytes: local.config.log_read_bytes,
            });
        }
    }

    /// A part of this log, which the leader wants to adopt.
    pub fn log_read(&mut self, batches: &[BatchInfo], local: &Local, out: &mut Vec<Action>) {
        let Some(from) = self.pulled else { return };
        let mut next = from;
        for (index, batch) in batches.iter().enumerate() {
            let BatchInfo { term: written, first, last, .. } = *batch;
            self.send(Message::Pulled { term: self.term, written, first, last }, Some(index), out);
            next = last.next();
        }
        self.pulled = (next > from && next <= local.end).then_some(next);
        self.read_pulled(local, out);
    }

    pub fn end_turn(&mut self, local: &Local, out: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Following) {
            return;
        }
        let holds = (local.accepted, local.durable, local.applied, local.whole);
        if self.acknowledged != Some(holds) {
            self.acknowledged = Some(holds);
            let (accepted, durable, applied, whole) = holds;
            self.send(Message::Ack { term: self.term, accepted, durable, applied, whole }, None, out);
        }
    }
}

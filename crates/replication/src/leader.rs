//! The primary's side: what is committed, what is stable, and the way of each peer to the end of the log.

use crate::link::{Link, Progress, Then};
use crate::local::Local;
use crate::quorum::reached_by_all;
use crate::recent::RecentBytes;
use crate::{Action, BatchInfo, FlushId, Message, Report};
use rempart_types::{Lsn, MonotonicTime, NodeId, NodeSet, SessionId, Term};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// How far a term is.
///
/// ```text
///  Gathering ── all acknowledgers answered, or left the in-sync set ──► Starting ── first record sealed ──► Committing
///    │ │ one has a longer log          ▲                                                                       │
///    │ └────────► Adopting ────────────┘ taken, or it went away                     committed to that record   ▼
///    └─ one knows that this log lost its end ──► Lost                                                       Serving
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Gathering {
        until: MonotonicTime,
    },
    Adopting {
        from: NodeId,
        first: Lsn,
        until: MonotonicTime,
    },
    /// This copy is not whole: it waits to be told that it does not lead.
    Lost,
    Starting,
    Committing {
        start: Lsn,
    },
    Serving,
}

#[derive(Debug)]
struct PendingFlush {
    target: Lsn,
    id: FlushId,
    since: MonotonicTime,
}

/// After a wait of half the commit deadline, the deadline is halved for this many deadlines.
const IMPATIENCE: u32 = 10;

#[derive(Debug)]
pub(crate) struct Leader {
    /// What records and messages carry.
    pub term: Term,
    /// The term it became leader in: answers to any term from it on are answers to this leader.
    since: Term,
    pub acknowledgers: NodeSet,
    pub phase: Phase,
    pub links: BTreeMap<NodeId, Link>,
    flushes: VecDeque<PendingFlush>,
    /// Batches not committed yet, and when they were sealed.
    uncommitted: VecDeque<(Lsn, MonotonicTime)>,
    pub recent: RecentBytes,
    /// The highest record somebody waits for to be durable everywhere.
    sync_wanted: Lsn,
    /// Peers must learn of the stable watermark by then.
    stable_news_at: Option<MonotonicTime>,
    /// Members that block are not reported again before this.
    blocked_quiet_until: MonotonicTime,
    /// The guest had to wait long lately: members that block are reported sooner.
    impatient_until: MonotonicTime,
    journal_kept: Option<Lsn>,
}

impl Leader {
    pub fn new(
        term: Term,
        acknowledgers: NodeSet,
        sessions: &BTreeMap<NodeId, SessionId>,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) -> Leader {
        let mut leader = Leader {
            term,
            since: term,
            acknowledgers,
            phase: Phase::Gathering { until: now + local.config.adoption_wait },
            links: BTreeMap::new(),
            flushes: VecDeque::new(),
            uncommitted: VecDeque::new(),
            recent: RecentBytes::new(local.end),
            sync_wanted: Lsn::ZERO,
            stable_news_at: None,
            blocked_quiet_until: MonotonicTime::ZERO,
            impatient_until: MonotonicTime::ZERO,
            journal_kept: None,
        };
        leader.note_alone(local);
        for (&peer, &session) in sessions {
            leader.connected(peer, session, now, out);
        }
        leader.gather(local, now, out);
        leader
    }

    pub fn is_serving(&self) -> bool {
        self.phase == Phase::Serving
    }

    pub fn connected(&mut self, peer: NodeId, session: SessionId, now: MonotonicTime, out: &mut Vec<Action>) {
        let link = self.links.entry(peer).or_insert_with(|| Link::new(peer));
        link.disconnect(out);
        link.session = Some(session);
        link.probe(self.term, now, out);
    }

    pub fn disconnected(
        &mut self,
        peer: NodeId,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.disconnect(out);
        }
        if matches!(self.phase, Phase::Adopting { from, .. } if from == peer) {
            self.start(local, out);
        }
        self.advance(local, now, out);
    }

    pub fn continue_in(
        &mut self,
        term: Term,
        acknowledgers: NodeSet,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        assert!(term > self.term, "terms rise: {} then {term}", self.term);
        self.term = term;
        for link in self.links.values_mut() {
            if matches!(link.progress, Progress::Refused) {
                link.probe(term, now, out);
            }
        }
        self.set_acknowledgers(acknowledgers, local, now, out);
    }

    pub fn set_acknowledgers(
        &mut self,
        nodes: NodeSet,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        for (peer, link) in &mut self.links {
            if self.acknowledgers.contains(*peer) && !nodes.contains(*peer) {
                // It may have left because it hangs: it joins again when it next acknowledges something.
                link.leave(out);
            }
        }
        self.acknowledgers = nodes;
        self.note_alone(local);
        if matches!(self.phase, Phase::Gathering { .. }) {
            self.gather(local, now, out);
        }
        self.advance(local, now, out);
    }

    /// Whoever must acknowledge from now on holds all that was committed before.
    fn note_alone(&self, local: &mut Local) {
        local.wrote_alone = self.acknowledgers.len() == 1;
    }

    /// `peer` is in step but will not be admitted before `until`: the guest need not wait for it meanwhile.
    pub fn hold_back(
        &mut self,
        peer: NodeId,
        until: MonotonicTime,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.held_until = until;
            if !self.acknowledgers.contains(peer) {
                link.leave(out);
            }
        }
        self.advance(local, now, out);
    }

    // --- the log grows ---

    pub fn sealed(
        &mut self,
        batch: &BatchInfo,
        sync: bool,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        assert_eq!(batch.term, self.term, "a leader writes in its term");
        assert!(
            matches!(self.phase, Phase::Starting | Phase::Committing { .. } | Phase::Serving),
            "a record before the term started"
        );
        local.append(batch.term, batch.first, batch.last, out);
        self.uncommitted.push_back((batch.last, now));
        self.recent.push(batch);
        if sync {
            self.want_durable(batch.last, local);
        }
        if self.phase == Phase::Starting {
            self.phase = Phase::Committing { start: batch.last };
            self.want_durable(batch.last, local);
            for link in self.links.values_mut() {
                if matches!(link.progress, Progress::Known(_)) {
                    let Progress::Known(state) = std::mem::replace(&mut link.progress, Progress::Probing)
                    else {
                        unreachable!("just matched")
                    };
                    link.attach(state, self.term, local, now, out);
                }
            }
            return;
        }
        for link in self.links.values_mut() {
            if !matches!(link.progress, Progress::Streaming) {
                continue;
            }
            // A peer that lags takes the log from the journal, so that what is in flight to it stays bounded.
            if link.in_flight_bytes > local.config.peer_window_bytes {
                link.progress = Progress::CatchingUp { reading: false };
            } else {
                link.append(batch, sync, 0, self.term, local, out);
            }
        }
    }

    #[expect(clippy::too_many_arguments)]
    pub fn log_read(
        &mut self,
        peer: NodeId,
        session: SessionId,
        after: Lsn,
        batches: &[BatchInfo],
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let Some(link) = self.links.get_mut(&peer).filter(|link| link.session == Some(session)) else {
            return;
        };
        let Progress::CatchingUp { reading } = &mut link.progress else { return };
        if after != link.sent {
            // Asked before the peer was looked at anew.
            return;
        }
        *reading = false;
        for (index, batch) in batches.iter().enumerate() {
            if batch.first != link.sent.next() {
                // Logs agree between batches only; a peer that stands inside one is asked again.
                return link.probe(self.term, now, out);
            }
            link.append(batch, false, index, self.term, local, out);
        }
        link.pump(self.term, local, out);
        self.advance(local, now, out);
    }

    pub fn log_gone(
        &mut self,
        peer: NodeId,
        session: SessionId,
        after: Lsn,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        if let Some(link) = self.links.get_mut(&peer).filter(|link| link.session == Some(session))
            && matches!(link.progress, Progress::CatchingUp { .. })
            && link.sent == after
        {
            link.probe(self.term, now, out);
        }
    }

    // --- watermarks ---

    /// Somebody waits for `lsn` to be durable on every acknowledger.
    fn want_durable(&mut self, lsn: Lsn, local: &mut Local) {
        self.sync_wanted = self.sync_wanted.max(lsn);
        local.sync.want(lsn, local.durable);
    }

    pub fn flush(
        &mut self,
        id: FlushId,
        all: bool,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let target = if all { local.end } else { local.committed };
        if local.stable >= target && !self.is_lost_somewhere(target) {
            out.push(Action::FlushDone { id });
            return;
        }
        self.want_durable(target, local);
        self.flushes.push_back(PendingFlush { target, id, since: now });
    }

    /// Whether a member of the in-sync set says that it no longer has on its disk what was stable up to `target`: damage made
    /// it look like a torn end. It is sent again, and nothing more is promised before that.
    fn is_lost_somewhere(&self, target: Lsn) -> bool {
        let told = self.acknowledgers.iter().filter_map(|node| self.links.get(&node)?.durable);
        told.into_iter().any(|durable| durable < target)
    }

    /// Recomputes what every acknowledger has, and tells what follows.
    pub fn advance(&mut self, local: &mut Local, now: MonotonicTime, out: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Committing { .. } | Phase::Serving) {
            return;
        }
        let waited = self.oldest_wait();
        let members = || {
            let joined = self.links.values().filter(|link| link.joined).map(|link| link.peer);
            self.acknowledgers.iter().chain(joined)
        };
        let reached = |node: NodeId, own: Lsn, of: fn(&Link) -> Option<Lsn>| {
            if node == local.node { Some(own) } else { self.links.get(&node).and_then(of) }
        };
        let accepted =
            reached_by_all(members().map(|node| reached(node, local.accepted, |link| link.accepted)));
        let durable = reached_by_all(members().map(|node| reached(node, local.durable, |link| link.durable)));

        if let Some(committed) = accepted.map(|lsn| lsn.min(local.end)).filter(|lsn| *lsn > local.committed) {
            local.committed = committed;
            out.push(Action::Committed(committed));
            while self.uncommitted.front().is_some_and(|(last, _)| *last <= committed) {
                self.uncommitted.pop_front();
            }
        }
        if let Phase::Committing { start } = self.phase
            && local.committed >= start
        {
            self.phase = Phase::Serving;
            out.push(Action::Serving { term: self.term });
        }
        if let Some(stable) = durable.map(|lsn| lsn.min(local.committed)).filter(|lsn| *lsn > local.stable) {
            local.stable = stable;
            out.push(Action::Stable(stable));
            if self.stable_news_at.is_none() && !self.links.is_empty() {
                self.stable_news_at = Some(now + local.config.stable_news_after);
            }
        }
        self.flushes.retain(|flush| {
            let done = flush.target <= local.stable && durable >= Some(flush.target);
            if done {
                out.push(Action::FlushDone { id: flush.id });
            }
            !done
        });
        if let Some(since) = waited
            && waited != self.oldest_wait()
            && now.since(since) >= local.config.commit_deadline / 2
        {
            self.impatient_until = now + local.config.commit_deadline * IMPATIENCE;
        }
        for link in self.links.values_mut() {
            if link.joined
                && !link.caught_up
                && link.whole
                && link.accepted >= Some(local.committed)
                && link.durable >= Some(local.stable)
            {
                link.caught_up = true;
                out.push(Action::CaughtUp { peer: link.peer });
            }
        }
    }

    /// A peer that follows closely joins: from here on nothing is committed without it, so that what is said of
    /// it stays true until it is admitted, and so that a guest that writes faster than the peer takes the log does
    /// not keep it out for ever. Only one that just acknowledged something may: it is alive.
    fn join(&mut self, peer: NodeId, local: &mut Local, now: MonotonicTime, out: &mut Vec<Action>) {
        let serving = self.phase == Phase::Serving;
        let Some(link) = self.links.get_mut(&peer) else { return };
        let takes_log = matches!(link.progress, Progress::CatchingUp { .. } | Progress::Streaming);
        let lag = link.accepted.and_then(|accepted| self.recent.after(accepted));
        let close =
            takes_log && link.whole && lag.is_some_and(|bytes| bytes <= local.config.peer_window_bytes);
        if link.joined || !serving || !close || link.held_until > now {
            return;
        }
        link.joined = true;
        out.push(Action::Report(Report::InStep { peer }));
        if link.durable < Some(local.stable) {
            let upto = local.stable;
            link.sync_sent = link.sync_sent.max(upto);
            link.send(Message::Sync { term: self.term, upto }, None, out);
        }
    }

    // --- messages ---

    pub fn received(
        &mut self,
        peer: NodeId,
        message: Message,
        bytes: u64,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let Some(link) = self.links.get_mut(&peer) else { return };
        if message.term() < self.since || message.term() > self.term {
            return;
        }
        let term = self.term;
        match message {
            Message::State { state, .. } => {
                if !matches!(link.progress, Progress::Probing) {
                    return;
                }
                if matches!(self.phase, Phase::Committing { .. } | Phase::Serving) {
                    link.attach(state, term, local, now, out);
                } else {
                    link.progress = Progress::Known(state);
                    self.gather(local, now, out);
                }
            }
            Message::Refused { promise, .. } => {
                if promise <= term.epoch {
                    // It has caught up with us since, or we with it: whatever it was told before is forgotten there.
                    let told = matches!(
                        link.progress,
                        Progress::Truncating { .. }
                            | Progress::Resyncing(_)
                            | Progress::CatchingUp { .. }
                            | Progress::Streaming
                    );
                    if told {
                        link.probe(term, now, out);
                    }
                    return;
                }
                link.leave(out);
                link.progress = Progress::Refused;
                link.accepted = None;
                link.durable = None;
                out.push(Action::RefusedBy { peer, promise });
                self.gather(local, now, out);
            }
            Message::Truncated { end, .. } => {
                let Progress::Truncating { to, durable, then } = link.progress else {
                    if matches!(link.progress, Progress::CatchingUp { .. } | Progress::Streaming) {
                        link.close("cut its log unasked", out);
                    }
                    return;
                };
                if end != to {
                    return link.close("truncated to somewhere else", out);
                }
                match then {
                    Then::CatchUp => link.take_log(end, durable, term, local, out),
                    Then::Resync { base } => {
                        link.start_round(base, crate::ResyncMode::Changed, true, term, local, out);
                    }
                }
                self.advance(local, now, out);
            }
            Message::Ack { accepted, durable, applied, whole, .. } => {
                if !matches!(link.progress, Progress::CatchingUp { .. } | Progress::Streaming) {
                    return;
                }
                if !link.acknowledged(accepted, durable, applied, whole) {
                    return link.close("acknowledged what it was never sent", out);
                }
                link.pump(term, local, out);
                self.join(peer, local, now, out);
                self.advance(local, now, out);
            }
            Message::Pulled { written, first, last, .. } => {
                let batch = BatchInfo { term: written, first, last, bytes };
                if !self.pulled(peer, batch, local, now, out) {
                    self.links[&peer].close("sent something else than its log's next records", out);
                }
            }
            Message::ResyncReady { round, .. } => link.resync_ready(round, term, local, out),
            message @ Message::ResyncRegion { .. } => link.region_wanted(message, local, now, out),
            Message::ResyncTaken { round, sequence, .. } => link.taken(round, sequence, local, now, out),
            Message::ResyncLog { round, at, .. } => {
                let Progress::Resyncing(source) = &link.progress else { return };
                if source.round != round {
                    return;
                }
                if source.at.map(|position| position.lsn) != Some(at) {
                    return link.close("a resync ended somewhere else", out);
                }
                let (bytes_sent, bytes_changed) = (source.bytes_sent, source.bytes_changed);
                out.push(Action::Report(Report::ResyncFinished { peer, bytes_sent, bytes_changed }));
                link.take_log(at, at, term, local, out);
                self.advance(local, now, out);
            }
            Message::ResyncFailed { round, .. } => {
                if matches!(&link.progress, Progress::Resyncing(source) if source.round == round) {
                    link.close("the target cannot go on with the resync", out);
                }
            }
            _ => unreachable!("a leader's message was routed to a leader"),
        }
    }

    /// A round cannot go on here: the peer is looked at anew.
    pub fn resync_broken(&mut self, round: u64, now: MonotonicTime, out: &mut Vec<Action>) {
        for link in self.links.values_mut() {
            if matches!(&link.progress, Progress::Resyncing(source) if source.round == round) {
                link.probe(self.term, now, out);
            }
        }
    }

    pub fn approve_overwrite(
        &mut self,
        peer: NodeId,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let Some(link) = self.links.get_mut(&peer) else { return };
        link.approved = true;
        if matches!(link.progress, Progress::Diverged(_)) {
            let Progress::Diverged(state) = std::mem::replace(&mut link.progress, Progress::Probing) else {
                unreachable!("just matched")
            };
            link.attach(state, self.term, local, now, out);
        }
    }

    // --- time ---

    /// What was held back to be told once.
    pub fn end_turn(&mut self, out: &mut Vec<Action>) {
        for (peer, link) in &mut self.links {
            let counts = link.joined || self.acknowledgers.contains(*peer);
            if counts
                && matches!(link.progress, Progress::Streaming | Progress::CatchingUp { .. })
                && link.sent >= self.sync_wanted
                && link.sync_sent < self.sync_wanted
                && link.durable < Some(self.sync_wanted)
            {
                link.sync_sent = self.sync_wanted;
                link.send(Message::Sync { term: self.term, upto: self.sync_wanted }, None, out);
            }
        }
        let kept = self.links.values().filter_map(|link| match &link.progress {
            Progress::CatchingUp { .. } => link.accepted,
            Progress::Resyncing(source) => source.at.map(|at| at.lsn),
            _ => None,
        });
        let kept = kept.min();
        if kept != self.journal_kept {
            self.journal_kept = kept;
            out.push(Action::KeepJournal { after: kept });
        }
    }

    pub fn tick(&mut self, local: &mut Local, now: MonotonicTime, out: &mut Vec<Action>) {
        self.gather(local, now, out);
        if let Phase::Adopting { from, until, .. } = self.phase
            && now >= until
        {
            self.links[&from].close("does not send the log it promised", out);
            self.start(local, out);
        }
        if self.stable_news_at.is_some_and(|at| at <= now) {
            self.stable_news_at = None;
            for link in self.links.values_mut() {
                if matches!(link.progress, Progress::Streaming) && link.stable_told < local.stable {
                    link.stable_told = local.stable;
                    link.send(Message::Stable { term: self.term, stable: local.stable }, None, out);
                }
            }
        }
        for link in self.links.values_mut() {
            link.pump_source(local, now, out);
            if link.awaits_answer() && now.since(link.asked_at) >= local.config.answer_deadline {
                link.close("does not answer", out);
                link.asked_at = now;
            }
        }
        // Held back peers join at their next acknowledgement; an idle one has none to make.
        let idle: Vec<NodeId> = self
            .links
            .values()
            .filter(|link| !link.joined && link.held_until <= now && link.accepted == Some(local.end))
            .map(|link| link.peer)
            .collect();
        for peer in idle {
            if !self.acknowledgers.contains(peer) {
                self.join(peer, local, now, out);
            }
        }
        // Noticed: it must not wake anybody again.
        for link in self.links.values_mut().filter(|link| link.held_until <= now) {
            link.held_until = MonotonicTime::ZERO;
        }
        self.report_blocked(local, now, out);
        self.advance(local, now, out);
    }

    /// Since when the guest waits for a record or a flush.
    fn oldest_wait(&self) -> Option<MonotonicTime> {
        let write = self.uncommitted.front().map(|(_, at)| *at);
        let flush = self.flushes.iter().map(|flush| flush.since).min();
        write.into_iter().chain(flush).min()
    }

    /// How long the guest waits now before who blocks is reported. A link that comes and goes within the deadline
    /// would else hold the guest up again and again, and never count as lost.
    fn patience(&self, local: &Local, now: MonotonicTime) -> Duration {
        let deadline = local.config.commit_deadline;
        if now < self.impatient_until { deadline / 2 } else { deadline }
    }

    fn report_blocked(&mut self, local: &Local, now: MonotonicTime, out: &mut Vec<Action>) {
        let deadline = self.patience(local, now);
        let late = |at: MonotonicTime| now.since(at) >= deadline;
        if now < self.blocked_quiet_until || !self.oldest_wait().is_some_and(late) {
            return;
        }
        self.blocked_quiet_until = now + deadline / 4;
        let write = self.uncommitted.iter().filter(|(_, at)| late(*at)).map(|(last, _)| *last).max();
        let flush = self.flushes.iter().filter(|f| late(f.since)).map(|flush| flush.target).max();
        let blocks = |accepted: Option<Lsn>, durable: Option<Lsn>| {
            write.is_some_and(|lsn| accepted < Some(lsn)) || flush.is_some_and(|lsn| durable < Some(lsn))
        };
        for peer in self.acknowledgers.iter() {
            let (accepted, durable) = if peer == local.node {
                (Some(local.accepted), Some(local.durable))
            } else {
                self.links.get(&peer).map_or((None, None), |link| (link.accepted, link.durable))
            };
            if blocks(accepted, durable) {
                out.push(Action::BlockedBy { peer });
            }
        }
        for link in self.links.values_mut() {
            if link.joined && !self.acknowledgers.contains(link.peer) && blocks(link.accepted, link.durable) {
                link.leave(out);
                link.close("keeps the guest waiting", out);
            }
        }
    }

    pub fn next_wake(&self, local: &Local, now: MonotonicTime) -> Option<MonotonicTime> {
        let start = match self.phase {
            Phase::Gathering { until } | Phase::Adopting { until, .. } => Some(until),
            _ => None,
        };
        let blocked =
            self.oldest_wait().map(|at| (at + self.patience(local, now)).max(self.blocked_quiet_until));
        let links = self.links.values().filter_map(|link| {
            let answer = link.awaits_answer().then(|| link.asked_at + local.config.answer_deadline);
            let resync = match &link.progress {
                Progress::Resyncing(source) => source.next_wake(local, now),
                _ => None,
            };
            // Also when it is past already: nobody may have looked in between.
            let waits = matches!(link.progress, Progress::Streaming) && !link.joined;
            let held = (waits && link.held_until > MonotonicTime::ZERO).then_some(link.held_until);
            [answer, resync, held].into_iter().flatten().min()
        });
        links.chain(start).chain(blocked).chain(self.stable_news_at).min()
    }

    /// Age of the oldest write or flush that waits.
    pub fn stall(&self, now: MonotonicTime) -> Duration {
        self.oldest_wait().map_or(Duration::ZERO, |at| now.since(at))
    }

    /// The member that the oldest waiting write lacks.
    pub fn stalled_on(&self, local: &Local) -> Option<NodeId> {
        let write = self.uncommitted.front().map(|(last, _)| *last);
        let flush = self.flushes.front().map(|flush| flush.target);
        self.acknowledgers.iter().find(|&peer| {
            let (accepted, durable) = if peer == local.node {
                (Some(local.accepted), Some(local.durable))
            } else {
                self.links.get(&peer).map_or((None, None), |link| (link.accepted, link.durable))
            };
            write.is_some_and(|lsn| accepted < Some(lsn)) || flush.is_some_and(|lsn| durable < Some(lsn))
        })
    }
}

impl Link {
    fn awaits_answer(&self) -> bool {
        match &self.progress {
            Progress::Probing | Progress::Truncating { .. } => true,
            Progress::Resyncing(source) => source.at.is_none(),
            _ => false,
        }
    }
}

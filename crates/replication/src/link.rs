//! A leader's view of one peer, and how it is brought from an unknown state to the end of the log.

use crate::local::Local;
use crate::source::Source;
use crate::{Action, LogState, Message, Report, ResyncMode};
use rempart_types::{LogPosition, Lsn, MonotonicTime, NodeId, SessionId, Term};
use std::collections::VecDeque;

/// How far a peer is.
///
/// ```text
///  Away ─ session ─► Probing ─ State ─► Known ─ term started ─┬─► Truncating ─► CatchingUp ◄─► Streaming
///                      │                                      ├─► Truncating ─► Resyncing ──┘ log
///                      └─ Refused: until the next term        └─► Diverged: until approved
///  A gone journal or a broken round goes back to Probing; the end of the session to Away.
/// ```
#[derive(Debug)]
pub(crate) enum Progress {
    Away,
    /// Asked what it holds.
    Probing,
    /// It answered; the term has not started yet.
    Known(Box<LogState>),
    /// Its log is longer than ours and we take the rest, to `end`.
    Pulling {
        end: Lsn,
    },
    /// It promised a newer epoch.
    Refused,
    /// It holds records of its own that nobody allowed to overwrite.
    Diverged(Box<LogState>),
    Truncating {
        to: Lsn,
        durable: Lsn,
        then: Then,
    },
    Resyncing(Source),
    /// Takes the log from the journal.
    CatchingUp {
        reading: bool,
    },
    /// Takes each batch as it is sealed.
    Streaming,
}

/// What follows a truncation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    CatchUp,
    Resync { base: LogPosition },
}

#[derive(Debug)]
pub(crate) struct Link {
    pub peer: NodeId,
    pub session: Option<SessionId>,
    pub progress: Progress,
    /// When the peer was asked for what is awaited.
    pub asked_at: MonotonicTime,
    /// What it holds of this leader's log; unknown until the common point is.
    pub accepted: Option<Lsn>,
    pub durable: Option<Lsn>,
    pub applied: Lsn,
    pub whole: bool,
    /// The last record sent.
    pub sent: Lsn,
    pub in_flight: VecDeque<(Lsn, u64)>,
    pub in_flight_bytes: u64,
    /// The highest record it was asked to make durable.
    pub sync_sent: Lsn,
    pub stable_told: Lsn,
    /// Nothing is committed without it, although it need not be so: it is about to be admitted.
    pub joined: bool,
    /// `CaughtUp` was told and stands.
    pub caught_up: bool,
    pub held_until: MonotonicTime,
    pub approved: bool,
}

impl Link {
    pub fn new(peer: NodeId) -> Link {
        Link {
            peer,
            session: None,
            progress: Progress::Away,
            asked_at: MonotonicTime::ZERO,
            accepted: None,
            durable: None,
            applied: Lsn::ZERO,
            whole: false,
            sent: Lsn::ZERO,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            sync_sent: Lsn::ZERO,
            stable_told: Lsn::ZERO,
            joined: false,
            caught_up: false,
            held_until: MonotonicTime::ZERO,
            approved: false,
        }
    }

    pub fn send(&self, message: Message, payload: Option<usize>, out: &mut Vec<Action>) {
        if let Some(session) = self.session {
            out.push(Action::Send { peer: self.peer, session, message, payload });
        }
    }

    pub fn close(&self, why: &'static str, out: &mut Vec<Action>) {
        if let Some(session) = self.session {
            out.push(Action::CloseSession { peer: self.peer, session, why });
        }
    }

    /// It takes part in commits no more, unless it is an acknowledger.
    pub fn leave(&mut self, out: &mut Vec<Action>) {
        self.joined = false;
        if std::mem::take(&mut self.caught_up) {
            out.push(Action::FellBehind { peer: self.peer });
        }
    }

    /// Nothing is known about it any more.
    fn forget(&mut self, out: &mut Vec<Action>) {
        self.leave(out);
        self.accepted = None;
        self.durable = None;
        self.whole = false;
        self.in_flight.clear();
        self.in_flight_bytes = 0;
        self.sync_sent = Lsn::ZERO;
        self.stable_told = Lsn::ZERO;
    }

    pub fn disconnect(&mut self, out: &mut Vec<Action>) {
        self.forget(out);
        self.session = None;
        self.progress = Progress::Away;
    }

    /// Starts from the beginning: asks what it holds.
    pub fn probe(&mut self, term: Term, now: MonotonicTime, out: &mut Vec<Action>) {
        self.forget(out);
        if self.session.is_none() {
            self.progress = Progress::Away;
            return;
        }
        self.progress = Progress::Probing;
        self.asked_at = now;
        self.send(Message::Probe { term }, None, out);
    }

    /// The term has started and the peer's state is known: decides how it is brought up.
    pub fn attach(
        &mut self,
        state: Box<LogState>,
        term: Term,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let common = local.lineage.common_point(local.end, &state.lineage, state.end);
        // Stable records may be in its image although a crash took the word for it. Only force makes a log end before
        // one of them: on a replica that wrote alone, or in a generation that knows nothing of it.
        let forced = term.epoch.generation() > state.lineage.last_term().epoch.generation();
        let unclaimed = state.end > common && (state.wrote_alone || forced);
        let passed = unclaimed || state.applied.max(state.stable) > common;
        let may_lose = state.end > common && (state.wrote_alone || passed);
        if may_lose && state.syncing.is_none() && !self.approved && !state.may_overwrite {
            out.push(Action::Report(Report::Diverged { peer: self.peer, common, peer_end: state.end }));
            self.progress = Progress::Diverged(state);
            return;
        }
        self.asked_at = now;
        let stable = local.stable.min(common);
        let blank = common == Lsn::ZERO && !(local.blank_start && state.blank_start);
        let unknown = blank || state.image_unknown || local.image_unknown;
        let base =
            if unknown { LogPosition::default() } else { local.lineage.position(common).unwrap_or_default() };
        if state.syncing.is_some() || unknown || passed {
            return self.begin_resync(base, &state, unknown, term, local, out);
        }
        let then = if common.next() >= local.journal_start { Then::CatchUp } else { Then::Resync { base } };
        self.progress = Progress::Truncating { to: common, durable: state.durable.min(common), then };
        self.send(Message::Truncate { term, to: common, stable }, None, out);
    }

    fn begin_resync(
        &mut self,
        base: LogPosition,
        state: &LogState,
        unknown: bool,
        term: Term,
        local: &mut Local,
        out: &mut Vec<Action>,
    ) {
        let known = |at: &LogPosition| at.lsn <= local.end && local.lineage.position(at.lsn) == Some(*at);
        // Levels of a round on another branch would hide what that branch wrote.
        let restart = state
            .syncing
            .as_ref()
            .is_none_or(|s| s.whole != unknown || !s.levels.iter().all(|(_, at)| known(at)));
        let mode = if unknown { ResyncMode::Compare } else { ResyncMode::Changed };
        self.start_round(base, mode, restart, term, local, out);
    }

    pub fn start_round(
        &mut self,
        base: LogPosition,
        mode: ResyncMode,
        restart: bool,
        term: Term,
        local: &mut Local,
        out: &mut Vec<Action>,
    ) {
        let round = local.next_round(term);
        self.progress = Progress::Resyncing(Source::new(round));
        out.push(Action::Report(Report::ResyncStarted { peer: self.peer, base, mode }));
        self.send(Message::ResyncBegin { term, round, base, mode, restart }, None, out);
    }

    /// It holds this leader's log to `at`; the rest comes from the journal.
    pub fn take_log(&mut self, at: Lsn, durable: Lsn, term: Term, local: &Local, out: &mut Vec<Action>) {
        self.accepted = Some(at);
        self.durable = Some(durable);
        self.sent = at;
        self.in_flight.clear();
        self.in_flight_bytes = 0;
        self.sync_sent = Lsn::ZERO;
        self.stable_told = Lsn::ZERO;
        if at < local.end {
            out.push(Action::Report(Report::CatchUpStarted { peer: self.peer, after: at, end: local.end }));
        }
        self.progress = Progress::CatchingUp { reading: false };
        self.pump(term, local, out);
    }

    /// Catch-up: reads on while the window allows, and goes over to streaming at the log's end.
    pub fn pump(&mut self, term: Term, local: &Local, out: &mut Vec<Action>) {
        let Progress::CatchingUp { reading } = &mut self.progress else { return };
        if *reading {
            return;
        }
        if self.sent == local.end {
            self.progress = Progress::Streaming;
            if self.stable_told < local.stable {
                self.stable_told = local.stable;
                self.send(Message::Stable { term, stable: local.stable }, None, out);
            }
        } else if self.in_flight_bytes < local.config.peer_window_bytes
            && let Some(session) = self.session
        {
            *reading = true;
            out.push(Action::ReadLog {
                peer: self.peer,
                session,
                after: self.sent,
                bytes: local.config.log_read_bytes,
            });
        }
    }

    /// Sends a batch, whose bytes came beside the event as number `payload`.
    pub fn append(
        &mut self,
        batch: &crate::BatchInfo,
        sync: bool,
        payload: usize,
        term: Term,
        local: &Local,
        out: &mut Vec<Action>,
    ) {
        assert_eq!(batch.first, self.sent.next(), "a peer gets a dense log");
        self.sent = batch.last;
        self.in_flight.push_back((batch.last, batch.bytes));
        self.in_flight_bytes += batch.bytes;
        self.stable_told = local.stable;
        if sync {
            self.sync_sent = batch.last;
        }
        let (written, first, last, stable) = (batch.term, batch.first, batch.last, local.stable);
        self.send(Message::Append { term, written, first, last, stable, sync }, Some(payload), out);
    }

    /// Takes an acknowledgement. False if it is impossible.
    pub fn acknowledged(&mut self, accepted: Lsn, durable: Lsn, applied: Lsn, whole: bool) -> bool {
        let (Some(known_accepted), Some(known_durable)) = (self.accepted, self.durable) else { return false };
        if accepted > self.sent || durable > accepted || applied > durable {
            return false;
        }
        self.accepted = Some(known_accepted.max(accepted));
        self.durable = Some(known_durable.max(durable));
        self.applied = self.applied.max(applied);
        self.whole = whole;
        while let Some(&(last, bytes)) = self.in_flight.front()
            && last <= accepted
        {
            self.in_flight.pop_front();
            self.in_flight_bytes -= bytes;
        }
        true
    }
}

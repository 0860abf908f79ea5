//! One replica's view of its group: facts come in here, and each state's file decides what follows.

use crate::bug::Bug;
use crate::claim::Claim;
use crate::desk::{Desk, Question};
use crate::following::Following;
use crate::force::Forcing;
use crate::leading::Leading;
use crate::machine::Machine;
use crate::peer::Peer;
use crate::persistent::Ledger;
use crate::timers::{Timer, Timers};
use crate::{
    Action, Command, Condition, Config, Event, Message, PersistentState, ReadOutcome, RefusedWhy, RequestId,
    SwapOutcome,
};
use rempart_types::{Epoch, Intent, Lineage, MonotonicTime, NodeId, Nonce, RegisterId, SessionId, Term};
use std::collections::BTreeMap;

/// One replica of one group: who leads, who must acknowledge, may the machine run.
///
/// `Clone`, `Eq` and `Hash` are for the exhaustive check, which explores this very type.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Member {
    pub(crate) config: Config,
    pub(crate) ledger: Ledger,
    pub(crate) desk: Desk,
    pub(crate) timers: Timers,
    pub(crate) peers: BTreeMap<NodeId, Peer>,
    pub(crate) machine: Machine,
    pub(crate) lineage: Lineage,
    pub(crate) copy_usable: bool,
    /// When this member last acknowledged a beacon, in this life.
    pub(crate) last_acknowledged: Option<MonotonicTime>,
    pub(crate) state: State,
    /// `Condition::WaitsToLead` was reported in this life.
    pub(crate) waits_told: bool,
    nonces_drawn: u128,
    bug: Option<Bug>,
}

/// The data of each role; [`crate::Role`] draws the transitions.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum State {
    Idle,
    Booting,
    Following(Following),
    Claiming(Claim),
    Leading(Leading),
    Forcing(Forcing),
    Superseded {
        successor: RegisterId,
    },
    Stopped,
    /// The disk failed. `vacate`: the term led until then, to be given up to a peer once the machine is gone.
    Failed {
        vacate: Option<Term>,
    },
}

impl Member {
    /// Starts with what the store recovered. `usable`: the copy may lead (see `Event::CopyUsable`). Nothing is
    /// emitted yet; the first event starts it: `Event::VmRunning` or `Event::VmStopped`, whatever is found.
    ///
    /// # Panics
    /// If the timing is not valid, or the recovered state contradicts itself.
    pub fn new(config: Config, recovered: PersistentState, usable: bool, now: MonotonicTime) -> Member {
        config.timing.validate().expect("the group's times were checked when they were configured");
        assert!(!config.peers.contains(config.me), "a node is not its own peer");
        let mut timers = Timers::default();
        timers.set(Timer::Start, now);
        let peers = config.peers.iter().map(|node| (node, Peer::default())).collect();
        Member {
            config,
            ledger: Ledger::new(recovered),
            desk: Desk::new(),
            timers,
            peers,
            machine: Machine::default(),
            lineage: Lineage::new(),
            copy_usable: usable,
            last_acknowledged: None,
            state: State::Booting,
            waits_told: false,
            nonces_drawn: 0,
            bug: None,
        }
    }

    /// Takes one fact; appends what follows from it to `out`.
    ///
    /// # Panics
    /// If a rule of this crate is broken, or the caller broke the contract of an event.
    pub fn handle(&mut self, event: Event, now: MonotonicTime, out: &mut Vec<Action>) {
        // What was due before this moment happened before it.
        while let Some((timer, at)) = self.timers.take_due(now) {
            self.timer_went_off(timer, at, now, out);
        }
        self.take(event, now, out);
        self.advance(now, out);
        self.ledger.flush(out);
    }

    /// When `Event::Tick` is wanted next.
    pub fn next_wake(&self) -> Option<MonotonicTime> {
        self.timers.next()
    }

    fn take(&mut self, event: Event, now: MonotonicTime, out: &mut Vec<Action>) {
        match event {
            Event::Tick => {}
            Event::RegisterRead { request, outcome } => self.register_read(request, outcome, now, out),
            Event::RegisterSwapped { request, outcome } => self.register_swapped(request, outcome, now, out),
            Event::Persisted { receipt } => self.ledger.persisted(receipt),
            Event::LogChanged { lineage } => self.lineage = lineage,
            Event::CopyUsable(usable) => self.copy_usable_is(usable, now, out),
            Event::LocalDiskFailed => self.disk_failed(out),
            Event::PeerConnected { node, session } => self.connected(node, session, now, out),
            Event::PeerDisconnected { node, session } => {
                if let Some(peer) = self.peers.get_mut(&node)
                    && peer.session == Some(session)
                {
                    peer.disconnect();
                }
            }
            Event::Message { from, session, message } => {
                // An older session's messages say nothing about the present one (rule 8).
                if self.peers.get(&from).is_some_and(|peer| peer.session == Some(session)) {
                    self.message(from, message, now, out);
                }
            }
            Event::PeerCaughtUp { node } => {
                self.with_peer(node, |peer| peer.caught_up = peer.session.is_some())
            }
            Event::PeerFellBehind { node } => self.with_peer(node, |peer| peer.caught_up = false),
            Event::CommitBlockedBy { node } => self.blocked_by(node),
            Event::PeerRefused { node, promise } => {
                self.with_peer(node, |peer| peer.promised(promise));
            }
            Event::TailCommitted { term } => {
                if let State::Leading(leading) = &mut self.state
                    && leading.opened == Some(term)
                {
                    leading.serving = true;
                }
            }
            Event::Drained { term } => self.drained(term),
            Event::VmRunning => self.machine.appeared(),
            Event::VmStopped => self.machine.vanished(),
            Event::Command(command) => self.command(command, now, out),
        }
    }

    fn timer_went_off(&mut self, timer: Timer, at: MonotonicTime, now: MonotonicTime, out: &mut Vec<Action>) {
        match timer {
            // These only had to be over: whoever waits looks whether they still run.
            Timer::RegisterRetry | Timer::TakeoverWait | Timer::Readmit(_) | Timer::Patience => {}
            Timer::Start => {
                let known = self.ledger.wanted().known.clone();
                if let Some(known) = &known
                    && let Intent::Tombstone { successor } = known.intent
                {
                    // What is known of a closed register needs no second look.
                    self.saw_tombstone(known.clone(), successor, out);
                } else if known.is_some_and(|known| known.primary == self.config.me) {
                    self.timers.set(Timer::Patience, now + self.config.timing.register_patience);
                }
            }
            Timer::Lease => self.lease_ended(out),
            Timer::Beacon => self.beacon_due(now, out),
            Timer::Suspect => self.suspect(at, now, out),
            Timer::RegisterCheck => self.check_register(now),
            Timer::RegisterDeadline => {
                if self.desk.give_up(&mut self.timers).is_some() {
                    self.desk.failed(&self.config.timing, &mut self.timers, now, out);
                    self.give_up_move(RefusedWhy::RegisterOutOfReach, out);
                }
            }
            Timer::Handover => self.handover_too_late(out),
            Timer::PeerDeadline(node) => self.peer_deadline(node, at, now),
        }
    }

    /// Does whatever the facts allow now.
    fn advance(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        match &self.state {
            State::Idle | State::Superseded { .. } | State::Stopped => self.evict_machine(out),
            State::Booting => self.boot(now, out),
            State::Following(_) => self.follow_on(now, out),
            State::Claiming(_) => self.press_claim(now, out),
            State::Leading(_) => self.lead_on(now, out),
            State::Forcing(_) => self.force_on(now, out),
            State::Failed { vacate } => {
                let vacate = *vacate;
                self.evict_machine(out);
                if let Some(term) = vacate
                    && self.machine.exists == Some(false)
                {
                    self.step_aside(term, out);
                }
            }
        }
    }

    fn register_read(
        &mut self,
        request: RequestId,
        outcome: ReadOutcome,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let Some(Question::Read(register)) = self.desk.take(request, &mut self.timers) else { return };
        match outcome {
            ReadOutcome::Value(Some(value)) => {
                self.desk.answered(&mut self.timers, out);
                self.saw(value, now, out);
            }
            ReadOutcome::Value(None) => {
                self.desk.answered(&mut self.timers, out);
                self.saw_nothing(register, now, out);
            }
            ReadOutcome::Unreachable => self.register_away(now, out),
            ReadOutcome::Amnesiac => self.register_forgot(register, now, out),
        }
    }

    fn register_swapped(
        &mut self,
        request: RequestId,
        outcome: SwapOutcome,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let Some(Question::Swap(register, nonce)) = self.desk.take(request, &mut self.timers) else { return };
        match outcome {
            SwapOutcome::Won => {
                self.desk.answered(&mut self.timers, out);
                // Gone from the list: a newer epoch was heard of in the meantime.
                if let Some(attempt) = self.ledger.wanted().attempt(nonce) {
                    let value = attempt.value.clone();
                    self.saw(value, now, out);
                }
            }
            SwapOutcome::Lost(Some(value)) => {
                self.desk.answered(&mut self.timers, out);
                self.saw(value, now, out);
            }
            SwapOutcome::Lost(None) => {
                self.desk.answered(&mut self.timers, out);
                self.saw_nothing(register, now, out);
            }
            SwapOutcome::Unknown => {
                if self.bug(Bug::UnknownIsLost) && matches!(self.state, State::Leading(_)) {
                    self.ledger.change().attempts.clear();
                }
                self.register_away(now, out);
            }
            SwapOutcome::Amnesiac => self.register_forgot(register, now, out),
        }
    }

    pub(crate) fn register_away(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        self.desk.failed(&self.config.timing, &mut self.timers, now, out);
        self.give_up_move(RefusedWhy::RegisterOutOfReach, out);
        self.force_without_old_register(out);
    }

    fn register_forgot(&mut self, register: RegisterId, now: MonotonicTime, out: &mut Vec<Action>) {
        if self.desk.reachable() {
            out.push(Action::Report(Condition::RegisterAmnesiac));
        }
        if self.moving_into() == Some(register) {
            // What we know is another register's.
            return self.register_away(now, out);
        }
        self.inform(register, out);
        self.force_without_tombstone();
        self.register_away(now, out);
    }

    /// It holds less than this replica acted on: it was reset, or another took its place. A replica never recreates
    /// it by itself, but what all of them know makes it whole again (rule 21).
    pub(crate) fn register_went_back(
        &mut self,
        register: RegisterId,
        found: Option<Epoch>,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        if self.desk.reachable() {
            let known = self.ledger.wanted().known_epoch();
            out.push(Action::Report(Condition::RegisterWentBack { known, found }));
        }
        self.inform(register, out);
        self.register_away(now, out);
    }

    fn inform(&self, register: RegisterId, out: &mut Vec<Action>) {
        out.push(Action::InformRegister {
            register,
            // Of this register: a tombstone of its predecessor is no value of it.
            known: self.ledger.wanted().known.clone().filter(|known| known.register == register),
            promise: self.ledger.told_promise(),
        });
    }

    fn connected(&mut self, node: NodeId, session: SessionId, now: MonotonicTime, out: &mut Vec<Action>) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.connect(session);
        let state = self.ledger.wanted();
        let message = Message::Hello {
            register: if self.bug(Bug::OrderUntold) { state.register } else { state.bound_for() },
            promise: self.ledger.told_promise(),
        };
        out.push(Action::Send { to: node, session, message });
        self.beacon_to(node, now, out);
    }

    fn message(&mut self, from: NodeId, message: Message, now: MonotonicTime, out: &mut Vec<Action>) {
        match message {
            Message::Hello { register, promise } => {
                let state = self.ledger.wanted();
                let same = register.is_none() || register == state.register;
                // Who lives in one that ours replaced was not forced since.
                let replaced = register.is_some_and(|register| state.replaced.contains(&register));
                self.with_peer(from, |peer| {
                    peer.agrees = same || replaced;
                    // Epochs of another register do not compare with ours.
                    if same {
                        peer.promised(promise);
                    }
                });
            }
            Message::Beacon { register, term, sent_ns, in_sync } => {
                self.beacon(from, register, term, sent_ns, in_sync, now, out);
            }
            Message::BeaconAck { term, sent_ns } => self.beacon_acknowledged(from, term, sent_ns, now, out),
            Message::Nack { term, promise } => {
                if self.led_term().is_some_and(|led| led.epoch == term.epoch) {
                    self.refused_by(from, promise, now);
                }
            }
            Message::Leaving => self.with_peer(from, |peer| peer.leaving = true),
            Message::YourTurn { epoch } => self.your_turn(epoch),
            Message::StepAside { term } => self.primary_stepped_aside(from, term, now, out),
        }
    }

    fn command(&mut self, command: Command, now: MonotonicTime, out: &mut Vec<Action>) {
        match command {
            Command::Lead => self.create(out),
            Command::Handover { to } => self.start_handover(to, now, out),
            Command::Force { confirmed_fenced, new_register, old_register_lost } => {
                self.force(confirmed_fenced, new_register, old_register_lost, out);
            }
            Command::MoveRegister { to } => self.move_register(to, out),
            Command::Rejoin => self.rejoin(out),
            Command::AddPeer { node } => {
                if node != self.config.me {
                    self.config.peers.insert(node);
                    self.peers.entry(node).or_default().removed = false;
                }
            }
            Command::RemovePeer { node } => self.remove_peer(node),
            Command::Stop => {
                self.say_leaving(out);
                self.step_down(out);
                self.state = State::Stopped;
                self.timers.retain(|_| false);
            }
        }
    }

    /// A leader whose copy turns out not to be whole gives way, as one does that starts with such a copy: another
    /// member takes over when this one is not heard.
    fn copy_usable_is(&mut self, usable: bool, now: MonotonicTime, out: &mut Vec<Action>) {
        self.copy_usable = usable;
        if !self.can_lead() && matches!(self.state, State::Leading(_)) {
            out.push(Action::Report(Condition::CopyUnusable));
            self.follow(None, now, out);
        }
    }

    fn disk_failed(&mut self, out: &mut Vec<Action>) {
        if matches!(self.state, State::Stopped | State::Failed { .. }) {
            return;
        }
        out.push(Action::Report(Condition::LocalDiskFailed));
        let vacate = self.led_term();
        self.say_leaving(out);
        self.step_down(out);
        self.state = State::Failed { vacate };
        self.timers.retain(|_| false);
    }

    /// The primary need not find out by itself that this replica is of no use any more.
    fn say_leaving(&mut self, out: &mut Vec<Action>) {
        if let State::Following(following) = &self.state
            && let Some((primary, _)) = following.leader
            && let Some(session) = self.peers.get(&primary).and_then(|peer| peer.session)
        {
            out.push(Action::Send { to: primary, session, message: Message::Leaving });
        }
    }

    /// What this peer says is a lie, or it does not know what it says.
    pub(crate) fn close_session(&mut self, peer: NodeId, why: &'static str, out: &mut Vec<Action>) {
        if let Some(session) = self.peers.get(&peer).and_then(|peer| peer.session) {
            out.push(Action::CloseSession { peer, session, why });
        }
    }

    pub(crate) fn with_peer(&mut self, node: NodeId, change: impl FnOnce(&mut Peer)) {
        if let Some(peer) = self.peers.get_mut(&node) {
            change(peer);
        }
    }

    pub(crate) fn refuse(&self, command: &'static str, why: RefusedWhy, out: &mut Vec<Action>) {
        out.push(Action::Report(Condition::Refused { command, why }));
    }

    pub(crate) fn draw_nonce(&mut self) -> Nonce {
        let nonce = Nonce(self.config.nonce_seed.wrapping_add(self.nonces_drawn));
        self.nonces_drawn += 1;
        nonce
    }

    pub(crate) fn register_id(&self) -> RegisterId {
        self.ledger.wanted().register.unwrap_or(self.config.register)
    }

    /// A copy that is whole, on a disk that works.
    pub(crate) fn can_lead(&self) -> bool {
        (self.copy_usable || self.bug(Bug::UnusableLeads)) && !matches!(self.state, State::Failed { .. })
    }

    /// This mistake is planted.
    #[cfg(feature = "planted-bugs")]
    pub(crate) fn bug(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    #[cfg(not(feature = "planted-bugs"))]
    pub(crate) fn bug(&self, _: Bug) -> bool {
        assert!(self.bug.is_none(), "mistakes are planted only in tests");
        false
    }

    /// From here on this member makes that mistake.
    #[cfg(feature = "planted-bugs")]
    pub fn plant(&mut self, bug: Bug) {
        self.bug = Some(bug);
    }
}

/// Handles for an exhaustive exploration: time does not pass, timers go off in any order, and two situations that
/// differ only in how many requests came before are one.
#[cfg(any(test, feature = "model"))]
impl Member {
    pub fn running_timers(&self) -> impl Iterator<Item = Timer> + '_ {
        self.timers.all()
    }

    /// Lets `timer` go off now, and no other.
    pub fn let_go_off(&mut self, timer: Timer, now: MonotonicTime, out: &mut Vec<Action>) {
        assert!(self.timers.is_set(timer), "{timer:?} does not run");
        self.timers.clear(timer);
        self.timer_went_off(timer, now, now, out);
        self.advance(now, out);
        self.ledger.flush(out);
    }

    pub fn renumber(&mut self, next_nonce: u128) {
        self.ledger.renumber();
        self.desk.renumber();
        self.config.nonce_seed = next_nonce;
        self.nonces_drawn = 0;
    }

    /// So much time has passed that a lease from `node`'s last acknowledgement would have ended.
    pub fn age_acknowledgement(&mut self, node: NodeId) {
        self.with_peer(node, |peer| peer.acknowledged = None);
    }

    /// So much time has passed that an answer to the beacon that waits for one would come too late.
    pub fn age_beacon(&mut self) {
        if let State::Following(following) = &mut self.state {
            following.unanswered = None;
        }
    }

    pub fn finds_register(&self) -> bool {
        self.desk.reachable()
    }

    pub fn awaits(&self) -> Option<RequestId> {
        self.desk.awaits()
    }

    pub fn wanted(&self) -> &PersistentState {
        self.ledger.wanted()
    }
}

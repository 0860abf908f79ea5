//! What may happen next, and what happens then.

use crate::model::check::Violation;
use crate::model::world::{Cause, Flow, Pending, TARGET, Vm, Wire, World, id};
use crate::timers::Timer;
use crate::{Command, Event, Message, ReadOutcome, RequestId, SwapOutcome};

/// One thing that happens. Nodes count from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    Deliver {
        from: u8,
        to: u8,
    },
    /// The register answers a read; the answer is on its way.
    Read {
        node: u8,
    },
    /// The answer arrives.
    Answer {
        node: u8,
    },
    /// The answer does not arrive in time, whatever it was.
    Silence {
        node: u8,
    },
    /// The swap at this place of the list reaches the register.
    Land {
        place: u8,
    },
    /// The superblock is durable.
    Persisted {
        node: u8,
    },
    Timer {
        node: u8,
        timer: Timer,
    },
    /// The guard's lease ends, and the member's with it.
    LeaseEnds {
        node: u8,
    },
    /// A machine that was told to go is gone.
    MachineGone {
        node: u8,
    },
    /// The guest writes.
    Write {
        node: u8,
    },
    /// The primary sends its log, and hears that it arrived. How that goes in detail is replication's to prove.
    Ship {
        from: u8,
        to: u8,
    },
    /// The log is made durable.
    Sync {
        node: u8,
    },
    Crash {
        node: u8,
        power: bool,
        written: bool,
    },
    Restart {
        node: u8,
    },
    /// Starts with a copy that turns out to be unusable.
    RestartSpoilt {
        node: u8,
    },
    /// A member knows more of the leader's log than its copy holds.
    CopyLost {
        node: u8,
    },
    Connect {
        a: u8,
        b: u8,
    },
    Disconnect {
        a: u8,
        b: u8,
    },
    Handover {
        from: u8,
        to: u8,
    },
    DiskFails {
        node: u8,
    },
    MoveRegister {
        node: u8,
    },
    /// The only one that is up is ordered to lead: the others are switched off, and stay so until that is done.
    Force {
        node: u8,
    },
    /// What only a replaced replica holds is given up.
    Rejoin {
        node: u8,
    },
    /// The others become replicas.
    Protect,
}

impl World {
    /// Everything that may happen next.
    pub(super) fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let count = self.nodes.len() as u8;
        for (&(from, to), queue) in &self.wires {
            if !queue.is_empty() {
                steps.push(Step::Deliver { from, to });
            }
        }
        for (place, swap) in (0u8..).zip(&self.swaps) {
            if self.may_reach(swap.value.0.epoch) {
                steps.push(Step::Land { place });
            }
        }
        for node in 0..self.replicas {
            self.steps_of(node, &mut steps);
        }
        if self.replicas < count && self.has_moved() && self.nodes[0].lead.is_some() {
            steps.push(Step::Protect);
        }
        for a in 0..self.replicas {
            for b in a + 1..self.replicas {
                let up = |node: u8| self.nodes[usize::from(node)].member.is_some();
                if self.wires.contains_key(&(a, b)) {
                    if self.left.disconnects > 0 {
                        steps.push(Step::Disconnect { a, b });
                    }
                } else if up(a) && up(b) {
                    steps.push(Step::Connect { a, b });
                }
            }
        }
        steps
    }

    fn steps_of(&self, me: u8, steps: &mut Vec<Step>) {
        let node = &self.nodes[usize::from(me)];
        if node.durable < node.log.len() && node.member.is_some() {
            steps.push(Step::Sync { node: me });
        }
        if node.dying {
            steps.push(Step::MachineGone { node: me });
        }
        let Some(member) = &node.member else {
            if self.is_being_forced() {
                return;
            }
            steps.push(Step::Restart { node: me });
            if self.left.spoilt_copies > 0 {
                steps.push(Step::RestartSpoilt { node: me });
            }
            if node.lease.is_some() {
                steps.push(Step::LeaseEnds { node: me });
            }
            return;
        };
        match &node.pending {
            Some(Pending::Read(_)) => steps.push(Step::Read { node: me }),
            Some(Pending::ReadDone(_) | Pending::SwapDone(_)) => steps.push(Step::Answer { node: me }),
            Some(Pending::Swap) | None => {}
        }
        if node.pending.is_some() && self.left.silences > 0 {
            steps.push(Step::Silence { node: me });
        }
        if node.writing.is_some() {
            steps.push(Step::Persisted { node: me });
        }
        let mut lease = node.lease.is_some();
        for timer in member.running_timers() {
            match timer {
                // The adapter always answers; `Silence` stands for both.
                Timer::RegisterDeadline | Timer::Start | Timer::RegisterCheck => {}
                Timer::Lease => lease = true,
                Timer::TakeoverWait => {
                    if self.wait_may_end(me) {
                        steps.push(Step::Timer { node: me, timer });
                    }
                }
                Timer::PeerDeadline(_) | Timer::Suspect | Timer::Handover => {
                    if self.left.deadlines > 0 {
                        steps.push(Step::Timer { node: me, timer });
                    }
                }
                Timer::Beacon if !self.beacon_matters(me) => {}
                // With the register in reach nobody is impatient.
                Timer::Patience if member.finds_register() => {}
                Timer::Beacon | Timer::RegisterRetry | Timer::Patience | Timer::Readmit(_) => {
                    steps.push(Step::Timer { node: me, timer });
                }
            }
        }
        // A lease that ends for no reason is a deadline like others.
        if lease && (node.lease != Some(0) || self.left.deadlines > 0) {
            steps.push(Step::LeaseEnds { node: me });
        }
        if node.lead.is_some() && self.left.moves > 0 && self.replicas < self.nodes.len() as u8 {
            let wanted = member.wanted();
            let moves = wanted.register == Some(TARGET)
                || wanted.attempts.iter().any(|attempt| attempt.value.register == TARGET);
            if !moves {
                steps.push(Step::MoveRegister { node: me });
            }
        }
        let mut others = self.nodes.iter().zip(0u8..).filter(|&(_, other)| other != me);
        let alone = others.all(|(other, _)| other.member.is_none() && other.vm == Vm::Absent);
        if self.left.forces > 0 && node.lead.is_none() && !self.is_being_forced() && alone {
            steps.push(Step::Force { node: me });
        }
        if member.role() == crate::Role::Superseded {
            steps.push(Step::Rejoin { node: me });
        }
        if let Some(lead) = &node.lead {
            if self.left.spoilt_copies > 0 && !lead.serving {
                steps.push(Step::CopyLost { node: me });
            }
            if lead.flow == Flow::Open && lead.serving && node.vm == Vm::Running && self.left.writes > 0 {
                steps.push(Step::Write { node: me });
            }
            for to in self.peers_connected(me) {
                let behind =
                    lead.views.get(&to).is_none_or(|&(a, d)| a != node.log.len() || d < node.log.len());
                if behind && self.nodes[usize::from(to)].follow == Some((me, lead.term)) {
                    steps.push(Step::Ship { from: me, to });
                }
                if self.left.handovers > 0 && lead.serving && lead.flow == Flow::Open {
                    steps.push(Step::Handover { from: me, to });
                }
            }
        }
        let outcomes: &[bool] = if node.writing.is_some() { &[false, true] } else { &[false] };
        for &written in outcomes {
            if self.left.crashes > 0 {
                steps.push(Step::Crash { node: me, power: false, written });
            }
            if self.left.power_cuts > 0 {
                steps.push(Step::Crash { node: me, power: true, written });
            }
        }
        if self.left.disk_failures > 0 {
            steps.push(Step::DiskFails { node: me });
        }
    }

    /// A beacon now would tell somebody something, or renew something.
    fn beacon_matters(&self, me: u8) -> bool {
        let node = &self.nodes[usize::from(me)];
        let Some(lead) = &node.lead else { return false };
        let alone = lead.acknowledgers.len() == 1;
        let tells = |peer: u8| {
            let other = &self.nodes[usize::from(peer)];
            let heard = other.follow == Some((me, lead.term));
            let calm = other.member.as_ref().is_some_and(|m| m.role() == crate::Role::Following);
            let fresh = node.last_ack.get(&peer) == Some(&0);
            let under_way = self.wires[&(me, peer)]
                .iter()
                .any(|wire| matches!(wire.message, Message::Beacon { term, .. } if term == lead.term));
            let told = heard && calm && fresh;
            !told && !under_way
        };
        (alone && node.lease != Some(0)) || self.peers_connected(me).any(tells)
    }

    /// Every lease that rests on something sent before this wait has ended: so long is the wait.
    pub(super) fn wait_may_end(&self, me: u8) -> bool {
        self.nodes.iter().all(|node| node.vm != Vm::Running || node.lease.is_none_or(|c| c & (1 << me) == 0))
    }

    /// Does it.
    pub(super) fn take(&mut self, step: Step) -> Result<(), Violation> {
        self.happen(step)?;
        self.tell_facts()?;
        self.check()
    }

    fn happen(&mut self, step: Step) -> Result<(), Violation> {
        match step {
            Step::Deliver { from, to } => self.deliver(from, to),
            Step::Read { node } => {
                let Some(Pending::Read(register)) = self.nodes[usize::from(node)].pending else {
                    unreachable!("enabled")
                };
                let value = self.register_of(register).clone();
                self.node(node).pending = Some(Pending::ReadDone(value));
                Ok(())
            }
            Step::Answer { node } => self.answer(node),
            Step::Silence { node } => {
                self.left.silences -= 1;
                self.silence(node)
            }
            Step::Land { place } => self.land(usize::from(place)),
            Step::Persisted { node } => {
                let (state, receipt) = self.node(node).writing.take().expect("enabled");
                self.node(node).persisted = state;
                self.give(node, Event::Persisted { receipt }, Cause::Other)
            }
            Step::Timer { node, timer } => {
                if matches!(timer, Timer::PeerDeadline(_) | Timer::Suspect | Timer::Handover) {
                    self.left.deadlines = self.left.deadlines.saturating_sub(1);
                }
                if timer == Timer::TakeoverWait {
                    self.end_wait(node);
                }
                let cause = if timer == Timer::Beacon { Cause::Beacon } else { Cause::Other };
                self.let_go_off(node, timer, cause)
            }
            Step::LeaseEnds { node } => {
                if self.nodes[usize::from(node)].lease == Some(0)
                    && self.nodes[usize::from(node)].member.is_some()
                {
                    self.left.deadlines = self.left.deadlines.saturating_sub(1);
                }
                self.end_lease(node)
            }
            Step::MachineGone { node } => {
                self.node(node).dying = false;
                self.node(node).vm = Vm::Absent;
                self.node(node).lease = None;
                self.give(node, Event::VmStopped, Cause::Other)
            }
            Step::Write { node } => {
                self.left.writes -= 1;
                let node = self.node(node);
                let term = node.lead.as_ref().expect("enabled").term;
                node.log.push(term);
                Ok(())
            }
            Step::Ship { from, to } => {
                let log = self.node(from).log.clone();
                let node = self.node(to);
                let common = node.log.iter().zip(&log).take_while(|(a, b)| a == b).count();
                node.durable = node.durable.min(common);
                node.log = log;
                self.acknowledge_log(to);
                Ok(())
            }
            Step::Sync { node } => {
                self.node(node).durable = self.node(node).log.len();
                self.acknowledge_log(node);
                Ok(())
            }
            Step::Crash { node, power, written } => {
                let left = if power { &mut self.left.power_cuts } else { &mut self.left.crashes };
                *left -= 1;
                self.crash(node, power, written)
            }
            Step::Restart { node } => self.start(node),
            Step::RestartSpoilt { node } => {
                self.left.spoilt_copies -= 1;
                self.node(node).usable = false;
                self.start(node)
            }
            Step::CopyLost { node } => {
                self.left.spoilt_copies -= 1;
                self.node(node).usable = false;
                self.give(node, Event::CopyUsable(false), Cause::Other)
            }
            Step::Connect { a, b } => self.connect(a, b),
            Step::Disconnect { a, b } => {
                self.left.disconnects -= 1;
                self.disconnect(a, b)
            }
            Step::Handover { from, to } => {
                self.left.handovers -= 1;
                self.give(from, Event::Command(Command::Handover { to: id(to) }), Cause::Other)
            }
            Step::DiskFails { node } => {
                self.left.disk_failures -= 1;
                self.give(node, Event::LocalDiskFailed, Cause::Other)
            }
            Step::MoveRegister { node } => {
                self.left.moves -= 1;
                self.give(node, Event::Command(Command::MoveRegister { to: TARGET }), Cause::Other)
            }
            Step::Force { node } => {
                self.left.forces -= 1;
                let (new_register, confirmed_fenced, old_register_lost) = (TARGET, true, false);
                let order = Command::Force { confirmed_fenced, new_register, old_register_lost };
                self.give(node, Event::Command(order), Cause::Other)
            }
            Step::Rejoin { node } => self.give(node, Event::Command(Command::Rejoin), Cause::Other),
            Step::Protect => {
                let count = self.nodes.len() as u8;
                self.replicas = count;
                for node in 1..count {
                    self.give(0, Event::Command(Command::AddPeer { node: id(node) }), Cause::Other)?;
                    self.start(node)?;
                }
                Ok(())
            }
        }
    }

    fn deliver(&mut self, from: u8, to: u8) -> Result<(), Violation> {
        let wire = self.wires.get_mut(&(from, to)).and_then(|queue| queue.pop_front()).expect("enabled");
        let Wire { message, covers } = wire;
        match message {
            Message::Beacon { .. } => self.node(to).heard.insert(from, covers),
            Message::BeaconAck { .. } => self.node(to).last_ack.insert(from, covers),
            _ => None,
        };
        let session = rempart_types::SessionId(1);
        self.give(to, Event::Message { from: id(from), session, message }, Cause::Other)
    }

    fn acknowledge_log(&mut self, me: u8) {
        let node = self.node(me);
        let view = (node.log.len(), node.durable);
        if let Some((primary, term)) = node.follow
            && self.wires.contains_key(&(me, primary))
            && let Some(lead) = &mut self.node(primary).lead
            && lead.term == term
        {
            lead.views.insert(me, view);
        }
    }

    fn answer(&mut self, me: u8) -> Result<(), Violation> {
        let event = match self.node(me).pending.take().expect("enabled") {
            Pending::ReadDone(value) => {
                Event::RegisterRead { request: RequestId(1), outcome: ReadOutcome::Value(value) }
            }
            Pending::SwapDone(outcome) => Event::RegisterSwapped { request: RequestId(1), outcome },
            Pending::Read(_) | Pending::Swap => unreachable!("not answered yet"),
        };
        self.give(me, event, Cause::Other)
    }

    fn silence(&mut self, me: u8) -> Result<(), Violation> {
        let event = match self.node(me).pending.take().expect("enabled") {
            Pending::Read(_) | Pending::ReadDone(_) => {
                Event::RegisterRead { request: RequestId(1), outcome: ReadOutcome::Unreachable }
            }
            Pending::Swap | Pending::SwapDone(_) => {
                Event::RegisterSwapped { request: RequestId(1), outcome: SwapOutcome::Unknown }
            }
        };
        for swap in self.swaps.iter_mut().filter(|swap| swap.node == me) {
            swap.awaited = false;
        }
        self.give(me, event, Cause::Other)
    }

    pub(super) fn land(&mut self, place: usize) -> Result<(), Violation> {
        let swap = self.swaps.remove(place);
        let register = if swap.value.0.register == TARGET { &mut self.target } else { &mut self.register };
        let outcome = if register.as_ref().map(|value| value.epoch) == swap.expected {
            let before = register.replace(swap.value.0.clone());
            self.ghost.landed(before.as_ref(), &swap.value.0)?;
            SwapOutcome::Won
        } else {
            SwapOutcome::Lost(register.clone())
        };
        let node = self.node(swap.node);
        if swap.awaited && node.pending == Some(Pending::Swap) {
            node.pending = Some(Pending::SwapDone(outcome));
        }
        self.forget_lost_swaps();
        Ok(())
    }

    pub(super) fn end_lease(&mut self, me: u8) -> Result<(), Violation> {
        let node = self.node(me);
        node.lease = None;
        if node.vm == Vm::Running {
            node.vm = Vm::Paused;
        }
        let runs =
            node.member.as_ref().is_some_and(|m| m.running_timers().any(|timer| timer == Timer::Lease));
        if runs { self.let_go_off(me, Timer::Lease, Cause::Other) } else { Ok(()) }
    }
}

//! I7: once everything is healed, somebody leads, and everybody comes in sync.

use crate::model::check::Violation;
use crate::model::step::Step;
use crate::model::world::{Bounds, Vm, World, id};
use crate::timers::Timer;
use rempart_types::Epoch;

/// Rounds of everything-that-can-happen until all must be well.
const ROUNDS: usize = 60;

impl World {
    /// Restarts, connects, answers and delivers everything, fairly, until all is well.
    pub(super) fn heal(mut self) -> Result<(), Violation> {
        self.last_epoch = Epoch(u64::MAX);
        // Unless it moved already, it may still be told to.
        let moves = if self.replicas < self.left.nodes { u8::MAX } else { 0 };
        self.left = Bounds { nodes: self.left.nodes, moves, ..Bounds::NOTHING };
        for round in 0..ROUNDS {
            if self.is_well() {
                return Ok(());
            }
            self.heal_round(round)?;
        }
        Err(Violation::Stuck { why: self.describe() })
    }

    fn heal_round(&mut self, round: usize) -> Result<(), Violation> {
        let count = self.nodes.len() as u8;
        for node in 0..self.replicas {
            if self.nodes[usize::from(node)].member.is_none() {
                self.take(Step::Restart { node })?;
            }
        }
        // What is quick happens before anything is waited for.
        for _ in 0..200 {
            let steps = self.steps();
            let quick = steps
                .iter()
                .find(|step| self.is_quick(step))
                .or_else(|| steps.iter().find(|step| matches!(step, Step::Ship { .. })));
            let quick = quick.copied();
            let Some(step) = quick else { break };
            self.take(step)?;
        }
        for node in 0..count {
            self.go_off(node, |timer| timer == Timer::Beacon)?;
        }
        // Silence is noticed only where there is silence, and only after a while.
        let leads = self.nodes.iter().any(|node| node.lead.is_some());
        if round % 4 == 3 && !leads {
            let turn = (round / 4) % usize::from(count);
            let node = u8::try_from(turn).expect("few nodes");
            self.go_off(node, |timer| timer == Timer::Suspect)?;
        }
        if round % 4 == 1 {
            for node in 0..count {
                if self.nodes[usize::from(node)].runs(Timer::TakeoverWait) {
                    for other in (0..count).filter(|&other| other != node) {
                        self.end_lease(other)?;
                    }
                    self.go_off(node, |timer| timer == Timer::TakeoverWait)?;
                }
            }
        }
        if round % 12 == 11 {
            for node in 0..count {
                self.go_off(node, |timer| matches!(timer, Timer::PeerDeadline(_)))?;
            }
        }
        Ok(())
    }

    fn is_quick(&self, step: &Step) -> bool {
        match step {
            Step::Deliver { .. } | Step::Read { .. } | Step::Answer { .. } => true,
            Step::Persisted { .. } | Step::Sync { .. } | Step::Connect { .. } => true,
            Step::MachineGone { .. } | Step::MoveRegister { .. } | Step::Protect | Step::Rejoin { .. } => {
                true
            }
            // Swaps nobody waits for need not land.
            Step::Land { place } => self.swaps[usize::from(*place)].awaited,
            Step::Timer { timer, .. } => {
                matches!(timer, Timer::RegisterRetry | Timer::Patience | Timer::Readmit(_))
            }
            _ => false,
        }
    }

    fn go_off(&mut self, node: u8, which: impl Fn(Timer) -> bool) -> Result<(), Violation> {
        let Some(member) = &self.nodes[usize::from(node)].member else { return Ok(()) };
        let timers: Vec<Timer> = member.running_timers().filter(|&timer| which(timer)).collect();
        for timer in timers {
            if self.nodes[usize::from(node)].runs(timer) {
                self.take(Step::Timer { node, timer })?;
            }
        }
        Ok(())
    }

    fn is_well(&self) -> bool {
        let usable = (0u8..).zip(&self.nodes).filter(|(_, node)| node.is_fit()).map(|(index, _)| id(index));
        let usable: rempart_types::NodeSet = usable.collect();
        let Some(register) = self.present_register() else { return false };
        let led = self.nodes.iter().any(|node| {
            node.vm == Vm::Running
                && node.lead.as_ref().is_some_and(|lead| {
                    lead.serving
                        && lead.term.epoch == register.epoch
                        && lead.acknowledgers == register.in_sync
                })
        });
        // A copy that cannot lead, alone in sync, is a loss only an operator may accept.
        let hopeless = register.in_sync.iter().all(|node| !usable.contains(node));
        hopeless || (led && (register.in_sync == usable || register.in_sync == self.everybody()))
    }

    fn describe(&self) -> String {
        self.in_short()
    }

    /// A few lines about everybody.
    pub(super) fn in_short(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        if let Some(value) = self.present_register() {
            let in_sync: Vec<u128> = value.in_sync.iter().map(|node| node.0 - 1).collect();
            let (epoch, primary) = (value.epoch, value.primary.0 - 1);
            write!(text, "    register {epoch} primary {primary} in sync {in_sync:?} {:?}", value.intent)
                .ok();
        }
        let swaps =
            self.swaps.iter().map(|s| (s.node, s.awaited, s.value.0.epoch.0, s.value.0.primary.0 - 1));
        write!(text, " swaps {:?} flushed {:?}", swaps.collect::<Vec<_>>(), self.ghost.flushed.len()).ok();
        for (index, node) in self.nodes.iter().enumerate() {
            let log: Vec<u64> = node.log.iter().map(|term| term.epoch.0).collect();
            write!(
                text,
                "\n    {index}: log {log:?}/{} vm {:?} lease {:?}",
                node.durable, node.vm, node.lease
            )
            .ok();
            write!(
                text,
                " pending {:?}",
                node.pending.as_ref().map(|pending| match pending {
                    super::world::Pending::Read(_) => "read",
                    super::world::Pending::Swap => "swap",
                    _ => "answered",
                })
            )
            .ok();
            if let Some(lead) = &node.lead {
                let acks: Vec<u128> = lead.acknowledgers.iter().map(|node| node.0 - 1).collect();
                write!(
                    text,
                    " leads {} acks {acks:?} {:?} serving {} views {:?}",
                    lead.term, lead.flow, lead.serving, lead.views
                )
                .ok();
            }
            if let Some((leader, term)) = node.follow {
                write!(text, " follows {leader} in {term}").ok();
            }
            if let Some(member) = &node.member {
                let status = member.status();
                write!(
                    text,
                    " {:?} promise {} known {} unsettled {}",
                    status.role, status.promise, status.epoch, status.unsettled
                )
                .ok();
                let timers: Vec<Timer> = member.running_timers().collect();
                write!(text, " {timers:?}").ok();
            }
        }
        write!(text, "\n    wires {:?}", self.wires).ok();
        text
    }
}

impl super::world::Node {
    fn runs(&self, timer: Timer) -> bool {
        self.member.as_ref().is_some_and(|member| member.running_timers().any(|other| other == timer))
    }

    fn is_fit(&self) -> bool {
        self.usable && self.member.as_ref().is_none_or(|member| member.role() != crate::Role::Failed)
    }
}

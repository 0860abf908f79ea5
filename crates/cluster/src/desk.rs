//! The one request to the register that may be under way, and when the next may follow.

use crate::persistent::{Attempt, Durable};
use crate::timers::{Timer, Timers};
use crate::{Action, Condition, RequestId, Timing};
use rempart_types::{MonotonicTime, Nonce, RegisterId};

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Question {
    Read(RegisterId),
    Swap(RegisterId, Nonce),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Desk {
    under_way: Option<(RequestId, Question)>,
    last: RequestId,
    /// Failures in a row; sets the pause before the next try.
    failures: u32,
    reachable: bool,
}

impl Desk {
    /// Past this the pause no longer grows (2^16 times the shortest exceeds every limit).
    const MAX_FAILURES: u32 = 16;

    pub(crate) fn new() -> Desk {
        Desk { under_way: None, last: RequestId(0), failures: 0, reachable: true }
    }

    pub(crate) fn reachable(&self) -> bool {
        self.reachable
    }

    /// Nothing is under way and no pause runs.
    pub(crate) fn free(&self, timers: &Timers) -> bool {
        self.under_way.is_none() && !timers.is_set(Timer::RegisterRetry)
    }

    pub(crate) fn read(
        &mut self,
        register: RegisterId,
        timing: &Timing,
        timers: &mut Timers,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let request = self.start(Question::Read(register), timing, timers, now);
        out.push(Action::ReadRegister { request, register });
    }

    /// Sends a swap. That it may be under way is durable: the type says so.
    pub(crate) fn swap(
        &mut self,
        attempt: Durable<Attempt>,
        timing: &Timing,
        timers: &mut Timers,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let Attempt { expected, value } = attempt.into_inner();
        let register = value.register;
        let request = self.start(Question::Swap(register, value.nonce), timing, timers, now);
        out.push(Action::SwapRegister { request, register, expected, value });
    }

    fn start(
        &mut self,
        question: Question,
        timing: &Timing,
        timers: &mut Timers,
        now: MonotonicTime,
    ) -> RequestId {
        assert!(self.under_way.is_none(), "one request to the register at a time");
        self.last = RequestId(self.last.0 + 1);
        self.under_way = Some((self.last, question));
        // The adapter keeps the deadline; this one only catches an adapter that does not.
        timers.set(Timer::RegisterDeadline, now + timing.register_deadline + timing.beacon_interval);
        self.last
    }

    /// What `request` asked, if its answer is still awaited.
    pub(crate) fn take(&mut self, request: RequestId, timers: &mut Timers) -> Option<Question> {
        let (_, question) = self.under_way.take_if(|(current, _)| *current == request)?;
        timers.clear(Timer::RegisterDeadline);
        Some(question)
    }

    /// Stops waiting for the answer, whatever it was.
    pub(crate) fn give_up(&mut self, timers: &mut Timers) -> Option<Question> {
        timers.clear(Timer::RegisterDeadline);
        self.under_way.take().map(|(_, question)| question)
    }

    /// An answer came.
    pub(crate) fn answered(&mut self, timers: &mut Timers, out: &mut Vec<Action>) {
        self.failures = 0;
        timers.clear(Timer::RegisterRetry);
        if !self.reachable {
            self.reachable = true;
            out.push(Action::Report(Condition::RegisterBack));
        }
    }

    /// No answer, or one that says nothing: pause, then try again.
    pub(crate) fn failed(
        &mut self,
        timing: &Timing,
        timers: &mut Timers,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let pause = timing.register_retry.saturating_mul(1 << self.failures).min(timing.register_retry_most);
        timers.set(Timer::RegisterRetry, now + pause);
        if pause < timing.register_retry_most && self.failures < Self::MAX_FAILURES {
            self.failures += 1;
        }
        if self.reachable {
            self.reachable = false;
            out.push(Action::Report(Condition::RegisterOutOfReach));
        }
    }

    /// Forgets how many requests came before.
    #[cfg(any(test, feature = "model"))]
    pub(crate) fn renumber(&mut self) {
        self.last = RequestId(0);
        if let Some((request, _)) = &mut self.under_way {
            *request = RequestId(1);
            self.last = RequestId(1);
        }
    }

    #[cfg(any(test, feature = "model"))]
    pub(crate) fn awaits(&self) -> Option<RequestId> {
        self.under_way.map(|(request, _)| request)
    }
}

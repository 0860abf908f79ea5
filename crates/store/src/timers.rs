//! What is due by time, when traffic alone does not bring it about.

use crate::event::Output;
use crate::store::Store;
use rempart_types::{Lsn, MonotonicTime};
use std::time::Duration;

/// The next times, each set while there is something to do.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    now: MonotonicTime,
    sync: Option<MonotonicTime>,
    apply: Option<MonotonicTime>,
    checkpoint: Option<MonotonicTime>,
    room: Option<MonotonicTime>,
}

impl Timers {
    pub fn next(&self) -> Option<MonotonicTime> {
        [self.sync, self.apply, self.checkpoint, self.room].into_iter().flatten().min()
    }

    /// The disk is full: a resync goes on after `pause`.
    pub fn wait_for_room(&mut self, pause: Duration) {
        self.room = Some(self.now + pause);
    }

    fn take_due(timer: &mut Option<MonotonicTime>, now: MonotonicTime) -> bool {
        let due = timer.is_some_and(|at| at <= now);
        if due {
            *timer = None;
        }
        due
    }
}

impl Store {
    /// What time it is: delays count from here.
    pub fn now_is(&mut self, now: MonotonicTime) {
        self.timers.now = self.timers.now.max(now);
    }

    /// Sets the timers that have a reason and are not set.
    pub(crate) fn arm_timers(&mut self) {
        let now = self.timers.now;
        let unsynced = self.journal.durable < self.journal.log_end;
        // What holds application back starts it again when it is over: no timer, or it would go off all the time.
        let unapplied = self.may_apply() && self.apply_bound() > self.applied;
        let lazy = |lsn: Lsn, other: Lsn| lsn > other;
        let unnoted = lazy(self.applied, self.superblock.applied)
            || lazy(self.journal.durable, self.superblock_written.durable)
            || lazy(self.stable_here(), self.superblock_written.stable);
        if unsynced {
            self.timers.sync.get_or_insert(now + self.limits.sync_delay);
        }
        if unapplied {
            self.timers.apply.get_or_insert(now + self.limits.apply_delay);
        }
        if unnoted {
            self.timers.checkpoint.get_or_insert(now + self.limits.checkpoint_delay);
        }
    }

    /// Does what is due by time: own syncs, application, checkpoints.
    pub fn tick(&mut self, now: MonotonicTime, out: &mut Output) {
        self.now_is(now);
        if self.failed.is_some() || self.closing {
            return;
        }
        if Timers::take_due(&mut self.timers.sync, now) {
            self.want_sync(out);
        }
        if Timers::take_due(&mut self.timers.apply, now) {
            self.apply_now = true;
            self.apply_more(out);
        }
        if Timers::take_due(&mut self.timers.checkpoint, now) && self.task.is_none() {
            self.checkpoint(out);
        }
        if Timers::take_due(&mut self.timers.room, now) {
            self.advance_round(out);
        }
        self.arm_timers();
    }
}

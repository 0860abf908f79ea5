//! One replica's view of its group.

use crate::{Action, Config, Event, PersistentState, Status};
use rempart_types::MonotonicTime;

/// One replica of one group: who leads, who must acknowledge, may the machine run.
///
/// `Clone`, `Eq` and `Hash` are for the exhaustive check, which explores this very type.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Member {
    config: Config,
    recovered: PersistentState,
}

impl Member {
    /// Starts with what the store recovered. `usable`: the copy may lead (see `Event::CopyUsable`). Nothing is
    /// emitted yet; the first `Event::Tick` starts it, so `next_wake` is `now`.
    ///
    /// # Panics
    /// If the timing is not valid.
    pub fn new(config: Config, recovered: PersistentState, usable: bool, now: MonotonicTime) -> Member {
        let _ = (usable, now);
        Member { config, recovered }
    }

    /// Takes one fact; appends what follows from it to `out`.
    pub fn handle(&mut self, _event: Event, _now: MonotonicTime, _out: &mut Vec<Action>) {
        todo!()
    }

    /// When `Event::Tick` is wanted next.
    pub fn next_wake(&self) -> Option<MonotonicTime> {
        todo!()
    }

    pub fn status(&self) -> Status {
        let _ = (&self.config, &self.recovered);
        todo!()
    }
}

//! What a replica must remember about its promises, and the rule that nothing leaves before it is durable.

use crate::{Action, Receipt};
use rempart_types::{Epoch, Intent, NodeId, NodeSet, Nonce, RegisterId, RegisterValue, Term};
use serde::{Deserialize, Serialize};

/// One attempt to change the register whose outcome is not known yet: it may land at any time.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Attempt {
    /// The epoch the register must be at for it to land; `None`: it must hold nothing.
    pub expected: Option<Epoch>,
    pub value: RegisterValue,
}

/// The cluster's part of the superblock. Stored whole, replaced whole.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct PersistentState {
    /// The register this group lives in; `None` until it was created or found.
    pub register: Option<RegisterId>,
    /// Nobody below this epoch is followed or acknowledged any more.
    pub promise: Epoch,
    /// The last term this replica opened as primary. It is opened once; a restart needs a newer one.
    pub activated: Term,
    /// The newest value of the register this replica acted on.
    pub known: Option<RegisterValue>,
    /// Own swaps that may still land.
    pub attempts: Vec<Attempt>,
    /// Since this replica got the primacy, the wait for every older lease is over: a restart need not wait again.
    pub machine_is_ours: bool,
    /// Registers that this replica was forced to leave, oldest first: each was replaced by the next one, or by
    /// `register`.
    pub replaced: Vec<RegisterId>,
}

impl PersistentState {
    /// Attempts kept at once. A new attempt is only made for a new value; past this the last one is repeated.
    pub const MAX_ATTEMPTS: usize = 8;
    /// Replaced registers remembered. Whoever lives in one that was forgotten counts as forced elsewhere.
    pub const MAX_REPLACED: usize = 8;

    /// The newest epoch this replica acted on.
    pub fn known_epoch(&self) -> Epoch {
        self.known.as_ref().map_or(Epoch::ZERO, |value| value.epoch)
    }

    /// Everyone whom the known value or an attempt that may still land names (rule 9).
    pub fn named(&self) -> NodeSet {
        let values = self.known.iter().chain(self.attempts.iter().map(|attempt| &attempt.value));
        values.flat_map(|value| value.in_sync.iter()).collect()
    }

    /// Where this replica may lead next without having to hear of anybody: its register, or the one that it is being
    /// forced into. Once that order's swap may land, nothing takes it back.
    pub(crate) fn bound_for(&self) -> Option<RegisterId> {
        let elsewhere = self.attempts.iter().find_map(|attempt| match attempt.value.intent {
            Intent::Tombstone { successor } => Some(successor),
            _ => Some(attempt.value.register).filter(|&register| Some(register) != self.register),
        });
        elsewhere.or(self.register)
    }

    /// The group goes on in the register of `value`, by force.
    pub(crate) fn replace(&mut self, left: RegisterId, value: RegisterValue) {
        if left != value.register {
            self.replaced.push(left);
            let forgotten = self.replaced.len().saturating_sub(Self::MAX_REPLACED);
            self.replaced.drain(..forgotten);
        }
        self.register = Some(value.register);
        self.known = Some(value);
        self.attempts.clear();
        self.machine_is_ours = false;
    }

    pub(crate) fn attempt(&self, nonce: Nonce) -> Option<&Attempt> {
        self.attempts.iter().find(|attempt| attempt.value.nonce == nonce)
    }

    /// An attempt that gives the primacy to another may still land.
    pub(crate) fn gives_away(&self, me: NodeId) -> bool {
        self.attempts.iter().any(|attempt| attempt.value.primary != me)
    }

    /// The register holds, or held, `value`: every attempt made on something older can no longer land.
    pub(crate) fn record(&mut self, value: &RegisterValue, me: NodeId) {
        if self.known.as_ref().is_none_or(|known| known.epoch < value.epoch) {
            self.known = Some(value.clone());
        }
        self.outdate(value.epoch);
        // What was meant for another register was part of a move that came to nothing.
        self.attempts.retain(|attempt| attempt.value.register == value.register);
        if value.primary != me {
            self.machine_is_ours = false;
        }
    }

    /// The register has reached `epoch`: swaps that expect something older lose.
    pub(crate) fn outdate(&mut self, epoch: Epoch) {
        self.attempts.retain(|attempt| attempt.expected.is_some_and(|expected| expected >= epoch));
    }
}

/// Something that is on the disk of this replica. Only the ledger makes one, from a receipt: a message, swap or
/// order that depends on a promise takes this instead of the bare value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Durable<T>(T);

impl<T> Durable<T> {
    pub(crate) fn get(&self) -> &T {
        &self.0
    }

    pub(crate) fn into_inner(self) -> T {
        self.0
    }
}

/// The persistent state as it should be, as it is being written, and as it surely is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Ledger {
    wanted: PersistentState,
    writing: Option<(Receipt, PersistentState)>,
    durable: PersistentState,
    last: Receipt,
}

impl Ledger {
    pub(crate) fn new(recovered: PersistentState) -> Ledger {
        assert!(
            recovered.known.as_ref().is_none_or(|known| Some(known.register) == recovered.register),
            "the known value belongs to another register"
        );
        Ledger { wanted: recovered.clone(), writing: None, durable: recovered, last: Receipt(0) }
    }

    /// The state this member acts on, durable or soon to be.
    pub(crate) fn wanted(&self) -> &PersistentState {
        &self.wanted
    }

    pub(crate) fn change(&mut self) -> &mut PersistentState {
        &mut self.wanted
    }

    /// Asks for the wanted state to be written, unless that is so or a write is under way.
    pub(crate) fn flush(&mut self, out: &mut Vec<Action>) {
        assert!(self.wanted.promise >= self.durable.promise, "a promise was undone");
        assert!(self.wanted.activated >= self.durable.activated, "an opened term was forgotten");
        if self.writing.is_none() && self.wanted != self.durable {
            self.last = Receipt(self.last.0 + 1);
            self.writing = Some((self.last, self.wanted.clone()));
            out.push(Action::Persist { state: self.wanted.clone(), receipt: self.last });
        }
    }

    pub(crate) fn persisted(&mut self, receipt: Receipt) {
        let (expected, state) = self.writing.take().expect("a receipt for nothing");
        assert_eq!(receipt, expected, "a receipt out of turn");
        self.durable = state;
    }

    pub(crate) fn settled(&self) -> bool {
        self.wanted == self.durable
    }

    /// The promise nobody can make this replica undo. `None` while a higher one is being written: nothing may be
    /// acknowledged or refused in between.
    pub(crate) fn promise(&self) -> Option<Durable<Epoch>> {
        (self.wanted.promise == self.durable.promise).then_some(Durable(self.durable.promise))
    }

    /// The promise on disk, for telling others. It may be about to rise.
    pub(crate) fn told_promise(&self) -> Epoch {
        self.durable.promise
    }

    /// The right to append in the term wanted, once it is on disk that this replica opened it.
    pub(crate) fn opened(&self) -> Option<Durable<Term>> {
        (self.wanted.activated == self.durable.activated).then_some(Durable(self.durable.activated))
    }

    /// The attempt, once it is on disk that it may be under way.
    pub(crate) fn attempt(&self, nonce: Nonce) -> Option<Durable<Attempt>> {
        self.durable.attempt(nonce).filter(|_| self.promise().is_some()).cloned().map(Durable)
    }

    /// Everyone who must acknowledge: whoever is named by what is known or may still land, now or after a crash.
    pub(crate) fn named(&self) -> NodeSet {
        if self.writing.is_none()
            && self.wanted.attempts.is_empty()
            && self.durable.attempts.is_empty()
            && self.wanted.known_epoch() == self.durable.known_epoch()
            && let (Some(wanted), Some(durable)) = (&self.wanted.known, &self.durable.known)
            && wanted.in_sync == durable.in_sync
        {
            return wanted.in_sync.clone();
        }
        let writing = self.writing.as_ref().map(|(_, state)| state.named()).unwrap_or_default();
        self.wanted.named().union(&self.durable.named()).union(&writing)
    }

    #[cfg(feature = "planted-bugs")]
    pub(crate) fn undurable_attempt(&self, nonce: Nonce) -> Option<Durable<Attempt>> {
        self.wanted.attempt(nonce).cloned().map(Durable)
    }

    /// Forgets how many states were written before, so that equal situations are equal.
    #[cfg(any(test, feature = "model"))]
    pub(crate) fn renumber(&mut self) {
        self.last = Receipt(0);
        if let Some((receipt, _)) = &mut self.writing {
            *receipt = Receipt(1);
            self.last = Receipt(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_types::Lineage;

    fn value(register: u128) -> RegisterValue {
        RegisterValue {
            register: RegisterId(register),
            epoch: Epoch(u64::try_from(register).expect("small") << 32),
            primary: NodeId(1),
            in_sync: NodeSet::only(NodeId(1)),
            intent: Intent::Lead,
            nonce: Nonce(register),
            lineage: Lineage::new(),
        }
    }

    #[test]
    fn the_newest_replaced_registers_are_remembered() {
        let mut state = PersistentState::default();
        for register in 1..=20 {
            state.replace(RegisterId(register - 1), value(register));
            assert_eq!(state.register, Some(RegisterId(register)));
        }
        let newest: Vec<RegisterId> = (12..20).map(RegisterId).collect();
        assert_eq!(state.replaced, newest);
    }

    #[test]
    fn whoever_is_being_forced_says_where_it_goes() {
        let mut state = PersistentState { register: Some(RegisterId(1)), ..PersistentState::default() };
        assert_eq!(state.bound_for(), Some(RegisterId(1)));
        let intent = Intent::Tombstone { successor: RegisterId(2) };
        let closes = Attempt { expected: Some(Epoch(1)), value: RegisterValue { intent, ..value(1) } };
        state.attempts = vec![closes];
        assert_eq!(state.bound_for(), Some(RegisterId(2)));
        state.attempts = vec![Attempt { expected: None, value: value(3) }];
        assert_eq!(state.bound_for(), Some(RegisterId(3)));
        state.attempts = vec![Attempt { expected: Some(Epoch(1)), value: value(1) }];
        assert_eq!(state.bound_for(), Some(RegisterId(1)));
    }
}

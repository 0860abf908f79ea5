//! What every register must do, whatever it is made of. Each adapter's tests call [`run`].
//!
//! Panics with the broken promise. The registers it uses have random ids and stay behind.

use crate::{Refusal, Register, SwapOutcome};
use rempart_types::{Epoch, Intent, Lineage, Lsn, NodeId, NodeSet, Nonce, RegisterId, RegisterValue, Term};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The node that calls: the adapter under test must authenticate it as this one, if it authenticates at all.
pub const CALLER: NodeId = NodeId(0xca11e4);
/// Contenders in the race, and swaps each tries to win.
const CONTENDERS: u64 = 8;
const WINS_EACH: u64 = 5;

/// A register id nobody used before.
pub fn fresh_register() -> RegisterId {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    RegisterId(u128::from_le_bytes(bytes))
}

/// A value that passes every check, told apart by `nonce`.
pub fn value(register: RegisterId, epoch: u64, nonce: u128) -> RegisterValue {
    let mut lineage = Lineage::new();
    lineage.append(Term::new(1, 0), Lsn(1));
    lineage.append(Term::new(epoch.max(2), 3), Lsn(1 << 40));
    RegisterValue {
        register,
        epoch: Epoch(epoch),
        primary: CALLER,
        in_sync: NodeSet::only(CALLER).with(NodeId(u128::MAX)),
        intent: Intent::Lead,
        nonce: Nonce(nonce),
        lineage,
    }
}

/// Everything. Takes well under a second on a healthy register.
pub async fn run<R: Register + 'static>(register: Arc<R>) {
    absent_registers_read_as_nothing(&*register).await;
    a_register_is_created_once(&*register).await;
    what_is_read_is_what_was_written(&*register).await;
    only_the_expected_epoch_is_replaced(&*register).await;
    epochs_may_skip_but_never_fall_or_stand(&*register).await;
    impossible_values_are_refused(&*register).await;
    a_tombstone_is_final(&*register).await;
    registers_do_not_touch_each_other(&*register).await;
    at_most_one_contender_wins_each_epoch(register).await;
}

async fn absent_registers_read_as_nothing(register: &impl Register) {
    assert_eq!(register.read(fresh_register()).await.expect("read"), None);
    let id = fresh_register();
    let outcome = register.swap(id, Some(Epoch(3)), value(id, 4, 1)).await.expect("swap");
    assert_eq!(outcome, SwapOutcome::Lost(None), "nothing stands where an epoch was expected");
    assert_eq!(register.read(id).await.expect("read"), None);
}

async fn a_register_is_created_once(register: &impl Register) {
    let id = fresh_register();
    let first = value(id, 1, 1);
    assert_eq!(register.swap(id, None, first.clone()).await.expect("create"), SwapOutcome::Won);
    let second = register.swap(id, None, value(id, 2, 2)).await.expect("create again");
    assert_eq!(second, SwapOutcome::Lost(Some(first)));
}

async fn what_is_read_is_what_was_written(register: &impl Register) {
    let id = fresh_register();
    let mut written = value(id, 7, u128::MAX);
    written.intent = Intent::Handover { from: NodeId(1) };
    let mut lineage = Lineage::new();
    for run in 1..=Lineage::MAX_RUNS as u64 {
        lineage.append(Term::new(u64::MAX - 1000 + run, u32::MAX), Lsn(u64::MAX - 1000 + run));
    }
    written.lineage = lineage;
    assert_eq!(register.swap(id, None, written.clone()).await.expect("create"), SwapOutcome::Won);
    assert_eq!(register.read(id).await.expect("read"), Some(written));
}

async fn only_the_expected_epoch_is_replaced(register: &impl Register) {
    let id = fresh_register();
    let first = value(id, 5, 1);
    assert_eq!(register.swap(id, None, first.clone()).await.expect("create"), SwapOutcome::Won);
    for wrong in [None, Some(4), Some(6), Some(0)] {
        let outcome = register.swap(id, wrong.map(Epoch), value(id, 9, 2)).await.expect("swap");
        assert_eq!(outcome, SwapOutcome::Lost(Some(first.clone())), "expected {wrong:?}, epoch 5 stands");
    }
    let second = value(id, 6, 3);
    assert_eq!(register.swap(id, Some(Epoch(5)), second.clone()).await.expect("swap"), SwapOutcome::Won);
    // The same request once more, as a network might deliver it.
    let again = register.swap(id, Some(Epoch(5)), second.clone()).await.expect("swap");
    assert_eq!(again, SwapOutcome::Lost(Some(second)), "a repeated swap loses to itself, and shows it");
}

async fn epochs_may_skip_but_never_fall_or_stand(register: &impl Register) {
    let id = fresh_register();
    assert_eq!(register.swap(id, None, value(id, 5, 1)).await.expect("create"), SwapOutcome::Won);
    for epoch in [5, 4, 0] {
        let error = register.swap(id, Some(Epoch(5)), value(id, epoch, 2)).await.expect_err("refused");
        assert!(matches!(error.refusal(), Some(Refusal::Invalid(_))), "epoch {epoch} over 5: {error}");
        assert!(error.certainly_not_applied());
    }
    assert_eq!(register.swap(id, Some(Epoch(5)), value(id, 500, 3)).await.expect("swap"), SwapOutcome::Won);
    assert_eq!(register.read(id).await.expect("read").expect("a value").epoch, Epoch(500));
}

async fn impossible_values_are_refused(register: &impl Register) {
    let id = fresh_register();
    let good = value(id, 1, 1);
    let mut outsider = good.clone();
    outsider.primary = NodeId(4);
    let mut empty = good.clone();
    empty.in_sync = NodeSet::default();
    let mut circle = good.clone();
    circle.intent = Intent::Tombstone { successor: id };
    let mut zero = good.clone();
    zero.epoch = Epoch::ZERO;
    for wrong in [value(fresh_register(), 1, 1), outsider, empty, circle, zero] {
        let error = register.swap(id, None, wrong.clone()).await.expect_err("refused");
        assert!(matches!(error.refusal(), Some(Refusal::Invalid(_))), "{wrong:?}: {error}");
    }
    assert_eq!(register.read(id).await.expect("read"), None);
}

async fn a_tombstone_is_final(register: &impl Register) {
    let id = fresh_register();
    assert_eq!(register.swap(id, None, value(id, 1, 1)).await.expect("create"), SwapOutcome::Won);
    let mut tombstone = value(id, 2, 2);
    tombstone.intent = Intent::Tombstone { successor: fresh_register() };
    let outcome = register.swap(id, Some(Epoch(1)), tombstone.clone()).await.expect("close");
    assert_eq!(outcome, SwapOutcome::Won);
    for expected in [None, Some(Epoch(1)), Some(Epoch(2))] {
        let outcome = register.swap(id, expected, value(id, 3, 3)).await.expect("swap");
        assert_eq!(outcome, SwapOutcome::Lost(Some(tombstone.clone())), "over a tombstone");
    }
    assert_eq!(register.read(id).await.expect("read"), Some(tombstone));
}

async fn registers_do_not_touch_each_other(register: &impl Register) {
    // Neighbours in the order of any store.
    let first = RegisterId(fresh_register().0 & !1);
    let second = RegisterId(first.0 | 1);
    let (one, two) = (value(first, 1, 1), value(second, 9, 2));
    assert_eq!(register.swap(first, None, one.clone()).await.expect("create"), SwapOutcome::Won);
    assert_eq!(register.read(second).await.expect("read"), None);
    assert_eq!(register.swap(second, None, two.clone()).await.expect("create"), SwapOutcome::Won);
    assert_eq!(register.read(first).await.expect("read"), Some(one));
    assert_eq!(register.read(second).await.expect("read"), Some(two));
}

/// Contenders read and swap as fast as they can. Each success is claimed under its epoch; the last value and the
/// chain of expectations must agree with the claims.
async fn at_most_one_contender_wins_each_epoch<R: Register + 'static>(register: Arc<R>) {
    let id = fresh_register();
    assert_eq!(register.swap(id, None, value(id, 1, 0)).await.expect("create"), SwapOutcome::Won);
    let contenders: Vec<_> = (1..=CONTENDERS)
        .map(|contender| {
            let register = register.clone();
            tokio::spawn(async move {
                let mut claims = Vec::new();
                let mut attempt = 0u128;
                while claims.len() < WINS_EACH as usize {
                    let current = register.read(id).await.expect("read").expect("it was created");
                    attempt += 1;
                    let nonce = (u128::from(contender) << 64) | attempt;
                    let next = value(id, current.epoch.next().0, nonce);
                    match register.swap(id, Some(current.epoch), next.clone()).await.expect("swap") {
                        SwapOutcome::Won => claims.push((next.epoch, next.nonce)),
                        SwapOutcome::Lost(current) => {
                            let current = current.expect("registers do not vanish");
                            assert!(current.epoch >= next.epoch, "lost against an older value");
                            assert_ne!(current.nonce, next.nonce, "a success was reported as a defeat");
                        }
                    }
                }
                claims
            })
        })
        .collect();
    let mut winners = BTreeMap::new();
    for contender in contenders {
        for (epoch, nonce) in contender.await.expect("a contender panicked") {
            let other = winners.insert(epoch, nonce);
            assert_eq!(other, None, "two winners of epoch {epoch}");
        }
    }
    // Every win raised the epoch by one, so none was lost and none came from nowhere.
    let last = register.read(id).await.expect("read").expect("a value");
    assert_eq!(winners.len() as u64, CONTENDERS * WINS_EACH);
    assert_eq!(last.epoch, Epoch(1 + CONTENDERS * WINS_EACH));
    assert_eq!(winners.get(&last.epoch), Some(&last.nonce));
}

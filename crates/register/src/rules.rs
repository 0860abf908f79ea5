//! What every adapter decides the same way, as pure functions.

use crate::{Refusal, SwapOutcome};
use rempart_types::{Epoch, Intent, NodeId, RegisterId, RegisterValue};

/// Bytes of an encoded value at most.
pub const MAX_VALUE_SIZE: usize = 128 * 1024;

/// Whether `value` could ever be stored in `register` over `expected`.
pub(crate) fn check(
    register: RegisterId,
    expected: Option<Epoch>,
    value: &RegisterValue,
) -> Result<(), Refusal> {
    let invalid = |why: &str| Err(Refusal::Invalid(why.to_owned()));
    if value.register != register {
        return invalid("it names another register");
    }
    if value.epoch <= expected.unwrap_or(Epoch::ZERO) {
        return invalid("its epoch does not rise");
    }
    if !value.in_sync.contains(value.primary) {
        return invalid("its primary is not in its in-sync set");
    }
    if matches!(&value.intent, Intent::Tombstone { successor } if *successor == register) {
        return invalid("it names itself as its successor");
    }
    Ok(())
}

/// An operator's forced takeover: `caller`, whoever was in sync, closes the register in its own name.
pub(crate) fn closes(value: &RegisterValue, caller: NodeId) -> bool {
    matches!(value.intent, Intent::Tombstone { .. })
        && value.primary == caller
        && value.in_sync.iter().eq([caller])
}

/// The comparison: `None` if the value may be stored, else what to answer.
pub(crate) fn compare(current: Option<&RegisterValue>, expected: Option<Epoch>) -> Option<SwapOutcome> {
    let closed = current.is_some_and(|value| matches!(value.intent, Intent::Tombstone { .. }));
    if current.map(|value| value.epoch) == expected && !closed {
        return None;
    }
    Some(SwapOutcome::Lost(current.cloned()))
}

pub(crate) fn encode(value: &RegisterValue) -> Result<Vec<u8>, Refusal> {
    let bytes = serde_json::to_vec(value).expect("a value always serialises");
    if bytes.len() > MAX_VALUE_SIZE {
        return Err(Refusal::TooLarge(format!(
            "the value has {} bytes, at most {MAX_VALUE_SIZE}",
            bytes.len()
        )));
    }
    Ok(bytes)
}

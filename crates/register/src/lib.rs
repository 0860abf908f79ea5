//! The compare-and-swap register: where each group's configuration lives.
//!
//! One trait, [`Register`]; adapters that each own one outside thing: [`MemoryRegister`] (tests),
//! [`FileRegister`] (one machine), [`witness`] (a process on a third machine). [`faulty::FaultyRegister`] loses
//! and delays what passes through it, and [`conformance`] is what every adapter must pass.
//!
//! An adapter never repeats a request by itself. A repeated compare-and-swap can fail because its first
//! copy won, and then the caller would take its own success for a defeat.

pub mod conformance;
mod error;
pub mod faulty;
mod file;
mod memory;
mod rules;
pub mod witness;

pub use error::{ErrorKind, Refusal, RegisterError};
pub use file::FileRegister;
pub use memory::MemoryRegister;
pub use rules::MAX_VALUE_SIZE;

use rempart_types::{Epoch, RegisterId, RegisterValue};
use std::pin::Pin;

/// An answer that will come, or an error within the adapter's deadline.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, RegisterError>> + Send + 'a>>;

/// How a compare-and-swap ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SwapOutcome {
    /// The value is stored, durably.
    Won,
    /// Something else stands there: this, or nothing. Also the answer when a tombstone stands there.
    Lost(Option<RegisterValue>),
}

/// Registers, each changed only by compare-and-swap.
///
/// - A swap compares the stored epoch with `expected` (`None`: the register must not exist) and stores `value`
///   in one step, durably before it answers. Of several swaps with one expectation at most one wins.
/// - `value.epoch` must be above `expected`, `value.register` must be the register, and its in-sync set must
///   hold its primary; else [`Refusal::Invalid`].
/// - A tombstone is never replaced.
/// - A read returns the latest value: every swap that was acknowledged before the read began is seen.
/// - Each call ends within one deadline. An error says whether the swap certainly was not applied
///   ([`RegisterError::certainly_not_applied`]) or may have been, or may still be.
pub trait Register: Send + Sync {
    fn read(&self, register: RegisterId) -> Answer<'_, Option<RegisterValue>>;

    fn swap(
        &self,
        register: RegisterId,
        expected: Option<Epoch>,
        value: RegisterValue,
    ) -> Answer<'_, SwapOutcome>;
}

impl<R: Register + ?Sized> Register for std::sync::Arc<R> {
    fn read(&self, register: RegisterId) -> Answer<'_, Option<RegisterValue>> {
        (**self).read(register)
    }

    fn swap(
        &self,
        register: RegisterId,
        expected: Option<Epoch>,
        value: RegisterValue,
    ) -> Answer<'_, SwapOutcome> {
        (**self).swap(register, expected, value)
    }
}

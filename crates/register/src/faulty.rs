//! A register that misbehaves on order: what a caller must survive.

use crate::{Answer, ErrorKind, Register, RegisterError, SwapOutcome};
use rempart_types::{Epoch, RegisterId, RegisterValue};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What happens to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing bad.
    None,
    /// It never arrives, and the caller knows: certainly not applied.
    Unreachable,
    /// It never arrives, and the caller cannot know.
    RequestLost,
    /// It is applied; the answer is lost.
    ReplyLost,
    /// The caller gives up; it is applied when [`FaultyRegister::apply_late`] says so.
    AppliedLate,
    /// It is applied and answered after a while.
    Delayed(Duration),
}

#[derive(Debug)]
struct Late {
    register: RegisterId,
    expected: Option<Epoch>,
    value: RegisterValue,
}

/// Wraps a register. Each request takes the next fault of the plan; an empty plan means no faults.
#[derive(Debug)]
pub struct FaultyRegister<R> {
    inner: Arc<R>,
    plan: Mutex<VecDeque<Fault>>,
    late: Mutex<VecDeque<Late>>,
}

impl<R: Register> FaultyRegister<R> {
    pub fn new(inner: Arc<R>) -> FaultyRegister<R> {
        FaultyRegister { inner, plan: Mutex::default(), late: Mutex::default() }
    }

    /// Adds faults for the next requests, in order.
    pub fn plan(&self, faults: impl IntoIterator<Item = Fault>) {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner).extend(faults);
    }

    /// Lets the oldest late swap arrive at last. `None` when there is none.
    pub async fn apply_late(&self) -> Option<Result<SwapOutcome, RegisterError>> {
        let late = self.late.lock().unwrap_or_else(PoisonError::into_inner).pop_front()?;
        Some(self.inner.swap(late.register, late.expected, late.value).await)
    }

    fn next_fault(&self) -> Fault {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner).pop_front().unwrap_or(Fault::None)
    }
}

fn failed(kind: ErrorKind) -> RegisterError {
    RegisterError::new(kind, "reach the register").because("a planned fault")
}

impl<R: Register> Register for FaultyRegister<R> {
    fn read(&self, register: RegisterId) -> Answer<'_, Option<RegisterValue>> {
        Box::pin(async move {
            match self.next_fault() {
                Fault::None => {}
                Fault::Unreachable => return Err(failed(ErrorKind::Unreachable)),
                Fault::Delayed(delay) => tokio::time::sleep(delay).await,
                Fault::RequestLost | Fault::ReplyLost | Fault::AppliedLate => {
                    return Err(failed(ErrorKind::Unknown));
                }
            }
            self.inner.read(register).await
        })
    }

    fn swap(
        &self,
        register: RegisterId,
        expected: Option<Epoch>,
        value: RegisterValue,
    ) -> Answer<'_, SwapOutcome> {
        Box::pin(async move {
            match self.next_fault() {
                Fault::None => self.inner.swap(register, expected, value).await,
                Fault::Unreachable => Err(failed(ErrorKind::Unreachable)),
                Fault::RequestLost => Err(failed(ErrorKind::Unknown)),
                Fault::ReplyLost => {
                    // Whatever came back, nobody hears of it.
                    let _ = self.inner.swap(register, expected, value).await;
                    Err(failed(ErrorKind::Unknown))
                }
                Fault::AppliedLate => {
                    let late = Late { register, expected, value };
                    self.late.lock().unwrap_or_else(PoisonError::into_inner).push_back(late);
                    Err(failed(ErrorKind::Unknown))
                }
                Fault::Delayed(delay) => {
                    tokio::time::sleep(delay).await;
                    self.inner.swap(register, expected, value).await
                }
            }
        })
    }
}

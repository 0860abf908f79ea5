//! Registers in memory: for tests and simulations of callers.

use crate::{Answer, Register, RegisterError, SwapOutcome, rules};
use rempart_types::{Epoch, RegisterId, RegisterValue};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Forgets everything when dropped.
#[derive(Debug, Default)]
pub struct MemoryRegister {
    values: Mutex<BTreeMap<RegisterId, RegisterValue>>,
}

impl MemoryRegister {
    pub fn new() -> MemoryRegister {
        MemoryRegister::default()
    }

    pub fn read_now(&self, register: RegisterId) -> Option<RegisterValue> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner).get(&register).cloned()
    }

    pub fn swap_now(
        &self,
        register: RegisterId,
        expected: Option<Epoch>,
        value: RegisterValue,
    ) -> Result<SwapOutcome, RegisterError> {
        let refused = |refusal| RegisterError::refused(refusal, format!("change register {register}"));
        rules::check(register, expected, &value).map_err(refused)?;
        rules::encode(&value).map_err(refused)?;
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lost) = rules::compare(values.get(&register), expected) {
            return Ok(lost);
        }
        values.insert(register, value);
        Ok(SwapOutcome::Won)
    }
}

impl Register for MemoryRegister {
    fn read(&self, register: RegisterId) -> Answer<'_, Option<RegisterValue>> {
        Box::pin(async move { Ok(self.read_now(register)) })
    }

    fn swap(
        &self,
        register: RegisterId,
        expected: Option<Epoch>,
        value: RegisterValue,
    ) -> Answer<'_, SwapOutcome> {
        Box::pin(async move { self.swap_now(register, expected, value) })
    }
}

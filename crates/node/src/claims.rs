//! Names of machines with which something is under way.

use rempart_api::Error;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

type Claimed = Arc<Mutex<BTreeSet<String>>>;

fn hold(claimed: &Claimed) -> MutexGuard<'_, BTreeSet<String>> {
    claimed.lock().expect("held for a moment only")
}

#[derive(Debug, Default)]
pub struct NameClaims(Claimed);

/// A machine's name that is somebody's until this is dropped.
#[derive(Debug)]
pub struct NameClaim {
    claimed: Claimed,
    name: String,
}

impl NameClaims {
    /// Nobody else makes, deletes or overwrites a machine of that name meanwhile.
    pub fn claim(&self, name: &str) -> Result<NameClaim, Error> {
        if !hold(&self.0).insert(name.to_owned()) {
            return Err(Error::conflict(format!("`{name}` is being made, deleted or overwritten just now"))
                .hint("try again when that has ended"));
        }
        Ok(NameClaim { claimed: self.0.clone(), name: name.to_owned() })
    }
}

impl Drop for NameClaim {
    fn drop(&mut self) {
        hold(&self.claimed).remove(&self.name);
    }
}

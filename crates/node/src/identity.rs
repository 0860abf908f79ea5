//! Who this node is, drawn once at `node init`.

use crate::durable;
use crate::paths::Paths;
use rempart_types::NodeId;
use serde::{Deserialize, Serialize};
use std::io;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub id: NodeId,
}

impl Identity {
    pub fn load(paths: &Paths) -> io::Result<Option<Identity>> {
        durable::read_json(&paths.identity())
    }

    /// The identity that is there, or a new one.
    pub fn load_or_create(paths: &Paths) -> io::Result<Identity> {
        if let Some(identity) = Identity::load(paths)? {
            return Ok(identity);
        }
        let identity = Identity { id: NodeId(random_u128()?) };
        durable::write_json(&paths.identity(), &identity)?;
        Ok(identity)
    }
}

/// From the kernel's generator.
pub fn random_u128() -> io::Result<u128> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(u128::from_le_bytes(bytes))
}

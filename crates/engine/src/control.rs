//! What the engine keeps in the superblock beside the store's own: cluster's promises and an unfinished resync.

use rempart_cluster::PersistentState;
use rempart_types::LogPosition;
use serde::{Deserialize, Serialize};

const VERSION: u8 = 2;

/// The control state of one replica. Written whole.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Control {
    pub cluster: PersistentState,
    /// The state that an unfinished resync started from.
    pub resync: Option<ResyncBase>,
    /// The operator allowed that what only this replica holds is overwritten.
    pub may_overwrite: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct ResyncBase {
    pub base: LogPosition,
    /// Nothing may be concluded from `base`: everything is compared.
    pub whole: bool,
}

impl Control {
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![VERSION]).expect("control state always encodes")
    }

    /// `None` if it is of another version or damaged. Nothing at all is the state of a new replica.
    pub fn decode(bytes: &[u8]) -> Option<Control> {
        match bytes.split_first() {
            None => Some(Control::default()),
            Some((&VERSION, rest)) => postcard::from_bytes(rest).ok(),
            Some(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_state_survives_a_restart() {
        let mut control = Control::default();
        assert_eq!(Control::decode(&[]), Some(control.clone()));
        control.may_overwrite = true;
        control.resync = Some(ResyncBase { base: LogPosition::default(), whole: true });
        assert_eq!(Control::decode(&control.encode()), Some(control));
        assert_eq!(Control::decode(&[9, 0, 0]), None);
    }
}

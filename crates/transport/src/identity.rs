//! Who a certificate says its holder is.
//!
//! The identity travels as one URI among the certificate's subject alternative names:
//! `rempart://<cluster>/node/<id>`. Addresses are no part of it, so a node may move.

use rempart_types::{NodeId, ParseIdError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// One cluster: the machines that trust one certificate authority. Shown as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(pub u128);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterId({:x})", self.0)
    }
}

impl FromStr for ClusterId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        text.parse::<NodeId>().map(|id| ClusterId(id.0))
    }
}

impl Serialize for ClusterId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        NodeId(self.0).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ClusterId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        NodeId::deserialize(deserializer).map(|id| ClusterId(id.0))
    }
}

/// What the holder of a certificate may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs the daemon: holds replicas, changes registers.
    Node,
    /// Keeps registers; nothing else.
    Witness,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Node => "node",
            Role::Witness => "witness",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The holder of a certificate: a member of one cluster. A witness has an id of the same kind as a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Identity {
    pub cluster: ClusterId,
    pub role: Role,
    pub id: NodeId,
}

impl Identity {
    pub fn node(cluster: ClusterId, id: NodeId) -> Identity {
        Identity { cluster, role: Role::Node, id }
    }

    pub fn witness(cluster: ClusterId, id: NodeId) -> Identity {
        Identity { cluster, role: Role::Witness, id }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rempart://{}/{}/{}", self.cluster, self.role, self.id)
    }
}

/// Text that is not an identity's URI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParseIdentityError;

impl fmt::Display for ParseIdentityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an identity is `rempart://<cluster>/node|witness/<id>`")
    }
}

impl std::error::Error for ParseIdentityError {}

impl FromStr for Identity {
    type Err = ParseIdentityError;

    fn from_str(text: &str) -> Result<Identity, ParseIdentityError> {
        let mut parts = text.strip_prefix("rempart://").ok_or(ParseIdentityError)?.split('/');
        let (Some(cluster), Some(role), Some(id), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(ParseIdentityError);
        };
        let role = match role {
            "node" => Role::Node,
            "witness" => Role::Witness,
            _ => return Err(ParseIdentityError),
        };
        Ok(Identity {
            cluster: cluster.parse().map_err(|_| ParseIdentityError)?,
            role,
            id: id.parse().map_err(|_| ParseIdentityError)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let identity = Identity::witness(ClusterId(7), NodeId(9));
        assert_eq!(identity.to_string().parse(), Ok(identity));
        for wrong in ["", "rempart://", "rempart://7/node/9", "http://x/y/z", &format!("{identity}/more")] {
            assert_eq!(wrong.parse::<Identity>(), Err(ParseIdentityError), "{wrong}");
        }
    }
}

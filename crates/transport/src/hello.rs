//! The first frame each way: who speaks, which protocol, about what.
//!
//! Its first eight bytes (magic, major, minor) never change, so that two builds that share nothing else
//! can still tell each other why they cannot talk.

use crate::frame::{Frame, kind};
use crate::{ClusterId, Error, ErrorKind};
use bytes::Bytes;
use rempart_types::{GroupId, NodeId};
use serde::{Deserialize, Serialize};
use std::fmt;

const MAGIC: [u8; 4] = *b"RMPT";
/// Bytes of a greeting at most.
pub const MAX_GREETING: usize = 4096;
/// Characters of a refusal's explanation at most.
const MAX_REASON: usize = 512;

/// The version of the wire protocol. Another major cannot talk to us; of two minors the lower is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProtocolVersion {
    pub major: u16,
    pub minor: u16,
}

impl ProtocolVersion {
    /// What this build speaks.
    pub const CURRENT: ProtocolVersion = ProtocolVersion { major: 1, minor: 0 };
}

impl fmt::Display for ProtocolVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What a connection is for. Each group has its own, so that bulk work never stands before a guest's write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// Log batches, acknowledgements, beacons.
    Replication,
    /// Extents of a resynchronisation or a comparison.
    Bulk,
}

/// A greeting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub protocol: ProtocolVersion,
    /// The product's version, for people.
    pub product: String,
    pub cluster: ClusterId,
    pub node: NodeId,
    pub group: GroupId,
    pub purpose: Purpose,
}

#[derive(Serialize, Deserialize)]
struct Body {
    product: String,
    cluster: ClusterId,
    node: NodeId,
    group: GroupId,
    purpose: Purpose,
}

impl Hello {
    /// A greeting of this build.
    pub fn new(cluster: ClusterId, node: NodeId, group: GroupId, purpose: Purpose) -> Hello {
        Hello {
            protocol: ProtocolVersion::CURRENT,
            product: env!("CARGO_PKG_VERSION").to_owned(),
            cluster,
            node,
            group,
            purpose,
        }
    }

    pub(crate) fn to_frame(&self) -> Frame {
        let body = Body {
            product: self.product.chars().take(64).collect(),
            cluster: self.cluster,
            node: self.node,
            group: self.group,
            purpose: self.purpose,
        };
        Frame::new(kind::HELLO, versioned(self.protocol, &body), Bytes::new())
    }

    /// Reads a greeting, or the version of one that only another major can read.
    pub(crate) fn from_frame(frame: &Frame) -> Result<Result<Hello, ProtocolVersion>, Error> {
        let bad = || Error::new(ErrorKind::BadFrame, "read the peer's greeting");
        let (protocol, body) = split(&frame.meta).ok_or_else(bad)?;
        if frame.kind != kind::HELLO {
            return Err(bad());
        }
        if protocol.major != ProtocolVersion::CURRENT.major {
            return Ok(Err(protocol));
        }
        let body: Body = postcard::from_bytes(body).map_err(|error| bad().because(error))?;
        let Body { product, cluster, node, group, purpose } = body;
        Ok(Ok(Hello { protocol, product, cluster, node, group, purpose }))
    }
}

fn versioned(protocol: ProtocolVersion, body: &impl Serialize) -> Bytes {
    let mut bytes = Vec::with_capacity(128);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&protocol.major.to_le_bytes());
    bytes.extend_from_slice(&protocol.minor.to_le_bytes());
    bytes.extend(postcard::to_allocvec(body).expect("a greeting always serialises"));
    bytes.into()
}

fn split(meta: &[u8]) -> Option<(ProtocolVersion, &[u8])> {
    let (magic, rest) = meta.split_first_chunk::<4>()?;
    let (major, rest) = rest.split_first_chunk::<2>()?;
    let (minor, body) = rest.split_first_chunk::<2>()?;
    let protocol = ProtocolVersion { major: u16::from_le_bytes(*major), minor: u16::from_le_bytes(*minor) };
    (*magic == MAGIC).then_some((protocol, body))
}

/// Why a greeting was declined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RefusalReason {
    /// The majors differ.
    Version,
    /// The greeting names another cluster.
    WrongCluster,
    /// The greeting's node is not the certificate's, or not a node at all.
    WrongNode,
    /// No such group here, or the peer is no replica of it.
    UnknownGroup,
    /// Not now: starting, stopping, or the group is busy with an older connection.
    Busy,
}

/// A declined greeting: the reason to act on, the text to show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub reason: RefusalReason,
    pub text: String,
}

impl Refusal {
    pub fn new(reason: RefusalReason, text: impl Into<String>) -> Refusal {
        Refusal { reason, text: text.into().chars().take(MAX_REASON).collect() }
    }

    pub(crate) fn version(theirs: ProtocolVersion) -> Refusal {
        let ours = ProtocolVersion::CURRENT;
        Refusal::new(
            RefusalReason::Version,
            format!("protocol {theirs} meets protocol {ours} (release {})", env!("CARGO_PKG_VERSION")),
        )
    }

    pub(crate) fn to_frame(&self) -> Frame {
        Frame::new(kind::REFUSE, versioned(ProtocolVersion::CURRENT, self), Bytes::new())
    }

    /// A refusal in another major's words still is one.
    pub(crate) fn from_frame(frame: &Frame) -> Result<Refusal, Error> {
        let bad = || Error::new(ErrorKind::BadFrame, "read the peer's refusal");
        let (protocol, body) = split(&frame.meta).ok_or_else(bad)?;
        match postcard::from_bytes(body) {
            Ok(refusal) => Ok(refusal),
            Err(_) if protocol.major != ProtocolVersion::CURRENT.major => Ok(Refusal::version(protocol)),
            Err(error) => Err(bad().because(error)),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.reason {
            RefusalReason::Version => "the versions do not match",
            RefusalReason::WrongCluster => "it belongs to another cluster",
            RefusalReason::WrongNode => "the certificate is another node's",
            RefusalReason::UnknownGroup => "it holds no such virtual machine",
            RefusalReason::Busy => "it is busy",
        })?;
        if self.text.is_empty() { Ok(()) } else { write!(f, " ({})", self.text) }
    }
}

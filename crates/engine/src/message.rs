//! Messages between two replicas of a group, as frames carry them: metadata, and guest bytes beside it.

use crate::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Metadata of one message at most.
pub const MAX_META_BYTES: usize = 256 * 1024;
/// Payload of one message at most.
pub const MAX_PAYLOAD_BYTES: usize = 40 * 1024 * 1024;

/// What one core says to its twin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Body {
    Cluster(rempart_cluster::Message),
    Replication(rempart_replication::Message),
    Compare(crate::compare::CompareMessage),
}

/// A message and the guest bytes that go with it.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerMessage {
    pub(crate) body: Body,
    /// Sent one after the other; received as one.
    pub(crate) payload: Vec<Bytes>,
}

impl fmt::Debug for PeerMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.body {
            Body::Cluster(message) => message.fmt(f)?,
            Body::Replication(message) => message.fmt(f)?,
            Body::Compare(message) => message.fmt(f)?,
        }
        // Guest bytes have no place in a log.
        if self.payload_len() > 0 { write!(f, " + {} bytes", self.payload_len()) } else { Ok(()) }
    }
}

/// Bytes that are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("a message's metadata does not decode")]
    Meta,
    #[error("a message or its payload is larger than any may be")]
    TooLarge,
}

impl PeerMessage {
    /// Metadata for the frame. The payload follows it: see [`PeerMessage::payload`].
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_allocvec(&self.body).expect("a message always encodes")
    }

    /// Guest bytes to send after the metadata, in pieces.
    pub fn payload(&self) -> &[Bytes] {
        &self.payload
    }

    /// Whether it carries extents of a resync, whose bandwidth may be limited.
    pub fn is_resync(&self) -> bool {
        matches!(self.body, Body::Replication(rempart_replication::Message::ResyncExtents { .. }))
    }

    pub fn payload_len(&self) -> usize {
        self.payload.iter().map(Bytes::len).sum()
    }

    /// Takes what a peer sent. Any bytes are survived.
    pub fn decode(meta: &[u8], payload: Bytes) -> Result<PeerMessage, WireError> {
        if meta.len() > MAX_META_BYTES || payload.len() > MAX_PAYLOAD_BYTES {
            return Err(WireError::TooLarge);
        }
        let (body, rest) = postcard::take_from_bytes(meta).map_err(|_| WireError::Meta)?;
        if !rest.is_empty() {
            return Err(WireError::Meta);
        }
        let payload = if payload.is_empty() { Vec::new() } else { vec![payload] };
        Ok(PeerMessage { body, payload })
    }
}

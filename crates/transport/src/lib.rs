//! Peer connections: mutual TLS, certificates and enrolment, frames, deadlines.
//!
//! The control plane (tokio) dials and accepts: [`dial_data`], [`dial_http`], [`accept`]. The protocol
//! that TLS negotiated (ALPN) decides what comes of a connection:
//!
//! | ALPN | client certificate | becomes |
//! |---|---|---|
//! | `rempart-data/1` | demanded | [`Connection`]: frames on a plain non-blocking socket, for the data plane's own thread |
//! | `http/1.1` | demanded | [`HttpStream`]: the API between nodes, the witness |
//! | `rempart-join/1` | none | [`HttpStream`] for enrolment only: the caller shows a one-time token inside |
//!
//! A [`TlsContext`] holds the credentials and can be given new ones while it is in use.

mod accept;
mod compress;
mod connection;
mod deadline;
mod dial;
mod enrolment;
mod error;
pub mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod greeting;
mod hello;
mod identity;
mod pin;
mod pipe;
pub mod pki;
mod refusal;
mod rewind;
mod socket;
mod tls;

pub use accept::{Accepted, Incoming, accept, accept_member};
pub use compress::Compression;
pub use connection::{Connection, Interest, MAX_QUEUED, ReadStatus};
pub use deadline::{Deadlines, SilenceDetector};
pub use dial::{dial_data, dial_enrolment, dial_http};
pub use enrolment::{EnrolmentToken, Secret, TokenBook};
pub use error::{Error, ErrorKind};
pub use frame::{Decoder, Frame, Limits};
pub use hello::{Hello, ProtocolVersion, Purpose, Refusal, RefusalReason};
pub use identity::{ClusterId, Identity, ParseIdentityError, Role};
pub use rewind::HttpStream;
pub use tls::{Peer, TlsContext};

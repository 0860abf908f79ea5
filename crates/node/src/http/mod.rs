//! The HTTP faces of a node: for the operator on a unix socket, for peers and strangers over TLS.

mod answer;
mod enrol;
mod local;
mod peer;
mod peer_client;
mod restore;
mod stream;
mod view;

pub use enrol::{AuthorityFiles, EnrolAnswer, EnrolRequest};
pub use local::serve as serve_local;
pub use peer::serve as serve_peers;
pub use peer_client::{PeerClient, exchange};

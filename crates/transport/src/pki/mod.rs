//! Certificates: the cluster's authority, what it issues and takes back, and the files they live in.
//!
//! One authority (ECDSA P-256) per cluster signs a certificate for each node and witness. A member makes its
//! own key and sends a request; the key never leaves its machine. The identity is a URI in the
//! certificate; the name that TLS checks is the cluster's, the same for all its members, so that a node
//! can change its address and a certificate of another cluster can never pass.

mod authority;
mod credentials;
mod files;

pub use authority::{Authority, CaPin, Validity};
pub(crate) use credentials::cluster_name;
pub use credentials::{CertificateInfo, CertificateRequest, Credentials, PrivateKey};
pub(crate) use files::write_private;

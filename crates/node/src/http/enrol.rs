//! The one path that a stranger may use, with a one-time token.

use super::answer::{Answer, Body, answer};
use crate::members::Cluster;
use crate::membership;
use crate::node::Node;
use axum::Router;
use axum::extract::State;
use axum::routing::post;
use rempart_api::MemberRole;
use rempart_types::NodeId;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a joining machine says. The secret proves the token; the key never leaves the machine.
#[derive(Clone, Serialize, Deserialize)]
pub struct EnrolRequest {
    pub secret: String,
    pub id: NodeId,
    pub name: String,
    pub role: MemberRole,
    pub address: String,
    pub request_pem: String,
}

/// What it gets.
#[derive(Clone, Serialize, Deserialize)]
pub struct EnrolAnswer {
    pub certificate_pem: String,
    pub ca_pem: String,
    pub revocation_list_pem: Option<String>,
    pub cluster: Cluster,
    /// For full nodes: the authority's files, so that any survivor can admit a replacement.
    pub authority: Option<AuthorityFiles>,
}

/// The certificate authority, as it lies on disk.
#[derive(Clone, Serialize, Deserialize)]
pub struct AuthorityFiles {
    pub certificate_pem: String,
    pub key_pem: String,
    pub book_json: String,
}

impl AuthorityFiles {
    const CERTIFICATE: &str = "authority.pem";
    const KEY: &str = "authority-key.pem";
    const BOOK: &str = "authority.json";

    pub fn read(directory: &std::path::Path) -> std::io::Result<AuthorityFiles> {
        let read = |name: &str| std::fs::read_to_string(directory.join(name));
        Ok(AuthorityFiles {
            certificate_pem: read(Self::CERTIFICATE)?,
            key_pem: read(Self::KEY)?,
            book_json: read(Self::BOOK)?,
        })
    }

    pub fn named(&self) -> [(&'static str, &str); 3] {
        [
            (Self::KEY, &self.key_pem),
            (Self::CERTIFICATE, &self.certificate_pem),
            (Self::BOOK, &self.book_json),
        ]
    }
}

pub fn router(node: Arc<Node>) -> Router {
    Router::new().route("/join/v1", post(enrol)).with_state(node)
}

async fn enrol(State(node): State<Arc<Node>>, Body(request): Body<EnrolRequest>) -> Answer<EnrolAnswer> {
    answer(membership::admit(&node, request).await)
}

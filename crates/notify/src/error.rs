//! Why nobody was told.

use std::path::PathBuf;

/// None of them shows a secret, or more of a webhook's URL than its host.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    #[error("{key}: {what}")]
    Config { key: &'static str, what: String },
    #[error("cannot use the secret in `{path}`: {what}")]
    Secret { path: PathBuf, what: String },
    #[error("cannot use the certificates in `{path}`: {what}")]
    Certificates { path: PathBuf, what: String },
    #[error("cannot send mail by `{server}`: {what}")]
    Mail { server: String, what: String },
    #[error("cannot call the webhook at `{host}`: {what}")]
    Webhook { host: String, what: String },
}

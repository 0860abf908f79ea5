//! Whom to tell, as configuration files say it.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// How a connection with a mail server is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MailTls {
    /// From the first byte on; port 465.
    Tls,
    /// Begun in plain text, and given up if the server has no TLS; port 587.
    #[default]
    Starttls,
    /// Not at all; port 25. A password goes over it to this machine only.
    None,
}

impl MailTls {
    pub(crate) fn port(self) -> u16 {
        match self {
            MailTls::Tls => 465,
            MailTls::Starttls => 587,
            MailTls::None => 25,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MailConfig {
    /// `host` or `host:port`.
    pub server: String,
    pub from: String,
    pub to: Vec<String>,
    #[serde(default)]
    pub tls: MailTls,
    #[serde(default)]
    pub user: Option<String>,
    /// Its first line is the password; for its owner's eyes only.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// Certificates in PEM that are trusted besides the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    #[serde(default = "half_a_minute")]
    pub timeout_s: u64,
}

fn half_a_minute() -> u64 {
    30
}

/// Its URL may be a secret: whoever knows it may call it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookConfig {
    pub url: String,
    /// What calls are signed with; for its owner's eyes only.
    #[serde(default)]
    pub secret_file: Option<PathBuf>,
    /// Certificates in PEM that are trusted besides the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Of one try.
    #[serde(default = "half_a_minute")]
    pub timeout_s: u64,
}

impl fmt::Debug for WebhookConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WebhookConfig { url: _, secret_file, ca_file, timeout_s } = self;
        f.debug_struct("WebhookConfig")
            .field("secret_file", secret_file)
            .field("ca_file", ca_file)
            .field("timeout_s", timeout_s)
            .finish_non_exhaustive()
    }
}

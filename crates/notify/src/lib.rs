//! Tells people and programs what came of something: mail by SMTP, and a webhook. Blocks.

mod config;
mod error;
mod mail;
mod secret;
mod webhook;

pub use config::{MailConfig, MailTls, WebhookConfig};
pub use error::NotifyError;
pub use mail::{Attachment, Mailer, Message};
pub use webhook::Webhook;

/// All causes, from the outermost inwards; some repeat what is below them.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        source = cause.source();
    }
    text
}

/// What tells one message from all others.
fn random_id() -> String {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system has random numbers");
    data_encoding::HEXLOWER.encode(&bytes)
}

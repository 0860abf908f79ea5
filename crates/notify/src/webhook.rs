//! A webhook: JSON by HTTP POST, signed as the Standard Webhooks specification says.

use crate::config::WebhookConfig;
use crate::{NotifyError, chain, random_id, secret};
use aws_lc_rs::hmac;
use data_encoding::BASE64;
use reqwest::blocking::Client;
use reqwest::{Certificate, StatusCode, Url, redirect};
use serde::Serialize;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Pauses before the tries after the first.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

pub struct Webhook {
    url: Url,
    /// As it is shown: the rest of the URL may be a secret.
    host: String,
    key: Option<hmac::Key>,
    client: Client,
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook").field("host", &self.host).finish_non_exhaustive()
    }
}

/// Why a call failed, and whether another may succeed.
struct Failure {
    what: String,
    may_pass: bool,
}

impl Webhook {
    /// # Errors
    /// If the configuration cannot be right, or a file that it names cannot be used. Nobody is called yet.
    pub fn new(config: &WebhookConfig) -> Result<Webhook, NotifyError> {
        let wrong = |what: String| NotifyError::Config { key: "webhook.url", what };
        let url = Url::parse(&config.url).map_err(|e| wrong(format!("it is no URL: {e}")))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(wrong(format!("`{}` is spoken nowhere; http and https are", url.scheme())));
        }
        let host = url.host_str().unwrap_or_default().to_owned();
        let key = match &config.secret_file {
            Some(path) => {
                let secret = secret::read(path)?;
                // As the specification writes them; any other line is the key itself.
                let decoded = secret.strip_prefix("whsec_").and_then(|it| BASE64.decode(it.as_bytes()).ok());
                let bytes = zeroize::Zeroizing::new(decoded.unwrap_or_else(|| secret.as_bytes().to_vec()));
                Some(hmac::Key::new(hmac::HMAC_SHA256, &bytes))
            }
            None => None,
        };
        let mut client = Client::builder()
            .timeout(Duration::from_secs(config.timeout_s.max(1)))
            .user_agent(concat!("rempart/", env!("CARGO_PKG_VERSION")))
            // What is told is for the one who was named, and a redirected POST is no POST any more.
            .redirect(redirect::Policy::none());
        if let Some(path) = &config.ca_file {
            let wrong = |e: reqwest::Error| NotifyError::Certificates { path: path.clone(), what: chain(&e) };
            let found = secret::certificates(path)?;
            let certificates = found.iter().map(|found| Certificate::from_der(found));
            client = client.tls_certs_merge(certificates.collect::<Result<Vec<_>, _>>().map_err(wrong)?);
        }
        let client =
            client.build().map_err(|e| NotifyError::Webhook { host: host.clone(), what: chain(&e) })?;
        Ok(Webhook { url, host, key, client })
    }

    /// Answers when the receiver did, by 2xx. One that cannot be reached, or is busy, is called three times.
    pub fn post(&self, body: &impl Serialize) -> Result<(), NotifyError> {
        let failed = |what| NotifyError::Webhook { host: self.host.clone(), what };
        let body = serde_json::to_vec(body).map_err(|e| failed(chain(&e)))?;
        // The same at each try, so that a receiver knows what it has already.
        let id = format!("msg_{}", random_id());
        let mut pauses = PAUSES.iter();
        loop {
            let failure = match self.call(&id, &body) {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            };
            match pauses.next() {
                Some(pause) if failure.may_pass => std::thread::sleep(*pause),
                _ => return Err(failed(failure.what)),
            }
        }
    }

    fn call(&self, id: &str, body: &[u8]) -> Result<(), Failure> {
        let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut request = self
            .client
            .post(self.url.clone())
            .header("content-type", "application/json")
            .header("webhook-id", id)
            .header("webhook-timestamp", timestamp);
        if let Some(key) = &self.key {
            let mut signed = format!("{id}.{timestamp}.").into_bytes();
            signed.extend_from_slice(body);
            let signature = BASE64.encode(hmac::sign(key, &signed).as_ref());
            request = request.header("webhook-signature", format!("v1,{signature}"));
        }
        let sent = request.body(body.to_vec()).send();
        let answer = sent.map_err(|e| Failure {
            may_pass: e.is_timeout() || e.is_connect() || e.is_request(),
            what: chain(&e.without_url()),
        })?;
        match answer.status() {
            status if status.is_success() => Ok(()),
            status => Err(Failure {
                what: format!("it answered {status}"),
                may_pass: status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS,
            }),
        }
    }
}

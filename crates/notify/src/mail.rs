//! Mail by SMTP.

use crate::config::{MailConfig, MailTls};
use crate::{NotifyError, chain, random_id, secret};
use lettre::message::{Mailbox, MultiPart, SinglePart, header::ContentType};
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, Tls, TlsParameters};
use lettre::transport::smtp::extension::ClientId;
use lettre::{SmtpTransport, Transport};
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

/// What is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// One line: others are joined to it.
    pub subject: String,
    pub text: String,
    /// The same for programs that show HTML.
    pub html: Option<String>,
    pub attachments: Vec<Attachment>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    pub name: String,
    /// Such as `image/png`.
    pub media_type: String,
    pub content: Vec<u8>,
}

/// Sends mail, a connection for each.
pub struct Mailer {
    /// As it is shown.
    server: String,
    from: Mailbox,
    to: Vec<Mailbox>,
    host_name: String,
    transport: SmtpTransport,
}

impl fmt::Debug for Mailer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the transport, which knows the password.
        f.debug_struct("Mailer").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Mailer {
    /// # Errors
    /// If the configuration cannot be right, or a file that it names cannot be used. Nothing is sent yet.
    pub fn new(config: &MailConfig) -> Result<Mailer, NotifyError> {
        let (host, port) = server(&config.server, config.tls)?;
        let mailbox = |key, text: &str| {
            let parsed = text.parse::<Mailbox>();
            parsed.map_err(|e| NotifyError::Config { key, what: format!("`{text}` is no address: {e}") })
        };
        let from = mailbox("mail.from", &config.from)?;
        let to = config.to.iter().map(|to| mailbox("mail.to", to)).collect::<Result<Vec<_>, _>>()?;
        if to.is_empty() {
            return Err(NotifyError::Config { key: "mail.to", what: "it names nobody".to_owned() });
        }
        let host_name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let mut builder = SmtpTransport::builder_dangerous(host.clone())
            .port(port)
            .tls(tls(config, &host)?)
            .timeout(Some(Duration::from_secs(config.timeout_s.max(1))))
            .hello_name(ClientId::Domain(host_name.clone()));
        match (&config.user, &config.password_file) {
            (Some(_), Some(_)) if config.tls == MailTls::None && !is_this_machine(&host) => {
                return Err(NotifyError::Config {
                    key: "mail.tls",
                    what: format!("a password does not go to `{host}` in plain text"),
                });
            }
            (Some(user), Some(file)) => {
                let password = secret::read(file)?;
                builder = builder.credentials(Credentials::new(user.clone(), password.to_string()));
            }
            (None, None) => {}
            _ => {
                let what = "`user` and `password_file` belong together".to_owned();
                return Err(NotifyError::Config { key: "mail.user", what });
            }
        }
        let server = format!("{host}:{port}");
        Ok(Mailer { server, from, to, host_name, transport: builder.build() })
    }

    /// Answers when the server took it for all who shall have it.
    pub fn send(&self, message: &Message) -> Result<(), NotifyError> {
        let failed =
            |e: &dyn std::error::Error| NotifyError::Mail { server: self.server.clone(), what: chain(e) };
        let mail = self.mail(message).map_err(|e| failed(&*e))?;
        self.transport.send(&mail).map(drop).map_err(|e| failed(&e))
    }

    fn mail(&self, message: &Message) -> Result<lettre::Message, Box<dyn std::error::Error>> {
        let subject = message.subject.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut builder = lettre::Message::builder()
            .from(self.from.clone())
            .subject(subject)
            .message_id(Some(format!("<{}@{}>", random_id(), self.host_name)));
        for to in &self.to {
            builder = builder.to(to.clone());
        }
        let plain = SinglePart::plain(message.text.clone());
        let body = match &message.html {
            Some(html) => {
                MultiPart::alternative().singlepart(plain).singlepart(SinglePart::html(html.clone()))
            }
            None => MultiPart::mixed().singlepart(plain),
        };
        if message.attachments.is_empty() {
            return Ok(builder.multipart(body)?);
        }
        let mut whole = MultiPart::mixed().multipart(body);
        for Attachment { name, media_type, content } in &message.attachments {
            let media_type = ContentType::parse(media_type)?;
            let part = lettre::message::Attachment::new(name.clone()).body(content.clone(), media_type);
            whole = whole.singlepart(part);
        }
        Ok(builder.multipart(whole)?)
    }
}

/// `host`, `host:port`, `[::1]:port`.
fn server(text: &str, tls: MailTls) -> Result<(String, u16), NotifyError> {
    let wrong = |what: &str| NotifyError::Config {
        key: "mail.server",
        what: format!("`{text}` is no `host` or `host:port`: {what}"),
    };
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
            (host, port.parse().map_err(|_| wrong("the port is no number up to 65535"))?)
        }
        _ => (text, tls.port()),
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if host.parse::<IpAddr>().is_err() {
        url::Host::parse(host).map_err(|e| wrong(&e.to_string()))?;
    }
    Ok((host.to_owned(), port))
}

fn is_this_machine(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn tls(config: &MailConfig, host: &str) -> Result<Tls, NotifyError> {
    let mut parameters = TlsParameters::builder(host.to_owned());
    if let Some(path) = &config.ca_file {
        for found in secret::certificates(path)? {
            let certificate = Certificate::from_der(found.to_vec());
            let certificate =
                certificate.map_err(|e| NotifyError::Certificates { path: path.clone(), what: chain(&e) })?;
            parameters = parameters.add_root_certificate(certificate);
        }
    }
    let build = || {
        let wrong =
            |e: lettre::transport::smtp::Error| NotifyError::Config { key: "mail.tls", what: chain(&e) };
        parameters.build_rustls().map_err(wrong)
    };
    Ok(match config.tls {
        MailTls::Tls => Tls::Wrapper(build()?),
        // Required: a server, or somebody in between, that has none gets nothing.
        MailTls::Starttls => Tls::Required(build()?),
        MailTls::None => Tls::None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_hosts_with_and_without_ports() {
        for (text, host, port) in [
            ("mail.example", "mail.example", 587),
            ("mail.example:25", "mail.example", 25),
            ("192.0.2.1", "192.0.2.1", 587),
            ("[::1]:2525", "::1", 2525),
            ("::1", "::1", 587),
        ] {
            let parsed = server(text, MailTls::Starttls).unwrap();
            assert_eq!(parsed, (host.to_owned(), port), "{text}");
        }
        for text in
            ["", "mail.example:", "mail.example:smtp", "mail.example:99999", "smtp://mail.example", "a b"]
        {
            assert!(server(text, MailTls::Starttls).is_err(), "{text}");
        }
    }
}

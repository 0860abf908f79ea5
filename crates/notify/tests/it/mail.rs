use crate::receiver::Receiver;
use crate::self_signed::{SelfSigned, closed_port};
use data_encoding::BASE64;
use rempart_notify::{Attachment, MailConfig, MailTls, Mailer, Message, NotifyError};
use serde_json::Value;
use std::path::Path;

fn config(port: u16, tls: MailTls) -> MailConfig {
    MailConfig {
        server: format!("localhost:{port}"),
        from: "Rempart <rempart@node-a.example>".to_owned(),
        to: vec!["ops@example.com".to_owned(), "Zoë <zoe@example.com>".to_owned()],
        tls,
        user: None,
        password_file: None,
        ca_file: None,
        timeout_s: 20,
    }
}

fn message() -> Message {
    Message {
        subject: "backup `nightly`".to_owned(),
        text: "2 of 3 machines\n".to_owned(),
        ..Message::default()
    }
}

fn content(part: &Value) -> Vec<u8> {
    BASE64.decode(part["base64"].as_str().unwrap().as_bytes()).unwrap()
}

fn server(tls: &str, own: &SelfSigned, login: &[&str]) -> Receiver {
    let (certificate, key) = (own.certificate.to_str().unwrap(), own.key.to_str().unwrap());
    Receiver::start("smtp_server.py", &[&[tls, certificate, key], login].concat())
}

fn send(config: &MailConfig) -> Result<(), NotifyError> {
    Mailer::new(config)?.send(&message())
}

#[test]
fn a_message_arrives_as_it_was_written() {
    let server = Receiver::start("smtp_server.py", &["plain"]);
    let picture: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let sent = Message {
        subject: "über shop\r\nBcc: thief@example.com".to_owned(),
        text: "line one\n.\nline three, ä\n".to_owned(),
        html: Some("<b>bold</b>".to_owned()),
        attachments: vec![Attachment {
            name: "screen ä.png".to_owned(),
            media_type: "image/png".to_owned(),
            content: picture.clone(),
        }],
    };
    Mailer::new(&config(server.port, MailTls::None)).unwrap().send(&sent).unwrap();
    let kept = server.kept();
    let [mail] = kept.as_slice() else { panic!("{} messages", kept.len()) };
    assert_eq!(mail["from"], "rempart@node-a.example");
    assert_eq!(mail["to"], serde_json::json!(["ops@example.com", "zoe@example.com"]));
    assert_eq!(mail["subject"], "über shop Bcc: thief@example.com");
    let headers: Vec<_> = mail["headers"].as_array().unwrap().iter().map(|h| h.as_str().unwrap()).collect();
    assert!(!headers.contains(&"Bcc"), "{headers:?}");
    assert!(headers.contains(&"Message-ID") && headers.contains(&"Date"), "{headers:?}");
    let parts = mail["parts"].as_array().unwrap();
    let types: Vec<_> = parts.iter().map(|part| part["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["text/plain", "text/html", "image/png"]);
    assert_eq!(String::from_utf8(content(&parts[0])).unwrap().replace("\r\n", "\n"), sent.text);
    assert_eq!(content(&parts[1]), b"<b>bold</b>");
    assert_eq!(parts[2]["name"], "screen ä.png");
    assert_eq!(content(&parts[2]), picture);
}

#[test]
fn a_login_goes_over_tls_only_and_a_refused_one_is_told() {
    let own = SelfSigned::new();
    for (mode, tls) in [("starttls", MailTls::Starttls), ("tls", MailTls::Tls)] {
        let server = server(mode, &own, &["me", "hunter2"]);
        let with = |password: &str| MailConfig {
            user: Some("me".to_owned()),
            password_file: Some(own.beside("password", password)),
            ca_file: Some(own.certificate.clone()),
            ..config(server.port, tls)
        };
        send(&with("hunter2\n")).unwrap();
        let kept = server.kept();
        assert_eq!((&kept[0]["encrypted"], &kept[0]["logged_in"]), (&Value::from(true), &Value::from(true)));

        let mailer = Mailer::new(&with("wrong-one")).unwrap();
        let error = mailer.send(&message()).unwrap_err().to_string();
        assert!(error.contains("535"), "{mode}: {error}");
        assert!(!format!("{error} {mailer:?}").contains("wrong-one"));
        let nobody = MailConfig { user: None, password_file: None, ..with("x") };
        assert!(send(&nobody).unwrap_err().to_string().contains("530"), "{mode}: no login");
        assert_eq!(server.kept().len(), 1, "{mode}");
    }
}

#[test]
fn a_foreign_certificate_or_none_gets_nothing() {
    let (own, foreign) = (SelfSigned::new(), SelfSigned::new());
    let server = server("tls", &own, &[]);
    for ca_file in [None, Some(foreign.certificate.clone())] {
        let error =
            send(&MailConfig { ca_file, ..config(server.port, MailTls::Tls) }).unwrap_err().to_string();
        assert!(error.contains("certificate"), "{error}");
    }
    // The right certificate, for another name.
    let elsewhere = MailConfig {
        server: format!("127.0.0.1:{}", server.port),
        ca_file: Some(own.certificate.clone()),
        ..config(0, MailTls::Tls)
    };
    assert!(send(&elsewhere).unwrap_err().to_string().contains("certificate"));
    assert!(server.kept().is_empty());
    // Somebody in between who takes STARTTLS away.
    let plain = Receiver::start("smtp_server.py", &["plain"]);
    let error = send(&config(plain.port, MailTls::Starttls)).unwrap_err().to_string();
    assert!(error.contains("STARTTLS"), "{error}");
    assert!(plain.kept().is_empty());
}

#[test]
fn a_server_that_is_gone_or_silent_is_told_in_time() {
    let port = closed_port();
    let error = send(&config(port, MailTls::None)).unwrap_err().to_string();
    assert!(error.contains(&format!("localhost:{port}")) && error.contains("refused"), "{error}");
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = MailConfig {
        server: silent.local_addr().unwrap().to_string(),
        timeout_s: 1,
        ..config(0, MailTls::None)
    };
    assert!(send(&config).is_err());
}

#[test]
fn what_cannot_be_right_is_refused_before_anything_is_sent() {
    let own = SelfSigned::new();
    let open = own.beside("open", "hunter2");
    let good = MailConfig {
        user: Some("me".to_owned()),
        password_file: Some(open.clone()),
        server: "mail.example".to_owned(),
        ..config(0, MailTls::Starttls)
    };
    Mailer::new(&good).unwrap();
    let refused = |what: &str, config: MailConfig| {
        let error = Mailer::new(&config).expect_err(what).to_string();
        assert!(error.contains(what), "{error}");
    };
    refused("mail.from", MailConfig { from: "nobody".to_owned(), ..good.clone() });
    refused("mail.to", MailConfig { to: Vec::new(), ..good.clone() });
    refused("mail.server", MailConfig { server: "mail.example:x".to_owned(), ..good.clone() });
    refused("plain text", MailConfig { tls: MailTls::None, ..good.clone() });
    refused("belong together", MailConfig { user: None, ..good.clone() });
    refused("no-such", MailConfig { password_file: Some(Path::new("/no-such").to_owned()), ..good.clone() });
    refused("certificates", MailConfig { ca_file: Some(open.clone()), ..good.clone() });
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o644)).unwrap();
    refused("chmod", good);
}

#[test]
fn the_configuration_is_read_and_unknown_keys_are_refused() {
    let text = "server = 'mail.example'\nfrom = 'a@example.com'\nto = ['b@example.com']\n";
    let read: MailConfig = toml::from_str(text).unwrap();
    assert_eq!((read.tls, read.timeout_s), (MailTls::Starttls, 30));
    assert!(toml::from_str::<MailConfig>(&format!("{text}password = 'x'")).is_err());
    assert!(toml::from_str::<MailConfig>(&format!("{text}tls = 'maybe'")).is_err());
}

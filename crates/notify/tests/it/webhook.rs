use crate::receiver::Receiver;
use crate::self_signed::{SelfSigned, closed_port};
use rempart_notify::{NotifyError, Webhook, WebhookConfig};
use serde_json::json;
use std::process::Command;

fn config(url: String) -> WebhookConfig {
    WebhookConfig { url, secret_file: None, ca_file: None, timeout_s: 20 }
}

fn receiver(statuses: &str) -> Receiver {
    Receiver::start("http_receiver.py", &[statuses])
}

fn post(config: &WebhookConfig) -> Result<(), NotifyError> {
    Webhook::new(config)?.post(&json!({ "schedule": "nightly", "result": "failure" }))
}

/// As the specification says it, by another library.
fn signature(secret: &str, signed: &str) -> String {
    let program = "import base64, hmac, sys\n\
                   key, text = (it.encode() for it in sys.argv[1:])\n\
                   print('v1,' + base64.b64encode(hmac.digest(key, text, 'sha256')).decode())";
    let output = Command::new("/usr/bin/python3").args(["-c", program, secret, signed]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_call_is_signed_json() {
    let (receiver, own) = (receiver("204"), SelfSigned::new());
    // The second is the same key as the specification writes it.
    for secret in ["correct horse", "whsec_Y29ycmVjdCBob3JzZQ=="] {
        let mut config = config(format!("http://127.0.0.1:{}/hook?token=hidden", receiver.port));
        config.secret_file = Some(own.beside("secret", secret));
        post(&config).unwrap();
        let kept = receiver.kept().pop().unwrap();
        let headers = &kept["headers"];
        let header = |name: &str| headers[name].as_str().unwrap().to_owned();
        let body = kept["body"].as_str().unwrap();
        assert_eq!(kept["path"], "/hook?token=hidden");
        assert_eq!(header("content-type"), "application/json");
        let signed = format!("{}.{}.{body}", header("webhook-id"), header("webhook-timestamp"));
        assert_eq!(header("webhook-signature"), signature("correct horse", &signed));
        let told: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(told["result"], "failure");
    }
}

#[test]
fn a_receiver_that_fails_is_called_again_under_the_same_id() {
    let receiver = receiver("500,200");
    post(&config(format!("http://127.0.0.1:{}/", receiver.port))).unwrap();
    let kept = receiver.kept();
    assert_eq!(kept.len(), 2);
    assert_eq!(kept[0]["headers"]["webhook-id"], kept[1]["headers"]["webhook-id"]);
    assert_eq!(kept[0]["headers"].get("webhook-signature"), None, "it has no secret");
}

#[test]
fn a_receiver_that_refuses_or_sends_elsewhere_is_called_once() {
    for status in ["404", "307"] {
        let receiver = receiver(status);
        let error =
            post(&config(format!("http://127.0.0.1:{}/secret-path", receiver.port))).unwrap_err().to_string();
        assert!(error.contains(status) && !error.contains("secret-path"), "{error}");
        assert_eq!(receiver.kept().len(), 1, "{status}");
    }
}

#[test]
fn nobody_there_is_told_without_the_url() {
    let hook = Webhook::new(&config(format!("http://127.0.0.1:{}/secret-path", closed_port()))).unwrap();
    let error = hook.post(&json!({})).unwrap_err().to_string();
    assert!(error.contains("127.0.0.1") && error.contains("refused"), "{error}");
    assert!(!format!("{error} {hook:?}").contains("secret-path"));
}

#[test]
fn a_foreign_certificate_gets_nothing() {
    let (own, foreign) = (SelfSigned::new(), SelfSigned::new());
    let (certificate, key) = (own.certificate.to_str().unwrap(), own.key.to_str().unwrap());
    let receiver = Receiver::start("http_receiver.py", &["200", certificate, key]);
    let mut config = config(format!("https://localhost:{}/", receiver.port));
    config.ca_file = Some(foreign.certificate.clone());
    assert!(post(&config).unwrap_err().to_string().contains("certificate"));
    assert!(receiver.kept().is_empty());
    config.ca_file = Some(own.certificate.clone());
    post(&config).unwrap();
    assert_eq!(receiver.kept().len(), 1);
}

#[test]
fn what_cannot_be_right_is_refused() {
    let own = SelfSigned::new();
    let refused = |config: WebhookConfig| {
        Webhook::new(&config).expect_err("it is wrong");
    };
    refused(config("no URL".to_owned()));
    refused(config("file:///etc/passwd".to_owned()));
    refused(WebhookConfig { secret_file: Some("/no-such".into()), ..config("http://localhost".to_owned()) });
    refused(WebhookConfig {
        secret_file: Some(own.beside("empty", "")),
        ..config("http://localhost".to_owned())
    });
    refused(WebhookConfig { ca_file: Some(own.key.clone()), ..config("https://localhost".to_owned()) });
}

//! What a VM is beside its disks, as far as its QEMU tells: for people, and for who builds it once more.

use crate::qmp::Client;
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Each answers with what the guest has.
const QUESTIONS: [&str; 11] = [
    "query-version",
    "query-name",
    "query-uuid",
    "query-status",
    "query-kvm",
    "query-cpus-fast",
    "query-memory-size-summary",
    "query-iothreads",
    "query-block",
    "query-pci",
    "query-rx-filter",
];
const DEADLINE: Duration = Duration::from_secs(5);

/// Longer command lines are not QEMU's.
const LONGEST_COMMAND_LINE: usize = 1 << 20;

/// What is not told is not in it.
pub(in crate::qemu) async fn describe(client: &Client) -> Value {
    let mut told = Map::new();
    for question in QUESTIONS {
        if let Ok(answer) = client.execute(question, Value::Null, DEADLINE).await {
            told.insert(question.to_owned(), answer);
        }
    }
    if let Ok(machine) = client.qom_get("/machine", "type").await {
        told.insert("machine".to_owned(), machine);
    }
    let mut description = json!({ "told": told });
    let bytes = client.peer_pid().and_then(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).ok());
    if let Some(words) = bytes.and_then(|bytes| command_line(&bytes)) {
        let (words, left_out) = without_secrets(words);
        description["command_line"] = json!(words);
        if !left_out.is_empty() {
            description["left_out"] = json!(left_out);
        }
    }
    description
}

/// As the kernel shows it: words, each with a zero behind it. None if it is not QEMU's: others may have made its
/// monitor's socket.
fn command_line(bytes: &[u8]) -> Option<Vec<String>> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    let words: Vec<String> =
        bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    let program = words[0].rsplit('/').next().unwrap_or_default();
    let is_qemu = program.contains("qemu") || program == "kvm";
    (bytes.len() <= LONGEST_COMMAND_LINE && is_qemu).then_some(words)
}

/// What stands for a secret.
const HIDDEN: &str = "…";

/// Values of `secret` objects, passwords, also in addresses, and keys of RBD are taken out; each is told.
fn without_secrets(words: Vec<String>) -> (Vec<String>, Vec<String>) {
    let (mut kept, mut left_out): (Vec<String>, Vec<String>) = Default::default();
    for word in words {
        let mut found = Vec::new();
        let word = match serde_json::from_str::<Value>(&word) {
            Ok(mut options @ Value::Object(_)) => {
                hide_in(&mut options, &mut found);
                if found.is_empty() { word } else { options.to_string() }
            }
            _ => {
                let parts = parts(&word);
                let is_secret = is_secret(parts[0].split('=').next_back().unwrap_or_default());
                let plain = parts.iter().map(|part| match part.split_once('=') {
                    Some((key, value)) if hides(key, value, is_secret) => {
                        found.push(key.to_owned());
                        format!("{key}={HIDDEN}")
                    }
                    _ => hide_in_address(part, &mut found),
                });
                plain.collect::<Vec<_>>().join(",")
            }
        };
        let option = kept.last().filter(|last| last.starts_with('-')).map_or("", String::as_str);
        left_out.extend(found.into_iter().map(|key| format!("`{key}` of `{option}`")));
        kept.push(word);
    }
    (kept, left_out)
}

/// Between single commas; two of them are one that belongs to a value.
fn parts(word: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = word.chars().peekable();
    while let Some(next) = rest.next() {
        match (next, parts.last_mut()) {
            (',', Some(part)) if rest.peek() == Some(&',') => {
                part.push_str(",,");
                rest.next();
            }
            (',', _) => parts.push(String::new()),
            (_, Some(part)) => part.push(next),
            (_, None) => unreachable!("there is a first part"),
        }
    }
    parts
}

fn is_secret(kind: &str) -> bool {
    kind.starts_with("secret")
}

fn hides(key: &str, value: &str, is_secret: bool) -> bool {
    let name = key.rsplit('.').next().unwrap_or(key);
    (is_secret && name == "data") || (matches!(name, "password" | "passwd") && !matches!(value, "on" | "off"))
}

fn hide_in(value: &mut Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            let secret = fields.get("qom-type").and_then(Value::as_str).is_some_and(is_secret);
            for (key, value) in fields {
                match value {
                    Value::String(text) if hides(key, text, secret) => {
                        found.push(key.clone());
                        *text = HIDDEN.to_owned();
                    }
                    Value::String(text) => *text = hide_in_address(text, found),
                    value => hide_in(value, found),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| hide_in(value, found)),
        _ => {}
    }
}

/// `scheme://user:password@host`, iSCSI's `user%password@host`, RBD's `:key=`.
fn hide_in_address(text: &str, found: &mut Vec<String>) -> String {
    let mut text = text.to_owned();
    if let Some(scheme) = text.find("://") {
        let from = scheme + 3;
        let until = text[from..].find('/').map_or(text.len(), |end| from + end);
        if let Some(at) = text[from..until].rfind('@').map(|at| from + at)
            && let Some(mark) = text[from..at].find([':', '%']).map(|mark| from + mark)
        {
            text.replace_range(mark + 1..at, HIDDEN);
            found.push("password".to_owned());
        }
    }
    if let Some(key) = text.find(":key=").filter(|_| text.contains("rbd:")) {
        let from = key + ":key=".len();
        let until = text[from..].find(':').map_or(text.len(), |end| from + end);
        text.replace_range(from..until, HIDDEN);
        found.push("key".to_owned());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn secrets_are_not_kept_and_it_is_said_which() {
        for (word, expected) in [
            ("secret,id=a,data=tops,,ecret,format=raw", Some("secret,id=a,data=…,format=raw")),
            ("qom-type=secret,id=a,data=topsecret", Some("qom-type=secret,id=a,data=…")),
            ("secret,id=a,file=/etc/key", None),
            ("port=5900,password=topsecret,addr=::1", Some("port=5900,password=…,addr=::1")),
            (":1,password=on", None),
            ("driver=raw,file.password-secret=a", None),
            ("file=iscsi://me%topsecret@host/iqn/0,if=none", Some("file=iscsi://me%…@host/iqn/0,if=none")),
            ("file=https://me:topsecret@host/a", Some("file=https://me:…@host/a")),
            ("file=https://host/a:b@c", None),
            ("file=rbd:pool/image:id=a:key=topsecret:conf=b", Some("file=rbd:pool/image:id=a:key=…:conf=b")),
            (
                r#"{"qom-type":"secret","id":"a","data":"topsecret"}"#,
                Some(r#"{"data":"…","id":"a","qom-type":"secret"}"#),
            ),
            (
                r#"{"driver":"nbd","server":[{"password":"topsecret"}]}"#,
                Some(r#"{"driver":"nbd","server":[{"password":"…"}]}"#),
            ),
            (r#"{"driver": "file", "data": "no secret"}"#, None),
            ("", None),
        ] {
            let (kept, left_out) = without_secrets(vec!["-object".to_owned(), word.to_owned()]);
            assert_eq!(kept[1], expected.unwrap_or(word));
            assert_eq!(left_out.len(), usize::from(expected.is_some()), "{word}");
            assert!(left_out.iter().all(|told| told.ends_with("of `-object`")), "{left_out:?}");
        }
    }

    proptest! {
        #[test]
        fn no_command_line_panics(words in prop::collection::vec("([{}\":@%/,=a….]|://|secret|data|rbd:|:key=){0,12}", 0..4)) {
            without_secrets(words);
        }
    }

    #[test]
    fn only_a_qemus_command_line_is_kept() {
        let words = command_line(b"/usr/bin/qemu-system-x86_64\0-name\0a b\0\0-S\0");
        assert_eq!(words.unwrap(), ["/usr/bin/qemu-system-x86_64", "-name", "a b", "", "-S"]);
        assert_eq!(command_line(b"/usr/bin/kvm\0").unwrap(), ["/usr/bin/kvm"]);
        for other in [&b""[..], b"/usr/sbin/libvirtd\0--timeout\0qemu\0", b"/usr/lib/qemu/helper\0"] {
            assert_eq!(command_line(other), None);
        }
    }
}

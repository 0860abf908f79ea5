//! The lines of the monitor protocol.

use serde::Deserialize;
use serde_json::{Value, json};

/// QEMU answers `query-named-block-nodes` and the like in one line; far below this.
pub(crate) const LONGEST_LINE: usize = 16 << 20;

/// One line from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The first line of a connection.
    Greeting {
        /// `10.0.2`
        version: String,
    },
    Return {
        id: Option<u64>,
        value: Value,
    },
    Error {
        id: Option<u64>,
        error: CommandError,
    },
    Event(Event),
}

/// QEMU's refusal of a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{description}")]
pub struct CommandError {
    /// `GenericError`, `CommandNotFound`, `DeviceNotFound` …
    pub class: String,
    pub description: String,
}

/// Something that happened, as QEMU tells it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The vCPUs stand still. Sent before QEMU waits for I/O in flight.
    Stop,
    Resume,
    Shutdown {
        by_guest: bool,
        /// `guest-shutdown`, `host-qmp-quit`, `host-signal` …
        reason: String,
    },
    Reset {
        by_guest: bool,
    },
    /// An I/O request failed.
    BlockIoError {
        /// The device's id, or empty.
        device: String,
        node_name: String,
        write: bool,
        /// `report`, `ignore` or `stop`
        action: String,
        reason: String,
    },
    GuestPanicked,
    DeviceDeleted {
        /// None for a device without an id.
        device: Option<String>,
    },
    Other {
        name: String,
        data: Value,
    },
}

/// A line that is not of this protocol.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    #[error("not JSON: {0}")]
    NotJson(#[from] serde_json::Error),
    #[error("neither greeting, answer nor event")]
    UnknownShape,
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    #[serde(default, rename = "return", deserialize_with = "present")]
    value: Option<Value>,
    error: Option<ErrorBody>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    #[serde(default)]
    id: Value,
}

#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    class: String,
    #[serde(default)]
    desc: String,
}

/// `"return": null` is an answer; a missing one is not.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// Reads one line.
pub fn parse(line: &[u8]) -> Result<Message, ParseError> {
    let line: Line = serde_json::from_slice(line)?;
    if let Some(greeting) = line.greeting {
        let part = |name: &str| greeting["version"]["qemu"][name].as_u64().unwrap_or(0);
        let version = format!("{}.{}.{}", part("major"), part("minor"), part("micro"));
        return Ok(Message::Greeting { version });
    }
    let id = line.id.as_u64();
    if let Some(name) = line.event {
        return Ok(Message::Event(event(name, line.data)));
    }
    if let Some(error) = line.error {
        return Ok(Message::Error {
            id,
            error: CommandError { class: error.class, description: error.desc },
        });
    }
    line.value.map(|value| Message::Return { id, value }).ok_or(ParseError::UnknownShape)
}

fn event(name: String, data: Value) -> Event {
    let text = |field: &str| data[field].as_str().unwrap_or_default().to_owned();
    let by_guest = data["guest"].as_bool().unwrap_or(false);
    match name.as_str() {
        "STOP" => Event::Stop,
        "RESUME" => Event::Resume,
        "SHUTDOWN" => Event::Shutdown { by_guest, reason: text("reason") },
        "RESET" => Event::Reset { by_guest },
        "BLOCK_IO_ERROR" => Event::BlockIoError {
            // `device` is the name of an old-style drive; `qom-path` ends in `/peripheral/ID/virtio-backend`.
            device: device_of(&text("qom-path")).unwrap_or_else(|| text("device")),
            node_name: text("node-name"),
            write: data["operation"] == "write",
            action: text("action"),
            reason: text("reason"),
        },
        "GUEST_PANICKED" => Event::GuestPanicked,
        "DEVICE_DELETED" => Event::DeviceDeleted { device: data["device"].as_str().map(str::to_owned) },
        _ => Event::Other { name, data },
    }
}

fn device_of(qom_path: &str) -> Option<String> {
    let rest = qom_path.strip_prefix("/machine/peripheral/")?;
    rest.split('/').next().map(str::to_owned)
}

/// A command's line, its end included. `arguments` is an object, or null for none.
pub fn command(id: u64, name: &str, arguments: &Value) -> Vec<u8> {
    let mut command = json!({ "execute": name, "id": id });
    if !arguments.is_null() {
        command["arguments"] = arguments.clone();
    }
    let mut line = command.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(line: &str) -> Message {
        parse(line.as_bytes()).unwrap()
    }

    #[test]
    fn greeting_answers_and_errors() {
        let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "x"},
            "capabilities": ["oob", "something-new"]}}"#;
        assert_eq!(read(greeting), Message::Greeting { version: "10.0.2".into() });
        assert_eq!(read(r#"{"return": {}, "id": 7}"#), Message::Return { id: Some(7), value: json!({}) });
        assert_eq!(read(r#"{"return": null, "id": 7}"#), Message::Return { id: Some(7), value: Value::Null });
        let error = CommandError { class: "GenericError".into(), description: "no".into() };
        assert_eq!(
            read(r#"{"error": {"class": "GenericError", "desc": "no"}}"#),
            Message::Error { id: None, error }
        );
    }

    #[test]
    fn known_events_and_an_unknown_one() {
        let timestamp = r#""timestamp": {"seconds": 1, "microseconds": 2}"#;
        assert_eq!(read(&format!(r#"{{{timestamp}, "event": "STOP"}}"#)), Message::Event(Event::Stop));
        assert_eq!(
            read(
                r#"{"event": "BLOCK_IO_ERROR", "data": {"device": "", "qom-path":
                "/machine/peripheral/disk-1/virtio-backend", "node-name": "disk-1", "reason": "No space left on device",
                "operation": "write", "action": "stop", "nospace": true}}"#
            ),
            Message::Event(Event::BlockIoError {
                device: "disk-1".into(),
                node_name: "disk-1".into(),
                write: true,
                action: "stop".into(),
                reason: "No space left on device".into(),
            })
        );
        assert_eq!(
            read(r#"{"event": "FROM_QEMU_11", "data": {"a": 1}}"#),
            Message::Event(Event::Other { name: "FROM_QEMU_11".into(), data: json!({"a": 1}) })
        );
    }

    #[test]
    fn lines_of_another_protocol_are_refused() {
        assert!(matches!(parse(b"{}"), Err(ParseError::UnknownShape)));
        assert!(matches!(parse(b"HTTP/1.1 200 OK"), Err(ParseError::NotJson(_))));
        assert!(parse(br#"["event"]"#).is_err());
    }

    /// Any JSON, with keys and values that the parser looks at made likely.
    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[A-Z_]{0,12}".prop_map(Value::from),
            prop::sample::select(vec!["STOP", "SHUTDOWN", "BLOCK_IO_ERROR", "DEVICE_DELETED"])
                .prop_map(Value::from),
        ];
        let key = prop::sample::select(vec![
            "QMP", "return", "error", "event", "data", "id", "class", "desc", "version", "qemu", "guest",
            "qom-path",
        ]);
        leaf.prop_recursive(4, 32, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(key.clone().prop_map(str::to_owned), inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_line_panics_the_parser(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn no_object_panics_the_parser(value in any_json()) {
            let _ = parse(value.to_string().as_bytes());
        }

        #[test]
        fn an_answer_keeps_its_number(id: u64, value in any_json()) {
            let line = json!({ "return": value, "id": id }).to_string();
            prop_assert_eq!(parse(line.as_bytes()).unwrap(), Message::Return { id: Some(id), value });
        }

        #[test]
        fn a_command_is_one_line(name in "[a-z-]{1,20}", argument: String) {
            let line = command(3, &name, &json!({ "argument": argument }));
            prop_assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            let back: Value = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(&back["arguments"]["argument"], &Value::from(argument));
        }
    }
}

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
pub(super) async fn describe(client: &Client) -> Value {
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
        description["command_line"] = json!(words);
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

#[cfg(test)]
mod tests {
    use super::*;

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

//! Entry points for fuzzers and the replay of their corpora: any bytes, no panic, and what is accepted holds together.

use crate::definition::Definition;
use crate::guest_agent::{self, HookReport};
use crate::lines::LineBuffer;
use crate::qmp::message::{self, LONGEST_LINE, Message};
use crate::qmp::{block, commands, migration};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// What a QEMU, a guest's agent or its hook says: lines, in pieces; and each answer taken for all that is asked for.
///
/// # Panics
/// If lines are made of other bytes than were said.
pub fn monitor(data: &[u8]) {
    let [piece, data @ ..] = data else { return };
    let mut lines = LineBuffer::new(LONGEST_LINE);
    let (mut answers, mut taken) = (Vec::new(), 0);
    for piece in data.chunks(usize::from(*piece).max(1)) {
        lines.push(piece);
        while let Ok(Some(line)) = lines.next_line() {
            taken += line.len();
            let _ = guest_agent::client::fuzz_line(&line);
            if let Ok(Message::Return { value, .. }) = message::parse(&line) {
                understand(&value);
                answers.push(value);
            }
        }
    }
    assert!(taken <= data.len());
    if let [devices, chains, nodes, ..] = &answers[..] {
        crate::qemu::backup::fuzz_graph(devices, chains, nodes);
    }
    let report = HookReport::parse(data);
    assert!(report.not_thawed().count() <= report.hooks.len(), "{report}");
}

fn understand(value: &Value) {
    fn take<T: DeserializeOwned>(value: &Value) {
        let _ = serde_json::from_value::<T>(value.clone());
    }
    take::<commands::Status>(value);
    take::<Vec<commands::Block>>(value);
    take::<Vec<commands::NamedNode>>(value);
    take::<Vec<block::NodeChain>>(value);
    take::<Vec<block::Job>>(value);
    take::<Vec<block::BlockExport>>(value);
    take::<migration::Migration>(value);
    take::<migration::MigrationParameters>(value);
}

/// A machine's definition, as a log, a peer or a restore point has it.
///
/// # Panics
/// If one is accepted that does not read back.
pub fn definition(data: &[u8]) {
    if let Ok(definition) = Definition::decode(data) {
        assert_eq!(Definition::decode(&definition.encode()).as_ref(), Ok(&definition));
    }
}

#[cfg(test)]
#[path = "../../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    //! What fuzzers found worth keeping, again on every build, and a few changes of each.

    use super::replay::replay;

    #[test]
    fn monitor_corpus() {
        replay("monitor", super::monitor);
    }

    #[test]
    fn definition_corpus() {
        replay("definition", super::definition);
    }
}

//! Entry points for fuzzers and the replay of their corpora: any bytes, no panic, and what is accepted holds together.

use crate::{Bytes, PeerMessage};

/// A frame's metadata and payload, as a peer may send them. The first byte says how many of the others are payload.
///
/// # Panics
/// If a message does not read back as it was written.
pub fn peer_message(data: &[u8]) {
    let [payload, data @ ..] = data else { return };
    let (payload, meta) = data.split_at(data.len().min(usize::from(*payload)));
    let payload = Bytes::copy_from_slice(payload);
    if let Ok(message) = PeerMessage::decode(meta, payload.clone()) {
        assert_eq!(message.payload_len(), payload.len());
        let again = PeerMessage::decode(&message.encode(), payload);
        assert_eq!(again.as_ref(), Ok(&message), "a message reads back as it was written");
    }
}

#[cfg(test)]
mod tests {
    //! What fuzzers found worth keeping, again on every build.

    fn replay(target: &str, entry: fn(&[u8])) {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/");
        let files = std::fs::read_dir(format!("{folder}{target}")).expect("the corpus is there");
        let mut inputs = 0;
        for file in files {
            let path = file.expect("the folder can be read").path();
            println!("{}", path.display());
            entry(&std::fs::read(&path).expect("the file can be read"));
            inputs += 1;
        }
        assert!(inputs > 0, "no corpus for {target}");
    }

    #[test]
    fn peer_message_corpus() {
        replay("peer_message", super::peer_message);
    }
}

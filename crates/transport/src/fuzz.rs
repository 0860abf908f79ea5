//! Entry points for fuzzers and the replay of their corpora: any bytes, no panic, and what is accepted holds together.

use crate::enrolment::{self, EnrolmentToken};
use crate::frame::{Decoder, Limits, kind};
use crate::hello::{Hello, Refusal};
use std::collections::VecDeque;

/// Larger limits would only make the fuzzer wait for memory.
const LIMITS: Limits = Limits { meta: 64 * 1024, payload: 256 * 1024 };

/// A peer's stream of frames, and its greeting. The first two bytes choose the limits and how the bytes are cut.
///
/// # Panics
/// If the decoder breaks a promise.
pub fn decoder(data: &[u8]) {
    let [how, cut, bytes @ ..] = data else { return };
    let limits = if how & 1 == 0 { LIMITS } else { Limits::GREETING };
    let mut decoder = Decoder::new(limits);
    let mut frames = VecDeque::new();
    let mut failed = false;
    for part in bytes.chunks(usize::from(*cut) + 1) {
        let fed = decoder.feed(part, &mut frames);
        assert!(!failed || fed.is_err(), "an error is final");
        failed = fed.is_err();
        for frame in frames.drain(..) {
            assert!(frame.meta.len() <= limits.meta && frame.payload.len() <= limits.payload);
            assert_ne!(frame.kind, 0);
            if frame.kind == kind::HELLO
                && let Ok(Ok(hello)) = Hello::from_frame(&frame)
            {
                // A long product name is cut when it is written.
                let again = Hello::from_frame(&hello.to_frame()).expect("what was written is read");
                assert_eq!(again.map(|hello| (hello.cluster, hello.node)), Ok((hello.cluster, hello.node)));
            }
            if frame.kind == kind::REFUSE
                && let Ok(refusal) = Refusal::from_frame(&frame)
            {
                let again = Refusal::from_frame(&refusal.to_frame()).expect("what was written is read");
                assert_eq!(again, refusal);
            }
        }
    }
    if failed {
        assert!(!decoder.at_boundary());
    }
}

/// What a person pasted as a token: text as it is, or, with a first byte of 1, a body that is given its checksum.
///
/// # Panics
/// If a token does not read back as it was written.
pub fn enrolment_token(data: &[u8]) {
    let [how, data @ ..] = data else { return };
    let text = match how {
        1 => enrolment::encode(data.to_vec()),
        _ => String::from_utf8_lossy(data).into_owned(),
    };
    if let Ok(token) = text.parse::<EnrolmentToken>() {
        let again = token.to_string().parse::<EnrolmentToken>();
        assert_eq!(again.ok(), Some(token), "a token reads back as it was written");
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
    fn decoder_corpus() {
        replay("decoder", super::decoder);
    }

    #[test]
    fn enrolment_token_corpus() {
        replay("enrolment_token", super::enrolment_token);
    }
}

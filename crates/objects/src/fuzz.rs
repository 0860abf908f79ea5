//! Entry points for fuzzers and the replay of their corpora: any bytes, no panic, and what is accepted holds together.

use crate::bucket::Location;

/// What a bucket answers, as XML; and, for want of a target of its own, where one is, as a user writes it.
///
/// # Panics
/// If names are found that the answer does not have, or a location that was shown is read as another.
pub fn bucket_answer(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    crate::bucket::fuzz_answer(&text);
    if let Ok(location) = Location::parse(&text) {
        let shown = location.to_string();
        assert_eq!(Location::parse(&shown).expect("it was shown").to_string(), shown);
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
    fn bucket_answer_corpus() {
        replay("bucket_answer", super::bucket_answer);
    }
}

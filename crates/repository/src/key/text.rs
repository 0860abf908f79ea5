//! Keys as text, for files and paper.
//!
//! Lines that start with `#` are for people. What is left is a word that says what it is, then base32 of the bytes and of
//! a checksum, in as many lines as it takes: letters without case, digits 2 to 7.

use crate::error::{ErrorKind, Fault};
use data_encoding::BASE32_NOPAD;
use zeroize::Zeroizing;

/// Bytes of the checksum: enough against slips of the hand.
const CHECK: usize = 5;
/// Characters of a line.
const LINE: usize = 60;
/// No key is longer.
const LONGEST: usize = 4096;

fn check(word: &str, bytes: &[u8]) -> [u8; CHECK] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(word.as_bytes()).update(&[0]).update(bytes);
    let mut check = [0; CHECK];
    check.copy_from_slice(&hasher.finalize().as_bytes()[..CHECK]);
    check
}

/// `about` must be lines of their own; each gets its `#`.
pub(crate) fn encode(word: &str, about: &str, bytes: &[u8]) -> Zeroizing<String> {
    let whole = Zeroizing::new([bytes, &check(word, bytes)].concat());
    let encoded = Zeroizing::new(BASE32_NOPAD.encode(&whole));
    // Large enough from the start: a string that grows leaves copies behind.
    let mut text = Zeroizing::new(String::with_capacity(LONGEST));
    for line in about.lines() {
        text.push_str("# ");
        text.push_str(line);
        text.push('\n');
    }
    text.push_str(word);
    text.push('\n');
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, later) = rest.split_at(rest.len().min(LINE));
        text.push_str(line);
        text.push('\n');
        rest = later;
    }
    text
}

/// The bytes behind `word`.
pub(crate) fn decode(word: &str, text: &str) -> Result<Zeroizing<Vec<u8>>, Fault> {
    const NOT_A_KEY: Fault = Fault::new(ErrorKind::Invalid, "it holds no key of the kind that is needed");
    const DAMAGED: Fault = Fault::damaged("a character of the key is wrong or missing");
    if text.len() > LONGEST {
        return Err(NOT_A_KEY);
    }
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    if lines.next() != Some(word) {
        return Err(NOT_A_KEY);
    }
    let mut encoded = Zeroizing::new(Vec::with_capacity(LONGEST));
    encoded.extend(lines.flat_map(str::bytes).filter(|byte| *byte != b' ').map(|b| b.to_ascii_uppercase()));
    let mut bytes = Zeroizing::new(BASE32_NOPAD.decode(&encoded).map_err(|_| DAMAGED)?);
    let length = bytes.len().checked_sub(CHECK).ok_or(DAMAGED)?;
    if check(word, &bytes[..length]) != bytes[length..] {
        return Err(DAMAGED);
    }
    bytes.truncate(length);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_hand_is_noticed() {
        let text = encode("rempart-test-1", "one\ntwo", &[0x5a; 32]);
        assert!(text.starts_with("# one\n# two\nrempart-test-1\nLJNFU"));
        assert_eq!(**decode("rempart-test-1", &text).expect("a key"), [0x5a; 32]);
        let typed = text.to_lowercase().replace('\n', " \r\n");
        assert_eq!(**decode("rempart-test-1", &typed).expect("a key"), [0x5a; 32]);
        assert_eq!(decode("rempart-test-2", &text).expect_err("another kind").kind, ErrorKind::Invalid);

        let start = text.find("LJNFU").expect("the key");
        for at in start..text.len() - 1 {
            let mut changed = text.to_string();
            let other = if &changed[at..=at] == "A" { "B" } else { "A" };
            changed.replace_range(at..=at, other);
            let fault = decode("rempart-test-1", &changed).err();
            assert!(changed == *text || fault.is_some_and(|f| f.kind == ErrorKind::Damaged), "{at}");
            assert!(decode("rempart-test-1", &text[..at]).is_err());
        }
    }
}

//! Values people type, turned into types once, here.

/// `512M`, `2G`, `1T`, with an optional `iB`; a bare number is bytes.
pub fn byte_count(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size; write a number with K, M, G or T, such as `2G`");
    let trimmed = text.trim_end_matches("iB").trim_end_matches('B');
    let (digits, factor) = match trimmed.char_indices().last() {
        Some((at, 'K' | 'k')) => (&trimmed[..at], 1u64 << 10),
        Some((at, 'M' | 'm')) => (&trimmed[..at], 1 << 20),
        Some((at, 'G' | 'g')) => (&trimmed[..at], 1 << 30),
        Some((at, 'T' | 't')) => (&trimmed[..at], 1 << 40),
        Some(_) => (trimmed, 1),
        None => return Err(wrong()),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(wrong)
}

/// `90`, `90s`, `15m`, `2h` or `1d`, in seconds.
pub fn seconds(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a time; write a number with s, m, h or d, such as `15m`");
    let (digits, factor) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1u64),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3600),
        Some((at, 'd')) => (&text[..at], 86400),
        _ => (text, 1),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(byte_count("192M"), Ok(192 << 20));
        assert_eq!(byte_count("2GiB"), Ok(2 << 30));
        assert_eq!(byte_count("4096"), Ok(4096));
        for wrong in ["", "G", "1.5G", "-1", "99999999T", "1X", "é"] {
            assert!(byte_count(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(seconds("15m"), Ok(900));
        assert_eq!(seconds("90"), Ok(90));
        assert!(seconds("m").is_err());
    }
}

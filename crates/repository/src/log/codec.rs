//! Little-endian fields and short numbers, read without ever panicking on what a place returned.

/// Appends fields.
#[derive(Debug, Default)]
pub(super) struct Writer(pub Vec<u8>);

impl Writer {
    pub fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    /// Seven bits a byte, lowest first; the top bit says that more follow.
    pub fn short(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.u8(value as u8 | 0x80);
            value >>= 7;
        }
        self.u8(value as u8);
    }

    pub fn raw(&mut self, value: &[u8]) {
        self.0.extend_from_slice(value);
    }

    /// Length, then the bytes.
    pub fn bytes(&mut self, value: &[u8]) {
        self.short(value.len() as u64);
        self.raw(value);
    }

    /// 0, or 1 more than the value.
    pub fn optional(&mut self, value: Option<u64>) {
        match value {
            None => self.u8(0),
            Some(value) => {
                self.u8(1);
                self.short(value);
            }
        }
    }

    /// Count, then the values.
    pub fn list<T>(&mut self, values: &[T], mut write: impl FnMut(&mut Writer, &T)) {
        self.short(values.len() as u64);
        values.iter().for_each(|value| write(self, value));
    }
}

/// Takes fields off the front; `None` once they do not fit.
#[derive(Debug)]
pub(super) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn bool(&mut self) -> Option<bool> {
        match self.u8()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    /// One value has one encoding: a last byte of 0 is refused.
    pub fn short(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if (bits << shift) >> shift != bits || (byte == 0 && shift > 0) {
                return None;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    pub fn short_u32(&mut self) -> Option<u32> {
        u32::try_from(self.short()?).ok()
    }

    /// Longer than `limit` is refused.
    pub fn bytes(&mut self, limit: usize) -> Option<&'a [u8]> {
        let len = usize::try_from(self.short()?).ok()?;
        if len > limit {
            return None;
        }
        self.take(len)
    }

    pub fn optional(&mut self) -> Option<Option<u64>> {
        if self.bool()? { self.short().map(Some) } else { Some(None) }
    }

    /// More than `limit` are refused. What is allocated is bounded by the bytes that are there: each value takes one
    /// at least.
    pub fn list<T>(&mut self, limit: usize, mut read: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = usize::try_from(self.short()?).ok()?;
        if count > limit || count > self.0.len() {
            return None;
        }
        (0..count).map(|_| read(self)).collect()
    }

    pub fn at_end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_number_has_one_encoding() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX - 1, u64::MAX] {
            let mut writer = Writer::default();
            writer.short(value);
            let mut reader = Reader(&writer.0);
            assert_eq!((reader.short(), reader.at_end()), (Some(value), Some(())));
        }
        let endless = [0xff; 11];
        let too_large = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02];
        for bad in [&[0x80, 0x00][..], &[0x80], &[], &endless, &too_large] {
            assert_eq!(Reader(bad).short(), None, "{bad:x?}");
        }
    }

    #[test]
    fn a_count_beyond_the_bytes_allocates_nothing() {
        let mut writer = Writer::default();
        writer.short(1 << 40);
        assert_eq!(Reader(&writer.0).list(usize::MAX, Reader::u8), None);
    }
}

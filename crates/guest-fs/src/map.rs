//! Where a volume's bytes lie on disks that are counted as one, the first at 0.

use crate::disk::{Disk, Fault};
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::Range;

/// A part of a volume, in turns on several legs: `stripe` bytes of the first, then of the second.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub len: u64,
    pub stripe: u64,
    /// Where each begins.
    pub legs: Vec<u64>,
}

/// A volume: its parts, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map(Vec<Part>);

impl Map {
    /// Bytes in a row.
    pub fn run(start: u64, len: u64) -> Map {
        Map(vec![Part { len, stripe: len, legs: vec![start] }])
    }

    /// `None` if it is not all on disks of `size` bytes together.
    pub fn new(parts: Vec<Part>, size: u64) -> Option<Map> {
        let map = Map(parts);
        map.is_sound(size).then_some(map)
    }

    pub fn is_sound(&self, size: u64) -> bool {
        let each = |part: &Part| {
            let legs = part.legs.len() as u64;
            let on_each = part.len.checked_div(legs).filter(|_| part.len.is_multiple_of(legs));
            part.len > 0
                && part.stripe > 0
                && part.stripe.checked_mul(legs).is_some()
                && on_each.is_some_and(|len| {
                    (legs == 1 || len.is_multiple_of(part.stripe))
                        && part.legs.iter().all(|leg| leg.checked_add(len).is_some_and(|end| end <= size))
                })
        };
        !self.0.is_empty()
            && self.0.iter().all(each)
            && self.0.iter().try_fold(0u64, |sum, part| sum.checked_add(part.len)).is_some()
    }

    pub fn len(&self) -> u64 {
        self.0.iter().map(|part| part.len).sum()
    }

    /// Where it begins.
    pub fn start(&self) -> u64 {
        self.0[0].legs[0]
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where `range` lies: of each part one run for each of its legs. It is in the volume.
    pub fn runs(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let (mut runs, mut start) = (Vec::new(), 0);
        for part in &self.0 {
            let within = |at: u64| at.clamp(start, start + part.len) - start;
            let (from, to) = (within(range.start), within(range.end));
            let turn = part.stripe * part.legs.len() as u64;
            for (place, leg) in (0..).zip(&part.legs) {
                // Bytes of the part before `at` that are on this leg.
                let before = |at: u64| {
                    at / turn * part.stripe + (at % turn).saturating_sub(place * part.stripe).min(part.stripe)
                };
                let run = leg + before(from)..leg + before(to);
                runs.extend(Some(run).filter(|run| !run.is_empty()));
            }
            start += part.len;
        }
        runs
    }

    /// Where `len` bytes from `offset` on lie, in order: start and length of each piece. They are in the volume.
    pub fn pieces(&self, mut offset: u64, len: usize) -> Vec<(u64, usize)> {
        let (mut pieces, mut left) = (Vec::new(), len as u64);
        for part in &self.0 {
            if offset >= part.len {
                offset -= part.len;
                continue;
            }
            while left > 0 && offset < part.len {
                let legs = part.legs.len() as u64;
                let (stripe, within) = (offset / part.stripe, offset % part.stripe);
                let room = if legs == 1 { part.len - offset } else { part.stripe - within };
                let at = match legs {
                    1 => part.legs[0] + offset,
                    _ => part.legs[(stripe % legs) as usize] + stripe / legs * part.stripe + within,
                };
                let here = room.min(left);
                pieces.push((at, here as usize));
                offset += here;
                left -= here;
            }
            if left == 0 {
                break;
            }
            offset = 0;
        }
        pieces
    }
}

/// A volume on disks.
pub(crate) struct Mapped<'a> {
    pub disk: &'a dyn Disk,
    pub map: &'a Map,
}

impl Disk for Mapped<'_> {
    fn len(&self) -> u64 {
        self.map.len()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut rest = buffer;
        for (at, len) in self.map.pieces(offset, rest.len()) {
            let (here, behind) = rest.split_at_mut(len);
            self.disk.read(at, here)?;
            rest = behind;
        }
        Ok(())
    }
}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> io::Error {
        match fault {
            Fault::Read(error) => error,
            fault => io::Error::other(fault.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stripes_are_read_in_turns() {
        let linear = Part { len: 10, stripe: 10, legs: vec![100] };
        let striped = Part { len: 16, stripe: 4, legs: vec![200, 300] };
        let map = Map::new(vec![linear, striped.clone()], 400).expect("it fits");
        assert_eq!(map.len(), 26);
        let expected = [(105, 5), (200, 4), (300, 4), (204, 4), (304, 4)];
        assert_eq!(map.pieces(5, 21), expected);
        assert_eq!(map.pieces(13, 2), [(203, 1), (300, 1)]);
        for (start, end) in (0..26).flat_map(|start| (start..=26).map(move |end| (start, end))) {
            let each = |runs: Vec<Range<u64>>| {
                let mut bytes: Vec<u64> = runs.into_iter().flatten().collect();
                bytes.sort_unstable();
                bytes
            };
            let pieces = map.pieces(start, (end - start) as usize);
            let pieces = pieces.into_iter().map(|(at, len)| at..at + len as u64).collect();
            assert_eq!(each(map.runs(start..end)), each(pieces), "{start}..{end}");
        }
        assert_eq!(map.runs(12..25), [202..208, 300..307]);
        assert_eq!(Map::new(vec![striped.clone()], 307), None);
        assert_eq!(Map::new(vec![Part { len: 15, ..striped }], 400), None);
    }
}

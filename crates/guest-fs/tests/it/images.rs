//! Disks in memory and the programs that make file systems.

use rempart_guest_fs::{Disk, Reason, Survey, Wanted, survey};
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

pub const MIB: u64 = 1 << 20;
pub const ALL: Wanted = Wanted { swap: true, free_space: true, is_quiet: false };

/// Bytes, of which one may have some bits flipped.
pub struct Memory<'a> {
    bytes: &'a [u8],
    flipped: Option<(usize, u8)>,
}

impl<'a> Memory<'a> {
    pub fn new(bytes: &'a [u8]) -> Memory<'a> {
        Memory { bytes, flipped: None }
    }
}

impl Disk for Memory<'_> {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(offset).expect("an offset in memory");
        buffer.copy_from_slice(&self.bytes[at..at + buffer.len()]);
        if let Some((flipped, bits)) = self.flipped
            && let Some(byte) = flipped.checked_sub(at).and_then(|place| buffer.get_mut(place))
        {
            *byte ^= bits;
        }
        Ok(())
    }
}

pub fn look(bytes: &[u8], wanted: Wanted) -> Survey {
    look_at_disks(bytes, &[bytes.len() as u64], wanted)
}

/// At disks of these sizes, one behind the other.
pub fn look_at_disks(bytes: &[u8], sizes: &[u64], wanted: Wanted) -> Survey {
    look_with(&Memory::new(bytes), sizes, wanted)
}

fn look_with(disk: &Memory<'_>, sizes: &[u64], wanted: Wanted) -> Survey {
    let starts = sizes.iter().scan(0, |end, size| {
        *end += size;
        Some(*end - size..*end)
    });
    survey(disk, &Vec::from_iter(starts), wanted).expect("memory can be read")
}

/// With some bits of byte `at` flipped.
pub fn look_flipped(bytes: &[u8], at: usize, bits: u8) -> Survey {
    look_with(&Memory { bytes, flipped: Some((at, bits)) }, &[bytes.len() as u64], ALL)
}

pub fn bytes_of(survey: &Survey, reason: Reason) -> Vec<Range<u64>> {
    survey.left_out.iter().filter(|one| one.reason == reason).map(|one| one.range.clone()).collect()
}

/// A disk restored without what is left out: zeroes there.
pub fn without(survey: &Survey, mut bytes: Vec<u8>) -> Vec<u8> {
    for one in &survey.left_out {
        bytes[one.range.start as usize..one.range.end as usize].fill(0);
    }
    bytes
}

/// The numbers of the blocks that lie whole in `ranges`, which begin at blocks.
pub fn blocks(ranges: &[Range<u64>], block: u64) -> BTreeSet<u64> {
    ranges.iter().flat_map(|range| range.start / block..range.end / block).collect()
}

pub fn sum(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// What it printed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    run_with_input(program, arguments, "")
}

pub fn run_with_input(program: &str, arguments: &[&str], input: &str) -> String {
    use std::io::Write;
    use std::process::Stdio;
    let path = format!("/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap_or_default());
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("plain text")
}

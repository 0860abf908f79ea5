//! Entry points for fuzzers and the replay of their corpora: any bytes, no panic, and what is accepted holds together.
//!
//! Checksums keep a fuzzer out of everything behind them, so the first byte of the input says which are made right.

use crate::batch::{BATCH_HEADER_LEN, BATCH_MAGIC, Batch, MAX_RECORDS, RECORD_LEN, RecordKind, parse_header};
use crate::checksum::crc32c;
use crate::segment::SegmentHeader;
use crate::superblock::{COPY_SIZE, MAGIC, MAX_SNAPSHOTS, Superblock, VERSION};
use rempart_buffer::PAGE_SIZE;

const RIGHT_HEADER: u8 = 1;
const RIGHT_LENGTH: u8 = 2;
const RIGHT_PAYLOADS: u8 = 4;

/// Bytes of a journal, or of a peer, where a batch should be.
///
/// # Panics
/// If a batch is accepted that is not what it says.
pub fn batch(data: &[u8]) {
    let [how, data @ ..] = data else { return };
    let mut bytes = data.to_vec();
    if how & RIGHT_LENGTH != 0 {
        bytes.resize(bytes.len().max(1).next_multiple_of(PAGE_SIZE), 0);
        let len = bytes.len() as u32;
        bytes[44..48].copy_from_slice(&len.to_le_bytes());
    }
    if bytes.len() >= PAGE_SIZE {
        let count = u32::from_le_bytes(bytes[12..16].try_into().expect("four bytes")) as usize;
        let rows = BATCH_HEADER_LEN..BATCH_HEADER_LEN + count.min(MAX_RECORDS) * RECORD_LEN;
        if how & RIGHT_PAYLOADS != 0 {
            for at in rows.clone().step_by(RECORD_LEN) {
                seal_payload(&mut bytes, at);
            }
        }
        if how & RIGHT_HEADER != 0 {
            bytes[..8].copy_from_slice(&BATCH_MAGIC);
            bytes[8..10].copy_from_slice(&1u16.to_le_bytes());
            let checksum = crc32c(&[&bytes[..92], &bytes[rows]].concat());
            bytes[92..96].copy_from_slice(&checksum.to_le_bytes());
        }
    }
    let header = parse_header(&bytes);
    let Ok(batch) = Batch::parse(&bytes) else { return };
    assert_eq!(header.as_ref(), Ok(batch.header()), "the header is read the same way alone");
    assert_eq!(batch.bytes(), &bytes[..batch.byte_len()], "a batch is the bytes it came in");
    let mut last = None;
    for record in batch.records() {
        let payload = batch.payload(&record);
        match record.kind {
            RecordKind::Write | RecordKind::Mark | RecordKind::Config => {
                assert_eq!(payload.len() as u64, record.len);
            }
            RecordKind::Zero | RecordKind::Discard | RecordKind::TermStart => assert!(payload.is_empty()),
        }
        if record.kind.changes_disk() {
            assert!(record.len > 0 && record.offset.checked_add(record.len).is_some());
        }
        last = Some(record.lsn);
    }
    assert_eq!(last, Some(batch.last()), "records are numbered without gaps");
    let own = Batch::adopt(bytes::Bytes::copy_from_slice(batch.bytes()));
    assert_eq!(own.as_ref(), Ok(&batch), "a received buffer is read the same way");
    assert_eq!(own.map(|own| own.chain()), Ok(batch.chain()));
}

fn seal_payload(bytes: &mut [u8], at: usize) {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
    let (start, len) = (word(at + 24), word(at + 16));
    if let Some(payload) = start.checked_add(len).and_then(|end| bytes.get(start..end)) {
        let checksum = crc32c(payload);
        bytes[at + 4..at + 8].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// One copy of a superblock; and, for want of a target of its own, a segment's header.
///
/// # Panics
/// If what was read is written differently.
pub fn superblock(data: &[u8]) {
    let [how, data @ ..] = data else { return };
    if data.len() as u64 > COPY_SIZE - 32 {
        return;
    }
    let copy = if how & RIGHT_HEADER == 0 {
        data.to_vec()
    } else {
        // A sequence, then a body.
        let (sequence, body) = data.split_at(data.len().min(8));
        let mut copy = [&MAGIC[..], &VERSION.to_le_bytes(), &(body.len() as u32).to_le_bytes()].concat();
        copy.extend_from_slice(sequence);
        copy.resize(24, 0);
        let checksum = crc32c(&[&copy[..], body].concat());
        copy.extend_from_slice(&checksum.to_le_bytes());
        copy.resize(32, 0);
        copy.extend_from_slice(body);
        copy
    };
    if let Ok(superblock) = Superblock::decode(&copy) {
        let again = superblock.encode();
        assert_eq!(Superblock::decode(&again).as_ref(), Ok(&superblock), "it reads back as it was");
        let len = |copy: &[u8]| u32::from_le_bytes(copy[12..16].try_into().expect("four bytes")) as usize;
        let (body, again) = (&copy[32..32 + len(&copy)], &again[32..32 + len(&again)]);
        // But for the list of snapshots, of which older versions knew more.
        let same = body.iter().zip(again).take_while(|(one, other)| one == other).count();
        let behind = body[same..].iter().rev().zip(again[same..].iter().rev());
        let same = same + behind.take_while(|(one, other)| one == other).count();
        let list = 4 + 16 * MAX_SNAPSHOTS;
        assert!(body.len().max(again.len()) - same <= list, "there is one way to write it");
    }
    if let Ok(segment) = SegmentHeader::decode(&copy) {
        assert_eq!(SegmentHeader::decode(&segment.encode()), Ok(segment));
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
    fn batch_corpus() {
        replay("batch", super::batch);
    }

    #[test]
    fn superblock_corpus() {
        replay("superblock", super::superblock);
    }
}

//! The formats, byte for byte: stores written by released programs must stay readable.

mod common;

use common::{GROUP, SEGMENT, World};
use rempart_store::{Batch, BatchBuilder, BatchPlace, ChainValue, FileId, SuperblockChange, Token, crc32c};
use rempart_types::{DiskIndex, ExtentIndex, Lsn, RegisterId, Term, WallTime};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_batch() {
    let mut builder = BatchBuilder::new(SEGMENT as usize);
    builder.write(DiskIndex(1), 8192, &[0xab; 512]);
    builder.discard(DiskIndex(0), 65536, 131072);
    builder.mark(b"noon");
    let batch = builder.seal(&BatchPlace {
        group: GROUP,
        term: Term::new(7, 2),
        first: Lsn(1000),
        stable: Lsn(990),
        wall: WallTime(0x0102_0304_0506),
        clock: WallTime(0x0102_0304_0500),
        previous: ChainValue(0xfeed_f00d),
    });
    let header = concat!(
        "524d504241544348", // magic
        "0100",
        "0000",
        "03000000",                         // version, reserved, count
        "aeb1a15c000000000000000000000000", // group
        "0700000000000000",
        "02000000", // term
        "00200000", // length
        "e803000000000000",
        "de03000000000000", // first, stable
        "0605040302010000",
        "0005040302010000", // wall time, clock
        "0df0edfe",
        "0000000000000000", // previous, reserved
    );
    let header = header.replace("aeb1a15c", &hex(&(GROUP.0 as u32).to_le_bytes()));
    assert_eq!(hex(&batch.bytes()[..92]), header);
    let table = &batch.bytes()[96..192];
    let payload = hex(&crc32c(&[0xab; 512]).to_le_bytes());
    assert_eq!(
        hex(&table[..32]),
        format!("01000100{payload}0020000000000000000200000000000000100000{:08}", 0)
    );
    assert_eq!(
        hex(&table[32..64]),
        "030000000000000000000100000000000000020000000000".to_owned() + "0000000000000000"
    );
    let payload = hex(&crc32c(b"noon").to_le_bytes());
    assert_eq!(
        hex(&table[64..]),
        format!("04000000{payload}0000000000000000040000000000000000120000{:08}", 0)
    );
    assert_eq!(&batch.bytes()[4096 + 512..4096 + 516], b"noon");
    // The checksum covers header and table as if the field were not there.
    let covered: Vec<u8> = [&batch.bytes()[..92], table].concat();
    assert_eq!(&batch.bytes()[92..96], crc32c(&covered).to_le_bytes());
    assert_eq!(batch.chain(), ChainValue(crc32c(&covered)));
    assert_eq!(Batch::parse(batch.bytes()), Ok(batch));
}

#[test]
fn a_store_of_this_format_stays_as_it_is() {
    let mut world = World::new(1);
    let change = SuperblockChange {
        promise: Some(Term::new(3, 1)),
        register: Some(RegisterId(9)),
        control: Some(vec![1, 2, 3]),
        images_trusted: false,
        lost_to: None,
    };
    world.store.persist(Token(1), change, &mut world.out);
    world.append(vec![common::Change::Write { disk: 0, offset: 512, data: vec![5; 512] }]);
    world.make_all_stable();
    world.store.begin_resync(rempart_store::SnapshotId(4), &mut world.out).expect("begins");
    world.run_untwinned();
    let data = Some(rempart_store::Slice::copy_of(&[6; 65536]));
    let (disk, extent) = (DiskIndex(0), ExtentIndex(0));
    world.store.write_extent(Token(2), disk, extent, Lsn(7), data, &mut world.out).expect("takes it");
    world.run_untwinned();
    let sum = |file| world.disk.content(file).map(|bytes| (bytes.len(), format!("{:08x}", crc32c(&bytes))));
    let sums: Vec<String> = [
        FileId::Superblock,
        FileId::Segment(1),
        FileId::ChangeMap(DiskIndex(0)),
        FileId::SnapshotMap,
        FileId::SnapshotData,
    ]
    .into_iter()
    .map(|file| format!("{file}: {:?}", sum(file)))
    .collect();
    assert_unchanged(&sums.join("\n"));
}

/// The sums of a store made by the first release's code. A change here is a change of format: raise the
/// version, and keep reading the old one.
fn assert_unchanged(found: &str) {
    let expected = include_str!("golden/store.txt");
    assert_eq!(found.trim(), expected.trim());
}

use super::levels::path_of_recent;
use super::update::IndexUpdate;
use super::*;
use crate::blob::{BlobKind, Codec};
use crate::error::ErrorKind;
use crate::key::Domain;
use crate::names::SegmentName;
use crate::pack::{Blob, PACK_HEADER};
use crate::{ChunkId, DomainId, KeyRing, MasterKey, PackId, RepositoryId, SessionId};
use proptest::prelude::*;
use rempart_objects::{Memory, Objects};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::LazyLock;

pub(crate) const REPOSITORY: RepositoryId = RepositoryId([1; 16]);
const SESSION: SessionId = SessionId([5; 16]);

fn ring() -> KeyRing {
    KeyRing::new(REPOSITORY, MasterKey::new([2; 32]))
}

pub(crate) fn id(number: u64) -> ChunkId {
    static IDS: LazyLock<Vec<ChunkId>> = LazyLock::new(|| {
        let id = |number: u64| ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes());
        (0..5000).map(id).collect()
    });
    IDS[number as usize]
}

/// Blobs as a pack might hold them.
fn blobs(numbers: &[u64]) -> Vec<Blob> {
    let mut offset = PACK_HEADER as u32;
    let blob = |(ordinal, number): (usize, &u64)| {
        let plain_len = 1 + (*number as u32 * 7919) % (1 << 20);
        let codec = if number % 3 == 0 { Codec::Zstd } else { Codec::Plain };
        let stored_len = if codec == Codec::Zstd { plain_len / 2 + 17 } else { plain_len + 16 };
        let kind = if number % 5 == 0 { BlobKind::Tree } else { BlobKind::Data };
        let blob =
            Blob { id: id(*number), kind, codec, ordinal: ordinal as u32, offset, stored_len, plain_len };
        offset += stored_len;
        blob
    };
    numbers.iter().enumerate().map(blob).filter(Blob::is_possible).collect()
}

fn sealed(packs: &[Vec<Blob>]) -> (SegmentName, Vec<u8>) {
    let mut segment = SegmentBuilder::new();
    for (number, blobs) in packs.iter().enumerate() {
        segment.add(PackId([number as u8; 32]), blobs);
    }
    let sealed = segment.seal(ring().writer());
    (sealed.name(SESSION), sealed.bytes().to_vec())
}

fn domain_of(id: DomainId) -> Option<Domain> {
    Some(ring().opener().domain(id))
}

fn opened(packs: &[Vec<Blob>]) -> Segment {
    let (name, bytes) = sealed(packs);
    Segment::open(&REPOSITORY, domain_of, &name, &bytes).expect("whole")
}

#[test]
fn a_segment_reads_back_in_order() {
    let packs = [blobs(&[1, 2, 3, 3]), blobs(&[4, 3])];
    let (name, bytes) = sealed(&packs);
    let objects = Memory::default();
    objects.create(&name.object(), &[&bytes], None).expect("created");
    let segment = Segment::fetch(&objects, &REPOSITORY, domain_of, &name).expect("whole");
    assert_eq!(segment.packs(), [PackId([0; 32]), PackId([1; 32])]);
    assert!(segment.entries().is_sorted());
    let found: BTreeSet<_> = segment
        .entries()
        .iter()
        .map(|entry| {
            let id = (1..5).map(id).find(|id| id.0[..16] == entry.id()).expect("one of those");
            let located = entry.locate(&id).expect("it is about that");
            (located.pack, located.blob.ordinal, located.blob.offset, located.blob.plain_len)
        })
        .collect();
    let expected: BTreeSet<_> = packs
        .iter()
        .zip(0..)
        .flat_map(|(blobs, pack)| blobs.iter().map(move |b| (pack, b.ordinal, b.offset, b.plain_len)))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn every_flipped_bit_of_a_segment_is_seen() {
    let (name, bytes) = sealed(&[blobs(&[1, 2, 3])]);
    let owner = ring();
    for bit in 0..bytes.len() * 8 {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(Segment::parse(&REPOSITORY, domain_of, &changed).is_err(), "{bit}");
        // Also where the keys offered are always the right ones.
        let own = |_| Some(owner.writer().domain().clone());
        assert!(Segment::parse(&REPOSITORY, own, &changed).is_err(), "{bit}");
        let error = Segment::open(&REPOSITORY, domain_of, &name, &changed).expect_err("damaged");
        assert_eq!((error.kind, error.object), (ErrorKind::Damaged, name.object().to_string()));
    }
    for length in 0..bytes.len() {
        assert!(Segment::parse(&REPOSITORY, domain_of, &bytes[..length]).is_err());
    }
    assert!(Segment::parse(&REPOSITORY, domain_of, &[&bytes[..], &[0]].concat()).is_err());
}

#[test]
fn an_agent_reads_its_own_segments_only() {
    let (name, bytes) = sealed(&[blobs(&[1])]);
    let agent = ring().new_writer(crate::WriterName::new("web").expect("a name"));
    let own = |id| (id == agent.domain().id()).then(|| agent.domain().clone());
    let error = Segment::open(&REPOSITORY, own, &name, &bytes).expect_err("another's");
    assert_eq!(error.kind, ErrorKind::WrongKey);
    let always = |_| Some(agent.domain().clone());
    assert!(Segment::open(&REPOSITORY, always, &name, &bytes).is_err());

    let mut segment = SegmentBuilder::new();
    segment.add(PackId([7; 32]), &blobs(&[1]));
    let sealed = segment.seal(&agent);
    let name = sealed.name(SESSION);
    assert!(Segment::open(&REPOSITORY, own, &name, sealed.bytes()).is_ok());
    assert!(Segment::open(&REPOSITORY, domain_of, &name, sealed.bytes()).is_ok(), "the owner reads all");
    let foreign = RepositoryId([9; 16]);
    let error = Segment::open(&foreign, own, &name, sealed.bytes()).expect_err("foreign");
    assert_eq!(error.kind, ErrorKind::Foreign);
}

#[test]
fn several_blocks_of_a_segment() {
    let numbers: Vec<u64> = (0..5000).collect();
    let packs: Vec<_> = numbers.chunks(50).map(blobs).collect();
    let count = packs.iter().map(Vec::len).sum::<usize>();
    let (name, bytes) = sealed(&packs);
    assert!(bytes.len() > 2 * 65536);
    let segment = Segment::open(&REPOSITORY, domain_of, &name, &bytes).expect("whole");
    assert_eq!(segment.entries().len(), count);
    // Blocks that change places do not open.
    let mut swapped = bytes.clone();
    let block = 65536 + 16;
    let start = bytes.len() - (bytes.len() - 88) % block - 2 * block;
    let (one, two) = swapped[start..].split_at_mut(block);
    one.swap_with_slice(&mut two[..block]);
    assert!(Segment::parse(&REPOSITORY, domain_of, &swapped).is_err());
}

fn numbered(path: &Path, batch: usize, old: Option<LocalIndex>) -> IndexUpdate {
    let update = match old {
        Some(old) => Index::from(old).update(),
        None => Index::create(path, REPOSITORY),
    };
    update.with_batches_of(batch)
}

/// Packs of one update: their number in the log if they are live, and their blobs.
type Packs = Vec<(Option<u32>, Vec<u64>)>;

fn updates() -> impl Strategy<Value = Vec<(Packs, BTreeSet<u32>)>> {
    let pack = (proptest::option::weighted(0.9, 0u32..20), proptest::collection::vec(0u64..400, 1..150));
    let update = (proptest::collection::vec(pack, 1..6), proptest::collection::btree_set(0u32..20, 0..4));
    proptest::collection::vec(update, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn an_index_is_what_a_map_would_be(updates in updates(), batch in 1usize..400) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("index");
        let mut twin = BTreeMap::<u64, BTreeSet<(u32, u32, u32)>>::new();
        let mut index = None;
        for (round, (packs, condemned)) in updates.into_iter().enumerate() {
            let lists: Vec<_> = packs.iter().map(|(_, numbers)| blobs(numbers)).collect();
            let numbers: Vec<_> = packs.iter().map(|(number, _)| *number).collect();
            let mut update = numbered(&path, batch, index.take());
            update.add(&opened(&lists), &numbers).expect("added");
            prop_assert!(update.add(&opened(&lists), &[]).is_err());
            let covers = Covers { entry: round as u64, hash: [round as u8; 32] };
            let made = update.finish_whole(|entry| !condemned.contains(&entry.pack()), covers).expect("made");

            for (number, list) in numbers.iter().zip(&lists) {
                for blob in list {
                    let known = (0..400).find(|known| id(*known) == blob.id).expect("one of those");
                    if let Some(pack) = number {
                        twin.entry(known).or_default().insert((*pack, blob.ordinal, blob.offset));
                    }
                }
            }
            twin.values_mut().for_each(|places| places.retain(|(pack, ..)| !condemned.contains(pack)));
            let reopened = LocalIndex::open(&path, &REPOSITORY).expect("whole");
            prop_assert_eq!(reopened.covers(), covers);
            for index in [&made, &reopened] {
                let count = twin.values().map(BTreeSet::len).sum::<usize>();
                prop_assert_eq!(index.len(), count as u64);
                prop_assert_eq!(index.entries().count(), count);
                for number in 0..450 {
                    let found = index.find(&id(number)).expect("whole");
                    prop_assert!(found.iter().all(|one| one.blob.id == id(number)));
                    let found: BTreeSet<_> =
                        found.iter().map(|one| (one.pack, one.blob.ordinal, one.blob.offset)).collect();
                    prop_assert_eq!(found, twin.get(&number).cloned().unwrap_or_default());
                }
                let entries: Vec<_> = index.entries().map(|entry| entry.expect("whole").id()).collect();
                let mut wanted: Vec<[u8; 16]> =
                    (0..450).map(|number| id(number).0[..16].try_into().expect("16 bytes")).collect();
                wanted.sort_unstable();
                let mut cursor = index.cursor();
                for half in wanted {
                    let place = entries.iter().position(|entry| *entry == half).map(|place| place as u64);
                    prop_assert_eq!(cursor.place_of(&half).expect("whole"), place);
                    prop_assert_eq!(cursor.place_of(&half).expect("whole"), place, "again");
                    prop_assert_eq!(index.cursor().place_of(&half).expect("whole"), place, "over all before");
                }
            }
            index = Some(reopened);
        }
    }
}

/// An index of blobs 0 to `count`.
pub(crate) fn local(path: &Path, count: u64) -> LocalIndex {
    let numbers: Vec<u64> = (0..count).collect();
    let lists: Vec<_> = numbers.chunks(40).map(blobs).collect();
    let mut update = Index::create(path, REPOSITORY);
    update.add(&opened(&lists), &(0..lists.len() as u32).map(Some).collect::<Vec<_>>()).expect("added");
    update.finish_whole(|_| true, Covers { entry: 3, hash: [4; 32] }).expect("made")
}

/// Who reads looks for what is there; who has another made meanwhile must not store everything anew.
#[test]
fn an_index_without_its_filter_finds_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut index = local(&folder.path().join("index"), 1000);
    let found = |index: &LocalIndex| -> Vec<_> {
        let one =
            |number| (index.find(&id(number)).expect("whole"), index.place_of(&id(number)).expect("whole"));
        (0..1500).map(one).collect()
    };
    let (before, memory) = (found(&index), index.memory());
    assert!(before.iter().filter(|(located, _)| !located.is_empty()).count() > 900);
    index.forget_filter();
    assert!(index.memory() < memory);
    assert_eq!(found(&index), before);
    assert!((0..1500).all(|number| index.may_hold(&id(number))));
}

#[test]
fn every_damaged_byte_of_a_local_index_is_seen() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("index");
    let made = local(&path, 300);
    let first = made.entries().next().expect("there are some").expect("whole").id();
    let count = made.len();
    let whole = std::fs::read(&path).expect("read");
    let read = || {
        let index = LocalIndex::open(&path, &REPOSITORY)?;
        index.entries().try_fold(0, |count, entry| entry.map(|_| count + 1))
    };
    assert_eq!(read().expect("whole"), count);
    // Byte by byte in place: writing the file anew each time would take a minute.
    let file = std::fs::File::options().write(true).open(&path).expect("opened");
    for (at, byte) in whole.iter().enumerate() {
        file.write_all_at(&[byte ^ 1 << (at % 8)], at as u64).expect("written");
        let error = read().expect_err("damaged");
        assert!(matches!(error.kind, ErrorKind::Damaged | ErrorKind::Newer), "{at}: {error}");
        assert_eq!(error.object, path.display().to_string());
        file.write_all_at(&[*byte], at as u64).expect("written");
    }
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("written");
        read()
    };
    for length in (0..whole.len()).step_by(97).chain([whole.len() - 1]) {
        assert_eq!(read(&whole[..length]).expect_err("truncated").kind, ErrorKind::Damaged);
    }
    assert!(read(&[&whole[..], &[0]].concat()).is_err());
    // A search sees damage in the block it reads.
    let mut changed = whole.clone();
    changed[4096 + 5] ^= 1;
    std::fs::write(&path, changed).expect("written");
    let index = LocalIndex::open(&path, &REPOSITORY).expect("its blocks are looked at later");
    let error = LocalIndex::open(&path, &RepositoryId([9; 16])).expect_err("another repository's");
    assert_eq!(error.kind, ErrorKind::Foreign);
    // Nor does who looks for many take a block for what it could not read.
    let mut cursor = index.cursor();
    for _ in 0..2 {
        assert_eq!(cursor.place_of(&first).expect_err("damaged").kind, ErrorKind::Damaged);
    }
    // Nobody takes it for a loss of what is in the repository, and who comes next makes it anew.
    let error = (0..300).find_map(|number| index.find(&id(number)).err()).expect("one lies there");
    assert!(error.kind == ErrorKind::Local && !path.exists(), "{error}");
}

fn covers(entry: u64) -> Covers {
    Covers { entry, hash: [entry as u8; 32] }
}

/// The index at `path` with one pack more, of these blobs.
fn with_pack(path: &Path, pack: u32, blobs_of_it: &[u64]) -> Index {
    let old = Index::open(path, &REPOSITORY, |_| true).expect("whole").expect("goes on");
    let mut update = old.update();
    update.add(&opened(&[blobs(blobs_of_it)]), &[Some(pack)]).expect("added");
    update.finish(|_| true, covers(pack.into())).expect("made")
}

/// In which packs each blob below `count` is found.
fn found(index: &Index, count: u64) -> Vec<BTreeSet<u32>> {
    let packs = |number| index.find(&id(number)).expect("whole").iter().map(|one| one.pack).collect();
    (0..count).map(packs).collect()
}

/// What a backup brings into a large repository does not cost writing all of its index.
#[test]
fn what_is_new_lies_in_a_small_file_until_it_is_much() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("index");
    let base = local(&path, 3200);
    let (mut expected, mut written) = (found(&base.into(), 4000), std::fs::read(&path).expect("read"));
    let mut in_two = 0;
    for pack in 100..140u32 {
        // Some of them are known already, and then in two packs.
        let new: Vec<u64> = (0..20).map(|blob| 3100 + u64::from(pack - 100) * 15 + blob).collect();
        let new: Vec<u64> = new.into_iter().filter(|number| *number < 4000).collect();
        let index = with_pack(&path, pack, &new);
        blobs(&new).iter().for_each(|blob| {
            let number = (0..4000).find(|number| id(*number) == blob.id).expect("one of those");
            expected[number as usize].insert(pack);
        });
        let reopened = Index::open(&path, &REPOSITORY, |_| true).expect("whole").expect("goes on");
        for index in [&index, &reopened] {
            assert_eq!(index.covers(), covers(pack.into()));
            assert_eq!(found(index, 4000), expected);
            assert!(
                (0..4000).all(|number| expected[number as usize].is_empty() || index.may_hold(&id(number)))
            );
        }
        let now = std::fs::read(&path).expect("read");
        assert_eq!(
            index.is_whole(),
            now != written,
            "the large file is written when all is in it, and only then"
        );
        assert_eq!(index.is_whole(), !path_of_recent(&path).exists());
        let (recent, base) = (index.recent_len(), index.base.len());
        assert!(recent <= base / 16, "{recent} beside {base}");
        in_two += u32::from(!index.is_whole());
        written = now;
    }
    assert!((20..40).contains(&in_two), "{in_two} of 40 times");
    let whole = Index::open(&path, &REPOSITORY, |_| true).expect("whole").expect("goes on").update();
    let whole = whole.finish_whole(|entry| entry.pack() != 100, covers(200)).expect("made");
    for packs in &mut expected {
        packs.remove(&100);
    }
    assert_eq!(found(&whole.into(), 4000), expected);
    assert!(!path_of_recent(&path).exists());
}

/// Processes write both files at the same time, from what they know of the log.
#[test]
fn a_small_file_that_does_not_go_on_from_the_large_one_counts_for_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("index");
    let recent = path_of_recent(&path);
    let older = local(&path, 1600);
    let older_bytes = std::fs::read(&path).expect("read");
    let found_of_older = found(&older.into(), 2000);
    let with_recent = found(&with_pack(&path, 50, &[1700, 1701]), 2000);
    let recent_bytes = std::fs::read(&recent).expect("there is one");
    let open =
        |continues: &dyn Fn(Covers) -> bool| Index::open(&path, &REPOSITORY, continues).expect("whole");
    assert_eq!(found(&open(&|_| true).expect("goes on"), 2000), with_recent);

    // It is of another past of the log than is asked about, or damaged.
    let older_only = open(&|covers| covers.entry != 50).expect("goes on");
    assert_eq!((found(&older_only, 2000), older_only.covers().entry), (found_of_older.clone(), 3));
    assert!(open(&|_| false).is_none());
    std::fs::write(&recent, &recent_bytes[..5000]).expect("written");
    assert_eq!(found(&open(&|_| true).expect("goes on"), 2000), found_of_older);

    // Who wrote the large one anew was killed before the small one was removed.
    std::fs::write(&recent, &recent_bytes).expect("written");
    let update = open(&|_| true).expect("goes on").update();
    let newer = update.finish_whole(|entry| entry.pack() != 50, covers(60)).expect("made");
    std::fs::write(&recent, &recent_bytes).expect("written");
    assert_eq!(open(&|_| true).expect("goes on").covers(), newer.covers());
    assert_eq!(found(&open(&|_| true).expect("goes on"), 2000), found_of_older, "pack 50 was not kept");

    // One that goes on from there, beside an older large one: what lies between the two is in neither.
    with_pack(&path, 70, &[1702]);
    std::fs::write(&path, &older_bytes).expect("written");
    assert_eq!(found(&open(&|_| true).expect("goes on"), 2000), found_of_older);
}

#[test]
fn a_half_made_index_leaves_the_old_one_and_no_files() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("index");
    let old = local(&path, 100);
    let count = old.len();
    let mut update = Index::from(old).update().with_batches_of(10);
    update.add(&opened(&[blobs(&(0..50).collect::<Vec<_>>())]), &[Some(9)]).expect("added");
    drop(update);
    assert_eq!(LocalIndex::open(&path, &REPOSITORY).expect("whole").len(), count);
    let files: Vec<_> = std::fs::read_dir(folder.path()).expect("a folder").flatten().collect();
    assert_eq!(files.len(), 1);

    // What a killed process left is removed when it is old, and only then.
    let left = |name: &str| folder.path().join(name);
    for name in ["index.new-1", "index.new-2", "index2.new-1"] {
        let file = std::fs::File::create(left(name)).expect("created");
        if name != "index.new-2" {
            let old = std::time::SystemTime::now() - std::time::Duration::from_secs(90_000);
            file.set_modified(old).expect("set");
        }
    }
    local(&path, 10);
    assert!(!left("index.new-1").exists());
    assert!(left("index.new-2").exists() && left("index2.new-1").exists());
}

#[test]
fn ids_that_agree_in_half_are_all_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("index");
    let mut list = Vec::new();
    // More than three blocks of them: the search must look through all.
    for pack in 0..8 {
        let mut blobs = blobs(&(0..50).collect::<Vec<_>>());
        for (number, blob) in blobs.iter_mut().enumerate() {
            blob.id = ChunkId([if number == 0 { 0xef } else { 0xee }; 32]);
        }
        list.push((pack, blobs));
    }
    let lists: Vec<_> = list.iter().map(|(_, blobs)| blobs.clone()).collect();
    let mut update = Index::create(&path, REPOSITORY);
    update.add(&opened(&lists), &(0..8).map(Some).collect::<Vec<_>>()).expect("added");
    let index = update.finish_whole(|_| true, Covers::default()).expect("made");
    let same = lists.iter().map(|blobs| blobs.len() - 1).sum::<usize>();
    let mut other = ChunkId([0xee; 32]);
    other.0[31] = 1;
    for id in [ChunkId([0xee; 32]), other] {
        let found = index.find(&id).expect("whole");
        assert_eq!(found.len(), same);
        assert!(found.iter().all(|one| one.blob.id == id));
    }
    assert_eq!(index.find(&ChunkId([0xef; 32])).expect("whole").len(), 8);
    // In order, with neighbours that are not there, and that begin like them.
    let half = |first: u8, last: u8| -> [u8; 16] {
        let mut half = [first; 16];
        half[15] = last;
        half
    };
    let mut cursor = index.cursor();
    for (wanted, place) in [
        (half(0, 0), None),
        (half(0xee, 0), None),
        (half(0xee, 0xee), Some(0)),
        (half(0xee, 0xef), None),
        (half(0xef, 0xee), None),
        (half(0xef, 0xef), Some(same as u64)),
        (half(0xf0, 0), None),
    ] {
        assert_eq!(cursor.place_of(&wanted).expect("whole"), place, "{wanted:?}");
    }
}

//! Disks of restore points, read here and there, against what the disk was.

use crate::lab::{CHUNK, Lab, PASSPHRASE};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rempart_backup::{ChunkCache, Content, DiskReader, Progress, check_disk};
use rempart_objects::{Directory, Error, Front, Name, Objects};
use rempart_repository::{BlobReader, PointDisk, Repository};
use rempart_types::WallTime;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

const SIZE: u64 = 40 * 1024 * 1024 + 512;
const CACHE: u64 = 2 << 20;

/// A place that counts what is read of it, and takes its time.
#[derive(Debug)]
pub struct Counting {
    inner: Directory,
    read: AtomicU64,
    takes: Duration,
}

impl Front for Counting {
    fn behind(&self) -> &dyn Objects {
        &self.inner
    }

    fn get_range(&self, name: &Name, range: Range<u64>) -> Result<Vec<u8>, Error> {
        self.read.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(self.takes);
        self.inner.get_range(name, range)
    }
}

impl Counting {
    pub fn place(lab: &Lab, takes: Duration) -> Arc<Counting> {
        let inner = Directory::open(&lab.folder.path().join("repository")).expect("opens");
        Arc::new(Counting { inner, read: AtomicU64::new(0), takes })
    }

    pub fn cache(self: &Arc<Counting>, lab: &Lab, bytes: u64) -> Arc<ChunkCache> {
        let opened = Repository::open(self.clone(), &lab.folder.path().join("cache"), PASSPHRASE);
        ChunkCache::new(Arc::new(opened.expect("opens")), bytes).expect("opens")
    }

    pub fn taken(&self) -> u64 {
        self.read.swap(0, Ordering::SeqCst)
    }
}

fn reader(lab: &Lab, cache: &Arc<ChunkCache>, disk: &PointDisk) -> DiskReader {
    DiskReader::new(cache, &disk.name, Content::of(disk, lab.repository.chunk_size()))
}

fn read(disk: &DiskReader, offset: u64, len: u64) -> Vec<u8> {
    let mut buffer = vec![0xee; len as usize];
    disk.read_into(offset, &mut buffer).expect("reads");
    buffer
}

/// The disk's packs, the smallest first.
fn packs(lab: &Lab) -> Vec<PathBuf> {
    fn walk(folder: PathBuf, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("reads") {
            let path = entry.expect("reads").path();
            if path.is_dir() { walk(path, found) } else { found.push(path) }
        }
    }
    let mut found = Vec::new();
    walk(lab.folder.path().join("repository/packs"), &mut found);
    found.sort_by_key(|pack| pack.metadata().expect("it is there").len());
    found
}

#[test]
fn reads_of_many_threads_are_what_the_disk_was() {
    let mut lab = Lab::new();
    lab.make_disk(SIZE);
    let (_, point) = lab.back_up(None, None).expect("backs up");
    let content = lab.content();
    let cache = ChunkCache::new(lab.repository.clone(), CACHE).expect("opens");
    let disk = reader(&lab, &cache, &point);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (disk, content, cache) = (&disk, &content, &cache);
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(seed);
                let mut at = 0;
                for _ in 0..300 {
                    let most = [512, 4096, 200_000, 3_000_000][random.random_range(0..4)];
                    let len = random.random_range(0..most).min(SIZE);
                    // Now and then it goes on where it was, so that something is read ahead.
                    at = if random.random_ratio(1, 2) { at } else { random.random_range(0..SIZE) };
                    at = at.min(SIZE - len);
                    let wanted = &content[at as usize..(at + len) as usize];
                    assert!(read(disk, at, len) == wanted, "{len} bytes at {at}");
                    assert!(cache.held() <= CACHE, "{} bytes", cache.held());
                    at += len;
                }
            });
        }
    });
}

#[test]
fn holes_are_told_and_nothing_else_is() {
    let mut lab = Lab::new();
    lab.make_disk(SIZE);
    let (_, point) = lab.back_up(None, None).expect("backs up");
    let content = lab.content();
    let cache = ChunkCache::new(lab.repository.clone(), CACHE).expect("opens");
    let disk = reader(&lab, &cache, &point);
    let is_data = |chunk: u64| {
        let start = chunk * CHUNK;
        content[start as usize..(start + CHUNK).min(SIZE) as usize].iter().any(|byte| *byte != 0)
    };
    let mut random = SmallRng::seed_from_u64(9);
    for _ in 0..200 {
        let offset = random.random_range(0..SIZE);
        let len = random.random_range(1..=SIZE - offset);
        let mut at = offset;
        let mut before = None;
        for run in disk.allocation(offset, len).expect("reads") {
            assert!(run.len > 0 && before != Some(run.is_data));
            (at / CHUNK..(at + run.len).div_ceil(CHUNK)).for_each(|chunk| {
                assert_eq!(is_data(chunk), run.is_data, "chunk {chunk}");
            });
            at += run.len;
            before = Some(run.is_data);
        }
        assert_eq!(at, offset + len);
        for wanted in [true, false] {
            let chunk = (offset / CHUNK..SIZE.div_ceil(CHUNK)).find(|chunk| is_data(*chunk) == wanted);
            let expected = chunk.map_or(SIZE, |chunk| (chunk * CHUNK).max(offset));
            assert_eq!(disk.seek(offset, wanted).expect("reads"), expected, "{wanted} from {offset}");
        }
    }
}

#[test]
fn a_chunk_that_many_want_at_once_is_read_once() {
    let mut lab = Lab::new();
    lab.make_disk(CHUNK * 32);
    lab.fill(0, CHUNK * 32);
    let (_, point) = lab.back_up(None, None).expect("backs up");
    let place = Counting::place(&lab, Duration::from_millis(20));
    let cache = place.cache(&lab, 64 << 20);
    let disk = reader(&lab, &cache, &point);
    // The tree and the pack's key are known from then on.
    read(&disk, 0, 1);
    place.taken();
    let start = Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                start.wait();
                read(&disk, 20 * CHUNK, 4096);
            });
        }
    });
    assert_eq!(place.taken(), 1);
    assert!(disk.read_cached(20 * CHUNK + 512, CHUNK - 512).is_some());
    assert!(disk.read_cached(21 * CHUNK - 1, 2).is_none());
    assert_eq!(place.taken(), 0, "what is in memory is not read, and what is not is not either");
}

#[test]
fn who_reads_in_order_waits_for_few_requests() {
    let mut lab = Lab::new();
    lab.make_disk(CHUNK * 200);
    lab.fill(0, CHUNK * 200);
    let (_, point) = lab.back_up(None, None).expect("backs up");
    let place = Counting::place(&lab, Duration::from_millis(2));
    for (bytes, expected) in [(64 << 20, 1..100), (2 * CHUNK, 200..250)] {
        let cache = place.cache(&lab, bytes);
        let disk = reader(&lab, &cache, &point);
        place.taken();
        let content = lab.content();
        for chunk in 0..200 {
            let wanted = &content[(chunk * CHUNK) as usize..((chunk + 1) * CHUNK) as usize];
            assert!(read(&disk, chunk * CHUNK, CHUNK) == wanted);
        }
        let taken = place.taken();
        assert!(expected.contains(&taken), "{taken} requests for 200 chunks");
    }
}

#[test]
fn damage_is_an_error_of_its_own_bytes_and_is_over_when_they_are_stored_anew() {
    let mut lab = Lab::new();
    lab.make_disk(CHUNK * 64);
    lab.fill(0, CHUNK * 64);
    let (_, point) = lab.back_up(None, None).expect("backs up");
    let content = lab.content();
    let largest = packs(&lab).pop().expect("there are some");
    let mut bytes = std::fs::read(&largest).expect("reads");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&largest, bytes).expect("writes");
    let cache = ChunkCache::new(lab.repository.clone(), 64 << 20).expect("opens");
    let later = ChunkCache::new(lab.repository.clone(), 64 << 20).expect("opens");
    let disk = reader(&lab, &cache, &point);
    let mut damaged = Vec::new();
    for chunk in 0..64 {
        let range = (chunk * CHUNK) as usize..((chunk + 1) * CHUNK) as usize;
        match disk.read(chunk * CHUNK, CHUNK) {
            Ok(_) => assert!(read(&disk, chunk * CHUNK, CHUNK) == content[range]),
            Err(error) => {
                assert_eq!((error.start as usize..error.end as usize, &*error.what), (range, "disk `vda`"));
                damaged.push(chunk);
            }
        }
    }
    let [chunk] = &damaged[..] else { panic!("one of them is damaged: {damaged:?}") };
    let whole = disk.read(0, CHUNK * 64).expect_err("it is in there");
    assert_eq!(whole.start, chunk * CHUNK);
    let told = whole.to_string();
    assert_eq!(told, format!("bytes {} to {} of disk `vda` cannot be read", whole.start, whole.end));

    let log = lab.repository.log().expect("opens");
    let index = lab.repository.index(log.state()).expect("opens");
    let all = BlobReader::new(&lab.repository, log.state(), index);
    let checked = check_disk(&all, Content::of(&point, lab.repository.chunk_size()), 2, &Progress::default())
        .expect("reads");
    assert_eq!(checked.damaged.iter().map(|range| range.start).collect::<Vec<_>>(), [chunk * CHUNK]);
    lab.repository.report_damaged(&checked.chunks, WallTime(5)).expect("reports");
    lab.back_up(None, None).expect("backs up");
    let disk = reader(&lab, &later, &point);
    assert!(read(&disk, 0, CHUNK * 64) == content, "it is found where it is now");
}

#[test]
fn a_pack_that_is_gone_is_an_error_and_what_is_in_memory_stays() {
    let mut lab = Lab::new();
    lab.make_disk(CHUNK * 64);
    lab.fill(0, CHUNK * 64);
    let (_, point) = lab.back_up(None, None).expect("backs up");
    let content = lab.content();
    let cache = ChunkCache::new(lab.repository.clone(), 64 << 20).expect("opens");
    let disk = reader(&lab, &cache, &point);
    read(&disk, 0, 10);
    packs(&lab).iter().for_each(|pack| std::fs::remove_file(pack).expect("removes"));
    disk.read(63 * CHUNK, 10).expect_err("nobody has it");
    assert!(read(&disk, 0, CHUNK) == content[..CHUNK as usize]);
}

//! Disks into a repository in a directory, and back.

use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use rempart_backup::{
    BackupError, Changes, ChunkSet, Content, DiskJob, FileSource, FileTarget, Pace, Progress, back_up_disk,
    check_disk, restore_disk,
};
use rempart_objects::Directory;
use rempart_repository::{
    BackupWriter, BlobReader, ChunkSize, Consistency, ConsistencyLevel, NewRepository, PassphraseCost, Point,
    PointDisk, Repository, RepositoryId, Unlock,
};
use rempart_types::WallTime;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

pub const CHUNK: u64 = 64 << 10;
pub const PASSPHRASE: Unlock<'static> = Unlock::Passphrase("correct horse");
const PACE: Pace = Pace { threads: 3, audit: 16 };

pub struct Lab {
    pub folder: tempfile::TempDir,
    pub repository: Arc<Repository>,
    pub random: SmallRng,
}

impl Lab {
    pub fn new() -> Lab {
        let folder = tempfile::tempdir().expect("a folder");
        let place = Directory::create(&folder.path().join("repository")).expect("creates");
        let new = NewRepository {
            id: RepositoryId::random(),
            chunk_size: ChunkSize::new(CHUNK as u32).expect("a size"),
            unlock: PASSPHRASE,
            cost: PassphraseCost { memory_kib: 64, passes: 1, lanes: 1 },
            label: "test",
            now: WallTime(1),
        };
        let cache = folder.path().join("cache");
        let repository = Repository::create(Arc::new(place), &cache, new).expect("creates");
        Lab { folder, repository: Arc::new(repository), random: SmallRng::seed_from_u64(1) }
    }

    fn disk(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// A disk with noise, text and holes.
    pub fn make_disk(&mut self, size: u64) {
        let file = File::create(self.disk()).expect("creates");
        file.set_len(size).expect("grows");
        let mut at = 0;
        while at < size {
            let len = self.random.random_range(1..10 * CHUNK).min(size - at);
            match self.random.random_range(0..3) {
                0 => {}
                1 => file.write_all_at(&vec![b'a'; len as usize], at).expect("writes"),
                _ => self.noise(&file, at, len),
            }
            at += len;
        }
    }

    /// Noise there.
    pub fn fill(&mut self, at: u64, len: u64) {
        let file = File::options().write(true).open(self.disk()).expect("opens");
        self.noise(&file, at, len);
    }

    fn noise(&mut self, file: &File, at: u64, len: u64) {
        let mut noise = vec![0; len as usize];
        self.random.fill_bytes(&mut noise);
        file.write_all_at(&noise, at).expect("writes");
    }

    /// Writes here and there; tells where.
    fn change(&mut self, writes: usize) -> ChunkSet {
        let file = File::options().write(true).open(self.disk()).expect("opens");
        let size = file.metadata().expect("it is there").len();
        let mut changed = ChunkSet::none(size, CHUNK);
        for _ in 0..writes {
            let at = self.random.random_range(0..size);
            let len = self.random.random_range(1..8192).min(size - at);
            match self.random.random_range(0..4) {
                0 => file.write_all_at(&vec![0; len as usize], at).expect("writes"),
                _ => self.noise(&file, at, len),
            }
            changed.insert_bytes(at..at + len);
        }
        changed
    }

    pub fn back_up(
        &self,
        before: Option<&(u64, PointDisk)>,
        changed: Option<ChunkSet>,
    ) -> Result<(u64, PointDisk), BackupError> {
        let source = FileSource::open(&self.disk())?;
        let writer = BackupWriter::open(self.repository.clone())?;
        let changes = match (before, changed) {
            (Some((_, before)), Some(changed)) => Changes::Known { before, changed },
            _ => Changes::Unknown("the test wants it".to_owned()),
        };
        let base = matches!(changes, Changes::Known { .. }).then(|| before.expect("it is known").0);
        let job = DiskJob { name: "vda", source: &source, changes, position: None };
        let disk = back_up_disk(&writer, self.repository.chunk_size(), &job, PACE, &Progress::default())?;
        let point = Point {
            vm: "shop".to_owned(),
            host: "node-a".to_owned(),
            taken: WallTime(2),
            ended: WallTime(3),
            consistency: Consistency { level: ConsistencyLevel::Stopped, why: None, pause_ms: None },
            disks: vec![disk.clone()],
            definition: None,
            nvram: None,
            notes: Vec::new(),
        };
        let chain = self.repository.chain("shop");
        let written = writer.commit(chain, base, &point, None)?;
        Ok((written.root, disk))
    }

    /// As somebody who comes with nothing but the passphrase.
    fn restore(&self, root: u64) -> Result<Vec<u8>, BackupError> {
        let place = Directory::open(&self.folder.path().join("repository")).expect("opens");
        let cache = tempfile::tempdir().expect("a folder");
        let repository = Repository::open(Arc::new(place), cache.path(), PASSPHRASE)?;
        let log = repository.log()?;
        let point = repository.point(&log, root)?;
        let disk = point.disk("vda").expect("it has one");
        let reader = BlobReader::new(&repository, log.state(), repository.index(log.state())?);
        let chunk_size = repository.chunk_size();
        let content = Content { tree: disk.tree(chunk_size), chunk_size, size: disk.size };
        let path = cache.path().join("restored");
        let target = FileTarget::create(&path, disk.size)?;
        restore_disk(&reader, content, &target, 2, &Progress::default())?;
        Ok(std::fs::read(&path).expect("reads"))
    }

    pub fn content(&self) -> Vec<u8> {
        std::fs::read(self.disk()).expect("reads")
    }
}

#[test]
fn every_point_is_what_the_disk_was() {
    let mut lab = Lab::new();
    lab.make_disk(40 * 1024 * 1024 + 512);
    let mut points = Vec::new();
    let mut last = lab.back_up(None, None).expect("backs up");
    points.push((last.0, lab.content()));
    for round in 0..6 {
        let mut changed = lab.change(20);
        if round == 2 || round == 4 {
            let file = File::options().write(true).open(lab.disk()).expect("opens");
            let size = file.metadata().expect("it is there").len();
            let size = if round == 2 { size + 3 * CHUNK + 1024 } else { size - 200 * CHUNK - 512 };
            file.set_len(size).expect("resizes");
            let mut resized = ChunkSet::none(size, CHUNK);
            (0..changed.chunks().min(resized.chunks()))
                .filter(|chunk| changed.contains(*chunk))
                .for_each(|chunk| resized.insert_chunks(chunk..chunk + 1));
            changed = resized;
        }
        let touched = changed.bytes();
        let (root, disk) = lab.back_up(Some(&last), Some(changed)).expect("backs up");
        assert_eq!((disk.how.full_because.clone(), disk.how.missed), (None, 0));
        let most = touched + 2 * CHUNK + disk.how.audited * CHUNK;
        assert!(disk.how.read <= most, "{} bytes were read, {touched} had changed", disk.how.read);
        last = (root, disk);
        points.push((last.0, lab.content()));
    }
    // What is known already is found again, however it is read.
    let (_, again) = lab.back_up(None, None).expect("backs up");
    assert_eq!((again.how.new, again.root), (0, last.1.root));
    for (root, content) in points {
        assert!(lab.restore(root).expect("restores") == content, "point {root}");
    }
}

#[test]
fn a_change_that_was_missed_is_found_and_mended() {
    let mut lab = Lab::new();
    lab.make_disk(8 * 1024 * 1024);
    let first = lab.back_up(None, None).expect("backs up");
    lab.change(2000);
    let nothing = ChunkSet::none(8 * 1024 * 1024, CHUNK);
    let (root, disk) = lab.back_up(Some(&first), Some(nothing)).expect("backs up");
    assert!(disk.how.missed > 0 && disk.how.full_because.is_some(), "{:?}", disk.how);
    assert!(lab.restore(root).expect("restores") == lab.content());
}

#[test]
fn the_same_disk_twice_is_stored_once() {
    let mut lab = Lab::new();
    lab.make_disk(8 * 1024 * 1024);
    let size = |lab: &Lab| {
        let used =
            std::process::Command::new("du").args(["-sb"]).arg(lab.folder.path().join("repository")).output();
        let used = String::from_utf8(used.expect("du runs").stdout).expect("text");
        used.split_whitespace().next().expect("a number").parse::<u64>().expect("a number")
    };
    lab.back_up(None, None).expect("backs up");
    let once = size(&lab);
    let (_, again) = lab.back_up(None, None).expect("backs up");
    assert_eq!(again.how.new, 0);
    assert!(size(&lab) < once + 64 * 1024, "{once} and then {} bytes", size(&lab));
}

#[test]
fn a_wrong_passphrase_and_an_empty_place_are_told_apart() {
    let lab = Lab::new();
    let place = Arc::new(Directory::open(&lab.folder.path().join("repository")).expect("opens"));
    let open = |place, unlock| Repository::open(place, lab.folder.path(), unlock);
    let error = open(place, Unlock::Passphrase("wrong")).expect_err("refused");
    assert_eq!(error.kind, rempart_repository::ErrorKind::WrongKey, "{error}");
    let empty = Arc::new(Directory::create(&lab.folder.path().join("empty")).expect("creates"));
    let error = open(empty, PASSPHRASE).expect_err("refused");
    assert!(error.to_string().contains("there is no repository in"), "{error}");
}

#[test]
fn an_index_that_is_gone_or_garbage_is_made_again() {
    let mut lab = Lab::new();
    lab.make_disk(4 * 1024 * 1024);
    let first = lab.back_up(None, None).expect("backs up");
    let cache = lab.folder.path().join("cache").join(lab.repository.id().to_string()).join("index");
    let sound = std::fs::read(&cache).expect("there is one");
    for content in [vec![], b"garbage".to_vec(), sound[..sound.len() / 2].to_vec()] {
        std::fs::write(&cache, content).expect("writes");
        let (_, again) = lab.back_up(None, None).expect("backs up");
        assert_eq!(again.how.new, 0);
    }
    // Segments, too: the packs themselves tell what is in them.
    std::fs::remove_file(&cache).expect("removes");
    std::fs::remove_dir_all(lab.folder.path().join("repository/segments")).expect("removes");
    let (_, again) = lab.back_up(None, None).expect("backs up");
    assert_eq!(again.how.new, 0);
    assert!(lab.restore(first.0).expect("restores") == lab.content());
}

#[test]
fn a_damaged_chunk_that_did_not_change_is_read_and_stored_again() {
    let mut lab = Lab::new();
    lab.make_disk(8 * 1024 * 1024);
    let nothing = || ChunkSet::none(8 * 1024 * 1024, CHUNK);
    let first = lab.back_up(None, None).expect("backs up");
    let packs = |lab: &Lab| {
        let listed = std::process::Command::new("find")
            .arg(lab.folder.path().join("repository/packs"))
            .args(["-type", "f"])
            .output()
            .expect("find runs");
        let listed = String::from_utf8(listed.stdout).expect("text");
        let mut packs: Vec<PathBuf> = listed.lines().map(PathBuf::from).collect();
        packs.sort_by_key(|pack| pack.metadata().expect("it is there").len());
        packs
    };
    // The largest holds chunks.
    let largest = packs(&lab).pop().expect("there are some");
    let mut bytes = std::fs::read(&largest).expect("reads");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&largest, bytes).expect("writes");
    let log = lab.repository.log().expect("opens");
    let reader =
        BlobReader::new(&lab.repository, log.state(), lab.repository.index(log.state()).expect("opens"));
    let chunk_size = lab.repository.chunk_size();
    let content = Content { tree: first.1.tree(chunk_size), chunk_size, size: first.1.size };
    let check = || check_disk(&reader, content, 2, &Progress::default()).expect("reads");
    let lost = check().chunks;
    assert_eq!(lost.len(), 1);
    lab.repository.report_damaged(&lost, WallTime(5)).expect("reports");

    let second = lab.back_up(Some(&first), Some(nothing())).expect("backs up");
    assert_eq!((second.1.how.full_because.clone(), second.1.how.new > 0), (None, true));
    assert!(lab.restore(first.0).expect("the old point is whole again") == lab.content());
    let third = lab.back_up(Some(&second), Some(nothing())).expect("backs up");
    assert_eq!(third.1.how.new, 0, "it is settled");

    // Those that are smaller than a chunk hold the tree: nobody knows what was in it, so all is read.
    let small = |pack: &PathBuf| pack.metadata().expect("it is there").len() < CHUNK;
    packs(&lab).into_iter().filter(small).for_each(|pack| std::fs::remove_file(pack).expect("removes"));
    let (_, disk) = lab.back_up(Some(&third), Some(nothing())).expect("backs up");
    assert!(
        disk.how.full_because.as_deref().is_some_and(|why| why.contains("cannot be read")),
        "{:?}",
        disk.how
    );
}

#[test]
fn a_log_that_was_never_begun_is_begun_and_one_that_was_lost_is_not() {
    let mut lab = Lab::new();
    let log = lab.folder.path().join("repository/log");
    std::fs::remove_dir_all(&log).expect("removes");
    lab.make_disk(1024 * 1024);
    let (root, _) = lab.back_up(None, None).expect("whoever made it was killed before it had a log");
    assert!(lab.restore(root).expect("restores") == lab.content());
    std::fs::remove_dir_all(&log).expect("removes");
    lab.repository.log().expect_err("its packs are of a log that was lost");
}

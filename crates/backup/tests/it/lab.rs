//! A repository, and a disk that changes.

use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use rempart_backup::{
    BackupError, Changes, ChunkSet, Content, DiskJob, FileSource, FileTarget, Pace, Progress, back_up_disk,
    restore_disk,
};
use rempart_objects::{Directory, Objects};
use rempart_repository::{
    BackupWriter, BlobReader, ChunkSize, Consistency, ConsistencyLevel, Excluded, NewRepository,
    PassphraseCost, Point, PointDisk, Repository, RepositoryId, Unlock,
};
use rempart_types::WallTime;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub const CHUNK: u64 = 64 << 10;
pub const PASSPHRASE: Unlock<'static> = Unlock::Passphrase("correct horse");
pub const PACE: Pace = Pace { threads: 3, audit: 16 };

/// A repository and a disk.
pub struct Lab {
    pub folder: tempfile::TempDir,
    pub repository: Arc<Repository>,
    pub random: SmallRng,
}

impl Lab {
    /// In a directory.
    pub fn new() -> Lab {
        let folder = tempfile::tempdir().expect("a folder");
        let place = Directory::create(&folder.path().join("repository")).expect("creates");
        Lab::on(folder, Arc::new(place))
    }

    pub fn on(folder: tempfile::TempDir, place: Arc<dyn Objects>) -> Lab {
        Lab::keeping(folder, place, None)
    }

    pub fn keeping(folder: tempfile::TempDir, place: Arc<dyn Objects>, kept: Option<Duration>) -> Lab {
        let new = NewRepository {
            id: RepositoryId::random(),
            chunk_size: ChunkSize::new(CHUNK as u32).expect("a size"),
            unlock: PASSPHRASE,
            cost: PassphraseCost { memory_kib: 64, passes: 1, lanes: 1 },
            label: "test",
            kept,
            now: WallTime(1),
        };
        let cache = folder.path().join("cache");
        let repository = Repository::create(place, &cache, new).expect("creates");
        Lab { folder, repository: Arc::new(repository), random: SmallRng::seed_from_u64(1) }
    }

    pub fn disk(&self) -> PathBuf {
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
    pub fn change(&mut self, writes: usize) -> ChunkSet {
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
        self.back_up_without(before, changed, &[])
    }

    /// A backup that leaves something out.
    pub fn back_up_without(
        &self,
        before: Option<&(u64, PointDisk)>,
        changed: Option<ChunkSet>,
        left_out: &[Excluded],
    ) -> Result<(u64, PointDisk), BackupError> {
        let source = FileSource::open(&self.disk())?;
        let writer = BackupWriter::open(self.repository.clone())?;
        let changes = match (before, changed) {
            (Some((_, before)), Some(changed)) => Changes::Known { before, changed },
            _ => Changes::Unknown("the test wants it".to_owned()),
        };
        let base = matches!(changes, Changes::Known { .. }).then(|| before.expect("it is known").0);
        let job = DiskJob { name: "vda", source: &source, changes, position: None, left_out };
        let disk = back_up_disk(&writer, self.repository.chunk_size(), &job, PACE, &Progress::default())?;
        let point = self.point(vec![disk.clone()]);
        let chain = self.repository.chain("shop");
        let written = writer.commit(chain, base, &point, None)?;
        Ok((written.root, disk))
    }

    /// What a backup of these disks says of itself.
    pub fn point(&self, disks: Vec<PointDisk>) -> Point {
        Point {
            vm: "shop".to_owned(),
            host: "node-a".to_owned(),
            taken: WallTime(2),
            ended: WallTime(3),
            consistency: Consistency { level: ConsistencyLevel::Stopped, why: None, pause_ms: None },
            disks,
            definition: None,
            nvram: None,
            notes: Vec::new(),
            files: None,
            memory: None,
        }
    }

    /// As somebody who comes with nothing but the passphrase.
    pub fn restore(&self, root: u64) -> Result<Vec<u8>, BackupError> {
        let cache = tempfile::tempdir().expect("a folder");
        let repository = Repository::open(self.repository.objects().clone(), cache.path(), PASSPHRASE)?;
        let log = repository.log()?;
        let point = repository.point(&log, root)?;
        let disk = point.disk("vda").expect("it has one");
        let reader = BlobReader::new(&repository, log.state(), repository.index(log.state())?);
        let chunk_size = repository.chunk_size();
        let content = Content::of(disk, chunk_size);
        let path = cache.path().join("restored");
        let target = FileTarget::create(&path, disk.size)?;
        restore_disk(&reader, content, &target, 2, &Progress::default())?;
        Ok(std::fs::read(&path).expect("reads"))
    }

    pub fn content(&self) -> Vec<u8> {
        std::fs::read(self.disk()).expect("reads")
    }
}

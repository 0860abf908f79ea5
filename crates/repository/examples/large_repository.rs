//! Makes a repository that looks as if disks of many TiB had been backed up into it: the index, the log and the trees of
//! that size, without the chunks. For measuring what a program takes to work with it.
//!
//! ```text
//! cargo run --release -p rempart-repository --example large_repository -- DIRECTORY PASSPHRASE_FILE TIB POINTS
//! ```

use rempart_objects::{Directory, Objects};
use rempart_repository::log::{Commit, LogError, Numbers, Segment, Session};
use rempart_repository::{
    BackupWriter, Blob, BlobKind, BoxPurpose, ChunkId, ChunkSize, Codec, Consistency, ConsistencyLevel,
    HowRead, NewRepository, PackId, PassphraseCost, Point, PointDisk, Repository, RepositoryId,
    SegmentBuilder, SessionId, Tree, TreeUpdate, Unlock,
};
use rempart_types::WallTime;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

const CHUNK_SIZE: ChunkSize = ChunkSize::DEFAULT;
/// Chunks of a full pack, none of which could be compressed.
const PACK_CHUNKS: u64 = 127;
/// One pack of so many has chunks that no backup reaches: a collection has something to remove.
const UNREACHED: u64 = 32;
const TAG: u32 = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, passphrase_file, tib, points] = &arguments[..] else {
        return Err("usage: large_repository DIRECTORY PASSPHRASE_FILE TIB POINTS".into());
    };
    let passphrase = std::fs::read_to_string(passphrase_file)?;
    let (size, points) = (tib.parse::<u64>()? << 40, points.parse::<u64>()?);
    let objects: Arc<dyn Objects> = Arc::new(Directory::create(Path::new(directory))?);
    // The program makes an index of its own: this one goes.
    let cache = Path::new(directory).with_extension("cache-of-maker");
    let now = now();
    let new = NewRepository {
        id: RepositoryId::random(),
        chunk_size: CHUNK_SIZE,
        unlock: Unlock::Passphrase(passphrase.lines().next().unwrap_or_default()),
        cost: PassphraseCost::DEFAULT,
        label: "large",
        kept: None,
        now,
    };
    let repository = Arc::new(Repository::create(objects, &cache, new)?);
    let chunks = CHUNK_SIZE.count(size);
    let packs = put_segments(&repository, chunks, now)?;
    commit(&repository, size, points, now)?;
    std::fs::remove_dir_all(&cache)?;
    println!("{chunks} chunks in {packs} packs");
    Ok(())
}

/// The id of a disk's chunk.
fn chunk(index: u64) -> ChunkId {
    ChunkId(*blake3::hash(&index.to_le_bytes()).as_bytes())
}

/// Tells the log and the index of packs that nobody wrote.
fn put_segments(repository: &Repository, chunks: u64, now: WallTime) -> Result<u64, Box<dyn Error>> {
    let mut session = Session::open(repository.log()?, repository.signer(), SessionId::random(), now)?;
    let mut builder = SegmentBuilder::new();
    let mut packs = 0;
    let mut next = 0;
    while next < chunks {
        packs += 1;
        let is_unreached = packs % UNREACHED == 0;
        let here = PACK_CHUNKS.min(chunks - next);
        // Chunks that the disk does not have, where nobody shall reach it.
        let first = if is_unreached { chunks + next } else { next };
        let blobs: Vec<Blob> = (0..here).map(|place| blob(chunk(first + place), place as u32)).collect();
        if !builder.has_room(blobs.len()) {
            publish(repository, &mut session, std::mem::take(&mut builder), now)?;
        }
        builder.add(PackId(*blake3::hash(&[b"pack", &packs.to_le_bytes()[..]].concat()).as_bytes()), &blobs);
        if !is_unreached {
            next += here;
        }
    }
    publish(repository, &mut session, builder, now)?;
    session.end(now)?;
    Ok(packs)
}

fn blob(id: ChunkId, ordinal: u32) -> Blob {
    let plain_len = CHUNK_SIZE.bytes();
    let stored_len = plain_len + TAG;
    let (kind, codec) = (BlobKind::Data, Codec::Plain);
    Blob { id, kind, codec, ordinal, offset: 4096 + ordinal * stored_len, stored_len, plain_len }
}

fn publish(
    repository: &Repository,
    session: &mut Session,
    builder: SegmentBuilder,
    now: WallTime,
) -> Result<(), Box<dyn Error>> {
    let sealed = builder.seal(repository.writer());
    let name = sealed.name(session.id());
    repository.objects().create(&name.object(), &[sealed.bytes()], None)?;
    session.segment(now, Segment { packs: sealed.packs().to_vec(), indexes: vec![name.segment] })?;
    Ok(())
}

/// Points of one machine, whose disk is all those chunks. Each but the first requires one pack that the one before does not.
fn commit(repository: &Arc<Repository>, size: u64, points: u64, now: WallTime) -> Result<(), Box<dyn Error>> {
    let writer = BackupWriter::open(repository.clone())?;
    let chunks = CHUNK_SIZE.count(size);
    let tree = {
        let mut blobs = writer.blobs();
        let mut update = TreeUpdate::new(writer.domain(), writer.reader(), Tree::zero(chunks))?;
        (0..chunks).try_for_each(|index| update.set(index, chunk(index), &mut blobs))?;
        let tree = update.finish(&mut blobs)?;
        blobs.finish()?;
        tree
    };
    // The packs that it requires, each told by one of its chunks.
    for first in (0..chunks).step_by(PACK_CHUNKS as usize) {
        assert!(writer.take_over(&chunk(first))?, "every chunk of the disk is in a pack");
    }
    let how =
        HowRead { full_because: Some("first".to_owned()), read: size, new: size, audited: 0, missed: 0 };
    let disk = PointDisk {
        name: "disk0".to_owned(),
        size,
        root: tree.root,
        position: None,
        how,
        excluded: Vec::new(),
    };
    let point = Point {
        vm: "large".to_owned(),
        host: "nowhere".to_owned(),
        taken: now,
        ended: now,
        consistency: Consistency { level: ConsistencyLevel::Stopped, why: None, pause_ms: None },
        disks: vec![disk],
        definition: None,
        nvram: None,
        notes: Vec::new(),
        files: None,
        memory: None,
    };
    let chain = repository.chain("large");
    let mut base = writer.commit(chain, None, &point, None)?.root;
    let payload = repository.writer().seal(BoxPurpose::Commit, &chain.0, &point.encode());
    let mut session = Session::open(repository.log()?, repository.signer(), SessionId::random(), now)?;
    for number in 1..points {
        let own = PackId(*blake3::hash(&[b"own ", &number.to_le_bytes()[..]].concat()).as_bytes());
        let commit = Commit {
            chain,
            parent: Some(base),
            segment: Segment { packs: vec![own], indexes: Vec::new() },
            base: Some(base),
            packs: Numbers::new(),
            retain_until: None,
            payload: payload.clone(),
        };
        base = session.commit::<LogError>(now, |_| Ok(commit.clone()))?.number;
    }
    session.end(now)?;
    Ok(())
}

fn now() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(since.as_millis() as u64)
}

//! One disk's way into the repository.

use crate::pipeline::{ChunkSink, PipelineError, Progress, store_chunks};
use crate::{BackupError, ChunkSet, Source, leave_out};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rempart_repository::{
    BackupWriter, BlobReader, BlobWriter, ChunkId, ChunkSize, Error, Excluded, HowRead, NodeSink, NodeSource,
    PointDisk, Step, Tree, TreeUpdate, Walk, is_zero, resize,
};
use std::collections::HashMap;
use std::ops::Range;

/// A disk that is to be backed up.
#[derive(Debug)]
pub struct DiskJob<'a> {
    /// What tells it from the machine's other disks.
    pub name: &'a str,
    pub source: &'a dyn Source,
    pub changes: Changes<'a>,
    /// What the source calls this instant.
    pub position: Option<String>,
    /// Whole chunks that are not read, and are restored as zeroes.
    pub left_out: &'a [Excluded],
}

/// What is known of the time since the backup before.
#[derive(Debug)]
pub enum Changes<'a> {
    /// Everything is read, because.
    Unknown(String),
    /// All else is as in the backup before.
    Known { before: &'a PointDisk, changed: ChunkSet },
}

/// How it is done.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Threads that read, compress and encrypt.
    pub threads: usize,
    /// Chunks that had not changed, by what is known, to be read and compared all the same.
    pub audit: usize,
}

impl Default for Pace {
    fn default() -> Pace {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        Pace { threads: threads.min(8), audit: 64 }
    }
}

impl ChunkSink for BlobWriter<'_> {
    type Error = Error;

    fn put(&mut self, chunk: &[u8]) -> Result<ChunkId, Error> {
        self.chunk(chunk)
    }
}

/// Stores what is new of a disk. Where the backup before cannot be read any more, all of it is read.
pub fn back_up_disk(
    writer: &BackupWriter,
    chunk_size: ChunkSize,
    job: &DiskJob<'_>,
    pace: Pace,
    progress: &Progress,
) -> Result<PointDisk, BackupError> {
    match store_disk(writer, chunk_size, job, &job.changes, pace, progress) {
        Err(BackupError::Repository(error))
            if matches!(job.changes, Changes::Known { .. }) && error.is_loss() =>
        {
            let why = format!("the backup before cannot be read: {error}");
            writer.store_nodes_anew();
            store_disk(writer, chunk_size, job, &Changes::Unknown(why), pace, progress)
        }
        ended => ended,
    }
}

fn store_disk(
    writer: &BackupWriter,
    chunk_size: ChunkSize,
    job: &DiskJob<'_>,
    changes: &Changes<'_>,
    pace: Pace,
    progress: &Progress,
) -> Result<PointDisk, BackupError> {
    let chunk_len = u64::from(chunk_size.bytes());
    let size = job.source.size();
    let chunks = chunk_size.count(size);
    let left_out = leave_out::chunks(job.left_out, size, chunk_len);
    let mut data = job.source.data(chunk_len)?;
    data.subtract(&left_out);
    let new_before = writer.new_bytes();
    let mut how = HowRead { full_because: None, read: 0, new: 0, audited: 0, missed: 0 };
    let mut nodes = writer.blobs();
    let mut tree = Tree::zero(chunks);
    let mut resized_nodes = Remembered { nodes: HashMap::new(), reader: writer.reader() };
    let mut wanted = data.clone();
    let mut zeroed = ChunkSet::none(size, chunk_len);
    match changes {
        Changes::Unknown(why) => how.full_because = Some(why.clone()),
        Changes::Known { before, changed } => {
            let mut changed = changed.clone();
            if before.size != size {
                // The last chunk of the smaller of both has another length now.
                changed.insert_bytes(before.size.min(size).saturating_sub(1)..before.size.min(size));
                changed.insert_bytes(before.size..size);
            }
            // What was left out and is not any more is read, whatever is said of changes; what is left out from now on
            // becomes zeroes.
            let left_out_before = leave_out::chunks(&before.excluded, size, chunk_len);
            for (one, other) in [(&left_out_before, &left_out), (&left_out, &left_out_before)] {
                let mut only = one.clone();
                only.subtract(other);
                changed.unite(&only);
            }
            let old = before.tree(chunk_size);
            let mut sink = Remembering { remembered: HashMap::new(), sink: &mut nodes };
            let resized = resize(writer.domain(), writer.reader(), &mut sink, old, chunks)?;
            resized_nodes.nodes = sink.remembered;
            if !writer.damaged().is_empty() {
                // What they held may still be on the disk.
                for step in Walk::new(&resized_nodes, resized)? {
                    match step? {
                        Step::Chunk { index, id } if writer.damaged().contains(&id) => {
                            changed.insert_chunks(index..index + 1);
                        }
                        _ => {}
                    }
                }
            }
            let audit = Audit { writer, source: job.source, chunk_len, tree: resized, nodes: &resized_nodes };
            let mut not_audited = changed.clone();
            not_audited.unite(&left_out);
            audit.read(&not_audited, pace.audit, &mut how)?;
            if how.missed == 0 {
                tree = resized;
                wanted.intersect(&changed);
                zeroed = changed;
                zeroed.subtract(&data);
            } else {
                how.full_because = Some(format!(
                    "{} of {} chunks that had not changed, by what the source said, were other than before",
                    how.missed, how.audited
                ));
            }
        }
    }
    progress.skip(size.saturating_sub(wanted.bytes()));
    // Of a large disk each of these takes as much memory as a pack.
    drop((data, left_out));
    let mut update = TreeUpdate::new(writer.domain(), &resized_nodes, tree)?;
    let mut next_zeroed = 0;
    let mut zero_until = |update: &mut TreeUpdate<'_>, nodes: &mut BlobWriter<'_>, end: u64| {
        while let Some(run) = zeroed.next_run(next_zeroed, 1).filter(|run| run.start < end) {
            update.set(run.start, ChunkId::ZERO, nodes)?;
            next_zeroed = run.end;
        }
        Ok::<_, Error>(())
    };
    let mut sinks = writer.sinks(pace.threads);
    let stored = store_chunks(job.source, chunk_size, &wanted, &mut sinks, progress, |chunk, id| {
        zero_until(&mut update, &mut nodes, chunk)?;
        update.set(chunk, id, &mut nodes)
    });
    stored.map_err(|error| match error {
        PipelineError::Source(error) => BackupError::Source(error),
        PipelineError::Sink(error) => BackupError::Repository(error),
        PipelineError::Stopped => BackupError::Stopped,
    })?;
    zero_until(&mut update, &mut nodes, chunks)?;
    let tree = update.finish(&mut nodes)?;
    sinks.into_iter().chain([nodes]).try_for_each(BlobWriter::finish)?;
    how.read += wanted.bytes();
    how.new = writer.new_bytes() - new_before;
    Ok(PointDisk {
        name: job.name.to_owned(),
        size,
        root: tree.root,
        position: job.position.clone(),
        how,
        excluded: job.left_out.to_vec(),
    })
}

/// Nodes that were put a moment ago, and are in no pack that can be read yet.
struct Remembered<'a> {
    nodes: HashMap<ChunkId, Vec<u8>>,
    reader: &'a BlobReader,
}

impl NodeSource for Remembered<'_> {
    fn node(&self, id: &ChunkId) -> Result<Vec<u8>, Error> {
        self.nodes.get(id).map_or_else(|| self.reader.node(id), |node| Ok(node.clone()))
    }
}

/// Puts nodes and remembers them: those along the end of a disk, a few.
struct Remembering<'a, 'w> {
    remembered: HashMap<ChunkId, Vec<u8>>,
    sink: &'a mut BlobWriter<'w>,
}

impl NodeSink for Remembering<'_, '_> {
    fn node(&mut self, id: ChunkId, encoded: &[u8]) -> Result<(), Error> {
        self.remembered.insert(id, encoded.to_vec());
        self.sink.node(id, encoded)
    }
}

/// Some places of so many, or all if they are no more, in ascending order: each is as likely as any other.
pub(crate) fn draw(places: u64, wanted: usize) -> Vec<u64> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).expect("the system has random numbers");
    let mut random = SmallRng::seed_from_u64(u64::from_le_bytes(seed));
    let places = usize::try_from(places).unwrap_or(usize::MAX);
    let drawn = rand::seq::index::sample(&mut random, places, wanted.min(places));
    let mut drawn: Vec<u64> = drawn.into_iter().map(|place| place as u64).collect();
    drawn.sort_unstable();
    drawn
}

/// Reads a few chunks that are said not to have changed, and counts those that have.
struct Audit<'a> {
    writer: &'a BackupWriter,
    source: &'a dyn Source,
    chunk_len: u64,
    /// As it was before.
    tree: Tree,
    nodes: &'a dyn NodeSource,
}

impl Audit<'_> {
    /// Chunks in `not_these` are not among them.
    fn read(&self, not_these: &ChunkSet, chunks: usize, how: &mut HowRead) -> Result<(), BackupError> {
        let unchanged = not_these.chunks() - not_these.count();
        if unchanged == 0 || chunks == 0 {
            return Ok(());
        }
        let drawn = draw(unchanged, chunks);
        // Chunks before which all of `not_these` were counted.
        let (mut passed, mut next) = (0, 0);
        // The chunk that has so many unchanged ones before it.
        let nth = |place: u64| -> u64 {
            while let Some(run) =
                not_these.next_run(next, not_these.chunks()).filter(|run| run.start <= place + passed)
            {
                passed += run.end - run.start;
                next = run.end;
            }
            place + passed
        };
        let chunks: Vec<u64> = drawn.into_iter().map(nth).collect();
        let bytes_of = |chunk: &u64| {
            let start = chunk * self.chunk_len;
            start..(start + self.chunk_len).min(self.source.size())
        };
        let mut reader = self.source.reader()?;
        reader.ahead(&chunks.iter().map(bytes_of).collect::<Vec<_>>())?;
        let mut buffer = Vec::new();
        for chunk in chunks {
            let Range { start, end } = bytes_of(&chunk);
            let len = end - start;
            buffer.resize(len as usize, 0);
            reader.read(start, &mut buffer)?;
            let now = if is_zero(&buffer) { ChunkId::ZERO } else { self.writer.domain().chunk_id(&buffer) };
            how.audited += 1;
            how.read += len;
            how.missed += u64::from(now != self.before(chunk)?);
        }
        Ok(())
    }

    fn before(&self, chunk: u64) -> Result<ChunkId, Error> {
        for step in Walk::range(self.nodes, self.tree, chunk..chunk + 1)? {
            if let Step::Chunk { id, .. } = step? {
                return Ok(id);
            }
        }
        Ok(ChunkId::ZERO)
    }
}

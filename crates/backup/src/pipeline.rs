//! Reading a disk and storing its chunks, on several threads, in order where it matters.

use crate::{ChunkSet, Reader, Source, SourceError};
use rempart_repository::{ChunkId, ChunkSize, is_zero};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};

/// Bytes that a thread reads and stores at a time: what lies together on the disk then lies together in a pack, and is
/// read back at once.
const RUN: u64 = 4 << 20;
/// Batches that may be finished while an earlier one is not.
const AHEAD: usize = 64;

/// Stores chunks, on one thread.
pub trait ChunkSink: Send {
    type Error: Send;

    /// Stores a chunk that is not all zeroes, if it is not stored yet.
    fn put(&mut self, chunk: &[u8]) -> Result<ChunkId, Self::Error>;
}

/// How far it is.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    skipped: AtomicU64,
    /// Set by somebody who does not want it any more.
    stop: std::sync::atomic::AtomicBool,
}

impl Progress {
    /// Bytes of disks that were read, or restored, so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Bytes of disks that turned out to need neither: holes, and what did not change.
    pub fn skipped(&self) -> u64 {
        self.skipped.load(Ordering::Relaxed)
    }

    pub(crate) fn skip(&self, bytes: u64) {
        self.skipped.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Ends it with [`PipelineError::Stopped`], soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Why not everything was stored.
#[derive(Debug, PartialEq, Eq)]
pub enum PipelineError<S, E> {
    Source(S),
    Sink(E),
    Stopped,
}

/// Reads the chunks `wanted` of a disk and stores them in `sinks`, each on a thread of its own. `each` is told them in
/// rising order, on the calling thread.
///
/// # Errors
/// The first one; nothing is left out in silence.
pub fn store_chunks<S: ChunkSink>(
    source: &dyn Source,
    chunk_size: ChunkSize,
    wanted: &ChunkSet,
    sinks: &mut [S],
    progress: &Progress,
    mut each: impl FnMut(u64, ChunkId) -> Result<(), S::Error>,
) -> Result<(), PipelineError<SourceError, S::Error>> {
    let shared = Shared { state: Mutex::new(State::default()), changed: Condvar::new() };
    std::thread::scope(|scope| {
        for sink in sinks {
            let shared = &shared;
            scope.spawn(move || {
                let worker = Worker { source, chunk_size, wanted, shared, progress };
                // A panic here must not leave the others waiting for its run.
                let _on_panic = EndOnDrop(shared);
                let ended = worker.work(sink);
                shared.end(ended.err());
            });
        }
        let told = shared.tell(wanted, &mut each);
        shared.end(told.err().map(PipelineError::Sink));
    });
    let state = shared.state.into_inner().expect("a panic of a thread goes on here");
    match state.failed {
        Some(error) => Err(error),
        None => {
            assert_eq!(wanted.next_run(state.told, 1), None, "every chunk was stored or an error is told");
            Ok(())
        }
    }
}

struct Shared<E> {
    state: Mutex<State<E>>,
    changed: Condvar,
}

struct State<E> {
    /// The next chunk to be handed out.
    next: u64,
    /// Chunks below it were told.
    told: u64,
    /// Batches that were handed out and not told, by their first chunk.
    batches: BTreeMap<u64, Option<Stored>>,
    /// Nobody goes on.
    over: bool,
    failed: Option<PipelineError<SourceError, E>>,
}

/// Runs of chunks, [`RUN`] bytes at most.
type Batch = Vec<Range<u64>>;

/// What is in a batch.
struct Stored {
    runs: Batch,
    ids: Vec<ChunkId>,
}

impl<E> Default for State<E> {
    fn default() -> State<E> {
        State { next: 0, told: 0, batches: BTreeMap::new(), over: false, failed: None }
    }
}

impl<E> Shared<E> {
    fn state(&self) -> MutexGuard<'_, State<E>> {
        self.state.lock().expect("no holder panics")
    }

    /// What to read next: `most` chunks or fewer. `None` when there is nothing; or not yet, unless it is `waited` for.
    fn next_batch(&self, wanted: &ChunkSet, most: u64, waited: bool) -> Option<Batch> {
        let mut state = self.state();
        loop {
            if state.over {
                return None;
            }
            wanted.next_run(state.next, 1)?;
            if state.batches.len() < AHEAD {
                break;
            }
            if !waited {
                return None;
            }
            state = self.changed.wait(state).expect("no holder panics");
        }
        let (mut batch, mut left) = (Vec::new(), most);
        while left > 0
            && let Some(run) = wanted.next_run(state.next, left)
        {
            left -= run.end - run.start;
            state.next = run.end;
            batch.push(run);
        }
        state.batches.insert(batch[0].start, None);
        Some(batch)
    }

    fn stored(&self, runs: Batch, ids: Vec<ChunkId>) {
        let chunks: u64 = runs.iter().map(|run| run.end - run.start).sum();
        assert_eq!(ids.len() as u64, chunks, "an id for each chunk");
        let mut state = self.state();
        let place = state.batches.get_mut(&runs[0].start).expect("it was handed out");
        assert!(place.replace(Stored { runs, ids }).is_none(), "a batch is stored once");
        self.changed.notify_all();
    }

    /// Tells all runs in order; returns when there are no more, or when it is over.
    fn tell(&self, wanted: &ChunkSet, each: &mut impl FnMut(u64, ChunkId) -> Result<(), E>) -> Result<(), E> {
        let mut state = self.state();
        loop {
            if state.over {
                return Ok(());
            }
            if state.batches.is_empty() && wanted.next_run(state.next, 1).is_none() {
                return Ok(());
            }
            match state.batches.first_entry().filter(|first| first.get().is_some()) {
                Some(first) => {
                    let Stored { runs, ids } = first.remove().expect("it was looked at");
                    self.changed.notify_all();
                    drop(state);
                    let told = runs.last().expect("a batch is not empty").end;
                    runs.into_iter().flatten().zip(ids).try_for_each(|(chunk, id)| each(chunk, id))?;
                    state = self.state();
                    state.told = told;
                }
                None => state = self.changed.wait(state).expect("no holder panics"),
            }
        }
    }

    /// With an error, everybody stops.
    fn end(&self, error: Option<PipelineError<SourceError, E>>) {
        if let Some(error) = error {
            let mut state = self.state();
            state.over = true;
            state.failed.get_or_insert(error);
            self.changed.notify_all();
        }
    }
}

struct EndOnDrop<'a, E>(&'a Shared<E>);

impl<E> Drop for EndOnDrop<'_, E> {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Ok(mut state) = self.0.state.lock()
        {
            state.over = true;
            self.0.changed.notify_all();
        }
    }
}

struct Worker<'a, E> {
    source: &'a dyn Source,
    chunk_size: ChunkSize,
    wanted: &'a ChunkSet,
    shared: &'a Shared<E>,
    progress: &'a Progress,
}

impl<E> Worker<'_, E> {
    fn work<S: ChunkSink<Error = E>>(&self, sink: &mut S) -> Result<(), PipelineError<SourceError, E>> {
        let mut reader = self.source.reader().map_err(PipelineError::Source)?;
        let piece = reader.piece().min(RUN).next_multiple_of(self.chunk_len());
        let mut buffer = vec![0; piece.min(self.source.size().max(1)) as usize];
        let mut upcoming = None;
        loop {
            let batch = match upcoming.take() {
                Some(batch) => batch,
                None => match self.next_batch(&mut *reader, true)? {
                    Some(batch) => batch,
                    None => return Ok(()),
                },
            };
            // The source looks for it while this one is stored. Not waited for: others may wait for this one.
            upcoming = self.next_batch(&mut *reader, false)?;
            let mut ids = Vec::new();
            for run in &batch {
                if self.progress.is_stopped() {
                    return Err(PipelineError::Stopped);
                }
                self.store_run(run, &mut *reader, &mut buffer, sink, &mut ids)?;
            }
            self.shared.stored(batch, ids);
        }
    }

    fn next_batch(
        &self,
        reader: &mut dyn Reader,
        waited: bool,
    ) -> Result<Option<Batch>, PipelineError<SourceError, E>> {
        let batch = self.shared.next_batch(self.wanted, RUN / self.chunk_len(), waited);
        if let Some(batch) = &batch {
            let ranges: Vec<Range<u64>> = batch.iter().map(|run| self.bytes(run)).collect();
            reader.ahead(&ranges).map_err(PipelineError::Source)?;
        }
        Ok(batch)
    }

    fn chunk_len(&self) -> u64 {
        u64::from(self.chunk_size.bytes())
    }

    fn bytes(&self, run: &Range<u64>) -> Range<u64> {
        run.start * self.chunk_len()..(run.end * self.chunk_len()).min(self.source.size())
    }

    fn store_run<S: ChunkSink<Error = E>>(
        &self,
        run: &Range<u64>,
        reader: &mut dyn Reader,
        buffer: &mut [u8],
        sink: &mut S,
        ids: &mut Vec<ChunkId>,
    ) -> Result<(), PipelineError<SourceError, E>> {
        let bytes = self.bytes(run);
        let piece = buffer.len();
        for at in bytes.clone().step_by(piece) {
            let buffer = &mut buffer[..(bytes.end - at).min(piece as u64) as usize];
            reader.read(at, buffer).map_err(PipelineError::Source)?;
            for chunk in buffer.chunks(self.chunk_len() as usize) {
                let id = if is_zero(chunk) { Ok(ChunkId::ZERO) } else { sink.put(chunk) };
                ids.push(id.map_err(PipelineError::Sink)?);
            }
        }
        self.progress.add(bytes.end - bytes.start);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    use std::sync::atomic::AtomicBool;

    const CHUNK: u64 = 64 << 10;

    fn size() -> ChunkSize {
        ChunkSize::new(CHUNK as u32).expect("a size")
    }

    /// Chunk `n` begins with `n + 1`, every fifth is zeroes.
    #[derive(Debug)]
    struct Numbered {
        size: u64,
        unreadable: Option<u64>,
    }

    impl Source for Numbered {
        fn size(&self) -> u64 {
            self.size
        }

        fn reader(&self) -> Result<Box<dyn Reader + '_>, SourceError> {
            Ok(Box::new(self))
        }

        fn data(&self, chunk_len: u64) -> Result<ChunkSet, SourceError> {
            Ok(ChunkSet::all(self.size, chunk_len))
        }
    }

    impl Reader for &Numbered {
        fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
            for (chunk, content) in (offset / CHUNK..).zip(buffer.chunks_mut(CHUNK as usize)) {
                if self.unreadable == Some(chunk) {
                    let disk = "numbered".to_owned();
                    return Err(SourceError {
                        action: "read",
                        disk,
                        offset: Some(offset),
                        source: "bad".into(),
                    });
                }
                content.fill(0);
                if !chunk.is_multiple_of(5) {
                    content[..8].copy_from_slice(&(chunk + 1).to_le_bytes());
                }
            }
            Ok(())
        }
    }

    fn id(chunk: u64) -> ChunkId {
        let mut id = ChunkId::ZERO;
        if !chunk.is_multiple_of(5) {
            id.0[..8].copy_from_slice(&(chunk + 1).to_le_bytes());
        }
        id
    }

    /// Takes its time, at random, so that runs end in any order.
    struct Slow {
        random: SmallRng,
        failing: Option<u64>,
    }

    impl ChunkSink for Slow {
        type Error = &'static str;

        fn put(&mut self, chunk: &[u8]) -> Result<ChunkId, &'static str> {
            if self.random.random_ratio(1, 20) {
                std::thread::yield_now();
            }
            let number = u64::from_le_bytes(chunk[..8].try_into().expect("8 bytes"));
            if self.failing == Some(number - 1) {
                return Err("no room");
            }
            Ok(id(number - 1))
        }
    }

    fn sinks(failing: Option<u64>) -> Vec<Slow> {
        (0..4).map(|seed| Slow { random: SmallRng::seed_from_u64(seed), failing }).collect()
    }

    type Outcome = Result<(), PipelineError<SourceError, &'static str>>;

    fn run(source: &Numbered, wanted: &ChunkSet, failing: Option<u64>) -> (Vec<(u64, ChunkId)>, Outcome) {
        let mut told = Vec::new();
        let progress = Progress::default();
        let ended = store_chunks(source, size(), wanted, &mut sinks(failing), &progress, |chunk, id| {
            told.push((chunk, id));
            Ok(())
        });
        assert!(ended.is_err() || progress.done() == wanted.bytes());
        (told, ended)
    }

    #[test]
    fn every_wanted_chunk_is_told_once_and_in_order() {
        let source = Numbered { size: 20_000 * CHUNK + 100, unreadable: None };
        let mut wanted = ChunkSet::none(source.size, CHUNK);
        let mut random = SmallRng::seed_from_u64(7);
        for _ in 0..300 {
            let start = random.random_range(0..20_000);
            wanted.insert_chunks(start..(start + random.random_range(1..200)).min(20_001));
        }
        wanted.insert_chunks(20_000..20_001);
        let (told, ended) = run(&source, &wanted, None);
        assert!(ended.is_ok(), "{ended:?}");
        let expected: Vec<_> =
            (0..20_001).filter(|&chunk| wanted.contains(chunk)).map(|chunk| (chunk, id(chunk))).collect();
        assert!(told == expected);
        assert_eq!(run(&source, &ChunkSet::none(source.size, CHUNK), None).0, []);
        let empty = Numbered { size: 0, unreadable: None };
        assert_eq!(run(&empty, &ChunkSet::all(0, CHUNK), None).0, []);
    }

    #[test]
    fn an_error_ends_it_wherever_it_is() {
        let source = Numbered { size: 5000 * CHUNK, unreadable: Some(3333) };
        let all = ChunkSet::all(source.size, CHUNK);
        let (told, ended) = run(&source, &all, None);
        assert!(matches!(ended, Err(PipelineError::Source(_))), "{ended:?}");
        assert!(told.iter().all(|(chunk, _)| *chunk < 3333));
        let source = Numbered { unreadable: None, ..source };
        let (_, ended) = run(&source, &all, Some(1234));
        assert!(matches!(ended, Err(PipelineError::Sink("no room"))), "{ended:?}");
        let ended =
            store_chunks(&source, size(), &all, &mut sinks(None), &Progress::default(), |chunk, _| {
                if chunk == 77 { Err("told too much") } else { Ok(()) }
            });
        assert!(matches!(ended, Err(PipelineError::Sink("told too much"))), "{ended:?}");
    }

    #[test]
    fn it_can_be_stopped() {
        let source = Numbered { size: 5000 * CHUNK, unreadable: None };
        let progress = Progress::default();
        let all = ChunkSet::all(source.size, CHUNK);
        let ended = store_chunks(&source, size(), &all, &mut sinks(None), &progress, |chunk, _| {
            if chunk == 100 {
                progress.stop();
            }
            Ok(())
        });
        assert!(matches!(ended, Err(PipelineError::Stopped)), "{ended:?}");
    }

    #[test]
    fn a_panic_of_one_thread_leaves_nobody_waiting() {
        struct Panicking(AtomicBool);
        impl ChunkSink for Panicking {
            type Error = ();
            fn put(&mut self, _: &[u8]) -> Result<ChunkId, ()> {
                assert!(!self.0.load(Ordering::Relaxed), "on purpose");
                Ok(id(1))
            }
        }
        let source = Numbered { size: 5000 * CHUNK, unreadable: None };
        let all = ChunkSet::all(source.size, CHUNK);
        let ended = std::panic::catch_unwind(|| {
            let mut sinks = [Panicking(false.into()), Panicking(true.into())];
            let _ = store_chunks(&source, size(), &all, &mut sinks, &Progress::default(), |_, _| Ok(()));
        });
        assert!(ended.is_err());
    }
}

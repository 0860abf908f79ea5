//! How fast one core turns chunks into packs, and back: `cargo run --release -p rempart-repository --example pack_speed`.
//! Takes the file to cut into chunks as its argument, too; without one: noise, text, and half of each.

use rempart_repository::{
    BlobKind, ChunkSize, Compressor, Decompressor, KeyRing, MasterKey, PackBuilder, PackOpener, RepositoryId,
    SessionId, is_zero,
};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Content of one round.
const BYTES: usize = 256 << 20;
const ROUNDS: u32 = 5;
const PACK: u64 = 16 << 20;

fn main() {
    let chunk = ChunkSize::DEFAULT;
    let ring = KeyRing::new(RepositoryId::random(), MasterKey::random());
    let contents = match std::env::args().nth(1) {
        Some(path) => vec![("file", std::fs::read(path).expect("a file that can be read"))],
        None => vec![("noise", noise(BYTES)), ("text", text(BYTES)), ("half noise", half(BYTES))],
    };
    println!("chunks of {chunk}, packs of {} MiB, GB/s of content on one core, best of {ROUNDS}", PACK >> 20);
    for (name, content) in contents {
        let chunks: Vec<&[u8]> = content.chunks(chunk.bytes() as usize).collect();
        let domain = ring.writer().domain();
        let ids: Vec<_> = chunks.iter().map(|chunk| domain.chunk_id(chunk)).collect();
        let rate = |time: Duration| content.len() as f64 / time.as_secs_f64() / 1e9;

        let zero = best(|| assert!(chunks.iter().all(|chunk| !is_zero(black_box(chunk)))));
        let hash = best(|| {
            chunks.iter().for_each(|chunk| {
                black_box(domain.chunk_id(chunk));
            })
        });
        let mut compressor = Compressor::new();
        let mut packs = Vec::new();
        let mut buffer = rempart_buffer::BufferMut::default();
        let both = best(|| {
            packs.clear();
            let mut builder = PackBuilder::new(ring.writer(), PACK, std::mem::take(&mut buffer));
            for chunk in &chunks {
                if !builder.has_room(chunk.len()) {
                    let pack = builder.finish();
                    packs.push((pack.id(), pack.bytes().len()));
                    builder = PackBuilder::new(ring.writer(), PACK, pack.into_buffer());
                }
                builder.add(BlobKind::Data, domain.chunk_id(chunk), chunk, &mut compressor);
            }
            let pack = builder.finish();
            packs.push((pack.id(), pack.bytes().len()));
            buffer = pack.into_buffer();
        });
        let stored: usize = packs.iter().map(|(_, length)| length).sum();

        let mut builder = PackBuilder::new(ring.writer(), PACK, rempart_buffer::BufferMut::default());
        let fitting = chunks.iter().zip(&ids).take(60);
        let fitting: Vec<_> = fitting.collect();
        for (chunk, id) in &fitting {
            builder.add(BlobKind::Data, **id, chunk, &mut compressor);
        }
        let pack = builder.finish();
        let place = pack.name(SessionId::random());
        let opener = PackOpener::new(ring.opener(), place, pack.bytes()).expect("its own pack");
        let mut decompressor = Decompressor::new();
        let mut plain = vec![0; chunk.bytes() as usize];
        let read = best(|| {
            for blob in pack.blobs() {
                let stored = &pack.bytes()[blob.range().start as usize..blob.range().end as usize];
                let plain = &mut plain[..blob.plain_len as usize];
                opener.open_blob(blob, stored, plain, &mut decompressor).expect("whole");
            }
        });
        let part = fitting.iter().map(|(chunk, _)| chunk.len()).sum::<usize>() as f64 / content.len() as f64;
        println!(
            "{name}: stored {:.1} %; is it zero {:.1}, hash {:.2}, hash and pack {:.2}, open and check {:.2}",
            100.0 * stored as f64 / content.len() as f64,
            rate(zero),
            rate(hash),
            rate(both),
            rate(read) * part,
        );
        println!("  compress alone: {}", compression(&chunks, &mut compressor));
    }
}

/// What giving up costs: packing without the hash, against zstd on all of each chunk.
fn compression(chunks: &[&[u8]], compressor: &mut Compressor) -> String {
    let bytes: usize = chunks.iter().map(|chunk| chunk.len()).sum();
    let mut out = vec![0; 2 << 20];
    let ours = best(|| {
        chunks.iter().for_each(|chunk| {
            black_box(compressor.compress(chunk, &mut out));
        })
    });
    let mut context = zstd_safe::CCtx::create();
    context.set_parameter(zstd_safe::CParameter::CompressionLevel(1)).expect("a level");
    let theirs = best(|| {
        for chunk in chunks {
            black_box(context.compress2(&mut out[..], chunk).expect("room"));
        }
    });
    let rate = |time: Duration| bytes as f64 / time.as_secs_f64() / 1e9;
    let part = 100.0 * ours.as_secs_f64() / theirs.as_secs_f64();
    format!("{:.2} with giving up, {:.2} without: {part:.0} % of the time", rate(ours), rate(theirs))
}

fn best(mut work: impl FnMut()) -> Duration {
    let round = |_| {
        let begin = Instant::now();
        work();
        begin.elapsed()
    };
    (0..ROUNDS).map(round).min().expect("there are rounds")
}

fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// Words in an order that does not repeat.
fn text(length: usize) -> Vec<u8> {
    const WORDS: &[&str] = &[
        "journal", "replica", "the", "of", "disk", "epoch", "a", "lease", "is", "snapshot", "chunk", "and",
        "not", "before", "index", "written",
    ];
    let mut bytes = Vec::with_capacity(length + 16);
    for choice in noise(length / 2) {
        bytes.extend_from_slice(WORDS[usize::from(choice) % WORDS.len()].as_bytes());
        bytes.push(if choice > 240 { b'\n' } else { b' ' });
    }
    bytes.truncate(length);
    bytes
}

fn half(length: usize) -> Vec<u8> {
    let (noise, text) = (noise(length), text(length));
    let pieces = noise.chunks(64 << 10).zip(text.chunks(64 << 10)).enumerate();
    pieces.flat_map(|(number, (noise, text))| if number % 2 == 0 { noise } else { text }).copied().collect()
}

//! An index of 10 TiB in chunks of the default size: `cargo run --release -p rempart-repository --example index_size -- FOLDER`.
//! Says what making it, bringing it up to date, opening it and searching in it take, in time and in memory of its own.

use rempart_repository::{
    Blob, BlobKind, ChunkId, ChunkSize, Codec, Covers, Domain, Index, KeyRing, MAX_SEGMENT_ENTRIES,
    MasterKey, PACK_HEADER, PackId, RepositoryId, Segment, SegmentBuilder, SessionId,
};
use std::path::Path;
use std::time::Instant;

const BLOBS_OF_A_PACK: u64 = 64;

fn main() {
    let folder = std::env::args().nth(1).expect("the folder to work in");
    let tebibytes: u64 = std::env::args().nth(2).map_or(10, |text| text.parse().expect("a number of TiB"));
    let path = Path::new(&folder).join("index");
    let ring = KeyRing::new(RepositoryId::random(), MasterKey::random());
    let chunks = (tebibytes << 40) / u64::from(ChunkSize::DEFAULT.bytes());
    println!("{tebibytes} TiB in chunks of {}: {chunks} entries", ChunkSize::DEFAULT);

    let begin = Instant::now();
    let mut update = Index::create(&path, ring.public().repository);
    let mut at = 0;
    while at < chunks {
        let end = chunks.min(at + MAX_SEGMENT_ENTRIES as u64);
        let (segment, numbers) = segment(&ring, at..end);
        update.add(&segment, &numbers).expect("added");
        at = end;
    }
    let index = update.finish(|_| true, Covers::default()).expect("made");
    report("made", begin, 1);

    // A day's change: 1 % new, some packs condemned.
    let begin = Instant::now();
    let mut update = index.update();
    let mut at = chunks;
    while at < chunks + chunks / 100 {
        let end = (chunks + chunks / 100).min(at + MAX_SEGMENT_ENTRIES as u64);
        let (segment, numbers) = segment(&ring, at..end);
        update.add(&segment, &numbers).expect("added");
        at = end;
    }
    let index = update.finish(|entry| entry.pack() % 1000 != 0, Covers::default()).expect("made");
    report("brought up to date", begin, 1);
    println!("  file: {} MiB", std::fs::metadata(&path).expect("it is there").len() >> 20);
    drop(index);

    let begin = Instant::now();
    let index = Index::open(&path, &ring.public().repository, |_| true).expect("whole").expect("of this log");
    report("opened", begin, 1);
    const SEARCHES: u64 = 200_000;
    let begin = Instant::now();
    let step = chunks / SEARCHES;
    let found =
        (0..SEARCHES).filter(|number| !index.find(&id(number * step)).expect("whole").is_empty()).count();
    report("searched for what is there", begin, SEARCHES);
    println!("  found {found} of {SEARCHES}: the others were in condemned packs");
    let begin = Instant::now();
    let wrong = (0..SEARCHES).filter(|number| index.may_hold(&id(u64::MAX - number))).count();
    report("asked for what is not", begin, SEARCHES);
    println!("  the filter erred in {:.2} %", 100.0 * wrong as f64 / SEARCHES as f64);
}

fn id(number: u64) -> ChunkId {
    ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes())
}

fn segment(ring: &KeyRing, numbers: std::ops::Range<u64>) -> (Segment, Vec<Option<u32>>) {
    let mut builder = SegmentBuilder::new();
    let first = numbers.start / BLOBS_OF_A_PACK;
    let mut packs = 0;
    for start in numbers.clone().step_by(BLOBS_OF_A_PACK as usize) {
        let blobs: Vec<_> = (start..numbers.end.min(start + BLOBS_OF_A_PACK)).map(blob).collect();
        let mut pack = [0; 32];
        pack[..8].copy_from_slice(&start.to_le_bytes());
        builder.add(PackId(pack), &blobs);
        packs += 1;
    }
    let sealed = builder.seal(ring.writer());
    let own = |_| Some::<Domain>(ring.writer().domain().clone());
    let name = sealed.name(SessionId([0; 16]));
    let segment = Segment::open(&ring.public().repository, own, &name, sealed.bytes()).expect("whole");
    (segment, (first..first + packs).map(|number| Some(number as u32)).collect())
}

fn blob(number: u64) -> Blob {
    let (ordinal, plain_len) = ((number % BLOBS_OF_A_PACK) as u32, ChunkSize::DEFAULT.bytes());
    let stored_len = plain_len + 16;
    let offset = PACK_HEADER as u32 + ordinal * stored_len;
    Blob { id: id(number), kind: BlobKind::Data, codec: Codec::Plain, ordinal, offset, stored_len, plain_len }
}

fn report(what: &str, begin: Instant, times: u64) {
    let each = begin.elapsed().as_secs_f64() / times as f64;
    let time = if times == 1 { format!("{each:.1} s") } else { format!("{:.2} µs each", each * 1e6) };
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field of it");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
    };
    println!(
        "{what}: {time}; anonymous memory now {} MiB, whole peak {} MiB",
        field("RssAnon:"),
        field("VmHWM:")
    );
}

//! Entry points for fuzzers and the replay of their corpora: any bytes, no panic, bounded memory, and what is accepted holds
//! together.
//!
//! Hashes, seals and signatures keep a fuzzer out of everything behind them, so the first byte of most inputs says whether they
//! are made right: as a writer would that has a key and means harm.

use crate::blob::Decompressor;
use crate::error::{Error, ErrorKind};
use crate::index::{SegmentHeader, local_of};
use crate::key::{BoxPurpose, CipherKey, Secret, TAG, text};
use crate::names::PackName;
use crate::pack::{PACK_HEADER, PackHeader, PackOpener, TRAILER, seal_footer};
use crate::tree::{Differences, Node, NodeSource, Tree, Walk};
use crate::{
    BootResult, ChunkId, ChunkSize, Cipher, Description, KeyFile, KeyRing, LocalIndex, MasterKey, PackId,
    Point, RepositoryId, Segment, SessionId, WrappedKey, WriterKey,
};
use std::sync::LazyLock;

// The keys of the worked example, so that its bytes are inputs that open.
const REPOSITORY: RepositoryId = RepositoryId([0x11; 16]);
static RING: LazyLock<KeyRing> = LazyLock::new(|| KeyRing::new(REPOSITORY, MasterKey::new([0x22; 32])));

/// A pack's header as a writer made it, and the key it leads to.
static PACK: LazyLock<(PackHeader, CipherKey)> = LazyLock::new(|| {
    let (writer, secret) = (RING.writer(), Secret::new([3; 32]));
    let mut header = PackHeader {
        cipher: Cipher::Aes256Gcm,
        repository: REPOSITORY,
        writer: writer.signer().id(),
        domain: writer.domain().id(),
        recipient: writer.public().recipient.id(),
        salt: [4; 32],
        sealed_secret: [0; 80],
    };
    let open = &header.encode()[..PACK_HEADER - 80];
    let sealed = writer.seal(BoxPurpose::PackSecret, open, secret.bytes());
    header.sealed_secret = sealed.try_into().expect("a sealed secret has one length");
    let key = CipherKey::new(header.cipher, &header.key(&secret));
    (header, key)
});

/// A pack: as it is, or with a header and seals made right around a footer's content (the part of the bytes that the second
/// byte says), or blobs that decompress.
///
/// # Panics
/// If a pack is accepted that does not hold together.
pub fn pack(data: &[u8]) {
    let [how, part, data @ ..] = data else { return };
    let name = PackName { session: SessionId([5; 16]), pack: PackId([6; 32]) };
    let bytes = match how % 3 {
        0 => data.to_vec(),
        1 => {
            let (blobs, footer) = data.split_at(data.len() * usize::from(*part) / 256);
            let (header, key) = &*PACK;
            let mut bytes = [&header.encode(), blobs, footer, &[0; TAG + TRAILER]].concat();
            seal_footer(key, &mut bytes[PACK_HEADER + blobs.len()..]);
            bytes
        }
        _ => return blob(*part, data),
    };
    let Ok(opener) = PackOpener::parse(RING.opener(), name, &bytes) else { return };
    let Ok(blobs) = opener.parse_blobs(&bytes) else { return };
    let mut offset = PACK_HEADER as u64;
    for (ordinal, blob) in blobs.iter().enumerate() {
        assert!(blob.is_possible() && blob.ordinal as usize == ordinal && blob.range().start == offset);
        offset = blob.range().end;
        let mut plain = vec![0; blob.plain_len as usize];
        let stored = &bytes[blob.range().start as usize..blob.range().end as usize];
        let _ = opener.open_blob(blob, stored, &mut plain, &mut Decompressor::new());
    }
    assert!(offset < bytes.len() as u64);
}

/// Compressed bytes that were sealed right, with a length that may be true.
fn blob(length: u8, compressed: &[u8]) {
    let mut decompressor = Decompressor::new();
    decompressor.compressed = compressed.to_vec();
    let mut plain = vec![0; usize::from(length) * 64];
    let _ = decompressor.decompress(&mut plain);
}

/// An index segment: as it is, or sealed right around the bytes.
///
/// # Panics
/// If a segment is accepted that does not hold together.
pub fn segment(data: &[u8]) {
    let [how, packs, data @ ..] = data else { return };
    let bytes = if how % 2 == 0 {
        data.to_vec()
    } else {
        let (domain, packs) = (RING.writer().domain(), usize::from(*packs));
        let entries = (data.len() / 32).saturating_sub(packs);
        let header = SegmentHeader {
            cipher: Cipher::ChaCha20Poly1305,
            repository: REPOSITORY,
            domain: domain.id(),
            salt: [4; 32],
            packs,
            entries,
        };
        let mut plain = data.to_vec();
        plain.resize((packs + entries) * 32, 0);
        header.seal(domain, &plain)
    };
    let domain = |id| Some(RING.opener().domain(id));
    let Ok(segment) = Segment::parse(&REPOSITORY, domain, &bytes) else { return };
    assert!(segment.entries().is_sorted());
    for entry in segment.entries() {
        assert!((entry.pack() as usize) < segment.packs().len());
        let mut id = ChunkId([7; 32]);
        id.0[..16].copy_from_slice(&entry.id());
        let located = entry.locate(&id).expect("it is about that");
        assert!(located.blob.is_possible() && located.pack == entry.pack());
    }
}

/// A local index: as it is, or with its hashes made right.
///
/// # Panics
/// If an index finds what it does not list.
pub fn local_index(data: &[u8]) {
    let [how, data @ ..] = data else { return };
    let bytes = match data.split_first_chunk() {
        Some((entries, blocks)) if how % 2 == 1 => {
            let entries = u64::from(u16::from_le_bytes(*entries));
            let mut blocks = blocks.to_vec();
            // So many blocks that the length is right, but for the largest numbers.
            blocks.resize(entries.div_ceil(128).min(8) as usize * 4096, 0);
            local_of(REPOSITORY, entries, &blocks)
        }
        _ => data.to_vec(),
    };
    let path = std::env::temp_dir().join(format!("rempart-fuzz-index-{}", std::process::id()));
    std::fs::write(&path, bytes).expect("there is room for temporary files");
    let index = LocalIndex::open(&path, &REPOSITORY);
    let _ = std::fs::remove_file(&path);
    let Ok(index) = index else { return };
    for entry in index.entries().map_while(Result::ok).take(300) {
        let mut id = ChunkId([7; 32]);
        id.0[..16].copy_from_slice(&entry.id());
        if let Ok(found) = index.find(&id) {
            assert!(found.iter().all(|located| located.blob.is_possible() && located.blob.id == id));
        }
    }
}

/// A node of a tree: one alone, and a tree all of whose nodes are the same.
///
/// # Panics
/// If a node does not read back, or if a tree of such nodes never ends.
pub fn tree_node(data: &[u8]) {
    struct Same<'a>(&'a [u8]);
    impl NodeSource for Same<'_> {
        fn node(&self, id: &ChunkId) -> Result<Vec<u8>, Error> {
            let missing = || Error::new(ErrorKind::Damaged, id, "it is missing");
            (id.0[0] < 250).then(|| self.0.to_vec()).ok_or_else(missing)
        }
    }
    let [level, chunks, data @ ..] = data else { return };
    if let Ok(node) = Node::parse(data, level % 8) {
        assert_eq!(node.encode(), data, "there is one form of a node");
    }
    let source = Same(data);
    let tree = Tree { root: ChunkId([1; 32]), chunks: u64::from(*chunks) << (8 * (level % 8)) };
    if let Ok(walk) = Walk::new(&source, tree) {
        // One path of nodes that say their level: a tree of equal nodes has one level.
        assert!(walk.take(10_000).count() < 1000);
    }
    let other = Tree { root: ChunkId([2; 32]), chunks: tree.chunks / 2 };
    if let Ok(differences) = Differences::new(&source, other, tree) {
        assert!(differences.take(10_000).count() < 1000);
    }
}

/// What stands in the log behind a signature: the body of an entry, of the kind that the first byte says; or, of kind 255, the
/// state in a checkpoint.
///
/// # Panics
/// If something is accepted that does not read back.
pub fn log_entry(data: &[u8]) {
    let [kind, data @ ..] = data else { return };
    match kind {
        255 => crate::log::fuzz_state(REPOSITORY, data),
        kind => crate::log::fuzz_body((*kind).into(), data),
    }
}

/// Other small things behind a signature or a seal: a pointer to a checkpoint, as it is or signed right; what came of starting
/// a machine; entries of a log, one after the other.
///
/// # Panics
/// If something is accepted that does not read back, or contradicts itself.
pub fn log_object(data: &[u8]) {
    let [how, data @ ..] = data else { return };
    match how % 4 {
        0 => crate::log::fuzz_pointer(REPOSITORY, RING.maintenance(), data),
        1 => {
            let signed = [data, &RING.maintenance().sign(data)].concat();
            crate::log::fuzz_pointer(REPOSITORY, RING.maintenance(), &signed);
        }
        2 => {
            if let Ok(result) = BootResult::decode("boot", data) {
                drop(BootResult::decode("boot", &result.encode()).expect("it was written"));
            }
        }
        _ => crate::log::fuzz_entries(REPOSITORY, data),
    }
}

/// What a backup says of itself.
///
/// # Panics
/// If something is accepted that does not read back.
pub fn point(data: &[u8]) {
    if let Ok(point) = Point::decode("point", data) {
        let again = Point::decode("point", &point.encode()).expect("it was written");
        assert_eq!(again, point);
        point.reaches(ChunkSize::DEFAULT);
    }
}

/// The small objects: a wrapped key, the repository's description, a key as text; as they are, or with checksum and signature
/// made right.
///
/// # Panics
/// If something is accepted that does not read back.
pub fn key(data: &[u8]) {
    let [how, data @ ..] = data else { return };
    let mut bytes = data.to_vec();
    match how % 4 {
        0 => {}
        1 => bytes.extend_from_slice(blake3::hash(data).as_bytes()),
        2 => {
            let verifier = RING.public().maintenance.0;
            if let Some((_, tail)) = bytes.split_last_chunk_mut::<32>() {
                *tail = verifier;
            }
            let signature = RING.maintenance().sign(&bytes);
            bytes.extend_from_slice(&signature);
        }
        _ => {
            let text = text::encode("rempart-key-1", "a key", data);
            let read = text::decode("rempart-key-1", &text).map(|bytes| bytes.to_vec());
            assert!(text.len() > 4096 || read.as_deref() == Ok(data));
        }
    }
    if let Ok(key) = WrappedKey::parse(&bytes) {
        assert_eq!(key.encode(), bytes);
    }
    if let Ok(description) = Description::parse(&bytes) {
        assert_eq!(description.encode(), bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    let _ = (WriterKey::parse(&text).is_ok(), KeyFile::parse(&text).is_ok());
}

#[cfg(test)]
mod tests {
    //! What fuzzers found worth keeping, again on every build, and a few changes of each.

    /// Changed copies of each input. `REMPART_MUTATIONS` makes more of them.
    const MUTATIONS: u64 = 200;

    fn replay(target: &str, entry: fn(&[u8])) {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/");
        let files = std::fs::read_dir(format!("{folder}{target}")).expect("the corpus is there");
        let more = std::env::var("REMPART_MUTATIONS").ok().and_then(|text| text.parse().ok());
        let mut inputs = 0;
        for file in files {
            let path = file.expect("the folder can be read").path();
            println!("{}", path.display());
            let input = std::fs::read(&path).expect("the file can be read");
            entry(&input);
            let name = path.file_name().expect("a file").as_encoded_bytes().to_vec();
            for number in 0..more.unwrap_or(MUTATIONS) {
                let mut random = blake3::Hasher::new();
                random.update(&name).update(&number.to_le_bytes());
                entry(&mutate(&input, &mut random.finalize_xof()));
            }
            inputs += 1;
        }
        assert!(inputs > 0, "no corpus for {target}");
    }

    /// A few bits, bytes, numbers and pieces changed.
    fn mutate(input: &[u8], random: &mut blake3::OutputReader) -> Vec<u8> {
        let mut draw = |below: usize| {
            let mut bytes = [0; 8];
            random.fill(&mut bytes);
            (u64::from_le_bytes(bytes) % below.max(1) as u64) as usize
        };
        let mut bytes = input.to_vec();
        for _ in 0..=draw(4) {
            let at = draw(bytes.len());
            match draw(6) {
                0 => bytes.truncate(at),
                1 => {
                    let piece = bytes[at..bytes.len().min(at + draw(64))].to_vec();
                    let to = draw(bytes.len() + 1);
                    bytes.splice(to..to, piece);
                }
                2 => {
                    let number = [0, 1, 0x7fff_ffff, u32::MAX, 1 << draw(32)][draw(5)];
                    bytes.iter_mut().skip(at).zip(u32::to_le_bytes(number)).for_each(|(old, new)| *old = new);
                }
                3 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = draw(256) as u8),
                _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << draw(8)),
            }
        }
        bytes
    }

    #[test]
    fn pack_corpus() {
        replay("pack", super::pack);
    }

    #[test]
    fn segment_corpus() {
        replay("segment", super::segment);
    }

    #[test]
    fn local_index_corpus() {
        replay("local_index", super::local_index);
    }

    #[test]
    fn tree_node_corpus() {
        replay("tree_node", super::tree_node);
    }

    #[test]
    fn log_entry_corpus() {
        replay("log_entry", super::log_entry);
    }

    #[test]
    fn log_object_corpus() {
        replay("log_object", super::log_object);
    }

    #[test]
    fn point_corpus() {
        replay("point", super::point);
    }

    #[test]
    fn key_corpus() {
        replay("key", super::key);
    }
}

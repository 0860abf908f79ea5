use super::*;
use crate::blob::{BlobKind, Codec, Compressor, Decompressor};
use crate::check::verify;
use crate::error::ErrorKind;
use crate::{ChunkId, KeyRing, MasterKey, RepositoryId, SessionId, WriterKey};
use rempart_objects::{Created, Memory, Objects};

const SESSION: SessionId = SessionId([5; 16]);

fn ring(master: u8) -> KeyRing {
    KeyRing::new(RepositoryId([1; 16]), MasterKey::new([master; 32]))
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Text, noise, a short chunk, one byte, a node.
fn contents() -> Vec<(BlobKind, Vec<u8>)> {
    vec![
        (BlobKind::Data, b"all work and no play ".repeat(40)),
        (BlobKind::Data, noise(1, 700)),
        (BlobKind::Data, noise(2, 33)),
        (BlobKind::Data, vec![9]),
        (BlobKind::Tree, noise(3, 64)),
    ]
}

fn id(writer: &WriterKey, kind: BlobKind, content: &[u8]) -> ChunkId {
    match kind {
        BlobKind::Data => writer.domain().chunk_id(content),
        BlobKind::Tree => writer.domain().node_id(content),
    }
}

fn pack(writer: &WriterKey) -> Pack {
    let mut builder = PackBuilder::new(writer, 0, rempart_buffer::BufferMut::default());
    let mut compressor = Compressor::new();
    for (kind, content) in contents() {
        builder.add(kind, id(writer, kind, &content), &content, &mut compressor);
    }
    builder.finish()
}

fn open(opener: &PackOpener, blob: &Blob, bytes: &[u8]) -> Result<Vec<u8>, crate::Error> {
    let mut plain = vec![0; blob.plain_len as usize];
    let stored = bytes.get(blob.range().start as usize..blob.range().end as usize).unwrap_or_default();
    opener.open_blob(blob, stored, &mut plain, &mut Decompressor::new())?;
    Ok(plain)
}

#[test]
fn a_pack_reads_back_and_is_verified_without_a_key() {
    let ring = ring(2);
    let agent = ring.new_writer(crate::WriterName::new("web").expect("a name"));
    for writer in [ring.writer(), &agent] {
        let pack = pack(writer);
        let objects = Memory::default();
        let name = pack.name(SESSION);
        let created = objects.create(&name.object(), &[pack.bytes()], None).expect("created");
        assert_eq!(created, Created::New);
        assert_eq!(verify(&objects, &name.object(), &name.pack.0).expect("whole"), pack.bytes().len() as u64);

        let opener = PackOpener::fetch(&objects, ring.opener(), name).expect("opens");
        assert_eq!(opener.domain().id(), writer.domain().id());
        let blobs = opener.fetch_blobs(&objects).expect("opens");
        assert_eq!(blobs, pack.blobs());
        assert_eq!(opener.blobs(pack.bytes()).expect("opens"), blobs);
        let codecs: Vec<_> = blobs.iter().map(|blob| blob.codec).collect();
        assert_eq!(codecs, [Codec::Zstd, Codec::Plain, Codec::Plain, Codec::Plain, Codec::Plain]);
        for (blob, (kind, content)) in blobs.iter().zip(contents()) {
            assert_eq!(blob.kind, kind);
            assert_eq!(open(&opener, blob, pack.bytes()).expect("opens"), content);
        }
    }
}

#[test]
fn every_flipped_bit_of_a_pack_is_seen() {
    let ring = ring(2);
    let whole = pack(ring.writer());
    let name = whole.name(SESSION);
    for bit in 0..whole.bytes().len() * 8 {
        let mut bytes = whole.bytes().to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let seen = match PackOpener::new(ring.opener(), name, &bytes) {
            Err(_) => true,
            Ok(opener) => {
                let blobs = whole.blobs().iter();
                opener.blobs(&bytes).is_err()
                    || blobs.clone().any(|blob| open(&opener, blob, &bytes).is_err())
            }
        };
        assert!(seen, "{bit}");
        // Hashing is slow next to the rest; one bit of each byte will do.
        if bit % 8 == 0 {
            let objects = Memory::default();
            objects.create(&name.object(), &[&bytes], None).expect("created");
            let error = verify(&objects, &name.object(), &name.pack.0).expect_err("damaged");
            assert_eq!((error.kind, error.object), (ErrorKind::Damaged, name.object().to_string()));
        }
    }
    let opener = PackOpener::new(ring.opener(), name, whole.bytes()).expect("opens");
    for length in 0..whole.bytes().len() {
        assert!(opener.blobs(&whole.bytes()[..length]).is_err());
        assert!(
            length >= PACK_HEADER || PackOpener::new(ring.opener(), name, &whole.bytes()[..length]).is_err()
        );
    }
}

#[test]
fn what_an_index_says_of_a_blob_must_be_true() {
    let ring = ring(2);
    let pack = pack(ring.writer());
    let opener = PackOpener::new(ring.opener(), pack.name(SESSION), pack.bytes()).expect("opens");
    let (text, noise) = (pack.blobs()[0], pack.blobs()[1]);
    for lie in [
        Blob { id: noise.id, ..text },
        Blob { ordinal: 1, ..text },
        Blob { kind: BlobKind::Tree, ..text },
        Blob { codec: Codec::Plain, plain_len: text.stored_len - 16, ..text },
        Blob { plain_len: text.plain_len + 1, ..text },
        Blob { plain_len: text.plain_len - 1, ..text },
        Blob { plain_len: u32::MAX, ..text },
        Blob { offset: text.offset + 1, ..text },
        Blob { offset: u32::MAX, ..text },
        Blob { stored_len: text.stored_len - 1, ..text },
        Blob { id: ChunkId::ZERO, ..text },
        Blob { codec: Codec::Zstd, ..noise },
    ] {
        let mut plain = vec![0; (lie.plain_len as usize).min(2 << 20)];
        let range = lie.range();
        let stored = pack.bytes().get(range.start as usize..range.end as usize).unwrap_or_default();
        let error = opener.open_blob(&lie, stored, &mut plain, &mut Decompressor::new());
        assert_eq!(error.expect_err("a lie").kind, ErrorKind::Damaged, "{lie:?}");
    }
}

#[test]
fn a_writer_that_lies_about_a_chunk_is_found() {
    let ring = ring(2);
    let agent = ring.new_writer(crate::WriterName::new("web").expect("a name"));
    let mut builder = PackBuilder::new(&agent, 0, rempart_buffer::BufferMut::default());
    let claimed = agent.domain().chunk_id(b"a block that others have");
    let blob = builder.add(BlobKind::Data, claimed, b"garbage", &mut Compressor::new());
    let pack = builder.finish();
    let opener = PackOpener::new(ring.opener(), pack.name(SESSION), pack.bytes()).expect("opens");
    let error = open(&opener, &blob, pack.bytes()).expect_err("poisoned");
    assert_eq!(error.kind, ErrorKind::Damaged);
    assert!(error.to_string().contains("its writer lied"), "{error}");
}

#[test]
fn another_repositorys_key_is_told() {
    let pack = pack(ring(2).writer());
    let name = pack.name(SESSION);
    let error = PackOpener::new(ring(3).opener(), name, pack.bytes()).expect_err("another key");
    assert_eq!(error.kind, ErrorKind::WrongKey);
    let other = KeyRing::new(RepositoryId([2; 16]), MasterKey::new([2; 32]));
    let error = PackOpener::new(other.opener(), name, pack.bytes()).expect_err("another repository");
    assert_eq!(error.kind, ErrorKind::Foreign);
}

#[test]
fn no_two_attempts_share_a_key() {
    let ring = ring(2);
    let (one, two) = (pack(ring.writer()), pack(ring.writer()));
    assert_ne!(one.id(), two.id());
    let sealed = |pack: &Pack| {
        let blob = pack.blobs()[1];
        pack.bytes()[blob.range().start as usize..blob.range().end as usize].to_vec()
    };
    assert_ne!(sealed(&one), sealed(&two));
}

#[test]
fn a_full_pack_keeps_its_limit() {
    let ring = ring(2);
    let content = noise(4, 64 << 10);
    let mut builder = PackBuilder::new(ring.writer(), MIN_PACK as u64, rempart_buffer::BufferMut::default());
    let mut count = 0u64;
    let mut compressor = Compressor::new();
    while builder.has_room(content.len()) {
        count += 1;
        builder.add(BlobKind::Data, ChunkId([count as u8; 32]), &content, &mut compressor);
    }
    assert_eq!(count, 31);
    let length = builder.len();
    let pack = builder.finish();
    assert_eq!(pack.bytes().len() as u64, length);
    assert!(length <= MIN_PACK as u64);
    // The memory is used again, and nothing of the old pack shows.
    let id = pack.id();
    let mut builder = PackBuilder::new(ring.writer(), MIN_PACK as u64, pack.into_buffer());
    let blob = builder.add(BlobKind::Data, ring.writer().domain().chunk_id(b"x"), b"x", &mut compressor);
    let again = builder.finish();
    assert_ne!(again.id(), id);
    let opener = PackOpener::new(ring.opener(), again.name(SESSION), again.bytes()).expect("opens");
    assert_eq!(open(&opener, &blob, again.bytes()).expect("opens"), b"x");
}

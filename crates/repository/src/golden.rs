//! The formats, byte for byte: repositories written by released programs must stay readable. The same bytes are the worked
//! example in the document of the formats; `REWRITE_TRANSCRIPTS=1` writes them there.

use crate::blob::{BlobKind, Compressor, Decompressor};
use crate::key::{Secret, text};
use crate::names::PackName;
use crate::pack::{Pack, PackBuilder, PackHeader, PackOpener};
use crate::tree::Node;
use crate::{
    ChunkId, ChunkSize, Cipher, Description, Error, KeyFile, KeyRing, MasterKey, NodeSink, NodeSource,
    PassphraseCost, RepositoryId, Segment, SegmentBuilder, SegmentName, SessionId, Tree, TreeUpdate, Unlock,
    WrappedKey, WrappedKeyId, WriterKey, WriterName,
};
use rempart_types::WallTime;
use std::path::Path;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/formats/repository.md");
const REPOSITORY: RepositoryId = RepositoryId([0x11; 16]);
const SESSION: SessionId = SessionId([0x99; 16]);
const CREATED: WallTime = WallTime(1_800_000_000_000);
/// The secret of the example's pack, sealed once: sealing draws a new key each time.
const SEALED_SECRET: &str = "e441deeab03a1899e3171a111c99eeecfdb492832fa475e895a4da80f83a96363ced363894f86571e4798972927cbbbcfd475a17bcc91e8eb187dcb4e28265653203fc73d9dcab77df55ad5fae15acae";

fn ring() -> KeyRing {
    KeyRing::new(REPOSITORY, MasterKey::new([0x22; 32]))
}

fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

fn dump(bytes: &[u8]) -> String {
    let line = |(number, line): (usize, &[u8])| {
        let (left, right) = line.split_at(line.len().min(8));
        let spaced =
            |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
        let shown = |byte: &u8| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { '.' };
        let text: String = line.iter().map(shown).collect();
        format!("{:04x}  {:<23}  {:<23}  {text}\n", number * 16, spaced(left), spaced(right))
    };
    bytes.chunks(16).enumerate().map(line).collect()
}

/// What stands between the marks of an example must be `content`.
fn example(name: &str, content: &str) {
    let mark = format!("<!-- example: {name} -->\n```\n");
    let document = std::fs::read_to_string(DOCUMENT).expect("the document is there");
    let (before, rest) = document.split_once(&mark).unwrap_or_else(|| panic!("no example `{name}`"));
    let (written, after) = rest.split_once("```\n").expect("its end");
    if written != content && std::env::var_os("REWRITE_TRANSCRIPTS").is_some() {
        let document = format!("{before}{mark}{content}```\n{after}");
        return std::fs::write(Path::new(DOCUMENT), document).expect("the document can be written");
    }
    assert_eq!(written, content, "the example `{name}` in {DOCUMENT}");
}

fn first_chunk() -> Vec<u8> {
    vec![b'a'; 4096]
}

fn second_chunk() -> Vec<u8> {
    b"Rempart".to_vec()
}

fn tree() -> (Tree, Vec<(ChunkId, Vec<u8>)>) {
    #[derive(Default)]
    struct Nodes(Vec<(ChunkId, Vec<u8>)>);
    impl NodeSink for Nodes {
        fn node(&mut self, id: ChunkId, encoded: &[u8]) -> Result<(), Error> {
            self.0.push((id, encoded.to_vec()));
            Ok(())
        }
    }
    impl NodeSource for Nodes {
        fn node(&self, _: &ChunkId) -> Result<Vec<u8>, Error> {
            unreachable!("a tree of zeroes has no nodes")
        }
    }
    let ring = ring();
    let domain = ring.writer().domain();
    let (none, mut nodes) = (Nodes::default(), Nodes::default());
    let mut update = TreeUpdate::new(domain, &none, Tree::zero(10)).expect("a tree");
    update.set(0, domain.chunk_id(&first_chunk()), &mut nodes).expect("set");
    update.set(9, domain.chunk_id(&second_chunk()), &mut nodes).expect("set");
    (update.finish(&mut nodes).expect("a tree"), nodes.0)
}

fn header() -> PackHeader {
    let ring = ring();
    let writer = ring.writer();
    PackHeader {
        cipher: Cipher::Aes256Gcm,
        repository: REPOSITORY,
        writer: writer.signer().id(),
        domain: writer.domain().id(),
        recipient: writer.public().recipient.id(),
        salt: [0x77; 32],
        sealed_secret: data_encoding::HEXLOWER
            .decode(SEALED_SECRET.as_bytes())
            .expect("hexadecimal")
            .try_into()
            .expect("80 bytes"),
    }
}

fn pack() -> Pack {
    let ring = ring();
    let domain = ring.writer().domain();
    let mut pack = PackBuilder::with_header(
        &header(),
        &Secret::new([0x66; 32]),
        0,
        rempart_buffer::BufferMut::default(),
    );
    let mut compressor = Compressor::new();
    for chunk in [first_chunk(), second_chunk()] {
        pack.add(BlobKind::Data, domain.chunk_id(&chunk), &chunk, &mut compressor);
    }
    let (_, nodes) = tree();
    for (id, node) in nodes {
        pack.add(BlobKind::Tree, id, &node, &mut compressor);
    }
    pack.finish()
}

#[test]
fn keys() {
    let ring = ring();
    let domain = ring.writer().domain();
    let content = [
        ("recipient", hex(&ring.public().recipient.0)),
        ("maintenance", hex(&ring.public().maintenance.0)),
        ("own domain", domain.id().to_string()),
        ("its secret", hex(domain.secret().bytes())),
        ("id of `Rempart`", domain.chunk_id(&second_chunk()).to_string()),
        ("as a node", domain.node_id(&second_chunk()).to_string()),
        ("pack key", hex(header().key(&Secret::new([0x66; 32])).bytes())),
    ];
    example("keys", &content.map(|(name, value)| format!("{name:<16} {value}\n")).concat());
}

#[test]
fn description() {
    let description =
        Description::new(&ring(), ChunkSize::new(256 << 10).expect("a size"), CREATED, 30 * 24 * 3_600_000);
    example("description", &dump(&description.encode()));
}

#[test]
fn wrapped_keys() {
    let (ring, file) = (ring(), KeyFile::new([0x33; 32]));
    let cheap = PassphraseCost { memory_kib: 64, passes: 2, lanes: 2 };
    for (name, unlock) in
        [("key by file", Unlock::KeyFile(&file)), ("key by passphrase", Unlock::Passphrase("correct horse"))]
    {
        let mut key =
            WrappedKey::wrap(REPOSITORY, ring.master(), unlock, cheap, "safe", CREATED).expect("wrapped");
        key.id = WrappedKeyId([0x55; 16]);
        key.salt = [0x44; 32];
        key.seal(ring.master(), unlock);
        example(name, &dump(&key.encode()));
        let read = WrappedKey::decode(&key.name(), &key.encode()).expect("whole");
        assert!(read.open(unlock).is_ok());
    }
}

#[test]
fn keys_in_files() {
    let about = format!("Opens the backup repository {REPOSITORY}. Keep it secret, and a copy elsewhere.");
    let written = text::encode("rempart-key-1", &about, &[0x33; 32]);
    example("key file", &written);
    assert!(KeyFile::parse(&written).is_ok());

    let ring = ring();
    let web = ring.example_writer(WriterName::new("web").expect("a name"), [0x55; 32]);
    let again = WriterKey::parse(&web.to_text()).expect("a key");
    assert_eq!(again.signer().id(), web.signer().id());
    example("writer's key", &again.to_text());
}

#[test]
fn a_pack() {
    let (ring, pack) = (ring(), pack());
    let blobs = pack
        .blobs()
        .iter()
        .map(|blob| format!("blob {} at {:04x}: {}\n", blob.ordinal, blob.offset, blob.id));
    example("pack", &format!("{}{}name {}\n", dump(pack.bytes()), blobs.collect::<String>(), pack.id()));

    let name = PackName { session: SESSION, pack: pack.id() };
    let opener = PackOpener::new(ring.opener(), name, pack.bytes()).expect("opens");
    let blobs = opener.blobs(pack.bytes()).expect("opens");
    let contents = [first_chunk(), second_chunk(), tree().1[0].1.clone()];
    for (blob, content) in blobs.iter().zip(contents) {
        let mut plain = vec![0; blob.plain_len as usize];
        let stored = &pack.bytes()[blob.range().start as usize..blob.range().end as usize];
        opener.open_blob(blob, stored, &mut plain, &mut Decompressor::new()).expect("opens");
        assert_eq!(plain, content);
    }
}

#[test]
fn a_segment() {
    let (ring, pack) = (ring(), pack());
    let mut segment = SegmentBuilder::new();
    segment.add(pack.id(), pack.blobs());
    let sealed = segment.seal_with(REPOSITORY, ring.writer().domain(), Cipher::ChaCha20Poly1305, [0x88; 32]);
    let name: SegmentName = sealed.name(SESSION);
    let own = |id| Some(ring.opener().domain(id));
    let opened = Segment::open(&REPOSITORY, own, &name, sealed.bytes()).expect("opens");
    let entries = opened.entries().iter().map(|entry| format!("entry {}\n", hex(entry.bytes())));
    example("segment", &format!("{}{}", dump(sealed.bytes()), entries.collect::<String>()));
}

#[test]
fn a_node() {
    let (tree, nodes) = tree();
    let [(id, node)] = &nodes[..] else { panic!("one node is enough") };
    assert_eq!(tree.root, *id);
    assert!(Node::parse(node, 0).is_ok());
    example("node", &format!("{}id {id}\n", dump(node)));
}

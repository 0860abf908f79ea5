//! The formats, byte for byte: repositories written by released programs must stay readable. The same bytes are the worked
//! example in the documents of the formats; `REWRITE_TRANSCRIPTS=1` writes them there.

use crate::blob::{BlobKind, Compressor, Decompressor};
use crate::key::{Secret, text};
use crate::log::{self, Commit, Ed25519, Log, Numbers, Session};
use crate::names::PackName;
use crate::pack::{Pack, PackBuilder, PackHeader, PackOpener};
use crate::tree::Node;
use crate::{
    BoxPurpose, ChainId, ChunkId, ChunkSize, Cipher, Consistency, ConsistencyLevel, Definition, Description,
    Error, Excluded, HowRead, KeyFile, KeyRing, MasterKey, NodeSink, NodeSource, PassphraseCost, Point,
    PointDisk, RepositoryId, SealedSegment, Segment, SegmentBuilder, SegmentName, SessionId, Tree,
    TreeUpdate, Unlock, WrappedKey, WrappedKeyId, WriterKey, WriterName,
};
use rempart_objects::{Memory, Name, Objects};
use rempart_types::WallTime;
use std::path::Path;
use std::sync::{Arc, Mutex};

const FORMATS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/formats");
const REPOSITORY: RepositoryId = RepositoryId([0x11; 16]);
const SESSION: SessionId = SessionId([0x99; 16]);
const CREATED: WallTime = WallTime(1_800_000_000_000);
/// The secret of the example's pack, sealed once: sealing draws a new key each time.
const SEALED_SECRET: &str = "e441deeab03a1899e3171a111c99eeecfdb492832fa475e895a4da80f83a96363ced363894f86571e4798972927cbbbcfd475a17bcc91e8eb187dcb4e28265653203fc73d9dcab77df55ad5fae15acae";

/// The example's point, sealed once, for the same reason.
const SEALED_POINT: &str = "822d4594aef5f1d1d111661165bdf10d9e8cf48ed8bd478774e798b795d4df1a6ad1e143166577aae29c18ecc646ccc8efb1726037d3e5dd4e4bf05e80f5a729c9ddc5320c1e0a355a578d572f1a90312f5929b5047887913ac703b48874473e5decdd3aeb757a8e7c1f8cb3e0b156a8fb0761f8098621970967c958a3311003f51938d017974bf2dc26c19c7a8aff69b217a57cbf76e135c3602b4bf98110762b398b446c489585eda7a3c8fc8913cf0c74e55ce741ff6ade917851f56d";
const CHAIN: ChainId = ChainId([0xcc; 16]);
/// A document is read and written as a whole, and tests run side by side.
static DOCUMENTS: Mutex<()> = Mutex::new(());

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

/// The parts that some bytes are made of, one behind the other: where each begins, its bytes, what it is.
///
/// # Panics
/// If they are not all of the bytes.
fn parts(bytes: &[u8], parts: &[(usize, &str)]) -> String {
    let (mut at, mut told) = (0, String::new());
    for (len, what) in parts {
        let part = &bytes[at..at + len];
        let shown = if *len > 16 { format!("{}… ({len})", hex(&part[..12])) } else { hex(part) };
        told.push_str(&format!("at {at:04x}: {shown} {what}\n"));
        at += len;
    }
    assert_eq!(at, bytes.len(), "all bytes are told");
    told
}

/// What stands between the marks of an example in the document of repositories must be `content`.
fn example(name: &str, content: &str) {
    example_in("repository.md", name, content);
}

fn example_in(document: &str, name: &str, content: &str) {
    let path = Path::new(FORMATS).join(document);
    let _one = DOCUMENTS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mark = format!("<!-- example: {name} -->\n```\n");
    let document = std::fs::read_to_string(&path).expect("the document is there");
    let (before, rest) = document.split_once(&mark).unwrap_or_else(|| panic!("no example `{name}`"));
    let (written, after) = rest.split_once("```\n").expect("its end");
    if written != content && std::env::var_os("REWRITE_TRANSCRIPTS").is_some() {
        let document = format!("{before}{mark}{content}```\n{after}");
        return std::fs::write(path, document).expect("the document can be written");
    }
    assert_eq!(written, content, "the example `{name}` in {}", path.display());
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

fn segment() -> SealedSegment {
    let (ring, pack) = (ring(), pack());
    let mut segment = SegmentBuilder::new();
    segment.add(pack.id(), pack.blobs());
    segment.seal_with(REPOSITORY, ring.writer().domain(), Cipher::ChaCha20Poly1305, [0x88; 32])
}

#[test]
fn a_segment() {
    let (ring, sealed) = (ring(), segment());
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

fn point() -> Point {
    Point {
        vm: "web".to_owned(),
        host: "node-a".to_owned(),
        taken: WallTime(CREATED.0 + 1000),
        ended: WallTime(CREATED.0 + 3000),
        consistency: Consistency {
            level: ConsistencyLevel::FileSystem,
            why: Some("no hooks".to_owned()),
            pause_ms: Some(12),
        },
        disks: vec![PointDisk {
            name: "vda".to_owned(),
            size: (9 << 18) + 7,
            root: tree().0.root,
            position: None,
            how: HowRead {
                full_because: Some("first backup".to_owned()),
                read: 300,
                new: 200,
                audited: 0,
                missed: 0,
            },
            excluded: vec![Excluded { offset: 1 << 20, len: 4096, reason: "swap".to_owned() }],
        }],
        definition: Some(Definition { kind: "rempart".to_owned(), content: b"memory_mib = 1".to_vec() }),
        nvram: None,
        notes: vec!["late".to_owned()],
        files: None,
        memory: None,
    }
}

#[test]
fn a_point() {
    let opened = point().encode();
    let told = parts(
        &opened,
        &[
            (1, "form"),
            (4, "name of the machine"),
            (7, "host that read it"),
            (6, "the instant"),
            (6, "when it ended"),
            (1, "consistency: file systems were frozen"),
            (10, "why not better"),
            (2, "the guest stood still, ms"),
            (1, "disks"),
            (4, "name of the first"),
            (4, "its bytes"),
            (32, "top of its tree"),
            (1, "position"),
            (14, "why all of it was read"),
            (2, "bytes read"),
            (2, "bytes that were new"),
            (1, "chunks audited"),
            (1, "chunks missed"),
            (1, "ranges left out"),
            (3, "the first begins at"),
            (2, "its bytes"),
            (5, "why"),
            (24, "definition: its kind, its text"),
            (1, "NVRAM"),
            (6, "notes"),
            (1, "files"),
        ],
    );
    example("point", &format!("{}{told}", dump(&opened)));
    let sealed = data_encoding::HEXLOWER.decode(SEALED_POINT.as_bytes()).expect("hexadecimal");
    let again = ring().opener().open(BoxPurpose::Commit, &CHAIN.0, &sealed).expect("opens");
    assert_eq!(*again, opened);
    assert_eq!(Point::decode("log/2", &again).expect("whole"), point());
}

/// The log of the example: the first entry, a session, the point, a checkpoint; and the pointer to that.
#[test]
fn a_log() {
    let objects: Arc<dyn Objects> = Arc::new(Memory::default());
    let (ring, verify) = (Arc::new(ring()), Arc::new(Ed25519));
    let (own, maintenance) = (ring.writer().domain().id(), ring.public().maintenance);
    let log = Log::create(Arc::clone(&objects), verify.clone(), REPOSITORY, &*ring, own, CREATED);
    let session = Session::open(log.expect("created"), ring, SESSION, CREATED);
    let mut session = session.expect("opened");
    let payload = data_encoding::HEXLOWER.decode(SEALED_POINT.as_bytes()).expect("hexadecimal");
    let commit = Commit {
        chain: CHAIN,
        parent: None,
        segment: log::Segment { packs: vec![pack().id()], indexes: vec![segment().name(SESSION).segment] },
        base: None,
        packs: Numbers::new(),
        retain_until: Some(WallTime(CREATED.0 + 86_400_000)),
        payload: payload.clone(),
    };
    let later = WallTime(CREATED.0 + 4000);
    session.commit::<log::LogError>(later, |_| Ok(commit.clone())).expect("committed");
    session.checkpoint(later).expect("a checkpoint");
    let get = |name: Name| objects.get(&name, 1 << 20).expect("it is there");

    const HEADER: [(usize, &str); 12] = [
        (8, "magic"),
        (2, "version"),
        (2, "kind"),
        (2, "flags"),
        (2, "reserved"),
        (16, "repository"),
        (8, "n"),
        (32, "hash of the entry before"),
        (16, "session"),
        (16, "key"),
        (8, "written"),
        (4, "length of the body"),
    ];
    let entry = |name: &str, number: u64, body: &[(usize, &str)]| {
        let bytes = get(log::name(number));
        let told = parts(&bytes, &[&HEADER, body, &[(64, "signature")]].concat());
        example_in("repository-log.md", name, &format!("{}{told}", dump(&bytes)));
        bytes
    };
    entry("first entry", 0, &[(32, "maintenance key"), (16, "its domain")]);
    entry("session", 1, &[]);
    let commit_len = payload.len();
    entry(
        "commit",
        2,
        &[
            (16, "chain"),
            (1, "parent: none"),
            (1, "packs"),
            (32, "the first"),
            (1, "index segments"),
            (32, "the first"),
            (1, "base: none"),
            (1, "numbers of packs: no runs"),
            (7, "retain until"),
            (2, "length of the payload"),
            (commit_len, "payload: a box, of the point"),
        ],
    );
    let checkpoint = entry(
        "checkpoint",
        3,
        &[
            (1, "ordinal"),
            (8, "n, again"),
            (32, "hash of the entry before, again"),
            (1, "that hash is not in doubt"),
            (1, "no entry was passed over"),
            (32, "maintenance key"),
            (1, "checkpoints before"),
            (1, "the newest of them: none"),
            (32, "its hash: zeroes"),
            (1, "keys"),
            (32, "the first"),
            (16, "its domain"),
            (4, "number of the next session"),
            (1, "sessions"),
            (4, "number of the first"),
            (16, "session"),
            (16, "its key"),
            (16, "its domain"),
            (1, "opened in entry"),
            (1, "it is open"),
            (1, "its newest entry"),
            (32, "the hash of that"),
            (6, "when that was written"),
            (1, "objects of it that are known"),
            (1, "backups"),
            (1, "number of the first"),
            (16, "chain"),
            (1, "parent: none"),
            (16, "domain"),
            (16, "key"),
            (6, "written"),
            (7, "retain until"),
            (32, "hash of the entry"),
            (1, "required before, and not now: no runs"),
            (3, "required now: one run, from 0, of one"),
            (1, "number of the next object"),
            (1, "objects"),
            (1, "live, a pack; until when it is kept follows"),
            (6, "until then"),
            (32, "hash"),
            (1, "live, an index segment; until when it is kept follows"),
            (1, "until 0"),
            (32, "hash"),
            (1, "verified packs: no runs"),
            (1, "damaged"),
            (1, "reads"),
        ],
    );
    let pointer = get(Name::new("checkpoints/0000000000000000").expect("a name"));
    let told = parts(
        &pointer,
        &[
            (8, "magic"),
            (16, "repository"),
            (8, "ordinal"),
            (8, "n"),
            (32, "hash of that entry"),
            (64, "signature"),
        ],
    );
    assert_eq!(pointer[40..72], *blake3::hash(&checkpoint).as_bytes());
    example_in("repository-log.md", "pointer", &format!("{}{told}", dump(&pointer)));

    let read = Log::open(Arc::clone(&objects), verify, REPOSITORY, maintenance).expect("it opens");
    assert_eq!((read.state(), read.state().next()), (session.state(), 4));
    assert_eq!(read.payload(2).expect("the point"), payload);
}

use super::*;
use crate::error::ErrorKind;
use crate::{ChunkId, KeyRing, MasterKey, RepositoryId};
use proptest::prelude::*;
use std::cell::Cell;
use std::collections::BTreeMap;

#[derive(Debug, Default)]
struct Nodes {
    nodes: BTreeMap<ChunkId, Vec<u8>>,
    reads: Cell<usize>,
    writes: usize,
}

impl NodeSource for Nodes {
    fn node(&self, id: &ChunkId) -> Result<Vec<u8>, Error> {
        self.reads.set(self.reads.get() + 1);
        let missing = || Error::new(ErrorKind::Damaged, format!("tree node {id}"), "it is missing");
        self.nodes.get(id).cloned().ok_or_else(missing)
    }
}

impl NodeSink for Nodes {
    fn node(&mut self, id: ChunkId, encoded: &[u8]) -> Result<(), Error> {
        assert!(encoded.len() <= MAX_NODE);
        self.writes += 1;
        self.nodes.insert(id, encoded.to_vec());
        Ok(())
    }
}

/// New nodes beside those there are: source and sink at once.
#[derive(Debug, Default)]
struct New(Vec<(ChunkId, Vec<u8>)>);

impl NodeSink for New {
    fn node(&mut self, id: ChunkId, encoded: &[u8]) -> Result<(), Error> {
        self.0.push((id, encoded.to_vec()));
        Ok(())
    }
}

impl Nodes {
    fn take(&mut self, new: New) {
        for (id, encoded) in new.0 {
            NodeSink::node(self, id, &encoded).expect("memory takes it");
        }
    }
}

fn ring() -> KeyRing {
    KeyRing::new(RepositoryId([1; 16]), MasterKey::new([2; 32]))
}

fn chunk(number: u64) -> ChunkId {
    if number == 0 { ChunkId::ZERO } else { ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes()) }
}

fn change(nodes: &mut Nodes, tree: Tree, chunks: u64, changes: &BTreeMap<u64, u64>) -> Tree {
    let ring = ring();
    let domain = ring.writer().domain();
    let mut new = New::default();
    let tree = resize(domain, nodes, &mut new, tree, chunks).expect("resized");
    nodes.take(new);
    let mut new = New::default();
    let mut update = TreeUpdate::new(domain, nodes, tree).expect("a tree");
    for (index, number) in changes {
        update.set(*index, chunk(*number), &mut new).expect("changed");
    }
    let tree = update.finish(&mut new).expect("finished");
    nodes.take(new);
    tree
}

fn chunks_of(nodes: &Nodes, tree: Tree) -> BTreeMap<u64, ChunkId> {
    let steps = Walk::new(nodes, tree).expect("a tree");
    let chunks = steps.filter_map(|step| match step.expect("whole") {
        Step::Chunk { index, id } => Some((index, id)),
        Step::Node { .. } => None,
    });
    let chunks: Vec<_> = chunks.collect();
    assert!(chunks.is_sorted_by(|one, two| one.0 < two.0));
    chunks.into_iter().collect()
}

/// Disks around every size where the height changes.
fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..600, 65_530u64..65_545, (1u64 << 24) - 3..(1 << 24) + 4, Just(MAX_CHUNKS)]
}

/// Changes of a disk: clustered, scattered, to zero.
fn changes(chunks: u64) -> impl Strategy<Value = BTreeMap<u64, u64>> {
    let end = chunks.max(1);
    let near = (0..end, 0u64..300).prop_map(move |(start, more)| start.saturating_add(more).min(end - 1));
    let index = prop_oneof![0..end, near, (0..end.min(600))];
    proptest::collection::btree_map(index, 0u64..6, 0..40)
        .prop_map(move |changes| if chunks == 0 { BTreeMap::new() } else { changes })
}

fn histories() -> impl Strategy<Value = Vec<(u64, BTreeMap<u64, u64>)>> {
    let step = sizes().prop_flat_map(|chunks| (Just(chunks), changes(chunks)));
    proptest::collection::vec(step, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_tree_is_what_a_map_would_be(history in histories()) {
        let mut nodes = Nodes::default();
        let mut tree = Tree::zero(0);
        let mut twin = BTreeMap::<u64, ChunkId>::new();
        for (chunks, changes) in history {
            let (old, old_twin) = (tree, twin.clone());
            tree = change(&mut nodes, tree, chunks, &changes);
            twin.retain(|index, _| *index < chunks);
            twin.extend(changes.iter().map(|(index, number)| (*index, chunk(*number))));
            twin.retain(|_, id| !id.is_zero());
            prop_assert_eq!(&chunks_of(&nodes, tree), &twin);
            prop_assert_eq!(tree.root.is_zero(), twin.is_empty());

            // One content, one tree, however it came to be.
            let content = changes_from(&twin);
            let mut fresh = Nodes::default();
            let mut update = New::default();
            let again = build(&mut fresh, &mut update, chunks, &content);
            prop_assert_eq!(again, tree);

            let differences: Vec<_> =
                Differences::new(&nodes, old, tree).expect("trees").map(|one| one.expect("whole")).collect();
            let indexes = old_twin.keys().chain(twin.keys()).collect::<std::collections::BTreeSet<_>>();
            let at = |twin: &BTreeMap<u64, ChunkId>, index: &u64| twin.get(index).copied().unwrap_or(ChunkId::ZERO);
            let expected: Vec<_> = indexes
                .into_iter()
                .map(|index| Difference { index: *index, old: at(&old_twin, index), new: at(&twin, index) })
                .filter(|one| one.old != one.new)
                .collect();
            prop_assert_eq!(differences, expected);
            prop_assert_eq!(Differences::new(&nodes, tree, tree).expect("trees").count(), 0);
        }
    }

    #[test]
    fn a_part_of_a_walk_is_that_part(chunks in 1u64..70_000, changes in changes(70_000), start in 0u64..80_000, len in 0u64..2000) {
        let changes: BTreeMap<_, _> = changes.into_iter().filter(|(index, _)| *index < chunks).collect();
        let mut nodes = Nodes::default();
        let tree = change(&mut nodes, Tree::zero(0), chunks, &changes);
        let part: Vec<_> = Walk::range(&nodes, tree, start..start + len)
            .expect("a tree")
            .filter_map(|step| match step.expect("whole") {
                Step::Chunk { index, id } => Some((index, id)),
                Step::Node { .. } => None,
            })
            .collect();
        let expected: Vec<_> = chunks_of(&nodes, tree).range(start..start + len).map(|(i, id)| (*i, *id)).collect();
        prop_assert_eq!(part, expected);
    }

    #[test]
    fn no_bytes_make_a_node_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), level in 0u8..8) {
        if let Ok(node) = Node::parse(&bytes, level) {
            prop_assert_eq!(node.encode(), bytes);
        }
    }
}

fn changes_from(twin: &BTreeMap<u64, ChunkId>) -> Vec<(u64, ChunkId)> {
    twin.iter().map(|(index, id)| (*index, *id)).collect()
}

fn build(nodes: &mut Nodes, new: &mut New, chunks: u64, content: &[(u64, ChunkId)]) -> Tree {
    let ring = ring();
    let mut update = TreeUpdate::new(ring.writer().domain(), nodes, Tree::zero(chunks)).expect("a tree");
    for (index, id) in content {
        update.set(*index, *id, new).expect("changed");
    }
    update.finish(new).expect("finished")
}

#[test]
fn only_what_is_touched_is_read_and_written() {
    let chunks = 1 << 24;
    let mut nodes = Nodes::default();
    // A chunk in each of 1,000 nodes of the lowest level.
    let all: BTreeMap<_, _> = (0..1000).map(|index| (index * 256, index + 1)).collect();
    let old = change(&mut nodes, Tree::zero(0), chunks, &all);
    assert_eq!(nodes.nodes.len(), 1000 + 4 + 1);

    nodes.reads.set(0);
    nodes.writes = 0;
    let new = change(&mut nodes, old, chunks, &BTreeMap::from([(256, 5000), (257, 5001), (700, 5002)]));
    assert_eq!((nodes.reads.get(), nodes.writes), (4, 4), "two lowest nodes, one above, the root");

    nodes.reads.set(0);
    let differences = Differences::new(&nodes, old, new).expect("trees");
    assert_eq!(differences.map(|one| one.expect("whole").index).collect::<Vec<_>>(), [256, 257, 700]);
    assert_eq!(nodes.reads.get(), 8);

    // A disk that grew by a level shares all but the new top.
    nodes.writes = 0;
    let grown = change(&mut nodes, new, chunks + 1, &BTreeMap::new());
    assert_eq!(nodes.writes, 1);
    nodes.reads.set(0);
    assert_eq!(Differences::new(&nodes, new, grown).expect("trees").count(), 0);
    assert_eq!(nodes.reads.get(), 1);

    // The same chunk again is no change.
    nodes.writes = 0;
    assert_eq!(change(&mut nodes, new, chunks, &BTreeMap::from([(256, 5000)])), new);
    assert_eq!(nodes.writes, 0);
}

#[test]
fn a_walk_leaves_out_what_it_is_told_to() {
    let mut nodes = Nodes::default();
    let all: BTreeMap<_, _> = (0..4).map(|index| (index * 256, index + 1)).collect();
    let tree = change(&mut nodes, Tree::zero(0), 70_000, &all);
    nodes.reads.set(0);
    let mut walk = Walk::new(&nodes, tree).expect("a tree");
    let mut seen = Vec::new();
    while let Some(step) = walk.next() {
        match step.expect("whole") {
            Step::Node { level: 0, first_chunk: 256, .. } => walk.pass_over(),
            Step::Node { level, first_chunk, .. } => seen.push((u64::from(level) + 1000, first_chunk)),
            Step::Chunk { index, .. } => seen.push((index, index)),
        }
    }
    let chunk = |index| (index, index);
    let expected =
        [(1002, 0), (1001, 0), (1000, 0), chunk(0), (1000, 512), chunk(512), (1000, 768), chunk(768)];
    assert_eq!(seen, expected);
    assert_eq!(nodes.reads.get(), 5);
}

#[test]
fn chunks_out_of_order_or_behind_the_end_are_refused() {
    let (ring, nodes) = (ring(), Nodes::default());
    let mut update = TreeUpdate::new(ring.writer().domain(), &nodes, Tree::zero(10)).expect("a tree");
    let mut new = New::default();
    update.set(3, chunk(1), &mut new).expect("in order");
    for bad in [3, 2, 10, u64::MAX] {
        assert_eq!(update.set(bad, chunk(1), &mut new).expect_err("refused").kind, ErrorKind::Invalid);
    }
    update.set(9, chunk(1), &mut new).expect("in order");
}

#[test]
fn hostile_nodes_are_refused() {
    let mut nodes = Nodes::default();
    let tree = change(&mut nodes, Tree::zero(0), 300, &BTreeMap::from([(0, 1), (299, 2)]));
    let walks = |nodes: &Nodes, tree| -> Result<usize, Error> {
        Walk::new(nodes, tree)?.try_fold(0, |count, step| step.map(|_| count + 1))
    };
    assert_eq!(walks(&nodes, tree).expect("whole"), 5);
    // A root that says it is its own child never ends: it is of the wrong level there.
    let mut own = Node::parse(&nodes.nodes[&tree.root], 1).expect("whole");
    own.children[0] = tree.root;
    let mut cyclic = Nodes { nodes: nodes.nodes.clone(), ..Nodes::default() };
    cyclic.nodes.insert(tree.root, own.encode());
    assert_eq!(walks(&cyclic, tree).expect_err("refused").kind, ErrorKind::Damaged);
    // Behind the end of a disk there is nothing.
    let short = Tree { chunks: 299, ..tree };
    assert_eq!(walks(&nodes, short).expect_err("refused").kind, ErrorKind::Damaged);
    // A tree of another height than its disk needs.
    for chunks in [256, 65_537, MAX_CHUNKS, MAX_CHUNKS + 1, u64::MAX] {
        let error = walks(&nodes, Tree { chunks, ..tree }).expect_err("refused");
        assert_eq!(error.kind, ErrorKind::Damaged, "{chunks}");
    }
    for (id, whole) in &nodes.nodes {
        for bit in 0..whole.len() * 8 {
            let mut changed = whole.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            // Ids may be any; the rest has one form.
            if bit / 8 < 36 {
                let mut damaged = Nodes { nodes: nodes.nodes.clone(), ..Nodes::default() };
                damaged.nodes.insert(*id, changed);
                assert!(walks(&damaged, tree).is_err(), "{bit}");
            }
        }
        for length in 0..whole.len() {
            assert!((0..2).all(|level| Node::parse(&whole[..length], level).is_err()));
        }
    }
}

//! The guest: numbered blocks, several requests at once, and what it may expect to read.

use crate::world::{DISK_SIZE, DISKS, World};
use rand::Rng;
use rempart_engine::{DiskRange, ReadPiece, Reply, Token};
use rempart_types::DiskIndex;
use std::collections::BTreeMap;

pub const BLOCK: u64 = 4096;
const BLOCKS_PER_DISK: u64 = DISK_SIZE / BLOCK;

/// What the guest knows of one block: the tags it wrote, oldest first, and from which on it must find one.
#[derive(Debug, Default, Clone)]
struct Block {
    /// 0 is zeroes.
    tags: Vec<u64>,
    /// Index of the oldest tag that may still be read; everything before it is overwritten for good.
    floor: usize,
    /// Index of the newest acknowledged tag.
    acknowledged: usize,
    /// Index of the newest tag covered by an acknowledged flush.
    flushed: usize,
    busy: bool,
}

#[derive(Debug, Clone)]
enum Op {
    Write { block: u64, count: u64, fua: bool },
    Zero { block: u64, count: u64 },
    Read { block: u64 },
    Flush { covers: Vec<(u64, usize)> },
}

#[derive(Debug, Default)]
pub struct Guest {
    blocks: BTreeMap<u64, Block>,
    next_tag: u64,
    next_token: u64,
    /// Where the machine runs and is connected.
    connected: Option<usize>,
    home: Option<usize>,
    outstanding: BTreeMap<u64, Op>,
    /// Requests to be sent (again), in order.
    unsent: Vec<u64>,
    pub depth: usize,
    pub acknowledged_writes: u64,
    pub acknowledged_flushes: u64,
    pub reads: u64,
    /// Since the machine booted: unflushed writes may be lost.
    pub power_was_lost: bool,
    /// It takes what it reads for granted.
    pub gullible: bool,
    /// Only these blocks are touched.
    pub range: Option<(u64, u64)>,
}

impl Guest {
    fn block(&mut self, block: u64) -> &mut Block {
        self.blocks.entry(block).or_insert_with(|| Block { tags: vec![0], ..Block::default() })
    }

    pub fn is_connected(&self, node: usize) -> bool {
        self.connected == Some(node)
    }

    /// A new machine: it knows what must have survived.
    pub fn boot(&mut self, node: usize) {
        self.home = Some(node);
        self.connected = None;
        self.outstanding.clear();
        self.unsent.clear();
        let lost = std::mem::take(&mut self.power_was_lost);
        for block in self.blocks.values_mut() {
            block.busy = false;
            block.floor = if lost { block.flushed } else { block.acknowledged };
            block.floor = block.floor.max(block.flushed);
        }
    }

    pub fn machine_died(&mut self, node: usize) {
        if self.home == Some(node) {
            self.home = None;
            self.connected = None;
            self.outstanding.clear();
            self.unsent.clear();
        }
    }

    pub fn disconnected(&mut self, node: usize) {
        if self.connected == Some(node) {
            self.connected = None;
        }
    }

    /// The machine's disks answer again: what was under way is sent again, in order.
    pub fn connected(&mut self, node: usize) {
        assert_eq!(self.home, Some(node), "the machine runs elsewhere");
        self.connected = Some(node);
        let old = std::mem::take(&mut self.outstanding);
        self.unsent.clear();
        for (_, op) in old {
            let token = self.token();
            self.outstanding.insert(token, op);
            self.unsent.push(token);
        }
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// What each block may hold in a copy that has every acknowledged write, and none that is yet to be made.
    pub fn may_hold(&self) -> BTreeMap<u64, Vec<u64>> {
        let held = |block: &Block| block.tags[block.floor..].to_vec();
        self.blocks.iter().map(|(&number, block)| (number, held(block))).collect()
    }

    pub fn is_idle(&self) -> bool {
        self.outstanding.is_empty()
    }
}

pub fn content(tag: u64, block: u64) -> Vec<u8> {
    let pattern = [tag.to_le_bytes(), block.to_le_bytes()].concat();
    pattern.repeat(BLOCK as usize / pattern.len())
}

pub fn place(block: u64) -> (DiskIndex, u64) {
    (DiskIndex((block / BLOCKS_PER_DISK) as u16), block % BLOCKS_PER_DISK * BLOCK)
}

impl World {
    /// The guest's requests enter the engine.
    pub fn guest_turn(&mut self, node: usize) {
        if !self.guest.is_connected(node) || self.nodes[node].paused {
            return;
        }
        let mut tries = 0;
        while self.guest.outstanding.len() < self.guest.depth && tries < 20 {
            tries += 1;
            self.new_op();
        }
        if self.nodes[node].engine.as_ref().is_none_or(|engine| !engine.accepts_writes()) {
            return;
        }
        for token in std::mem::take(&mut self.guest.unsent) {
            self.send(node, token);
        }
    }

    fn new_op(&mut self) {
        let (first, end) = self.guest.range.unwrap_or((0, BLOCKS_PER_DISK * u64::from(DISKS)));
        let block = self.rng.random_range(first..end);
        let room = (BLOCKS_PER_DISK - block % BLOCKS_PER_DISK).min(end - block);
        let most = if self.rng.random_ratio(1, 20) { 40 } else { 3 };
        let count = self.rng.random_range(1..=room.min(most));
        let kind = self.rng.random_range(0..100);
        let writes = !(60..85).contains(&kind);
        let touched = if writes { block..block + count } else { block..block + 1 };
        if touched.clone().any(|block| self.guest.block(block).busy) {
            return;
        }
        let op = match kind {
            0..60 => Op::Write { block, count, fua: self.rng.random_ratio(1, 10) },
            60..75 => Op::Read { block },
            75..85 => Op::Flush { covers: self.flush_covers() },
            _ => Op::Zero { block, count },
        };
        self.start_op(op);
    }

    /// The guest writes this block.
    pub fn guest_writes(&mut self, node: usize, block: u64) {
        self.start_op(Op::Write { block, count: 1, fua: false });
        self.plan_turn(node);
    }

    pub fn guest_flushes(&mut self, node: usize) {
        let covers = self.flush_covers();
        self.start_op(Op::Flush { covers });
        self.plan_turn(node);
    }

    fn flush_covers(&self) -> Vec<(u64, usize)> {
        self.guest.blocks.iter().map(|(block, state)| (*block, state.acknowledged)).collect()
    }

    fn start_op(&mut self, op: Op) {
        match &op {
            &Op::Write { block, count, .. } => {
                for block in block..block + count {
                    self.guest.next_tag += 1;
                    let tag = self.guest.next_tag;
                    let state = self.guest.block(block);
                    state.tags.push(tag);
                    state.busy = true;
                }
            }
            &Op::Zero { block, count } => {
                for block in block..block + count {
                    let state = self.guest.block(block);
                    state.tags.push(0);
                    state.busy = true;
                }
            }
            Op::Read { block } => self.guest.block(*block).busy = true,
            Op::Flush { .. } => {}
        }
        let token = self.guest.token();
        self.guest.outstanding.insert(token, op);
        self.guest.unsent.push(token);
    }

    fn send(&mut self, node: usize, token: u64) {
        let op = self.guest.outstanding[&token].clone();
        let large = self.rng.random_ratio(1, 4);
        let discard = self.rng.random();
        let engine = self.nodes[node].engine.as_mut().expect("connected");
        let token = Token(token);
        match op {
            Op::Write { block, count, fua } => {
                let (disk, offset) = place(block);
                let mut bytes = Vec::new();
                for block in block..block + count {
                    let tag = *self.guest.blocks[&block].tags.last().expect("written");
                    bytes.extend_from_slice(&content(tag, block));
                }
                if large {
                    let mut buffer = engine.reserve(bytes.len()).expect("not too large");
                    buffer.payload_mut().copy_from_slice(&bytes);
                    engine.write_buffer(token, disk, offset, buffer, fua);
                } else {
                    engine.write(token, disk, offset, &bytes, fua);
                }
            }
            Op::Zero { block, count } => {
                let (disk, offset) = place(block);
                let range = DiskRange { disk, offset, length: count * BLOCK };
                if discard {
                    engine.discard(token, range, false);
                } else {
                    engine.write_zeroes(token, range, false, false);
                }
            }
            Op::Read { block } => {
                let (disk, offset) = place(block);
                engine.read(token, DiskRange { disk, offset, length: BLOCK });
            }
            Op::Flush { .. } => engine.flush(token),
        }
    }

    pub fn guest_reply(&mut self, node: usize, token: Token, reply: Reply) {
        if reply == Reply::Dropped {
            if self.guest.is_connected(node) {
                self.guest.disconnected(node);
                self.guest_reconnects(node);
            }
            return;
        }
        if !self.guest.is_connected(node) {
            return;
        }
        let Some(op) = self.guest.outstanding.remove(&token.0) else { return };
        let seed = self.seed;
        match (op, reply) {
            (Op::Write { block, count, fua }, Reply::Done) => {
                self.guest.acknowledged_writes += 1;
                for block in block..block + count {
                    let state = self.guest.block(block);
                    state.acknowledged = state.tags.len() - 1;
                    state.floor = state.acknowledged;
                    state.busy = false;
                    if fua {
                        state.flushed = state.acknowledged;
                    }
                }
            }
            (Op::Zero { block, count }, Reply::Done) => {
                for block in block..block + count {
                    let state = self.guest.block(block);
                    state.acknowledged = state.tags.len() - 1;
                    state.floor = state.acknowledged;
                    state.busy = false;
                }
            }
            (Op::Flush { covers }, Reply::Done) => {
                self.guest.acknowledged_flushes += 1;
                for (block, index) in covers {
                    let state = self.guest.block(block);
                    state.flushed = state.flushed.max(index);
                }
            }
            (Op::Read { block }, Reply::Data(pieces)) => {
                self.guest.reads += 1;
                let mut bytes = Vec::new();
                for piece in pieces {
                    match piece {
                        ReadPiece::Data(data) => bytes.extend_from_slice(&data),
                        ReadPiece::Zeroes(count) => bytes.resize(bytes.len() + count as usize, 0),
                    }
                }
                self.guest.block(block).busy = false;
                if !self.guest.gullible {
                    self.check_block(block, &bytes, "read by the guest");
                }
            }
            (_, Reply::Failed(_)) if self.guest.gullible => {}
            (op, reply) => panic!("seed {seed}: {op:?} was answered with {reply:?}"),
        }
        self.guest_thinks(node);
    }

    /// A block's content must be a version that may still be there; from then on no older one may.
    pub fn check_block(&mut self, block: u64, bytes: &[u8], what: &str) {
        let seed = self.seed;
        let tag = u64::from_le_bytes(bytes[..8].try_into().expect("a block"));
        let expected = if tag == 0 { vec![0; BLOCK as usize] } else { content(tag, block) };
        assert!(bytes == expected, "seed {seed}: block {block} is torn or misplaced: {what}");
        let state = self.guest.block(block);
        let found = (state.floor..state.tags.len()).find(|&index| state.tags[index] == tag);
        let Some(index) = found else {
            panic!(
                "seed {seed}: {what}: block {block} holds {tag}, must be one of {:?}",
                &state.tags[state.floor..]
            );
        };
        state.floor = index;
    }

    /// I1: every image holds, for each block, a version that an acknowledged flush or write allows.
    pub fn check_images(&mut self) {
        let blocks: Vec<u64> = self.guest.blocks.keys().copied().collect();
        for node in 0..self.nodes.len() {
            let images: Vec<Vec<u8>> = (0..DISKS).map(|disk| self.image(node, disk)).collect();
            for &block in &blocks {
                let (disk, offset) = place(block);
                let bytes = images[usize::from(disk.0)][offset as usize..(offset + BLOCK) as usize].to_vec();
                self.check_block(block, &bytes, &format!("image on {node}"));
            }
        }
    }

    /// The machine is gone: its connection's requests are given up.
    pub fn abandon_guest(&mut self, node: usize) {
        if let Some(engine) = &mut self.nodes[node].engine {
            let last = self.guest.next_token;
            let tokens: Vec<Token> = (last.saturating_sub(200)..=last).map(Token).collect();
            engine.abandon(&tokens);
        }
    }
}

//! A peer that says anything at all, in its own session: its partner may lose the copy, the session and patience, but
//! goes on.

use crate::world::{DISK_SIZE, DISKS, World, node_id};
use rand::Rng;
use rempart_cluster::Message as ClusterMessage;
use rempart_engine::{Bytes, Input, PeerMessage, Status};
use rempart_replication::{Digest, ExtentPiece, LogState, Message, Region, RegionBits, ResyncMode, Syncing};
use rempart_types::{
    DiskIndex, EXTENT_SIZE, Epoch, ExtentIndex, Lineage, LogPosition, Lsn, MonotonicTime, NodeSet,
    RegisterId, Term,
};
use serde::Serialize;
use std::time::Duration;

/// Of the messages that carry cluster's and replication's in `rempart_engine`.
const CLUSTER: u8 = 0;
const REPLICATION: u8 = 1;

struct Liar<'a> {
    world: &'a mut World,
    /// Whom it lies to.
    to: usize,
    /// Of its messages with extents.
    sequence: u64,
}

impl Liar<'_> {
    fn one_of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.world.rng.random_range(0..choices.len())].clone()
    }

    fn lsn(&mut self) -> Lsn {
        let status = self.world.engine(self.to).status(MonotonicTime(self.world.now));
        let end = status.end.0;
        let near = end.saturating_sub(3) + self.world.rng.random_range(0..6);
        let known = [status.applied, status.stable, status.committed, status.durable, status.end];
        let number = self.world.rng.random_range(0..end + 2);
        let odd = self.one_of(&[Lsn(0), Lsn(1), Lsn(number), Lsn(u64::MAX), Lsn(u64::MAX - 1)]);
        let known = self.one_of(&known);
        self.one_of(&[known, known, Lsn(near), Lsn(near), odd])
    }

    fn term(&mut self) -> Term {
        let term = self.world.engine(self.to).status(MonotonicTime(self.world.now)).term;
        let above = Term { incarnation: term.incarnation + 1, ..term };
        let below = Term { epoch: Epoch(term.epoch.0.saturating_sub(1)), ..term };
        self.one_of(&[term, term, term, term, term, above, below])
    }

    fn lineage(&mut self) -> Lineage {
        let mut lineage = self.world.engine(self.to).lineage().clone();
        lineage.truncate(self.lsn());
        self.one_of(&[lineage.clone(), lineage, Lineage::new()])
    }

    fn position(&mut self, lineage: &Lineage) -> LogPosition {
        let lsn = self.lsn();
        let (right, wrong) = (lineage.position(lsn), LogPosition { term: self.term(), lsn });
        if self.world.rng.random_ratio(4, 5) { right.unwrap_or(wrong) } else { wrong }
    }

    fn region(&mut self) -> Region {
        let disk = self.one_of(&[0, 0, 0, 1, 1, DISKS, u16::MAX]);
        let index = self.one_of(&[0, 0, 0, 0, 0, 1, u64::MAX]);
        Region { disk: DiskIndex(disk), index }
    }

    /// As leaders and targets name them: small for its own, and the leader's next ones.
    fn round(&mut self) -> u64 {
        let Term { epoch, incarnation } = self.term();
        if self.world.primary() != Some(self.to) {
            return self.one_of(&[1, 1, 1, 1, 2]);
        }
        let number = self.world.rng.random_range(1..4);
        let leaders = (epoch.0 << 24) | (u64::from(incarnation & 0xff) << 16) | number;
        self.one_of(&[number, leaders])
    }

    fn syncing(&mut self) -> Option<Syncing> {
        let lineage = self.lineage();
        let syncing = Syncing {
            base: self.position(&lineage),
            whole: self.world.rng.random(),
            levels: vec![(self.region(), self.position(&lineage))],
        };
        self.one_of(&[None, None, Some(syncing)])
    }

    fn state(&mut self) -> LogState {
        let rarely = |liar: &mut Self| liar.world.rng.random_ratio(1, 8);
        LogState {
            lineage: self.lineage(),
            end: self.lsn(),
            durable: self.lsn(),
            stable: self.lsn(),
            applied: self.lsn(),
            wrote_alone: rarely(self),
            image_unknown: rarely(self),
            blank_start: !rarely(self),
            may_overwrite: self.world.rng.random(),
            syncing: self.syncing(),
        }
    }

    fn extents(&mut self, region: Region) -> (Vec<ExtentPiece>, Vec<u8>) {
        let (mut pieces, mut payload) = (Vec::new(), Vec::new());
        for _ in 0..self.world.rng.random_range(0..4) {
            let extent = self.world.rng.random_range(0..DISK_SIZE / EXTENT_SIZE);
            let extent = self.one_of(&[extent, extent, extent, extent, u64::MAX]);
            let length = self.one_of(&[0, EXTENT_SIZE as u32, EXTENT_SIZE as u32, EXTENT_SIZE as u32, 7]);
            let lsn = self.lsn();
            payload.resize(payload.len() + length as usize, 0x5a);
            pieces.push(ExtentPiece { disk: region.disk, extent: ExtentIndex(extent), lsn, length });
        }
        (pieces, payload)
    }

    /// What a leader says.
    fn order(&mut self, kind: u32) -> (Message, Vec<u8>) {
        let (term, round) = (self.term(), self.round());
        let (a, b, c) = (self.lsn(), self.lsn(), self.lsn());
        let yes = self.world.rng.random();
        let mut payload = Vec::new();
        let message = match kind {
            0 => Message::Probe { term },
            1 => Message::Truncate { term, to: a, stable: b },
            2 => {
                let lineage = self.lineage();
                let base = self.position(&lineage);
                let mode = if yes { ResyncMode::Changed } else { ResyncMode::Compare };
                Message::ResyncBegin { term, round, base, mode, restart: self.world.rng.random() }
            }
            3 => {
                let lineage = self.lineage();
                let at = self.position(&lineage);
                Message::ResyncFrom { term, round, at, chain: None, lineage }
            }
            4 => {
                let region = self.region();
                let (pieces, bytes) = self.extents(region);
                payload = bytes;
                self.sequence += 1;
                let sequence = self.one_of(&[self.sequence, self.sequence, self.sequence, 1]);
                Message::ResyncExtents { term, round, sequence, region, pieces, last: yes }
            }
            5 => Message::Stable { term, stable: a },
            6 => Message::Sync { term, upto: a },
            7 => Message::Pull { term, from: a },
            8 => {
                payload = vec![3; 4096 * usize::from(yes)];
                Message::Append { term, written: self.term(), first: a, last: b, stable: c, sync: yes }
            }
            _ => Message::ResyncFailed { term, round },
        };
        (message, payload)
    }

    /// What a follower says.
    fn answer(&mut self) -> (Message, Vec<u8>) {
        let (term, round) = (self.term(), self.round());
        let (a, b, c) = (self.lsn(), self.lsn(), self.lsn());
        let (yes, sequence) = (self.world.rng.random(), self.world.rng.random_range(0..4));
        let mut payload = Vec::new();
        let message = match self.world.rng.random_range(0..12) {
            0 | 1 => Message::State { term, state: Box::new(self.state()) },
            2 => {
                let promise = self.one_of(&[term.epoch, term.epoch.next(), Epoch(0), Epoch(u64::MAX)]);
                Message::Refused { term, promise }
            }
            3 => Message::Truncated { term, end: a },
            4 => Message::Ack { term, accepted: a, durable: b, applied: c, whole: yes },
            5 => {
                payload = vec![3; 4096];
                Message::Pulled { term, written: self.term(), first: a, last: b }
            }
            6 => Message::ResyncReady { term, round },
            7 | 8 => {
                let region = self.region();
                let changed = RegionBits(vec![0xff; self.world.rng.random_range(0..200)]);
                let digests = yes.then(|| vec![Digest([7; 32]); self.world.rng.random_range(0..40)]);
                Message::ResyncRegion { term, round, region, since: a, changed, digests }
            }
            9 => Message::ResyncTaken { term, round, sequence },
            10 => Message::ResyncLog { term, round, at: a },
            _ => Message::ResyncFailed { term, round },
        };
        (message, payload)
    }

    /// Some sentences on one subject. False if there is no session to lie in.
    fn talk(&mut self) -> bool {
        const DIALOGUES: [&[u32]; 6] = [
            &[0, 1],
            &[0, 1, 2],
            &[0, 2, 3, 4, 4, 4],
            &[0, 2, 3, 4, 4, 4, 2, 3],
            &[2, 3, 4],
            &[5, 6, 7, 8, 9],
        ];
        if self.world.rng.random_ratio(1, 20) {
            let claim = self.claim();
            return self.say_in(CLUSTER, &claim, Vec::new());
        }
        let leads = self.world.primary() != Some(self.to);
        if !leads || self.world.rng.random_ratio(1, 10) {
            let (message, payload) = self.answer();
            return self.say(message, payload);
        }
        self.sequence = 0;
        let script = self.one_of(&DIALOGUES);
        let in_order = self.world.rng.random_ratio(3, 4);
        script.iter().all(|&kind| {
            let other = self.world.rng.random_range(0..10);
            let (message, payload) = self.order(if in_order { kind } else { other });
            let said = self.say(message, payload);
            let pause = self.world.rng.random_range(0..3_000);
            self.world.run_for(Duration::from_micros(pause));
            said
        })
    }

    /// What it says of who leads.
    fn claim(&mut self) -> ClusterMessage {
        let status = self.world.engine(self.to).status(MonotonicTime(self.world.now));
        let (term, now) = (self.term(), self.world.now);
        let no_epoch = Term { epoch: Epoch(u64::MAX), ..term };
        let above = Term { epoch: term.epoch.next(), ..term };
        let term = self.one_of(&[term, term, term, above, no_epoch]);
        let sent_ns = self.one_of(&[now, now, 0, u64::MAX]);
        let register = status.register.unwrap_or(RegisterId(1));
        let peer = node_id(1 - self.to);
        let in_sync = self.one_of(&[NodeSet::only(peer), NodeSet::default(), status.in_sync]);
        let (epoch, promise) = (term.epoch, term.epoch);
        match self.world.rng.random_range(0..8) {
            0..3 => ClusterMessage::Beacon { register, term, sent_ns, in_sync },
            3 => ClusterMessage::BeaconAck { term, sent_ns },
            4 => ClusterMessage::Nack { term, promise },
            5 => ClusterMessage::YourTurn { epoch },
            6 => ClusterMessage::StepAside { term },
            _ => ClusterMessage::Hello { register: Some(register), promise },
        }
    }

    fn say(&mut self, message: Message, payload: Vec<u8>) -> bool {
        self.say_in(REPLICATION, &message, payload)
    }

    fn say_in(&mut self, kind: u8, message: &impl Serialize, payload: Vec<u8>) -> bool {
        let peer = 1 - self.to;
        let Some(session) = self.world.session() else { return false };
        if !self.world.is_up(self.to) {
            return false;
        }
        let mut meta = vec![kind];
        meta.extend(postcard::to_allocvec(message).expect("encodes"));
        let message = PeerMessage::decode(&meta, Bytes::from(payload)).expect("well-formed");
        self.world.feed(self.to, Input::Message { peer: node_id(peer), session, message });
        true
    }
}

/// A pair with an idle guest, whose logs are durable only a second after they grew, unless asked for.
fn idle_pair(seed: u64) -> World {
    let mut world = World::new(seed, 2);
    world.limits.sync_delay = Duration::from_secs(1);
    world.guest.depth = 3;
    world.mirrored();
    world.run_for(Duration::from_millis(300));
    world.guest.depth = 0;
    world.run_until("idle", Duration::from_secs(10), |w| w.guest.is_idle());
    world
}

/// Lets the follower's log grow until some of it is not durable there.
fn grow(world: &mut World, more: u64) {
    let goal = status(world, 1).durable.0.max(status(world, 1).end.0) + more;
    world.guest.depth = 8;
    world.run_until("the log grows", Duration::from_secs(10), |w| {
        let status = status(w, 1);
        status.end.0 >= goal && status.durable < status.accepted && status.accepted == status.end
    });
    world.guest.depth = 0;
}

fn status(world: &World, node: usize) -> Status {
    world.engine(node).status(MonotonicTime(world.now))
}

fn tell_follower(world: &mut World, message: Message) {
    assert!(Liar { world, to: 1, sequence: 0 }.say(message, Vec::new()), "there is a session");
}

#[test]
fn a_peer_that_claims_the_same_epoch_is_hung_up_on() {
    let mut world = idle_pair(4);
    let Status { term, register, .. } = status(&world, 0);
    let register = register.expect("the group was created");
    for epoch in [term.epoch, Epoch(u64::MAX)] {
        world.run_until("connected", Duration::from_secs(10), |w| w.session().is_some());
        let session = world.session();
        let (term, in_sync) = (Term { epoch, ..term }, NodeSet::only(node_id(1)));
        let claim = ClusterMessage::Beacon { register, term, sent_ns: world.now, in_sync };
        assert!(Liar { world: &mut world, to: 0, sequence: 0 }.say_in(CLUSTER, &claim, Vec::new()));
        world.run_for(Duration::from_millis(50));
        assert_ne!(world.session(), session, "who says so is not talked to");
        assert_eq!(world.primary(), Some(0), "it goes on leading");
    }
    crate::settle(&mut world);
}

#[test]
fn a_truncation_to_anywhere_stops_no_engine() {
    let mut world = idle_pair(1);
    for _ in 0..15 {
        grow(&mut world, 1);
        let Status { term, stable, end, .. } = status(&world, 1);
        // Most of these are inside a batch, which is kept or dropped whole.
        let to = Lsn(world.rng.random_range(stable.0..=end.0));
        // What came of the last lie may have ended the session meanwhile.
        let mut liar = Liar { world: &mut world, to: 1, sequence: 0 };
        liar.say(Message::Probe { term }, Vec::new());
        liar.say(Message::Truncate { term, to, stable }, Vec::new());
        world.run_until("mirrored", Duration::from_secs(60), |w| w.in_sync() == 2 && w.session().is_some());
    }
    crate::settle(&mut world);
}

#[test]
fn a_resync_to_the_end_of_all_numbers_is_refused() {
    let mut world = idle_pair(2);
    let (term, round) = (status(&world, 1).term, 1);
    let base = LogPosition::default();
    tell_follower(&mut world, Message::Probe { term });
    let mode = ResyncMode::Changed;
    tell_follower(&mut world, Message::ResyncBegin { term, round, base, mode, restart: true });
    world.run_for(Duration::from_millis(50));
    let session = world.session();
    let lineage = world.engine(1).lineage().clone();
    let at = lineage.position(Lsn(u64::MAX)).expect("the last term goes on for ever");
    tell_follower(&mut world, Message::ResyncFrom { term, round, at, chain: None, lineage });
    world.run_for(Duration::from_millis(50));
    assert_ne!(world.session(), session, "who says so is not talked to");
    crate::settle(&mut world);
}

/// The records that a resync's end waits for become durable just when the next one has begun.
#[test]
fn a_resync_that_begins_before_the_last_one_ended_stops_no_engine() {
    let mut world = idle_pair(3);
    world.run_until("applied", Duration::from_secs(10), World::is_settled);
    let (term, round) = (status(&world, 1).term, 1);
    let lineage = world.engine(1).lineage().clone();
    let at = lineage.position(status(&world, 1).end).expect("it has records");
    let (mode, base) = (ResyncMode::Changed, at);
    tell_follower(&mut world, Message::Probe { term });
    tell_follower(&mut world, Message::ResyncBegin { term, round, base, mode, restart: true });
    world.run_for(Duration::from_millis(50));
    tell_follower(&mut world, Message::ResyncFrom { term, round, at, chain: None, lineage });
    world.run_for(Duration::from_millis(50));
    for disk in 0..DISKS {
        let region = Region { disk: DiskIndex(disk), index: 0 };
        // A hole, which needs a record that is not there yet.
        let (extent, lsn) = (ExtentIndex(0), at.lsn.plus(2));
        let pieces = vec![ExtentPiece { disk: region.disk, extent, lsn, length: 0 }];
        let sequence = u64::from(disk) + 1;
        let message = Message::ResyncExtents { term, round, sequence, region, pieces, last: true };
        tell_follower(&mut world, message);
        world.run_for(Duration::from_millis(50));
    }
    grow(&mut world, 2);
    let (term, round) = (status(&world, 1).term, 2);
    tell_follower(&mut world, Message::ResyncBegin { term, round, base, mode, restart: true });
    world.run_for(Duration::from_millis(50));
    assert_eq!(status(&world, 1).durable, status(&world, 1).end, "they became durable");
}

#[test]
fn no_message_of_a_peer_stops_an_engine() {
    for seed in crate::seeds() {
        let mut world = World::new(seed, 2);
        // Some of the log is not durable for a while, so that it could be cut.
        world.limits.sync_delay = Duration::from_millis(200);
        world.guest.depth = 1;
        // What it reads may be the liar's.
        world.guest.gullible = true;
        world.mirrored();
        let mut lies = 0;
        for _ in 0..1_000 {
            let to = world.rng.random_range(0..2);
            lies += u32::from(Liar { world: &mut world, to, sequence: 0 }.talk());
            let most = if world.rng.random_ratio(1, 60) { 3_000 } else { 20 };
            let pause = world.rng.random_range(0..most);
            world.run_for(Duration::from_millis(pause));
        }
        assert!(lies > 100, "seed {seed}: {lies} lies were told");
    }
}

//! The log on objects in memory, one story a test.

use super::body::{Boot, Commit, Condemn, Read, Segment, Undelete};
use super::entry::{self, Header};
use super::numbers::pages_in_memory;
use super::sign::Ed25519;
use super::*;
use crate::{
    ChainId, DomainId, EntryHash, PackId, PackName, RepositoryId, SIGNATURE, SegmentId, SessionId, Verifier,
    WrappedKeyId,
};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use rempart_objects::{Created, Error, ErrorKind, Front, Memory, Name, Objects};
use rempart_types::WallTime;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

const REPOSITORY: RepositoryId = RepositoryId([7; 16]);
pub(crate) const NOW: WallTime = WallTime(1000);

const OWNER: DomainId = DomainId([1; 16]);

#[derive(Debug)]
struct SigningKey(Ed25519KeyPair);

impl Sign for SigningKey {
    fn verifier(&self) -> Verifier {
        Verifier(self.0.public_key().as_ref().try_into().unwrap())
    }

    fn sign(&self, message: &[u8]) -> [u8; SIGNATURE] {
        self.0.sign(message).as_ref().try_into().unwrap()
    }
}

fn key(secret: u8) -> Arc<SigningKey> {
    Arc::new(SigningKey(Ed25519KeyPair::from_seed_unchecked(&[secret; 32]).unwrap()))
}

fn owner() -> Arc<SigningKey> {
    key(1)
}

fn create(objects: &Arc<dyn Objects>) {
    let objects = Arc::clone(objects);
    Log::create(objects, Arc::new(Ed25519), REPOSITORY, &*owner(), OWNER, NOW).expect("it is created");
}

pub(crate) fn memory() -> Arc<dyn Objects> {
    let objects: Arc<dyn Objects> = Arc::new(Memory::default());
    create(&objects);
    objects
}

pub(crate) fn open(objects: &Arc<dyn Objects>) -> Log {
    Log::open(Arc::clone(objects), Arc::new(Ed25519), REPOSITORY, owner().verifier()).expect("it is opened")
}

fn session_of(objects: &Arc<dyn Objects>, signer: &Arc<SigningKey>, id: u8) -> Session {
    let signer = Arc::clone(signer) as Arc<dyn Sign>;
    Session::open(open(objects), signer, SessionId([id; 16]), NOW).expect("the session is opened")
}

pub(crate) fn session(objects: &Arc<dyn Objects>, id: u8) -> Session {
    session_of(objects, &owner(), id)
}

pub(crate) fn packs(ids: &[u8]) -> Segment {
    Segment { packs: ids.iter().map(|id| PackId([*id; 32])).collect(), indexes: Vec::new() }
}

pub(crate) fn numbers(of: impl IntoIterator<Item = Number>) -> Numbers {
    of.into_iter().collect()
}

pub(crate) fn commit_of(packs: Numbers) -> Commit {
    Commit {
        chain: ChainId([3; 16]),
        parent: None,
        segment: Segment::default(),
        base: None,
        packs,
        retain_until: None,
        payload: b"sealed".to_vec(),
    }
}

pub(crate) fn commit(session: &mut Session, commit: &Commit) -> Result<Appended, LogError> {
    session.commit(NOW, |_| Ok(commit.clone()))
}

fn condemn(session: &mut Session, objects: Numbers) -> Result<Appended, LogError> {
    let condemn = Condemn { objects, followed: false, survivors: Numbers::new() };
    session.condemn(NOW, |_| Ok(condemn.clone()))
}

fn undelete(root: u64, packs: Numbers) -> Undelete {
    Undelete {
        root,
        chain: ChainId([3; 16]),
        parent: None,
        domain: OWNER,
        key: owner().verifier().id(),
        written: NOW,
        packs,
        retain_until: None,
        payload: b"sealed".to_vec(),
    }
}

/// Puts an entry into the next slot whatever the rules say, as a hostile writer does.
fn force(objects: &Arc<dyn Objects>, signer: &SigningKey, session: u8, body: &Body) -> u64 {
    let log = open(objects);
    let header = Header {
        repository: REPOSITORY,
        number: log.state().next(),
        previous: log.state().head,
        session: SessionId([session; 16]),
        key: signer.verifier().id(),
        written: NOW,
    };
    put(objects, header.number, &entry::encode(&header, body, signer));
    header.number
}

pub(crate) fn put(objects: &Arc<dyn Objects>, number: u64, bytes: &[u8]) {
    let created = objects.create(&name(number), &[bytes], None).expect("memory does not fail");
    assert_eq!(created, Created::New);
}

fn refusal<T: std::fmt::Debug>(result: Result<T, LogError>) -> Refusal {
    match result {
        Err(LogError::Refused(refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

fn last_remark(objects: &Arc<dyn Objects>) -> Remark {
    open(objects).remarks().last().expect("something counts for nothing").1.clone()
}

#[test]
fn a_backup_is_found_again() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, packs(&[10, 11])).unwrap();
    let index = SegmentId([5; 32]);
    let segment = Segment { indexes: vec![index], ..packs(&[12]) };
    let appended = commit(&mut writer, &Commit { segment, ..commit_of(numbers([0])) }).unwrap();
    let log = writer.end(NOW).unwrap();
    assert_eq!(log.state(), open(&objects).state());
    assert_eq!(log.state().contradiction(), None);

    let (number, root) = log.state().latest(ChainId([3; 16])).expect("a backup");
    assert_eq!((number, root.hash), (appended.number, appended.hash));
    assert_eq!(root.required, numbers([0, 2]));
    assert_eq!(log.payload(number).unwrap(), b"sealed");
    assert_eq!(log.state().live(), numbers(0..=3));
    assert_eq!(log.state().status(SessionId([1; 16]), Content::Index(index)), Some(Status::Live));
    assert!(!log.state().session_is_open(SessionId([1; 16])));
}

/// Rules 1 and 5: else a root lands just after the condemnation of its pack.
#[test]
fn a_commit_is_validated_again_when_its_slot_is_lost() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, packs(&[10])).unwrap();
    let mut collector = session(&objects, 2);
    let mut asked = Vec::new();
    let result = writer.commit::<LogError>(NOW, |state| {
        asked.push(state.next());
        if asked.len() == 1 {
            // Condemned between validation and creation.
            condemn(&mut collector, numbers([0])).unwrap();
        }
        Ok(commit_of(if asked.len() == 1 { numbers([0]) } else { state.live() }))
    });
    assert_eq!(asked.len(), 2, "the condemnation came first");
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(refusal(commit(&mut writer, &commit_of(numbers([0])))), Refusal::NotFit(0));
}

/// Rule 5: a pack that was condemned, deleted and cleared looks clean, and one that nobody named looks like that, too.
#[test]
fn a_commit_requires_live_packs_only() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, packs(&[10])).unwrap();
    assert_eq!(refusal(commit(&mut writer, &commit_of(numbers([1])))), Refusal::NotFit(1));
    let log = writer.end(NOW).unwrap();
    drop(log);
    let mut collector = session(&objects, 2);
    condemn(&mut collector, numbers([0])).unwrap();
    assert_eq!(refusal(commit(&mut collector, &commit_of(numbers([0])))), Refusal::NotFit(0));
    collector.gone(NOW, |_| numbers([0])).unwrap();
    assert_eq!(collector.state().object(0), None, "its session is over");
    assert_eq!(refusal(commit(&mut collector, &commit_of(numbers([0])))), Refusal::NotFit(0));
}

/// Rule 3: else a lease expires, the collector marks, the slow writer commits, the collector deletes.
#[test]
fn who_spoke_meanwhile_is_not_taken_for_dead() {
    let objects = memory();
    let mut slow = session(&objects, 1);
    let mut other = session(&objects, 2);
    let silent_since = other.state().session(slow.id()).unwrap().last;
    slow.segment(NOW, packs(&[10])).unwrap();
    let spoke = other.fence_silent(NOW, slow.id(), silent_since);
    assert_eq!(refusal(spoke), Refusal::Spoke(slow.id()));
    slow.segment(NOW, packs(&[11])).expect("it is there");
    other.refresh().unwrap();
    let silent_since = other.state().session(slow.id()).unwrap().last;
    other.fence_silent(NOW, slow.id(), silent_since).expect("it is silent");
    assert_eq!(refusal(slow.segment(NOW, packs(&[12]))), Refusal::SessionOver(slow.id()));
}

#[test]
fn a_fenced_session_makes_nothing_live() {
    let objects = memory();
    let mut slow = session(&objects, 1);
    slow.segment(NOW, packs(&[10])).unwrap();
    let mut other = session(&objects, 2);
    other.fence(NOW, SessionId([1; 16])).unwrap();
    let over = Refusal::SessionOver(SessionId([1; 16]));
    assert_eq!(refusal(slow.segment(NOW, packs(&[11]))), over);
    assert_eq!(refusal(commit(&mut slow, &commit_of(numbers([0])))), over);
    assert_eq!(refusal(other.fence(NOW, SessionId([1; 16]))), over, "once is enough");
    slow.end(NOW).expect("it is over all the same");
}

/// Rule 4.
#[test]
fn a_pack_is_named_once() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, packs(&[10])).unwrap();
    let again = Refusal::NamedBefore(Content::Pack(PackId([10; 32])));
    assert_eq!(refusal(writer.segment(NOW, packs(&[10]))), again);
    assert_eq!(
        refusal(writer.segment(NOW, packs(&[11, 11]))),
        Refusal::NamedBefore(Content::Pack(PackId([11; 32])))
    );
    let mut collector = session(&objects, 2);
    condemn(&mut collector, numbers([0])).unwrap();
    collector.gone(NOW, |_| numbers([0])).unwrap();
    assert_eq!(refusal(writer.segment(NOW, packs(&[10]))), again, "not even once it is gone");
    collector.segment(NOW, packs(&[10])).expect("another session's pack is another object");
}

/// Rule 7, as far as the log itself can tell.
#[test]
fn what_a_backup_requires_is_condemned_only_by_who_followed_its_trees() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, packs(&[10, 11])).unwrap();
    let root = commit(&mut writer, &commit_of(numbers([0]))).unwrap().number;
    let next = Commit { base: Some(root), ..commit_of(Numbers::new()) };
    let later = commit(&mut writer, &next).unwrap().number;
    assert_eq!(refusal(condemn(&mut writer, numbers([0]))), Refusal::Required(root));
    let followed = Condemn { objects: numbers([0]), followed: true, survivors: numbers([1]) };
    writer.condemn::<LogError>(NOW, |_| Ok(followed.clone())).unwrap();
    for number in [root, later] {
        assert_eq!(writer.state().roots()[&number].required, numbers([1]));
    }
    assert_eq!(writer.state().contradiction(), None);
    let itself = Condemn { objects: numbers([1]), followed: true, survivors: numbers([1]) };
    assert_eq!(refusal(writer.condemn::<LogError>(NOW, |_| Ok(itself.clone()))), Refusal::Nothing);
}

#[test]
fn an_agent_writes_into_its_domain_and_maintains_nothing() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, packs(&[10])).unwrap();
    let root = commit(&mut writer, &commit_of(numbers([0]))).unwrap().number;
    let agent = key(2);
    writer.register(NOW, Key { public: agent.verifier(), domain: DomainId([4; 16]) }).unwrap();

    let mut own = session_of(&objects, &agent, 2);
    own.segment(NOW, packs(&[20])).unwrap();
    commit(&mut own, &commit_of(numbers([1]))).unwrap();
    assert_eq!(refusal(commit(&mut own, &commit_of(numbers([0])))), Refusal::NotFit(0), "another domain");
    let based = Commit { base: Some(root), ..commit_of(Numbers::new()) };
    assert_eq!(refusal(commit(&mut own, &based)), Refusal::OtherDomain(root));
    writer.verified(NOW, numbers([0])).unwrap();
    commit(&mut own, &commit_of(numbers([0]))).expect("it was verified");

    // What it writes nevertheless counts for nothing, and those who follow go on behind it.
    let before = open(&objects).state().clone();
    let bodies = [
        Body::Undelete(undelete(1, numbers([1]))),
        Body::Condemn(Condemn { objects: numbers([1]), followed: true, survivors: Numbers::new() }),
        Body::Fence(SessionId([1; 16])),
        Body::Forget(vec![root]),
        Body::Gone(numbers([1])),
        Body::Verified(numbers([1])),
        Body::Read(Read { roots: vec![root], payload: Vec::new() }),
        Body::Boot(Boot { root, payload: vec![1] }),
        Body::Revoke(agent.verifier().id()),
        Body::Key(Key { public: key(5).verifier(), domain: OWNER }),
        Body::Damaged(Damaged { settles: Vec::new(), payload: vec![1] }),
        Body::Checkpoint(Checkpoint { ordinal: 0, state: before.encode() }),
        Body::Create(Create { maintenance: agent.verifier(), domain: OWNER }),
    ];
    for body in &bodies {
        force(&objects, &agent, 2, body);
        assert!(matches!(last_remark(&objects), Remark::Refused(..)), "{body:?}");
    }
    let mut after = open(&objects).state().clone();
    assert_eq!(after.next(), before.next() + bodies.len() as u64);
    (after.next, after.head) = (before.next, before.head);
    assert_eq!(after, before);
    own.refresh().unwrap();
    commit(&mut own, &commit_of(numbers([1]))).expect("the log goes on");

    let mut again = session_of(&objects, &agent, 3);
    again.fence(NOW, SessionId([2; 16])).expect("its own session of before");
    writer.revoke(NOW, agent.verifier().id()).unwrap();
    again.refresh().unwrap();
    assert!(!again.state().session_is_open(SessionId([3; 16])));
    let by_revoked = force(&objects, &agent, 3, &Body::End);
    assert_eq!(open(&objects).remarks().last().unwrap().0, by_revoked);
}

#[test]
fn the_maintenance_key_puts_into_any_domain_and_others_into_their_own() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    let (agent, agents) = (key(2), DomainId([4; 16]));
    writer.register(NOW, Key { public: agent.verifier(), domain: agents }).unwrap();
    let number = writer.within::<_, LogError>(agents, SessionId([9; 16]), NOW, |beside| {
        beside.segment(NOW, packs(&[30]))?;
        Ok(beside.state().number(beside.id(), Content::Pack(PackId([30; 32]))))
    });
    assert_eq!(number.unwrap(), Some(0));
    let owner_of = |state: &State| {
        let owner = state.owner(&state.object(0).expect("known"));
        (owner.id, owner.domain, owner.is_over)
    };
    assert_eq!(owner_of(writer.state()), (SessionId([9; 16]), agents, true));
    // The one that it was done beside goes on, in its own domain.
    writer.segment(NOW, packs(&[40])).unwrap();
    assert_eq!(refusal(commit(&mut writer, &commit_of(numbers([0])))), Refusal::NotFit(0));
    let mut own = session_of(&objects, &agent, 2);
    commit(&mut own, &commit_of(numbers([0]))).expect("it is of its domain");
    assert_eq!(refusal(commit(&mut own, &commit_of(numbers([1])))), Refusal::NotFit(1));
    // One in which the work fails is over as well.
    let failed = writer.within::<(), _>(agents, SessionId([8; 16]), NOW, |beside| {
        beside.segment(NOW, packs(&[31]))?;
        Err(LogError::Contended(7))
    });
    assert!(matches!(failed, Err(LogError::Contended(7))), "{failed:?}");
    assert!(!writer.state().session_is_open(SessionId([8; 16])));
    assert_eq!(writer.id(), SessionId([1; 16]));
    writer.segment(NOW, packs(&[41])).unwrap();

    // Who may only add names no domain, not even its own.
    for domain in [OWNER, agents, DomainId([5; 16])] {
        force(&objects, &agent, 7, &Body::Session(Some(domain)));
        let remark = last_remark(&objects);
        assert!(matches!(remark, Remark::Refused(_, Refusal::Maintenance(_))), "{remark:?}");
        assert_eq!(open(&objects).state().session(SessionId([7; 16])), None);
    }
    let kind = Body::Session(None).kind();
    assert_eq!(Body::decode(kind, &[]), Some(Body::Session(None)));
    assert_eq!(Body::decode(kind, &[4; 16]), Some(Body::Session(Some(agents))));
    for length in [1, 15, 17, 32] {
        assert_eq!(Body::decode(kind, &vec![4; length]), None, "{length} bytes");
    }
    // And so it is read from a checkpoint.
    writer.checkpoint(NOW).unwrap();
    writer.truncate().unwrap();
    assert_eq!(owner_of(open(&objects).state()), (SessionId([9; 16]), agents, true));
    assert_eq!(open(&objects).state(), writer.state());
}

/// Else whoever has a key that only adds would have the packs of others required, and kept, by backups of its own.
#[test]
fn what_survives_is_required_in_its_own_domain() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    let (agent, agents) = (key(2), DomainId([4; 16]));
    writer.register(NOW, Key { public: agent.verifier(), domain: agents }).unwrap();
    writer.segment(NOW, packs(&[10, 11])).unwrap();
    let owners = commit(&mut writer, &commit_of(numbers([0]))).unwrap().number;
    let mut own = session_of(&objects, &agent, 2);
    own.segment(NOW, packs(&[20, 21, 22])).unwrap();
    let agents = commit(&mut own, &commit_of(numbers([2, 4]))).unwrap().number;
    let untouched = commit(&mut own, &commit_of(numbers([4]))).unwrap().number;
    let condemn = Condemn { objects: numbers([0, 2]), followed: true, survivors: numbers([1, 3]) };
    writer.condemn::<LogError>(NOW, |_| Ok(condemn.clone())).unwrap();
    let required = |root| writer.state().roots()[&root].required.clone();
    assert_eq!(required(owners), numbers([1]));
    assert_eq!(required(agents), numbers([3, 4]));
    assert_eq!(required(untouched), numbers([4]));
}

/// Their entries.
fn empty_backups(writer: &mut Session, count: usize) -> Vec<u64> {
    (0..count).map(|_| commit(writer, &commit_of(Numbers::new())).unwrap().number).collect()
}

#[test]
fn a_backup_that_is_read_is_not_forgotten() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    let roots = empty_backups(&mut writer, 3);
    let read = |roots: &[u64]| Read { roots: roots.to_vec(), payload: b"who".to_vec() };
    let mut reader = session(&objects, 2);
    for wrong in [vec![], vec![roots[1], roots[0]], vec![roots[0], roots[0]]] {
        assert_eq!(refusal(reader.read(NOW, read(&wrong))), Refusal::Nothing);
    }
    assert_eq!(refusal(reader.read(NOW, read(&[999]))), Refusal::NoSuchRoot(999));
    reader.read(NOW, read(&roots[..2])).unwrap();
    let by_reader = |root| Refusal::InUse(root, SessionId([2; 16]));
    assert_eq!(refusal(writer.forget(NOW, vec![roots[2], roots[1]])), by_reader(roots[1]));
    // Only the newest counts.
    reader.read(WallTime(2000), read(&roots[1..2])).unwrap();
    writer.forget(NOW, vec![roots[0]]).unwrap();
    writer.checkpoint(NOW).unwrap();
    let state = open(&objects).state().clone();
    let (who, what) = state.reads().next().expect("a checkpoint has it");
    assert_eq!((who.last_written, what), (WallTime(2000), &read(&roots[1..2])));
    assert_eq!(state.contradiction(), None);
    // As one does that was killed, and begun again.
    drop(reader);
    let (signer, id) = (owner() as Arc<dyn Sign>, SessionId([2; 16]));
    let mut reader = Session::resume(open(&objects), signer.clone(), id).expect("it is open");
    reader.read(NOW, read(&roots[1..])).unwrap();
    assert_eq!(refusal(writer.forget(NOW, vec![roots[2]])), by_reader(roots[2]));
    writer.fence(NOW, id).unwrap();
    assert!(matches!(Session::resume(open(&objects), signer, id), Err(LogError::SessionOver(_))));
    writer.forget(NOW, roots[1..].to_vec()).unwrap();
    assert_eq!(open(&objects).state().reads().count(), 0);
    let mut other = session(&objects, 3);
    let root = commit(&mut other, &commit_of(Numbers::new())).unwrap().number;
    other.read(NOW, read(&[root])).unwrap();
    other.end(NOW).unwrap();
    writer.forget(NOW, vec![root]).expect("it ended");
}

#[test]
fn what_came_of_a_boot_is_known_as_long_as_its_backup() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    let roots = empty_backups(&mut writer, 2);
    let boot = |root, result: u8| Boot { root, payload: vec![result] };
    assert_eq!(refusal(writer.boot(NOW, boot(999, 1))), Refusal::NoSuchRoot(999));
    for (root, result) in [(roots[0], 1), (roots[1], 2), (roots[0], 3)] {
        writer.boot(NOW, boot(root, result)).unwrap();
    }
    for checkpoint in [false, true] {
        if checkpoint {
            writer.checkpoint(NOW).unwrap();
            writer.truncate().unwrap();
        }
        let state = open(&objects).state().clone();
        assert_eq!(
            roots.iter().map(|root| state.boot(*root)).collect::<Vec<_>>(),
            [Some(&[3][..]), Some(&[2])]
        );
        assert_eq!(state.contradiction(), None);
    }
    writer.forget(NOW, vec![roots[0]]).unwrap();
    assert_eq!((writer.state().boot(roots[0]), writer.state().boot(roots[1])), (None, Some(&[2][..])));
    assert_eq!(refusal(writer.boot(NOW, boot(roots[0], 4))), Refusal::NoSuchRoot(roots[0]));
    writer.checkpoint(NOW).unwrap();
    assert_eq!(open(&objects).state(), writer.state());
}

/// The lists at a state's end are not there where they are empty, and no state has two encodings.
#[test]
fn a_state_without_boots_or_removed_keys_is_as_it_was_before_there_were_any() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    let root = commit(&mut writer, &commit_of(Numbers::new())).unwrap().number;
    let bare = writer.state().encode();
    let decoded = |bytes: &[u8]| State::decode(bytes, REPOSITORY);
    assert_eq!(decoded(&bare).as_ref(), Some(writer.state()));
    for more in [&[0][..], &[0, 0]] {
        assert_eq!(decoded(&[&bare, more].concat()), None, "{more:?}");
    }
    writer.boot(NOW, Boot { root, payload: vec![9] }).unwrap();
    let booted = writer.state().clone();
    assert_eq!(decoded(&booted.encode()), Some(booted));
    writer.remove_key::<LogError>(NOW, WrappedKeyId([8; 16]), |_| Ok(())).unwrap();
    let both = writer.state().clone();
    assert_eq!(decoded(&both.encode()), Some(both.clone()));
    assert_eq!(decoded(&[&both.encode()[..], &[0]].concat()), None);
    writer.forget(NOW, vec![root]).unwrap();
    let removed = writer.state().clone();
    assert_eq!(decoded(&removed.encode()), Some(removed.clone()));
    assert_eq!(decoded(&[&removed.encode()[..], &[0]].concat()), None);
}

#[test]
fn garbage_in_a_slot_stops_nobody_and_is_told() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    for (garbage, doubtful) in [(&b""[..], true), (b"garbage", true), (&[0xff; 500], true)] {
        put(&objects, open(&objects).state().next(), garbage);
        assert_eq!(last_remark(&objects).may_have_been_an_entry(), doubtful);
    }
    let forged = Header {
        repository: REPOSITORY,
        number: open(&objects).state().next(),
        previous: EntryHash([0; 32]),
        session: SessionId([1; 16]),
        key: key(3).verifier().id(),
        written: NOW,
    };
    put(&objects, forged.number, &entry::encode(&forged, &Body::End, &*key(3)));
    assert_eq!(last_remark(&objects), Remark::Unreadable("its key may not write here"));
    writer.segment(NOW, packs(&[10])).expect("written behind it");
    assert_eq!(open(&objects).state().live(), numbers([0]));
}

#[test]
fn an_entry_of_another_past_counts_for_nothing() {
    let objects = memory();
    drop(session(&objects, 1));
    let header = Header {
        repository: REPOSITORY,
        number: 2,
        previous: EntryHash([1; 32]),
        session: SessionId([1; 16]),
        key: owner().verifier().id(),
        written: NOW,
    };
    put(&objects, 2, &entry::encode(&header, &Body::End, &*owner()));
    assert_eq!(last_remark(&objects), Remark::OtherPast(owner().verifier().id()));
    assert!(open(&objects).state().session_is_open(SessionId([1; 16])));
}

/// A bit of an entry that was acknowledged rots: neither does it count, nor what it says in another way, and the
/// entries behind it still do.
#[test]
fn every_flipped_bit_is_found() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    let number = commit(&mut writer, &Commit { segment: packs(&[10]), ..commit_of(Numbers::new()) }).unwrap();
    let before = objects.get(&name(number.number), 1 << 20).unwrap();
    writer.segment(NOW, packs(&[11])).unwrap();
    let behind = objects.get(&name(number.number + 1), 1 << 20).unwrap();
    let mut state = first_entries(&objects, number.number);
    for bit in 0..before.len() * 8 {
        let mut flipped = before.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let mut state = state.clone();
        assert!(matches!(
            state.follow(&flipped, &Ed25519),
            state::Followed::Ignored(remark) if remark.may_have_been_an_entry()
        ));
        assert!(matches!(state.follow(&behind, &Ed25519), state::Followed::Applied));
    }
    assert!(matches!(state.follow(&before, &Ed25519), state::Followed::Applied));
}

fn first_entries(objects: &Arc<dyn Objects>, until: u64) -> State {
    let bytes = |number| objects.get(&name(number), 1 << 20).unwrap();
    let mut state = State::begin(&bytes(0), REPOSITORY, &Ed25519).unwrap();
    for number in 1..until {
        assert!(matches!(state.follow(&bytes(number), &Ed25519), state::Followed::Applied));
    }
    state
}

#[test]
fn kinds_of_a_newer_version_are_passed_over_only_if_they_say_so() {
    let newer = |skippable: u16, signer: &SigningKey, log: &Log| {
        let header = Header {
            repository: REPOSITORY,
            number: log.state().next(),
            previous: log.state().head,
            session: SessionId([1; 16]),
            key: signer.verifier().id(),
            written: NOW,
        };
        let mut bytes = entry::encode(&header, &Body::End, signer);
        bytes.truncate(bytes.len() - SIGNATURE);
        bytes[10..12].copy_from_slice(&99u16.to_le_bytes());
        bytes[12..14].copy_from_slice(&skippable.to_le_bytes());
        let signature = signer.sign(&bytes);
        bytes.extend(signature);
        (header.number, bytes)
    };
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.register(NOW, Key { public: key(2).verifier(), domain: DomainId([4; 16]) }).unwrap();
    // An agent stops nobody by it.
    let (number, bytes) = newer(0, &key(2), &open(&objects));
    put(&objects, number, &bytes);
    writer.segment(NOW, packs(&[10])).unwrap();

    let (number, bytes) = newer(1, &owner(), &open(&objects));
    put(&objects, number, &bytes);
    assert_eq!(open(&objects).state().live(), numbers([0]), "still read");
    assert_eq!(refusal(writer.segment(NOW, packs(&[11]))), Refusal::Newer);

    let (number, bytes) = newer(0, &owner(), &open(&objects));
    put(&objects, number, &bytes);
    let result = Log::open(Arc::clone(&objects), Arc::new(Ed25519), REPOSITORY, owner().verifier());
    assert!(matches!(result, Err(LogError::Newer { .. })), "{result:?}");
}

#[test]
fn a_foreign_or_missing_log_is_refused() {
    let empty: Arc<dyn Objects> = Arc::new(Memory::default());
    let open = |objects: &Arc<dyn Objects>, repository, key: Verifier| {
        Log::open(Arc::clone(objects), Arc::new(Ed25519), repository, key).expect_err("refused")
    };
    assert!(matches!(open(&empty, REPOSITORY, owner().verifier()), LogError::Missing { .. }));
    let objects = memory();
    assert!(matches!(open(&objects, RepositoryId([8; 16]), owner().verifier()), LogError::Damaged { .. }));
    assert!(matches!(open(&objects, REPOSITORY, key(2).verifier()), LogError::Damaged { .. }));
    let again = Log::create(objects, Arc::new(Ed25519), REPOSITORY, &*key(2), OWNER, NOW);
    assert_eq!(refusal(again), Refusal::Created);
}

/// Something of every kind, then what a reader makes of a checkpoint of it.
fn eventful() -> (Arc<dyn Objects>, Session) {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, Segment { indexes: vec![SegmentId([1; 32])], ..packs(&[10, 11, 12]) }).unwrap();
    let kept = Commit { retain_until: Some(WallTime(5000)), ..commit_of(numbers([0])) };
    let root = commit(&mut writer, &kept).unwrap().number;
    let given_up =
        commit(&mut writer, &Commit { base: Some(root), ..commit_of(numbers([1])) }).unwrap().number;
    writer.register(NOW, Key { public: key(2).verifier(), domain: DomainId([4; 16]) }).unwrap();
    let mut other = session(&objects, 2);
    other.segment(NOW, packs(&[20, 21])).unwrap();
    other.fence(NOW, SessionId([1; 16])).unwrap();
    other.forget(NOW, vec![given_up]).unwrap();
    condemn(&mut other, numbers([1, 2])).unwrap();
    other.gone(NOW, |_| numbers([2])).unwrap();
    other.verified(NOW, numbers([4])).unwrap();
    other.damaged(NOW, Damaged { settles: Vec::new(), payload: vec![1, 2, 3] }).unwrap();
    other.read(NOW, Read { roots: vec![root], payload: vec![4, 5] }).unwrap();
    other.boot(NOW, Boot { root, payload: vec![6, 7] }).unwrap();
    (objects, other)
}

#[test]
fn a_log_is_read_from_a_checkpoint_as_from_its_beginning() {
    let (objects, mut writer) = eventful();
    writer.checkpoint(NOW).unwrap();
    let whole = writer.state().clone();
    let before = objects.list("log/", None).unwrap().len();
    assert_eq!(open(&objects).state(), &whole);
    let removed = writer.truncate().unwrap();
    assert_eq!(open(&objects).state(), &whole);
    assert_eq!(objects.list("log/", None).unwrap().len() as u64, before as u64 - removed);
    assert_eq!(removed, whole.next() - 2, "all but the checkpoint and the backup");
    assert_eq!(writer.truncate().unwrap(), 0);
    let (root, _) = whole.latest(ChainId([3; 16])).unwrap();
    assert_eq!(open(&objects).payload(root).unwrap(), b"sealed");

    // And from one to the next.
    let mut idle = open(&objects);
    for id in 30..35 {
        writer.segment(NOW, packs(&[id])).unwrap();
        writer.checkpoint(NOW).unwrap();
        writer.truncate().unwrap();
    }
    idle.refresh().unwrap();
    assert_eq!(idle.state(), writer.state());
    assert_eq!(idle.state(), open(&objects).state());
}

/// Of a large repository each point's list of packs takes as much as a hundred points; a thousand of them must not.
#[test]
fn points_share_what_they_require() {
    const PACKS: u32 = 4 << 14;
    const POINTS: usize = 100;
    let objects = memory();
    let mut writer = session(&objects, 1);
    let mut next = 0u32;
    let mut segment = |count: u32| {
        let ids = next..next + count;
        next += count;
        Segment {
            packs: ids.map(|id| PackId(*blake3::hash(&id.to_le_bytes()).as_bytes())).collect(),
            indexes: Vec::new(),
        }
    };
    for _ in 0..4 {
        writer.segment(NOW, segment(PACKS / 4)).unwrap();
    }
    // Two machines whose packs lie between each other's, and some that are nobody's.
    let (mut before, mut sizes) = (Vec::new(), Vec::new());
    for machine in 0..2 {
        let packs = numbers((0..PACKS).filter(|pack| pack % 32 != 0 && pack % 2 == machine));
        let chain = ChainId([machine as u8; 16]);
        before.push(commit(&mut writer, &Commit { chain, ..commit_of(packs) }).unwrap().number);
    }
    sizes.push(writer.state().encode().len());
    for point in 0..POINTS {
        let chain = ChainId([(point % 2) as u8; 16]);
        let (base, segment) = (Some(before[point % 2]), segment(2));
        let continued = Commit { chain, base, segment, ..commit_of(Numbers::new()) };
        before[point % 2] = commit(&mut writer, &continued).unwrap().number;
    }
    sizes.push(writer.state().encode().len());
    // What a collection does with packs of which little is reached: all points of one machine get others instead.
    writer.segment(NOW, segment(1)).unwrap();
    let survivors = numbers([next - 1]);
    let objects_of_first = numbers((2..PACKS).step_by(40).filter(|pack| pack % 32 != 0));
    let moved = Condemn { objects: objects_of_first, followed: true, survivors };
    writer.condemn::<LogError>(NOW, |_| Ok(moved.clone())).unwrap();

    let required = |state: &State| pages_in_memory(state.roots().values().map(|root| &root.required));
    // Four of each machine, and one more for each point: the one that new packs are added to.
    let expected = 2 * 4 + POINTS + 2;
    assert!(required(writer.state()) <= expected, "{} pages of {expected}", required(writer.state()));
    writer.checkpoint(NOW).unwrap();
    let read = open(&objects);
    assert_eq!(read.state(), writer.state());
    assert!(required(read.state()) <= expected, "{} pages of {expected}, when read", required(read.state()));
    // Each point has two names of packs and 150 bytes of its own.
    assert!(sizes[1] - sizes[0] < POINTS * 300, "{} bytes for {POINTS} points", sizes[1] - sizes[0]);
}

/// Rule 9: an entry that gets the place of one that was removed is not in the log, though it was created.
#[test]
fn an_entry_in_a_freed_slot_is_appended_again() {
    let (objects, mut writer) = eventful();
    let mut paused = session(&objects, 50);
    let mut asked = Vec::new();
    let appended = paused.commit::<LogError>(NOW, |state| {
        asked.push(state.next());
        if asked.len() == 1 {
            writer.segment(NOW, packs(&[40])).unwrap();
            writer.checkpoint(NOW).unwrap();
            writer.truncate().unwrap();
            assert!(objects.get(&name(state.next()), 1 << 20).is_err(), "the slot is free");
        }
        Ok(Commit { segment: packs(&[41]), ..commit_of(Numbers::new()) })
    });
    let stale = asked[0];
    assert!(appended.unwrap().number > stale && asked.len() == 2);
    assert!(objects.get(&name(stale), 1 << 20).is_ok(), "what nobody reads");
    assert_eq!(paused.state(), open(&objects).state());
    let pack = Content::Pack(PackId([41; 32]));
    assert_eq!(paused.state().status(SessionId([50; 16]), pack), Some(Status::Live));
    writer.refresh().unwrap();
    writer.checkpoint(NOW).unwrap();
    writer.truncate().unwrap();
    assert!(objects.get(&name(stale), 1 << 20).is_err(), "removed with the rest");
}

/// Rule 9: who paused before a slot that was freed does not take it for the head.
#[test]
fn a_reader_that_paused_finds_the_head() {
    let (objects, mut writer) = eventful();
    let mut paused = open(&objects);
    writer.segment(NOW, packs(&[40])).unwrap();
    writer.checkpoint(NOW).unwrap();
    writer.truncate().unwrap();
    paused.refresh().unwrap();
    assert_eq!(paused.state(), writer.state());
}

/// Its maker died in between. Found by the simulation: the next checkpoint was published, its slots freed, and a reader that
/// looked for the first pointer took a freed slot for the head.
#[test]
fn a_checkpoint_that_was_not_published_is_before_the_next_is_made() {
    let (objects, mut writer) = eventful();
    let mut paused = open(&objects);
    let mut dying = session(&objects, 60);
    // As old a state as can be: it does not know of the checkpoint that is not published.
    let mut next = session(&objects, 61);
    dying.checkpoint(NOW).unwrap();
    objects.remove(&Name::new(format!("checkpoints/{:016x}", 0)).unwrap()).unwrap();
    next.checkpoint(NOW).unwrap();
    next.truncate().unwrap();
    paused.refresh().unwrap();
    assert_eq!(paused.state(), next.state());
    writer.refresh().unwrap();
    assert_eq!(writer.state(), next.state());
}

#[test]
fn a_pointer_that_nobody_signed_is_in_nobodys_way() {
    let (objects, mut writer) = eventful();
    let false_pointer = Name::new(format!("checkpoints/{:016x}", 0)).unwrap();
    objects.create(&false_pointer, &[b"nonsense"], None).unwrap();
    let mut paused = open(&objects);
    writer.checkpoint(NOW).unwrap();
    writer.truncate().unwrap();
    paused.refresh().unwrap();
    assert_eq!(paused.state(), writer.state());
}

#[test]
fn a_damaged_checkpoint_is_refused() {
    let (objects, mut writer) = eventful();
    let checkpoint = writer.checkpoint(NOW).unwrap().number;
    writer.truncate().unwrap();
    let bytes = objects.get(&name(checkpoint), 1 << 20).unwrap();
    for place in (0..bytes.len()).step_by(7) {
        let mut flipped = bytes.clone();
        flipped[place] ^= 0x10;
        let state = State::from_checkpoint(&flipped, REPOSITORY, owner().verifier(), &Ed25519);
        assert!(state.is_err(), "byte {place}");
    }
    // Its copy does not stand in for it: a freed slot is no damaged one.
    objects.remove(&name(checkpoint)).unwrap();
    let opened = Log::open(Arc::clone(&objects), Arc::new(Ed25519), REPOSITORY, owner().verifier());
    assert!(matches!(opened, Err(LogError::Missing { .. } | LogError::Damaged { .. })), "{opened:?}");
}

fn flip(objects: &Arc<dyn Objects>, name: &Name) {
    let mut bytes = objects.get(name, 1 << 20).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    objects.remove(name).unwrap();
    objects.create(name, &[&bytes], None).unwrap();
}

fn listed(objects: &Arc<dyn Objects>, prefix: &str) -> Vec<String> {
    objects.list(prefix, None).unwrap().iter().map(|object| object.name.to_string()).collect()
}

#[test]
fn what_reading_begins_with_is_there_twice() {
    let copy_of = |name: &Name| Name::new(format!("copies/{name}")).unwrap();
    let (objects, mut writer) = eventful();
    let mut paused = open(&objects);
    let pointer = Name::new(format!("checkpoints/{:016x}", 0)).unwrap();
    let mut beginning = vec![name(0)];
    for checkpoints in 0..2 {
        if checkpoints == 1 {
            let number = writer.checkpoint(NOW).unwrap().number;
            writer.truncate().unwrap();
            beginning = vec![pointer.clone(), name(number)];
        }
        let copies: Vec<_> = beginning.iter().map(|name| copy_of(name).to_string()).collect();
        assert_eq!(listed(&objects, "copies/"), copies, "and no older ones");
        for name in &beginning {
            let copy = objects.get(&copy_of(name), 1 << 20).unwrap();
            flip(&objects, name);
            assert_eq!(open(&objects).state(), writer.state(), "{name}");
            flip(&objects, &copy_of(name));
            let opened = Log::open(Arc::clone(&objects), Arc::new(Ed25519), REPOSITORY, owner().verifier());
            assert!(matches!(opened, Err(LogError::Damaged { .. } | LogError::Missing { .. })), "{name}");
            for name in [name, &copy_of(name)] {
                objects.remove(name).unwrap();
                objects.create(name, &[&copy], None).unwrap();
            }
        }
    }
    // Who is behind goes on from the copies, too.
    beginning.iter().for_each(|name| flip(&objects, name));
    paused.refresh().unwrap();
    assert_eq!(paused.state(), writer.state());

    // A newer one takes their place.
    assert!(writer.begins_damaged().unwrap());
    let number = writer.checkpoint(NOW).unwrap().number;
    writer.truncate().unwrap();
    assert!(!writer.begins_damaged().unwrap());
    assert_eq!(listed(&objects, "copies/log/"), [copy_of(&name(number)).to_string()]);
    assert_eq!(open(&objects).state(), writer.state());
}

/// A place that does not answer, before or after it did what was asked.
#[derive(Debug)]
struct Silent {
    inner: Memory,
    /// Creations that are not answered from now on, and whether they are done.
    silent: AtomicU32,
    done: Mutex<bool>,
}

impl Silent {
    fn unknown(&self, name: &Name) -> Error {
        Error::new(ErrorKind::Unknown, "create", name, self.url(), "no answer")
    }
}

impl Front for Silent {
    fn behind(&self) -> &dyn Objects {
        &self.inner
    }

    fn create(&self, name: &Name, parts: &[&[u8]], until: Option<WallTime>) -> Result<Created, Error> {
        let silent =
            self.silent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if silent.is_err() {
            return self.inner.create(name, parts, until);
        }
        if *self.done.lock().unwrap() {
            self.inner.create(name, parts, until)?;
        }
        Err(self.unknown(name))
    }
}

/// Rule 2.
#[test]
fn an_unknown_outcome_is_found_out() {
    for done in [false, true] {
        let silent =
            Arc::new(Silent { inner: Memory::default(), silent: AtomicU32::new(0), done: Mutex::new(done) });
        let objects = Arc::clone(&silent) as Arc<dyn Objects>;
        create(&objects);
        let mut writer = session(&objects, 1);
        silent.silent.store(1, Ordering::Relaxed);
        let appended = writer.segment(NOW, packs(&[10])).unwrap();
        assert_eq!(appended.number, 2, "once, done: {done}");
        assert_eq!(open(&objects).state().live(), numbers([0]));

        silent.silent.store(u32::MAX, Ordering::Relaxed);
        let result = writer.segment(NOW, packs(&[11]));
        if done {
            result.expect("it is there");
        } else {
            assert!(matches!(result, Err(LogError::Unsettled { .. })), "{result:?}");
            // It did not land: nothing is known of it, and the place is free for others.
            silent.silent.store(0, Ordering::Relaxed);
            writer.segment(NOW, packs(&[12])).unwrap();
        }
        assert_eq!(writer.state().live(), numbers([0, 1]));
    }
}

mod any_bytes {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn are_no_entry(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let objects = memory();
            let mut state = first_entries(&objects, 1);
            prop_assert!(matches!(state.follow(&bytes, &Ed25519), state::Followed::Ignored(_)));
        }

        /// Bodies have one encoding, and no bytes break the decoder.
        #[test]
        fn are_one_body_or_none(kind in 0u16..17, bytes in proptest::collection::vec(0u8..20, 0..80)) {
            fuzz_body(kind, &bytes);
        }

        /// A state that was changed anywhere is refused, or holds together and has that encoding.
        #[test]
        fn are_a_sound_state_or_none(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in any::<Option<prop::sample::Index>>(),
        ) {
            thread_local!(static WHOLE: Vec<u8> = eventful().1.state().encode());
            let mut bytes = WHOLE.with(Vec::clone);
            for (place, byte) in changes {
                *place.get_mut(&mut bytes) = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            fuzz_state(REPOSITORY, &bytes);
        }
    }
}

#[test]
fn a_forgotten_backup_is_brought_back_under_its_number() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, packs(&[10, 11])).unwrap();
    let number = commit(&mut writer, &commit_of(numbers([0]))).unwrap().number;
    let later = commit(&mut writer, &commit_of(numbers([1]))).unwrap().number;
    let before = writer.state().roots()[&number].clone();
    assert_eq!(writer.log().forgotten().unwrap(), []);
    let wrong = undelete(number, numbers([0]));
    let refused = |writer: &mut Session, body: &Undelete| {
        refusal(writer.undelete::<LogError>(WallTime(3000), |_| Ok(body.clone())))
    };
    assert_eq!(refused(&mut writer, &wrong), Refusal::RootKnown(number));
    let forgot = writer.forget(WallTime(2000), vec![number]).unwrap().number;

    let forgotten = writer.log().forgotten().unwrap();
    let [one] = &forgotten[..] else { panic!("{forgotten:?}") };
    let by = Forgetting { entry: forgot, key: owner().verifier().id(), written: WallTime(2000) };
    assert_eq!((one.number, &one.root, one.by, one.condemned.len()), (number, &before, Some(by), 0));
    assert_eq!(writer.log().forgotten_payload(one).unwrap(), b"sealed");
    let again = one.undelete(&BTreeMap::new(), None, b"sealed".to_vec());
    for (wrong, why) in [
        (Undelete { root: 999, ..again.clone() }, Refusal::NoSuchRoot(999)),
        (Undelete { parent: Some(later), ..again.clone() }, Refusal::NoSuchRoot(later)),
        (Undelete { packs: numbers([0, 7]), ..again.clone() }, Refusal::NotFit(7)),
    ] {
        assert_eq!(refused(&mut writer, &wrong), why);
    }
    let entry = writer.undelete::<LogError>(WallTime(3000), |_| Ok(again.clone())).unwrap();
    let root = writer.state().roots()[&number].clone();
    assert_eq!(root, Root { entry: entry.number, hash: entry.hash, ..before });
    assert_eq!(refused(&mut writer, &again), Refusal::RootKnown(number));
    assert_eq!(writer.log().forgotten().unwrap(), []);

    // The entry that it stands in stays as long as it does; the one that it was committed in need not.
    writer.checkpoint(NOW).unwrap();
    writer.truncate().unwrap();
    let log = open(&objects);
    assert_eq!((log.state(), log.state().contradiction()), (writer.state(), None));
    assert_eq!(log.payload(number).unwrap(), b"sealed");
    objects.len(&name(number)).expect_err("it was freed");
    // And it can be forgotten and brought back once more.
    writer.forget(NOW, vec![number]).unwrap();
    let forgotten = writer.log().forgotten().unwrap();
    assert_eq!(forgotten[0].root, root);
    writer.undelete::<LogError>(NOW, |_| Ok(again.clone())).unwrap();
    assert_eq!(writer.log().payload(number).unwrap(), b"sealed");
}

#[test]
fn a_backup_whose_pack_was_condemned_is_brought_back_from_a_copy_only() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, packs(&[10, 11])).unwrap();
    let number = commit(&mut writer, &commit_of(numbers([0, 1]))).unwrap().number;
    writer.forget(NOW, vec![number]).unwrap();
    writer.end(NOW).unwrap();
    let mut other = session(&objects, 2);
    condemn(&mut other, numbers([1])).unwrap();
    let forgotten = other.log().forgotten().unwrap();
    let name = PackName { session: SessionId([1; 16]), pack: PackId([11; 32]) };
    let condemned: Vec<_> = forgotten[0].condemned_packs().collect();
    assert_eq!(condemned, [(1, OldPack { name, domain: OWNER })]);
    let undelete = |copies: &[(Number, Number)]| {
        forgotten[0].undelete(&copies.iter().copied().collect(), None, b"sealed".to_vec())
    };
    let alone = undelete(&[]);
    assert_eq!(refusal(other.undelete::<LogError>(NOW, |_| Ok(alone.clone()))), Refusal::NotFit(1));
    // Also when it is gone and the log has forgotten it.
    other.gone(NOW, |_| numbers([1])).unwrap();
    assert_eq!(other.log().forgotten().unwrap(), forgotten);
    assert_eq!(refusal(other.undelete::<LogError>(NOW, |_| Ok(alone.clone()))), Refusal::NotFit(1));
    other.segment(NOW, packs(&[11])).unwrap();
    let copied = undelete(&[(1, 2)]);
    other.undelete::<LogError>(NOW, |_| Ok(copied.clone())).unwrap();
    assert_eq!(other.state().roots()[&number].required, numbers([0, 2]));
    assert_eq!(other.state().contradiction(), None);
}

/// As long as an older checkpoint is kept, what was forgotten since is found, whatever became of the entries in between.
#[test]
fn what_was_forgotten_before_a_checkpoint_is_found_from_an_older_one() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, packs(&[10])).unwrap();
    let roots = [(); 3].map(|()| commit(&mut writer, &commit_of(numbers([0]))).unwrap().number);
    let older = writer.checkpoint(NOW).unwrap().number;
    let forgot = writer.forget(NOW, roots[..2].to_vec()).unwrap().number;
    condemn(&mut writer, numbers([0])).expect_err("the third requires it");
    writer.forget(NOW, vec![roots[2]]).unwrap();
    condemn(&mut writer, numbers([0])).unwrap();
    writer.checkpoint(NOW).unwrap();
    writer.checkpoint(NOW).unwrap();
    let found = |objects: &Arc<dyn Objects>| {
        let found = open(objects).forgotten().unwrap();
        found
            .into_iter()
            .map(|one| (one.number, one.by.map(|by| by.entry), one.condemned.len()))
            .collect::<Vec<_>>()
    };
    let all = [(roots[0], Some(forgot), 1), (roots[1], Some(forgot), 1), (roots[2], Some(forgot + 1), 1)];
    assert_eq!(found(&objects), all);
    // From the checkpoint on.
    objects.remove(&name(0)).unwrap();
    assert_eq!(found(&objects), all);
    // Who forgot the first two, and which pack was condemned, is not to be read any more, but that they are gone is.
    objects.remove(&name(forgot)).unwrap();
    assert_eq!(found(&objects), [0, 1, 2].map(|at| (roots[at], None, 1)));
    objects.remove(&name(older)).unwrap();
    assert_eq!(found(&objects), []);
}

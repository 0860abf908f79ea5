//! Keys that only add: what a machine that is not trusted can do with its own, and what it cannot.

use crate::lab::{CHUNK, Lab, PACE};
use rempart_backup::{Changes, DiskJob, FileSource, Progress, back_up_disk};
use rempart_objects::Memory;
use rempart_repository::log::{Condemn, Key, LogError, Numbers, Refusal, Session};
use rempart_repository::{
    BackupWriter, BlobReader, ChunkSize, Definition, ErrorKind, KeyFile, NewRepository, PassphraseCost,
    Point, Repository, RepositoryId, SessionId, Unlock, WrappedKey, WriterKey, WriterName, Written, keys,
};
use rempart_types::WallTime;
use std::path::Path;
use std::sync::{Arc, Barrier};

const NOW: WallTime = WallTime(7);

fn name(name: &str) -> WriterName {
    WriterName::new(name).expect("a name")
}

/// A key, as it comes to its machine.
fn key_for(lab: &Lab, machine: &str, file: &str) -> WriterKey {
    let path = lab.folder.path().join(file);
    let key = lab.repository.new_writer(name(machine)).expect("the owner makes it");
    key.create(&path).expect("written");
    lab.repository.add_writer(&key, NOW).expect("registered");
    WriterKey::load(&path).expect("read")
}

/// The repository as the holder of a key that only adds has it.
fn adding(lab: &Lab, key: WriterKey) -> Arc<Repository> {
    let cache = lab.folder.path().join("cache");
    let opened = Repository::open_to_add(lab.repository.objects().clone(), &cache, key);
    Arc::new(opened.expect("opens"))
}

fn back_up(repository: &Arc<Repository>, disk: &Path, point: Point) -> Written {
    let source = FileSource::open(disk).expect("opens");
    let writer = BackupWriter::open(repository.clone()).expect("opens");
    let changes = Changes::Unknown("the test wants it".to_owned());
    let job = DiskJob { name: "vda", source: &source, changes, position: None, left_out: &[] };
    let disk = back_up_disk(&writer, repository.chunk_size(), &job, PACE, &Progress::default());
    let chain = repository.chain(&point.vm);
    let point = Point { disks: vec![disk.expect("stored")], ..point };
    writer.commit(chain, None, &point, None).expect("committed")
}

fn of(lab: &Lab, vm: &str) -> Point {
    Point { vm: vm.to_owned(), ..lab.point(Vec::new()) }
}

fn session(repository: &Repository) -> Session {
    let log = repository.log().expect("opens");
    Session::open(log, repository.signer(), SessionId::random(), NOW).expect("opens")
}

#[test]
fn it_adds_what_only_the_owner_reads_and_stores_its_own_once() {
    let mut lab = Lab::new();
    lab.make_disk(60 * CHUNK);
    let web = adding(&lab, key_for(&lab, "web", "key"));
    let first = back_up(&web, &lab.disk(), of(&lab, "web"));
    assert!(first.new_bytes > 0);
    assert_eq!(lab.restore(first.root).expect("restores"), lab.content());
    let second = back_up(&web, &lab.disk(), of(&lab, "web"));
    assert_eq!(second.new_bytes, 0, "it finds its own chunks");

    // Not those of others, nor they its.
    let mail = adding(&lab, key_for(&lab, "mail", "other"));
    assert_eq!(back_up(&mail, &lab.disk(), of(&lab, "mail")).new_bytes, first.new_bytes);
    assert_eq!(back_up(&lab.repository, &lab.disk(), of(&lab, "shop")).new_bytes, first.new_bytes);
    // A new key for the same machine does.
    let again = adding(&lab, key_for(&lab, "web", "again"));
    assert_eq!(back_up(&again, &lab.disk(), of(&lab, "web")).new_bytes, 0);

    let log = lab.repository.log().expect("opens");
    let names: Vec<_> = lab.repository.writers(log.state()).expect("known");
    let mut names: Vec<_> = names.iter().map(|(_, name)| name.as_ref().expect("known").as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["mail", "web", "web"]);
}

#[test]
fn whoever_steals_the_key_reads_nothing_with_it_not_even_its_own_points() {
    let mut lab = Lab::new();
    lab.make_disk(20 * CHUNK);
    let web = adding(&lab, key_for(&lab, "web", "key"));
    let own = back_up(&web, &lab.disk(), of(&lab, "web")).root;
    let others = back_up(&lab.repository, &lab.disk(), of(&lab, "shop")).root;
    let log = web.log().expect("the log is no secret");
    for root in [own, others] {
        assert_eq!(web.point(&log, root).expect_err("sealed").kind, ErrorKind::WrongKey);
    }
    // The ids of its own chunks are known to it; what is in them is not.
    let whole = lab.repository.point(&lab.repository.log().expect("opens"), own).expect("the owner reads");
    let reader = BlobReader::new(&web, log.state(), web.index(log.state()).expect("its own index"));
    let node = rempart_repository::NodeSource::node(&reader, &whole.disks[0].root);
    assert_eq!(node.expect_err("sealed").kind, ErrorKind::WrongKey);
}

#[test]
fn it_forgets_condemns_and_lets_in_nothing() {
    let mut lab = Lab::new();
    lab.make_disk(4 * CHUNK);
    let web = adding(&lab, key_for(&lab, "web", "key"));
    let own = back_up(&web, &lab.disk(), of(&lab, "web")).root;
    let mut session = session(&web);
    let maintenance = |ended: Result<_, LogError>| match ended {
        Err(LogError::Refused(Refusal::Maintenance(_))) => {}
        ended => panic!("{ended:?}"),
    };
    maintenance(session.forget(NOW, vec![own]).map(drop));
    let objects: Numbers = session.state().live();
    let condemn = Condemn { objects, followed: true, survivors: Numbers::new() };
    maintenance(session.condemn(NOW, |_| Ok::<_, LogError>(condemn.clone())).map(drop));
    let friend = lab.repository.new_writer(name("friend")).expect("made");
    let public = friend.signer().verifier();
    maintenance(session.register(NOW, Key { public, domain: friend.domain().id() }).map(drop));
    maintenance(session.revoke(NOW, friend.signer().id()).map(drop));
    assert_eq!(web.new_writer(name("friend")).expect_err("not its to make").kind, ErrorKind::WrongKey);
    lab.restore(own).expect("all is there");
}

#[test]
fn a_point_in_another_machines_name_or_with_strange_texts_counts_for_nothing() {
    let mut lab = Lab::new();
    lab.make_disk(4 * CHUNK);
    let web = adding(&lab, key_for(&lab, "web", "key"));
    let forged = back_up(&web, &lab.disk(), of(&lab, "shop")).root;
    let escape = Point { notes: vec!["\u{1b}[2J".to_owned()], ..of(&lab, "web") };
    let escape = back_up(&web, &lab.disk(), escape).root;
    let definition = Definition { kind: "rempart".to_owned(), content: Vec::new() };
    let defines = Point { definition: Some(definition), ..of(&lab, "web") };
    let defines = back_up(&web, &lab.disk(), defines).root;
    let log = lab.repository.log().expect("opens");
    for (root, why) in [
        (forged, "may not add backups of that machine"),
        (escape, "not for people to read"),
        (defines, "may not define machines"),
    ] {
        let error = lab.repository.point(&log, root).expect_err("ignored");
        assert!(error.is_loss() && error.to_string().contains(why), "{error}");
    }
}

#[test]
fn a_key_that_was_removed_adds_nothing_and_what_it_added_stays() {
    let mut lab = Lab::new();
    lab.make_disk(4 * CHUNK);
    let key = key_for(&lab, "web", "key");
    let id = key.signer().id();
    let web = adding(&lab, key);
    let root = back_up(&web, &lab.disk(), of(&lab, "web")).root;
    let open = BackupWriter::open(web.clone()).expect("opens");
    lab.repository.remove_writer(id, NOW).expect("removed");
    let late = open.commit(web.chain("web"), None, &of(&lab, "web"), None);
    late.expect_err("its session is over");
    BackupWriter::open(web).expect_err("it may not write");
    assert_eq!(lab.repository.remove_writer(id, NOW).expect_err("gone").kind, ErrorKind::Missing);
    assert_eq!(lab.restore(root).expect("restores"), lab.content());
}

#[test]
fn a_key_of_another_repository_is_told() {
    let (one, two) = (Lab::new(), Lab::new());
    let key = key_for(&one, "web", "key");
    let opened = Repository::open_to_add(two.repository.objects().clone(), two.folder.path(), key);
    assert_eq!(opened.expect_err("foreign").kind, ErrorKind::Foreign);
}

#[test]
fn of_two_who_remove_the_last_two_keys_at_once_one_is_refused() {
    for _ in 0..20 {
        let folder = tempfile::tempdir().expect("a folder");
        let first = KeyFile::random();
        let new = NewRepository {
            id: RepositoryId::random(),
            chunk_size: ChunkSize::DEFAULT,
            unlock: Unlock::KeyFile(&first),
            cost: PassphraseCost::DEFAULT,
            label: "",
            kept: None,
            now: NOW,
        };
        let repository =
            Repository::create(Arc::new(Memory::default()), folder.path(), new).expect("creates");
        let second = KeyFile::random();
        let added = repository.add_key(Unlock::KeyFile(&second), PassphraseCost::DEFAULT, "", NOW);
        added.expect("adds");
        let there = keys(&**repository.objects()).expect("lists");
        let start = Barrier::new(there.len());
        let remove = |key: &WrappedKey| {
            start.wait();
            repository.remove_key(key.id, NOW).err().map(|error| error.kind)
        };
        let ended: Vec<Option<ErrorKind>> = std::thread::scope(|scope| {
            let threads: Vec<_> = there.iter().map(|key| scope.spawn(|| remove(key))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(ended.iter().filter(|ended| ended.is_none()).count(), 1, "{ended:?}");
        assert!(ended.contains(&Some(ErrorKind::Refused)), "{ended:?}");
        let stays = keys(&**repository.objects()).expect("lists");
        assert_eq!(stays.len(), 1);
        let last = repository.remove_key(stays[0].id, NOW).expect_err("it is the last one");
        assert_eq!(last.kind, ErrorKind::Refused);
    }
}

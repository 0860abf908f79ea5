//! Keys that only add: what a machine that is not trusted can do with its own, and what it cannot.

use crate::lab::{CHUNK, Lab, PACE};
use rempart_backup::{Changes, DiskJob, FileSource, Progress, back_up_disk};
use rempart_objects::{Error, Front, Listed, Memory, Name, Objects};
use rempart_repository::log::{Condemn, Key, LogError, Numbers, Refusal, Session};
use rempart_repository::{
    BackupWriter, BlobReader, ChunkSize, Definition, ErrorKind, KeyFile, NewRepository, PassphraseCost,
    Point, Repository, RepositoryId, SessionId, Unlock, WriterKey, WriterName, Written, keys,
};
use rempart_types::WallTime;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub const NOW: WallTime = WallTime(7);

pub fn name(name: &str) -> WriterName {
    WriterName::new(name).expect("a name")
}

/// A key, as it comes to its machine.
pub fn key_for(lab: &Lab, machine: &str, file: &str) -> WriterKey {
    let path = lab.folder.path().join(file);
    let key = lab.repository.new_writer(name(machine)).expect("the owner makes it");
    key.create(&path).expect("written");
    lab.repository.add_writer(&key, NOW).expect("registered");
    WriterKey::load(&path).expect("read")
}

/// The repository as the holder of a key that only adds has it.
pub fn adding(lab: &Lab, key: WriterKey) -> Arc<Repository> {
    let cache = lab.folder.path().join("cache");
    let opened = Repository::open_to_add(lab.repository.objects().clone(), &cache, key);
    Arc::new(opened.expect("opens"))
}

pub fn back_up(repository: &Arc<Repository>, disk: &Path, point: Point) -> Written {
    let source = FileSource::open(disk).expect("opens");
    let writer = BackupWriter::open(repository.clone()).expect("opens");
    let changes = Changes::Unknown("the test wants it".to_owned());
    let job = DiskJob { name: "vda", source: &source, changes, position: None, left_out: &[] };
    let disk = back_up_disk(&writer, repository.chunk_size(), &job, PACE, &Progress::default());
    let chain = repository.chain(&point.vm);
    let point = Point { disks: vec![disk.expect("stored")], ..point };
    writer.commit(chain, None, &point, None).expect("committed")
}

pub fn of(lab: &Lab, vm: &str) -> Point {
    Point { vm: vm.to_owned(), ..lab.point(Vec::new()) }
}

pub fn session(repository: &Repository) -> Session {
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

/// A place in which, once keys were listed to the end a second time, something else happens.
struct Meanwhile {
    inner: Arc<dyn Objects>,
    lists: AtomicU64,
    then: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// Nothing is removed from it: whoever wants to stops there.
    keeps: bool,
}

impl std::fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meanwhile").finish_non_exhaustive()
    }
}

impl Front for Meanwhile {
    fn behind(&self) -> &dyn Objects {
        &*self.inner
    }

    fn list(&self, prefix: &str, after: Option<&Name>) -> Result<Vec<Listed>, Error> {
        let listed = self.inner.list(prefix, after)?;
        if prefix.starts_with("keys") && after.is_some() && self.lists.fetch_add(1, Ordering::SeqCst) == 1 {
            let then = self.then.lock().expect("no holder panics").take();
            then.into_iter().for_each(|then| then());
        }
        Ok(listed)
    }

    fn remove(&self, name: &Name) -> Result<(), Error> {
        match self.keeps {
            true => {
                let (kind, place) = (rempart_objects::ErrorKind::Unavailable, self.url());
                Err(Error::new(kind, "remove", name, place, "the test wants it"))
            }
            false => self.inner.remove(name),
        }
    }
}

/// The other removes its key between the one's look at the keys and what it writes then; or stops in the middle of that.
#[test]
fn of_two_who_remove_the_last_two_keys_at_once_one_is_refused() {
    for other_stops in [false, true] {
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
        let place: Arc<dyn Objects> = Arc::new(Memory::default());
        let repository = Repository::create(place.clone(), folder.path(), new).expect("creates");
        let second = KeyFile::random();
        let added = repository.add_key(Unlock::KeyFile(&second), PassphraseCost::DEFAULT, "", NOW);
        added.expect("adds");
        let there = keys(&*place).expect("lists");
        let [one, other] = &there[..] else { panic!("{there:?}") };
        let seen_by = |keeps| {
            let (lists, then) = (AtomicU64::new(0), Mutex::default());
            let seen = Arc::new(Meanwhile { inner: place.clone(), lists, then, keeps });
            let unlock = Unlock::KeyFile(&first);
            (seen.clone(), Repository::open(seen, folder.path(), unlock).expect("opens"))
        };
        let ((_, others), (seen, ones)) = (seen_by(other_stops), seen_by(false));
        let id = other.id;
        seen.lists.store(0, Ordering::SeqCst);
        *seen.then.lock().expect("no holder panics") =
            Some(Box::new(move || assert_eq!(others.remove_key(id, NOW).is_err(), other_stops)));
        let refused = ones.remove_key(one.id, NOW).expect_err("the other was first");
        assert_eq!(refused.kind, ErrorKind::Refused);
        let stays = keys(&*place).expect("lists");
        assert!(stays.iter().any(|key| key.id == one.id), "{stays:?}");
        // What was begun is gone on with; the last one stays.
        if other_stops {
            repository.remove_key(other.id, NOW).expect("goes on");
        }
        let last = repository.remove_key(one.id, NOW).expect_err("it is the last one");
        assert_eq!(last.kind, ErrorKind::Refused);
        assert!(seen.then.lock().expect("no holder panics").is_none(), "the other came in between");
    }
}

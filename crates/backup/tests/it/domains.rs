//! Collections in the domains of machines that have keys of their own: what such a machine has no more use for goes, the rest stays
//! in its domain, and who stole its key can neither hide what was there nor stop a collection.

use crate::collection::{HOW, forget, gc, in_memory, packs, there};
use crate::lab::{CHUNK, Lab, PASSPHRASE};
use crate::writers::{NOW, adding, back_up, key_for, name, of, session};
use rempart_backup::{Changes, DiskJob, FileSource, Progress, back_up_disk};
use rempart_buffer::BufferMut;
use rempart_objects::{Created, Error, Front, Memory, Name, Objects};
use rempart_repository::collect::{Collection, Collector, collect, look};
use rempart_repository::log::{Content, Numbers, Segment as LogSegment, Session};
use rempart_repository::{
    BackupWriter, BlobKind, ChunkId, Compressor, KeyRing, MasterKey, PackBuilder, PackName, PackOpener,
    Repository, SegmentBuilder, WriterKey,
};
use rempart_types::WallTime;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const MIB: u64 = 1 << 20;
const ALL_ANEW: Collection = Collection { repack: Some(100), ..HOW };

fn all_restore(lab: &Lab, points: &[(u64, Vec<u8>)]) {
    for (root, content) in points {
        assert!(lab.restore(*root).expect("restores") == *content, "point {root}");
    }
}

/// What a backup requires is of its writer's domain.
fn is_in_its_domain(repository: &Repository, root: u64, writer: &Repository) {
    let log = repository.log().expect("opens");
    let (state, domain) = (log.state(), writer.writer().domain().id());
    for number in state.roots()[&root].required.iter() {
        let object = state.object(number).expect("it is live");
        assert_eq!(state.owner(&object).domain, domain, "object {number}");
    }
}

#[test]
fn packs_of_a_machine_with_a_key_of_its_own_are_written_anew_in_its_domain() {
    let mut lab = in_memory();
    lab.make_disk(6 * MIB);
    let web = adding(&lab, key_for(&lab, "web", "key"));
    let old = back_up(&lab.repository, &lab.disk(), of(&lab, "shop")).root;
    lab.change(20);
    let shop = (back_up(&lab.repository, &lab.disk(), of(&lab, "shop")).root, lab.content());
    let mut points = Vec::new();
    for _ in 0..20 {
        lab.change(10);
        points.push((back_up(&web, &lab.disk(), of(&lab, "web")).root, lab.content()));
    }
    let last = points.split_off(18);
    forget(&lab, &points.iter().map(|(root, _)| *root).chain([old]).collect::<Vec<_>>());
    // Of what they had alone, packs that are of some use yet are most.
    let outlook = look(&lab.repository, &ALL_ANEW).expect("looks");
    assert!(outlook.sparse > 10 && outlook.sparse_waste > MIB, "{outlook:?}");
    let done = gc(&lab, ALL_ANEW);
    assert!(done.rewritten.packs >= 10 && done.segments >= 16, "{done:?}");
    // Each requires what was put of its own, and nothing else: what the trees say is not asked again.
    gc(&lab, Collection { follow: false, ..HOW });
    all_restore(&lab, &last);
    all_restore(&lab, std::slice::from_ref(&shop));
    is_in_its_domain(&lab.repository, shop.0, &lab.repository);
    for (root, _) in &last {
        is_in_its_domain(&lab.repository, *root, &web);
    }

    // As much is there as if there had never been more.
    let fresh = in_memory();
    let its = adding(&fresh, key_for(&fresh, "web", "key"));
    for content in [&shop.1, &last[0].1, &last[1].1] {
        std::fs::write(fresh.disk(), content).expect("a disk");
        let by = if *content == shop.1 { &fresh.repository } else { &its };
        back_up(by, &fresh.disk(), of(&fresh, if *content == shop.1 { "shop" } else { "web" }));
    }
    let (needed, used) = (packs(&fresh).1, packs(&lab).1);
    assert!(used < needed + needed / 50 + 64 * 1024, "{used} bytes for {needed}");
    let log = lab.repository.log().expect("opens");
    assert!(log.state().sessions().all(|session| session.is_over), "whose were put beside is over");

    // The machine finds it all, also one that comes with nothing but its key; others do not.
    let again = back_up(&web, &lab.disk(), of(&lab, "web"));
    assert_eq!(again.new_bytes, 0, "all of it is there");
    let new = adding(&lab, key_for(&lab, "web", "again"));
    std::fs::remove_dir_all(lab.folder.path().join("cache")).expect("removes");
    assert_eq!(back_up(&new, &lab.disk(), of(&lab, "web")).new_bytes, 0);
    let mail = adding(&lab, key_for(&lab, "mail", "other"));
    let of_mail = back_up(&mail, &lab.disk(), of(&lab, "mail"));
    assert!(of_mail.new_bytes > 3 * MIB, "{of_mail:?}");

    // Each backup leaves a small segment behind: they become one.
    let mut kept = last.clone();
    for _ in 0..16 {
        lab.change(3);
        kept.push((back_up(&web, &lab.disk(), of(&lab, "web")).root, lab.content()));
    }
    let before = there(lab.repository.objects(), "segments/").0;
    let merged = gc(&lab, HOW);
    let after = there(lab.repository.objects(), "segments/").0;
    assert!(merged.segments >= 16 && after as u64 <= before as u64 + 1 - merged.segments, "{before} {after}");
    all_restore(&lab, &kept);
    std::fs::remove_dir_all(lab.folder.path().join("cache")).expect("removes");
    assert_eq!(back_up(&web, &lab.disk(), of(&lab, "web")).new_bytes, 0);

    // There is nothing to do twice, and nothing remains of nothing.
    gc(&lab, ALL_ANEW);
    assert_eq!(gc(&lab, ALL_ANEW).rewritten.packs, 0);
    let log = lab.repository.log().expect("opens");
    forget(&lab, &log.state().roots().keys().copied().collect::<Vec<_>>());
    gc(&lab, HOW);
    assert_eq!((packs(&lab), there(lab.repository.objects(), "segments/")), ((0, 0), (0, 0)));
}

/// One collection works in so many, those with the most waste first, and the next goes on.
#[test]
fn of_very_many_domains_some_are_left_for_the_next_collection() {
    let mut lab = in_memory();
    lab.make_disk(20 * CHUNK);
    let roots: Vec<u64> = (0..34)
        .map(|number| {
            let machine = format!("web-{number}");
            lab.fill(0, 20 * CHUNK);
            let web = adding(&lab, key_for(&lab, &machine, &machine));
            let old = back_up(&web, &lab.disk(), of(&lab, &machine)).root;
            lab.fill(0, 10 * CHUNK);
            back_up(&web, &lab.disk(), of(&lab, &machine));
            old
        })
        .collect();
    forget(&lab, &roots);
    // Where a collection put something.
    let written_in = |lab: &Lab| {
        let log = lab.repository.log().expect("opens");
        let state = log.state();
        let by_owner = state.sessions().filter(|session| session.key == state.maintenance().id());
        let own = lab.repository.writer().domain().id();
        let domains = by_owner.map(|session| session.domain).filter(|domain| *domain != own);
        (domains.collect::<BTreeSet<_>>().len(), state.next())
    };
    let (_, before) = written_in(&lab);
    let how = Collection { checkpoint_after: 10_000, ..ALL_ANEW };
    gc(&lab, how);
    let (domains, after) = written_in(&lab);
    assert_eq!(domains, 32);
    assert!(after - before <= 32 * 3 + 6, "{} entries", after - before);
    gc(&lab, how);
    let (domains, last) = written_in(&lab);
    assert_eq!(domains, 34);
    assert!(last - after <= 2 * 3 + 6, "{} entries", last - after);
}

/// A place that somebody watches who has the machine's key, too: whatever pack is about to be put, that one names it first, and puts
/// nothing.
struct Watched {
    inner: Arc<dyn Objects>,
    thief: Mutex<(Session, u64)>,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched").finish_non_exhaustive()
    }
}

impl Front for Watched {
    fn behind(&self) -> &dyn Objects {
        &*self.inner
    }

    fn create(&self, name: &Name, parts: &[&[u8]], until: Option<WallTime>) -> Result<Created, Error> {
        if let Some(PackName { pack, .. }) = PackName::parse(name) {
            let (thief, named) = &mut *self.thief.lock().expect("no holder panics");
            thief
                .segment(NOW, LogSegment { packs: vec![pack], indexes: Vec::new() })
                .expect("its own domain");
            *named += 1;
        }
        self.inner.create(name, parts, until)
    }
}

fn watched(lab: &Lab, thief: &Repository) -> Arc<Watched> {
    let inner = lab.repository.objects().clone();
    Arc::new(Watched { inner, thief: Mutex::new((session(thief), 0)) })
}

#[test]
fn who_names_what_a_collection_puts_hides_nothing() {
    let mut lab = in_memory();
    lab.make_disk(6 * MIB);
    let web = adding(&lab, key_for(&lab, "web", "key"));
    let first = back_up(&web, &lab.disk(), of(&lab, "web")).root;
    lab.change(40);
    let kept = (back_up(&web, &lab.disk(), of(&lab, "web")).root, lab.content());
    forget(&lab, &[first]);
    let place = watched(&lab, &web);
    let owner = Repository::open(place.clone(), &lab.folder.path().join("owner"), PASSPHRASE).expect("opens");
    let done = collect(&owner, &ALL_ANEW).expect("collects");
    let named = place.thief.lock().expect("no holder panics").1;
    assert!(done.rewritten.packs > 0 && named > 0, "{done:?}");
    // What was put stands for what it was made of, which is gone.
    let fresh = in_memory();
    std::fs::write(fresh.disk(), &kept.1).expect("a disk");
    back_up(&adding(&fresh, key_for(&fresh, "web", "key")), &fresh.disk(), of(&fresh, "web"));
    let (needed, used) = (packs(&fresh).1, packs(&lab).1);
    assert!(used < needed + needed / 50 + 64 * 1024, "{used} bytes for {needed}");
    for _ in 0..2 {
        all_restore(&lab, std::slice::from_ref(&kept));
        // Also when all that was named is over.
        let idle = Collection { idle: std::time::Duration::ZERO, now: WallTime(u64::MAX), ..ALL_ANEW };
        gc(&lab, idle);
    }
    all_restore(&lab, std::slice::from_ref(&kept));
}

#[test]
fn who_names_what_a_backup_puts_has_nothing_of_it_removed() {
    let mut lab = in_memory();
    lab.make_disk(MIB);
    lab.fill(0, MIB);
    let key = key_for(&lab, "web", "key");
    let thief = adding(&lab, key_for(&lab, "web", "stolen"));
    let place = watched(&lab, &thief);
    let web = Repository::open_to_add(place.clone(), &lab.folder.path().join("web"), key).expect("opens");
    let web = Arc::new(web);
    let file = std::fs::File::options().write(true).open(lab.disk()).expect("opens");
    file.set_len(5 * MIB).expect("grows");
    lab.fill(MIB, 4 * MIB);
    // Packs are live long before the commit.
    let mut writer = BackupWriter::open(web.clone()).expect("opens");
    writer.make_live_every(std::time::Duration::ZERO);
    let source = FileSource::open(&lab.disk()).expect("opens");
    let changes = Changes::Unknown("the test wants it".to_owned());
    let job = DiskJob { name: "vda", source: &source, changes, position: None, left_out: &[] };
    let disk = back_up_disk(&writer, web.chunk_size(), &job, crate::lab::PACE, &Progress::default());
    let point = rempart_repository::Point { disks: vec![disk.expect("stored")], ..of(&lab, "web") };
    let root = writer.commit(web.chain("web"), None, &point, None).expect("commits").root;
    assert!(place.thief.lock().expect("no holder panics").1 > 3);
    gc(&lab, Collection { follow: false, ..HOW });
    assert!(lab.restore(root).expect("restores") == lab.content());

    // Nor what the next one finds, in packs that have a number more.
    let again = back_up(&web, &lab.disk(), of(&lab, "web"));
    assert_eq!(again.new_bytes, 0);
    forget(&lab, &[root]);
    gc(&lab, Collection { follow: false, ..HOW });
    assert!(lab.restore(again.root).expect("restores") == lab.content());
}

/// The numbers of the packs that a point requires.
fn required(repository: &Repository, root: u64) -> Numbers {
    repository.log().expect("opens").state().roots()[&root].required.clone()
}

/// Whoever has the machine's key names its packs before they are put, and again when they are.
#[test]
fn an_index_knows_a_pack_by_all_of_its_numbers() {
    let mut lab = in_memory();
    lab.make_disk(4 * CHUNK);
    lab.fill(0, 4 * CHUNK);
    drop(key_for(&lab, "web", "key"));
    let thief = adding(&lab, key_for(&lab, "web", "stolen"));
    let place = watched(&lab, &thief);
    let folder = lab.folder.path().to_owned();
    let own = |cache: &str| {
        let key = WriterKey::load(&folder.join("key")).expect("read");
        Repository::open_to_add(place.clone(), &folder.join(cache), key)
    };
    let owners = |cache: &str| Repository::open(place.clone(), &folder.join(cache), PASSPHRASE);
    let index = |repository: &Repository| {
        let log = repository.log().expect("opens");
        repository.index(log.state()).expect("opens")
    };
    let web = Arc::new(own("web").expect("opens"));
    back_up(&web, &lab.disk(), of(&lab, "web"));
    index(&owners("owner").expect("opens"));
    let file = std::fs::File::options().write(true).open(lab.disk()).expect("opens");
    file.set_len(40 * CHUNK).expect("grows");
    lab.fill(0, 40 * CHUNK);
    let root = back_up(&web, &lab.disk(), of(&lab, "web")).root;
    let put = required(&web, root);
    let log = web.log().expect("opens");
    let state = log.state();
    let contents = put.iter().filter_map(|number| state.object(number)).map(|object| object.content);
    let packs = contents.filter_map(|content| match content {
        Content::Pack(pack) => Some(pack),
        Content::Index(_) => None,
    });
    let packs: Vec<_> = packs.collect();
    assert!(packs.len() > 2);
    session(&thief).segment(NOW, LogSegment { packs, indexes: Vec::new() }).expect("its own domain");

    // Brought up to date, and made anew: the owner's, and the machine's.
    let domain = web.writer().domain();
    for repository in ["owner", "owner-2"].map(owners).into_iter().chain(["web", "web-2"].map(own)) {
        let repository = repository.expect("opens");
        let index = index(&repository);
        for chunk in lab.content().chunks(CHUNK as usize) {
            let found = index.find(&domain.chunk_id(chunk)).expect("whole");
            assert_eq!(found.len(), 3, "{found:?}");
            assert!(found.iter().any(|located| put.contains(located.pack)), "{found:?}");
        }
    }
}

/// A backup goes on, and what it made comes back, though somebody says to have put what it finds, too.
#[test]
fn who_names_what_a_place_keeps_stops_no_backup_and_none_from_being_brought_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let period = std::time::Duration::from_secs(3600);
    let mut lab = Lab::keeping(folder, Arc::new(Memory::default()), Some(period));
    lab.make_disk(4 * CHUNK);
    lab.fill(0, 4 * CHUNK);
    let thief = adding(&lab, key_for(&lab, "web", "stolen"));
    let key = key_for(&lab, "web", "key");
    let place = watched(&lab, &thief);
    let web = Repository::open_to_add(place, &lab.folder.path().join("web"), key).expect("opens");
    let web = Arc::new(web);
    let first = back_up(&web, &lab.disk(), of(&lab, "web")).root;
    let again = back_up(&web, &lab.disk(), of(&lab, "web"));
    assert_eq!(again.new_bytes, 0);
    assert!(required(&web, again.root).len() > required(&web, first).len(), "by all of their numbers");
    forget(&lab, &[again.root]);
    let log = lab.repository.log().expect("opens");
    let forgotten = lab.repository.forgotten(&log).expect("told").points;
    let forgotten: Vec<_> = forgotten.iter().filter(|point| point.root == again.root).collect();
    lab.repository.undelete(&forgotten, NOW, |_| ()).expect("brings back");
    assert!(lab.restore(again.root).expect("restores") == lab.content());
}

/// A key that only adds makes up packs that open with another key, and has a backup reach what they are said to hold.
#[test]
fn what_somebody_made_up_stops_no_collection() {
    let mut lab = in_memory();
    lab.make_disk(3 * MIB);
    lab.fill(0, 3 * MIB);
    let shop = (back_up(&lab.repository, &lab.disk(), of(&lab, "shop")).root, lab.content());
    let web = adding(&lab, key_for(&lab, "web", "key"));
    let first = back_up(&web, &lab.disk(), of(&lab, "web")).root;
    for kind in [BlobKind::Data, BlobKind::Tree] {
        // Of the same repository, by a key that it never had.
        let other = KeyRing::new(lab.repository.id(), MasterKey::random()).new_writer(name("web"));
        let made_up: Vec<_> = removed(&lab, first, kind).into_iter().map(|id| (id, &[7; 1000][..])).collect();
        put(&web, session(&web), &other, kind, &made_up);
        let done = gc(&lab, ALL_ANEW);
        assert_eq!(done.unreadable.contains_key(&first), kind == BlobKind::Tree, "{done:?}");
        all_restore(&lab, std::slice::from_ref(&shop));
    }
}

/// Removes what a backup reaches of a kind. Returns the ids.
fn removed(lab: &Lab, root: u64, kind: BlobKind) -> Vec<ChunkId> {
    let objects = lab.repository.objects();
    let log = lab.repository.log().expect("opens");
    let (state, mut ids) = (log.state(), Vec::new());
    for object in state.roots()[&root].required.iter().filter_map(|number| state.object(number)) {
        let Content::Pack(pack) = object.content else { continue };
        let name = PackName { session: state.owner(&object).id, pack };
        let opener = lab.repository.opener().expect("the owner's");
        let Ok(opened) = PackOpener::fetch(&**objects, opener, name) else { continue };
        let blobs = opened.fetch_blobs(&**objects).expect("whole");
        let of_it: Vec<_> = blobs.iter().filter(|blob| blob.kind == kind).map(|blob| blob.id).collect();
        if !of_it.is_empty() {
            objects.remove(&name.object()).expect("removes");
            ids.extend(of_it);
        }
    }
    assert!(!ids.is_empty());
    ids
}

/// Puts a pack that `key` seals into the session of `web`, and makes it live. One of its blobs nobody reaches.
fn put(web: &Repository, mut session: Session, key: &WriterKey, kind: BlobKind, blobs: &[(ChunkId, &[u8])]) {
    let objects = web.objects();
    let mut pack = PackBuilder::new(key, 8 * MIB, BufferMut::default());
    let unreached = (web.writer().domain().chunk_id(b"nobody has this"), &[7; CHUNK as usize][..]);
    for (id, plain) in blobs.iter().chain([&unreached]) {
        pack.add(kind, *id, plain, &mut Compressor::new());
    }
    let pack = pack.finish();
    objects.create(&pack.name(session.id()).object(), &[pack.bytes()], None).expect("puts");
    let mut segment = SegmentBuilder::new();
    segment.add(pack.id(), pack.blobs());
    let sealed = segment.seal(web.writer());
    let name = sealed.name(session.id());
    objects.create(&name.object(), &[sealed.bytes()], None).expect("puts");
    let made = LogSegment { packs: sealed.packs().to_vec(), indexes: vec![name.segment] };
    session.segment(NOW, made).expect("its own domain");
    session.end(NOW).expect("ends");
}

/// What opens with the keys of another domain does not open with those of the one it lies in.
#[test]
fn what_is_of_another_domain_than_the_one_it_lies_in_is_not_written_anew() {
    let mut lab = in_memory();
    lab.make_disk(8 * CHUNK);
    lab.fill(0, 8 * CHUNK);
    let web = adding(&lab, key_for(&lab, "web", "key"));
    let mail = adding(&lab, key_for(&lab, "mail", "other"));
    let kept = (back_up(&mail, &lab.disk(), of(&lab, "mail")).root, lab.content());
    removed(&lab, kept.0, BlobKind::Data);
    let domain = mail.writer().domain();
    let blobs: Vec<_> = kept.1.chunks(CHUNK as usize).map(|chunk| (domain.chunk_id(chunk), chunk)).collect();
    put(&web, session(&web), mail.writer(), BlobKind::Data, &blobs);
    all_restore(&lab, std::slice::from_ref(&kept));
    gc(&lab, ALL_ANEW);
    all_restore(&lab, std::slice::from_ref(&kept));
}

/// A place in which, right before a collection condemns, another one does that follows nothing, removes what it condemned, and dies.
struct Overtaken {
    inner: Arc<dyn Objects>,
    other: Arc<Repository>,
    /// Entries that were put since the last segment was.
    entries: AtomicU64,
}

impl std::fmt::Debug for Overtaken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overtaken").finish_non_exhaustive()
    }
}

impl Front for Overtaken {
    fn behind(&self) -> &dyn Objects {
        &*self.inner
    }

    fn create(&self, name: &Name, parts: &[&[u8]], until: Option<WallTime>) -> Result<Created, Error> {
        if name.as_str().starts_with("segments/") {
            self.entries.store(1, Ordering::SeqCst);
        } else if name.as_str().starts_with("log/") && self.entries.load(Ordering::SeqCst) > 0 {
            // What was put is live, then its session is over, then this.
            if self.entries.fetch_add(1, Ordering::SeqCst) == 3 {
                let mut session = session(&self.other);
                let mut other = Collector::new(&mut session, NOW, false).expect("nothing is doubtful");
                assert!(other.condemn(None).expect("condemns").objects > 0);
                assert!(other.delete().expect("removes").objects > 0);
            }
        }
        self.inner.create(name, parts, until)
    }
}

#[test]
fn what_another_collection_removed_meanwhile_stands_for_nothing() {
    let mut lab = in_memory();
    lab.make_disk(24 * CHUNK);
    lab.fill(0, 24 * CHUNK);
    let web = adding(&lab, key_for(&lab, "web", "key"));
    let first = back_up(&web, &lab.disk(), of(&lab, "web")).root;
    for chunk in [0, 7, 14, 21] {
        lab.fill(chunk * CHUNK, CHUNK);
    }
    let kept = (back_up(&web, &lab.disk(), of(&lab, "web")).root, lab.content());
    forget(&lab, &[first]);
    let (inner, other) = (lab.repository.objects().clone(), lab.repository.clone());
    let place = Arc::new(Overtaken { inner, other, entries: AtomicU64::new(0) });
    let owner = Repository::open(place.clone(), &lab.folder.path().join("owner"), PASSPHRASE).expect("opens");
    let done = collect(&owner, &ALL_ANEW).expect("collects");
    assert!(done.rewritten.packs > 0 && place.entries.load(Ordering::SeqCst) > 3, "{done:?}");
    all_restore(&lab, std::slice::from_ref(&kept));
    gc(&lab, ALL_ANEW);
    all_restore(&lab, std::slice::from_ref(&kept));
}

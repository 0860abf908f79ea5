//! Files there and back: everything that a folder can hold, what an enemy writes, and damage.

use crate::lab::{Lab, PACE};
use globset::GlobSet;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use rempart_backup::{
    Entry, FileReader, FilesJob, Kind, Pace, Progress, Selection, Time, back_up_files, check_files,
    copy_files, restore_files,
};
use rempart_objects::Memory;
use rempart_repository::{
    BackupWriter, BlobReader, ChunkId, Error, FileTree, HowRead, NodeSource, Point, Repository, Tree,
    TreeUpdate,
};
use rempart_types::WallTime;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, lgetxattr, llistxattr, lsetxattr, makedev, mknodat};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const CHUNK: usize = 64 << 10;

fn lab() -> Lab {
    Lab::on(tempfile::tempdir().expect("a folder"), Arc::new(Memory::default()))
}

/// A point of everything in a folder; what was noted, and how many bytes were read.
fn back_up(lab: &Lab, repository: &Arc<Repository>, what: &[PathBuf]) -> (u64, Vec<String>, u64) {
    // Nothing is audited, so that what is read is told by what changed.
    let (root, notes, how) = back_up_audited(lab, repository, what, 0);
    (root, notes, how.read)
}

fn back_up_audited(
    lab: &Lab,
    repository: &Arc<Repository>,
    what: &[PathBuf],
    audit: usize,
) -> (u64, Vec<String>, HowRead) {
    let selection = Selection::new(what, GlobSet::empty(), true).expect("it is there");
    let writer = BackupWriter::open(repository.clone()).expect("opens");
    let cache = repository.cache_folder().expect("a folder");
    let job = FilesJob { selection: &selection, cache: &cache };
    let pace = Pace { audit, ..PACE };
    let stored = back_up_files(&writer, &job, pace, &Progress::default()).expect("stored");
    let how = stored.tree.how.clone();
    let point = Point { files: Some(stored.tree), ..lab.point(Vec::new()) };
    let written = writer.commit(repository.chain("shop"), None, &point, None).expect("committed");
    stored.known.keep().expect("kept");
    (written.root, stored.notes, how)
}

/// Does something with the files of a point.
fn with_files<T>(lab: &Lab, root: u64, work: impl FnOnce(&FileReader<'_>) -> T) -> T {
    let log = lab.repository.log().expect("opens");
    let tree = lab.repository.point(&log, root).expect("reads").files.expect("it has files");
    with_tree(lab, &tree, work)
}

fn with_tree<T>(lab: &Lab, tree: &FileTree, work: impl FnOnce(&FileReader<'_>) -> T) -> T {
    let log = lab.repository.log().expect("opens");
    let index = lab.repository.index(log.state()).expect("an index");
    let reader = BlobReader::new(&lab.repository, log.state(), index);
    work(&FileReader::new(&reader, tree).expect("files"))
}

fn restored(lab: &Lab, root: u64, wanted: &[u8], to: &str) -> PathBuf {
    let to = lab.folder.path().join(to);
    with_files(lab, root, |files| {
        let restored = restore_files(files, wanted, &to, 3, &Progress::default()).expect("restores");
        assert_eq!(restored.failed, 0, "{:?}", restored.named);
    });
    to
}

/// All that there is to know of what is below a folder.
fn inventory(folder: &Path) -> BTreeMap<Vec<u8>, String> {
    fn walk(root: &Path, folder: &Path, found: &mut BTreeMap<Vec<u8>, String>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("reads").path();
            let stat = fs::symlink_metadata(&path).expect("it is there");
            let what = if stat.is_symlink() {
                format!("{:?}", fs::read_link(&path).expect("a link"))
            } else if stat.is_file() {
                format!("{} {}", stat.size(), sum(&path))
            } else {
                String::new()
            };
            let names = if stat.is_dir() { 0 } else { stat.nlink() };
            let time = (stat.mtime(), stat.mtime_nsec());
            let described = format!(
                "{:o} {} {} {names} {:?} {} {what} {:?}",
                stat.mode(),
                stat.uid(),
                stat.gid(),
                time,
                stat.rdev(),
                attributes(&path)
            );
            found.insert(path.strip_prefix(root).expect("below").as_os_str().as_bytes().to_vec(), described);
            if stat.is_dir() {
                walk(root, &path, found);
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(folder, folder, &mut found);
    found
}

/// A sum over what is not zeroes, and where: holes may be long.
fn sum(path: &Path) -> String {
    let file = File::open(path).expect("opens");
    let len = file.metadata().expect("it is there").len();
    let (mut sum, mut at, mut block) = (0u64, 0, [0; 4096]);
    while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        at = start - start % 4096;
        let part = &mut block[..(len - at).min(4096) as usize];
        file.read_exact_at(part, at).expect("reads");
        if part.iter().any(|byte| *byte != 0) {
            let bytes = at.to_le_bytes().into_iter().chain(part.iter().copied());
            sum = bytes.fold(sum, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        }
        at += 4096;
    }
    format!("{sum:x}")
}

fn attributes(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0; 4096];
    let len = llistxattr(path, names.as_mut_slice()).expect("lists");
    let names = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 4096];
        let len = lgetxattr(path, name, value.as_mut_slice()).expect("reads");
        (String::from_utf8_lossy(name).into_owned(), value[..len].to_vec())
    };
    let mut found: Vec<_> = names.map(value).collect();
    found.sort_unstable();
    found
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// A folder with everything that one can have.
fn make_tree(at: &Path) {
    let path = |name: &str| at.join(name);
    fs::create_dir_all(path("deep/er/and/deeper")).expect("made");
    fs::create_dir(path("empty")).expect("made");
    fs::write(path("deep/er/large"), noise(1, 5 * CHUNK + 77)).expect("written");
    fs::write(path("deep/er/and/deeper/small"), b"small").expect("written");
    fs::write(path("nothing"), b"").expect("written");
    fs::write(path("deep.txt"), b"beside `deep/`, and not in it").expect("written");
    let sparse = File::create(path("sparse")).expect("made");
    sparse.set_len(1 << 40).expect("long");
    sparse.write_all_at(b"in the middle", 1 << 39).expect("written");
    symlink("/nowhere/at/all", path("dangling")).expect("made");
    symlink("deep", path("to a folder")).expect("made");
    fs::hard_link(path("deep/er/large"), path("again")).expect("made");
    fs::hard_link(path("deep/er/large"), path("deep/once more")).expect("made");
    fs::write(at.join(std::ffi::OsString::from_vec(b"no text \xff\xfe".to_vec())), b"x").expect("written");
    for (name, kind) in [("pipe", FileType::Fifo), ("socket", FileType::Socket)] {
        mknodat(CWD, path(name), kind, Mode::RUSR, 0).expect("made");
    }
    if rustix::process::geteuid().is_root() {
        mknodat(CWD, path("null"), FileType::CharacterDevice, Mode::RUSR, makedev(1, 3)).expect("made");
        std::os::unix::fs::chown(path("deep/er"), Some(1234), Some(4321)).expect("given away");
        std::os::unix::fs::lchown(path("dangling"), Some(77), Some(88)).expect("given away");
    }
    lsetxattr(path("nothing"), c"user.colour", b"blue\0", XattrFlags::empty()).expect("set");
    lsetxattr(path("deep"), c"user.shape", b"", XattrFlags::empty()).expect("set");
    fs::set_permissions(path("deep/er/and/deeper/small"), PermissionsExt::from_mode(0o6751)).expect("set");
    fs::set_permissions(path("empty"), PermissionsExt::from_mode(0o1777)).expect("set");
    fs::set_permissions(path("deep/er/and"), PermissionsExt::from_mode(0o500)).expect("set");
}

#[test]
fn everything_that_a_folder_can_hold_comes_back() {
    let lab = lab();
    let tree = lab.folder.path().join("tree");
    make_tree(&tree);
    let before = inventory(&tree);
    let (root, notes, _) = back_up(&lab, &lab.repository, std::slice::from_ref(&tree));
    assert_eq!(notes, Vec::<String>::new());
    let to = restored(&lab, root, b"", "to");
    let there = to.join(tree.strip_prefix("/").expect("whole"));
    assert_eq!(inventory(&there), before);
    let sparse = fs::metadata(there.join("sparse")).expect("it is there");
    assert!(sparse.blocks() < 1024, "holes stay holes");
    let parent = fs::metadata(there.parent().expect("a folder")).expect("it is there");
    let original = fs::metadata(lab.folder.path()).expect("it is there");
    assert_eq!(parent.mode(), original.mode(), "what leads there is as it was, too");
    with_files(&lab, root, |files| {
        let checked = check_files(files.reader(), files.tree(), &Progress::default()).expect("reads");
        assert_eq!((checked.damaged, checked.chunks), (Vec::new(), Vec::new()));
        restore_files(files, b"", &to, 1, &Progress::default()).expect_err("nothing is overwritten");
    });
}

#[test]
fn one_file_comes_back_with_what_leads_there_also_by_its_other_name() {
    let lab = lab();
    let tree = lab.folder.path().join("tree");
    make_tree(&tree);
    let (root, _, _) = back_up(&lab, &lab.repository, std::slice::from_ref(&tree));
    let base = tree.strip_prefix("/").expect("whole");
    // The first name of both is `again`, which is not wanted.
    let wanted = base.join("deep");
    let to = restored(&lab, root, wanted.as_os_str().as_bytes(), "to");
    let there = to.join(base);
    let names: Vec<_> =
        fs::read_dir(&there).expect("a folder").map(|one| one.expect("reads").file_name()).collect();
    assert_eq!(names, ["deep"]);
    for name in ["deep/er/large", "deep/once more"] {
        assert!(fs::read(there.join(name)).expect("reads") == noise(1, 5 * CHUNK + 77), "{name}");
        assert_eq!(fs::metadata(there.join(name)).expect("it is there").nlink(), 2);
    }
    with_files(&lab, root, |files| {
        let to = lab.folder.path().join("nothing");
        let error = restore_files(files, b"no/such/file", &to, 1, &Progress::default());
        error.expect_err("there is none");
        assert!(!to.exists());
    });
}

/// Whatever happens to files between backups, and whatever is remembered of them.
#[test]
fn what_changed_is_found_round_after_round() {
    let lab = lab();
    let tree = lab.folder.path().join("tree");
    fs::create_dir(&tree).expect("made");
    let mut random = SmallRng::seed_from_u64(7);
    for round in 0..12 {
        for _ in 0..random.random_range(1..8) {
            let folder = tree.join(format!("f{}", random.random_range(0..4)));
            let path = folder.join(format!("n{}", random.random_range(0..6)));
            match random.random_range(0..5) {
                0 => drop(fs::remove_file(&path)),
                1 => drop(fs::remove_dir_all(&folder)),
                2 => drop(fs::rename(&path, tree.join(format!("moved{round}")))),
                _ => {
                    fs::create_dir_all(&folder).expect("made");
                    let len = random.random_range(0..3 * CHUNK);
                    fs::write(&path, noise(random.random(), len)).expect("written");
                }
            }
        }
        if round == 6 {
            // What is remembered is only a help.
            let cache = lab.repository.cache_folder().expect("a folder");
            for file in fs::read_dir(cache).expect("a folder").map(|file| file.expect("reads").path()) {
                if file.file_name().expect("a name").as_bytes().starts_with(b"files-") {
                    fs::write(file, b"garbage").expect("written");
                }
            }
        }
        let before = inventory(&tree);
        let (root, _, _) = back_up(&lab, &lab.repository, std::slice::from_ref(&tree));
        let to = restored(&lab, root, b"", &format!("to{round}"));
        assert_eq!(inventory(&to.join(tree.strip_prefix("/").expect("whole"))), before, "{round}");
    }
}

/// A change within the clock's resolution would not show: what is too new is read again.
#[test]
fn what_did_not_change_is_not_read_once_it_is_old_enough() {
    let lab = lab();
    let tree = lab.folder.path().join("tree");
    make_tree(&tree);
    let back_dated = tree.join("back-dated");
    fs::write(&back_dated, b"before").expect("written");
    let all = [tree.clone()];
    let (_, _, first) = back_up(&lab, &lab.repository, &all);
    assert!(first > 5 * CHUNK as u64);
    // The times are the file system's, and cannot be set back.
    std::thread::sleep(std::time::Duration::from_millis(4100));
    let (_, _, again) = back_up(&lab, &lab.repository, &all);
    assert_eq!(again, first, "they were too new");
    fs::write(tree.join("deep.txt"), b"new").expect("written");
    // Its size is the same, and so is when it was modified, as its writer says.
    let modified = fs::metadata(&back_dated).and_then(|file| file.modified()).expect("known");
    fs::write(&back_dated, b"behind").expect("written");
    File::options().write(true).open(&back_dated).and_then(|file| file.set_modified(modified)).expect("set");
    let (root, _, last) = back_up(&lab, &lab.repository, &all);
    assert_eq!(last, 3 + 6);
    let to = restored(&lab, root, b"", "to");
    assert_eq!(inventory(&to.join(tree.strip_prefix("/").expect("whole"))), inventory(&tree));
}

/// A file system of its own, mounted as long as this is there: beneath it, bytes can be changed that nobody wrote.
struct FileSystem {
    image: PathBuf,
    folder: PathBuf,
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output().expect("it is installed");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

impl FileSystem {
    fn new(lab: &Lab) -> FileSystem {
        let (image, folder) = (lab.folder.path().join("image"), lab.folder.path().join("mounted"));
        File::create(&image).and_then(|file| file.set_len(32 << 20)).expect("made");
        run("mkfs.ext4", &["-q", image.to_str().expect("text")]);
        fs::create_dir(&folder).expect("made");
        let system = FileSystem { image, folder };
        system.mount();
        system
    }

    fn mount(&self) {
        run(
            "mount",
            &["-o", "loop", self.image.to_str().expect("text"), self.folder.to_str().expect("text")],
        );
    }

    /// Does something to it while nobody has it mounted.
    fn beneath(&self, work: impl FnOnce(&str)) {
        run("umount", &[self.folder.to_str().expect("text")]);
        work(self.image.to_str().expect("text"));
        self.mount();
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}

#[test]
fn a_file_that_changed_and_does_not_show_it_is_found_stored_and_told() {
    let lab = lab();
    let system = FileSystem::new(&lab);
    let path = |name: &str| system.folder.join(name);
    for (number, name) in ["one", "two", "three"].into_iter().enumerate() {
        fs::write(path(name), noise(number as u64 + 1, 3 * CHUNK + 100)).expect("written");
    }
    File::create(path("hole")).and_then(|file| file.set_len(2 * CHUNK as u64)).expect("made");
    // Long ago, so that their times tell of changes.
    system.beneath(|image| {
        for name in ["one", "two", "three", "hole"] {
            for time in ["ctime", "mtime"] {
                run(
                    "debugfs",
                    &["-w", "-R", &format!("set_inode_field /{name} {time} 20200101000000"), image],
                );
            }
        }
    });
    let all = [system.folder.clone()];
    let back_up = |audit| back_up_audited(&lab, &lab.repository, &all, audit);
    let (_, _, first) = back_up(64);
    assert_eq!((first.audited, first.full_because.is_some()), (0, true));
    let sum = 3 * (3 * CHUNK + 100) + 2 * CHUNK;
    let (second, notes, how) = back_up(64);
    // All chunks, holes too, are no more than are drawn.
    assert_eq!((how.audited, how.missed, how.read), (14, 0, sum as u64));
    assert_eq!((how.full_because, notes), (None, vec![]));
    assert_eq!(back_up(5).2.audited, 5);

    let identity = || {
        let stat = fs::metadata(path("two")).expect("there");
        (stat.ino(), stat.size(), stat.mtime(), stat.mtime_nsec(), stat.ctime(), stat.ctime_nsec())
    };
    let before = identity();
    system.beneath(|image| {
        // Its third chunk, of 64 KiB, begins with its 33rd block of 4 KiB or its 129th of 1 KiB.
        let block_size: u64 = run("debugfs", &["-R", "stats -h", image])
            .lines()
            .find_map(|line| line.strip_prefix("Block size:")?.trim().parse().ok())
            .expect("it is told");
        let logical = 2 * CHUNK as u64 / block_size;
        let block: u64 =
            run("debugfs", &["-R", &format!("bmap /two {logical}"), image]).trim().parse().expect("a block");
        let image = File::options().read(true).write(true).open(image).expect("opens");
        let mut byte = [0];
        image.read_exact_at(&mut byte, block * block_size + 17).expect("reads");
        image.write_all_at(&[byte[0] ^ 1], block * block_size + 17).expect("written");
    });
    assert_eq!(identity(), before, "it does not show");
    let rotten = fs::read(path("two")).expect("reads");
    assert!(rotten != noise(2, 3 * CHUNK + 100));

    assert_eq!(back_up(0).2.missed, 0, "who does not look does not see");
    let (found, notes, how) = back_up(64);
    assert_eq!((how.audited, how.missed), (14, 1));
    let why =
        "1 of 14 chunks of files that had not changed, by their sizes and times, were other than before";
    assert_eq!(how.full_because.as_deref(), Some(why));
    assert!(how.read >= 2 * sum as u64 - 2 * CHUNK as u64, "all was read: {how:?}");
    assert!(how.new >= CHUNK as u64, "{how:?}");
    let told = format!(
        "files were other than before, and their sizes and times the same: {}",
        path("two").display()
    );
    assert_eq!(notes, [told]);
    for (root, to, content) in [(second, "before", noise(2, 3 * CHUNK + 100)), (found, "after", rotten)] {
        let to = restored(&lab, root, b"", to).join(system.folder.strip_prefix("/").expect("whole"));
        assert!(fs::read(to.join("two")).expect("reads") == content);
    }
    let (_, notes, how) = back_up(64);
    assert_eq!((how.audited, how.missed, how.full_because, notes), (14, 0, None, vec![]), "it is known now");
}

#[test]
fn caches_and_what_is_excluded_are_left_out_and_told() {
    let lab = lab();
    let tree = lab.folder.path().join("tree");
    fs::create_dir_all(tree.join("cache/below")).expect("made");
    fs::write(tree.join("cache/CACHEDIR.TAG"), b"Signature: 8a477f597d28d172789f06886806bc55\n")
        .expect("written");
    fs::write(tree.join("kept"), b"kept").expect("written");
    let (root, notes, _) = back_up(&lab, &lab.repository, std::slice::from_ref(&tree));
    assert_eq!(notes, ["1 caches were left empty"]);
    let to = restored(&lab, root, b"", "to").join(tree.strip_prefix("/").expect("whole"));
    let names: Vec<Vec<u8>> = inventory(&to).into_keys().collect();
    assert_eq!(names, [&b"cache"[..], b"cache/CACHEDIR.TAG", b"kept"]);
}

#[test]
fn a_copy_in_other_keys_holds_the_same_files() {
    let (lab, other) = (lab(), lab());
    let tree = lab.folder.path().join("tree");
    make_tree(&tree);
    let (root, _, _) = back_up(&lab, &lab.repository, std::slice::from_ref(&tree));
    let writer = BackupWriter::open(other.repository.clone()).expect("opens");
    let copied = with_files(&lab, root, |files| {
        let log = lab.repository.log().expect("opens");
        let index = lab.repository.index(log.state()).expect("an index");
        let reader = BlobReader::new(&lab.repository, log.state(), index);
        copy_files(&writer, &reader, files.tree(), &Progress::default()).expect("copied")
    });
    let point = Point { files: Some(copied), ..other.point(Vec::new()) };
    let written = writer.commit(other.repository.chain("shop"), None, &point, None).expect("committed");
    let to = restored(&other, written.root, b"", "to");
    assert_eq!(inventory(&to.join(tree.strip_prefix("/").expect("whole"))), inventory(&tree));
}

struct Nothing;

impl NodeSource for Nothing {
    fn node(&self, _: &ChunkId) -> Result<Vec<u8>, Error> {
        unreachable!("all was zeroes")
    }
}

/// Files as somebody writes them who holds a key, and to no rule.
pub fn forged(lab: &Lab, pages: &[Vec<Entry>], contents: &[&[u8]]) -> FileTree {
    let writer = BackupWriter::open(lab.repository.clone()).expect("opens");
    let mut blobs = writer.blobs();
    let mut tree = |chunks: Vec<Vec<u8>>| {
        let zero = Tree::zero(chunks.len() as u64);
        let mut tree = TreeUpdate::new(writer.domain(), &Nothing, zero).expect("begins");
        for (number, chunk) in (0..).zip(&chunks) {
            let id = blobs.chunk(chunk).expect("stored");
            tree.set(number, id, &mut blobs).expect("set");
        }
        tree.finish(&mut blobs).expect("ends")
    };
    let encode = |entry: &Entry| postcard::to_allocvec(entry).expect("encodes");
    let files = FileTree {
        pages: tree(pages.iter().map(|page| page.iter().flat_map(encode).collect()).collect()),
        contents: tree(contents.iter().map(|content| content.to_vec()).collect()),
        starts: writer.keep(&vec![0; pages.len() * 8]).expect("kept"),
        chunk_size: CHUNK as u32,
        entries: 0,
        bytes: 0,
        unread: 0,
        position: None,
        how: HowRead { full_because: None, read: 0, new: 0, audited: 0, missed: 0 },
    };
    blobs.finish().expect("stored");
    let point = Point { files: Some(files.clone()), ..lab.point(Vec::new()) };
    writer.commit(lab.repository.chain("shop"), None, &point, None).expect("committed");
    files
}

pub fn entry(path: &str, kind: Kind) -> Entry {
    let modified = Time { seconds: 1, nanoseconds: 0 };
    let path = path.as_bytes().to_vec();
    let attributes = Vec::new();
    Entry { path, kind, mode: 0o700, owner: 0, group: 0, modified, attributes, unread: None }
}

#[test]
fn nothing_leads_out_of_the_folder() {
    let lab = lab();
    let outside = lab.folder.path().join("outside");
    fs::create_dir(&outside).expect("made");
    fs::write(outside.join("file"), b"mine").expect("written");
    let link = || Kind::Link { target: outside.as_os_str().as_bytes().to_vec() };
    let file = || Kind::File { size: 3 };
    let again = |of: &str| Kind::Again { of: of.as_bytes().to_vec() };
    let through_links = [
        // A link, and then a file through it.
        vec![entry("a", link()), entry("a/new", file())],
        vec![entry("a", link()), entry("a/file", file())],
        vec![entry("a", link()), entry("a/folder", Kind::Folder), entry("a/folder/new", file())],
        // Another name of what is behind a link, or of a link.
        vec![entry("a", link()), entry("b", again("a/file"))],
        vec![entry("a", Kind::Folder), entry("a/b", link()), entry("c", again("a/b/file"))],
        // A folder that nobody made.
        vec![entry("x/new", file())],
    ];
    for (number, page) in through_links.into_iter().enumerate() {
        let tree = forged(&lab, &[page], &[b"new"]);
        let to = lab.folder.path().join(format!("to{number}"));
        let done = with_tree(&lab, &tree, |files| restore_files(files, b"", &to, 1, &Progress::default()));
        assert!(done.expect("the rest is restored").failed > 0, "{number}");
    }
    let refused = [
        vec![vec![entry("../x", file())]],
        vec![vec![entry("/x", file())]],
        vec![vec![entry("a/../../x", file())]],
        vec![vec![entry("a", link()), entry("a", Kind::Folder)]],
        // The same name again, on another page.
        vec![vec![entry("a", link())], vec![entry("a", Kind::Folder), entry("a/new", file())]],
        vec![vec![entry("a", Kind::File { size: 1 << 50 })]],
    ];
    for (number, pages) in refused.into_iter().enumerate() {
        let tree = forged(&lab, &pages, &[b"new"]);
        let to = lab.folder.path().join(format!("refused{number}"));
        let done = with_tree(&lab, &tree, |files| restore_files(files, b"", &to, 1, &Progress::default()));
        done.expect_err("it is damaged");
    }
    let names: Vec<Vec<u8>> = inventory(&outside).into_keys().collect();
    assert_eq!(names, [b"file"]);
    let stat = fs::metadata(outside.join("file")).expect("it is there");
    assert_eq!((fs::read(outside.join("file")).expect("reads"), stat.nlink()), (b"mine".to_vec(), 1));
    assert!(!lab.folder.path().join("x").exists());
}

/// The list of where each page's content begins is damaged: it is named, and stored anew by the next backup, though nothing changed.
#[test]
fn where_pages_begin_is_checked_and_mended_as_all_else() {
    let lab = Lab::new();
    let tree = lab.folder.path().join("tree");
    fs::create_dir(&tree).expect("made");
    for number in 0..3000 {
        fs::write(tree.join(format!("{number:0200}")), number.to_string()).expect("written");
    }
    let back_up = || back_up(&lab, &lab.repository, std::slice::from_ref(&tree)).0;
    let root = back_up();
    let point = lab.repository.point(&lab.repository.log().expect("opens"), root).expect("reads");
    let files = point.files.expect("it has files");
    let check = || {
        let log = lab.repository.log().expect("opens");
        let index = lab.repository.index(log.state()).expect("an index");
        let reader = BlobReader::new(&lab.repository, log.state(), index);
        check_files(&reader, &files, &Progress::default()).expect("reads")
    };
    assert_eq!(check().damaged, Vec::new());
    let [starts] = files.starts.0[..] else { panic!("one chunk: {:?}", files.starts) };
    let log = lab.repository.log().expect("opens");
    let located = lab.repository.index(log.state()).expect("an index").find(&starts).expect("reads");
    let [located] = &located[..] else { panic!("it lies once: {located:?}") };
    let object = log.state().object(located.pack).expect("its pack is known");
    let name = object.content.object(log.state().owner(&object).id);
    let path = lab.folder.path().join("repository").join(name.as_str());
    let mut bytes = fs::read(&path).expect("reads");
    bytes[located.blob.offset as usize + 3] ^= 1;
    fs::write(&path, bytes).expect("written");

    let found = check();
    assert_eq!((found.entries, &found.chunks), (0, &vec![starts]));
    let [damaged] = &found.damaged[..] else { panic!("{:?}", found.damaged) };
    assert!(damaged.path.is_empty() && damaged.why.contains("none of its files is known"), "{damaged:?}");
    lab.repository.report_damaged(&found.chunks, WallTime(5)).expect("reports");
    back_up();
    assert_eq!(check().damaged, Vec::new());
    assert_eq!(check().entries, 3000 + tree.components().count() as u64 - 1);
}

/// Seven nodes are enough for 2⁵⁶ pages; their order is not.
#[test]
fn a_tree_that_repeats_itself_ends() {
    let lab = lab();
    let page = vec![entry("a", Kind::Folder)];
    let tree = forged(&lab, &[page.clone(), page], &[]);
    with_tree(&lab, &tree, |files| {
        let checked = check_files(files.reader(), files.tree(), &Progress::default()).expect("it ends");
        assert_eq!((checked.entries, checked.damaged.len()), (1, 1));
    });
    let log = lab.repository.log().expect("opens");
    let index = lab.repository.index(log.state()).expect("an index");
    let reader = BlobReader::new(&lab.repository, log.state(), index);
    for changed in [
        FileTree { pages: Tree { chunks: 1 << 40, ..tree.pages }, ..tree.clone() },
        FileTree { starts: (tree.starts.0.clone(), u64::MAX), ..tree.clone() },
        FileTree { starts: (Vec::new(), 16), ..tree.clone() },
        FileTree { chunk_size: 0, ..tree.clone() },
    ] {
        FileReader::new(&reader, &changed).expect_err("no such tree");
    }
}

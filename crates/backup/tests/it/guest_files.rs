//! Readers of guests' file systems that misbehave: programs in their place that do.

use crate::lab::{Lab, PASSPHRASE};
use rempart_backup::{ChunkCache, Content, DiskReader, GuestDisks, GuestError, GuestReaders, ReadLimits};
use rempart_objects::Directory;
use rempart_repository::Repository;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

type Told = Arc<Mutex<Vec<String>>>;

/// A disk, looked at by `program`.
fn disks(lab: &mut Lab, program: &'static [&'static str], time: Duration) -> (GuestDisks, Told) {
    lab.make_disk(4 << 20);
    let (_, disk) = lab.back_up(None, None).expect("backs up");
    let place = Arc::new(Directory::open(&lab.folder.path().join("repository")).expect("opens"));
    let opened = Repository::open(place, &lab.folder.path().join("cache"), PASSPHRASE).expect("opens");
    let cache = ChunkCache::new(Arc::new(opened), 1 << 20).expect("opens");
    let reader = DiskReader::new(&cache, "vda", Content::of(&disk, lab.repository.chunk_size()));
    let told = Told::default();
    let tell = told.clone();
    let readers = GuestReaders::new(
        Box::new(|| {
            let mut command = Command::new(program[0]);
            command.args(&program[1..]);
            command
        }),
        ReadLimits { time, bytes: 1 << 20 },
        Box::new(move |what| tell.lock().unwrap().push(what.to_owned())),
    );
    (GuestDisks::new(&readers, "`shop@1`".to_owned(), vec![Arc::new(reader)]), told)
}

#[test]
fn whatever_a_reader_does_it_is_one_error_and_told() {
    const LONG: Duration = Duration::from_secs(60);
    for (program, time, why) in [
        (&["/bin/sleep", "1000"][..], Duration::from_millis(300), "it took too long"),
        (&["/bin/true"], LONG, "it died"),
        (&["/bin/sh", "-c", "kill -SEGV $$"], LONG, "it died"),
        // Offsets behind the disk's end, for ever.
        (&["/usr/bin/yes"], LONG, "it asks for what is not there"),
        // An answer of 2^56 bytes.
        (
            &[
                "/bin/sh",
                "-c",
                "printf '\\377\\377\\377\\377\\377\\377\\377\\377\\1\\1\\1\\1\\1\\1\\1\\1'; cat",
            ],
            LONG,
            "it is too long",
        ),
        // The disk's first 512 KiB, again and again.
        (
            &[
                "/bin/sh",
                "-c",
                "while printf '\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\010\\0\\0\\0\\0\\0'; do :; done & cat >/dev/null",
            ],
            LONG,
            "it would read too much",
        ),
        // An answer to another question.
        (
            &[
                "/bin/sh",
                "-c",
                "printf '\\377\\377\\377\\377\\377\\377\\377\\377\\2\\0\\0\\0\\0\\0\\0\\0\\0\\1'; cat",
            ],
            LONG,
            "makes no sense",
        ),
    ] {
        let mut lab = Lab::new();
        let (disks, told) = disks(&mut lab, program, time);
        let start = Instant::now();
        let error = disks.volumes(0).expect_err("it is no reader");
        assert!(matches!(error, GuestError::Broken(_)), "{program:?}: {error:?}");
        assert!(error.to_string().contains(why), "{program:?}: {error}");
        assert!(start.elapsed() < LONG, "{program:?}");
        if why != "makes no sense" {
            let told = told.lock().unwrap();
            assert!(told[0].starts_with("`shop@1`, disk `vda`: ") && told[0].contains(why), "{told:?}");
        }
    }
}

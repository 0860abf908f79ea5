//! The store on real files, with the real executor.

use rempart_store::file::{Executor, FileDisk};
use rempart_store::{
    BatchBuilder, DiskEntry, FileId, FormatParams, Health, IoClass, IoCommand, IoCompletion, IoError,
    IoErrorKind, IoId, IoOp, IoOutput, Limits, OpenError, OpenOptions, Output, PayloadBuffer, ReadPiece,
    Recovered, Refused, Slice, Store, StoreEvent, Token,
};
use rempart_types::{DiskIndex, GroupId, Lsn, MonotonicTime, Term, WallTime};
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::RwLock;

const MIB: u64 = 1024 * 1024;
const SIZE: u64 = 64 * MIB;

fn params(location: &str) -> FormatParams {
    let entry =
        DiskEntry { index: DiskIndex(0), size: SIZE, location: location.to_owned(), base: DiskEntry::EMPTY };
    FormatParams { segment_size: 4 * MIB, segments: 2, ..FormatParams::new(GroupId(1), vec![entry]) }
}

/// A child process holds the lock of every store that another test has open, until it runs its own program.
static FORKS: RwLock<()> = RwLock::new(());

fn open_files(directory: &Path) -> Result<FileDisk, IoError> {
    let _nobody_forks = FORKS.read().expect("no test failed meanwhile");
    FileDisk::open(directory)
}

struct Running {
    store: Store,
    executor: Executor,
    out: Output,
    events: Vec<StoreEvent>,
    epoch: u64,
}

impl Running {
    fn open(directory: &Path) -> (Running, Recovered) {
        let mut disk = open_files(directory).expect("the directory is free");
        let limits = Limits { checkpoint_every: 8 * MIB, retention: 8 * MIB, ..Limits::default() };
        let (store, recovered) =
            Store::open(&mut disk, &OpenOptions { limits, roll_back: false }).expect("opens");
        let executor = Executor::new(disk, 3).expect("threads start");
        let epoch = recovered.lineage.last_term().epoch.0 + 1;
        (Running { store, executor, out: Output::default(), events: Vec::new(), epoch }, recovered)
    }

    fn turn(&mut self) {
        let mut done = Vec::new();
        for command in self.out.commands.drain(..) {
            self.executor.submit(command);
        }
        self.events.append(&mut self.out.events);
        self.executor.after_replies();
        self.executor.completions(&mut done);
        if done.is_empty() && self.executor.in_flight() > 0 {
            let fd = self.executor.wake_fd();
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).expect("polls");
            self.executor.reset_wake();
            self.executor.completions(&mut done);
        }
        for completion in done {
            self.store.complete(completion, &mut self.out);
        }
    }

    /// Runs until an event of this kind came, and takes all events up to then.
    fn until(&mut self, wanted: impl Fn(&StoreEvent) -> bool) -> StoreEvent {
        loop {
            if let Some(at) = self.events.iter().position(&wanted) {
                return self.events.drain(..=at).next_back().expect("just seen");
            }
            if let Some(StoreEvent::Failed(failure)) =
                self.events.iter().find(|e| matches!(e, StoreEvent::Failed(_)))
            {
                panic!("{failure}");
            }
            let idle =
                self.out.commands.is_empty() && self.executor.in_flight() == 0 && self.out.events.is_empty();
            if idle {
                let wake = self.store.next_wake().expect("something is still to come");
                self.store.tick(wake, &mut self.out);
            }
            self.turn();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Lsn {
        let mut builder = BatchBuilder::new(self.store.max_batch_len());
        if data.len() > 4096 {
            let mut payload = PayloadBuffer::new(data.len());
            payload.payload_mut().copy_from_slice(data);
            builder.write_buffer(DiskIndex(0), offset, payload);
        } else {
            builder.write(DiskIndex(0), offset, data);
        }
        let batch = builder.seal(&self.store.next_place(Term::new(self.epoch, 0), WallTime(1)));
        self.store.append(&batch, &mut self.out).expect("takes the next batch");
        batch.last()
    }

    fn flush(&mut self, lsn: Lsn) {
        if self.store.durable() >= lsn {
            return;
        }
        self.store.sync(&mut self.out);
        self.until(|event| matches!(event, StoreEvent::Durable(durable) if *durable >= lsn));
    }

    fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.store.read(Token(7), DiskIndex(0), offset, len, &mut self.out).expect("serves");
        let StoreEvent::Read { result, .. } = self.until(|event| matches!(event, StoreEvent::Read { .. }))
        else {
            unreachable!("just matched")
        };
        let mut bytes = Vec::new();
        for piece in result.expect("reads") {
            match piece {
                ReadPiece::Data(slice) => bytes.extend_from_slice(&slice),
                ReadPiece::Zero(len) => bytes.resize(bytes.len() + len, 0),
            }
        }
        bytes
    }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len).map(|at| (seed.wrapping_mul(31).wrapping_add(at as u64 / 7) % 251) as u8).collect()
}

#[test]
fn what_was_flushed_is_there_after_the_process_is_gone() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("elsewhere.img");
    let home = directory.path().join("group");
    let mut disk = open_files(&home).expect("opens");
    Store::format(&mut disk, &params(image.to_str().expect("text"))).expect("formats");
    assert!(matches!(Store::format(&mut disk, &params("x")), Err(OpenError::Exists)));
    drop(disk);

    let (mut running, recovered) = Running::open(&home);
    assert_eq!((recovered.log_end.lsn, recovered.health), (Lsn(0), Health::Good));
    let second = open_files(&home).expect_err("one daemon per store");
    assert_eq!(second.kind, IoErrorKind::Locked);

    let mut expected = vec![0; SIZE as usize];
    let mut last = Lsn(0);
    for number in 0..60u64 {
        let len = if number % 3 == 0 { MIB as usize } else { 4096 };
        let offset = (number * 7919 * 4096) % (SIZE - MIB) / 4096 * 4096;
        let data = pattern(number, len);
        expected[offset as usize..offset as usize + len].copy_from_slice(&data);
        last = running.write(offset, &data);
        running.until(|event| matches!(event, StoreEvent::Accepted(lsn) if *lsn >= last));
        if number % 5 == 4 {
            running.flush(last);
            running.store.stable_is(last, &mut running.out);
        }
    }
    running.flush(last);
    // Half is applied, half is not: both come back.
    drop(running);

    let (mut running, recovered) = Running::open(&home);
    assert_eq!(recovered.log_end.lsn, last);
    assert!(!recovered.clean);
    if recovered.stable < last {
        let refused = running.store.read(Token(1), DiskIndex(0), 0, 4096, &mut running.out);
        assert_eq!(refused, Err(Refused::NotServing));
    }
    running.store.stable_is(last, &mut running.out);
    for at in (0..SIZE).step_by(8 * MIB as usize) {
        assert!(running.read(at, 8 * MIB as usize) == expected[at as usize..(at + 8 * MIB) as usize]);
    }
    running.store.close(&mut running.out);
    running.until(|event| matches!(event, StoreEvent::Closed));
    drop(running);
    assert!(std::fs::read(&image).expect("the image is a plain file") == expected);

    let (mut running, recovered) = Running::open(&home);
    assert!(recovered.clean && recovered.images_changed.is_empty());
    running.store.close(&mut running.out);
    running.until(|event| matches!(event, StoreEvent::Closed));
    drop(running);
    std::fs::write(&image, &expected[..]).expect("behind its back");
    let (_, recovered) = Running::open(&home);
    assert_eq!(recovered.images_changed, [DiskIndex(0)]);
}

#[test]
fn discards_give_space_back() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut disk = open_files(directory.path()).expect("opens");
    Store::format(&mut disk, &params("")).expect("formats");
    let image = disk.path(FileId::Image(DiskIndex(0)));
    drop(disk);
    let (mut running, _) = Running::open(directory.path());
    let used = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&image).expect("exists"));
    let last = running.write(MIB, &pattern(1, 2 * MIB as usize));
    running.flush(last);
    running.store.stable_is(last, &mut running.out);
    running.until(|event| matches!(event, StoreEvent::Checkpointed(lsn) if *lsn == last));
    let before = used();
    let mut builder = BatchBuilder::new(running.store.max_batch_len());
    builder.discard(DiskIndex(0), 0, SIZE);
    let batch = builder.seal(&running.store.next_place(Term::new(1, 0), WallTime(1)));
    running.store.append(&batch, &mut running.out).expect("appends");
    running.flush(batch.last());
    running.store.stable_is(batch.last(), &mut running.out);
    running.until(|event| matches!(event, StoreEvent::Checkpointed(lsn) if *lsn == batch.last()));
    assert!(before >= 2 * MIB / 512, "{before} sectors were used");
    assert_eq!(used(), 0);
    assert!(running.read(MIB, 4096).iter().all(|&byte| byte == 0));
}

/// Needs root: mounts a small tmpfs.
#[test]
fn a_full_disk_is_final_and_says_so() {
    let directory = tempfile::tempdir().expect("a directory");
    let alone = FORKS.write().expect("no test failed meanwhile");
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=20m", "tmpfs"])
        .arg(directory.path())
        .status()
        .is_ok_and(|status| status.success());
    drop(alone);
    if !mounted {
        eprintln!("skipped: cannot mount a tmpfs here");
        return;
    }
    let mut disk = open_files(directory.path()).expect("opens");
    Store::format(&mut disk, &params("")).expect("formats");
    drop(disk);
    let (mut running, _) = Running::open(directory.path());
    let mut failure = None;
    for number in 0..64u64 {
        let last = running.write((number * MIB) % SIZE, &pattern(number, MIB as usize));
        running.store.sync(&mut running.out);
        for _ in 0..200 {
            running.turn();
            let now = running.store.next_wake().unwrap_or(MonotonicTime::ZERO);
            running.store.tick(now, &mut running.out);
            running.store.stable_is(running.store.durable(), &mut running.out);
            if running.store.durable() >= last || running.store.failure().is_some() {
                break;
            }
        }
        if let Some(found) = running.store.failure() {
            failure = Some(found.clone());
            break;
        }
    }
    let failure = failure.expect("20 MiB are not enough");
    assert_eq!(failure.error.kind, IoErrorKind::Full);
    assert!(
        failure.to_string().contains("no space left") || failure.to_string().contains("No space left"),
        "{failure}"
    );
    let durable = running.store.durable();
    running.store.sync(&mut running.out);
    while running.executor.in_flight() > 0 || !running.out.commands.is_empty() {
        running.turn();
    }
    running.events.append(&mut running.out.events);
    let failed = running.events.iter().position(|event| matches!(event, StoreEvent::Failed(_)));
    assert_eq!(failed, Some(running.events.len() - 1), "nothing is reported after the failure");
    drop(running);
    // What was durable before is still there; recovery itself needs no room.
    let (running, recovered) = Running::open(directory.path());
    assert!(recovered.log_end.lsn >= durable);
    drop(running);
    let _alone = FORKS.write().expect("no test failed meanwhile");
    let _ = std::process::Command::new("umount").arg(directory.path()).status();
}

fn filled(seed: u64, len: usize) -> Slice {
    Slice::copy_of(&pattern(seed, len))
}

/// Long writes and all straight reads go past the page cache, the others through it: what is read must not tell.
#[test]
fn writes_past_and_through_the_page_cache_agree() {
    // Not below /tmp: that is often a file system without O_DIRECT, where half of this would not be tested.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let disk = open_files(directory.path()).expect("the directory is free");
    let file = FileId::Image(DiskIndex(0));
    let len = 4 * MIB;
    disk.perform(&IoOp::SetLen { file, len }).expect("creates");
    let mut expected = vec![0; len as usize];
    let writes = [
        // Cached, then replaced on the device, then in part through the cache, then on the device again.
        (0, filled(1, 64 * 1024)),
        (0, filled(2, MIB as usize)),
        (4096 * 3 + 512, filled(3, 1024)),
        (4096 * 2, filled(4, 512 * 1024)),
        // Long, but neither place nor memory is aligned.
        (2 * MIB + 512, filled(5, MIB as usize)),
        (MIB, filled(6, MIB as usize + 4096).slice(512..MIB as usize + 512)),
    ];
    for (offset, data) in writes {
        let at = offset as usize;
        expected[at..at + data.len()].copy_from_slice(&data);
        disk.perform(&IoOp::Write { file, offset, data: vec![data] }).expect("writes");
        for piece in [len as usize, 64 * 1024, 512] {
            for (index, expected) in expected.chunks(piece).enumerate() {
                let read = IoOp::Read { file, offset: (index * piece) as u64, len: piece };
                let Ok(IoOutput::Data(read)) = disk.perform(&read) else {
                    panic!("a read is answered with data")
                };
                assert!(*read == *expected, "piece {index} of {piece}, after the write at {offset}");
            }
        }
    }
    disk.perform(&IoOp::Sync { file }).expect("syncs");
}

/// Submits `ops` as background work, all at once. What came of each, in their order.
fn execute_in_background(executor: &mut Executor, ops: Vec<IoOp>) -> Vec<IoCompletion> {
    let mut waiting: BTreeSet<IoId> = (0..ops.len() as u64).map(IoId).collect();
    for (id, op) in waiting.iter().zip(ops) {
        executor.submit(IoCommand { id: *id, class: IoClass::Background, op });
    }
    executor.after_replies();
    let mut all = Vec::new();
    while !waiting.is_empty() {
        let fd = executor.wake_fd();
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).expect("polls");
        executor.reset_wake();
        let before = all.len();
        executor.completions(&mut all);
        for completion in &all[before..] {
            assert!(waiting.remove(&completion.id), "completed twice, or never submitted");
        }
    }
    assert_eq!(executor.in_flight(), 0);
    all.sort_by_key(|completion| completion.id);
    all
}

/// Workers take small writes to images together, and reads of them; each is completed, once.
#[test]
fn each_of_many_image_writes_and_reads_is_completed() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let disk = open_files(directory.path()).expect("the directory is free");
    let mut executor = Executor::new(disk.clone(), 3).expect("threads start");
    let (first, second) = (FileId::Image(DiskIndex(0)), FileId::Image(DiskIndex(1)));
    for file in [first, second] {
        disk.perform(&IoOp::SetLen { file, len: 2000 * 4096 + 1024 }).expect("creates");
    }
    let place = |number: u64| if number % 700 < 350 { first } else { second };
    let write = |number: u64| match number % 50 {
        49 => IoOp::Sync { file: first },
        _ => IoOp::Write { file: place(number), offset: number * 4096, data: vec![filled(number, 4096)] },
    };
    for completion in execute_in_background(&mut executor, (0..2000).map(write).collect()) {
        completion.result.expect("writes and syncs");
    }
    // Writes between reads, some of them crooked, and two of each 200 beyond the end, in part or whole.
    let offset = |number: u64| match number % 200 {
        7 => 2000 * 4096,
        8 => 3000 * 4096,
        30 => number * 4096 + 512,
        _ => number * 4096,
    };
    let read = |number: u64| match number % 50 {
        49 => write(number - 1),
        _ => IoOp::Read { file: place(number), offset: offset(number), len: 4096 },
    };
    for completion in execute_in_background(&mut executor, (0..2000).map(read).collect()) {
        let number = completion.id.0;
        match completion.result.expect("reads and writes") {
            IoOutput::Data(data) => {
                let IoOutput::Data(alone) = disk.perform(&read(number)).expect("reads") else {
                    panic!("a read is answered with data")
                };
                assert!(*data == *alone, "read {number}");
                assert!(offset(number) != number * 4096 || *data == *filled(number, 4096), "read {number}");
            }
            _ => assert_eq!(number % 50, 49, "a read is answered with data"),
        }
    }
    // A file that cannot be read is told for each of them.
    let image = disk.path(first);
    drop((executor, disk));
    std::fs::remove_file(image).expect("removes");
    let disk = open_files(directory.path()).expect("the directory is free");
    let mut executor = Executor::new(disk, 3).expect("threads start");
    let reads = (0..100).map(|number| IoOp::Read { file: first, offset: number * 4096, len: 4096 });
    for completion in execute_in_background(&mut executor, reads.collect()) {
        let error = completion.result.expect_err("the file is gone");
        assert_eq!(error.kind, IoErrorKind::Missing);
    }
}

/// A device that runs full: who is told that its write is done finds it there, on the device, and the others are told.
/// Needs root: mounts a small tmpfs, and makes a larger loop device of a file in it.
#[test]
fn a_device_that_refuses_writes_to_an_image_is_noticed_at_once() {
    let run = |program: &str, arguments: &[&str]| {
        let _alone = FORKS.write().expect("no test failed meanwhile");
        let output = std::process::Command::new(program).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let directory = tempfile::tempdir().expect("a directory");
    let small = directory.path().to_str().expect("plain text").to_owned();
    if run("mount", &["-t", "tmpfs", "-o", "size=8m", "tmpfs", &small]).is_none() {
        return eprintln!("skipped: cannot mount a tmpfs here");
    }
    let backing = directory.path().join("device");
    std::fs::File::create(&backing).and_then(|file| file.set_len(32 * MIB)).expect("a sparse file");
    let device = run("losetup", &["--find", "--show", backing.to_str().expect("plain text")]);
    if let Some(device) = &device {
        let store = tempfile::tempdir().expect("a directory");
        let disk = open_files(store.path()).expect("the directory is free");
        disk.set_image(DiskIndex(0), std::path::Path::new(device));
        let file = FileId::Image(DiskIndex(0));
        let mut executor = Executor::new(disk.clone(), 3).expect("threads start");
        // Twice the room there is, some of it crooked.
        let place = |number: u64| number * 8192 + if number % 16 == 5 { 512 } else { 0 };
        let write = |number| IoOp::Write { file, offset: place(number), data: vec![filled(number, 4096)] };
        let done = execute_in_background(&mut executor, (0..2048).map(write).collect());
        let (good, bad): (Vec<_>, Vec<_>) = done.iter().partition(|completion| completion.result.is_ok());
        for completion in &good {
            let number = completion.id.0;
            let read = disk.perform(&IoOp::Read { file, offset: place(number), len: 4096 });
            let Ok(IoOutput::Data(read)) = read else { panic!("write {number} cannot be read") };
            assert!(*read == *filled(number, 4096), "write {number}");
        }
        drop(executor);
        run("losetup", &["--detach", device]).expect("detaches");
        assert!(!good.is_empty() && bad.len() > 100, "{} done, {} refused", good.len(), bad.len());
    }
    run("umount", &[&small]).expect("unmounts");
    if device.is_none() {
        eprintln!("skipped: no loop devices here");
    }
}

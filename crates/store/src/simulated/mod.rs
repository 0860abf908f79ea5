//! A deterministic disk in memory that can lose power, for the simulator and for tests.
//!
//! It is as unkind as the contract of [`crate::IoCommand`] allows: a sync makes durable only what had been
//! written when the sync was *submitted*; at power loss every sector written since is kept or lost by itself,
//! in any order; a failed sync forgets what it should have written.

mod pages;

use crate::io::{Disk, FileId, FileStat, IoCommand, IoCompletion, IoError, IoErrorKind, IoOp, IoOutput};
use pages::Pages;
use rempart_buffer::{BufferMut, Slice, total_len};
use rempart_types::{DiskIndex, SECTOR_SIZE};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Random numbers for the disk's choices: any `FnMut() -> u64`.
pub type Random<'a> = &'a mut dyn FnMut() -> u64;

/// One node's disk. Survives crashes of whatever uses it.
///
/// Asynchronous use: [`SimulatedDisk::submit`] queues, [`SimulatedDisk::run`] executes the queued command of
/// the caller's choice and returns its completion, which the caller may deliver later.
#[derive(Debug, Clone, Default)]
pub struct SimulatedDisk {
    /// Shared between copies of the disk until one of them changes.
    files: BTreeMap<FileId, Arc<File>>,
    queue: Vec<IoCommand>,
    /// Per queued command: how many changes its file had seen when it was submitted.
    marks: Vec<u64>,
    faults: Vec<(FileId, Fault)>,
    capacity: Option<u64>,
    executed: u64,
    clock_ns: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Sync,
    Write(IoErrorKind),
    Read,
}

#[derive(Debug, Clone, Default)]
struct File {
    /// What readers see.
    cache: Pages,
    /// What survives a power loss for sure.
    medium: Pages,
    /// Changes since, each with its number.
    unsynced: Vec<(u64, Change)>,
    /// A failed sync forgot changes: readers see what the medium has not.
    forgotten: bool,
    changes: u64,
    modified_ns: u64,
}

#[derive(Debug, Clone)]
enum Change {
    Bytes { offset: usize, data: Vec<Slice> },
    Zero { offset: usize, len: usize },
    Len(usize),
}

impl Change {
    fn apply(&self, target: &mut Pages) {
        match self {
            Change::Bytes { offset, data } => {
                let mut at = *offset;
                for slice in data {
                    target.write(at, slice);
                    at += slice.len();
                }
            }
            Change::Zero { offset, len } => target.zero(*offset, *len),
            Change::Len(len) => target.resize(*len),
        }
    }

    /// The bytes that change.
    fn range(&self) -> (usize, usize) {
        match self {
            Change::Bytes { offset, data } => (*offset, total_len(data)),
            Change::Zero { offset, len } => (*offset, *len),
            Change::Len(_) => (0, 0),
        }
    }
}

impl File {
    fn change(&mut self, change: Change) {
        change.apply(&mut self.cache);
        self.changes += 1;
        self.unsynced.push((self.changes, change));
    }

    /// Makes changes to number `upto` durable.
    fn sync(&mut self, upto: u64) {
        let all = self.unsynced.last().is_none_or(|(number, _)| *number <= upto);
        // Where nothing else differs, the pages that changed are as readers see them.
        let simple = all
            && !self.forgotten
            && self.unsynced.iter().all(|(_, change)| !matches!(change, Change::Len(_)));
        let count = self.unsynced.iter().take_while(|(number, _)| *number <= upto).count();
        for (_, change) in self.unsynced.drain(..count) {
            if simple {
                let (offset, len) = change.range();
                self.medium.take_over(&self.cache, offset, len);
            } else {
                change.apply(&mut self.medium);
            }
        }
    }

    /// Readers see what the medium holds.
    fn is_clean(&self) -> bool {
        self.unsynced.is_empty() && !self.forgotten
    }

    fn lose_power(&mut self, random: Random<'_>) {
        // Most crashes lose either nothing or all; the torn ones between are the interesting rest.
        let mode = random() % 4;
        let mut keep = || match mode {
            0 => false,
            1 => true,
            _ => random().is_multiple_of(2),
        };
        for (_, change) in std::mem::take(&mut self.unsynced) {
            if matches!(change, Change::Len(_)) {
                if keep() {
                    change.apply(&mut self.medium);
                }
                continue;
            }
            let (offset, len) = change.range();
            let data = match &change {
                Change::Bytes { data, .. } => joined(data),
                _ => Vec::new(),
            };
            let mut at = 0;
            while at < len {
                let sector = (SECTOR_SIZE as usize - (offset + at) % SECTOR_SIZE as usize).min(len - at);
                if keep() {
                    match data.get(at..at + sector) {
                        Some(bytes) => self.medium.write(offset + at, bytes),
                        None => self.medium.zero(offset + at, sector),
                    }
                }
                at += sector;
            }
        }
        self.cache.clone_from(&self.medium);
        self.forgotten = false;
    }
}

impl SimulatedDisk {
    pub fn new() -> SimulatedDisk {
        SimulatedDisk::default()
    }

    /// Queues a command.
    pub fn submit(&mut self, command: IoCommand) {
        self.marks.push(self.files.get(&command.op.file()).map_or(0, |file| file.changes));
        self.queue.push(command);
    }

    /// Commands queued and not run.
    pub fn queued(&self) -> &[IoCommand] {
        &self.queue
    }

    /// Runs the queued command at `index`.
    ///
    /// # Panics
    /// If there is none.
    pub fn run(&mut self, index: usize) -> IoCompletion {
        let command = self.queue.remove(index);
        let mark = self.marks.remove(index);
        IoCompletion { id: command.id, result: self.perform(&command.op, mark) }
    }

    /// Commands executed since it was made: counts the places where a crash can be.
    pub fn executed(&self) -> u64 {
        self.executed
    }

    /// The process dies: queued commands are lost, or (by `random`) happen unseen; the page cache lives on.
    pub fn crash_process(&mut self, random: Random<'_>) {
        self.marks.clear();
        for command in std::mem::take(&mut self.queue) {
            match (random() % 3, &command.op) {
                (0, _) => {}
                (1, IoOp::Write { file, offset, data }) => {
                    // A write cut short.
                    let all = joined(data);
                    let sectors = (all.len() as u64).div_ceil(SECTOR_SIZE);
                    let len = (random() % (sectors + 1) * SECTOR_SIZE).min(all.len() as u64) as usize;
                    let file = Arc::make_mut(self.files.entry(*file).or_default());
                    file.change(Change::Bytes {
                        offset: *offset as usize,
                        data: vec![Slice::copy_of(&all[..len])],
                    });
                }
                (_, op) => {
                    let mark = self.files.get(&op.file()).map_or(0, |file| file.changes);
                    let _ = self.perform(op, mark);
                }
            }
        }
    }

    /// The machine loses power: as above, and each sector written since the last sync of its file is kept or
    /// lost by `random`, in any order.
    pub fn lose_power(&mut self, random: Random<'_>) {
        self.crash_process(random);
        for file in self.files.values_mut().filter(|file| !file.is_clean()) {
            Arc::make_mut(file).lose_power(random);
        }
    }

    /// The next sync of this file fails, and what it should have made durable is lost with the next power loss.
    pub fn fail_next_sync(&mut self, file: FileId) {
        self.faults.push((file, Fault::Sync));
    }

    /// The next write to this file (creating and zeroing too) fails.
    pub fn fail_next_write(&mut self, file: FileId, kind: IoErrorKind) {
        self.faults.push((file, Fault::Write(kind)));
    }

    pub fn fail_next_read(&mut self, file: FileId) {
        self.faults.push((file, Fault::Read));
    }

    /// Failures that were to come and did not strike yet are taken back.
    pub fn fail_nothing(&mut self) {
        self.faults.clear();
    }

    /// Bytes all files together may hold; writes past it fail with [`IoErrorKind::Full`].
    pub fn set_capacity(&mut self, bytes: Option<u64>) {
        self.capacity = bytes;
    }

    /// Flips bits of one stored byte, as it is on the medium and in the cache. False if there is no such byte.
    pub fn rot(&mut self, file: FileId, offset: u64, mask: u8) -> bool {
        let Some(file) = self.files.get_mut(&file).map(Arc::make_mut) else { return false };
        let mut hit = false;
        for bytes in [&mut file.cache, &mut file.medium] {
            if let Some(byte) = bytes.byte_mut(offset as usize) {
                *byte ^= mask;
                hit = true;
            }
        }
        hit
    }

    /// A file's content as a reader sees it now, for checkers.
    pub fn content(&self, file: FileId) -> Option<Vec<u8>> {
        self.files.get(&file).map(|file| file.cache.to_vec())
    }

    /// The files that exist.
    pub fn files(&self) -> impl Iterator<Item = FileId> + '_ {
        self.files.keys().copied()
    }

    /// Writes into a file behind the store's back, durably.
    pub fn overwrite(&mut self, file: FileId, offset: u64, data: &[u8]) {
        self.clock_ns += 1;
        let file = Arc::make_mut(self.files.entry(file).or_default());
        file.change(Change::Bytes { offset: offset as usize, data: vec![Slice::copy_of(data)] });
        file.modified_ns = self.clock_ns;
        file.sync(u64::MAX);
    }

    fn fault(&mut self, file: FileId, wanted: impl Fn(Fault) -> bool) -> Option<Fault> {
        let at = self.faults.iter().position(|&(at, fault)| at == file && wanted(fault))?;
        Some(self.faults.remove(at).1)
    }

    fn check_room(&self, file: FileId, end: u64) -> Result<(), IoError> {
        let Some(capacity) = self.capacity else { return Ok(()) };
        let used: u64 = self.files.values().map(|file| file.cache.len() as u64).sum();
        let grows = end.saturating_sub(self.files.get(&file).map_or(0, |file| file.cache.len() as u64));
        if grows > 0 && used + grows > capacity { Err(error(IoErrorKind::Full, file)) } else { Ok(()) }
    }

    fn perform(&mut self, op: &IoOp, sync_mark: u64) -> Result<IoOutput, IoError> {
        self.executed += 1;
        let id = op.file();
        let is_write =
            matches!(op, IoOp::Write { .. } | IoOp::Zero { .. } | IoOp::SetLen { .. } | IoOp::Create { .. });
        if is_write {
            if let Some(Fault::Write(kind)) = self.fault(id, |fault| matches!(fault, Fault::Write(_))) {
                return Err(error(kind, id));
            }
            self.clock_ns += 1;
        }
        match op {
            IoOp::Write { offset, data, .. } => {
                let len = total_len(data);
                self.check_room(id, offset + len as u64)?;
                let file = Arc::make_mut(self.files.entry(id).or_default());
                file.change(Change::Bytes { offset: *offset as usize, data: data.clone() });
                file.modified_ns = self.clock_ns;
                Ok(IoOutput::Done)
            }
            IoOp::Read { offset, len, .. } => {
                if self.fault(id, |fault| fault == Fault::Read).is_some() {
                    return Err(error(IoErrorKind::Io, id));
                }
                let file = self.files.get(&id).ok_or_else(|| error(IoErrorKind::Missing, id))?;
                let mut buffer = BufferMut::zeroed(*len);
                file.cache.read(*offset as usize, &mut buffer);
                Ok(IoOutput::Data(buffer.freeze()))
            }
            IoOp::Sync { .. } => {
                if self.fault(id, |fault| fault == Fault::Sync).is_some() {
                    if let Some(file) = self.files.get_mut(&id).map(Arc::make_mut) {
                        file.forgotten |= !file.unsynced.is_empty();
                        file.unsynced.clear();
                    }
                    return Err(error(IoErrorKind::Io, id));
                }
                if let Some(file) = self.files.get_mut(&id).filter(|file| !file.unsynced.is_empty()) {
                    Arc::make_mut(file).sync(sync_mark);
                }
                Ok(IoOutput::Done)
            }
            IoOp::Zero { offset, len, .. } => {
                let file = Arc::make_mut(self.files.entry(id).or_default());
                // Within the file only: zeroing never grows one.
                let start = (*offset).min(file.cache.len() as u64) as usize;
                let end = offset.saturating_add(*len).min(file.cache.len() as u64) as usize;
                if start < end {
                    file.change(Change::Zero { offset: start, len: end - start });
                    file.modified_ns = self.clock_ns;
                }
                Ok(IoOutput::Done)
            }
            IoOp::SetLen { len, .. } => {
                self.check_room(id, *len)?;
                let file = Arc::make_mut(self.files.entry(id).or_default());
                file.change(Change::Len(*len as usize));
                file.modified_ns = self.clock_ns;
                Ok(IoOutput::Done)
            }
            IoOp::Create { len, head, .. } => {
                self.check_room(id, *len)?;
                let mut cache = Pages::zeroed(*len as usize);
                cache.write(0, head);
                let file =
                    File { medium: cache.clone(), cache, modified_ns: self.clock_ns, ..File::default() };
                self.files.insert(id, Arc::new(file));
                Ok(IoOutput::Done)
            }
            IoOp::Remove { .. } => {
                self.files.remove(&id);
                Ok(IoOutput::Done)
            }
            IoOp::Stat { .. } => {
                let file = self.files.get(&id).ok_or_else(|| error(IoErrorKind::Missing, id))?;
                Ok(IoOutput::Stat(FileStat { len: file.cache.len() as u64, modified_ns: file.modified_ns }))
            }
        }
    }
}

fn joined(data: &[Slice]) -> Vec<u8> {
    let mut all = Vec::with_capacity(total_len(data));
    for slice in data {
        all.extend_from_slice(slice);
    }
    all
}

fn error(kind: IoErrorKind, file: FileId) -> IoError {
    let message = match kind {
        IoErrorKind::Full => "no space left on device",
        IoErrorKind::Missing => "no such file",
        IoErrorKind::Locked => "locked",
        IoErrorKind::Io => "input/output error",
    };
    IoError { kind, file, path: String::new(), message: message.to_owned() }
}

impl Disk for SimulatedDisk {
    fn list(&mut self) -> Result<Vec<FileId>, IoError> {
        Ok(self.files.keys().copied().filter(|file| !matches!(file, FileId::Image(_))).collect())
    }

    fn execute(&mut self, op: &IoOp) -> Result<IoOutput, IoError> {
        self.perform(op, u64::MAX)
    }

    fn locate_image(&mut self, _disk: DiskIndex, _location: &str) {}
}

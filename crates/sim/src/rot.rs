//! Bit rot: bytes on a disk change by themselves.
//!
//! One copy rots at a time, while the other leads and is left in peace: that is what two copies can survive. What
//! must not happen is that the rotten one is believed. Images carry no checksums, so only the journal, the
//! superblock and the maps rot here.

use crate::coverage::Kind;
use crate::world::{Event, World};
use rempart_store::{Disk, FileId, SUPERBLOCK_COPY_SIZE};
use rempart_types::{DiskIndex, SECTOR_SIZE};
use std::time::Duration;

impl World {
    /// A copy may rot while all are in sync and nothing else is broken, and only one at a time.
    pub(crate) fn rot_is_survivable(&self, node: usize) -> bool {
        let others_whole = (0..self.nodes.len()).all(|other| other == node || !self.nodes[other].spoilt);
        let alone = others_whole && self.nodes.iter().all(|node| !node.rotten) && self.operator_is_idle();
        // A member that is about to leave may be out by the register, while the leader still asks it.
        let all_in_sync = self.in_sync_mask().count_ones() as usize == self.nodes.len();
        let awake = self.nodes.iter().all(|node| node.daemon.as_ref().is_some_and(|daemon| !daemon.frozen));
        alone
            && awake
            && all_in_sync
            && self.nodes[node].daemon.is_some()
            && self.witness.current().is_some()
            && self.is_mirrored()
    }

    /// Some bytes of one file change; the daemon restarts and has to notice.
    pub(crate) fn rot(&mut self, node: usize) {
        self.mend_all_links_and_drives();
        self.crash_daemon(node);
        let files = self.nodes[node].drive.disk.list().unwrap_or_default();
        let may_rot =
            |file: &FileId| !matches!(file, FileId::Image(_) | FileId::SnapshotData | FileId::SnapshotMap);
        let files: Vec<FileId> = files.into_iter().filter(may_rot).collect();
        if self.rng.chance(200) {
            // Both copies of the superblock: nothing can be made of such a disk.
            for copy in 0..2 {
                let offset = copy * SUPERBLOCK_COPY_SIZE + self.rng.below(64);
                self.flip(node, FileId::Superblock, offset);
            }
        } else if !files.is_empty() {
            let journal: Vec<FileId> =
                files.iter().copied().filter(|file| matches!(file, FileId::Segment(_))).collect();
            let some = if self.rng.chance(800) { &journal } else { &files };
            let file = *self.rng.pick(some);
            for _ in 0..1 + self.rng.below(3) {
                if let Some(offset) = self.used_byte(node, file) {
                    self.flip(node, file, offset);
                }
            }
        }
        self.nodes[node].rotten = true;
        let boot = self.nodes[node].boots;
        self.after(Duration::from_millis(300), Event::StartDaemon { node, boot });
    }

    fn flip(&mut self, node: usize, file: FileId, offset: u64) {
        let mask = 1 << self.rng.below(8);
        self.tell(|| format!("node {node}: {file} rots at byte {offset}"));
        self.nodes[node].drive.disk.rot(file, offset, mask);
        self.nodes[node].spoilt = true;
    }

    /// A place in the file near something: most of a journal was never used.
    fn used_byte(&mut self, node: usize, file: FileId) -> Option<u64> {
        const NEAR: u64 = 512;
        let content = self.nodes[node].drive.disk.content(file)?;
        let used: Vec<u64> = (0..content.len() as u64 / NEAR)
            .filter(|block| content[(block * NEAR) as usize..][..NEAR as usize].iter().any(|byte| *byte != 0))
            .collect();
        if used.is_empty() {
            return None;
        }
        // The newest part of a journal is what a recovery reads.
        let from = if self.rng.chance(750) { used.len() * 7 / 8 } else { 0 };
        Some(used[from + self.rng.index(used.len() - from)] * NEAR + self.rng.below(NEAR))
    }

    /// A follower will be stopped in order, and its image written to by somebody else meanwhile.
    pub(crate) fn plan_touch(&mut self, node: usize) {
        self.nodes[node].to_be_touched = true;
        self.stop_daemon(node);
    }

    /// The daemon is gone. Only after an orderly stop can a later one see what happened to the image.
    pub(crate) fn touch_image(&mut self, node: usize, clean: bool) {
        let planned = std::mem::take(&mut self.nodes[node].to_be_touched);
        let led = self.serving_node().is_some_and(|leader| leader != node);
        if !planned || !clean || !led || self.a_copy_is_rotten() || !self.operator_is_idle() {
            return;
        }
        let disk = self.rng.index(self.setup.disks.len());
        let sector = self.rng.below(self.setup.disks[disk] / SECTOR_SIZE);
        self.tell(|| format!("node {node}: somebody writes to sector {sector} of disk {disk}"));
        let file = FileId::Image(DiskIndex(disk as u16));
        let drive = &mut self.nodes[node].drive.disk;
        drive.overwrite(file, sector * SECTOR_SIZE, &[0xee; SECTOR_SIZE as usize]);
        self.nodes[node].rotten = true;
    }

    /// The store of a node could not be opened: its disk is replaced, if another copy is good.
    pub(crate) fn refused_to_open(&mut self, node: usize) {
        self.coverage.count(Kind::Recovery, "refused to open");
        if !self.nodes[node].rotten {
            // A fault of the disk that passes: the service manager tries again.
            return self.try_again(node);
        }
        let in_sync = self.in_sync_mask();
        if in_sync >> node & 1 == 1 {
            // An empty disk must not come back as a member of the in-sync set: first the other copy leads alone.
            if in_sync == 1 << node && self.healed {
                self.give_up(node);
            }
            return self.try_again(node);
        }
        self.reached("damaged copy refused");
        self.replace_disk(node);
        let boot = self.nodes[node].boots;
        self.after(Duration::from_millis(500), Event::StartDaemon { node, boot });
    }

    /// The daemon starts again in a while; after the healing the operator sees to that.
    fn try_again(&mut self, node: usize) {
        if !self.healed {
            let boot = self.nodes[node].boots;
            self.after(Duration::from_secs(1), Event::StartDaemon { node, boot });
        }
    }

    /// While a copy is rotten nothing else may break.
    pub(crate) fn a_copy_is_rotten(&self) -> bool {
        self.nodes.iter().any(|node| node.rotten)
    }

    /// The rotten copy is whole again: it was admitted.
    pub(crate) fn rot_is_over(&mut self) {
        for node in 0..self.nodes.len() {
            if self.nodes[node].rotten && self.is_mirrored() {
                self.nodes[node].rotten = false;
            }
        }
    }
}

//! Bit rot: bytes on a disk change by themselves.
//!
//! One copy rots at a time, while the other leads and is left in peace: that is what two copies can survive. What
//! must not happen is that the rotten one is believed. Images carry no checksums, so only the journal, the
//! superblock and the maps rot here.

use crate::coverage::Kind;
use crate::world::{Event, World};
use rempart_store::{Disk, FileId};
use std::time::Duration;

impl World {
    /// Only a follower's copy may rot, while its leader is well, and only one at a time.
    pub(crate) fn rot_is_survivable(&self, node: usize) -> bool {
        let Some(leader) = self.serving_node() else { return false };
        let alone = self.nodes.iter().all(|node| !node.rotten) && self.operator_is_idle();
        leader != node && alone && self.nodes[node].daemon.is_some() && self.is_mirrored()
    }

    /// Some bytes of one file change; the daemon restarts and has to notice.
    pub(crate) fn rot(&mut self, node: usize) {
        self.crash_daemon(node);
        let files = self.nodes[node].drive.disk.list().unwrap_or_default();
        let may_rot =
            |file: &FileId| !matches!(file, FileId::Image(_) | FileId::SnapshotData | FileId::SnapshotMap);
        let files: Vec<FileId> = files.into_iter().filter(may_rot).collect();
        if files.is_empty() {
            return;
        }
        let file = *self.rng.pick(&files);
        let length = self.nodes[node].drive.disk.content(file).map_or(0, |content| content.len() as u64);
        if length == 0 {
            return;
        }
        for _ in 0..1 + self.rng.below(3) {
            let offset = self.rng.below(length);
            let mask = 1 << self.rng.below(8);
            self.tell(|| format!("node {node}: {file} rots at byte {offset}"));
            self.nodes[node].drive.disk.rot(file, offset, mask);
        }
        self.nodes[node].rotten = true;
        let boot = self.nodes[node].boots;
        self.after(Duration::from_millis(300), Event::StartDaemon { node, boot });
    }

    /// The store of a node could not be opened: its disk is replaced, if another copy is good.
    pub(crate) fn refused_to_open(&mut self, node: usize) {
        self.coverage.count(Kind::Recovery, "refused to open");
        if !self.nodes[node].rotten {
            // A fault of the disk that passes: the service manager tries again.
            let boot = self.nodes[node].boots;
            return self.after(Duration::from_secs(1), Event::StartDaemon { node, boot });
        }
        self.reached("damaged copy refused");
        self.replace_disk(node);
        let boot = self.nodes[node].boots;
        self.after(Duration::from_millis(500), Event::StartDaemon { node, boot });
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

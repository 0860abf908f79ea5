//! The store's snapshots that comparisons and views read. A resync's own is not among them.

use crate::Engine;
use rempart_store::{SnapshotId, SnapshotLoss};
use rempart_types::Lsn;

/// Snapshots from here on are opened here, and end with this engine.
const FIRST: u64 = 1 << 48;

impl Engine {
    pub(crate) fn new_snapshot(&mut self) -> SnapshotId {
        self.newest_snapshot = self.newest_snapshot.max(FIRST) + 1;
        SnapshotId(self.newest_snapshot)
    }

    /// A store that refuses keeps it; it costs space, not safety.
    pub(crate) fn let_go_of(&mut self, snapshot: SnapshotId) {
        let _ = self.with_store(|store, io| store.close_snapshot(snapshot, io));
    }

    pub(crate) fn snapshot_opened(&mut self, snapshot: SnapshotId, at: Lsn) {
        if !self.view_opened(snapshot, at) && !self.compare_opened(snapshot) {
            // Whoever ordered it is gone; it could not be called off.
            self.let_go_of(snapshot);
        }
    }

    pub(crate) fn snapshot_lost(&mut self, snapshot: SnapshotId, why: SnapshotLoss) {
        self.view_lost(snapshot, why);
        self.compare_lost(snapshot, why);
    }
}

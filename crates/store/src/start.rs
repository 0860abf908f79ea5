//! The running store's first state, from what recovery found.

use crate::change_map::ChangeMap;
use crate::journal::Journal;
use crate::params::Limits;
use crate::recovery::RecoveredLog;
use crate::snapshot::Snapshots;
use crate::store::{Store, health_of};
use crate::superblock::Superblock;
use crate::superblock_writer::SuperblockWriter;
use crate::timers::Timers;
use crate::window::Window;
use rempart_buffer::Slice;
use rempart_types::{DiskIndex, Lsn};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

impl Store {
    pub(crate) fn start(
        limits: Limits,
        superblock: Superblock,
        log: RecoveredLog,
        maps: BTreeMap<DiskIndex, ChangeMap>,
        snapshots: Snapshots,
        config: Option<(Lsn, Slice)>,
    ) -> Store {
        let mut window = Window::default();
        let mut wall = superblock.wall;
        let mut chain = superblock.redo.chain;
        for (batch, position) in log.batches {
            wall = wall.max(batch.header().wall);
            chain = Some(batch.chain());
            let last = batch.last();
            window.push(batch);
            window.placed(last, position);
        }
        let journal = Journal {
            segments: log.layout.segments,
            prepared: log.layout.prepared,
            preparing: None,
            next_sequence: log.layout.next_sequence,
            next_slot: log.layout.next_slot,
            log_end: log.log_end,
            term: log.term,
            chain,
            wall,
            waiting: VecDeque::new(),
            in_flight: VecDeque::new(),
            accepted: log.log_end,
            durable: log.log_end,
            syncing: None,
            sync_next: None,
            sync_later: None,
            bytes_since_sync: 0,
            bytes_since_flush: 0,
            flushes_frequent: false,
            pins: BTreeMap::new(),
            unbacked_to: Lsn::ZERO,
            gate: false,
            removing: 0,
        };
        let extents_until = superblock.syncing.as_ref().map_or(Lsn::ZERO, |syncing| syncing.until);
        let mut store = Store {
            limits,
            superblock_writing: superblock.clone(),
            superblock_written: superblock.clone(),
            superblock_writer: SuperblockWriter::default(),
            disk_table: superblock.disks.iter().map(|row| row.entry.clone()).collect(),
            health: health_of(&superblock),
            journal,
            journal_from: Lsn::ZERO,
            window,
            index: BTreeMap::new(),
            indexed: superblock.applied,
            serve_after: log.log_end,
            stable_told: log.stable,
            committed_told: log.stable,
            applied: superblock.applied,
            applied_position: superblock.redo,
            image_may_hold: log.log_end,
            maps,
            maps_written: BTreeSet::new(),
            // Records past the checkpoint may be in the image's page cache and nowhere else noted.
            images_dirty: superblock.disks.iter().map(|row| row.entry.index).collect(),
            bytes_since_checkpoint: 0,
            round: None,
            apply_held: false,
            no_room: None,
            apply_now: true,
            incoming: VecDeque::new(),
            extents_until,
            resync_beginning: false,
            log_restarting: false,
            snapshots,
            openings: Vec::new(),
            task: None,
            tasks: VecDeque::new(),
            truncating: false,
            truncate_position: superblock.redo,
            truncated_slot: None,
            closing: false,
            config_applied: config.clone(),
            config_committed: config,
            pending: HashMap::new(),
            next_io: 1,
            guest_reads: HashMap::new(),
            log_reads: BTreeSet::new(),
            timers: Timers::default(),
            failed: None,
            superblock,
        };
        store.index_committed();
        store.arm_timers();
        store
    }
}

//! Views: all disks of the machine as they were at one record of the log, read while the machine runs on.
//!
//! A view is a snapshot of the store. The guest's writes go on into the journal; what they overwrite is kept aside when
//! they are applied to the image. Views live on the primary only, and end with its leadership.
//!
//! Whether the change map tells what changed since an earlier position:
//!
//! | the position | what the map says of later changes |
//! |---|---|
//! | is in this log (number and term), which is a prefix of every in-sync copy's | a superset of them: records mark what they touch when they are applied, extents of a resync come with a number at or after their last change, a resync by comparison marks all it compared |
//! | is not: ahead of the log, on a branch that was given up, older than the log's table of terms | nothing |
//! | is in the log, and an image was changed by others while this copy was closed after it | nothing |

use crate::requests::FlushFor;
use crate::{Action, Bytes, CommandError, CommandId, CommandOutput, Engine, Token};
use rempart_store::{Extent, Slice, SnapshotId, SnapshotLoss, SnapshotReadError};
use rempart_types::{DiskIndex, ExtentIndex, LogPosition, Lsn};
use std::collections::BTreeMap;

/// Views at once, being opened or open.
const MAX_VIEWS: usize = 4;
/// Tokens of reads of views in the store. Other reads' are below.
const FIRST_READ: u64 = 1 << 63;

/// Names one view of this engine's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ViewId(pub u64);

/// A view that can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenedView {
    pub view: ViewId,
    /// Everything acknowledged before the order is in it.
    pub at: LogPosition,
    /// The machine's definition there.
    pub config: Option<Bytes>,
    /// Answers for the position that the order named.
    pub since: Option<ChangesSince>,
}

/// Extents of a view that are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ViewedExtents {
    pub disk: DiskIndex,
    pub first: ExtentIndex,
    pub count: u64,
}

/// Whether [`Engine::changed_extents`] misses nothing that changed after a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangesSince {
    Known,
    /// Anything may have changed: why.
    Unknown(&'static str),
}

/// Why an extent of a view was not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ViewReadError {
    #[error("the view is closed, or the disk is gone")]
    Gone,
    #[error("{0}")]
    Disk(String),
}

#[derive(Debug, Default)]
pub(crate) struct Views {
    open: BTreeMap<ViewId, View>,
    reads: BTreeMap<u64, (ViewId, Token)>,
}

#[derive(Debug)]
struct View {
    snapshot: SnapshotId,
    /// `None` once it is open.
    ordered: Option<Ordered>,
}

#[derive(Debug)]
struct Ordered {
    command: CommandId,
    since: Option<LogPosition>,
}

impl Engine {
    pub(crate) fn open_view(&mut self, command: CommandId, since: Option<LogPosition>, keep_bytes: u64) {
        if !self.serving || self.failure.is_some() {
            return self.command_failed(command, CommandError::NotPrimary);
        }
        if self.views.open.len() >= MAX_VIEWS {
            return self.command_failed(command, CommandError::Refused("too many views of it are open"));
        }
        self.seal();
        let at = self.replication.end();
        let snapshot = self.new_snapshot();
        if self.with_store(|store, io| store.open_snapshot(snapshot, Some(at), io)).is_err() {
            return self.command_failed(command, CommandError::Refused("no snapshot can be opened now"));
        }
        self.store.limit_snapshots(keep_bytes);
        self.views
            .open
            .insert(ViewId(snapshot.0), View { snapshot, ordered: Some(Ordered { command, since }) });
        // It opens when everything to `at` is stable, and in the image.
        self.start_flush(FlushFor::Nobody, true);
    }

    /// False if it is nobody's view.
    pub(crate) fn view_opened(&mut self, snapshot: SnapshotId, at: Lsn) -> bool {
        let view = ViewId(snapshot.0);
        let Some(Ordered { command, since }) =
            self.views.open.get_mut(&view).and_then(|view| view.ordered.take())
        else {
            return false;
        };
        let position = self.replication.lineage().position(at).expect("the log's table knows its end");
        let opened = OpenedView {
            view,
            at: position,
            config: self.configs.at(at).cloned(),
            since: since.map(|since| self.changes_since(since, at)),
        };
        self.command_done(command, CommandOutput::ViewOpened(opened));
        true
    }

    fn changes_since(&self, since: LogPosition, at: Lsn) -> ChangesSince {
        if since.lsn > at {
            ChangesSince::Unknown("the log does not reach that far: it is another one, or lost its end")
        } else if self.replication.lineage().position(since.lsn) != Some(since) {
            ChangesSince::Unknown("the log went another way since, or too long ago to tell")
        } else if self.images_changed_at.is_some_and(|end| since.lsn <= end) {
            ChangesSince::Unknown("an image was changed by others while its node was down")
        } else {
            ChangesSince::Known
        }
    }

    pub(crate) fn close_view(&mut self, command: CommandId, view: ViewId) {
        if self.forget_view(view) {
            self.command_done(command, CommandOutput::Done);
        } else {
            self.command_failed(command, CommandError::Refused("there is no such view"));
        }
    }

    /// Its snapshot goes. Whoever waits for it to open is told; reads under way answer with an error. False if there is
    /// no such view.
    fn forget_view(&mut self, view: ViewId) -> bool {
        let Some(View { snapshot, ordered }) = self.views.open.remove(&view) else { return false };
        self.let_go_of(snapshot);
        if self.views.open.is_empty() {
            self.store.limit_snapshots(u64::MAX);
        }
        let reads = self.views.reads.extract_if(.., |_, (of, _)| *of == view);
        for (_, (view, token)) in reads.collect::<Vec<_>>() {
            self.out.push(Action::ViewRead { view, token, result: Err(ViewReadError::Gone) });
        }
        if let Some(Ordered { command, .. }) = ordered {
            self.command_failed(command, CommandError::Aborted("the view was closed before it was open"));
        }
        true
    }

    pub fn is_view_open(&self, view: ViewId) -> bool {
        self.views.open.get(&view).is_some_and(|view| view.ordered.is_none())
    }

    fn end_view(&mut self, view: ViewId, why: &str) {
        if self.is_view_open(view) {
            self.out.push(Action::ViewEnded { view, why: why.to_owned() });
        }
        self.forget_view(view);
    }

    pub(crate) fn end_views(&mut self, why: &str) {
        for view in self.views.open.keys().copied().collect::<Vec<_>>() {
            self.end_view(view, why);
        }
    }

    pub(crate) fn view_lost(&mut self, snapshot: SnapshotId, why: SnapshotLoss) {
        self.end_view(ViewId(snapshot.0), &why.to_string());
    }

    /// Reads extents as they were: [`Action::ViewRead`] follows for each. Who asks bounds how many are under way.
    pub(crate) fn read_view(&mut self, view: ViewId, token: Token, extents: ViewedExtents) {
        let ViewedExtents { disk, first, count } = extents;
        let Some(View { snapshot, ordered: None }) = self.views.open.get(&view) else {
            let gone = |place| Action::ViewRead {
                view,
                token: Token(token.0 + place),
                result: Err(ViewReadError::Gone),
            };
            return self.out.extend((0..count).map(gone));
        };
        let snapshot = *snapshot;
        let mut place = 0;
        while place < count {
            // What no record in the image ever touched was no different at the view.
            let untouched = |place: u64| self.store.is_untouched(disk, ExtentIndex(first.0 + place));
            if untouched(place) {
                let token = Token(token.0 + place);
                self.out.push(Action::ViewRead { view, token, result: Ok(None) });
                place += 1;
                continue;
            }
            let run = (place..count).take_while(|&place| !untouched(place)).count() as u64;
            let read = FIRST_READ | (self.next_token + 1);
            for read_place in 0..run {
                let read = FIRST_READ | self.token();
                self.views.reads.insert(read, (view, Token(token.0 + place + read_place)));
            }
            let first = ExtentIndex(first.0 + place);
            self.with_store(|store, io| {
                store.read_snapshot_run(rempart_store::Token(read), snapshot, disk, first, run, io);
            });
            place += run;
        }
    }

    /// False if it was not read for a view.
    pub(crate) fn view_read(
        &mut self,
        read: rempart_store::Token,
        result: &Result<Extent, SnapshotReadError>,
    ) -> bool {
        if read.0 < FIRST_READ {
            return false;
        }
        // Nobody waits any more once the view is closed.
        let Some((view, token)) = self.views.reads.remove(&read.0) else { return true };
        let result = match result {
            Ok(extent) => Ok(extent.data.clone().map(Slice::into_bytes)),
            Err(SnapshotReadError::Unknown) => Err(ViewReadError::Gone),
            Err(SnapshotReadError::Io(error)) => Err(ViewReadError::Disk(error.to_string())),
        };
        self.out.push(Action::ViewRead { view, token, result });
        true
    }
}

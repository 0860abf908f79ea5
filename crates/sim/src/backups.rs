//! Backups: now and then all disks are read from a view, whatever is struck meanwhile. What the change map says did not
//! change since the backup before must be what it was then, whoever leads by now.

use crate::coverage::Kind;
use crate::faults::Planted;
use crate::violation::{Promise, Violation};
use crate::world::{DaemonEvent, World};
use rempart_engine::{Bytes, ChangesSince, Command, OpenedView, Token, ViewId, ViewReadError, ViewedExtents};
use rempart_types::{DiskIndex, EXTENT_SIZE, ExtentIndex, LogPosition};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

type Place = (DiskIndex, ExtentIndex);

#[derive(Debug, Default)]
pub(crate) struct Backups {
    /// The last one that was read to its end.
    last: Option<Backup>,
    reading: Option<Reading>,
    next_token: u64,
}

#[derive(Debug)]
struct Backup {
    at: LogPosition,
    /// Nothing where all of it is zero.
    extents: BTreeMap<Place, Option<Bytes>>,
}

#[derive(Debug)]
struct Reading {
    node: usize,
    life: u64,
    view: ViewId,
    /// Which read is of which extent.
    reads: BTreeMap<Token, Place>,
    /// What did not change since the last backup, it is said.
    unchanged: BTreeSet<Place>,
    backup: Backup,
}

impl World {
    pub(crate) fn order_view(&mut self, node: usize) {
        let lives = |reading: &Reading| {
            self.nodes[reading.node].daemon.as_ref().is_some_and(|daemon| daemon.life == reading.life)
        };
        if self.backups.reading.as_ref().is_some_and(lives) {
            return;
        }
        self.backups.reading = None;
        let since = self.backups.last.as_ref().map(|backup| backup.at);
        let keep_bytes = *self.rng.pick(&[u64::MAX, u64::MAX, EXTENT_SIZE]);
        self.order(node, "view", Command::OpenView { since, keep_bytes });
    }

    pub(crate) fn view_opened(&mut self, node: usize, opened: &OpenedView) {
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let (life, engine) = (daemon.life, &daemon.engine);
        let sizes = engine.disk_sizes().iter().enumerate();
        let places: BTreeSet<Place> = sizes
            .flat_map(|(disk, size)| {
                let extents = (0..size.div_ceil(EXTENT_SIZE)).map(ExtentIndex);
                extents.map(move |extent| (DiskIndex(disk as u16), extent))
            })
            .collect();
        let mut unchanged = BTreeSet::new();
        if let (Some(ChangesSince::Known), Some(last)) = (opened.since, &self.backups.last) {
            let mut changed: BTreeSet<Place> = BTreeSet::new();
            for disk in 0..engine.disk_sizes().len() {
                let disk = DiskIndex(disk as u16);
                // The disks are small: one call tells all.
                let (list, _) = engine.changed_extents(disk, ExtentIndex(0), places.len());
                let later = list.iter().filter(|(_, lsn)| *lsn > last.at.lsn);
                changed.extend(later.map(|(extent, _)| (disk, *extent)));
            }
            if self.options.planted == Some(Planted::ChangeForgotten) {
                changed.pop_first();
            }
            unchanged.extend(places.difference(&changed));
        }
        if opened.since == Some(ChangesSince::Known) {
            self.coverage.count(Kind::Reached, "view: changes known");
        }
        let (mut reads, mut runs): (BTreeMap<Token, Place>, Vec<(Token, ViewedExtents)>) = Default::default();
        for place @ (disk, extent) in places {
            self.backups.next_token += 1;
            let token = Token(self.backups.next_token);
            reads.insert(token, place);
            let joins = self.rng.chance(700);
            match runs.last_mut() {
                Some((_, run)) if joins && run.disk == disk => run.count += 1,
                _ => runs.push((token, ViewedExtents { disk, first: extent, count: 1 })),
            }
        }
        for (token, extents) in runs {
            // Spread, so that the image goes on meanwhile.
            let delay = self.rng.duration(Duration::from_micros(10)..Duration::from_millis(50));
            let view = opened.view;
            self.tell_daemon(node, delay, DaemonEvent::ReadView { view, token, extents });
        }
        let backup = Backup { at: opened.at, extents: BTreeMap::new() };
        self.backups.reading = Some(Reading { node, life, view: opened.view, reads, unchanged, backup });
    }

    pub(crate) fn view_read(
        &mut self,
        node: usize,
        view: ViewId,
        token: Token,
        result: Result<Option<Bytes>, ViewReadError>,
    ) {
        let Some(reading) = &mut self.backups.reading else { return };
        if (reading.node, reading.view) != (node, view) {
            return;
        }
        let Some(place) = reading.reads.remove(&token) else { return };
        let Ok(data) = result else {
            self.backups.reading = None;
            return;
        };
        reading.backup.extents.insert(place, data);
        if !reading.reads.is_empty() {
            return;
        }
        let Reading { unchanged, backup, .. } = self.backups.reading.take().expect("just seen");
        self.coverage.count(Kind::Checked, "backup");
        if let Some(last) = &self.backups.last
            && let Some((disk, extent)) =
                unchanged.iter().find(|place| last.extents.get(place) != backup.extents.get(place))
        {
            let detail = format!(
                "extent {} of disk {disk} differs in the backups at {:?} and {:?}, and is not reported as \
                 changed",
                extent.0, last.at, backup.at
            );
            return self.broken(Violation::new(Promise::ChangesReported, detail));
        }
        self.backups.last = Some(backup);
        self.order(node, "close view", Command::CloseView { view });
    }

    pub(crate) fn view_ended(&mut self, node: usize, view: ViewId) {
        self.coverage.count(Kind::Reached, "view: lost");
        let same = |reading: &mut Reading| (reading.node, reading.view) == (node, view);
        self.backups.reading.take_if(same);
    }
}

//! After the faults: everything works again, and the pair must find back by itself.

use crate::audit::content;
use crate::book;
use crate::coverage::Kind;
use crate::history::{Request, Span};
use crate::violation::{Promise, Violation};
use crate::world::World;
use rempart_engine::{PeerStatus, Role};
use rempart_types::{DiskIndex, Lsn, SECTOR_SIZE};
use std::time::Duration;

/// How long the pair may take to mirror again once everything works. Twice the longest pause of a back-off, a
/// takeover, and a full resync of the little disks.
const CONVERGENCE: Duration = Duration::from_secs(240);
const QUIESCENCE: Duration = Duration::from_secs(150);

impl World {
    /// One seed's whole life: faults, healing, convergence.
    pub fn run(&mut self) -> Result<(), Violation> {
        let until = self.faults.until;
        self.run_until(until)?;
        self.heal_everything();
        self.converge()
    }

    /// From a healed world to one primary, a running machine, a mirror in sync and equal images.
    pub fn converge(&mut self) -> Result<(), Violation> {
        let deadline = self.now() + CONVERGENCE;
        while !self.is_mirrored() {
            if self.now() >= deadline {
                let promise =
                    if self.serving_node().is_some() { Promise::Converges } else { Promise::SomeoneLeads };
                return Err(Violation::new(
                    promise,
                    format!("not mirrored after healing: {}", self.summary()),
                ));
            }
            self.settle();
            let pause = (self.now() + Duration::from_millis(500)).min(deadline);
            while !self.is_mirrored() && self.now() < pause {
                let next = (self.now() + Duration::from_millis(20)).min(pause);
                self.run_until(next)?;
            }
        }
        self.reached("converged");
        // The guest works a little on the healed pair, then stops asking.
        let soon = self.now() + Duration::from_millis(500);
        self.run_until(soon)?;
        self.quiesce()?;
        self.compare_images()?;
        self.read_everything()
    }

    /// One node serves, its machine runs, and every configured replica is in sync.
    pub fn is_mirrored(&self) -> bool {
        let Some(leader) = self.serving_node() else { return false };
        let glance = |node: usize| self.nodes[node].daemon.as_ref().map(|daemon| daemon.engine.glance());
        let Some(leads) = glance(leader) else { return false };
        // A leader may not know yet that its follower is another one by now.
        let follows = |node: usize| {
            glance(node).is_some_and(|glance| glance.role == Role::Secondary && glance.term == leads.term)
        };
        if (0..self.nodes.len()).any(|node| node != leader && !follows(node)) {
            return false;
        }
        let now = self.nodes[leader].clock.reading(self.now());
        let Some(daemon) = &self.nodes[leader].daemon else { return false };
        let status = daemon.engine.status(now);
        let in_step = |peer: &PeerStatus| {
            peer.connected
                && peer.in_sync
                && peer.resync.is_none_or(|resync| !resync.running)
                && peer.accepted > Lsn::ZERO
        };
        let connected = status.peers.iter().all(in_step) && self.operator_is_idle();
        let machine = self.nodes[leader].machine.as_ref();
        status.serving
            && status.in_sync.len() == self.nodes.len()
            && connected
            && self.machine_runs(leader)
            && machine.is_some_and(|machine| machine.connection.open)
    }

    /// The guest stops asking, gets its answers, flushes; both images take everything.
    fn quiesce(&mut self) -> Result<(), Violation> {
        self.quiet = true;
        let deadline = self.now() + QUIESCENCE;
        let mut flushed = false;
        loop {
            if self.now() >= deadline {
                let text = format!("the pair does not come to rest: {}", self.summary());
                return Err(Violation::new(Promise::BoundedStall, text));
            }
            // An answer of a disk from before the healing may still be on its way.
            self.settle();
            let next = self.now() + Duration::from_millis(100);
            self.run_until(next)?;
            let Some(leader) = self.serving_node() else { continue };
            let life = self.nodes[leader].machine.as_ref().and_then(|machine| machine.life);
            let Some(life) = life else { continue };
            if !self.history.in_flight(life).is_empty() {
                continue;
            }
            if !std::mem::replace(&mut flushed, true) {
                let now = self.now();
                let tag = self.history.begin(life, Request::Flush, now);
                self.hand_over(leader, tag);
                continue;
            }
            if self.is_mirrored() && self.all_applied(leader) {
                return Ok(());
            }
        }
    }

    fn all_applied(&self, leader: usize) -> bool {
        let statuses: Vec<_> = self
            .nodes
            .iter()
            .filter_map(|node| node.daemon.as_ref().map(|daemon| daemon.engine.glance()))
            .collect();
        let end = statuses[leader].end;
        statuses.len() == self.nodes.len() && statuses.iter().all(|status| status.applied == end)
    }

    /// I5, and I3 for the final state.
    fn compare_images(&mut self) -> Result<(), Violation> {
        let zeroes: Vec<Vec<u8>> = self.setup.disks.iter().map(|&size| vec![0; size as usize]).collect();
        let images: Vec<Vec<Vec<u8>>> = self
            .nodes
            .iter()
            .map(|node| (0..zeroes.len()).map(|index| content(&node.drive.disk, index, &zeroes)).collect())
            .collect();
        for node in 1..images.len() {
            for (index, (a, b)) in images[0].iter().zip(&images[node]).enumerate() {
                if let Some(difference) = book::first_difference(index, a, b) {
                    let detail = format!("node 0 (expected) and node {node} (found): {difference}");
                    return Err(Violation::new(Promise::ImagesEqual, detail));
                }
            }
        }
        self.coverage.count(Kind::Checked, "images equal");
        Ok(())
    }

    /// The guest reads all of its disks, through the engine.
    fn read_everything(&mut self) -> Result<(), Violation> {
        let Some(leader) = self.serving_node() else { return Ok(()) };
        let Some(life) = self.nodes[leader].machine.as_ref().and_then(|machine| machine.life) else {
            return Ok(());
        };
        for index in 0..self.setup.disks.len() {
            let sectors = self.setup.disks[index] / SECTOR_SIZE;
            for start in (0..sectors).step_by(128) {
                let span = Span { disk: DiskIndex(index as u16), sectors: start..(start + 128).min(sectors) };
                let now = self.now();
                let tag = self.history.begin(life, Request::Read { span }, now);
                self.hand_over(leader, tag);
            }
        }
        let deadline = self.now() + Duration::from_secs(10);
        self.run_while(deadline, |world| !world.history.in_flight(life).is_empty())?;
        if !self.history.in_flight(life).is_empty() {
            let text = format!("reads on the healed pair hang: {}", self.summary());
            return Err(Violation::new(Promise::BoundedStall, text));
        }
        self.coverage.count(Kind::Checked, "disks read back by the guest");
        Ok(())
    }

    /// The state of everything, in a few lines.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let now = node.clock.reading(self.now());
            let daemon = match &node.daemon {
                None => "no daemon".to_owned(),
                Some(daemon) => format!("{:?}", daemon.engine.status(now)),
            };
            let machine = node.machine.as_ref().map(|machine| (machine.nonce, machine.runs()));
            text.push_str(&format!("\n  node {index}: power {} machine {machine:?} {daemon}", node.powered));
        }
        text.push_str(&format!("\n  register: {:?}", self.witness.current()));
        text
    }
}

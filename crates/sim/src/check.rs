//! What must hold at every step.

use crate::agenda::Moment;
use crate::book::Book;
use crate::violation::{Promise, Violation};
use crate::world::World;
use rempart_engine::Role;
use rempart_store::{Batch, FileId, IoCommand, IoOp, parse_header};
use rempart_types::{Intent, Lineage, RegisterId, RegisterValue, Term};
use std::collections::BTreeMap;

/// The memory of the step-by-step checks.
#[derive(Debug)]
pub(crate) struct Checker {
    /// Who led in each term.
    leaders: BTreeMap<Term, usize>,
    last_value: BTreeMap<RegisterId, RegisterValue>,
    /// The highest promise found durable on each node.
    pub promises: Vec<Term>,
    pub last_running: Option<usize>,
    /// How long two machines ran beside each other within what is excused.
    pub excused: std::time::Duration,
    overlap_since: Option<Moment>,
}

impl Checker {
    pub fn new(nodes: usize) -> Checker {
        Checker {
            leaders: BTreeMap::new(),
            last_value: BTreeMap::new(),
            promises: vec![Term::ZERO; nodes],
            last_running: None,
            excused: std::time::Duration::ZERO,
            overlap_since: None,
        }
    }

    /// I2: only an in-sync member becomes primary; every change raises the epoch.
    pub fn register_changed(&mut self, value: &RegisterValue, _now: Moment) -> Result<(), Violation> {
        let before = self.last_value.insert(value.register, value.clone());
        let Some(before) = before else { return Ok(()) };
        if value.epoch <= before.epoch {
            let detail = format!("the register goes from epoch {} to {}", before.epoch, value.epoch);
            return Err(Violation::new(Promise::OnePrimary, detail));
        }
        let closed = matches!(value.intent, Intent::Tombstone { .. });
        if !closed && !before.in_sync.contains(value.primary) {
            let detail = format!(
                "epoch {}: {} becomes primary, but in sync were {:?}",
                value.epoch, value.primary, before.in_sync
            );
            return Err(Violation::new(Promise::OnePrimary, detail));
        }
        if !value.in_sync.contains(value.primary) {
            let detail = format!("epoch {}: the primary is not in its own in-sync set", value.epoch);
            return Err(Violation::new(Promise::OnePrimary, detail));
        }
        Ok(())
    }

    /// The register was put together anew from what the replicas knew.
    pub fn register_restored(&mut self) {
        self.last_value.clear();
    }

    /// Looks at what goes to a disk.
    pub fn io_command(
        &mut self,
        node: usize,
        command: &IoCommand,
        lineage: Option<&Lineage>,
        book: &mut Book,
    ) -> Result<(), Violation> {
        let (file, offset, bytes) = match &command.op {
            IoOp::Write { file, offset, data } => (*file, *offset, data),
            _ => return Ok(()),
        };
        let FileId::Segment(_) = file else { return Ok(()) };
        let Some(first) = bytes.first() else { return Ok(()) };
        if offset == 0 || parse_header(first).is_err() {
            return Ok(());
        }
        let joined: Vec<u8>;
        let bytes: &[u8] = if let [only] = &bytes[..] {
            only
        } else {
            joined = bytes.iter().map(|slice| &slice[..]).collect::<Vec<&[u8]>>().concat();
            &joined
        };
        let mut rest = bytes;
        while let Ok(batch) = Batch::parse(rest) {
            book.wrote(node, &batch, lineage)?;
            rest = &rest[batch.byte_len()..];
        }
        Ok(())
    }

    /// I2: at most one primary a term.
    pub fn leads(&mut self, node: usize, term: Term) -> Result<bool, Violation> {
        let first = !self.leaders.contains_key(&term);
        let leader = *self.leaders.entry(term).or_insert(node);
        if leader == node {
            return Ok(first);
        }
        let detail = format!("nodes {leader} and {node} both lead term {term}");
        Err(Violation::new(Promise::OnePrimary, detail))
    }
}

impl World {
    /// After every turn of a daemon.
    pub(crate) fn check_node(&mut self, node: usize) {
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let status = daemon.engine.glance();
        let inconsistent = status.serving
            && (status.committed > status.end
                || status.stable > status.committed
                || status.durable > status.accepted
                || status.applied > status.durable);
        if inconsistent {
            let detail = format!("node {node}: watermarks out of order: {status:?}");
            return self.broken(Violation::new(Promise::PrefixOfHistory, detail));
        }
        if matches!(status.role, Role::Primary | Role::PrimaryFrozen) && status.term > Term::ZERO {
            match self.checker.leads(node, status.term) {
                Ok(first) => {
                    if first {
                        self.reached("term led");
                    }
                }
                Err(violation) => self.broken(violation),
            }
        }
    }

    /// After every step: never two running machines, but for one that was frozen and has just been continued.
    pub(crate) fn look(&mut self) {
        let mut running = 0;
        for node in 0..self.nodes.len() {
            if self.machine_runs(node) {
                running += 1;
                self.checker.last_running = Some(node);
            }
        }
        if running < 2 {
            self.checker.overlap_since = None;
            return;
        }
        let now = self.now();
        let first = self.checker.overlap_since.is_none();
        let since = *self.checker.overlap_since.get_or_insert(now);
        let excused = |node: usize| self.machine_runs(node) && now <= self.nodes[node].excused_until;
        if (0..self.nodes.len()).any(excused) {
            if first {
                self.reached("two VMs within the excused second");
            }
            self.checker.excused = self.checker.excused.max(now.since(since));
            return;
        }
        let detail = format!("{running} VM processes run at {now}, since {since}");
        self.broken(Violation::new(Promise::OneVm, detail));
    }

    /// Which node serves its guest now.
    pub(crate) fn serving_node(&self) -> Option<usize> {
        (0..self.nodes.len()).find(|&node| self.role(node) == Some(Role::Primary))
    }

    pub(crate) fn node_count(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn role(&self, node: usize) -> Option<Role> {
        self.nodes[node].daemon.as_ref().map(|daemon| daemon.engine.role())
    }
}

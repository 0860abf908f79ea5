//! The people and the control plane: they create the group, give orders while things break, and settle what only
//! they may settle (a divergence, a replaced disk, a replica that was taken out).

use crate::coverage::Kind;
use crate::drive::Drive;
use crate::violation::{Promise, Violation};
use crate::world::{DaemonEvent, Event, Node, World};
use rempart_cluster::Condition;
use rempart_engine::{Command, CommandError, CommandId, CommandOutput, Role};
use rempart_store::simulated::SimulatedDisk;
use rempart_store::{DiskEntry, FormatParams, Store};
use rempart_types::{DiskIndex, MonotonicTime, NodeId, NodeSet, RegisterId};
use std::collections::BTreeMap;
use std::time::Duration;

/// What the operator remembers.
#[derive(Debug, Default)]
pub(crate) struct Operator {
    /// The nodes configured to hold a replica.
    pub peers: NodeSet,
    next: u64,
    open: BTreeMap<CommandId, Order>,
    /// A forced takeover needs the other side fenced until it is carried out or refused.
    fenced: Vec<usize>,
    /// The node whose takeover is forced: ordered again until it is carried out or refused.
    forcing: Option<usize>,
    /// The daemon, by node and life, that was told to send resyncs as fast as it can.
    unlimited: Option<(usize, u64)>,
    /// The replica that was taken out, to be put back.
    removed: Option<NodeId>,
}

/// An order that was given and not answered yet.
#[derive(Debug)]
struct Order {
    node: usize,
    /// Which life of its daemon was told: with the daemon goes the order.
    life: u64,
    name: &'static str,
}

impl Operator {
    /// The replica that was taken out and not put back.
    pub fn removed(&self) -> Option<NodeId> {
        self.removed
    }

    /// An order to lead by force is being carried out.
    pub fn is_forcing(&self) -> bool {
        self.forcing.is_some()
    }
}

const ORDERS: [(&str, u32); 10] = [
    ("handover", 6),
    ("compare", 4),
    ("mark", 3),
    ("put config", 3),
    ("limit resync", 2),
    ("remove peer", 2),
    ("add peer", 6),
    ("force", 1),
    ("stop", 2),
    ("view", 6),
];

impl World {
    /// Formats the disks, starts the daemons and creates the group.
    pub(crate) fn begin(&mut self) {
        self.operator.peers = self.nodes.iter().map(|node| node.id).collect();
        for node in 0..self.nodes.len() {
            self.start_daemon(node);
            for other in node + 1..self.nodes.len() {
                self.after(Duration::from_millis(1), Event::Connect { a: node, b: other });
            }
        }
        self.order(0, "create", Command::Create);
        let first_fault = self.rng.duration(Duration::from_millis(100)..Duration::from_secs(6));
        self.after(first_fault, Event::NextFault);
        self.after(Duration::from_secs(2), Event::NextOrder);
    }

    pub(crate) fn order(&mut self, node: usize, name: &'static str, command: Command) {
        self.operator.next += 1;
        let id = CommandId(self.operator.next);
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let life = daemon.life;
        self.tell(|| format!("ORDER  {} {name} at node {node}: {command:?}", id.0));
        self.operator.open.insert(id, Order { node, life, name });
        self.coverage.count(Kind::Reached, name);
        self.tell_daemon(node, Duration::from_micros(50), DaemonEvent::Command(id, command));
    }

    /// Such an order was given to the daemon that runs at `node`, and is not answered yet.
    fn is_ordered(&self, node: usize, name: &str) -> bool {
        let Some(daemon) = &self.nodes[node].daemon else { return false };
        let same = |order: &Order| order.node == node && order.life == daemon.life && order.name == name;
        self.operator.open.values().any(same)
    }

    pub(crate) fn command_done(
        &mut self,
        node: usize,
        id: CommandId,
        result: Result<CommandOutput, CommandError>,
    ) {
        let Some(order) = self.operator.open.remove(&id) else {
            let detail = format!("node {node} answers command {} twice or unasked", id.0);
            return self.broken(Violation::new(Promise::CoreAssertion, detail));
        };
        match (order.name, result) {
            // Taken, not done: the peer is out when the in-sync set no longer names it.
            ("remove peer", Ok(_)) => {}
            ("remove peer", Err(_)) => {
                // It stays configured.
                if let Some(removed) = self.operator.removed.take() {
                    self.operator.peers.insert(removed);
                }
            }
            ("force", Ok(_)) => {
                self.reached("force done");
                self.operator.forcing = None;
                let pause = self.rng.duration(Duration::from_millis(20)..Duration::from_secs(3));
                self.after(pause, Event::TendTakeover);
            }
            // Ordered again later.
            ("force", Err(CommandError::Busy)) => {}
            ("force", Err(_)) => self.operator.forcing = None,
            ("view", Ok(CommandOutput::ViewOpened(opened))) => self.view_opened(node, &opened),
            ("handover", Ok(_)) => self.reached("handover done"),
            ("stop", Ok(_)) => {
                let life = self.nodes[node].lives;
                self.after(Duration::from_millis(1), Event::Exit { node, life, clean: true });
            }
            _ => {}
        }
    }

    /// Now and then somebody orders something, sensible or not.
    pub(crate) fn next_order(&mut self) {
        if self.now() >= self.faults.until {
            return;
        }
        let pause = self.rng.duration(Duration::from_millis(200)..self.faults.order_gap);
        self.after(pause, Event::NextOrder);
        if self.a_copy_is_rotten() {
            return;
        }
        self.finish_removal();
        self.tend_forced_takeover();
        let weights = ORDERS.map(|(name, weight)| if self.faults.orders(name) { weight } else { 0 });
        let Some(choice) = self.rng.weighted(&weights) else { return };
        let leader = self.serving_node().unwrap_or_else(|| self.rng.index(self.nodes.len()));
        let node = if self.rng.chance(100) { self.rng.index(self.nodes.len()) } else { leader };
        let peer = self.nodes[(node + 1 + self.rng.index(self.nodes.len() - 1)) % self.nodes.len()].id;
        let name = ORDERS[choice].0;
        match name {
            "handover" => self.order(node, name, Command::Handover { to: peer }),
            "compare" => self.order(node, name, Command::Compare { peer }),
            "mark" => self.order(node, name, Command::Mark { name: "before the upgrade".to_owned() }),
            "put config" => {
                let content = vec![7; 1 + self.rng.index(600)];
                self.order(node, name, Command::PutConfig { content: content.into() });
            }
            "limit resync" => {
                let bytes_per_second = *self.rng.pick(&[None, Some(256 * 1024), Some(4 << 20)]);
                self.order(node, name, Command::LimitResync { bytes_per_second });
            }
            "remove peer" => {
                if self.operator.removed.is_none() && Some(node) == self.serving_node() {
                    self.operator.removed = Some(peer);
                    self.operator.peers.remove(peer);
                    self.order(node, name, Command::RemovePeer { peer });
                }
            }
            "add peer" => self.put_back(),
            "force" => self.force(node),
            "stop" => self.stop_daemon(node),
            "view" => self.order_view(node),
            _ => unreachable!("an order of the table"),
        }
    }

    /// Once the replica is out its daemon drops the group.
    fn finish_removal(&mut self) {
        let (Some(removed), Some(leader)) = (self.operator.removed, self.serving_node()) else { return };
        let node = self.index_of(removed);
        let now = self.nodes[leader].clock.reading(self.now());
        let status = self.nodes[leader].daemon.as_ref().expect("it serves").engine.status(now);
        let named = status.in_sync.contains(removed) || self.in_sync_mask() >> node & 1 == 1;
        if named || leader == node || self.nodes[node].stays_down {
            return;
        }
        self.nodes[node].stays_down = true;
        self.crash_daemon(node);
        self.end_machine(node);
        if self.rng.coin() {
            self.replace_disk(node);
        }
    }

    /// A replica that was taken out is put back, with the old copy or an empty one.
    fn put_back(&mut self) {
        let Some(removed) = self.operator.removed else { return };
        let node = self.index_of(removed);
        let Some(leader) = self.serving_node() else { return };
        self.operator.removed = None;
        self.operator.peers.insert(removed);
        if leader == node {
            // It took over before it was out: whoever was told to forget it is told again.
            for other in (0..self.nodes.len()).filter(|&other| other != node) {
                self.order(other, "add peer", Command::AddPeer { peer: removed });
            }
            return;
        }
        self.nodes[node].stays_down = false;
        self.start_daemon(node);
        self.order(leader, "add peer", Command::AddPeer { peer: removed });
    }

    /// Forces a replica that does not lead, after the one that does was really switched off.
    fn force(&mut self, node: usize) {
        let Some(primary) = self.witness.current().map(|value| self.index_of(value.primary)) else { return };
        let target = if primary == node { (node + 1) % self.nodes.len() } else { node };
        let leads = matches!(self.role(target), None | Some(Role::Primary | Role::PrimaryFrozen));
        if leads || !self.may_force(primary, target) {
            return;
        }
        self.fence(primary);
        self.operator.forcing = Some(target);
        self.order_force(target);
    }

    /// `primary` leads by the register, which `target` can reach, and every replica has its place.
    pub(crate) fn may_force(&self, primary: usize, target: usize) -> bool {
        let leads = self.witness.current().is_some_and(|value| value.primary == self.nodes[primary].id);
        let reachable = self.witness.up && !self.witness.knows_nothing() && !self.nodes[target].witness.cut;
        leads && reachable && self.nodes.len() == 2 && self.operator_is_idle()
    }

    /// The only copy in sync is lost: the other one leads from here on, with what it has.
    pub(crate) fn give_up(&mut self, node: usize) {
        let other = (node + 1) % self.nodes.len();
        if self.may_force(node, other) {
            self.force(other);
        }
    }

    /// The node is switched off, and stays so until the takeover is carried out. What only it held may be lost.
    fn fence(&mut self, node: usize) {
        self.power_off(node);
        self.nodes[node].stays_down = true;
        self.operator.fenced.push(node);
        let now = self.now();
        self.history.forced(now);
    }

    /// Until a forced takeover is carried out or refused it is ordered again, as often as the daemon that was told
    /// of it died. Only then may the fenced node come back, which is told to rejoin the group it finds there.
    pub(crate) fn tend_forced_takeover(&mut self) {
        if let Some(node) = self.operator.forcing {
            if !self.is_ordered(node, "force") {
                self.order_force(node);
            }
        } else {
            for node in std::mem::take(&mut self.operator.fenced) {
                self.nodes[node].stays_down = false;
                self.power_on(node);
            }
        }
        for node in 0..self.nodes.len() {
            let now = self.nodes[node].clock.reading(self.now());
            let Some(daemon) = &self.nodes[node].daemon else { continue };
            if daemon.engine.status(now).superseded && !self.is_ordered(node, "rejoin") {
                self.order(node, "rejoin", Command::Rejoin);
            }
        }
    }

    fn order_force(&mut self, node: usize) {
        let new_register = RegisterId(self.rng.u128());
        let command = Command::Force { confirmed_fenced: true, new_register, old_register_lost: false };
        self.order(node, "force", command);
    }

    /// The source of a resync is lost for good, and its target goes back to what it was before.
    pub(crate) fn force_a_rolled_back_copy(&mut self, source: usize, target: usize) {
        self.fence(source);
        self.operator.forcing = Some(target);
        self.crash_daemon(target);
        self.nodes[target].roll_back = true;
        let boot = self.nodes[target].boots;
        self.after(Duration::from_millis(200), Event::StartDaemon { node: target, boot });
        self.after(Duration::from_millis(600), Event::TendTakeover);
    }

    /// The daemon is asked to stop in order; one that takes too long is killed.
    pub(crate) fn stop_daemon(&mut self, node: usize) {
        if self.nodes[node].daemon.is_none() {
            return;
        }
        self.order(node, "stop", Command::Stop);
        let life = self.nodes[node].lives;
        self.after(Duration::from_secs(5), Event::Exit { node, life, clean: false });
    }

    pub(crate) fn daemon_exits(&mut self, node: usize, life: u64, clean: bool) {
        let Some(daemon) = self.nodes[node].daemon.as_ref().filter(|daemon| daemon.life == life) else {
            return;
        };
        if daemon.frozen {
            return self.after(Duration::from_millis(100), Event::Exit { node, life, clean });
        }
        self.crash_daemon(node);
        self.touch_image(node, clean);
        let boot = self.nodes[node].boots;
        let pause = self.rng.duration(Duration::from_millis(50)..Duration::from_secs(4));
        self.after(pause, Event::StartDaemon { node, boot });
    }

    pub(crate) fn operator_sees_condition(&mut self, condition: Condition) {
        if let Condition::Superseded { .. } = condition {
            let pause = self.rng.duration(Duration::from_millis(10)..Duration::from_secs(1));
            self.after(pause, Event::TendTakeover);
        }
        if let Condition::TakingOver { .. } = condition {
            self.strike_a_takeover();
        }
    }

    /// The store of this node reported that it cannot go on.
    pub(crate) fn disk_failed(&mut self, node: usize) {
        self.nodes[node].disk_failed = true;
    }

    /// Its trouble is over: the process that met it is started anew.
    pub(crate) fn restart_if_failed(&mut self, node: usize) {
        if std::mem::replace(&mut self.nodes[node].disk_failed, false) {
            self.crash_daemon(node);
            let boot = self.nodes[node].boots;
            self.after(Duration::from_millis(200), Event::StartDaemon { node, boot });
        }
    }

    /// An empty disk takes the place of the old one.
    pub(crate) fn replace_disk(&mut self, node: usize) {
        self.reached("replica replaced by an empty one");
        self.nodes[node].drive.disk = formatted(&self.setup);
        self.nodes[node].spoilt = false;
        self.checker.promises[node] = rempart_types::Term::ZERO;
    }

    /// After healing: whatever waits for a person is settled.
    pub(crate) fn settle(&mut self) {
        self.tend_forced_takeover();
        for node in 0..self.nodes.len() {
            if self.nodes[node].daemon.is_none() && self.nodes[node].powered {
                self.start_daemon(node);
            }
            if self.nodes[node].disk_failed {
                self.restart_if_failed(node);
            }
        }
        for node in 0..self.nodes.len() {
            // The others left before anybody knew that this copy is damaged.
            let last = self.nodes[node].rotten && self.in_sync_mask() == 1 << node;
            if last && self.serving_node().is_none() {
                self.give_up(node);
            }
        }
        if self.witness.changes.is_empty() && !self.witness.knows_nothing() {
            self.order(0, "create", Command::Create);
        }
        let Some(leader) = self.serving_node() else { return };
        self.lift_limit(leader);
        self.put_back();
        let now = self.nodes[leader].clock.reading(self.now());
        let status = self.nodes[leader].daemon.as_ref().expect("it serves").engine.status(now);
        for peer in status.peers.iter().filter(|peer| peer.diverged) {
            self.order(leader, "approve overwrite", Command::ApproveOverwrite { peer: peer.node });
        }
        for id in self.operator.peers.clone().others(self.nodes[leader].id) {
            if !status.peers.iter().any(|peer| peer.node == id) {
                self.order(leader, "add peer", Command::AddPeer { peer: id });
            }
        }
    }

    /// A resync that may send less than the guest writes need never end: the limit is taken away, once in each life
    /// of the leader's daemon.
    fn lift_limit(&mut self, leader: usize) {
        let life = self.nodes[leader].lives;
        if self.operator.unlimited.replace((leader, life)) != Some((leader, life)) {
            self.order(leader, "limit resync", Command::LimitResync { bytes_per_second: None });
        }
    }

    /// Every replica is configured and nothing is fenced.
    pub(crate) fn operator_is_idle(&self) -> bool {
        let Operator { removed, fenced, forcing, .. } = &self.operator;
        removed.is_none() && fenced.is_empty() && forcing.is_none()
    }
}

impl Node {
    pub(crate) fn new(
        id: NodeId,
        index: usize,
        setup: &crate::setup::Setup,
        disk: SimulatedDisk,
        planted: Option<crate::faults::Planted>,
        rng: &mut crate::rng::Rng,
    ) -> Node {
        let reading = MonotonicTime(rng.below(1 << 40));
        Node {
            id,
            clock: crate::clock::Clock::new(crate::agenda::Moment::START, reading, setup.drift_ppb[index]),
            powered: true,
            frozen: false,
            excused_until: crate::agenda::Moment::START,
            boots: 0,
            lives: 0,
            drive: Drive::new(disk, setup.disk_latency.clone(), planted),
            daemon: None,
            machine: None,
            witness: crate::wire::WitnessPath::default(),
            stays_down: false,
            disk_failed: false,
            vm_may_run: false,
            lease: None,
            rotten: false,
            spoilt: false,
            to_be_touched: false,
            roll_back: false,
        }
    }
}

pub(crate) fn formatted(setup: &crate::setup::Setup) -> SimulatedDisk {
    let mut disk = SimulatedDisk::new();
    let entry = |(index, &size): (usize, &u64)| DiskEntry {
        index: DiskIndex(index as u16),
        size,
        location: String::new(),
        base: DiskEntry::EMPTY,
    };
    let params = FormatParams {
        segment_size: setup.segment_size,
        segments: setup.segments,
        ..FormatParams::new(setup.group, setup.disks.iter().enumerate().map(entry).collect())
    };
    Store::format(&mut disk, &params).expect("a healthy disk is formatted");
    disk
}

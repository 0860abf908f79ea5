//! What goes wrong, how often, and for how long. Every seed draws its own mixture (swarm testing): most faults are
//! off in most seeds, so that the few which are on meet in depth.

use crate::agenda::Moment;
use crate::coverage::Kind;
use crate::rng::Rng;
use crate::setup::Setup;
use crate::world::{Event, World};
use rempart_replication::Report;
use rempart_store::IoErrorKind;
use std::time::Duration;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    DaemonCrash,
    PowerLoss,
    PowerLossOfAll,
    QemuKilled,
    DaemonFrozen,
    GuardFrozen,
    NodeFrozen,
    SessionReset,
    Partition,
    OneWay,
    Flapping,
    SlowLink,
    IsolatedNode,
    WitnessCut,
    WitnessDown,
    WitnessSlow,
    WitnessLossy,
    WitnessLate,
    WitnessAmnesia,
    WallClockStep,
    DriftChange,
    SlowDisk,
    SyncError,
    DiskFull,
    BitRot,
    ImageTouched,
    RollBack,
}

impl Fault {
    pub const ALL: [Fault; 27] = [
        Fault::DaemonCrash,
        Fault::PowerLoss,
        Fault::PowerLossOfAll,
        Fault::QemuKilled,
        Fault::DaemonFrozen,
        Fault::GuardFrozen,
        Fault::NodeFrozen,
        Fault::SessionReset,
        Fault::Partition,
        Fault::OneWay,
        Fault::Flapping,
        Fault::SlowLink,
        Fault::IsolatedNode,
        Fault::WitnessCut,
        Fault::WitnessDown,
        Fault::WitnessSlow,
        Fault::WitnessLossy,
        Fault::WitnessLate,
        Fault::WitnessAmnesia,
        Fault::WallClockStep,
        Fault::DriftChange,
        Fault::SlowDisk,
        Fault::SyncError,
        Fault::DiskFull,
        Fault::BitRot,
        Fault::ImageTouched,
        Fault::RollBack,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Fault::DaemonCrash => "daemon crash",
            Fault::PowerLoss => "power loss",
            Fault::PowerLossOfAll => "power loss of all",
            Fault::QemuKilled => "QEMU killed",
            Fault::DaemonFrozen => "daemon frozen",
            Fault::GuardFrozen => "guard frozen",
            Fault::NodeFrozen => "node frozen",
            Fault::SessionReset => "session reset",
            Fault::Partition => "partition",
            Fault::OneWay => "one-way black hole",
            Fault::Flapping => "flapping link",
            Fault::SlowLink => "slow link",
            Fault::IsolatedNode => "node cut off from all",
            Fault::WitnessCut => "witness cut off",
            Fault::WitnessDown => "witness down",
            Fault::WitnessSlow => "witness slow",
            Fault::WitnessLossy => "witness lossy",
            Fault::WitnessLate => "witness: requests come late",
            Fault::WitnessAmnesia => "witness amnesia",
            Fault::WallClockStep => "wall clock step",
            Fault::DriftChange => "clock drift changes",
            Fault::SlowDisk => "slow disk",
            Fault::SyncError => "fsync error",
            Fault::DiskFull => "disk full",
            Fault::BitRot => "bit rot",
            Fault::ImageTouched => "image written to while stopped",
            Fault::RollBack => "source of a resync lost for good",
        }
    }

    /// How likely beside the others, when it is on.
    fn weight(self) -> u32 {
        match self {
            Fault::DaemonCrash | Fault::PowerLoss | Fault::SessionReset => 10,
            Fault::Partition | Fault::IsolatedNode => 10,
            Fault::SyncError | Fault::DiskFull | Fault::WitnessAmnesia => 3,
            // Only as a strike: it needs a resync under way.
            Fault::RollBack => 0,
            Fault::NodeFrozen => 18,
            Fault::BitRot => 16,
            _ => 6,
        }
    }
}

/// A fault that ends by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    ThawDaemon { node: usize, life: u64 },
    ThawGuard { node: usize },
    ThawNode { node: usize },
    Heal { from: usize, to: usize },
    Flap { a: usize, b: usize, times: u32 },
    LinkSpeed { from: usize, to: usize },
    WitnessPath { node: usize },
    WitnessUp,
    DiskSpeed { node: usize },
    DiskWorks { node: usize },
}

/// Bugs planted in the world around the cores, to see that the checkers find them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Planted {
    /// The disk answers a sync of such a file without doing it.
    JournalSyncIgnored,
    ImageSyncIgnored,
    SuperblockSyncIgnored,
    MapSyncIgnored,
    /// The disk answers writes to such a file, or some of them, without doing them.
    SuperblockWriteLost,
    ImageWriteLost,
    MapWriteLost,
    JournalWriteLost,
    /// Holes are not punched: what was there can be read again.
    PunchIgnored,
    /// A guard lets its machine run on without a lease.
    GuardIgnoresLease,
    /// A guard looks at the lease when four times its time to stop the machine is over.
    GuardSleeps,
    /// Clocks run faster and slower than anyone promised.
    ClockBeyondDrift,
    /// Most reads of the register return its value before the last change.
    StaleRegister,
    /// The register takes any value, whatever its author expected to replace.
    SwapIgnoresExpectation,
    /// A witness that restarts has lost its last change, and one that lost all says that there never was anything.
    RegisterForgets,
    AmnesiaUnnoticed,
    /// What was under way on a connection that broke comes out of the next one.
    OldSessionsKept,
    /// Messages of a living session overtake each other, or are lost.
    MessagesReordered,
    MessagesLost,
    /// The guest is answered before the engine says so.
    WriteAnsweredEarly,
    FlushAnsweredEarly,
    /// Nobody tells the engine that a write is to be durable when it is answered.
    FuaIgnored,
    /// A machine that is to end runs on.
    KillIgnored,
    /// Reads are answered from the image, whatever the log holds beyond it.
    ReadsFromImage,
    /// A discard is answered and forgotten.
    DiscardDropped,
    /// Writes of a guest's connection that is gone are carried out when its successor is served.
    ConnectionNotDrained,
    /// A backup takes over an extent from the one before although it changed.
    ChangeForgotten,
}

impl Planted {
    pub const ALL: [Planted; 27] = [
        Planted::JournalSyncIgnored,
        Planted::ImageSyncIgnored,
        Planted::SuperblockSyncIgnored,
        Planted::MapSyncIgnored,
        Planted::SuperblockWriteLost,
        Planted::ImageWriteLost,
        Planted::MapWriteLost,
        Planted::JournalWriteLost,
        Planted::PunchIgnored,
        Planted::GuardIgnoresLease,
        Planted::GuardSleeps,
        Planted::ClockBeyondDrift,
        Planted::StaleRegister,
        Planted::SwapIgnoresExpectation,
        Planted::RegisterForgets,
        Planted::AmnesiaUnnoticed,
        Planted::OldSessionsKept,
        Planted::MessagesReordered,
        Planted::MessagesLost,
        Planted::WriteAnsweredEarly,
        Planted::FlushAnsweredEarly,
        Planted::FuaIgnored,
        Planted::KillIgnored,
        Planted::ReadsFromImage,
        Planted::DiscardDropped,
        Planted::ConnectionNotDrained,
        Planted::ChangeForgotten,
    ];
}

/// One seed's mixture.
#[derive(Debug, Clone)]
pub struct FaultPlan {
    weights: Vec<u32>,
    gap: Duration,
    longest: Duration,
    pub until: Moment,
    /// How many of a thousand resyncs are struck while they run.
    strikes: u32,
    /// Orders come that far apart at most.
    pub order_gap: Duration,
    orders: u32,
}

impl FaultPlan {
    pub fn draw(rng: &mut Rng, setup: &Setup) -> FaultPlan {
        let on = *rng.pick(&[120, 300, 600]);
        let weights = Fault::ALL.map(|fault| if rng.chance(on) { fault.weight() } else { 0 });
        FaultPlan {
            weights: weights.to_vec(),
            gap: Duration::from_millis(*rng.pick(&[300, 1_000, 2_500])),
            longest: Duration::from_millis(*rng.pick(&[500, 3_000, 10_000])),
            until: Moment::START + setup.fault_phase,
            strikes: *rng.pick(&[300, 800, 1000]),
            order_gap: Duration::from_millis(*rng.pick(&[1_000, 5_000, 20_000])),
            orders: if rng.chance(600) { rng.u64() as u32 } else { 0 },
        }
    }

    /// Whether this seed's operator gives such orders.
    pub fn orders(&self, name: &str) -> bool {
        let place = name.bytes().fold(0_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
        name == "add peer" || self.orders >> (place % 32) & 1 == 1
    }

    /// No fault comes by itself.
    pub fn none() -> FaultPlan {
        let weights = vec![0; Fault::ALL.len()];
        let second = Duration::from_secs(1);
        FaultPlan {
            weights,
            gap: second,
            longest: second,
            until: Moment::START,
            strikes: 0,
            order_gap: second,
            orders: 0,
        }
    }

    fn duration(&self, rng: &mut Rng) -> Duration {
        rng.duration(Duration::from_millis(1)..self.longest)
    }
}

impl World {
    /// The time for the next fault has come.
    pub(crate) fn next_fault(&mut self) {
        if self.now() >= self.faults.until {
            return;
        }
        let gap = self.rng.duration(Duration::from_millis(1)..self.faults.gap * 2);
        self.after(gap, Event::NextFault);
        self.rot_is_over();
        if self.a_copy_is_rotten() {
            return;
        }
        if let Some(kind) = self.rng.weighted(&self.faults.weights) {
            let fault = Fault::ALL[kind];
            let node = self.aim(fault);
            self.play(fault, node);
        }
    }

    /// Where a fault strikes: some mean most to the node that serves.
    fn aim(&mut self, fault: Fault) -> usize {
        let any = self.rng.index(self.nodes.len());
        let at_the_leader = matches!(
            fault,
            Fault::IsolatedNode | Fault::NodeFrozen | Fault::GuardFrozen | Fault::QemuKilled | Fault::BitRot
        );
        if at_the_leader && self.rng.chance(600) { self.serving_node().unwrap_or(any) } else { any }
    }

    /// A resync has just begun, or just sent its last extent: the moments at which losing a side matters most.
    pub(crate) fn strike_a_resync(&mut self, source: usize, report: &Report) {
        let (peer, longest, faults) = match report {
            Report::ResyncStarted { peer, .. } => {
                let faults = [Fault::DaemonCrash, Fault::PowerLoss, Fault::RollBack, Fault::RollBack];
                (*peer, Duration::from_millis(40), faults)
            }
            Report::ResyncFinished { peer, .. } => {
                let faults = [Fault::DaemonCrash, Fault::DaemonCrash, Fault::PowerLoss, Fault::PowerLoss];
                (*peer, Duration::from_millis(3), faults)
            }
            _ => return,
        };
        // The end is rarely met in time: it is struck more often than the beginning.
        let twice = matches!(report, Report::ResyncFinished { .. }) && self.rng.chance(self.faults.strikes);
        if self.now() >= self.faults.until || !(twice || self.rng.chance(self.faults.strikes)) {
            return;
        }
        let target = self.index_of(peer);
        // Most resyncs of such small disks are short.
        let longest = longest / (1 << self.rng.below(5));
        let delay = self.rng.duration(Duration::ZERO..longest);
        let fault = *self.rng.pick(&faults);
        let node = if fault == Fault::RollBack || self.rng.chance(150) { source } else { target };
        self.after(delay, Event::Strike { node, fault });
    }

    /// A takeover begins: its register goes away at that moment, and the primary that was given up comes back. Some
    /// that are frozen are left so: they shall find their successor at work.
    pub(crate) fn strike_a_takeover(&mut self) {
        // One that takes over from a rotten copy is the one that must be left in peace.
        if self.now() >= self.faults.until || self.a_copy_is_rotten() || !self.rng.chance(self.faults.strikes)
        {
            return;
        }
        if self.nodes.iter().any(|node| node.frozen) && self.rng.chance(850) {
            return;
        }
        let lasts = self.rng.duration(Duration::from_secs(2)..Duration::from_secs(6));
        self.play_for(Fault::WitnessDown, 0, lasts);
        // The primary is to know that it is away before its lease ends.
        self.witness.refuses = self.rng.chance(800);
        for node in 0..self.nodes.len() {
            self.after(Duration::from_millis(200), Event::EndFault(Ending::ThawNode { node }));
            for other in (0..self.nodes.len()).filter(|&other| other != node) {
                self.after(
                    Duration::from_millis(200),
                    Event::EndFault(Ending::Heal { from: node, to: other }),
                );
            }
        }
    }

    pub(crate) fn strike(&mut self, fault: Fault, node: usize) {
        if self.now() < self.faults.until && !self.a_copy_is_rotten() {
            // Soon back, so that what was interrupted goes on, and may be struck again.
            let lasts = self.rng.duration(Duration::from_millis(10)..Duration::from_millis(500));
            self.play_for(fault, node, lasts);
        }
    }

    /// Plays a fault at `node` (and at its link to the next one), for as long as the plan says.
    pub fn play(&mut self, fault: Fault, node: usize) {
        let lasts = self.faults.duration(&mut self.rng);
        self.play_for(fault, node, lasts);
    }

    /// As [`World::play`], for a time of the caller's choice.
    pub fn play_for(&mut self, fault: Fault, node: usize, lasts: Duration) {
        let peer = (node + 1 + self.rng.index(self.nodes.len() - 1)) % self.nodes.len();
        if !self.possible(fault, node) {
            return;
        }
        self.tell(|| format!("FAULT  {} at node {node} for {:.3} s", fault.name(), lasts.as_secs_f64()));
        self.coverage.count(Kind::Fault, fault.name());
        match fault {
            Fault::DaemonCrash => {
                self.crash_daemon(node);
                let boot = self.nodes[node].boots;
                self.after(lasts, Event::StartDaemon { node, boot });
            }
            Fault::PowerLoss => {
                self.power_off(node);
                self.after(lasts, Event::PowerOn { node });
            }
            Fault::PowerLossOfAll => {
                for node in 0..self.nodes.len() {
                    self.power_off(node);
                    let more = self.rng.duration(Duration::ZERO..Duration::from_secs(3));
                    self.after(lasts + more, Event::PowerOn { node });
                }
            }
            Fault::QemuKilled => self.kill_machine(node),
            Fault::DaemonFrozen => {
                self.freeze_daemon(node, true);
                if let Some(daemon) = &self.nodes[node].daemon {
                    let life = daemon.life;
                    self.after(lasts, Event::EndFault(Ending::ThawDaemon { node, life }));
                }
            }
            Fault::GuardFrozen => {
                // Longer than its share of the guard's time is beyond what anyone promised.
                let lasts = lasts.min(self.setup.timing.guard_stop * 2 / 5);
                self.freeze_guard(node, true);
                self.after(lasts, Event::EndFault(Ending::ThawGuard { node }));
            }
            Fault::NodeFrozen => {
                // Now and then long enough to be taken over meanwhile.
                let more = Duration::from_secs(if self.rng.chance(850) { 9 } else { 0 });
                let lasts = lasts + more;
                self.nodes[node].frozen = true;
                self.freeze_daemon(node, true);
                self.after(lasts, Event::EndFault(Ending::ThawNode { node }));
            }
            Fault::SessionReset => {
                if let Some(session) = self.network.between(node, peer) {
                    self.reset(session);
                }
            }
            Fault::Partition => self.cut_both(node, peer, lasts),
            Fault::OneWay => {
                self.network.cut(node, peer);
                self.after(lasts, Event::EndFault(Ending::Heal { from: node, to: peer }));
            }
            Fault::Flapping => {
                let times = 2 + self.rng.below(12) as u32;
                self.after(Duration::ZERO, Event::EndFault(Ending::Flap { a: node, b: peer, times }));
            }
            Fault::SlowLink => {
                let least = self.rng.duration(Duration::from_millis(1)..Duration::from_millis(400));
                self.network.set_delay(node, peer, least..least * 2);
                self.after(lasts, Event::EndFault(Ending::LinkSpeed { from: node, to: peer }));
            }
            Fault::IsolatedNode => {
                // Most of them long enough to be suspected.
                let more = Duration::from_millis(if self.rng.chance(700) { 2_000 } else { 0 });
                let lasts = lasts + more;
                for other in (0..self.nodes.len()).filter(|&other| other != node) {
                    self.cut_both(node, other, lasts);
                }
                self.nodes[node].witness.cut = true;
                self.after(lasts, Event::EndFault(Ending::WitnessPath { node }));
            }
            Fault::WitnessCut => {
                self.nodes[node].witness.cut = true;
                self.after(lasts, Event::EndFault(Ending::WitnessPath { node }));
            }
            Fault::WitnessDown => {
                self.witness.up = false;
                self.after(lasts, Event::EndFault(Ending::WitnessUp));
            }
            Fault::WitnessSlow => {
                self.nodes[node].witness.delay = Duration::from_millis(200)..Duration::from_millis(900);
                self.after(lasts, Event::EndFault(Ending::WitnessPath { node }));
            }
            Fault::WitnessLossy => {
                let path = &mut self.nodes[node].witness;
                (path.lost_requests, path.lost_replies) = (300, 300);
                self.after(lasts, Event::EndFault(Ending::WitnessPath { node }));
            }
            Fault::WitnessLate => {
                self.nodes[node].witness.late_requests = 500;
                self.after(lasts, Event::EndFault(Ending::WitnessPath { node }));
            }
            Fault::WitnessAmnesia => {
                let unnoticed = self.options.planted == Some(Planted::AmnesiaUnnoticed);
                self.witness.lose_memory(unnoticed);
            }
            Fault::WallClockStep => {
                let step = self.rng.below(20_000_000) as i64 - 10_000_000;
                self.nodes[node].clock.step_wall(step);
            }
            Fault::DriftChange => {
                let now = self.now();
                let beyond = if self.options.planted == Some(Planted::ClockBeyondDrift) { 120 } else { 1 };
                let drift = (self.rng.below(5_000_001) as i64 - 2_500_000) * beyond;
                self.nodes[node].clock.set_drift(now, drift);
                self.set_guard_timer(node);
                self.plan_turn(node);
            }
            Fault::SlowDisk => {
                let least = self.rng.duration(Duration::from_millis(5)..Duration::from_millis(500));
                self.nodes[node].drive.slow_down(Some(least..least * 3));
                self.after(lasts, Event::EndFault(Ending::DiskSpeed { node }));
            }
            Fault::SyncError => {
                self.nodes[node].drive.sync_fails = true;
                self.after(lasts, Event::EndFault(Ending::DiskWorks { node }));
            }
            Fault::DiskFull => {
                self.nodes[node].drive.write_fails = Some(IoErrorKind::Full);
                self.after(lasts, Event::EndFault(Ending::DiskWorks { node }));
            }
            Fault::BitRot => self.rot(node),
            Fault::ImageTouched => self.plan_touch(node),
            Fault::RollBack => self.force_a_rolled_back_copy(node, peer),
        }
    }

    /// Whether it changes anything now, and leaves a world whose promises still hold.
    fn possible(&self, fault: Fault, node: usize) -> bool {
        let state = &self.nodes[node];
        match fault {
            Fault::DaemonCrash => state.daemon.is_some(),
            Fault::DaemonFrozen => state.daemon.as_ref().is_some_and(|daemon| !daemon.frozen),
            Fault::NodeFrozen => state.powered && !state.frozen,
            Fault::PowerLoss | Fault::PowerLossOfAll => state.powered,
            Fault::QemuKilled | Fault::GuardFrozen => state.machine.is_some(),
            // Without a tombstone the old register could be restored by those who know it, and be believed.
            Fault::WitnessAmnesia => {
                self.witness.up && !self.witness.knows_nothing() && !self.operator.is_forcing()
            }
            Fault::BitRot => self.rot_is_survivable(node),
            Fault::ImageTouched => self.rot_is_survivable(node) && self.serving_node() != Some(node),
            Fault::RollBack => self.may_force(node, (node + 1) % self.nodes.len()),
            _ => true,
        }
    }

    fn cut_both(&mut self, a: usize, b: usize, lasts: Duration) {
        for (from, to) in [(a, b), (b, a)] {
            self.network.cut(from, to);
            self.after(lasts, Event::EndFault(Ending::Heal { from, to }));
        }
    }

    pub(crate) fn end_fault(&mut self, ending: Ending) {
        self.tell(|| format!("ENDS   {ending:?}"));
        match ending {
            Ending::ThawDaemon { node, life } => {
                let same = self.nodes[node].daemon.as_ref().is_some_and(|daemon| daemon.life == life);
                if same && !self.nodes[node].frozen {
                    self.freeze_daemon(node, false);
                }
            }
            Ending::ThawGuard { node } => self.freeze_guard(node, false),
            Ending::ThawNode { node } => self.thaw_node(node),
            Ending::Heal { from, to } => self.heal_direction(from, to),
            Ending::Flap { a, b, times } => {
                if self.healed || self.a_copy_is_rotten() {
                    return;
                }
                let cut = self.network.is_cut(a, b);
                for (from, to) in [(a, b), (b, a)] {
                    if cut { self.heal_direction(from, to) } else { self.network.cut(from, to) }
                }
                if times > 0 || !cut {
                    let pause = self.rng.duration(Duration::from_millis(100)..Duration::from_millis(1500));
                    let times = times.saturating_sub(1);
                    self.after(pause, Event::EndFault(Ending::Flap { a, b, times }));
                }
            }
            Ending::LinkSpeed { from, to } => {
                self.network.set_delay(from, to, Duration::from_micros(50)..Duration::from_micros(300));
            }
            Ending::WitnessPath { node } => self.nodes[node].witness = crate::wire::WitnessPath::default(),
            Ending::WitnessUp => {
                self.witness.up = true;
                self.witness.refuses = false;
                if self.options.planted == Some(Planted::RegisterForgets) {
                    self.witness.forget_last();
                }
            }
            Ending::DiskSpeed { node } => self.nodes[node].drive.slow_down(None),
            Ending::DiskWorks { node } => {
                self.nodes[node].drive.heal();
                // What failed stays failed for that process: somebody starts it anew.
                self.restart_if_failed(node);
            }
        }
    }

    pub(crate) fn thaw_node(&mut self, node: usize) {
        if !std::mem::replace(&mut self.nodes[node].frozen, false) {
            return;
        }
        // Its machine goes on until its guard, which goes on as well, has looked at the clock.
        self.nodes[node].excused_until = self.now() + Duration::from_secs(1);
        self.set_guard_timer(node);
        self.after(Duration::from_millis(1001), Event::Look);
        if let Some(daemon) = &self.nodes[node].daemon {
            // A process that is continued waits for its turn on a processor, as its machine does.
            let life = daemon.life;
            let delay = self.rng.duration(Duration::ZERO..Duration::from_millis(50));
            self.after(delay, Event::EndFault(Ending::ThawDaemon { node, life }));
        }
        self.wake_guest(node);
    }

    /// Replicas hear each other as on the first day, and their disks work.
    pub(crate) fn mend_all_links_and_drives(&mut self) {
        for node in 0..self.nodes.len() {
            for other in (0..self.nodes.len()).filter(|&other| other != node) {
                self.heal_direction(node, other);
                self.network.set_delay(node, other, Duration::from_micros(50)..Duration::from_micros(300));
            }
            self.nodes[node].drive.heal();
        }
    }

    /// Everything that was broken works again, and nothing breaks any more.
    pub(crate) fn heal_everything(&mut self) {
        self.tell(|| "everything is healed".to_owned());
        self.faults.weights.fill(0);
        self.healed = true;
        self.witness.up = true;
        self.mend_all_links_and_drives();
        for node in 0..self.nodes.len() {
            self.nodes[node].witness = crate::wire::WitnessPath::default();
            self.freeze_guard(node, false);
            self.thaw_node(node);
            if self.nodes[node].daemon.as_ref().is_some_and(|daemon| daemon.frozen) {
                self.freeze_daemon(node, false);
            }
            self.power_on(node);
            self.restart_if_failed(node);
            let boot = self.nodes[node].boots;
            self.after(Duration::from_millis(100), Event::StartDaemon { node, boot });
        }
    }
}

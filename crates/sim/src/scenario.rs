//! The failure table, row by row, in virtual time: what a fault does to the machine, and how long it takes.
//!
//! Each story starts from a mirrored pair whose guest works, plays one fault, and measures. It is told with several
//! seeds, and the longest time counts.

use crate::agenda::Moment;
use crate::campaign::run_caught;
use crate::faults::{Fault, FaultPlan};
use crate::guest::Workload;
use crate::setup::Setup;
use crate::violation::{Promise, Violation};
use crate::world::{Options, World};
use rempart_engine::Role;
use rempart_types::SECTOR_SIZE;
use std::fmt;
use std::time::Duration;

/// One measured promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measure {
    pub what: &'static str,
    pub took: Duration,
    pub bound: Duration,
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |duration: Duration| format!("{:.3} s", duration.as_secs_f64());
        write!(f, "{:<46} {:>10} of {:>9}", self.what, seconds(self.took), seconds(self.bound))
    }
}

/// A row of the failure table.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    pub name: &'static str,
    story: fn(&mut Stage) -> Result<(), Violation>,
}

/// A world in which a story is told.
#[derive(Debug)]
pub struct Stage {
    pub world: World,
    pub measures: Vec<Measure>,
}

impl Scenario {
    /// Tells the story once.
    pub fn tell(&self, seed: u64, options: Options) -> (Stage, Result<(), Violation>) {
        let mut setup = Setup::plain();
        let sectors = setup.disks.iter().map(|size| size / SECTOR_SIZE).collect();
        setup.workload = Some(Workload::steady(sectors));
        let mut world = World::with_setup(seed, setup, options);
        world.faults = FaultPlan::none();
        let mut stage = Stage { world, measures: Vec::new() };
        let result = run_caught(&mut stage, |stage| {
            stage.mirrored()?;
            (self.story)(stage)
        });
        (stage, result)
    }

    /// Tells it with several seeds; the longest times, or the first failure.
    pub fn measure(&self, seeds: u64) -> Result<Vec<Measure>, (u64, Violation)> {
        let mut longest: Vec<Measure> = Vec::new();
        for seed in 0..seeds {
            let (stage, result) = self.tell(seed, Options::default());
            result.map_err(|violation| (seed, violation))?;
            for (index, measure) in stage.measures.into_iter().enumerate() {
                match longest.get_mut(index) {
                    Some(known) => known.took = known.took.max(measure.took),
                    None => longest.push(measure),
                }
            }
        }
        Ok(longest)
    }
}

const S: fn(u64) -> Duration = Duration::from_secs;

/// Every row, in the order of the table.
pub const SCENARIOS: [Scenario; 21] = [
    Scenario { name: "node dies silently", story: node_dies_silently },
    Scenario { name: "node dies, connections reset", story: node_dies_with_resets },
    Scenario { name: "QEMU killed", story: qemu_killed },
    Scenario { name: "daemon killed, back in time", story: daemon_killed_and_back },
    Scenario { name: "daemon killed, not back", story: daemon_killed_for_good },
    Scenario { name: "peer loses power", story: peer_dies },
    Scenario { name: "peer's link cut", story: peer_cut },
    Scenario { name: "peer frozen", story: peer_frozen },
    Scenario { name: "peer black-holed towards it", story: peer_deaf },
    Scenario { name: "peer black-holed from it", story: peer_mute },
    Scenario { name: "primary cut off from peer and witness", story: primary_isolated },
    Scenario { name: "primary's machine frozen and continued", story: primary_frozen },
    Scenario { name: "witness lost, both nodes up", story: witness_lost },
    Scenario { name: "witness lost while solo", story: witness_lost_solo },
    Scenario { name: "witness and peer lost", story: witness_and_peer_lost },
    Scenario { name: "link flapping for a minute", story: link_flaps },
    Scenario { name: "fsync error on the secondary", story: disk_fails_on_secondary },
    Scenario { name: "fsync error on the primary", story: disk_fails_on_primary },
    Scenario { name: "primary dies during a resync", story: primary_dies_during_resync },
    Scenario { name: "both nodes lose power", story: both_lose_power },
    Scenario { name: "node back after its journal was trimmed", story: back_after_long },
];

impl Stage {
    fn now(&self) -> Moment {
        self.world.now()
    }

    fn wait(&mut self, duration: Duration) -> Result<(), Violation> {
        let until = self.now() + duration;
        self.world.run_until(until)
    }

    /// Waits until `condition` holds, at most so long.
    fn until(
        &mut self,
        what: &'static str,
        at_most: Duration,
        condition: impl Fn(&World) -> bool,
    ) -> Result<Duration, Violation> {
        let begin = self.now();
        self.world.run_while(begin + at_most, |world| !condition(world))?;
        if condition(&self.world) {
            return Ok(self.now().since(begin));
        }
        let detail = format!("{what}: not within {at_most:?}: {}", self.world.summary());
        Err(Violation::new(Promise::BoundedStall, detail))
    }

    fn mirrored(&mut self) -> Result<(), Violation> {
        self.until("mirrored at first", S(60), World::is_mirrored)?;
        self.wait(Duration::from_millis(1500))?;
        self.world.longest_stall = Duration::ZERO;
        Ok(())
    }

    fn leader(&self) -> usize {
        self.world.serving_node().expect("a mirrored pair is served by one node")
    }

    fn measure(&mut self, what: &'static str, took: Duration, bound: Duration) -> Result<(), Violation> {
        self.measures.push(Measure { what, took, bound });
        if took <= bound {
            return Ok(());
        }
        let detail = format!("{what}: {:.3} s, promised {:.3} s", took.as_secs_f64(), bound.as_secs_f64());
        Err(Violation::new(Promise::BoundedStall, detail))
    }

    /// How long after `begin` the thing was last reached.
    fn since(&self, begin: Moment, what: &str) -> Result<Duration, Violation> {
        match self.world.when(what).filter(|&at| at >= begin) {
            Some(at) => Ok(at.since(begin)),
            None => Err(Violation::new(Promise::BoundedStall, format!("`{what}` did not happen"))),
        }
    }

    /// The peer takes over and serves: measures suspicion, start, and service.
    fn taken_over(&mut self, begin: Moment, lost: usize, bounds: [Duration; 2]) -> Result<(), Violation> {
        self.until("taken over", S(30), |world| {
            // The lost one may still think that it leads.
            let mut others = (0..world.node_count()).filter(|&node| node != lost);
            others.any(|node| world.role(node) == Some(Role::Primary) && world.machine_runs(node))
        })?;
        let suspected = self.since(begin, "primary suspected")?;
        let booted = self.since(begin, "VM booted")?;
        self.measure("suspected", suspected, bounds[0])?;
        self.measure("VM process started on the peer", booted, bounds[1])
    }

    /// Everything is healed, and the pair mirrors again.
    fn healed(&mut self) -> Result<(), Violation> {
        self.world.heal_everything();
        self.world.converge()
    }

    /// The machine goes on where it is; no request of it waited longer than `bound`.
    fn goes_on(&mut self, leader: usize, bound: Duration) -> Result<(), Violation> {
        let served = self.world.requests_answered();
        self.wait(S(8))?;
        if self.world.serving_node() != Some(leader) || !self.world.machine_runs(leader) {
            let detail = format!("the machine did not go on at node {leader}: {}", self.world.summary());
            return Err(Violation::new(Promise::BoundedStall, detail));
        }
        if self.world.requests_answered() < served + 10 {
            let detail = format!("hardly a request is answered: {}", self.world.summary());
            return Err(Violation::new(Promise::BoundedStall, detail));
        }
        let stall = self.world.longest_stall.max(self.world.oldest_request());
        self.measure("longest stall of a request", stall, bound)
    }
}

fn node_dies_silently(stage: &mut Stage) -> Result<(), Violation> {
    let (lost, begin) = (stage.leader(), stage.now());
    stage.world.play_for(Fault::PowerLoss, lost, S(3600));
    stage.taken_over(begin, lost, [S(3), S(8)])?;
    stage.healed()
}

fn node_dies_with_resets(stage: &mut Stage) -> Result<(), Violation> {
    let (lost, begin) = (stage.leader(), stage.now());
    stage.world.kill_machine(lost);
    stage.world.play_for(Fault::DaemonCrash, lost, S(3600));
    stage.taken_over(begin, lost, [S(3), S(8)])?;
    stage.healed()
}

fn qemu_killed(stage: &mut Stage) -> Result<(), Violation> {
    let (leader, begin) = (stage.leader(), stage.now());
    stage.world.kill_machine(leader);
    stage.until("VM restarted where it was", S(10), |world| world.machine_runs(leader))?;
    let booted = stage.since(begin, "VM booted")?;
    stage.measure("VM process started again", booted, S(2))?;
    stage.healed()
}

fn daemon_killed_and_back(stage: &mut Stage) -> Result<(), Violation> {
    let leader = stage.leader();
    let nonce = stage.world.machine_nonce(leader);
    stage.world.play_for(Fault::DaemonCrash, leader, Duration::from_millis(400));
    stage.goes_on(leader, S(3))?;
    if stage.world.machine_nonce(leader) != nonce {
        return Err(Violation::new(Promise::BoundedStall, "the VM was restarted, not adopted"));
    }
    stage.healed()
}

fn daemon_killed_for_good(stage: &mut Stage) -> Result<(), Violation> {
    let (lost, begin) = (stage.leader(), stage.now());
    stage.world.play_for(Fault::DaemonCrash, lost, S(3600));
    stage.taken_over(begin, lost, [S(3), S(8)])?;
    stage.since(begin, "guard stopped the VM")?;
    stage.healed()
}

fn peer_fails(stage: &mut Stage, fault: Fault, whose: impl Fn(usize) -> usize) -> Result<(), Violation> {
    let leader = stage.leader();
    stage.world.play_for(fault, whose(leader), S(3600));
    stage.goes_on(leader, S(3))?;
    stage.healed()
}

fn peer_dies(stage: &mut Stage) -> Result<(), Violation> {
    peer_fails(stage, Fault::PowerLoss, |leader| 1 - leader)
}

fn peer_cut(stage: &mut Stage) -> Result<(), Violation> {
    peer_fails(stage, Fault::Partition, |leader| leader)
}

fn peer_frozen(stage: &mut Stage) -> Result<(), Violation> {
    peer_fails(stage, Fault::NodeFrozen, |leader| 1 - leader)
}

fn peer_deaf(stage: &mut Stage) -> Result<(), Violation> {
    peer_fails(stage, Fault::OneWay, |leader| leader)
}

fn peer_mute(stage: &mut Stage) -> Result<(), Violation> {
    peer_fails(stage, Fault::OneWay, |leader| 1 - leader)
}

fn primary_isolated(stage: &mut Stage) -> Result<(), Violation> {
    let (lost, begin) = (stage.leader(), stage.now());
    stage.world.play_for(Fault::IsolatedNode, lost, S(3600));
    stage.taken_over(begin, lost, [S(3), S(10)])?;
    stage.wait(S(5))?;
    stage.healed()
}

fn primary_frozen(stage: &mut Stage) -> Result<(), Violation> {
    let (lost, begin) = (stage.leader(), stage.now());
    stage.world.play_for(Fault::NodeFrozen, lost, S(3600));
    stage.taken_over(begin, lost, [S(3), S(10)])?;
    stage.world.thaw_node(lost);
    stage.wait(S(5))?;
    let overlap = stage.world.longest_excused_overlap();
    stage.measure("two VMs after it was continued", overlap, S(1))?;
    stage.healed()
}

fn witness_lost(stage: &mut Stage) -> Result<(), Violation> {
    let leader = stage.leader();
    stage.world.play_for(Fault::WitnessDown, 0, S(3600));
    stage.goes_on(leader, Duration::from_millis(100))?;
    stage.healed()
}

fn witness_lost_solo(stage: &mut Stage) -> Result<(), Violation> {
    let leader = stage.leader();
    stage.world.play_for(Fault::PowerLoss, 1 - leader, S(3600));
    stage.goes_on(leader, S(3))?;
    stage.world.play_for(Fault::WitnessDown, 0, S(3600));
    stage.world.longest_stall = Duration::ZERO;
    stage.goes_on(leader, Duration::from_millis(100))?;
    stage.healed()
}

fn witness_and_peer_lost(stage: &mut Stage) -> Result<(), Violation> {
    let leader = stage.leader();
    stage.world.play_for(Fault::WitnessDown, 0, S(3600));
    stage.world.play_for(Fault::Partition, leader, S(3600));
    stage.wait(S(8))?;
    let answered = stage.world.requests_answered();
    stage.wait(S(5))?;
    if stage.world.requests_answered() > answered + 200 {
        return Err(Violation::new(Promise::BoundedStall, "it is not frozen"));
    }
    stage.since(Moment::START, "frozen: register out of reach")?;
    let begin = stage.now();
    stage.world.end_fault(crate::faults::Ending::WitnessUp);
    stage.until("one serves again", S(30), |world| {
        world.serving_node().is_some_and(|node| world.machine_runs(node))
    })?;
    let took = stage.now().since(begin);
    stage.measure("serves again after the witness is back", took, S(12))?;
    stage.healed()
}

fn link_flaps(stage: &mut Stage) -> Result<(), Violation> {
    let leader = stage.leader();
    let begin = stage.now();
    let mut stalled = Duration::ZERO;
    for second in 0..60 {
        for (from, to) in [(leader, 1 - leader), (1 - leader, leader)] {
            if second % 2 == 0 { stage.world.cut(from, to) } else { stage.world.heal_direction(from, to) }
        }
        for _ in 0..100 {
            stage.wait(Duration::from_millis(10))?;
            if stage.world.oldest_request() > Duration::from_millis(200) {
                stalled += Duration::from_millis(10);
            }
        }
    }
    let all = stage.now().since(begin);
    stage.measure("out of service in a minute of flapping", stalled, all / 2)?;
    stage.healed()
}

fn disk_fails_on_secondary(stage: &mut Stage) -> Result<(), Violation> {
    peer_fails(stage, Fault::SyncError, |leader| 1 - leader)
}

fn disk_fails_on_primary(stage: &mut Stage) -> Result<(), Violation> {
    let (lost, begin) = (stage.leader(), stage.now());
    stage.world.play_for(Fault::SyncError, lost, S(3600));
    stage.until("the good copy takes over", S(30), |world| {
        world.serving_node().is_some_and(|node| node != lost && world.machine_runs(node))
    })?;
    let booted = stage.since(begin, "VM booted")?;
    stage.measure("VM process started on the good copy", booted, S(10))?;
    stage.healed()
}

fn primary_dies_during_resync(stage: &mut Stage) -> Result<(), Violation> {
    let leader = stage.leader();
    let peer = 1 - leader;
    stage.world.power_off(peer);
    stage.world.replace_disk(peer);
    stage.goes_on(leader, S(3))?;
    stage.world.limit_resync(leader, 20_000);
    stage.wait(Duration::from_millis(100))?;
    stage.world.power_on(peer);
    let resyncs = |world: &World| {
        world.when("resync of changed extents").max(world.when("resync by comparison")).is_some()
    };
    stage.until("a resync started", S(30), resyncs)?;
    stage.wait(S(1))?;
    stage.world.power_off(leader);
    stage.wait(S(20))?;
    if stage.world.serving_node().is_some() {
        return Err(Violation::new(Promise::OnePrimary, "an unfinished copy was promoted"));
    }
    stage.healed()
}

fn both_lose_power(stage: &mut Stage) -> Result<(), Violation> {
    stage.world.play_for(Fault::PowerLossOfAll, 0, S(2));
    stage.wait(S(5))?;
    let begin = stage.now();
    let back = |world: &World| world.serving_node().is_some_and(|node| world.machine_runs(node));
    stage.until("it comes back by itself", S(30), back)?;
    let took = stage.now().since(begin);
    stage.measure("VM process runs after power returned", took, S(15))?;
    stage.healed()
}

fn back_after_long(stage: &mut Stage) -> Result<(), Violation> {
    let leader = stage.leader();
    stage.world.play_for(Fault::PowerLoss, 1 - leader, S(3600));
    stage.wait(S(60))?;
    stage.healed()?;
    if stage.world.when("resync of changed extents").is_none() {
        return Err(Violation::new(Promise::Converges, "the journal still reached back"));
    }
    Ok(())
}

//! One performance: the stage with everything running, what scenarios wait for, and what they find out.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use super::Fault;
use super::rack::{Rack, Stage, VM};
use super::story::{Amount, Check, Figure, Report, Story, bytes_shown};
use crate::guest::{self, Settings};
use crate::interrupt;
use crate::lab::{Host, Lab, Link, Side};
use crate::observer::{Boot, Observer};
use crate::setup::Kernel;
use crate::verify::Copy;

/// End-to-end runs assert this many times a bound; the bound itself is shown in virtual time.
pub const LENIENCE: u32 = 3;
/// A guest's boot on a busy machine without KVM.
const BOOT: Duration = Duration::from_secs(90);
const RESYNC: Duration = Duration::from_secs(120);
const QEMU: &str = "qemu-system";
/// What a node says when it misses its primary.
const SUSPICION: &str = "has not been heard for too long";
/// A few records: the stage works.
const SOME_RECORDS: u64 = 100;

#[derive(Debug)]
pub struct Play<'a> {
    pub observer: Observer,
    pub rack: Rack,
    story: &'a Story,
    stage: Stage,
    /// Of what the guest writes at random.
    pub seed: u64,
    checks: Vec<Check>,
    figures: Vec<Figure>,
}

/// The moment before a fault.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    pub at: Instant,
    unix_ms: u64,
    pub boots: usize,
    pub acknowledged: u64,
}

impl<'a> Play<'a> {
    /// Two servers, a witness and an observer; nothing runs yet.
    pub fn new(
        stage: Stage,
        program: &Path,
        story: &'a Story,
        seed: Option<u64>,
        keep: bool,
    ) -> Result<Play<'a>> {
        let lab = Lab::build(keep)?;
        let observer = Observer::start(&lab)?;
        let rack = Rack::new(lab, program, stage)?;
        let seed = seed.unwrap_or_else(|| unix_ms() % 1_000_000);
        Ok(Play { observer, rack, story, stage, seed, checks: Vec::new(), figures: Vec::new() })
    }

    /// Sets the stage: a cluster, and a mirrored machine that runs on node A.
    pub fn set_stage(&mut self, kernel: &Kernel) -> Result<()> {
        let disks = guest::make_disks(kernel, Settings::default(), self.rack.lab.folder())?;
        if self.stage.scattered {
            guest::scatter(&disks.data, self.seed)?;
            self.tell(&format!("the guest will write at random, by seed {}", self.seed));
        }
        self.rack.form_cluster(self.stage.settings)?;
        self.tell("node-a, node-b and a witness form a cluster, each in a network of its own");
        self.rack.import(Side::A, &disks)?;
        self.tell(&format!("`{VM}` is brought in from a bootable disk image and a data disk"));
        self.rack.user(Host::A, &["vm", "start", VM])?;
        self.observer.wait("the guest's first record", BOOT, |notes| {
            (notes.newest_acknowledged() > 0).then_some(())
        })?;
        self.tell("the guest runs on node-a and writes numbered records to both disks");
        self.rack.user(Host::A, &["protect", VM, "--peer", Host::B.name(), "--wait"])?;
        self.wait_mirrored(Side::A)?;
        self.tell("every write is now on both nodes before the guest hears of it");
        Ok(())
    }

    /// Begins a scenario: the machine runs, mirrored, and nothing is left of the scenario before.
    pub fn ready(&mut self) -> Result<()> {
        self.checks.clear();
        self.figures.clear();
        let primary = self.primary()?;
        self.wait_mirrored(primary)?;
        self.observer.wait_for_records(SOME_RECORDS, Duration::from_secs(30)).map(drop)
    }

    pub fn tell(&self, text: &str) {
        self.story.tell(text);
    }

    /// The side where the machine runs.
    pub fn primary(&self) -> Result<Side> {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            for side in Side::ALL {
                if self.rack.vm(side).is_some_and(|vm| vm.is_primary() && vm.is_running()) {
                    return Ok(side);
                }
            }
            interrupt::check()?;
            if Instant::now() > end {
                let seen = Side::ALL.map(|side| self.rack.vm(side).map(|vm| vm.brief()));
                bail!("no node runs the machine as its primary: {seen:?}");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// The side whose disk can be made to fail.
    pub fn fragile_side(&self) -> Side {
        self.stage.fragile.expect("the stage has a fragile disk")
    }

    /// Where it runs, and the other side.
    pub fn sides(&self) -> Result<(Side, Side)> {
        self.primary().map(|side| (side, side.other()))
    }

    pub fn mark(&self) -> Mark {
        let notes = self.observer.notes();
        Mark {
            at: Instant::now(),
            unix_ms: unix_ms(),
            boots: notes.boots.len(),
            acknowledged: notes.newest_acknowledged(),
        }
    }

    // ── promises ──

    pub fn check(&mut self, promise: &str, held: bool, detail: impl Into<String>) {
        let check = Check { promise: promise.to_owned(), held, detail: detail.into() };
        if !held {
            self.story.tell(&format!("BROKEN: {promise}: {}", check.detail));
        }
        self.checks.push(check);
    }

    /// Checks that something took no longer than its bound, leniently.
    pub fn within(&mut self, promise: &str, took: Duration, bound: Duration) {
        let detail = format!(
            "{:.2} s, bound {:.1} s ({:.1} s here)",
            took.as_secs_f64(),
            bound.as_secs_f64(),
            (bound * LENIENCE).as_secs_f64()
        );
        self.check(promise, took <= bound * LENIENCE, detail);
    }

    /// Notes a number for the final table; of several with one name the first stands, which is the fault's own.
    pub fn figure(&mut self, name: &'static str, value: Amount) {
        if self.figures.iter().all(|figure| figure.name != name) {
            self.figures.push(Figure { name, value });
        }
    }

    /// The machine moves to `to`: suspicion, process, first record, nothing lost, never two.
    pub fn expect_takeover(&mut self, mark: Mark, to: Side, started_bound: Duration) -> Result<Boot> {
        let started = self.wait_for_qemu(to, started_bound * LENIENCE)?;
        let took = started.saturating_duration_since(mark.at);
        self.tell(&format!("{} starts the machine after {:.2} s", to.host(), took.as_secs_f64()));
        self.within("the VM process starts on the peer", took, started_bound);
        self.figure("VM process started", Amount::Time(took));
        let boot = self.expect_boot(mark)?;
        if let Some(suspected) = self.suspicion(mark, to) {
            self.within("the dead node is suspected", suspected, Duration::from_secs(3));
            self.figure("node suspected", Amount::Time(suspected));
        }
        Ok(boot)
    }

    /// The machine boots (somewhere), finds every acknowledged record, and writes on.
    pub fn expect_boot(&mut self, mark: Mark) -> Result<Boot> {
        let boot = self.observer.wait("the machine's first record after its restart", BOOT, |notes| {
            let boot = notes.boots.get(mark.boots)?;
            (boot.found.is_some() && boot.first_acknowledged.is_some()).then(|| boot.clone())
        })?;
        let (sequence, at) = boot.first_acknowledged.expect("waited for");
        let took = at.saturating_duration_since(mark.at);
        self.tell(&format!("first new durable record, {sequence}, after {:.2} s", took.as_secs_f64()));
        self.figure("first new durable record", Amount::Time(took));
        let silence = self.observer.notes().longest_silence_since(mark.at);
        self.figure("network silence", Amount::Time(silence));
        let (first, second) = boot.found.expect("waited for");
        let lost = boot.acknowledged_before.saturating_sub(second);
        self.figure("records lost", Amount::Count(lost));
        self.check(
            "no acknowledged record is lost",
            lost == 0,
            format!(
                "{} acknowledged before; {first} on disk 1, {second} on disk 2",
                boot.acknowledged_before
            ),
        );
        self.check_one_copy();
        self.check_guest_content();
        Ok(boot)
    }

    /// The machine is not restarted; it waits at most once, and not for long.
    pub fn expect_no_restart(&mut self, mark: Mark, stall_bound: Duration) -> Result<()> {
        self.observer.wait_for_records(SOME_RECORDS, stall_bound * LENIENCE + Duration::from_secs(20))?;
        let notes = self.observer.notes();
        let stall = notes.longest_gap_since(mark.at);
        self.tell(&format!("the guest went on; its longest wait was {:.2} s", stall.as_secs_f64()));
        self.within("the guest's longest wait", stall, stall_bound);
        self.figure("longest wait of the guest", Amount::Time(stall));
        self.check(
            "the machine keeps running",
            notes.boots.len() == mark.boots,
            format!("{} restarts", notes.boots.len() - mark.boots),
        );
        self.check_one_copy();
        self.check_guest_content();
        Ok(())
    }

    fn check_one_copy(&mut self) {
        let overlap = self.observer.notes().overlap();
        let detail = overlap.map_or("one boot nonce at any time, from either side".to_owned(), |overlap| {
            format!("two nonces answered for {:.2} s", overlap.as_secs_f64())
        });
        self.check("never two running copies", overlap.is_none(), detail);
    }

    pub fn check_guest_content(&mut self) {
        let broken: Vec<_> =
            self.observer.notes().boots.iter().flat_map(|boot| boot.broken.clone()).collect();
        let detail = if broken.is_empty() { "none seen".to_owned() } else { broken.join("; ") };
        self.check("no disk error and no contradiction in the guest", broken.is_empty(), detail);
    }

    // ── waiting ──

    /// Returns when a QEMU process runs on a side.
    pub fn wait_for_qemu(&self, side: Side, deadline: Duration) -> Result<Instant> {
        let end = Instant::now() + deadline;
        while self.rack.lab.host(side.host()).running(QEMU).is_empty() {
            interrupt::check()?;
            if Instant::now() > end {
                bail!("no VM process on {} within {:.0} s", side.host(), deadline.as_secs_f64());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(Instant::now())
    }

    /// Returns when no QEMU process runs on a side.
    pub fn wait_for_no_qemu(&self, side: Side, deadline: Duration) -> Result<Instant> {
        let end = Instant::now() + deadline;
        while !self.rack.lab.host(side.host()).running(QEMU).is_empty() {
            interrupt::check()?;
            if Instant::now() > end {
                bail!("the VM process on {} still runs after {:.0} s", side.host(), deadline.as_secs_f64());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(Instant::now())
    }

    /// The VM processes of a side.
    pub fn qemus(&self, side: Side) -> Vec<i32> {
        self.rack.lab.host(side.host()).running(QEMU)
    }

    /// Watches for a while that nothing changes: `wrong` names what did.
    pub fn watch(
        &self,
        time: Duration,
        mut wrong: impl FnMut(&Play) -> Option<String>,
    ) -> Result<Option<String>> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            interrupt::check()?;
            if let Some(what) = wrong(self) {
                return Ok(Some(what));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(None)
    }

    fn wait_mirrored(&self, primary: Side) -> Result<()> {
        self.rack.wait_vm(primary, "both copies in sync", RESYNC, |vm| {
            (vm.is_mirrored() && vm.in_sync().len() == 2).then_some(())
        })
    }

    /// The lost copy catches up while the machine runs.
    pub fn expect_mirrored_again(&mut self, primary: Side, away_since: Mark) -> Result<()> {
        let mark = self.mark();
        self.wait_mirrored(primary).context("after the fault was mended")?;
        let took = mark.at.elapsed();
        let resync = self.rack.vm(primary).and_then(|vm| {
            let said = vm.said();
            let lately =
                |(at, text): &(u64, String)| *at >= away_since.unix_ms && text.contains("is resynchronised");
            said.iter().any(lately).then(|| vm.resync()).flatten()
        });
        if let Some(resync) = resync {
            self.tell(&format!(
                "mirrored again after {:.1} s: {} sent, {} changed, {} in all",
                took.as_secs_f64(),
                bytes_shown(resync.bytes_sent),
                bytes_shown(resync.bytes_changed),
                bytes_shown(resync.bytes_total)
            ));
            self.figure("bytes resynchronised", Amount::Bytes(resync.bytes_sent));
            self.figure("bytes changed", Amount::Bytes(resync.bytes_changed));
        } else {
            let records =
                self.rack.vm(primary).and_then(|vm| vm.log_sent_since(away_since.unix_ms)).unwrap_or(0);
            self.tell(&format!(
                "mirrored again after {:.1} s, from the log alone: {records} records of it",
                took.as_secs_f64()
            ));
            self.figure("log records sent again", Amount::Count(records));
        }
        let restarts = self.observer.notes().boots.len() - mark.boots;
        let records = self.observer.notes().newest_acknowledged() - away_since.acknowledged;
        self.check(
            "the copy catches up while the machine runs",
            restarts == 0,
            format!("{restarts} restarts, {records} records written since the fault"),
        );
        self.observer.wait_for_records(SOME_RECORDS, Duration::from_secs(30)).map(drop)
    }

    /// When `by` first said that it suspects its peer.
    fn suspicion(&self, mark: Mark, by: Side) -> Option<Duration> {
        let said = self.rack.vm(by)?.said();
        let times = said.iter().filter(|(at, text)| *at >= mark.unix_ms && text.contains(SUSPICION));
        let first = times.map(|(at, _)| *at).min()?;
        Some(Duration::from_millis(first - mark.unix_ms))
    }

    /// Everything that scenarios break works again, and both nodes and the witness run.
    pub fn mend_network(&self) -> Result<()> {
        self.rack.lab.swallow_nothing()?;
        Link::ALL.into_iter().try_for_each(|link| self.rack.lab.restore(link))
    }

    // ── the end ──

    /// Stops the machine and the daemons and holds both copies' images against what was acknowledged.
    pub fn examine_both_copies(&mut self) -> Result<()> {
        let (primary, peer) = self.sides()?;
        self.wait_mirrored(primary)?;
        let compared = self.rack.try_user(primary.host(), &["compare", VM])?;
        let detail =
            compared.as_ref().map_or_else(|refusal| refusal.said.clone(), |_| "while it runs".to_owned());
        self.check("both copies are equal, says `rempart compare`", compared.is_ok(), detail.trim());
        self.rack.user(primary.host(), &["vm", "stop", VM])?;
        self.wait_for_no_qemu(primary, Duration::from_secs(30))?;
        self.tell("the machine is shut down; the daemons stop, the images are read");
        // Before the images: what is acknowledged must be in them, not the other way round.
        let acknowledged = self.observer.notes().newest_acknowledged();
        self.rack.stop_daemon(peer.host())?;
        self.rack.stop_daemon(primary.host())?;
        let copies = [primary, peer].map(|side| Copy::find(&self.rack.data_folder(side).join("vms")));
        let [one, other] = copies;
        let copies = [one?, other?];
        let mut written = acknowledged;
        for (copy, side) in copies.iter().zip([primary, peer]) {
            let verdict = copy.verify(acknowledged)?;
            written = written.max(verdict.newest[0]);
            let detail = if verdict.is_good() {
                format!("records 1 to {acknowledged} on both disks")
            } else {
                format!("lost {:?}, contradictions {:?}", verdict.lost, verdict.contradictions)
            };
            self.check(
                &format!("{} holds every acknowledged record", side.host()),
                verdict.is_good(),
                detail,
            );
        }
        let difference = copies[0].first_difference(&copies[1])?;
        let detail =
            difference.map_or("byte for byte".to_owned(), |(disk, at)| format!("disk {disk}, byte {at}"));
        self.check("the images at rest are equal", difference.is_none(), detail);
        self.figure("records written", Amount::Count(written));
        Ok(())
    }

    /// What came of the scenario.
    pub fn report(&mut self, fault: Fault, result: Result<()>) -> Report {
        let notes = self.observer.notes();
        self.figure("records acknowledged", Amount::Count(notes.newest_acknowledged()));
        let stall = notes.boots.iter().map(|boot| boot.longest_stall).max().unwrap_or_default();
        self.figure("longest guest stall", Amount::Time(stall));
        Report {
            fault,
            figures: std::mem::take(&mut self.figures),
            checks: std::mem::take(&mut self.checks),
            error: result.err().map(|error| format!("{error:#}")),
        }
    }

    pub fn tail_of_logs(&self) -> String {
        Host::ALL.map(|host| self.rack.tail_of_log(host)).join("\n")
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

//! A node, its daemon or its QEMU dies.

use std::time::Duration;

use anyhow::Result;

use crate::demo::play::{LENIENCE, Mark, Play};
use crate::demo::rack::VM;
use crate::demo::story::Amount;
use crate::lab::{Host, Side};

const TAKEOVER: Duration = Duration::from_secs(8);
const LEASE: Duration = Duration::from_secs(3);
/// Lease, and the guard's time to stop the machine.
const LEASE_AND_STOP: Duration = Duration::from_secs(4);
const QEMU_RESTART: Duration = Duration::from_secs(2);
/// More than the configured number of restarts in place.
const MOST_KILLS: u32 = 8;

/// The whole story: loss, takeover, return, failback.
pub fn node_silent(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    play.rack.lab.power_off(primary.host())?;
    play.tell(&format!("{} dies: its links go down, then everything on it is killed", primary.host()));
    play.expect_takeover(mark, peer, TAKEOVER)?;
    returns(play, primary, mark)?;
    fail_back(play, primary)
}

pub fn node_reset(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    play.rack.lab.reset(primary.host())?;
    play.tell(&format!("everything on {} is killed; its peer sees connections close", primary.host()));
    play.expect_takeover(mark, peer, TAKEOVER)?;
    returns(play, primary, mark)
}

fn returns(play: &mut Play, lost: Side, mark: Mark) -> Result<()> {
    play.rack.power_on(lost.host())?;
    play.tell(&format!("{} is back", lost.host()));
    play.expect_mirrored_again(lost.other(), mark)
}

/// A planned handover to `to`: shut down there, boot here.
fn fail_back(play: &mut Play, to: Side) -> Result<()> {
    let mark = play.mark();
    play.tell(&format!("planned failback to {}", to.host()));
    play.rack.user(to.host(), &["failback", VM])?;
    let boot = play.expect_boot(mark)?;
    if let Some((_, at)) = boot.first_acknowledged {
        play.figure("failback, until first record", Amount::Time(at.saturating_duration_since(mark.at)));
    }
    let primary = play.primary()?;
    play.check("failback moves the machine", primary == to, format!("it runs on {}", primary.host()));
    play.expect_mirrored_again(to, mark)
}

/// Restarted where it was; after too many tries it moves.
pub fn qemu_killed(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    kill_qemu(play, primary)?;
    play.tell("QEMU is killed");
    let started = play.wait_for_qemu(primary, QEMU_RESTART * 3)?;
    play.within("the VM process starts again where it was", started - mark.at, QEMU_RESTART);
    play.expect_boot(mark)?;
    let mut kills = 1;
    let before_move = loop {
        let mark = play.mark();
        kill_qemu(play, primary)?;
        kills += 1;
        let moved = |play: &Play| (!play.qemus(peer).is_empty()).then(|| "moved".to_owned());
        let back = |play: &Play| (!play.qemus(primary).is_empty()).then(|| "restarted".to_owned());
        let outcome = play.watch(TAKEOVER * 3, |play| moved(play).or_else(|| back(play)))?;
        match outcome.as_deref() {
            Some("moved") => break Some(mark),
            Some(_) if kills < MOST_KILLS => {}
            _ => break None,
        }
    };
    let detail = format!("QEMU killed {kills} times");
    play.check("after too many tries the machine moves to the peer", before_move.is_some(), detail);
    if let Some(mark) = before_move {
        play.expect_boot(mark)?;
    }
    let primary = play.primary()?;
    play.expect_mirrored_again(primary, mark)
}

pub(super) fn kill_qemu(play: &Play, side: Side) -> Result<()> {
    for id in play.qemus(side) {
        // SAFETY: kill has no memory effects; the id is a process in a namespace of ours.
        unsafe { libc::kill(id, libc::SIGKILL) };
    }
    // Gone, or replaced already.
    let killed = play.qemus(side);
    play.watch(Duration::from_secs(5), |play| {
        (play.qemus(side) != killed || killed.is_empty()).then(String::new)
    })?;
    Ok(())
}

pub fn daemon_killed(play: &mut Play) -> Result<()> {
    let (primary, _) = play.sides()?;
    let mark = play.mark();
    let qemu = play.qemus(primary);
    play.rack.kill_daemon(primary.host())?;
    play.tell("the daemon is killed under the running machine and started again");
    play.rack.start(primary.host())?;
    play.expect_no_restart(mark, LEASE)?;
    let adopted = play.qemus(primary);
    play.check("the new daemon adopts the VM process", adopted == qemu, format!("{qemu:?}, now {adopted:?}"));
    play.expect_mirrored_again(primary, mark)
}

pub fn daemon_killed_stays_dead(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    let stopped_boot = mark.boots - 1;
    play.rack.kill_daemon(primary.host())?;
    play.tell("the daemon is killed and stays dead");
    let taken_over = play.expect_takeover(mark, peer, TAKEOVER);
    let heard = play.observer.notes().boots[stopped_boot].last_seen.saturating_duration_since(mark.at);
    play.within("the guard stops the machine", heard, LEASE_AND_STOP);
    taken_over?;
    play.rack.start(primary.host())?;
    play.wait_for_no_qemu(primary, LEASE_AND_STOP * LENIENCE)?;
    play.tell("a daemon is started again; the VM process that stood still is gone");
    play.expect_mirrored_again(peer, mark)
}

/// The machine comes back by itself, with everything.
pub fn both_lose_power(play: &mut Play) -> Result<()> {
    let mark = play.mark();
    for host in [Host::A, Host::B] {
        play.rack.lab.power_off(host)?;
    }
    play.tell("both nodes lose power; then both are switched on");
    for host in [Host::A, Host::B] {
        play.rack.power_on(host)?;
    }
    play.expect_boot(mark)?;
    let primary = play.primary()?;
    play.expect_mirrored_again(primary, mark)
}

//! The peer, or the way to it, fails: the machine goes on alone.

use std::time::Duration;

use anyhow::Result;

use crate::demo::play::{Mark, Play};
use crate::demo::story::Amount;
use crate::lab::{Link, Side};

const STALL: Duration = Duration::from_secs(3);
const FLAPS: u32 = 30;

pub fn peer_killed(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    play.rack.lab.power_off(peer.host())?;
    play.tell(&format!("{} dies", peer.host()));
    solo(play, primary, mark)?;
    play.rack.power_on(peer.host())?;
    play.tell(&format!("{} is back", peer.host()));
    play.expect_mirrored_again(primary, mark)
}

pub fn peer_link_cut(play: &mut Play) -> Result<()> {
    let (primary, _) = play.sides()?;
    let mark = play.mark();
    play.rack.lab.cut(Link::Peer)?;
    play.tell("the link between the nodes is cut; both still reach the witness");
    solo(play, primary, mark)?;
    play.rack.lab.restore(Link::Peer)?;
    play.expect_mirrored_again(primary, mark)
}

pub fn peer_frozen(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    play.rack.lab.host(peer.host()).signal_all(libc::SIGSTOP);
    play.tell(&format!("everything on {} is stopped; its connections stay open", peer.host()));
    let result = solo(play, primary, mark);
    play.rack.lab.host(peer.host()).signal_all(libc::SIGCONT);
    result?;
    play.expect_mirrored_again(primary, mark)
}

pub fn peer_blackhole(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    for silenced in [peer, primary] {
        let mark = play.mark();
        play.rack.lab.swallow_from(silenced.host(), Link::Peer)?;
        play.tell(&format!("what {} sends to its peer vanishes", silenced.host()));
        solo(play, primary, mark)?;
        play.rack.lab.swallow_nothing()?;
        play.expect_mirrored_again(primary, mark)?;
    }
    Ok(())
}

/// The machine goes on with one copy after one wait.
fn solo(play: &mut Play, primary: Side, mark: Mark) -> Result<()> {
    // The register must agree before the first record after the fault is acknowledged.
    play.rack.wait_vm(primary, "going on alone", STALL * 3, |vm| (vm.in_sync().len() == 1).then_some(()))?;
    play.expect_no_restart(mark, STALL)
}

/// Nothing is lost and the machine serves most of the time.
pub fn link_flapping(play: &mut Play) -> Result<()> {
    let mark = play.mark();
    play.tell("the link between the nodes flaps every second for a minute");
    let second = Duration::from_secs(1);
    let mut served = 0;
    let mut total = 0;
    for _ in 0..FLAPS {
        for up in [false, true] {
            if up {
                play.rack.lab.restore(Link::Peer)?
            } else {
                play.rack.lab.cut(Link::Peer)?
            }
            // In twenty parts: was at least one record acknowledged?
            let mut last = play.observer.notes().newest_acknowledged();
            for _ in 0..20 {
                play.watch(second / 20, |_| None)?;
                let now = play.observer.notes().newest_acknowledged();
                served += u32::from(now > last);
                total += 1;
                last = now;
            }
        }
    }
    let share = 100.0 * f64::from(served) / f64::from(total);
    play.figure("time in service", Amount::Percent(share));
    play.tell(&format!("in service {share:.0} % of the minute"));
    let restarts = play.observer.notes().boots.len() - mark.boots;
    play.check(
        "flapping does not move the machine again and again",
        restarts <= 1,
        format!("{restarts} restarts"),
    );
    play.check_guest_content();
    let primary = play.primary()?;
    play.expect_mirrored_again(primary, mark)
}

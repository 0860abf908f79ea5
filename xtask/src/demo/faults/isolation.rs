//! Cut off, frozen, or without a witness: who may go on, and who must not.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::demo::play::{LENIENCE, Play};
use crate::demo::rack::VM;
use crate::demo::story::Amount;
use crate::lab::{Host, Link};

const TAKEOVER: Duration = Duration::from_secs(10);
/// Exit code of a command that was refused to protect data.
const REFUSED: i32 = 4;
/// Long enough for every time-out of the program to strike.
const A_WHILE: Duration = Duration::from_secs(12);
/// What an undisturbed guest waits at most, on a busy machine.
const NO_STALL: Duration = Duration::from_millis(500);

pub fn primary_isolated(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    play.rack.lab.cut(Link::Peer)?;
    play.rack.lab.cut(Link::Witness(primary))?;
    play.tell(&format!(
        "{} is cut off from its peer and the witness; the observer still sees its guests",
        primary.host()
    ));
    play.expect_takeover(mark, peer, TAKEOVER)?;
    play.mend_network()?;
    play.wait_for_no_qemu(primary, TAKEOVER * LENIENCE)?;
    play.tell(&format!("the cables are back; nothing runs on {}", primary.host()));
    play.expect_mirrored_again(peer, mark)
}

pub fn primary_frozen_continued(play: &mut Play) -> Result<()> {
    const OVERLAP: Duration = Duration::from_secs(1);
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    let frozen_boot = mark.boots - 1;
    play.rack.lab.host(primary.host()).signal_all(libc::SIGSTOP);
    play.tell(&format!("everything on {} is stopped", primary.host()));
    let taken_over = play.expect_takeover(mark, peer, TAKEOVER);
    let continued = Instant::now();
    play.rack.lab.host(primary.host()).signal_all(libc::SIGCONT);
    taken_over?;
    play.tell(&format!("{} continues where it was stopped", primary.host()));
    let gone = play.wait_for_no_qemu(primary, TAKEOVER * LENIENCE)?;
    let heard = play.observer.notes().boots[frozen_boot].last_seen.saturating_duration_since(continued);
    play.within("the old machine is heard no longer after it continues", heard, OVERLAP);
    play.figure("overlap after continuing", Amount::Time(heard));
    play.tell(&format!("its machine is gone after {:.2} s", (gone - continued).as_secs_f64()));
    // The overlap is bounded above; from here on it would count again for every later scenario.
    play.observer.forget_boot(frozen_boot);
    play.expect_mirrored_again(peer, mark)
}

pub fn witness_lost(play: &mut Play) -> Result<()> {
    let mark = play.mark();
    play.rack.lab.power_off(Host::Witness)?;
    play.tell("the witness is lost");
    play.watch(A_WHILE, |_| None)?;
    play.expect_no_restart(mark, NO_STALL)?;
    let primary = play.primary()?;
    let mirrored = play.rack.vm(primary).is_some_and(|vm| vm.is_mirrored());
    play.check("mirroring goes on without the witness", mirrored, format!("mirrored: {mirrored}"));
    play.rack.power_on(Host::Witness)?;
    play.expect_mirrored_again(primary, mark)
}

pub fn witness_lost_solo(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let before = play.mark();
    play.rack.lab.power_off(peer.host())?;
    play.rack.wait_vm(primary, "going on alone", TAKEOVER, |vm| (vm.in_sync().len() == 1).then_some(()))?;
    play.observer.wait_for_records(100, TAKEOVER)?;
    let mark = play.mark();
    play.rack.lab.power_off(Host::Witness)?;
    play.tell("the primary is alone, and the witness is lost too");
    play.watch(A_WHILE, |_| None)?;
    play.expect_no_restart(mark, NO_STALL)?;
    play.rack.power_on(Host::Witness)?;
    play.rack.power_on(peer.host())?;
    play.expect_mirrored_again(primary, before)
}

pub fn witness_and_peer_lost(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    play.rack.lab.power_off(Host::Witness)?;
    play.rack.lab.power_off(peer.host())?;
    play.tell("witness and peer are lost together");
    play.watch(A_WHILE, |_| None)?;
    let frozen_at = play.observer.notes().newest_acknowledged();
    let still = play.watch(A_WHILE / 4, |play| {
        let now = play.observer.notes().newest_acknowledged();
        (now > frozen_at).then(|| format!("record {now} acknowledged without a second copy"))
    })?;
    play.check(
        "nothing is acknowledged that nobody else could know of",
        still.is_none(),
        still.unwrap_or_else(|| format!("no record after {frozen_at}")),
    );
    let status = play.rack.vm(primary);
    let loud = status.as_ref().is_some_and(|vm| vm.is_frozen());
    play.check("it is reported", loud, status.map_or("no answer".to_owned(), |vm| vm.brief()));
    let forced = play.rack.try_user(primary.host(), &["failover", VM, "--force"])?;
    let (held, detail) = match forced {
        Ok(_) => (false, "it went ahead".to_owned()),
        Err(refusal) => (refusal.code == Some(REFUSED), refusal.said.trim().replace('\n', " / ")),
    };
    play.check("`--force` names the loss and demands confirmed fencing", held, detail);
    play.rack.power_on(peer.host())?;
    play.tell(&format!("{} is back", peer.host()));
    play.observer.wait_for_records(100, Duration::from_secs(90))?;
    play.tell("the guest goes on");
    play.check_guest_content();
    play.rack.power_on(Host::Witness)?;
    let primary = play.primary()?;
    play.expect_mirrored_again(primary, mark)
}

//! A copy that is behind: while it catches up, and when somebody wants it nevertheless.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::demo::play::Play;
use crate::demo::rack::VM;
use crate::demo::story::Amount;
use crate::lab::Side;
use crate::verify::Copy;

/// Exit code of a command that was refused to protect data.
const REFUSED: i32 = 4;
/// Outage in records: many times the small journal of this stage.
const OUTAGE_RECORDS: u64 = 3000;
const OUTAGE: Duration = Duration::from_secs(120);
/// Long enough for a takeover to happen, were it allowed.
const TAKEOVER_TIME: Duration = Duration::from_secs(15);
const RECORD_BYTES: u64 = 4096;
const EXTENT_BYTES: u64 = 64 << 10;

/// The peer goes away until the journal no longer reaches back; returns with the machine running solo.
fn outrun_the_journal(play: &mut Play, primary: Side) -> Result<()> {
    let peer = primary.other();
    play.rack.lab.power_off(peer.host())?;
    play.tell(&format!("{} is away until the journal no longer reaches back", peer.host()));
    play.observer.wait_for_records(OUTAGE_RECORDS, OUTAGE).map(drop)
}

pub fn long_outage_trimmed(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    outrun_the_journal(play, primary)?;
    play.rack.power_on(peer.host())?;
    play.expect_mirrored_again(primary, mark)?;
    let resync = play.rack.vm(primary).and_then(|vm| vm.resync()).context("no resync is reported")?;
    let share = 100.0 * resync.bytes_sent as f64 / resync.bytes_changed.max(1) as f64;
    play.check("only what changed is sent", share <= 105.0, format!("{share:.1} % of the changed extents"));
    // Our own account: the records since, on two disks, in whole extents, plus one begun at each end.
    let records = play.observer.notes().newest_acknowledged() - mark.acknowledged;
    let most = 2 * (records * RECORD_BYTES / EXTENT_BYTES + 2) * EXTENT_BYTES;
    play.check(
        "what changed is not overstated",
        resync.bytes_changed <= most,
        format!("{} B, at most {most} B by the observer's account", resync.bytes_changed),
    );
    Ok(())
}

pub fn primary_dies_in_resync(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    outrun_the_journal(play, primary)?;
    play.rack.power_on(peer.host())?;
    play.rack.wait_vm(primary, "a resync under way", Duration::from_secs(30), |vm| {
        vm.resync().filter(|resync| resync.running && resync.bytes_sent > 0)
    })?;
    play.rack.lab.power_off(primary.host())?;
    play.tell(&format!("{} dies while {} is resynchronising", primary.host(), peer.host()));
    never_promoted(play, peer)?;
    force(play, peer, mark.acknowledged)
}

pub fn forced_takeover_divergence(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mark = play.mark();
    play.rack.lab.power_off(peer.host())?;
    play.rack
        .wait_vm(primary, "going on alone", TAKEOVER_TIME, |vm| (vm.in_sync().len() == 1).then_some(()))?;
    play.observer.wait_for_records(500, OUTAGE)?;
    play.rack.lab.power_off(primary.host())?;
    play.tell(&format!("{} worked alone and dies; {} returns with an old copy", primary.host(), peer.host()));
    play.rack.power_on(peer.host())?;
    let alone = play.observer.notes().newest_acknowledged();
    never_promoted(play, peer)?;
    force(play, peer, mark.acknowledged)?;
    play.rack.power_on(primary.host())?;
    play.tell(&format!("{} returns with what it wrote alone", primary.host()));
    let diverged = |side: Side| {
        play.rack.wait_vm(side, "the divergence to be found", TAKEOVER_TIME * 2, |vm| {
            vm.says("diverge").then_some(())
        })
    };
    let found = diverged(primary).or_else(|_| diverged(peer));
    let detail = found.as_ref().map_or_else(|error| format!("{error:#}"), |()| "said by status".to_owned());
    play.check("the divergence is found and reported", found.is_ok(), detail);
    let running = play.qemus(primary);
    play.check(
        "the overtaken copy does not start",
        running.is_empty(),
        format!("{} processes", running.len()),
    );
    let refused = play.rack.try_user(primary.host(), &["rejoin", VM])?;
    let (held, detail) = match refused {
        Ok(_) => (false, "it went ahead".to_owned()),
        Err(refusal) => (refusal.code == Some(REFUSED), refusal.said.trim().replace('\n', " / ")),
    };
    play.check("`rejoin` names what would be given up and demands a yes", held, detail);
    play.rack.user(primary.host(), &["rejoin", VM, "--yes"])?;
    let verdict = Copy::find(&play.rack.data_folder(primary).join("diverged"))?.verify(alone)?;
    play.check(
        "what only the overtaken copy held is saved aside",
        verdict.is_good() && verdict.newest[1] >= alone,
        format!("{alone} records acknowledged before; saved {:?}, lost {:?}", verdict.newest, verdict.lost),
    );
    play.expect_mirrored_again(peer, mark)
}

fn never_promoted(play: &mut Play, side: Side) -> Result<()> {
    let promoted = play.watch(TAKEOVER_TIME, |play| {
        (!play.qemus(side).is_empty()).then(|| "a VM process runs".to_owned())
    })?;
    let detail = promoted.clone().unwrap_or_else(|| format!("nothing started in {TAKEOVER_TIME:?}"));
    play.check("a copy that is behind is never promoted by itself", promoted.is_none(), detail);
    Ok(())
}

/// An operator gives up what the other copy had: the loss is named first, then the old consistent state boots.
fn force(play: &mut Play, side: Side, was_in_sync_at: u64) -> Result<()> {
    let refused = play.rack.try_user(side.host(), &["failover", VM, "--force"])?;
    let (held, detail) = match refused {
        Ok(_) => (false, "it went ahead".to_owned()),
        Err(refusal) => (refusal.code == Some(REFUSED), refusal.said.trim().replace('\n', " / ")),
    };
    play.check("`--force` names the loss and demands confirmed fencing", held, detail);
    let mark = play.mark();
    play.rack.user(side.host(), &["failover", VM, "--force", "--confirm-fenced"])?;
    let boot = play.observer.wait("the forced machine's first record", Duration::from_secs(90), |notes| {
        let boot = notes.boots.get(mark.boots)?;
        (boot.found.is_some() && boot.first_acknowledged.is_some()).then(|| boot.clone())
    })?;
    let (first, second) = boot.found.unwrap_or_default();
    play.tell(&format!(
        "the machine runs from its state at record {second}; {} were acknowledged",
        mark.acknowledged
    ));
    play.figure("records given up", Amount::Count(mark.acknowledged.saturating_sub(second)));
    play.check(
        "the old consistent state is whole",
        second >= was_in_sync_at && second <= first && first <= second + 1 && boot.broken.is_empty(),
        format!("in sync at record {was_in_sync_at}; found {first} and {second}; {:?}", boot.broken),
    );
    Ok(())
}

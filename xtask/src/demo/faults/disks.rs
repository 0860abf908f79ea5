//! A node's disk is full or fails.

use std::time::Duration;

use anyhow::Result;

use crate::demo::play::{LENIENCE, Play};
use crate::lab::Side;

const STALL: Duration = Duration::from_secs(3);
const HANDOVER: Duration = Duration::from_secs(20);
/// Time for the guest to reach blocks that were never written before.
const NOTICED: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy)]
pub enum Failure {
    Full,
    Fsync,
}

fn strike(play: &Play, side: Side, failure: Failure) -> Result<()> {
    let volume = play.rack.volume(side);
    match failure {
        Failure::Full => {
            play.tell(&format!("the disk of {} is full", side.host()));
            volume.fill()
        }
        Failure::Fsync => {
            play.tell(&format!("the disk of {} fails: fsync returns an error", side.host()));
            volume.fail_fsync()
        }
    }
}

/// That replica leaves; the machine goes on.
pub fn secondary(play: &mut Play, failure: Failure) -> Result<()> {
    let primary = play.primary()?;
    let failing = play.fragile_side();
    anyhow::ensure!(primary != failing, "the machine must not run on the node whose disk fails");
    let mark = play.mark();
    strike(play, failing, failure)?;
    play.rack.wait_vm(primary, "the failing copy to leave", NOTICED, |vm| {
        (vm.in_sync().len() == 1).then_some(())
    })?;
    play.tell("its copy has left");
    play.expect_no_restart(mark, STALL)?;
    play.rack.volume(failing).relieve()
}

/// The good copy takes over.
pub fn primary(play: &mut Play, failure: Failure) -> Result<()> {
    let primary = play.primary()?;
    let failing = play.fragile_side();
    anyhow::ensure!(primary == failing, "the machine must run on the node whose disk fails");
    let mark = play.mark();
    strike(play, failing, failure)?;
    let to = failing.other();
    let started = play.wait_for_qemu(to, NOTICED + HANDOVER * LENIENCE)?;
    play.tell(&format!("{} runs the machine {:.1} s later", to.host(), (started - mark.at).as_secs_f64()));
    play.expect_boot(mark)?;
    play.rack.volume(failing).relieve()
}

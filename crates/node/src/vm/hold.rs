//! A machine that stands still for a while, for somebody who keeps its memory.

use super::Vm;
use rempart_api::Error;
use rempart_hypervisor::{Machine, RunState};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;

/// QEMU stops its vCPUs within milliseconds, unless their I/O hangs.
const STOP_DEADLINE: Duration = Duration::from_secs(15);
/// It goes on as fast, and is tried again if not.
const GO_ON_DEADLINE: Duration = Duration::from_secs(15);

/// The machine goes on when this is dropped.
#[derive(Debug)]
pub struct Hold {
    vm: Arc<Vm>,
    pub machine: Arc<dyn Machine>,
    _holder: OwnedMutexGuard<()>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.vm.control(|control| control.held = false);
    }
}

impl Hold {
    /// Has a machine that runs stand still.
    pub async fn new(vm: &Arc<Vm>) -> Result<Hold, Error> {
        let failed = || Error::failed(format!("`{}` cannot be made to stand still", vm.name()));
        let Ok(holder) = vm.holder.clone().try_lock_owned() else {
            return Err(Error::conflict(format!("`{}` stands still for another view", vm.name())));
        };
        let runs = |run_state| run_state == Some(RunState::Running);
        let machine = vm.shown().machine.filter(|_| runs(vm.shown().run_state));
        let machine = machine.ok_or_else(|| failed().cause("it does not run just now"))?;
        let hold = Hold { vm: vm.clone(), machine, _holder: holder };
        vm.control(|control| control.held = true);
        let mut shown = vm.shown_watch();
        tokio::select! {
            _ = shown.wait_for(|shown| shown.held) => {}
            why = hold.is_over() => return Err(failed().cause(why)),
            () = tokio::time::sleep(STOP_DEADLINE) => {
                return Err(failed().cause(format!("QEMU did not stop it in {} s", STOP_DEADLINE.as_secs())));
            }
        }
        Ok(hold)
    }

    /// Returns when it must be let go of, and why: the machine is to end, or may not run any more.
    pub async fn is_over(&self) -> &'static str {
        let mut control = self.vm.control.subscribe();
        let mut shown = self.vm.shown_watch();
        tokio::select! {
            _ = control.wait_for(|control| !control.may_run()) => "it is being stopped, or handed over",
            _ = shown.wait_for(|shown| shown.machine.is_none()) => "its process ended",
        }
    }

    /// Lets it go on, and returns when it does.
    pub async fn end(self) -> Result<(), Error> {
        let vm = self.vm.clone();
        drop(self);
        let mut shown = vm.shown_watch();
        let goes_on = shown.wait_for(|shown| !shown.held);
        match tokio::time::timeout(GO_ON_DEADLINE, goes_on).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::failed(format!("`{}` does not go on", vm.name()))),
        }
    }
}

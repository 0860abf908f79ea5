//! A guest that takes part in a view of its disks: its file systems stand still until the view is open.

use crate::vm::Vm;
use rempart_api::{Consistency, ConsistencyLevel, Error, Freeze};
use rempart_hypervisor::guest_agent::{FreezeOptions, Frozen, GuestAgent, Level, Thawed};
use std::time::Duration;

/// An agent that runs answers at once, on a guest that is busy soon.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// What the guest does for a view that is about to be opened.
#[derive(Debug)]
pub enum Quiesced {
    /// It did not run.
    Stopped,
    /// It runs on, because.
    No(String),
    /// It is thawed when this is dropped, or after ten seconds, whatever happens here.
    Frozen(Box<Frozen>),
}

impl Quiesced {
    pub async fn start(vm: &Vm, freeze: Freeze) -> Result<Quiesced, Error> {
        let Some(machine) = vm.shown().machine else { return Ok(Quiesced::Stopped) };
        if freeze == Freeze::No {
            return Ok(Quiesced::No("the guest was not asked to take part".to_owned()));
        }
        let freezing = async {
            let agent = GuestAgent::connect(&machine.guest_agent().await?, CONNECT_DEADLINE).await?;
            agent.freeze(FreezeOptions::new(vm.paths.frozen_mark())).await
        };
        match freezing.await {
            Ok(frozen) => Ok(Quiesced::Frozen(Box::new(frozen))),
            Err(error) if freeze == Freeze::OrRefuse => Err(not_frozen(&vm.name(), error.to_string())),
            Err(error) => Ok(Quiesced::No(error.to_string())),
        }
    }

    /// Lets it go on, and tells what the view is good for.
    pub async fn end(self, vm: &Vm) -> Consistency {
        let consistency = |level, why| Consistency { level, why, frozen_ms: None, notes: Vec::new() };
        let frozen = match self {
            Quiesced::Stopped if vm.shown().machine.is_none() => {
                return consistency(ConsistencyLevel::Stopped, "the machine did not run".to_owned());
            }
            Quiesced::Stopped => return consistency(ConsistencyLevel::Crash, "it was starting".to_owned()),
            Quiesced::No(why) => return consistency(ConsistencyLevel::Crash, why),
            Quiesced::Frozen(frozen) => frozen,
        };
        match frozen.thaw().await {
            Ok(Thawed { level, why, frozen_for, hooks, .. }) => {
                let not_thawed = hooks.iter().flat_map(|report| report.not_thawed());
                let note = |hook| format!("hook `{hook}` in the guest could not undo what it did");
                Consistency {
                    level: match level {
                        Level::Crash | Level::SavedState => ConsistencyLevel::Crash,
                        Level::FileSystem => ConsistencyLevel::FileSystem,
                        Level::Application => ConsistencyLevel::Application,
                    },
                    why,
                    frozen_ms: Some(frozen_for.as_millis() as u64),
                    notes: not_thawed.map(note).collect(),
                }
            }
            // The view is good; the guest is a matter for people.
            Err(error) => {
                tracing::warn!(vm = vm.name(), %error, "a guest that was frozen does not say that it thawed");
                let why = format!("it is not known whether the guest thawed afterwards: {error}");
                consistency(ConsistencyLevel::FileSystem, why)
            }
        }
    }
}

pub fn not_frozen(vm: &str, why: String) -> Error {
    Error::refused(format!("there is no view of `{vm}` with its file systems frozen")).cause(why)
}

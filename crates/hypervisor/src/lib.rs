//! Runs virtual machines: the QEMU driver and the guard that owns a running machine's lease.
//!
//! | file | what is in it |
//! |---|---|
//! | [`definition`] | what a virtual machine is; travels in its group's log |
//! | [`machine`] | the traits the daemon is written against: [`Hypervisor`] and [`Machine`] |
//! | [`qemu`] | the QEMU driver behind those traits |
//! | [`fake`] | a hypervisor without guests, for fast tests |
//! | [`guard`] | the small process per running machine that stops it when its lease runs out |
//! | [`qemu::backup`] | consistent views of a running QEMU's disks, and what changed |
//! | [`guest_agent`] | client of QEMU's guest agent: frozen file systems |
//! | [`qmp`] | client of QEMU's monitor protocol |
//! | [`command_line`] | QEMU's arguments from a definition |
//! | [`accelerator`] | whether KVM really runs a guest here |
//! | [`tap`] | TAP devices on bridges |

pub mod accelerator;
pub mod clock;
mod command;
pub mod command_line;
mod dead_man;
pub mod definition;
mod error;
pub mod fake;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod guard;
pub mod guest_agent;
mod lines;
pub mod machine;
mod process;
pub mod qemu;
pub mod qmp;
mod run_dir;
pub mod tap;

pub use definition::{Definition, InvalidDefinition, MacAddress, VmUuid};
pub use error::{Error, ErrorKind, Result};
pub use machine::{
    Adopted, DiskExport, ExitCause, ExitRecord, FirstState, HostReport, Hypervisor, KeptMemory, Lease,
    Machine, MachineEvent, MachineEvents, MachineStatus, MemoryWanted, PauseCause, Pending, RunState,
    StartRequest,
};
pub use qemu::{Qemu, QemuConfig};

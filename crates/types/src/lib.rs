//! Words every other crate shares: identifiers, units, log positions, terms and the register's value.
//!
//! Nothing here does I/O, reads a clock or draws a random number.

mod id;
mod lineage;
mod node_set;
mod position;
mod register;
mod time;
mod unit;

pub use id::{GroupId, InstanceId, NodeId, Nonce, ParseIdError, RegisterId, SessionId};
pub use lineage::{Lineage, LineageError, Run};
pub use node_set::NodeSet;
pub use position::{Epoch, LogPosition, Lsn, Term};
pub use register::{Intent, RegisterValue};
pub use time::{MonotonicTime, WallTime};
pub use unit::{DiskIndex, EXTENT_SIZE, ExtentIndex, SECTOR_SIZE, extents_of};

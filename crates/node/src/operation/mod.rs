//! What an operator can order, one file each. Every order is checked whole before anything changes.

mod arrival;
mod compare;
mod create;
mod disk;
mod failover;
mod guest_memory;
mod protect;
mod quiesce;
mod register;
mod rejoin;
mod replica;
mod restore;
mod view;

pub use arrival::remove_unfinished;
pub use compare::compare;
pub use create::{delete, import};
pub use disk::{DiskChange, change_replica, disk_add, disk_remove, disk_resize};
pub use failover::{HandOver, failback, failover, hand_over};
pub use protect::{protect, unprotect};
pub use register::{finish_move, move_to_witness};
pub use rejoin::rejoin;
pub use replica::{ReplicaOffer, accept_replica, drop_replica};
pub use restore::{Restores, begin_restore, finish_restore, open_restore};
pub use view::{Opened, open_view, remove_left_views};

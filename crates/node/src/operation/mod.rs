//! What an operator can order, one file each. Every order is checked whole before anything changes.

mod compare;
mod create;
mod disk;
mod failover;
mod protect;
mod quiesce;
mod register;
mod rejoin;
mod replica;
mod view;

pub use compare::compare;
pub use create::{delete, import};
pub use disk::{DiskChange, change_replica, disk_add, disk_remove, disk_resize};
pub use failover::{HandOver, failback, failover, hand_over};
pub use protect::{protect, unprotect};
pub use register::{finish_move, move_to_witness};
pub use rejoin::rejoin;
pub use replica::{ReplicaOffer, accept_replica, drop_replica};
pub use view::{ViewGuard, open_view, remove_left_sockets};

//! Moving a group's register from a file on this node to the witness, while its machine runs.
//!
//! | step | after a crash |
//! |---|---|
//! | the record names the register on the witness that is to be made | the file counts; the next try makes the same one |
//! | the cluster core makes it, and writes into the superblock that it counts | it counts: see `rempart_cluster` |
//! | a tombstone in the file | it is written at the next start |
//! | the record says that the register is on the witness | the same |

use crate::node::Node;
use crate::vm::Vm;
use crate::vm::record::RegisterPlace;
use rempart_api::Error;
use rempart_engine::Command;
use rempart_types::RegisterId;

/// Does nothing if the register is there already.
pub async fn move_to_witness(node: &Node, vm: &Vm) -> Result<(), Error> {
    finish_move(vm).await?;
    if vm.place() == RegisterPlace::Witness {
        return Ok(());
    }
    let name = vm.name();
    let Some(witness) = node.host.registers.witness() else {
        return Err(Error::refused(format!(
            "cannot move the register of `{name}`: the cluster has no witness"
        )));
    };
    let there =
        node.registers_on_witness().map_err(|e| Error::failed("cannot list the registers").cause(e))?;
    witness.probe(&there).await;
    if !witness.is_reachable() {
        return Err(Error::unreachable(format!("cannot move the register of `{name}` to the witness"))
            .cause("the witness does not answer")
            .hint("`rempart cluster members` shows whether it is back; nothing has changed"));
    }
    let Some(old) = vm.group.register() else {
        return Err(Error::failed(format!("the register of `{name}` is not known yet")).hint("try again"));
    };
    let target = match vm.with_record(|record| record.moving_to) {
        Some(target) => target,
        None => RegisterId(
            crate::identity::random_u128().map_err(|e| Error::failed("cannot draw an id").cause(e))?,
        ),
    };
    vm.change_record(|record| {
        record.register = old;
        record.moving_to = Some(target);
    })?;
    vm.command("move the register of", Command::MoveRegister { to: target }).await?;
    finish_move(vm).await
}

/// What is left to do once the register on the witness counts.
pub async fn finish_move(vm: &Vm) -> Result<(), Error> {
    let (old, target) = vm.with_record(|record| (record.register, record.moving_to));
    let Some(target) = target.filter(|_| vm.group.register() == target) else { return Ok(()) };
    vm.host.registers.close_local(old, target).await.map_err(|e| {
        Error::failed(format!("the register of `{}` moved, but its old file is not closed", vm.name()))
            .cause(e)
    })?;
    vm.change_record(|record| {
        record.register = target;
        record.place = RegisterPlace::Witness;
        record.moving_to = None;
    })
}

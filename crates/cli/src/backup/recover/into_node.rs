//! What was recovered, once it is switched off, becomes a machine of this node.

use super::folder::{Folder, Record};
use crate::Output;
use crate::backup::onto_node::{NewMachineArgs, Restore, definition, numbers, other_version};
use rempart_api::{Client, Error, RestoreDisk, RestoreRequest, RestoreTarget};
use rempart_hypervisor::definition::Firmware;

/// Nobody runs it, and what its disks still need of the point is served.
pub fn into_node(
    folder: &Folder,
    record: &Record,
    name: &str,
    (args, memory): (&NewMachineArgs, Option<u64>),
    client: Client,
    output: Output,
) -> Result<(), Error> {
    let numbers = numbers(record.disks.iter().map(|disk| disk.name.as_str()));
    let disks = record.disks.iter().zip(numbers);
    let disks =
        disks.map(|(disk, index)| RestoreDisk { index, size_bytes: disk.size_bytes }).collect::<Vec<_>>();
    let definition =
        definition(folder.definition()?.as_deref(), name, &disks, (args, memory), folder.what(), output)?;
    let nvram_hex = match definition.firmware {
        Firmware::Uefi => folder.variables()?.map(|content| data_encoding::HEXLOWER.encode(&content)),
        Firmware::Bios => None,
    };
    let mut needed_bytes = 0;
    for disk in &record.disks {
        // What is behind it is not counted: it is found out soon enough.
        needed_bytes += folder.allocated(disk)?.min(disk.size_bytes);
    }
    let onto = args.onto(&definition, needed_bytes);
    let restore = Restore::open(client, &RestoreRequest { name: name.to_owned(), disks, nvram_hex, onto })?;
    for (disk, target) in record.disks.iter().zip(&restore.ready.disks) {
        let RestoreTarget::File { path } = target else { return Err(other_version()) };
        output.tell(&format!("copy {}", disk.name));
        folder.copy_raw(disk, path)?;
    }
    restore.finish(output)
}

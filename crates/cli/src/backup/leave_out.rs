//! What is not backed up, unless it is asked for.

use clap::{Args, ValueEnum};
use rempart_api::Error;
use rempart_backup::leave_out::{LookLimits, Remark, Wanted, answer, look_confined, whole_chunks};
use rempart_backup::{BackupError, Source};
use rempart_repository::{ChunkSize, ConsistencyLevel, Excluded};
use std::process::Command;

/// The hidden command of the process that looks at a guest's file systems.
pub const LOOK: &str = "look-at-disk";

#[derive(Debug, Clone, Default, Args)]
pub struct LeaveOutArgs {
    /// Back up what is left out otherwise, and is restored as zeroes: swap partitions, swap files and page files; and free
    /// space, of file systems that were frozen or are not mounted.
    #[arg(long, value_enum, value_delimiter = ',')]
    include: Vec<Include>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Include {
    Swap,
    FreeSpace,
}

impl LeaveOutArgs {
    /// Chunks of each disk to leave out, and remarks on what is not left out.
    pub fn look(
        &self,
        disks: &[(&str, &dyn Source)],
        level: ConsistencyLevel,
        chunk_size: ChunkSize,
    ) -> Result<(Vec<Vec<Excluded>>, Vec<String>), BackupError> {
        let wants = |what| !self.include.contains(&what);
        let wanted = Wanted {
            swap: wants(Include::Swap),
            free_space: wants(Include::FreeSpace),
            is_quiet: matches!(level, ConsistencyLevel::FileSystem | ConsistencyLevel::Application),
        };
        // What changes while it is read may not be free any more when that is read.
        if level == ConsistencyLevel::Live || !wanted.swap && !wanted.free_space {
            return Ok((vec![Vec::new(); disks.len()], Vec::new()));
        }
        // This program, also where another one has taken its place since.
        let mut child = Command::new("/proc/self/exe");
        let sources: Vec<_> = disks.iter().map(|(_, source)| *source).collect();
        let found = look_confined(child.arg(LOOK), &sources, wanted, LookLimits::default())?;
        let left_out = found.left_out.iter().zip(sources);
        let left_out = left_out.map(|(found, source)| whole_chunks(found, source.size(), chunk_size));
        let remarks = found.remarks.into_iter().map(|Remark { disk, what }| {
            let name = disk.and_then(|disk| disks.get(disk)).map(|(name, _)| name);
            name.map_or_else(|| what.clone(), |name| format!("{name}: {what}"))
        });
        Ok((left_out.collect(), remarks.collect()))
    }
}

/// The process that looks.
pub fn run() -> Result<(), Error> {
    answer().map_err(|e| Error::failed("cannot look at the disks").cause(e))
}

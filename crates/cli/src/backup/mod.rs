//! Backups: commands that work on a repository themselves, with or without a daemon.

mod access;
mod agent;
mod boot;
mod check;
mod consistency;
mod copy;
mod create;
mod files;
mod gc;
mod guest_files;
mod hardware;
mod in_use;
mod keys;
mod leave_out;
mod list;
mod machine;
mod mount;
mod onto_node;
mod points;
mod qemu;
mod recover;
mod repair;
mod restore;
mod retain;
mod serve;
mod stop;
mod undelete;

pub(crate) use points::time;

use crate::Output;
use access::Access;
use clap::Subcommand;
use rempart_api::{Client, Error};
use std::path::Path;

/// What work that is in no hurry gives way by, as nice(1) counts it.
const NICENESS: i32 = 10;

/// Subcommands that work on a backup repository.
#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    /// Backup repositories: make one, look at one, check one.
    #[command(subcommand)]
    Repo(RepoCommand),
    /// Back up a virtual machine, or disks, into a repository.
    Backup(Box<create::Backup>),
    /// Back up the machine that this runs in, from within.
    #[command(subcommand)]
    Agent(agent::AgentCommand),
    /// List restore points.
    Points(points::Points),
    /// List a restore point's files.
    Files(files::Files),
    /// Bring back a restore point: a machine, disks or files.
    Restore(Box<restore::Restore>),
    /// Write one disk of a restore point as an image file.
    Export(restore::Export),
    /// Run a virtual machine from the repository at once, and move its disks here while it runs.
    Recover(Box<recover::Recover>),
    /// Serve a restore point's disks over NBD.
    Serve(serve::Serve),
    /// Show restore points' disks as files.
    Mount(mount::Mount),
    /// Looks at the disk behind its standard input and output; started by a backup.
    #[command(name = leave_out::LOOK, hide = true)]
    LookAtDisk,
    /// Reads the file system behind its standard input and output; started by who shows or restores its files.
    #[command(name = guest_files::READ, hide = true)]
    ReadGuestFiles,
    /// Thaws what its parent froze, should that die or hang; started by who freezes.
    #[command(name = agent::THAW, hide = true)]
    ThawFileSystems,
    /// Read all that restore points hold, and compare it with what was backed up.
    Verify(Box<check::Verify>),
    /// Copy restore points into a second repository.
    Copy(copy::Copy),
    /// Forget restore points by a rule.
    Retain(retain::Retain),
    /// Forget single restore points.
    Forget(retain::Forget),
    /// Bring back restore points that were forgotten.
    Undelete(undelete::Undelete),
    /// Remove what no restore point has any more.
    Gc(gc::Gc),
}

#[derive(Debug, Subcommand)]
pub enum RepoCommand {
    /// Make a repository.
    Create(access::Create),
    /// The repositories that there are, and how much is in them.
    List(list::List),
    /// What a repository is, and how much is in it.
    Show(Access),
    /// Hold every pack, segment, restore point's entry and key against its hash or signature, which takes no key: damage shows.
    Check(Access),
    /// Mend what is damaged from a second repository.
    Repair(repair::Repair),
    /// What opens it.
    #[command(subcommand)]
    Key(keys::KeyCommand),
}

/// Runs one command; `config` is the node's configuration, `client` the daemon's, for those that need it. Blocks.
pub fn run_backup(
    command: BackupCommand,
    config: &Path,
    client: impl FnOnce() -> Result<Client, Error>,
    output: Output,
) -> Result<(), Error> {
    let is_work = matches!(
        command,
        BackupCommand::Backup(_)
            | BackupCommand::Copy(_)
            | BackupCommand::Gc(_)
            | BackupCommand::Repo(RepoCommand::Check(_))
    );
    if is_work {
        // What virtual machines do on these processors comes first. A refusal stops no backup.
        let _ = rustix::process::nice(NICENESS);
    }
    match command {
        BackupCommand::Repo(RepoCommand::Create(command)) => access::create(command, output),
        BackupCommand::Repo(RepoCommand::List(command)) => list::run(&command, config, output),
        BackupCommand::Repo(RepoCommand::Show(command)) => points::show(&command, output),
        BackupCommand::Repo(RepoCommand::Check(command)) => check::all_objects(&command, output),
        BackupCommand::Repo(RepoCommand::Repair(command)) => repair::run(&command, output),
        BackupCommand::Repo(RepoCommand::Key(command)) => keys::run(&command, output),
        BackupCommand::Backup(command) => create::run(&command, client, output),
        BackupCommand::Agent(command) => agent::run(command, output),
        BackupCommand::Files(command) => files::run(&command, output),
        BackupCommand::Points(command) => points::run(&command, output),
        BackupCommand::Restore(command) => restore::run(&command, client, output),
        BackupCommand::Export(command) => restore::export(&command, output),
        BackupCommand::Recover(command) => recover::run(&command, client, output),
        BackupCommand::Serve(command) => serve::run(&command, output),
        BackupCommand::Mount(command) => mount::run(&command, output),
        BackupCommand::LookAtDisk => leave_out::run(),
        BackupCommand::ReadGuestFiles => guest_files::run(),
        BackupCommand::ThawFileSystems => agent::thaw(),
        BackupCommand::Verify(command) => check::run(&command, output),
        BackupCommand::Copy(command) => copy::run(&command, output),
        BackupCommand::Retain(command) => retain::run(&command, output),
        BackupCommand::Forget(command) => retain::forget(&command, output),
        BackupCommand::Undelete(command) => undelete::run(&command, output),
        BackupCommand::Gc(command) => gc::run(&command, output),
    }
}

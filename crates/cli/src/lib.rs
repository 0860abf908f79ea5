//! The command line: subcommands over the daemon's API, one file each.

mod backup;
mod command;
mod output;
mod parse;

pub use backup::{BackupCommand, run_backup};
pub use command::{Command, run};
pub use output::{Output, ProgressFormat, print_error};

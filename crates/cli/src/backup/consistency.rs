//! How much the guest takes part in a backup.

use clap::{Args, ValueEnum};
use rempart_api::MemoryRequest;
use std::time::Duration;

#[derive(Debug, Default, Args)]
pub struct ConsistencyArgs {
    /// How consistent the disks are to be with what the guest is doing. `application` where its agent can be asked, else
    /// `crash`.
    #[arg(long, value_enum, conflicts_with = "disks")]
    consistency: Option<Wanted>,
    /// What is good enough where the guest's agent does not freeze its file systems, or its memory cannot be kept.
    #[arg(long = "else", value_enum, default_value = "crash", conflicts_with = "disks")]
    otherwise: Enough,
    /// A guest whose memory is kept stands still no longer than so many seconds. Where it would, its memory is not kept.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(MemoryRequest::PAUSES_S), conflicts_with = "disks")]
    longest_pause: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Wanted {
    /// File systems are frozen by the guest's agent, after its hooks had its applications prepare themselves.
    Application,
    /// As after a power cut: the guest notices nothing.
    Crash,
    /// The guest's memory is kept, too, so that the machine can go on from that moment. It stands still for a moment.
    SavedState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Enough {
    /// As after a power cut.
    #[default]
    Crash,
    /// The guest's memory is kept, too; where it cannot be, there is no backup.
    SavedState,
    /// Nothing: there is no backup then.
    Nothing,
}

impl ConsistencyArgs {
    pub fn wanted(&self, has_agent: bool) -> Wanted {
        self.consistency.unwrap_or(if has_agent { Wanted::Application } else { Wanted::Crash })
    }

    pub fn otherwise(&self) -> Enough {
        self.otherwise
    }

    pub fn longest_pause(&self) -> Duration {
        Duration::from_secs(self.longest_pause)
    }
}

//! How consistent a view is: as good as the guest lets it be, and said which and why.

use super::{LiveView, Prepared, Saving};
use crate::error::{Error, ErrorKind, Result};
use crate::guest_agent::{FreezeOptions, GuestAgent, HookReport, Level, Thawed};
use std::path::PathBuf;
use std::time::Duration;

/// What to try.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Or why the guest is not asked.
    pub agent: Result<Agent, &'static str>,
    pub otherwise: Otherwise,
}

/// The guest agent's channel, and how long things may take.
#[derive(Debug, Clone)]
pub struct Agent {
    pub socket: PathBuf,
    /// How long to wait for its first word.
    pub connect_timeout: Duration,
    /// File systems to freeze, by mount point; all if empty.
    pub mount_points: Vec<String>,
    pub freeze_deadline: Duration,
    /// The file systems stand still no longer, whatever happens on the host.
    pub limit: Duration,
}

impl Agent {
    /// 5 s to answer, 60 s to freeze everything, 10 s frozen.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        let defaults = FreezeOptions::new("");
        Self {
            socket: socket.into(),
            connect_timeout: Duration::from_secs(5),
            mount_points: Vec::new(),
            freeze_deadline: defaults.freeze_deadline,
            limit: defaults.limit,
        }
    }
}

/// What to do with a guest whose file systems cannot be frozen.
#[derive(Debug, Clone)]
pub enum Otherwise {
    /// No view.
    Refuse,
    /// A view as after a loss of power.
    Crash,
    /// A view with the guest's memory, for which it stands still a moment; else one as after a loss of power, or none.
    SaveState { saving: Saving, or_crash: bool },
}

/// How consistent a view is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    pub level: Level,
    /// What made it so good, or why it is no better. For people.
    pub why: String,
    pub frozen_for: Option<Duration>,
    pub hooks: Option<HookReport>,
}

impl Prepared {
    /// Takes the view as consistently as the guest lets it.
    pub async fn take_consistently(mut self, policy: &Policy) -> Result<(LiveView, Reached)> {
        let why = match &policy.agent {
            Err(why) => (*why).to_owned(),
            Ok(agent) => {
                let connected = GuestAgent::connect(&agent.socket, agent.connect_timeout).await;
                let options = FreezeOptions {
                    mount_points: agent.mount_points.clone(),
                    freeze_deadline: agent.freeze_deadline,
                    limit: agent.limit,
                    ..FreezeOptions::new(self.view.directory.frozen_mark())
                };
                let frozen = match connected {
                    Ok(connected) => connected.freeze(options).await,
                    Err(error) => Err(error),
                };
                match frozen {
                    Err(error) => error.to_string(),
                    Ok(frozen) => {
                        let taken = self.take().await;
                        // Before anything else, also if there is no view.
                        let thawed = frozen.thaw().await;
                        return judge(taken?, thawed, &policy.otherwise).await;
                    }
                }
            }
        };
        let reached = |level, why| Reached { level, why, frozen_for: None, hooks: None };
        match &policy.otherwise {
            Otherwise::Refuse => {
                let error =
                    Error::new(ErrorKind::Refused, "take a view with the guest's file systems frozen", why);
                Err(self.undo(error).await)
            }
            Otherwise::Crash => Ok((self.take().await?, reached(Level::Crash, why))),
            Otherwise::SaveState { saving, or_crash } => match self.cut_with_memory(saving).await {
                Ok((cut, memory, pause)) => {
                    let view = self.into_view(cut, Some((memory, pause))).await;
                    Ok((view, reached(Level::SavedState, why)))
                }
                Err(error) if *or_crash => {
                    if let Err(error) = self.begin_again().await {
                        return Err(self.undo(error).await);
                    }
                    Ok((self.take().await?, reached(Level::Crash, format!("{why}; {error}"))))
                }
                Err(error) => Err(self.undo(error).await),
            },
        }
    }
}

async fn judge(view: LiveView, thawed: Result<Thawed>, otherwise: &Otherwise) -> Result<(LiveView, Reached)> {
    let reached = match thawed {
        Ok(Thawed { level, why, frozen_for, hooks, .. }) => {
            Reached { level, why, frozen_for: Some(frozen_for), hooks }
        }
        // The view is good; the guest is a matter for people.
        Err(error) => {
            tracing::warn!(%error, "a guest whose file systems were frozen does not say that it thawed");
            let why = format!("it is not known whether the guest thawed afterwards: {error}");
            Reached { level: Level::FileSystem, why, frozen_for: None, hooks: None }
        }
    };
    if reached.level < Level::FileSystem
        && matches!(otherwise, Otherwise::Refuse | Otherwise::SaveState { or_crash: false, .. })
    {
        let action = "take a view with the guest's file systems frozen";
        let error = Error::new(ErrorKind::Refused, action, reached.why);
        view.abandon().await?;
        return Err(error);
    }
    Ok((view, reached))
}

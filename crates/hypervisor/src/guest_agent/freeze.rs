//! File systems that stand still for a moment.
//!
//! | when | who thaws |
//! |---|---|
//! | the view was taken, or failed | the caller, by [`Frozen::thaw`] |
//! | the caller forgot, returned early, panicked | a child process, when [`Frozen`] is dropped |
//! | this process was killed | the same child, when its pipe breaks |
//! | this process hangs, or was stopped | the same child, when the limit is over |
//! | the freeze itself takes too long | [`GuestAgent::freeze`]: the agent thaws as soon as it is done |
//! | the child was killed too | the next [`GuestAgent::freeze`], by the mark that was left |
//! | the host died | the guest died with it |
//!
//! What remains: an agent that hangs while the guest is frozen. Only the guest's administrator can end that.

use super::client::{GuestAgent, SENTINEL};
use super::report::{self, HookReport};
use crate::dead_man::DeadMan;
use crate::error::{Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// For commands that only look.
const QUICK: Duration = Duration::from_secs(5);

/// What a view of the guest's disks is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As after a loss of power: journals are replayed.
    Crash,
    /// The same, and the guest's memory of that moment is there, too.
    SavedState,
    /// File systems were frozen: everything written is there.
    FileSystem,
    /// Applications had prepared themselves.
    Application,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Crash => "crash-consistent",
            Self::SavedState => "saved-state",
            Self::FileSystem => "file-system-consistent",
            Self::Application => "application-consistent",
        })
    }
}

/// How to freeze.
#[derive(Debug, Clone)]
pub struct FreezeOptions {
    /// Only these, by mount point; all of the guest's if empty.
    pub mount_points: Vec<String>,
    /// How long freezing may take, hooks included.
    pub freeze_deadline: Duration,
    /// How long the file systems may stay frozen, whatever happens here.
    pub limit: Duration,
    pub thaw_deadline: Duration,
    /// Exists while the guest is frozen by us: where a later process finds it.
    pub mark: PathBuf,
}

impl FreezeOptions {
    /// All file systems; 60 s to freeze, 10 s frozen, 60 s to thaw.
    pub fn new(mark: impl Into<PathBuf>) -> Self {
        Self {
            mount_points: Vec::new(),
            freeze_deadline: Duration::from_secs(60),
            limit: Duration::from_secs(10),
            thaw_deadline: Duration::from_secs(60),
            mark: mark.into(),
        }
    }
}

/// A guest whose file systems stand still. Dropped, it is thawed too, but nobody hears how that went.
#[derive(Debug)]
pub struct Frozen {
    agent: GuestAgent,
    dead_man: DeadMan,
    options: FreezeOptions,
    file_systems: u64,
    since: Instant,
    /// The stamp of the last report before this freeze; None if reports cannot be read.
    earlier: Option<String>,
    windows: bool,
}

/// How a freeze went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thawed {
    pub level: Level,
    /// Why it is no better, or by what it is as good as it is.
    pub why: String,
    pub file_systems: u64,
    pub frozen_for: Duration,
    pub hooks: Option<HookReport>,
}

impl GuestAgent {
    /// Freezes the guest's file systems, after its hooks prepared its applications. Whatever fails, the guest is thawed.
    pub async fn freeze(mut self, options: FreezeOptions) -> Result<Frozen> {
        let action = "freeze the guest's file systems";
        let commands = self.info(QUICK).await?.commands;
        for needed in ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"] {
            if !commands.contains(needed) {
                let detail = format!("the agent in the guest does not do `{needed}`, or is told not to");
                return Err(Error::new(ErrorKind::Refused, action, detail));
            }
        }
        if self.is_frozen().await? {
            if !options.mark.exists() {
                let detail = "another program has frozen them: wait for it to thaw them";
                return Err(Error::new(ErrorKind::AlreadyRunning, action, detail));
            }
            tracing::warn!("the guest was left frozen by an earlier run: it is thawed");
            self.thaw_now(options.thaw_deadline).await?;
        }
        let earlier = self.read_report().await.ok().map(|report| report.stamp);
        let windows = commands.contains("guest-get-osinfo") && self.is_windows().await;
        let mark = |error| Error::io(format!("make `{}`", options.mark.display()), error);
        std::fs::File::create(&options.mark).map_err(mark)?;
        let message =
            [&[SENTINEL][..], b"{\"execute\":\"guest-fsfreeze-thaw\",\"id\":\"dead-man\"}\n"].concat();
        let arm = |agent: &Self, limit| {
            DeadMan::arm(agent.descriptor(), &message, limit).map_err(|error| Error::io(action, error))
        };
        let dead_man = arm(&self, options.freeze_deadline + options.limit)?;
        let frozen = if options.mount_points.is_empty() {
            self.execute("guest-fsfreeze-freeze", Value::Null, options.freeze_deadline).await
        } else {
            let list = json!({ "mountpoints": options.mount_points });
            self.execute("guest-fsfreeze-freeze-list", list, options.freeze_deadline).await
        };
        let since = Instant::now();
        let refusal = match frozen.as_ref().map(Value::as_u64) {
            Ok(Some(file_systems)) if file_systems > 0 => {
                // From now on only the limit counts. The first one thaws if there can be no second.
                let limited = arm(&self, options.limit)?;
                dead_man.stand_down();
                let dead_man = limited;
                return Ok(Frozen { agent: self, dead_man, options, file_systems, since, earlier, windows });
            }
            Ok(Some(_)) => Error::new(ErrorKind::Refused, action, "it has none that can be frozen"),
            Ok(None) => Error::new(ErrorKind::Protocol, action, "the agent does not tell how many it froze"),
            Err(error) => Error::new(error.kind(), action, error.detail()),
        };
        // It may still be at it, or have frozen some: the agent takes this up when it is done.
        if let Err(error) = self.thaw_now(options.thaw_deadline).await {
            // Dropped, the child says it once more.
            tracing::warn!(%error, "a guest that could not be frozen does not thaw");
            return Err(refusal);
        }
        dead_man.stand_down();
        let _ = std::fs::remove_file(&options.mark);
        // The agent only knows that some hook failed.
        let report = self.read_report().await.ok().filter(|report| Some(&report.stamp) != earlier.as_ref());
        let failed = report.and_then(|report| report.hooks.into_iter().find(|hook| !hook.frozen));
        match failed {
            None => Err(refusal),
            Some(hook) => {
                let detail = format!("hook `{}` in the guest failed ({})", hook.name, refusal.detail());
                Err(Error::new(refusal.kind(), action, detail))
            }
        }
    }

    async fn is_frozen(&mut self) -> Result<bool> {
        Ok(self.execute("guest-fsfreeze-status", Value::Null, QUICK).await? == "frozen")
    }

    async fn thaw_now(&mut self, deadline: Duration) -> Result<u64> {
        let thawed = self.execute("guest-fsfreeze-thaw", Value::Null, deadline).await?;
        Ok(thawed.as_u64().unwrap_or(0))
    }

    async fn is_windows(&mut self) -> bool {
        let answer = self.execute("guest-get-osinfo", Value::Null, QUICK).await;
        answer.is_ok_and(|info| info["id"] == "mswindows")
    }

    async fn read_report(&mut self) -> Result<HookReport> {
        match self.read_file(report::PATH, report::LONGEST, QUICK).await {
            Ok(bytes) => Ok(HookReport::parse(&bytes)),
            // The hook has not run since the guest booted.
            Err(error) if error.kind() == ErrorKind::Refused && error.detail().contains("No such file") => {
                Ok(HookReport::default())
            }
            Err(error) => Err(error),
        }
    }
}

impl Frozen {
    pub fn file_systems(&self) -> u64 {
        self.file_systems
    }

    /// Thaws, and tells what the view is good for that was taken meanwhile.
    pub async fn thaw(self) -> Result<Thawed> {
        let Self { mut agent, dead_man, options, file_systems, since, earlier, windows } = self;
        // If this fails, the child is dropped and says it once more.
        let thawed = agent.thaw_now(options.thaw_deadline).await?;
        let frozen_for = since.elapsed();
        dead_man.stand_down();
        let _ = std::fs::remove_file(&options.mark);
        let report = agent.read_report().await;
        let (level, why, hooks) = if thawed == 0 {
            let why = format!(
                "the file systems were thawed before the view was taken: the guest does so by itself, or {} s were over",
                options.limit.as_secs()
            );
            (Level::Crash, why, report.ok())
        } else if windows {
            (
                Level::Application,
                "Windows' own shadow copy service prepared its applications".to_owned(),
                None,
            )
        } else {
            judge_hooks(earlier.as_deref(), report)
        };
        Ok(Thawed { level, why, file_systems, frozen_for, hooks })
    }
}

fn judge_hooks(earlier: Option<&str>, report: Result<HookReport>) -> (Level, String, Option<HookReport>) {
    let no_better = |why: String, hooks| (Level::FileSystem, why, hooks);
    let report = match report {
        Err(error) => {
            let why = format!("what the guest's hooks did cannot be read: {}", error.detail());
            return no_better(why, None);
        }
        Ok(report) => report,
    };
    // Without an earlier one, this may be of any freeze.
    if report.stamp.is_empty() || earlier.is_none_or(|earlier| earlier == report.stamp) {
        let why = "the guest's agent ran no hook that reports: install packaging/guest in it".to_owned();
        return no_better(why, None);
    }
    if report.hooks.is_empty() {
        return no_better("the guest has no hooks for its applications".to_owned(), Some(report));
    }
    if let Some(failed) = report.hooks.iter().find(|hook| !hook.frozen) {
        return no_better(format!("hook `{}` failed", failed.name), Some(report));
    }
    (Level::Application, format!("hooks: {report}"), Some(report))
}

#[cfg(test)]
mod tests {
    use super::super::client::tests::{SECOND, Script};
    use super::*;
    use data_encoding::BASE64;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};

    /// An agent with two file systems and a report.
    #[derive(Clone, Default)]
    struct Guest {
        frozen: Arc<AtomicBool>,
        report: Arc<Mutex<String>>,
        /// What a freeze writes into the report, or why it fails.
        next: Arc<Mutex<Option<Result<String, String>>>>,
        never_answers_freeze: bool,
    }

    impl Guest {
        fn script(&self) -> Script {
            let guest = self.clone();
            Script::new(move |name, arguments| guest.answer(name, arguments))
        }

        fn answer(&self, name: &str, _: &Value) -> Option<Value> {
            let guest = self;
            let value = match name {
                "guest-info" => {
                    let names = [
                        "guest-fsfreeze-freeze",
                        "guest-fsfreeze-thaw",
                        "guest-fsfreeze-status",
                        "guest-file-open",
                    ];
                    let all = names.map(|name| json!({ "name": name, "enabled": true }));
                    json!({ "version": "10", "supported_commands": all })
                }
                "guest-fsfreeze-status" if guest.frozen.load(Ordering::SeqCst) => json!("frozen"),
                "guest-fsfreeze-status" => json!("thawed"),
                "guest-fsfreeze-freeze" => {
                    match guest.next.lock().unwrap().take() {
                        Some(Err(why)) => return Some(json!({ "error": { "desc": why } })),
                        Some(Ok(report)) => *guest.report.lock().unwrap() = report,
                        None => (),
                    }
                    guest.frozen.store(true, Ordering::SeqCst);
                    if guest.never_answers_freeze {
                        return None;
                    }
                    json!(2)
                }
                "guest-fsfreeze-thaw" => {
                    json!(if guest.frozen.swap(false, Ordering::SeqCst) { 2 } else { 0 })
                }
                "guest-file-open" if guest.report.lock().unwrap().is_empty() => {
                    let why = "failed to open file: No such file or directory";
                    return Some(json!({ "error": { "desc": why } }));
                }
                "guest-file-open" => json!(7),
                "guest-file-read" => {
                    let text = guest.report.lock().unwrap().clone();
                    json!({ "count": text.len(), "buf-b64": BASE64.encode(text.as_bytes()), "eof": true })
                }
                _ => json!({}),
            };
            Some(json!({ "return": value }))
        }

        fn is_frozen(&self) -> bool {
            self.frozen.load(Ordering::SeqCst)
        }

        /// Waits until somebody thawed it.
        async fn thawed(&self) {
            let thawed = async {
                while self.is_frozen() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(60), thawed).await.expect("it stays frozen");
        }
    }

    struct Bench {
        guest: Guest,
        script: Script,
        dir: tempfile::TempDir,
    }

    impl Bench {
        fn new(guest: Guest) -> Self {
            Self { script: guest.script(), guest, dir: tempfile::tempdir().unwrap() }
        }

        fn options(&self) -> FreezeOptions {
            FreezeOptions::new(self.dir.path().join("frozen"))
        }

        async fn freeze(&self, options: FreezeOptions) -> Result<Frozen> {
            GuestAgent::connect(&self.script.socket, SECOND).await.unwrap().freeze(options).await
        }

        async fn level(&self) -> Thawed {
            self.freeze(self.options()).await.unwrap().thaw().await.unwrap()
        }
    }

    #[tokio::test]
    async fn the_level_is_what_the_hooks_of_this_very_freeze_report() {
        let bench = Bench::new(Guest::default());
        let set = |report: &str| *bench.guest.next.lock().unwrap() = Some(Ok(report.to_owned()));
        let thawed = bench.level().await;
        assert_eq!((thawed.level, thawed.file_systems), (Level::FileSystem, 2));
        assert!(thawed.why.contains("ran no hook that reports"), "{}", thawed.why);
        set("stamp 1\nfreeze 50-postgresql ok\nthaw 50-postgresql ok\n");
        let thawed = bench.level().await;
        assert_eq!((thawed.level, thawed.why.as_str()), (Level::Application, "hooks: 50-postgresql"));
        // The report is an old one: this freeze ran no hook.
        assert_eq!(bench.level().await.level, Level::FileSystem);
        set("stamp 2\n");
        let thawed = bench.level().await;
        assert_eq!(
            (thawed.level, thawed.why.as_str()),
            (Level::FileSystem, "the guest has no hooks for its applications")
        );
        assert!(!bench.options().mark.exists());
    }

    #[tokio::test]
    async fn a_hook_that_fails_is_told_and_the_guest_is_thawed() {
        let bench = Bench::new(Guest::default());
        let why = "command \"/etc/qemu/fsfreeze-hook freeze\" failed with status 1";
        *bench.guest.next.lock().unwrap() = Some(Err(why.to_owned()));
        let error = bench.freeze(bench.options()).await.unwrap_err();
        assert_eq!(error.to_string(), format!("cannot freeze the guest's file systems: {why}"));
        assert!(bench.script.heard().contains(&"guest-fsfreeze-thaw".to_owned()));
        assert!(!bench.options().mark.exists());
    }

    #[tokio::test]
    async fn the_hook_that_failed_is_named() {
        let bench = Bench::new(Guest::default());
        *bench.guest.report.lock().unwrap() = "stamp 1\nfreeze 50-db failed\n".into();
        *bench.guest.next.lock().unwrap() = Some(Err("status 1".into()));
        let error = bench.freeze(bench.options()).await.unwrap_err();
        assert_eq!(error.detail(), "status 1", "that report is of an earlier freeze");
        let guest = bench.guest.clone();
        let script = Script::new(move |name, arguments| {
            if name == "guest-fsfreeze-freeze" {
                *guest.report.lock().unwrap() = "stamp 2\nfreeze 50-db failed\n".into();
                return Some(json!({ "error": { "desc": "status 1" } }));
            }
            guest.answer(name, arguments)
        });
        let agent = GuestAgent::connect(&script.socket, SECOND).await.unwrap();
        let error = agent.freeze(bench.options()).await.unwrap_err();
        assert_eq!(error.detail(), "hook `50-db` in the guest failed (status 1)");
    }

    #[tokio::test]
    async fn a_freeze_that_takes_too_long_is_given_up_and_thawed() {
        let bench = Bench::new(Guest { never_answers_freeze: true, ..Guest::default() });
        let options = FreezeOptions { freeze_deadline: Duration::from_millis(100), ..bench.options() };
        let error = bench.freeze(options).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Deadline);
        assert!(!bench.guest.is_frozen());
    }

    #[tokio::test]
    async fn a_frozen_guest_that_is_forgotten_is_thawed() {
        let bench = Bench::new(Guest::default());
        let frozen = bench.freeze(bench.options()).await.unwrap();
        assert!(bench.guest.is_frozen());
        drop(frozen);
        bench.guest.thawed().await;
    }

    #[tokio::test]
    async fn a_guest_stays_frozen_for_a_limited_time_and_a_view_after_that_is_only_crash_consistent() {
        let bench = Bench::new(Guest::default());
        let options =
            FreezeOptions { freeze_deadline: SECOND, limit: Duration::from_millis(50), ..bench.options() };
        let frozen = bench.freeze(options).await.unwrap();
        bench.guest.thawed().await;
        let thawed = frozen.thaw().await.unwrap();
        assert_eq!(thawed.level, Level::Crash);
        assert!(thawed.why.starts_with("the file systems were thawed before"), "{}", thawed.why);
    }

    #[tokio::test]
    async fn what_others_froze_is_theirs_and_what_we_left_is_thawed() {
        let bench = Bench::new(Guest::default());
        bench.guest.frozen.store(true, Ordering::SeqCst);
        let error = bench.freeze(bench.options()).await.unwrap_err();
        assert!(bench.guest.is_frozen() && error.to_string().contains("another program"), "{error}");
        std::fs::File::create(bench.options().mark).unwrap();
        bench.level().await;
        assert!(!bench.guest.is_frozen());
    }
}

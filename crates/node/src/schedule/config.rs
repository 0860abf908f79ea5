//! A schedule as the configuration file has it.

use super::plan::{Calendar, Window};
use rempart_api::MemoryRequest;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Which machines, of those that this node leads when it is time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Machines {
    /// `"all"`.
    All(Every),
    Named(Vec<String>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Every {
    All,
}

/// After which runs somebody is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Notify {
    Always,
    #[default]
    Failure,
    Never,
}

/// As `rempart backup --consistency` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    Application,
    Crash,
    SavedState,
}

/// As `rempart backup --else` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Enough {
    Crash,
    SavedState,
    Nothing,
}

/// One `[[backup]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupSection {
    pub name: String,
    /// As `rempart backup --repo` takes it.
    pub repository: String,
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    #[serde(default)]
    pub passphrase_file: Option<PathBuf>,
    /// Of a bucket.
    #[serde(default)]
    pub credentials_file: Option<PathBuf>,
    #[serde(default)]
    pub cache_dir: Option<PathBuf>,
    pub machines: Machines,
    #[serde(default)]
    pub exclude: Vec<String>,
    /// The monitor of a QEMU that is not Rempart's; its machine is the one that is named.
    #[serde(default)]
    pub qmp: Option<PathBuf>,
    /// The host's end of the guest agent's channel there.
    #[serde(default)]
    pub agent: Option<PathBuf>,
    /// Images and block devices that nobody writes to, as the one machine that is named.
    #[serde(default)]
    pub disks: Vec<PathBuf>,
    /// Of the images.
    #[serde(default)]
    pub format: Option<String>,
    /// How consistent the disks are to be with what the guest is doing.
    #[serde(default)]
    pub consistency: Option<Wanted>,
    /// What is good enough where the guest's agent does not freeze its file systems.
    #[serde(default, rename = "else")]
    pub otherwise: Option<Enough>,
    /// As `rempart backup --longest-pause` takes it, where the guest's memory is asked for.
    #[serde(default)]
    pub longest_pause_s: Option<u64>,
    /// In cron's form.
    pub schedule: String,
    /// This machine's without it.
    #[serde(default)]
    pub time_zone: Option<String>,
    /// Machines are begun in it only.
    #[serde(default)]
    pub window: Option<String>,
    /// Whether what was due while no daemon ran is run once as soon as one does.
    #[serde(default = "yes")]
    pub catch_up: bool,
    /// Tries of a machine after the first.
    #[serde(default = "two")]
    pub retries: u32,
    #[serde(default = "five_minutes")]
    pub retry_delay_s: u64,
    /// Machines that are backed up at once.
    #[serde(default = "one")]
    pub parallel: usize,
    /// A run that takes longer is ended; 0: none is.
    #[serde(default)]
    pub time_limit_s: u64,
    /// Sent to the repository, of each machine that is backed up; 0: as fast as it goes.
    #[serde(default)]
    pub limit_bytes_per_s: u64,
    /// Read each new point again, and compare it.
    #[serde(default)]
    pub verify: bool,
    /// Where each new point is copied to.
    #[serde(default)]
    pub copy: Option<CopySection>,
    /// Which points of the machines that were backed up are kept.
    #[serde(default)]
    pub retain: Option<RetainSection>,
    /// Remove what no point has any more, at the end of a run that forgot points.
    #[serde(default)]
    pub gc: bool,
    #[serde(default)]
    pub notify: Notify,
}

/// A second repository, as the options of `rempart copy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopySection {
    pub repository: String,
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    #[serde(default)]
    pub passphrase_file: Option<PathBuf>,
    #[serde(default)]
    pub credentials_file: Option<PathBuf>,
    /// Sent to it; 0: as fast as it goes.
    #[serde(default)]
    pub limit_bytes_per_s: u64,
}

/// As the options of `rempart retain`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetainSection {
    pub keep_last: u64,
    pub keep_hourly: u64,
    pub keep_daily: u64,
    pub keep_weekly: u64,
    pub keep_monthly: u64,
    pub keep_yearly: u64,
    pub keep_within: Option<String>,
}

/// What is wrong, and with which key.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {what}")]
pub struct Wrong {
    pub key: &'static str,
    what: String,
}

impl Wrong {
    fn new(key: &'static str, what: impl Into<String>) -> Wrong {
        Wrong { key, what: what.into() }
    }
}

fn yes() -> bool {
    true
}

fn one() -> usize {
    1
}

fn two() -> u32 {
    2
}

fn five_minutes() -> u64 {
    300
}

impl RetainSection {
    fn arguments(&self) -> Vec<OsString> {
        let RetainSection {
            keep_last,
            keep_hourly,
            keep_daily,
            keep_weekly,
            keep_monthly,
            keep_yearly,
            keep_within,
        } = self;
        let numbers = [
            ("--keep-last", keep_last),
            ("--keep-hourly", keep_hourly),
            ("--keep-daily", keep_daily),
            ("--keep-weekly", keep_weekly),
            ("--keep-monthly", keep_monthly),
            ("--keep-yearly", keep_yearly),
        ];
        let numbers = numbers.into_iter().filter(|(_, number)| **number > 0);
        let mut arguments: Vec<OsString> =
            numbers.flat_map(|(option, number)| [option.into(), number.to_string().into()]).collect();
        if let Some(within) = keep_within {
            arguments.extend(["--keep-within".into(), within.into()]);
        }
        arguments
    }
}

/// A repository, and the files that open it.
struct Place<'a> {
    repository: &'a str,
    key_file: Option<&'a Path>,
    passphrase_file: Option<&'a Path>,
    credentials_file: Option<&'a Path>,
}

impl<'a> Place<'a> {
    fn check(&self) -> Result<(), Wrong> {
        self.opened_by()?;
        check_absolute("key_file", self.key_file)?;
        check_absolute("passphrase_file", self.passphrase_file)?;
        check_absolute("credentials_file", self.credentials_file)?;
        if self.repository.contains("://") || Path::new(self.repository).is_absolute() {
            return Ok(());
        }
        Err(Wrong::new("repository", format!("`{}` is no URL and no absolute path", self.repository)))
    }

    /// An option without its dashes, and its file.
    fn opened_by(&self) -> Result<(&'static str, &'a Path), Wrong> {
        match (self.key_file, self.passphrase_file) {
            (Some(file), None) => Ok(("key-file", file)),
            (None, Some(file)) => Ok(("passphrase-file", file)),
            _ => Err(Wrong::new("key_file", "one of `key_file` and `passphrase_file` opens the repository")),
        }
    }

    /// Arguments that name it and open it; `prefix` is in front of the other options' names.
    fn arguments(&self, named_by: &str, prefix: &str) -> Vec<OsString> {
        let (option, file) = self.opened_by().expect("it was checked");
        let mut arguments: Vec<OsString> = vec![named_by.into(), self.repository.into()];
        arguments.extend([format!("--{prefix}{option}").into(), file.into()]);
        if let Some(file) = self.credentials_file {
            arguments.extend([format!("--{prefix}credentials").into(), file.into()]);
        }
        arguments
    }
}

impl CopySection {
    fn place(&self) -> Place<'_> {
        Place {
            repository: &self.repository,
            key_file: self.key_file.as_deref(),
            passphrase_file: self.passphrase_file.as_deref(),
            credentials_file: self.credentials_file.as_deref(),
        }
    }
}

fn check_absolute(key: &'static str, path: Option<&Path>) -> Result<(), Wrong> {
    match path.filter(|path| !path.is_absolute()) {
        Some(path) => Err(Wrong::new(key, format!("`{}` is not an absolute path", path.display()))),
        None => Ok(()),
    }
}

impl BackupSection {
    /// What is wrong with it by itself, key by key.
    pub fn check(&self) -> Result<(), Wrong> {
        crate::config::check_name(&self.name).map_err(|e| Wrong::new("name", e))?;
        self.calendar()?;
        self.place().check()?;
        if let Some(copy) = &self.copy {
            copy.place()
                .check()
                .map_err(|Wrong { key, what }| Wrong::new("copy", format!("{key}: {what}")))?;
            if copy.repository == self.repository {
                return Err(Wrong::new("copy", "repository: it is the one that is copied from"));
            }
        }
        for (key, path) in [
            ("cache_dir", &self.cache_dir),
            ("qmp", &self.qmp),
            ("agent", &self.agent),
            ("disks", &self.disks.iter().find(|path| !path.is_absolute()).cloned()),
        ] {
            check_absolute(key, path.as_deref())?;
        }
        if let Machines::Named(names) = &self.machines {
            for name in names {
                crate::config::check_name(name).map_err(|e| Wrong::new("machines", e))?;
            }
            if names.is_empty() {
                return Err(Wrong::new("machines", "it names none; `\"all\"` means all"));
            }
        }
        let is_one = matches!(&self.machines, Machines::Named(names) if names.len() == 1);
        if self.is_foreign() && !is_one {
            let what = "with `qmp` or `disks` it names the one machine that they belong to";
            return Err(Wrong::new("machines", what));
        }
        let is_live = self.disks.is_empty();
        let keeps_memory =
            self.consistency == Some(Wanted::SavedState) || self.otherwise == Some(Enough::SavedState);
        let saved = "`saved-state` in `consistency` or `else`";
        for (key, is_there, needs, has) in [
            ("qmp", self.qmp.is_some(), "no `disks`", is_live),
            ("agent", self.agent.is_some(), "`qmp`", self.qmp.is_some()),
            ("format", self.format.is_some(), "`disks`", !is_live),
            ("consistency", self.consistency.is_some(), "no `disks`", is_live),
            ("else", self.otherwise.is_some(), "no `disks`", is_live),
            ("longest_pause_s", self.longest_pause_s.is_some(), saved, keeps_memory),
        ] {
            if is_there && !has {
                return Err(Wrong::new(key, format!("it goes with {needs}")));
            }
        }
        if self.qmp.is_some() && self.agent.is_none() && self.consistency == Some(Wanted::Application) {
            let what = "`application` needs the guest's agent: `agent` tells where it is";
            return Err(Wrong::new("consistency", what));
        }
        if let Some(seconds) =
            self.longest_pause_s.filter(|seconds| !MemoryRequest::PAUSES_S.contains(seconds))
        {
            let (least, most) = MemoryRequest::PAUSES_S.into_inner();
            let what = format!("{seconds} is not from {least} to {most}");
            return Err(Wrong::new("longest_pause_s", what));
        }
        if self.parallel == 0 {
            return Err(Wrong::new("parallel", "it must be at least 1"));
        }
        if self.retain.as_ref().is_some_and(|retain| retain.arguments().is_empty()) {
            return Err(Wrong::new("retain", "it keeps nothing; leave it out to keep everything"));
        }
        Ok(())
    }

    /// When, and in which window.
    pub fn calendar(&self) -> Result<(Calendar, Option<Window>), Wrong> {
        let zone = self.time_zone.as_deref();
        let calendar = Calendar::parse(&self.schedule, zone).map_err(|e| Wrong::new("schedule", e))?;
        let window = self.window.as_deref().map(Window::parse).transpose();
        Ok((calendar, window.map_err(|e| Wrong::new("window", e))?))
    }

    fn place(&self) -> Place<'_> {
        Place {
            repository: &self.repository,
            key_file: self.key_file.as_deref(),
            passphrase_file: self.passphrase_file.as_deref(),
            credentials_file: self.credentials_file.as_deref(),
        }
    }

    /// Arguments of a command of the program on the repository.
    pub fn arguments(&self, command: &[&str]) -> Vec<OsString> {
        self.arguments_on(&self.place(), command)
    }

    fn arguments_on(&self, place: &Place<'_>, command: &[&str]) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = command.iter().map(|word| word.into()).collect();
        arguments.extend(place.arguments("--repo", ""));
        if let Some(path) = &self.cache_dir {
            arguments.extend(["--cache-dir".into(), path.into()]);
        }
        arguments
    }

    /// Whether its machine is none of Rempart's: whoever has the schedule backs it up.
    pub fn is_foreign(&self) -> bool {
        self.qmp.is_some() || !self.disks.is_empty()
    }

    /// Arguments that back one machine up.
    pub fn backup_arguments(&self, vm: &str) -> Vec<OsString> {
        let mut arguments = self.arguments(&["backup", vm]);
        let paths = self.disks.iter().map(|disk| ("--disk", disk));
        let paths = paths.chain(
            [("--qmp", &self.qmp), ("--agent", &self.agent)]
                .into_iter()
                .filter_map(|(option, path)| path.as_ref().map(|path| (option, path))),
        );
        arguments.extend(paths.flat_map(|(option, path)| [option.into(), path.into()]));
        if let Some(format) = &self.format {
            arguments.extend(["--format".into(), format.into()]);
        }
        let words = [
            (
                "--consistency",
                self.consistency.map(|wanted| match wanted {
                    Wanted::Application => "application",
                    Wanted::Crash => "crash",
                    Wanted::SavedState => "saved-state",
                }),
            ),
            (
                "--else",
                self.otherwise.map(|enough| match enough {
                    Enough::Crash => "crash",
                    Enough::SavedState => "saved-state",
                    Enough::Nothing => "nothing",
                }),
            ),
        ];
        for (option, word) in words {
            arguments.extend(word.iter().flat_map(|word| [option.into(), word.into()]));
        }
        if let Some(seconds) = self.longest_pause_s {
            arguments.extend(["--longest-pause".into(), seconds.to_string().into()]);
        }
        if self.limit_bytes_per_s > 0 {
            arguments.extend(["--bandwidth".into(), self.limit_bytes_per_s.to_string().into()]);
        }
        arguments
    }

    /// Arguments that copy a point; `None` if none is.
    pub fn copy_arguments(&self, point: &str) -> Option<Vec<OsString>> {
        let copy = self.copy.as_ref()?;
        let mut arguments = self.arguments(&["copy", point]);
        arguments.extend(copy.place().arguments("--to", "to-"));
        if copy.limit_bytes_per_s > 0 {
            arguments.extend(["--bandwidth".into(), copy.limit_bytes_per_s.to_string().into()]);
        }
        Some(arguments)
    }

    /// Arguments that show the second repository; `None` if there is none.
    pub fn show_copy_arguments(&self) -> Option<Vec<OsString>> {
        self.copy.as_ref().map(|copy| self.arguments_on(&copy.place(), &["repo", "show"]))
    }

    /// Arguments that forget points of these machines; `None` if all are kept.
    pub fn retain_arguments(&self, vms: &[&str]) -> Option<Vec<OsString>> {
        let rule = self.retain.as_ref()?.arguments();
        let mut arguments = self.arguments(&["retain"]);
        arguments.extend(rule);
        if let Some(zone) = &self.time_zone {
            arguments.extend(["--time-zone".into(), zone.into()]);
        }
        arguments.extend(vms.iter().map(|vm| vm.into()));
        Some(arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "name = 'nightly'\nrepository = '/srv/backups'\nkey_file = '/root/key'\n\
                         machines = 'all'\nschedule = '15 2 * * *'\n";

    fn parse(text: &str) -> Result<BackupSection, String> {
        let section: BackupSection = toml::from_str(text).map_err(|e| e.to_string())?;
        section.check().map(|()| section).map_err(|wrong| wrong.to_string())
    }

    #[test]
    fn a_plain_schedule_has_its_defaults() {
        let plain = parse(PLAIN).unwrap();
        assert_eq!(plain.machines, Machines::All(Every::All));
        assert_eq!((plain.catch_up, plain.retries, plain.parallel), (true, 2, 1));
        assert_eq!(plain.notify, Notify::Failure);
        let arguments = ["backup", "shop", "--repo", "/srv/backups", "--key-file", "/root/key"];
        assert_eq!(plain.backup_arguments("shop"), arguments);
        assert_eq!(plain.time_limit_s, 0);
        let strict = parse(&format!("{PLAIN}consistency = 'application'\nelse = 'nothing'")).unwrap();
        let asked = ["--consistency", "application", "--else", "nothing"];
        assert_eq!(strict.backup_arguments("shop")[6..], asked);
        assert_eq!(plain.retain_arguments(&["shop"]), None);
    }

    #[test]
    fn all_there_is_is_said_to_the_program() {
        let text = format!(
            "{PLAIN}credentials_file = '/root/bucket'\ncache_dir = '/c'\ntime_zone = 'Europe/Zurich'\n\
             retain = {{ keep_last = 3, keep_daily = 7, keep_within = '14d' }}\n"
        );
        let section = parse(&text).unwrap();
        let retain = section.retain_arguments(&["shop", "db"]).unwrap();
        let retain: Vec<_> = retain.iter().map(|argument| argument.to_str().unwrap()).collect();
        assert_eq!(
            retain.join(" "),
            "retain --repo /srv/backups --key-file /root/key --credentials /root/bucket --cache-dir /c --keep-last 3 \
             --keep-daily 7 --keep-within 14d --time-zone Europe/Zurich shop db"
        );
    }

    #[test]
    fn the_second_repository_has_keys_of_its_own() {
        let parsed = |copy: &str| parse(&format!("{PLAIN}copy = {{ {copy} }}\n"));
        let section = parsed(
            "repository = 's3://centre/vms', passphrase_file = '/root/p', credentials_file = '/root/s3', \
             limit_bytes_per_s = 250000",
        );
        let section = section.unwrap();
        let joined = |arguments: Option<Vec<OsString>>| arguments.unwrap().join(" ".as_ref());
        assert_eq!(
            joined(section.copy_arguments("shop@7")).to_str().unwrap(),
            "copy shop@7 --repo /srv/backups --key-file /root/key --to s3://centre/vms --to-passphrase-file /root/p \
             --to-credentials /root/s3 --bandwidth 250000"
        );
        assert_eq!(
            joined(section.show_copy_arguments()).to_str().unwrap(),
            "repo show --repo s3://centre/vms --passphrase-file /root/p --credentials /root/s3"
        );
        assert_eq!(parse(PLAIN).unwrap().copy_arguments("shop@7"), None);
        for (wrong, why) in [
            (
                "repository = '/c'",
                "copy: key_file: one of `key_file` and `passphrase_file` opens the repository",
            ),
            ("repository = 'c', key_file = '/k'", "copy: repository: `c` is no URL and no absolute path"),
            ("repository = '/c', key_file = 'k'", "copy: key_file: `k` is not an absolute path"),
            (
                "repository = '/srv/backups', key_file = '/k'",
                "copy: repository: it is the one that is copied from",
            ),
        ] {
            assert_eq!(parsed(wrong).unwrap_err(), why);
        }
        parsed("repository = '/c', key_file = '/k', bandwidth = 1").expect_err("unknown");
    }

    #[test]
    fn machines_that_are_not_ours_are_named_one_by_one() {
        let plain = PLAIN.replace("'all'", "['shop']");
        let backup = |more: &str| {
            let section = parse(&format!("{plain}{more}")).unwrap();
            assert!(section.is_foreign());
            let arguments = section.backup_arguments("shop");
            let arguments: Vec<_> =
                arguments[6..].iter().map(|argument| argument.to_str().unwrap()).collect();
            arguments.join(" ")
        };
        assert_eq!(
            backup("qmp = '/run/q'\nagent = '/run/a'\nlimit_bytes_per_s = 7"),
            "--qmp /run/q --agent /run/a --bandwidth 7"
        );
        assert_eq!(backup("disks = ['/a', '/b']\nformat = 'qcow2'"), "--disk /a --disk /b --format qcow2");
        let saved = "qmp = '/run/q'\nconsistency = 'saved-state'";
        assert_eq!(backup(saved), "--qmp /run/q --consistency saved-state");
        let application = "qmp = '/q'\nagent = '/a'\nconsistency = 'application'\nelse = 'saved-state'";
        let said = "--qmp /q --agent /a --consistency application --else saved-state";
        assert_eq!(backup(application), said);
        let ours = parse(&format!("{plain}consistency = 'saved-state'")).unwrap();
        assert!(!ours.is_foreign());
        assert!(ours.backup_arguments("shop").ends_with(&["--consistency".into(), "saved-state".into()]));
        for wrong in [
            "qmp = 'q'",
            "agent = '/run/a'",
            "disks = ['a']",
            "qmp = '/q'\ndisks = ['/a']",
            "format = 'raw'",
            "qmp = '/q'\nconsistency = 'application'",
            "disks = ['/a']\nconsistency = 'crash'",
            "disks = ['/a']\nelse = 'crash'",
        ] {
            parse(&format!("{plain}{wrong}")).expect_err(wrong);
        }
        parse(&format!("{PLAIN}qmp = '/run/q'")).expect_err("all");
    }

    #[test]
    fn how_long_a_guest_may_stand_still_is_said_where_its_memory_is_kept() {
        for kept in ["consistency = 'saved-state'", "consistency = 'application'\nelse = 'saved-state'"] {
            let section = parse(&format!("{PLAIN}{kept}\nlongest_pause_s = 600")).unwrap();
            assert!(section.backup_arguments("shop").ends_with(&["--longest-pause".into(), "600".into()]));
            for wrong in ["0", "601"] {
                let refused = parse(&format!("{PLAIN}{kept}\nlongest_pause_s = {wrong}")).unwrap_err();
                assert_eq!(refused, format!("longest_pause_s: {wrong} is not from 1 to 600"));
            }
            for wrong in ["-1", "'10s'", "1.5"] {
                parse(&format!("{PLAIN}{kept}\nlongest_pause_s = {wrong}")).expect_err(wrong);
            }
            let without = parse(&format!("{PLAIN}{kept}")).unwrap().backup_arguments("shop");
            assert!(!without.contains(&"--longest-pause".into()));
        }
        for more in ["", "consistency = 'crash'", "consistency = 'application'\nelse = 'nothing'"] {
            let refused = parse(&format!("{PLAIN}{more}\nlongest_pause_s = 60")).unwrap_err();
            assert_eq!(refused, "longest_pause_s: it goes with `saved-state` in `consistency` or `else`");
        }
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        for (from, to) in [
            ("'nightly'", "'night ly'"),
            ("'/srv/backups'", "'backups'"),
            ("key_file = '/root/key'", ""),
            ("key_file = '/root/key'", "key_file = 'key'"),
            ("machines", "passphrase_file = '/root/p'\nmachines"),
            ("'all'", "'some'"),
            ("'all'", "[]"),
            ("'all'", "['Shop']"),
            ("'15 2 * * *'", "'daily'"),
            ("machines", "time_zone = 'Mars'\nmachines"),
            ("machines", "window = '22-6'\nmachines"),
            ("machines", "parallel = 0\nmachines"),
            ("machines", "retain = {}\nmachines"),
            ("machines", "retain = { keep_secret = 1 }\nmachines"),
            ("machines", "notify = 'sometimes'\nmachines"),
            ("machines", "unknown = 1\nmachines"),
            ("machines", "time_limit_s = '6h'\nmachines"),
            ("machines", "time_limit_s = -1\nmachines"),
            ("machines", "consistency = 'perfect'\nmachines"),
            ("machines", "else = 'application'\nmachines"),
        ] {
            assert!(PLAIN.contains(from), "{from}");
            parse(&PLAIN.replacen(from, to, 1)).expect_err(to);
        }
    }
}

//! The configuration files, parsed once into types that cannot be wrong.

use crate::schedule::BackupSection;
use rempart_notify::{MailConfig, WebhookConfig};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the program looks when nothing else is said.
pub const DEFAULT_CONFIG: &str = "/etc/rempart/node.toml";

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read `{path}`")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("`{path}` is not a valid configuration")]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("`{path}`, line {line}: {what}")]
    Value { path: PathBuf, line: usize, what: String },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    pub node: NodeSection,
    #[serde(default)]
    pub timing: TimingSection,
    #[serde(default)]
    pub replication: ReplicationSection,
    #[serde(default)]
    pub vm: VmSection,
    #[serde(default)]
    pub nbd: NbdSection,
    #[serde(default)]
    pub metrics: MetricsSection,
    #[serde(default, rename = "backup")]
    pub backups: Vec<BackupSection>,
    #[serde(default)]
    pub mail: Option<MailConfig>,
    #[serde(default)]
    pub webhook: Option<WebhookConfig>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSection {
    pub name: String,
    pub listen: SocketAddr,
    /// What peers dial, when it is not `listen`.
    #[serde(default)]
    pub advertise: Option<String>,
    pub data_dir: PathBuf,
    pub run_dir: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimingSection {
    pub beacon_interval_ms: u64,
    pub peer_deadline_ms: u64,
    pub suspect_after_ms: u64,
    pub lease_ms: u64,
    pub guard_stop_ms: u64,
    pub register_deadline_ms: u64,
}

impl Default for TimingSection {
    fn default() -> TimingSection {
        TimingSection {
            beacon_interval_ms: 250,
            peer_deadline_ms: 1500,
            suspect_after_ms: 2000,
            lease_ms: 3000,
            guard_stop_ms: 1000,
            register_deadline_ms: 1000,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    #[default]
    Off,
    /// Where a sample shows that it pays.
    Auto,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReplicationSection {
    /// 0 means as fast as it goes.
    pub resync_limit_bytes_per_s: u64,
    pub compression: Compression,
    /// Journal kept per virtual machine, so that a peer catches up from the log.
    pub journal_bytes: u64,
    /// Log bytes held in memory until the image has them; past it guest writes wait.
    pub window_bytes: u64,
}

impl Default for ReplicationSection {
    fn default() -> ReplicationSection {
        ReplicationSection {
            resync_limit_bytes_per_s: 0,
            compression: Compression::Off,
            journal_bytes: 256 << 20,
            window_bytes: 64 << 20,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AcceleratorChoice {
    /// KVM if it really runs a guest, else TCG.
    #[default]
    Auto,
    Kvm,
    Tcg,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmSection {
    pub accelerator: AcceleratorChoice,
    pub qemu: PathBuf,
    /// How often QEMU is restarted here before the virtual machine moves to the peer.
    pub restarts: u32,
    /// How long a guest may take to shut down when it is asked to.
    pub shutdown_timeout_s: u64,
    /// A hardware watchdog that the guard pets, such as /dev/watchdog.
    pub watchdog: Option<PathBuf>,
    /// Close a machine's network by a kernel timer when nobody renews its lease. Needs nftables.
    pub network_gate: bool,
}

impl Default for VmSection {
    fn default() -> VmSection {
        VmSection {
            accelerator: AcceleratorChoice::Auto,
            qemu: PathBuf::from("qemu-system-x86_64"),
            restarts: 3,
            shutdown_timeout_s: 90,
            watchdog: None,
            network_gate: true,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NbdSection {
    /// Disks over TCP, with TLS always, for holders of a node's certificate.
    pub listen: Option<SocketAddr>,
    /// Whether they may be written: beside a running guest that is its ruin.
    pub writable: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsSection {
    /// Prometheus metrics over plain HTTP. Loopback only: the endpoint is not authenticated.
    pub listen: Option<SocketAddr>,
}

impl NodeConfig {
    pub fn load(path: &Path) -> Result<NodeConfig, ConfigError> {
        let (text, config): (String, NodeConfig) = read(path)?;
        let wrong = |at: &[&str], what: String| ConfigError::Value {
            path: path.to_owned(),
            line: line_of(&text, at),
            what,
        };
        check_name(&config.node.name).map_err(|e| wrong(&["node", "name"], format!("node.name: {e}")))?;
        for (key, dir) in [("data_dir", &config.node.data_dir), ("run_dir", &config.node.run_dir)] {
            if !dir.is_absolute() {
                let what = format!("node.{key}: `{}` is not an absolute path", dir.display());
                return Err(wrong(&["node", key], what));
            }
        }
        if let Some(listen) = config.metrics.listen
            && !listen.ip().is_loopback()
        {
            let what = format!("metrics.listen: `{listen}` is not a loopback address; the endpoint is open");
            return Err(wrong(&["metrics", "listen"], what));
        }
        if config.replication.window_bytes < 1 << 20
            || config.replication.journal_bytes < 2 * config.replication.window_bytes
        {
            let what = "replication: window_bytes must be at least 1 MiB and journal_bytes at least twice that window";
            return Err(wrong(&["replication"], what.to_owned()));
        }
        for (at, backup) in config.backups.iter().enumerate() {
            let number = at.to_string();
            backup
                .check()
                .map_err(|e| wrong(&["backup", &number, e.key], format!("backup `{}`: {e}", backup.name)))?;
            if config.backups[..at].iter().any(|other| other.name == backup.name) {
                let what = format!("backup `{}`: there are two of that name", backup.name);
                return Err(wrong(&["backup", &number, "name"], what));
            }
        }
        Ok(config)
    }

    pub fn advertised(&self) -> String {
        self.node.advertise.clone().unwrap_or_else(|| self.node.listen.to_string())
    }

    /// The file that `node init` writes.
    pub fn template(name: &str, listen: SocketAddr, data_dir: &Path, run_dir: &Path) -> String {
        let quote = |text: &str| toml::Value::String(text.to_owned()).to_string();
        format!(
            r#"# Rempart node. Commented values are the defaults.

[node]
# This node's name in the cluster: lowercase letters, digits and hyphens.
name = {name}
# Peers reach this node here. Both sides prove who they are by certificate (TLS 1.3).
listen = {listen}
# What peers dial, when it is not the address above (NAT, several networks).
# advertise = "host:port"
# Disks, journals, keys.
data_dir = {data_dir}
# Sockets and process state; need not survive a reboot.
run_dir = {run_dir}

[timing]
# How fast a dead server is noticed against how much jitter is forgiven. `rempart node run` refuses
# values that do not fit together.
# beacon_interval_ms = 250
# peer_deadline_ms = 1500
# suspect_after_ms = 2000
# lease_ms = 3000
# guard_stop_ms = 1000
# register_deadline_ms = 1000

[replication]
# Limit on resynchronisation, 0 for none.
# resync_limit_bytes_per_s = 0
# "off", or "auto": where a sample shows that it pays.
# compression = "off"
# Journal kept for each virtual machine.
# journal_bytes = 268435456
# Log bytes held in memory for each running virtual machine until its image has them.
# window_bytes = 67108864

[vm]
# "auto": KVM if it really runs a guest, else TCG (slow emulation).
# accelerator = "auto"
# qemu = "qemu-system-x86_64"
# restarts = 3
# shutdown_timeout_s = 90
# watchdog = "/dev/watchdog"
# network_gate = true

[nbd]
# The disks of the virtual machines that this node leads, over TCP. Always TLS; clients show a node's certificate.
# listen = "192.0.2.1:10809"
# writable = false

[metrics]
# Prometheus metrics, loopback only. They are also on the API socket under /metrics.
# listen = "127.0.0.1:9411"

# Backups by the clock, of the machines that this node leads then: the same may stand in every node's configuration.
# docs/backup.md has all keys.
# [[backup]]
# name = "nightly"
# repository = "/srv/backups"
# key_file = "/root/backups.key"
# machines = "all"
# schedule = "15 2 * * *"

# Who is told when one fails.
# [mail]
# server = "mail.example"
# from = "rempart@example.com"
# to = ["operator@example.com"]
"#,
            name = quote(name),
            listen = quote(&listen.to_string()),
            data_dir = quote(&data_dir.to_string_lossy()),
            run_dir = quote(&run_dir.to_string_lossy()),
        )
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WitnessConfig {
    pub witness: WitnessSection,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WitnessSection {
    pub name: String,
    pub listen: SocketAddr,
    #[serde(default)]
    pub advertise: Option<String>,
    pub data_dir: PathBuf,
}

impl WitnessConfig {
    pub fn load(path: &Path) -> Result<WitnessConfig, ConfigError> {
        let (text, config): (String, WitnessConfig) = read(path)?;
        check_name(&config.witness.name).map_err(|e| ConfigError::Value {
            path: path.to_owned(),
            line: line_of(&text, &["witness", "name"]),
            what: format!("witness.name: {e}"),
        })?;
        Ok(config)
    }

    pub fn template(name: &str, listen: SocketAddr, advertise: Option<&str>, data_dir: &Path) -> String {
        let quote = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let advertise = match advertise {
            Some(advertise) => format!("advertise = {}", quote(advertise)),
            None => "# advertise = \"host:port\"".to_owned(),
        };
        format!(
            "# Rempart witness: remembers which copies are current. Needs little of everything but a disk that\n\
             # keeps what it synced, and a machine that does not fail together with a node.\n\n\
             [witness]\nname = {}\nlisten = {}\n# What nodes dial, when it is not the address above.\n\
             {advertise}\ndata_dir = {}\n",
            quote(name),
            quote(&listen.to_string()),
            quote(&data_dir.to_string_lossy())
        )
    }
}

/// The file as it is, and what it says.
fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<(String, T), ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let parsed = toml::from_str(&text)
        .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
    Ok((text, parsed))
}

/// Where a value stands, or what it would be in, counted from 1. Tables of a list go by number.
fn line_of(text: &str, at: &[&str]) -> usize {
    let Ok(root) = toml::de::DeTable::parse(text) else { return 1 };
    let mut found = root.span().start;
    let mut value: Option<&toml::de::DeValue<'_>> = None;
    for key in at {
        let next = match value {
            None => root.get_ref().get(*key),
            Some(toml::de::DeValue::Table(table)) => table.get(*key),
            Some(toml::de::DeValue::Array(all)) => key.parse().ok().and_then(|at: usize| all.get(at)),
            Some(_) => None,
        };
        let Some(next) = next else { break };
        found = next.span().start;
        value = Some(next.get_ref());
    }
    1 + text.as_bytes()[..found.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}

/// Names of nodes and virtual machines become file names and host names.
pub fn check_name(name: &str) -> Result<(), String> {
    let good = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if good {
        Ok(())
    } else {
        Err(format!("`{name}` is not a name: use 1 to 63 lowercase letters, digits and inner hyphens"))
    }
}

impl TimingSection {
    /// The cluster core's times; what is not configurable keeps its default.
    pub fn to_cluster(self) -> rempart_cluster::Timing {
        let millis = Duration::from_millis;
        rempart_cluster::Timing {
            beacon_interval: millis(self.beacon_interval_ms),
            peer_deadline: millis(self.peer_deadline_ms),
            suspect_after: millis(self.suspect_after_ms),
            lease: millis(self.lease_ms),
            guard_stop: millis(self.guard_stop_ms),
            register_deadline: millis(self.register_deadline_ms),
            ..rempart_cluster::Timing::default()
        }
    }

    /// The keys in which two nodes' times differ, with this one's value and the other's.
    pub fn differences(&self, other: &TimingSection) -> Vec<(&'static str, u64, u64)> {
        let TimingSection {
            beacon_interval_ms,
            peer_deadline_ms,
            suspect_after_ms,
            lease_ms,
            guard_stop_ms,
            register_deadline_ms,
        } = *self;
        let both = [
            ("beacon_interval_ms", beacon_interval_ms, other.beacon_interval_ms),
            ("peer_deadline_ms", peer_deadline_ms, other.peer_deadline_ms),
            ("suspect_after_ms", suspect_after_ms, other.suspect_after_ms),
            ("lease_ms", lease_ms, other.lease_ms),
            ("guard_stop_ms", guard_stop_ms, other.guard_stop_ms),
            ("register_deadline_ms", register_deadline_ms, other.register_deadline_ms),
        ];
        both.into_iter().filter(|(_, mine, theirs)| mine != theirs).collect()
    }

    pub fn register_deadline(&self) -> Duration {
        Duration::from_millis(self.register_deadline_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NodeConfig, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        std::fs::write(&path, text).unwrap();
        NodeConfig::load(&path)
    }

    fn template() -> String {
        NodeConfig::template(
            "a",
            "10.0.0.1:7400".parse().unwrap(),
            Path::new("/var/lib/rempart"),
            Path::new("/run/rempart"),
        )
    }

    const SCHEDULES: [&str; 8] =
        ["name", "repository", "key_file", "machines", "schedule", "server", "from", "to"];

    #[test]
    fn the_template_is_valid_and_its_comments_are_the_defaults() {
        let plain = parse(&template()).unwrap();
        let uncommented: String = template()
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest)
                    // Not those of sections that are comments, too.
                    if rest.contains(" = ")
                        && !SCHEDULES.iter().any(|key| rest.starts_with(key))
                        && !rest.contains("advertise")
                        && !rest.contains("watchdog")
                        && !rest.contains("listen") =>
                {
                    rest
                }
                _ => line,
            })
            .collect::<Vec<_>>()
            .join("\n");
        let explicit = parse(&uncommented).unwrap();
        assert_eq!(plain.timing, explicit.timing);
        assert_eq!(plain.replication, explicit.replication);
        assert_eq!(plain.vm, explicit.vm);
        assert_eq!(plain.nbd, explicit.nbd);
    }

    #[test]
    fn wrong_configurations_are_refused() {
        for (from, to) in [
            ("name = \"a\"", "name = \"A b\""),
            ("data_dir = \"/var", "data_dir = \"var"),
            ("[metrics]", "[metrics]\nlisten = \"0.0.0.0:1\""),
            ("[timing]", "[timing]\nlease = 3"),
            ("[replication]", "[replication]\nwindow_bytes = 1"),
            ("# [[backup]]\n# name", "[[backup]]\nname"),
            ("# [mail]\n# server", "[mail]\nserver"),
        ] {
            let text = template();
            assert!(text.contains(from), "{from}");
            assert!(parse(&text.replace(from, to)).is_err(), "{to}");
        }
        let text = template();
        assert!(parse(&text[..text.len() / 5]).is_err(), "a truncated file");
    }

    #[test]
    fn what_is_wrong_is_told_by_its_line() {
        let plain = template();
        let lines = plain.lines().count();
        let first = "[[backup]]\nname = 'one'\nrepository = '/r'\nkey_file = '/k'\nmachines = 'all'\n\
                     schedule = '@daily'\n";
        let second = first.replace("'one'", "'two'");
        for (from, to, line, said) in [
            ("schedule = '@daily'", "schedule = 'daily'", 6, "backup `two`: schedule: `daily`"),
            ("machines = 'all'", "machines = [\n  'a',\n]\nparallel = 0", 8, "parallel: it must be"),
            ("machines = 'all'", "machines = 'all'\nformat = 'raw'", 6, "format: it goes with `disks`"),
            ("machines = 'all'", "machines = 'all'\nconsistency = 'best'", 6, "line"),
            ("machines = 'all'", "machines = 'all'\ntime_limit_s = '6h'", 6, "line"),
            ("key_file = '/k'\n", "", 1, "key_file"),
            ("'two'", "'one'", 2, "two of that name"),
        ] {
            let changed = second.replace(from, to);
            assert_ne!(changed, second);
            let error = parse(&format!("{plain}{first}{changed}")).unwrap_err();
            let cause = std::error::Error::source(&error).map_or_else(String::new, ToString::to_string);
            let told = format!("{error}\n{cause}");
            let line = format!("line {}", lines + first.lines().count() + line);
            assert!(told.contains(&line) && told.contains(said), "{line}: {told}");
        }
    }

    #[test]
    fn every_time_that_differs_is_named() {
        let times = |first: u64| TimingSection {
            beacon_interval_ms: first,
            peer_deadline_ms: first + 1,
            suspect_after_ms: first + 2,
            lease_ms: first + 3,
            guard_stop_ms: first + 4,
            register_deadline_ms: first + 5,
        };
        assert_eq!(times(1).differences(&times(1)), []);
        let keys: Vec<_> = times(1).differences(&times(11)).iter().map(|(key, ..)| *key).collect();
        let value = toml::Value::try_from(times(1)).unwrap();
        let mut all: Vec<_> = value.as_table().unwrap().keys().map(String::as_str).collect();
        all.sort_by_key(|key| value[*key].as_integer());
        assert_eq!(keys, all);
        assert_eq!(times(1).differences(&TimingSection { lease_ms: 9, ..times(1) }), [("lease_ms", 4, 9)]);
    }
}

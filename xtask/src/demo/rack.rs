//! The program on the lab's servers: daemons, witness, and the command line a user would type.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::status::VmStatus;
use crate::guest::Disks;
use crate::interrupt;
use crate::lab::{Host, Lab, Process, Side, Volume};

/// The virtual machine of the story.
pub const VM: &str = "shop";
const VM_MAC: &str = "52:54:00:77:00:50";
const PORT: u16 = 7400;
/// No command of the story takes longer, also on a busy machine.
const COMMAND_DEADLINE: Duration = Duration::from_secs(120);
/// From starting a daemon to its first answer.
const DAEMON_DEADLINE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(100);

/// One setting of a node's configuration file: section, key, value.
pub type Setting = (&'static str, &'static str, &'static str);

/// What differs from the usual stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stage {
    /// The node whose files lie on a disk that can be made to fail.
    pub fragile: Option<Side>,
    /// The guest writes behind its ring, too, at random.
    pub scattered: bool,
    pub settings: &'static [Setting],
}

#[derive(Debug)]
pub struct Rack {
    servers: [Server; 3],
    program: PathBuf,
    // Last: its processes must be gone before the lab is, its files after them.
    pub lab: Lab,
}

#[derive(Debug)]
struct Server {
    config: PathBuf,
    data: PathBuf,
    run: PathBuf,
    log: PathBuf,
    daemon: Option<Process>,
    volume: Option<Volume>,
}

/// A command that did not succeed: what it said and its exit code.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub code: Option<i32>,
    pub said: String,
}

impl Rack {
    /// Installs nothing: makes the folders of three servers.
    pub fn new(lab: Lab, program: &Path, stage: Stage) -> Result<Rack> {
        let mut servers = Vec::new();
        for host in Host::ALL {
            let home = lab.folder().join(host.name());
            fs::create_dir_all(&home)?;
            let data = home.join("data");
            let fragile = stage.fragile.is_some_and(|side| side.host() == host);
            let volume = if fragile { Some(Volume::create(&data, 1024)?) } else { None };
            servers.push(Server {
                config: home.join("rempart.toml"),
                data: if fragile { data.join("rempart") } else { data },
                run: home.join("run"),
                log: home.join("daemon.log"),
                daemon: None,
                volume,
            });
        }
        let servers = <[Server; 3]>::try_from(servers).expect("three hosts");
        Ok(Rack { servers, program: program.to_owned(), lab })
    }

    fn server(&self, host: Host) -> &Server {
        &self.servers[host as usize]
    }

    pub fn volume(&self, side: Side) -> &Volume {
        self.server(side.host()).volume.as_ref().expect("the stage has a fragile disk here")
    }

    pub fn data_folder(&self, side: Side) -> &Path {
        &self.server(side.host()).data
    }

    pub fn run_folder(&self, side: Side) -> &Path {
        &self.server(side.host()).run
    }

    pub fn daemon_id(&self, host: Host) -> Option<i32> {
        self.server(host).daemon.as_ref().map(Process::id)
    }

    pub fn log(&self, host: Host) -> &Path {
        &self.server(host).log
    }

    /// A cluster of two nodes and a witness, all running.
    pub fn form_cluster(&mut self, settings: &[Setting]) -> Result<()> {
        for side in Side::ALL {
            self.init_node(side.host(), settings)?;
            self.start(side.host())?;
        }
        self.user(Host::A, &["cluster", "create", "lab"])?;
        let token = self.user(Host::A, &["cluster", "token"])?;
        self.user(Host::B, &["cluster", "join", token.trim()])?;
        let token = self.user(Host::A, &["cluster", "token", "--role", "witness"])?;
        let (listen, data) = (listen(Host::Witness), self.server(Host::Witness).data.clone());
        let arguments = ["witness", "init", "--token", token.trim(), "--listen", &listen, "--data-dir"];
        self.user(Host::Witness, &[&arguments[..], &[path_text(&data)]].concat())?;
        self.start(Host::Witness)
    }

    fn init_node(&self, host: Host, settings: &[Setting]) -> Result<()> {
        let server = self.server(host);
        let (name, listen) = (host.name(), listen(host));
        let (data, run) = (path_text(&server.data), path_text(&server.run));
        self.user(
            host,
            &["node", "init", "--name", name, "--listen", &listen, "--data-dir", data, "--run-dir", run],
        )?;
        let mut text = fs::read_to_string(&server.config)
            .with_context(|| format!("read {}, which `node init` writes", server.config.display()))?;
        for (section, key, value) in settings {
            let heading = format!("[{section}]\n");
            if !text.contains(&heading) {
                text += &format!("\n{heading}");
            }
            text = text.replace(&heading, &format!("{heading}{key} = {value}\n"));
        }
        fs::write(&server.config, text)?;
        Ok(())
    }

    /// Starts a server's daemon and returns once it answers.
    pub fn start(&mut self, host: Host) -> Result<()> {
        let kind = if host == Host::Witness { "witness" } else { "node" };
        let server = self.server(host);
        let mut command = self.lab.host(host).command(&self.program);
        command.arg("--config").arg(&server.config).args([kind, "run"]).env("RUST_BACKTRACE", "1");
        let daemon = Process::start(&mut command, &server.log)?;
        self.servers[host as usize].daemon = Some(daemon);
        let end = Instant::now() + DAEMON_DEADLINE;
        loop {
            interrupt::check()?;
            let answers = match host {
                Host::Witness => self.witness_listens(),
                _ => self.user(host, &["status", "--json"]).is_ok(),
            };
            if answers {
                return Ok(());
            }
            let daemon = self.servers[host as usize].daemon.as_mut().expect("just started");
            if let Some(status) = daemon.has_exited()? {
                bail!("the daemon of {host} ended: {status}\n{}", self.tail_of_log(host));
            }
            if Instant::now() > end {
                bail!("the daemon of {host} does not answer\n{}", self.tail_of_log(host));
            }
            thread::sleep(POLL);
        }
    }

    fn witness_listens(&self) -> bool {
        let address = listen(Host::Witness).parse().expect("an address");
        let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1));
        self.lab.host(Host::Witness).within(connect).is_ok()
    }

    /// Kills a server's daemon, and nothing else.
    pub fn kill_daemon(&mut self, host: Host) -> Result<()> {
        match &mut self.servers[host as usize].daemon {
            Some(daemon) => daemon.kill(),
            None => bail!("{host} has no daemon"),
        }
    }

    /// Asks a server's daemon to stop, as a service manager would.
    pub fn stop_daemon(&mut self, host: Host) -> Result<()> {
        match self.servers[host as usize].daemon.take() {
            Some(mut daemon) => daemon.stop(Duration::from_secs(30)),
            None => Ok(()),
        }
    }

    /// Brings a dead server back: cables, then its daemon.
    pub fn power_on(&mut self, host: Host) -> Result<()> {
        self.servers[host as usize].daemon = None;
        self.lab.power_on(host)?;
        // A machine that restarts finds nothing there.
        let run = &self.server(host).run;
        if run.exists() {
            fs::remove_dir_all(run)?;
        }
        self.start(host)
    }

    pub fn import(&self, side: Side, disks: &Disks) -> Result<()> {
        let (boot, data) = (path_text(&disks.boot), path_text(&disks.data));
        let machine = ["--memory", "192M", "--bridge", "br0", "--mac", VM_MAC, "--autostart"];
        let arguments = [&["vm", "import", VM, "--disk", boot, "--disk", data][..], &machine].concat();
        self.user(side.host(), &arguments).map(drop)
    }

    /// Types a command on a server; it must succeed. Returns its standard output.
    pub fn user(&self, host: Host, arguments: &[&str]) -> Result<String> {
        match self.try_user(host, arguments)? {
            Ok(printed) => Ok(printed),
            Err(Refusal { code, said }) => {
                bail!(
                    "`rempart {}` on {host} failed (exit code {code:?}):\n{}",
                    arguments.join(" "),
                    said.trim_end()
                )
            }
        }
    }

    /// A command as a user types it on a server.
    pub fn command(&self, host: Host, arguments: &[&str]) -> Command {
        let mut command: Command = self.lab.host(host).command(&self.program);
        command.arg("--config").arg(&self.server(host).config).args(arguments);
        command.env_remove("REMPART_CONFIG").env_remove("REMPART_SOCKET").stdin(Stdio::null());
        command
    }

    /// Types a command on a server that may be refused.
    pub fn try_user(&self, host: Host, arguments: &[&str]) -> Result<Result<String, Refusal>> {
        let mut command = self.command(host, arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (mut stdout, mut stderr) =
            (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let out = thread::spawn(move || read_all(&mut stdout));
        let err = thread::spawn(move || read_all(&mut stderr));
        let end = Instant::now() + COMMAND_DEADLINE;
        let mut nap = Duration::from_millis(2);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() > end || interrupt::check().is_err() {
                child.kill()?;
                child.wait()?;
                interrupt::check()?;
                bail!("`rempart {}` on {host} takes longer than {COMMAND_DEADLINE:?}", arguments.join(" "));
            }
            thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(20));
        };
        let printed = out.join().expect("reading does not panic");
        let said = err.join().expect("reading does not panic");
        Ok(if status.success() { Ok(printed) } else { Err(Refusal { code: status.code(), said }) })
    }

    /// The machine as a node sees it; none when the node does not answer or does not know it.
    pub fn vm(&self, side: Side) -> Option<VmStatus> {
        let printed = self.try_user(side.host(), &["status", "--json"]).ok()?.ok()?;
        VmStatus::find(&serde_json::from_str::<Value>(&printed).ok()?, VM)
    }

    /// Asks a node again and again until its answer satisfies.
    pub fn wait_vm<T>(
        &self,
        side: Side,
        what: &str,
        deadline: Duration,
        mut wanted: impl FnMut(&VmStatus) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + deadline;
        let mut last = None;
        loop {
            interrupt::check()?;
            if let Some(status) = self.vm(side) {
                if let Some(found) = wanted(&status) {
                    return Ok(found);
                }
                last = Some(status);
            }
            if Instant::now() > end {
                let last = last.map_or("it does not answer".to_owned(), |status| status.brief());
                bail!("waited {:.0} s in vain for {what} on {}: {last}", deadline.as_secs_f64(), side.host());
            }
            thread::sleep(POLL);
        }
    }

    /// The last lines a daemon logged.
    pub fn tail_of_log(&self, host: Host) -> String {
        let text = fs::read_to_string(self.log(host)).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(25)..];
        format!("last lines of {host}'s log:\n  {}", tail.join("\n  "))
    }
}

fn listen(host: Host) -> String {
    format!("{}:{PORT}", host.address())
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("the lab's paths are plain text")
}

fn read_all(from: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = from.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

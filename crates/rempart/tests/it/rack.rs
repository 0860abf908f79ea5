//! A few servers in one folder.

use serde_json::Value;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Far above what anything here takes: it only ends a test that would never end.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_rempart");

/// Bytes that nothing compresses; others for another seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let word = |at: u64| {
        let mixed = (seed << 32 | at).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31).to_le_bytes()
    };
    (0..len.div_ceil(8) as u64).flat_map(word).take(len).collect()
}

/// What a command answered.
#[derive(Debug, Clone)]
pub struct Answer {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Answer {
    pub fn of(output: Output) -> Answer {
        Answer {
            code: output.status.code().expect("it ended by itself"),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// One server: a node or a witness.
#[derive(Debug)]
pub struct Server {
    pub name: String,
    pub home: PathBuf,
    pub address: SocketAddr,
    kind: &'static str,
    daemon: Option<Child>,
}

#[derive(Debug)]
pub struct Rack {
    dir: TempDir,
}

impl Rack {
    pub fn new() -> Rack {
        // A socket's path is short.
        Rack { dir: TempDir::with_prefix_in("rp", "/tmp").unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An image of `size` bytes, without a partition table, whose bytes are `fill`.
    pub fn image(&self, name: &str, size: usize, fill: u8) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, vec![fill; size]).unwrap();
        path
    }

    /// A node that runs.
    pub fn node(&self, name: &str) -> Server {
        let mut server = self.initialised(name);
        server.start();
        server
    }

    /// A node with more in its configuration: what to replace, and by what.
    pub fn node_with(&self, name: &str, key: &str, value: &str) -> Server {
        let mut server = self.initialised(name);
        server.configure(key, value);
        server.start();
        server
    }

    /// A node that was never started.
    pub fn initialised(&self, name: &str) -> Server {
        let server = self.server(name, "node");
        let (listen, data, run) = (server.address.to_string(), server.text("data"), server.text("run"));
        let init =
            ["node", "init", "--name", name, "--listen", &listen, "--data-dir", &data, "--run-dir", &run];
        server.ok(&init);
        server.configure("[vm]\n", "[vm]\naccelerator = \"tcg\"\n");
        server
    }

    /// A witness that `node` admitted, and that runs.
    pub fn witness(&self, name: &str, node: &Server) -> Server {
        let mut server = self.server(name, "witness");
        let token = node.ok(&["cluster", "token", "--role", "witness"]);
        let (listen, data) = (server.address.to_string(), server.text("data"));
        let token = token.trim();
        let init =
            ["witness", "init", "--token", token, "--name", name, "--listen", &listen, "--data-dir", &data];
        server.ok(&init);
        server.start();
        server
    }

    fn server(&self, name: &str, kind: &'static str) -> Server {
        let home = self.path(name);
        std::fs::create_dir(&home).unwrap();
        let address = Rack::free_address();
        Server { name: name.to_owned(), home, address, kind, daemon: None }
    }

    /// Free now; nobody else in these tests asks for a port by number.
    pub fn free_address() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    /// Two nodes, mirrored by nobody yet, and a witness.
    pub fn cluster(&self) -> (Server, Server, Server) {
        let (a, b) = self.pair();
        let witness = self.witness("witness", &a);
        (a, b, witness)
    }

    /// Two nodes of one cluster.
    pub fn pair(&self) -> (Server, Server) {
        let (a, b) = (self.node("node-a"), self.node("node-b"));
        a.ok(&["cluster", "create", "lab"]);
        self.join(&b, &a);
        (a, b)
    }

    pub fn join(&self, newcomer: &Server, member: &Server) {
        let token = member.ok(&["cluster", "token"]);
        newcomer.ok(&["cluster", "join", token.trim()]);
    }
}

impl Server {
    pub fn config(&self) -> PathBuf {
        self.home.join("rempart.toml")
    }

    /// Replaces a text in the configuration. It counts from the next start.
    pub fn configure(&self, from: &str, to: &str) {
        let config = std::fs::read_to_string(self.config()).unwrap();
        assert!(config.contains(from), "{config}");
        std::fs::write(self.config(), config.replace(from, to)).unwrap();
    }

    fn text(&self, name: &str) -> String {
        self.home.join(name).to_str().unwrap().to_owned()
    }

    pub fn data(&self, name: &str) -> PathBuf {
        self.home.join("data").join(name)
    }

    /// The URI of a disk's export on this node.
    pub fn export(&self, vm: &str, disk: u16) -> String {
        let socket = self.home.join("run/vms").join(vm).join("nbd.sock");
        format!("nbd+unix:///disk{disk}?socket={}", socket.display())
    }

    /// Starts the daemon and returns once it answers.
    pub fn start(&mut self) {
        let log =
            std::fs::File::options().create(true).append(true).open(self.home.join("daemon.log")).unwrap();
        let daemon = Command::new(PROGRAM)
            .arg("--config")
            .arg(self.config())
            .args([self.kind, "run"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemon = Some(daemon);
        match self.kind {
            "node" => self.until("the daemon answers", || self.run(&["status"]).code == 0),
            _ => self.until("the witness listens", || std::net::TcpStream::connect(self.address).is_ok()),
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
    }

    /// Of the daemon, which runs.
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("it runs").id()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.home.join("daemon.log")).unwrap_or_default()
    }

    /// What every server of the rack said.
    fn logs(&self) -> String {
        let servers = std::fs::read_dir(self.home.parent().unwrap()).unwrap().flatten();
        let logs = servers.filter_map(|server| {
            let text = std::fs::read_to_string(server.path().join("daemon.log")).ok()?;
            Some(format!("── {}\n{text}", server.file_name().display()))
        });
        logs.collect()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("--config").arg(self.config()).args(arguments).stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Answer {
        Answer::of(self.command(arguments).output().unwrap())
    }

    /// A command that is not waited for.
    pub fn spawn(&self, arguments: &[&str]) -> Child {
        self.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// What a command that succeeds prints.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let answer = self.run(arguments);
        assert_eq!(answer.code, 0, "{arguments:?} on {}: {}\n{}", self.name, answer.err, self.logs());
        answer.out
    }

    /// What a command that does not succeed says.
    #[track_caller]
    pub fn refused(&self, arguments: &[&str]) -> Answer {
        let answer = self.run(arguments);
        assert_ne!(answer.code, 0, "{arguments:?} on {}: {}", self.name, answer.out);
        let said = answer.err.lines().any(|line| line.starts_with("error: "));
        assert!(said, "{arguments:?}: {}", answer.err);
        answer
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        let arguments = [arguments, &["--json"]].concat();
        serde_json::from_str(&self.ok(&arguments)).unwrap()
    }

    /// A machine of this name brought in from images.
    pub fn import(&self, name: &str, images: &[&Path]) {
        let mut arguments = vec!["vm", "import", name, "--memory", "64M"];
        for image in images {
            arguments.extend(["--disk", image.to_str().unwrap()]);
        }
        self.ok(&arguments);
    }

    /// One machine as `rempart status --json` shows it here.
    pub fn vm(&self, name: &str) -> Value {
        let status = self.json(&["status"]);
        let vms = status["vms"].as_array().unwrap();
        vms.iter().find(|vm| vm["name"] == name).cloned().unwrap_or(Value::Null)
    }

    /// Waits until `condition` holds; panics with the daemon's log after a long time.
    #[track_caller]
    pub fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !condition() {
            if Instant::now() > end {
                panic!(
                    "{what}: not within {PATIENCE:?} on {}\n{:#?}\n{}",
                    self.name,
                    self.run(&["status", "--json"]),
                    self.logs()
                );
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until the machine is mirrored, as this node sees it.
    #[track_caller]
    pub fn until_mirrored(&self, vm: &str) {
        self.until("mirrored", || self.vm(vm)["mirrored"] == true);
    }

    /// Has QEMU's client do something with a disk, as a guest would.
    #[track_caller]
    pub fn io(&self, vm: &str, disk: u16, commands: &[&str]) {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]);
        for line in commands {
            command.args(["-c", line]);
        }
        let output = command.arg(self.export(vm, disk)).output().unwrap();
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let failed = !output.status.success() || said.contains("failed");
        assert!(!failed, "{commands:?} on {}: {said}\n{}", self.name, self.logs());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        // Machines and their guards outlive the daemon, also one that was killed before; their leases may be unlimited.
        let own = format!("{}/", self.home.display());
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let arguments = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&arguments).contains(&own) {
                let _ = Command::new("kill").arg("-KILL").arg(process.file_name()).status();
            }
        }
    }
}

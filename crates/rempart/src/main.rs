//! The one program: `rempart node run`, `rempart witness run`, the guard, and every operator command.

use clap::{Args, CommandFactory, Parser, Subcommand};
use rempart_api::{Client, Error};
use rempart_cli::{Output, ProgressFormat};
use rempart_node::config::{DEFAULT_CONFIG, NodeConfig, WitnessConfig};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::sync::watch;

/// Keeps virtual machines available and their data safe, between ordinary servers without shared disk.
#[derive(Debug, Parser)]
#[command(name = "rempart", version, max_term_width = 100)]
struct Program {
    /// The node's configuration file.
    #[arg(long, global = true, env = "REMPART_CONFIG", default_value = DEFAULT_CONFIG)]
    config: PathBuf,
    /// The daemon's socket, when it is not in the configured run_dir.
    #[arg(long, global = true, env = "REMPART_SOCKET")]
    socket: Option<PathBuf>,
    /// Print one JSON value on stdout instead of text.
    #[arg(long, global = true)]
    json: bool,
    /// How far a command is, on stderr.
    #[arg(long, global = true, value_enum, default_value = "auto", hide_possible_values = true)]
    progress: ProgressFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// This machine as a node that runs virtual machines.
    #[command(subcommand)]
    Node(NodeCommand),
    /// This machine as the witness, which remembers whose copy is current.
    #[command(subcommand)]
    Witness(WitnessCommand),
    #[command(flatten)]
    Operator(rempart_cli::Command),
    #[command(flatten)]
    Backups(rempart_cli::BackupCommand),
    /// Print a completion script for a shell.
    Completion { shell: clap_complete::Shell },
    /// Owns one running virtual machine and its lease; started by the daemon.
    #[command(hide = true)]
    Guard(GuardArgs),
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Write a commented configuration and draw this node's identity.
    Init(NodeInit),
    /// Run the daemon.
    Run,
}

#[derive(Debug, Args)]
struct NodeInit {
    /// This node's name in the cluster; the host name when absent.
    #[arg(long)]
    name: Option<String>,
    /// Address and port on which peers reach it.
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long, default_value = "/var/lib/rempart")]
    data_dir: PathBuf,
    #[arg(long, default_value = "/run/rempart")]
    run_dir: PathBuf,
}

#[derive(Debug, Subcommand)]
enum WitnessCommand {
    /// Join a cluster with a token and write a configuration.
    Init(WitnessInit),
    /// Run the witness.
    Run,
}

#[derive(Debug, Args)]
struct WitnessInit {
    /// From `rempart cluster token --role witness` on a node.
    #[arg(long, env = "REMPART_TOKEN", hide_env_values = true)]
    token: String,
    #[arg(long, default_value = "witness")]
    name: String,
    #[arg(long)]
    listen: SocketAddr,
    /// What nodes dial, when it is not the address above.
    #[arg(long)]
    advertise: Option<String>,
    #[arg(long, default_value = "/var/lib/rempart-witness")]
    data_dir: PathBuf,
}

#[derive(Debug, Args)]
struct GuardArgs {
    #[arg(long)]
    run_dir: PathBuf,
}

fn main() -> ExitCode {
    let program = Program::parse();
    match run(program) {
        Ok(code) => code,
        Err(error) => {
            rempart_cli::print_error(&error);
            ExitCode::from(error.kind.exit_code())
        }
    }
}

fn run(program: Program) -> Result<ExitCode, Error> {
    let config = program.config;
    let output = Output { json: program.json, progress: program.progress };
    let done = |()| ExitCode::SUCCESS;
    match program.command {
        Command::Guard(args) => {
            log();
            let code =
                rempart_hypervisor::guard::run(rempart_hypervisor::guard::Args { run_dir: args.run_dir });
            Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
        }
        Command::Node(NodeCommand::Init(args)) => {
            let name = args.name.map_or_else(host_name, Ok)?;
            rempart_node::init(&config, &name, args.listen, &args.data_dir, &args.run_dir)?;
            eprintln!(
                "wrote `{}`; start the daemon with `systemctl start rempart` or `rempart node run`",
                config.display()
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::Node(NodeCommand::Run) => {
            log();
            let parsed = NodeConfig::load(&config).map_err(|e| config_error(&e))?;
            serve(|stop| rempart_node::run(parsed, &config, stop)).map(done)
        }
        Command::Witness(WitnessCommand::Init(args)) => {
            let config = witness_config(config);
            let WitnessInit { token, name, listen, advertise, data_dir } = args;
            runtime(false)?
                .block_on(rempart_node::witness_init(&config, &token, &name, listen, advertise, &data_dir))?;
            eprintln!("wrote `{}`; start the witness with `rempart witness run`", config.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Witness(WitnessCommand::Run) => {
            log();
            let config = witness_config(config);
            let parsed = WitnessConfig::load(&config).map_err(|e| config_error(&e))?;
            serve(|stop| rempart_node::witness_run(parsed, stop)).map(done)
        }
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Program::command(), "rempart", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Backups(command) => {
            let client = || Ok(Client::new(socket(program.socket, &config)?));
            rempart_cli::run_backup(command, &config, client, output).map(done)
        }
        Command::Operator(command) => {
            let client = Client::new(socket(program.socket, &config)?);
            runtime(false)?.block_on(rempart_cli::run(command, &client, output)).map(done)
        }
    }
}

/// The witness has a configuration of its own beside a node's.
fn witness_config(config: PathBuf) -> PathBuf {
    if config == Path::new(DEFAULT_CONFIG) { PathBuf::from("/etc/rempart/witness.toml") } else { config }
}

fn config_error(error: &dyn std::error::Error) -> Error {
    let message = error.to_string();
    let described = Error::failed(message)
        .hint("`rempart node init` and `rempart witness init` write commented examples");
    match error.source() {
        Some(source) => described.cause(source.to_string().trim()),
        None => described,
    }
}

fn host_name() -> Result<String, Error> {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_err(|e| Error::failed("cannot read the host name").cause(e).hint("give one with --name"))?;
    Ok(text.trim().split('.').next().unwrap_or_default().to_lowercase())
}

/// Where the daemon's socket is: said outright, or from its configuration.
fn socket(given: Option<PathBuf>, config: &Path) -> Result<PathBuf, Error> {
    if let Some(socket) = given {
        return Ok(socket);
    }
    match std::fs::read_to_string(config) {
        Ok(text) => {
            let wrong = |what: String| {
                Error::failed(format!("`{}` is not a valid configuration", config.display()))
                    .cause(what.trim_end())
                    .hint("mend the file, or name the daemon's socket with --socket")
            };
            let table: toml::Table = text.parse().map_err(|e: toml::de::Error| wrong(e.to_string()))?;
            let run_dir =
                table.get("node").and_then(|node| node.get("run_dir")).and_then(toml::Value::as_str);
            run_dir
                .map(|dir| Path::new(dir).join("api.sock"))
                .ok_or_else(|| wrong("it names no node.run_dir".into()))
        }
        // The default may still be right where the file is not readable.
        Err(_) if config == Path::new(DEFAULT_CONFIG) => Ok(PathBuf::from("/run/rempart/api.sock")),
        Err(e) => Err(Error::failed(format!("cannot read `{}`", config.display()))
            .cause(e)
            .hint("name the node's configuration with --config, or the daemon's socket with --socket")),
    }
}

fn runtime(threads: bool) -> Result<tokio::runtime::Runtime, Error> {
    let mut builder = if threads {
        tokio::runtime::Builder::new_multi_thread()
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    builder.enable_all().build().map_err(|e| Error::failed("cannot start the runtime").cause(e))
}

/// Runs a service until SIGTERM or SIGINT.
fn serve<F: Future<Output = Result<(), Error>>>(
    service: impl FnOnce(watch::Receiver<bool>) -> F,
) -> Result<(), Error> {
    let runtime = runtime(true)?;
    let (stop, stopped) = watch::channel(false);
    let result = runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
            .map_err(|e| Error::failed("cannot wait for signals").cause(e))?;
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            let _ = stop.send(true);
        });
        service(stopped).await
    });
    // Threads that wait for a disk must not hold up the end.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result
}

/// Structured logs on stderr: plain for people, JSON with `REMPART_LOG_FORMAT=json`; filtered by `REMPART_LOG`.
fn log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("REMPART_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::env::var("REMPART_LOG_FORMAT").is_ok_and(|format| format == "json") {
        builder.json().init();
    } else {
        builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
    }
}

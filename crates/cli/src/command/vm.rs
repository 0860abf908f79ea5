use super::status::{find, state};
use crate::{Output, output::bytes, parse};
use clap::{Args, Subcommand, ValueEnum};
use rempart_api::{
    Client, DiskAdd, DiskResize, DiskSource, Error, Firmware, ImportRequest, Job, Nic, Status, StopRequest,
    VmDetail,
};
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Bring in a virtual machine from its disk images (raw or qcow2).
    Import(Import),
    Start {
        name: String,
    },
    /// Ask the guest to shut down.
    Stop {
        name: String,
        /// Cut the power instead.
        #[arg(long)]
        force: bool,
        /// How long the guest may take, such as 90s.
        #[arg(long, value_parser = parse::seconds)]
        timeout: Option<u64>,
    },
    List,
    Show {
        name: String,
    },
    /// Attach this terminal to the serial console; leave with Ctrl-].
    Console {
        name: String,
    },
    /// Delete a stopped, unprotected machine. Adopted disk files stay.
    Delete {
        name: String,
        /// Do it; without this it only tells what would be deleted.
        #[arg(long)]
        yes: bool,
    },
    /// Add, remove or grow a disk.
    #[command(subcommand)]
    Disk(DiskCommand),
}

#[derive(Debug, Args)]
pub struct Import {
    name: String,
    /// A disk image, raw or qcow2; once a disk, in the guest's order.
    #[arg(long = "disk", required = true)]
    disks: Vec<PathBuf>,
    #[arg(long, default_value = "1G", value_parser = parse::byte_count)]
    memory: u64,
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// QEMU's name of a CPU model that every node can run.
    #[arg(long)]
    cpu_model: Option<String>,
    /// The host bridge that the network card is plugged into.
    #[arg(long)]
    bridge: Option<String>,
    /// The card's address; drawn when absent.
    #[arg(long, requires = "bridge")]
    mac: Option<String>,
    #[arg(long, value_enum, default_value = "bios")]
    firmware: FirmwareArg,
    /// UEFI variables to bring along.
    #[arg(long)]
    nvram: Option<PathBuf>,
    /// Start it whenever this node leads and it is not running.
    #[arg(long)]
    autostart: bool,
    /// Use raw files where they are instead of copying them.
    #[arg(long)]
    adopt: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum FirmwareArg {
    Bios,
    Uefi,
}

#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    Add {
        name: String,
        /// Size of a new, empty disk, such as 20G.
        #[arg(long, value_parser = parse::byte_count, conflicts_with = "from", required_unless_present = "from")]
        size: Option<u64>,
        /// An image to bring in.
        #[arg(long)]
        from: Option<PathBuf>,
    },
    Remove {
        name: String,
        index: u16,
        #[arg(long)]
        yes: bool,
    },
    /// Grow a disk. A running guest is told.
    Resize {
        name: String,
        index: u16,
        #[arg(value_parser = parse::byte_count)]
        size: u64,
    },
}

pub async fn run(command: VmCommand, client: &Client, output: Output) -> Result<(), Error> {
    match command {
        VmCommand::Import(command) => import(command, client, output).await,
        VmCommand::Start { name } => {
            let job: Job = client.post(&format!("/v1/vms/{name}/start"), &()).await?;
            super::finish_job(client, output, job, &format!("`{name}` runs")).await.map(drop)
        }
        VmCommand::Stop { name, force, timeout } => {
            let request = StopRequest { force, timeout_s: timeout };
            let job: Job = client.post(&format!("/v1/vms/{name}/stop"), &request).await?;
            super::finish_job(client, output, job, &format!("`{name}` is stopped")).await.map(drop)
        }
        VmCommand::List => list(client, output).await,
        VmCommand::Show { name } => show(&name, client, output).await,
        VmCommand::Console { name } => {
            let detail: VmDetail = client.get(&format!("/v1/vms/{name}")).await?;
            console::attach(&detail.console)
        }
        VmCommand::Delete { name, yes } => delete(&name, yes, client, output).await,
        VmCommand::Disk(command) => disk(command, client, output).await,
    }
}

async fn import(command: Import, client: &Client, output: Output) -> Result<(), Error> {
    let name = command.name.clone();
    let disks =
        command.disks.iter().map(|path| source(path, command.adopt)).collect::<Result<Vec<_>, _>>()?;
    let nvram = command.nvram.as_deref().map(absolute).transpose()?;
    let request = ImportRequest {
        name: command.name,
        disks,
        memory_bytes: command.memory,
        cpus: command.cpus,
        cpu_model: command.cpu_model,
        nics: command.bridge.map(|bridge| Nic { bridge, mac: command.mac }).into_iter().collect(),
        firmware: match command.firmware {
            FirmwareArg::Bios => Firmware::Bios,
            FirmwareArg::Uefi => Firmware::Uefi,
        },
        nvram,
        autostart: command.autostart,
    };
    let job: Job = client.post("/v1/vms", &request).await?;
    let done = format!("`{name}` imported; start it with `rempart vm start {name}`");
    super::finish_job(client, output, job, &done).await.map(drop)
}

fn source(path: &Path, adopt: bool) -> Result<DiskSource, Error> {
    Ok(DiskSource { path: absolute(path)?, adopt })
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path)
        .map_err(|e| Error::invalid(format!("`{}` is not a path", path.display())).cause(e))
}

async fn list(client: &Client, output: Output) -> Result<(), Error> {
    let status: Status = client.get("/v1/status").await?;
    if output.json {
        let unopened = status
            .unopened
            .iter()
            .map(|vm| serde_json::json!({ "name": vm.name, "state": "not-opened", "error": vm.error }));
        let vms = status.vms.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>();
        let vms = vms.map_err(|e| Error::failed("cannot write JSON").cause(e))?;
        return output.print_json(&vms.into_iter().chain(unopened).collect::<Vec<_>>());
    }
    let rows = status.vms.iter().map(|vm| {
        let primary = vm.primary.clone().unwrap_or_else(|| "-".into());
        vec![vm.name.clone(), state(vm.state).into(), primary, vm.protected_by.join(", ")]
    });
    let unopened = status
        .unopened
        .iter()
        .map(|vm| vec![vm.name.clone(), "NOT OPENED".into(), "-".into(), String::new()]);
    output.table(&["name", "state", "primary", "peers"], rows.chain(unopened).collect())
}

async fn show(name: &str, client: &Client, output: Output) -> Result<(), Error> {
    let detail: VmDetail = client.get(&format!("/v1/vms/{name}")).await?;
    if output.json {
        return output.print_json(&detail);
    }
    let mut rows = vec![
        vec!["name".into(), detail.status.name.clone()],
        vec!["state".into(), state(detail.status.state).into()],
        vec!["memory".into(), bytes(detail.memory_bytes)],
        vec!["cpus".into(), format!("{} ({})", detail.cpus, detail.cpu_model)],
        vec!["machine".into(), detail.machine.clone()],
        vec!["firmware".into(), format!("{:?}", detail.firmware).to_lowercase()],
        vec!["autostart".into(), if detail.autostart { "yes".into() } else { "no".into() }],
    ];
    for disk in &detail.disks {
        let text = format!("{} {}", bytes(disk.size_bytes), disk.path.display());
        rows.push(vec![format!("disk {}", disk.index), text]);
    }
    for nic in &detail.nics {
        rows.push(vec!["network".into(), format!("{} on {}", nic.mac.as_deref().unwrap_or("-"), nic.bridge)]);
    }
    rows.push(vec!["console".into(), detail.console.display().to_string()]);
    output.table(&["", ""], rows)
}

async fn delete(name: &str, yes: bool, client: &Client, output: Output) -> Result<(), Error> {
    if !yes {
        let detail: VmDetail = client.get(&format!("/v1/vms/{name}")).await?;
        let disks: Vec<String> = detail
            .disks
            .iter()
            .map(|d| format!("  {} ({})", d.path.display(), bytes(d.size_bytes)))
            .collect();
        return Err(Error::refused(format!("deleting `{name}` would give up its definition and its disks"))
            .cause(format!("disks:\n{}", disks.join("\n")))
            .hint(format!("run `rempart vm delete {name} --yes`")));
    }
    client.delete::<()>(&format!("/v1/vms/{name}")).await?;
    output.tell(&format!("`{name}` deleted"));
    Ok(())
}

async fn disk(command: DiskCommand, client: &Client, output: Output) -> Result<(), Error> {
    match command {
        DiskCommand::Add { name, size, from } => {
            let source = from.as_deref().map(|path| source(path, false)).transpose()?;
            let request = DiskAdd { source, size_bytes: size };
            let job: Job = client.post(&format!("/v1/vms/{name}/disks"), &request).await?;
            super::finish_job(client, output, job, &format!("disk added to `{name}`")).await.map(drop)
        }
        DiskCommand::Remove { name, index, yes } => {
            find(client, &name).await?;
            if !yes {
                return Err(Error::refused(format!(
                    "removing disk {index} of `{name}` would give up its contents"
                ))
                .hint(format!("run `rempart vm disk remove {name} {index} --yes`")));
            }
            let job: Job = client.delete(&format!("/v1/vms/{name}/disks/{index}")).await?;
            super::finish_job(client, output, job, &format!("disk {index} removed from `{name}`"))
                .await
                .map(drop)
        }
        DiskCommand::Resize { name, index, size } => {
            let request = DiskResize { size_bytes: size };
            let job: Job = client.post(&format!("/v1/vms/{name}/disks/{index}/resize"), &request).await?;
            let done = format!("disk {index} of `{name}` is {}", bytes(size));
            super::finish_job(client, output, job, &done).await.map(drop)
        }
    }
}

mod console {
    //! A terminal joined to a unix socket, both ways, until Ctrl-].

    use rempart_api::Error;
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    const LEAVE: u8 = 0x1d;

    struct RawMode(Option<Termios>);

    impl Drop for RawMode {
        fn drop(&mut self) {
            if let Some(before) = &self.0 {
                let _ = tcsetattr(std::io::stdin(), OptionalActions::Flush, before);
            }
        }
    }

    fn raw_mode() -> std::io::Result<RawMode> {
        if !isatty(std::io::stdin()) {
            return Ok(RawMode(None));
        }
        let before = tcgetattr(std::io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Flush, &raw)?;
        Ok(RawMode(Some(before)))
    }

    pub fn attach(path: &Path) -> Result<(), Error> {
        let stream = UnixStream::connect(path).map_err(|e| {
            Error::unreachable(format!("cannot open the console at `{}`", path.display()))
                .cause(e)
                .hint("the console exists while the machine runs on this node")
        })?;
        let _ = writeln!(std::io::stderr(), "connected; leave with Ctrl-]");
        let mode =
            raw_mode().map_err(|e| Error::failed("cannot switch the terminal to raw mode").cause(e))?;
        let result = join(stream);
        drop(mode);
        result.map_err(|e| Error::failed("the console broke off").cause(e))
    }

    fn join(mut stream: UnixStream) -> std::io::Result<()> {
        let mut buffer = [0u8; 4096];
        let mut input_open = true;
        loop {
            let stdin = std::io::stdin();
            let mut fds = vec![PollFd::new(&stream, PollFlags::IN)];
            if input_open {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
            poll(&mut fds, None)?;
            let from_guest = !fds[0].revents().is_empty();
            let from_user = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            drop(fds);
            if from_guest {
                let n = stream.read(&mut buffer)?;
                if n == 0 {
                    return Ok(());
                }
                let mut out = std::io::stdout().lock();
                out.write_all(&buffer[..n])?;
                out.flush()?;
            }
            if from_user {
                let n = rustix::io::read(&stdin, &mut buffer)?;
                if n == 0 {
                    input_open = false;
                    continue;
                }
                if let Some(at) = buffer[..n].iter().position(|&b| b == LEAVE) {
                    stream.write_all(&buffer[..at])?;
                    return Ok(());
                }
                stream.write_all(&buffer[..n])?;
            }
        }
    }
}

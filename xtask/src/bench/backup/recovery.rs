//! A machine that is recovered at once, against the same machine on its raw disks: how long until its guest first says
//! something. Its disks are moved meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::measure;
use super::tool::Tool;
use crate::guest::{self, Disks, Settings};
use crate::interrupt;
use crate::setup::Kernel;

const VM: &str = "guest";
/// What the guest's program says first.
const ANSWER: &str = "lab-guest: boot nonce";
/// Far above what an emulated guest takes to boot.
const PATIENCE: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(5);

/// Seconds until the first answer, round by round.
#[derive(Debug, Default)]
pub struct Recovery {
    pub ours: Vec<f64>,
    pub raw: Vec<f64>,
}

/// A machine's process, and what it goes with.
struct Running {
    child: Child,
    pid_file: PathBuf,
}

impl Drop for Running {
    /// What outlives the command, too.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Ok(pid) = fs::read_to_string(&self.pid_file) {
            let _ = Command::new("kill").args(["-KILL", pid.trim()]).status();
        }
    }
}

impl Recovery {
    pub fn measure(
        kernel: &Kernel,
        program: &Path,
        repository: &Tool,
        folder: &Path,
        rounds: u32,
    ) -> Result<Recovery> {
        let disks = guest::make_disks(kernel, Settings::default(), folder)?;
        let mut backup = Command::new(program);
        repository.environment(&mut backup);
        backup.args(["backup", VM, "--disk"]).arg(&disks.boot).arg("--disk").arg(&disks.data);
        measure::run(&mut backup)?;
        let mut measured = Recovery::default();
        for round in 1..=rounds {
            let here = folder.join(format!("recovery{round}"));
            fs::create_dir_all(&here)?;
            let ours = || {
                let mut command = Command::new(program);
                repository.environment(&mut command);
                command.args(["recover", "--instant", VM, "--to"]).arg(here.join("vm")).arg("--");
                command.args(machine(&here, "{disk0}", "{disk1}"));
                first_answer(command, &here)
            };
            let raw = || first_answer(on_raw(&disks, &here), &here);
            // What one of them left in the page cache the other finds, too.
            let (ours, raw) = match round % 2 {
                0 => {
                    let ours = ours()?;
                    (ours, raw()?)
                }
                _ => {
                    let raw = raw()?;
                    (ours()?, raw)
                }
            };
            eprintln!("{:24} {:9} {ours:7.2} s", "first answer", "rempart");
            eprintln!("{:24} {:9} {raw:7.2} s", "first answer", "raw");
            measured.ours.push(ours);
            measured.raw.push(raw);
            fs::remove_dir_all(&here)?;
        }
        Ok(measured)
    }
}

/// The same for both but for the disks.
fn machine(here: &Path, boot: &str, data: &str) -> Vec<String> {
    let here = here.display();
    let words = format!(
        "-machine q35 -accel tcg -cpu max -m 192 -nodefaults -display none -serial file:{here}/console \
         -pidfile {here}/pid -netdev user,id=net,restrict=on -device virtio-net-pci,netdev=net,romfile= \
         -device virtio-blk-pci,drive={boot},bootindex=1 -device virtio-blk-pci,drive={data}"
    );
    words.split_whitespace().map(str::to_owned).collect()
}

fn on_raw(disks: &Disks, here: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    for (name, file) in [("boot", &disks.boot), ("data", &disks.data)] {
        command.arg("-drive");
        command.arg(format!("if=none,id={name},format=raw,file={}", file.display()));
    }
    command.args(machine(here, "boot", "data"));
    command
}

/// Seconds from its start until the guest's program says something. Then it is ended.
fn first_answer(mut command: Command, here: &Path) -> Result<f64> {
    let console = here.join("console");
    let log = here.join("log");
    let said = fs::File::create(&log)?;
    let begun = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said).spawn();
    let mut running = Running { child: child.context("start a machine")?, pid_file: here.join("pid") };
    let seconds = loop {
        interrupt::check()?;
        // A line that is cut in the middle of a character is whole at the next look.
        if fs::read(&console).is_ok_and(|text| String::from_utf8_lossy(&text).contains(ANSWER)) {
            break begun.elapsed().as_secs_f64();
        }
        let said = || fs::read_to_string(&log).unwrap_or_default();
        let is_moved = said().contains("needs the repository no more");
        if let Some(status) = running.child.try_wait()?
            && !(status.success() && is_moved)
        {
            bail!("it ended with {status}: {}", said());
        }
        if begun.elapsed() > PATIENCE {
            bail!("no answer within {} s: {}", PATIENCE.as_secs(), said());
        }
        thread::sleep(POLL);
    };
    drop(running);
    for file in [console, here.join("pid")] {
        fs::remove_file(file)?;
    }
    Ok(seconds)
}

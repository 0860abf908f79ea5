//! The machine is backed up, whatever happened to it between two backups, and every restore point is restored.
//!
//! Besides its records, its guest writes all over the end of its second disk, at random in place and length: data, zeroes
//! and trims. The seed is told, and `--seed` has it write the same again.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::nodes::kill_qemu;
use crate::bench::client::Client;
use crate::demo::play::Play;
use crate::demo::rack::VM;
use crate::demo::story::{Amount, bytes_shown};
use crate::guest::{DATA_DISK_BYTES, RING_END};
use crate::interrupt;
use crate::lab::{Host, Side, send_signal};
use crate::verify::Copy;
use crate::workspace::output;

/// The machine's disks, as exports of its node.
const DISKS: [&str; 2] = ["disk0", "disk1"];
/// Slow enough that the guest writes while it is backed up.
const BANDWIDTH: &str = "4M";
const WRITTEN_MEANWHILE: u64 = 100;
const GROWN: u64 = DATA_DISK_BYTES + (16 << 20);
const PIECE: usize = 1 << 20;
const SECTOR: usize = 512;
/// Two are enough, or three, of what stands still.
const MOST_READINGS: u32 = 5;
/// More than a backup on a busy machine takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where backups go, and what came of them.
struct Vault {
    folder: PathBuf,
    points: Vec<Point>,
    /// Sectors behind the ring that became zero between two points.
    zeroed: u64,
}

/// A restore point, and what it has to be.
struct Point {
    /// What happened before it.
    after: &'static str,
    number: u64,
    reference: Copy,
    /// Acknowledged before it was begun.
    acknowledged: u64,
}

pub fn backed_up(play: &mut Play) -> Result<()> {
    let (primary, peer) = play.sides()?;
    let mut vault = Vault::create(play)?;
    vault.back_up(play, "the first backup")?;
    play.observer.wait_for_records(WRITTEN_MEANWHILE, PATIENCE)?;
    vault.back_up(play, "running on")?;

    let mark = play.mark();
    kill_qemu(play, primary)?;
    play.tell("QEMU is killed");
    play.expect_boot(mark)?;
    play.observer.wait_for_records(WRITTEN_MEANWHILE, PATIENCE)?;
    vault.back_up(play, "QEMU was killed")?;

    let size = GROWN.to_string();
    play.rack.user(primary.host(), &["vm", "disk", "resize", VM, "1", &size])?;
    play.tell("the second disk grows while the guest writes to it");
    play.observer.wait_for_records(WRITTEN_MEANWHILE, PATIENCE)?;
    vault.back_up(play, "a disk grew")?;

    let mark = play.mark();
    play.rack.user(primary.host(), &["vm", "stop", VM])?;
    play.wait_for_no_qemu(primary, PATIENCE)?;
    play.rack.user(primary.host(), &["vm", "start", VM])?;
    play.tell("the machine is shut down and started again");
    play.expect_boot(mark)?;
    play.observer.wait_for_records(WRITTEN_MEANWHILE, PATIENCE)?;
    vault.back_up(play, "it was restarted")?;

    let mark = play.mark();
    play.tell(&format!("planned move to {}", peer.host()));
    play.rack.user(peer.host(), &["failback", VM])?;
    play.expect_boot(mark)?;
    let now = play.primary()?;
    play.check("the machine moved", now == peer, format!("it runs on {}", now.host()));
    play.observer.wait_for_records(WRITTEN_MEANWHILE, PATIENCE)?;
    vault.back_up(play, "it moved to the peer")?;

    let zeroed = vault.zeroed;
    play.check("some of it were zeroes and trims", zeroed > 0, format!("{zeroed} sectors"));
    for point in &vault.points {
        vault.restore(play, point)?;
    }
    let verified = vault.run(play, peer.host(), &["verify", VM]);
    let detail = verified.as_ref().map_or_else(|error| format!("{error:#}"), |_| "all data".to_owned());
    play.check("`rempart verify` finds nothing wrong", verified.is_ok(), detail);
    Ok(())
}

impl Vault {
    fn create(play: &Play) -> Result<Vault> {
        let vault = Vault { folder: play.rack.lab.folder().join("backups"), points: Vec::new(), zeroed: 0 };
        fs::create_dir_all(&vault.folder)?;
        let repository = path_text(&vault.folder.join("repository"));
        let key = path_text(&vault.folder.join("key"));
        output(&mut play.rack.command(Host::A, &["repo", "create", &repository, "--new-key-file", &key]))?;
        Ok(vault)
    }

    /// A command on a node, about the repository.
    fn command(&self, play: &Play, host: Host, arguments: &[&str]) -> Command {
        let mut command = play.rack.command(host, arguments);
        command.env("REMPART_REPOSITORY", self.folder.join("repository"));
        command.env("REMPART_KEY_FILE", self.folder.join("key"));
        command.env("REMPART_CACHE_DIR", self.folder.join(format!("cache-{}", host.name())));
        command
    }

    fn run(&self, play: &Play, host: Host, arguments: &[&str]) -> Result<String> {
        output(&mut self.command(play, host, arguments))
    }

    /// Backs the machine up where it runs. It stands still from before its disks are copied, beside the backup, until the
    /// backup has taken its view; then it writes on.
    fn back_up(&mut self, play: &mut Play, after: &'static str) -> Result<()> {
        let primary = play.primary()?;
        let still = Still::hold(play.qemus(primary));
        let acknowledged = play.observer.notes().newest_acknowledged();
        let reference = self.copy_disks(play, primary)?;
        let arguments = ["backup", VM, "--consistency", "crash", "--bandwidth", BANDWIDTH];
        let mut command = self.command(play, primary.host(), &arguments);
        command.args(["--json", "--progress", "json"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut backup = UnderWay(command.spawn().context("start a backup")?);
        let mut progress = BufReader::new(backup.0.stderr.take().expect("it is piped")).lines();
        let mut said = Vec::new();
        // Whoever reads has a view. A short backup is over before it tells.
        for line in &mut progress {
            let line = line?;
            let done = serde_json::from_str::<Value>(&line).ok();
            said.push(line);
            if done.is_some_and(|line| line["progress"]["done_bytes"].as_u64() > Some(0)) {
                break;
            }
        }
        let was_under_way = backup.0.try_wait()?.is_none();
        drop(still);
        said.extend(progress.map_while(Result::ok));
        let ended = backup.end()?;
        ensure!(ended.status.success(), "the backup failed ({}): {}", ended.status, said.join("\n"));
        let meanwhile = play.observer.notes().newest_acknowledged() - acknowledged;
        let told: Value = serde_json::from_slice(&ended.stdout).context("what the backup says")?;
        let number = told["point"].as_u64().context("the backup names no point")?;
        let disks = told["disks"].as_array().context("the backup names no disks")?;
        let in_full: Vec<&str> = disks.iter().filter_map(|disk| disk["full_because"].as_str()).collect();
        let stored = told["stored_bytes"].as_u64().or(told["new_bytes"].as_u64()).unwrap_or(0);
        play.tell(&format!(
            "restore point {number}, after: {after}; {} new, {meanwhile} records written meanwhile",
            bytes_shown(stored)
        ));
        let is_first = self.points.is_empty();
        if let Some(before) = self.points.last() {
            let (changed, zeroes) = scattered(&before.reference.data, &reference.data)?;
            let detail = format!("after: {after}; {changed} sectors, {zeroes} of them to zero");
            play.check("the guest wrote at random since the point before", changed > 0, detail);
            self.zeroed += zeroes;
        }
        if is_first {
            play.figure("written during the first backup", Amount::Count(meanwhile));
            let detail = format!("{meanwhile} records, under way when it went on: {was_under_way}");
            play.check("the guest writes while it is backed up", meanwhile > 0, detail);
        } else {
            let detail = if in_full.is_empty() { after.to_owned() } else { in_full.join("; ") };
            play.check("only what changed is read", in_full.is_empty(), detail);
        }
        play.check_guest_content();
        self.points.push(Point { after, number, reference, acknowledged });
        Ok(())
    }

    /// What the machine's disks hold now, read through its node's own door. It must stand still.
    fn copy_disks(&self, play: &Play, side: Side) -> Result<Copy> {
        let folder = self.folder.join(format!("reference-{}", self.points.len()));
        fs::create_dir_all(&folder)?;
        let socket = play.rack.run_folder(side).join("vms").join(VM).join("nbd.sock");
        let copy = Copy { boot: folder.join("boot.raw"), data: folder.join("data.raw") };
        for (disk, path) in DISKS.iter().zip([&copy.boot, &copy.data]) {
            read_disk(&socket, disk, path)?;
        }
        // What the machine had sent before it stood still may have been on its way: the same twice is at rest.
        for (disk, path) in DISKS.iter().zip([&copy.boot, &copy.data]) {
            let mut readings = 1;
            while read_disk(&socket, disk, path)? {
                interrupt::check()?;
                readings += 1;
                ensure!(readings < MOST_READINGS, "the machine writes to {disk}, and should stand still");
            }
        }
        Ok(copy)
    }

    fn restore(&self, play: &mut Play, point: &Point) -> Result<()> {
        let side = play.primary()?;
        let to = self.folder.join("restored");
        let name = format!("{VM}@{}", point.number);
        self.run(play, side.host(), &["restore", &name, "--to", &path_text(&to)])?;
        let restored = Copy { boot: to.join("disk0.raw"), data: to.join("disk1.raw") };
        let difference = restored.first_difference(&point.reference)?;
        let verdict = restored.verify(point.acknowledged)?;
        let held = difference.is_none() && verdict.is_good();
        let detail = if held {
            format!("after: {}; records 1 to {}", point.after, point.acknowledged)
        } else {
            let seed = play.seed;
            format!("after: {}; differs at {difference:?}; {verdict:?}; replay: --seed {seed}", point.after)
        };
        play.check(&format!("point {} is what the machine was, byte for byte", point.number), held, detail);
        fs::remove_dir_all(&to)?;
        Ok(())
    }
}

/// Copies a disk to a file; says whether that changed the file.
fn read_disk(socket: &Path, disk: &str, path: &Path) -> Result<bool> {
    let mut client = Client::connect(socket, disk)?;
    let file = File::options().create(true).truncate(false).read(true).write(true).open(path)?;
    let is_new = file.metadata()?.len() != client.size;
    file.set_len(client.size)?;
    let (mut now, mut before) = (vec![0; PIECE], vec![0; PIECE]);
    let mut changed = is_new;
    for at in (0..client.size).step_by(PIECE) {
        let len = PIECE.min((client.size - at) as usize);
        client.send_read(at, at, len as u32)?;
        client.receive_read(&mut now[..len])?;
        file.read_exact_at(&mut before[..len], at)?;
        if now[..len] != before[..len] {
            file.write_all_at(&now[..len], at)?;
            changed = true;
        }
    }
    Ok(changed)
}

/// Sectors behind the ring that are not what they were, and those of them that are zeroes now.
fn scattered(before: &Path, now: &Path) -> Result<(u64, u64)> {
    let (before, now) = (File::open(before)?, File::open(now)?);
    let (mut old, mut new) = (vec![0; PIECE], vec![0; PIECE]);
    let (mut changed, mut zeroes) = (0, 0);
    for at in (RING_END..before.metadata()?.len()).step_by(PIECE) {
        before.read_exact_at(&mut old, at)?;
        now.read_exact_at(&mut new, at)?;
        let pairs = old.chunks_exact(SECTOR).zip(new.chunks_exact(SECTOR));
        for (_, sector) in pairs.filter(|(old, new)| old != new) {
            changed += 1;
            zeroes += u64::from(sector.iter().all(|byte| *byte == 0));
        }
    }
    Ok((changed, zeroes))
}

/// Processes that stand still until it is dropped.
struct Still(Vec<i32>);

impl Still {
    fn hold(processes: Vec<i32>) -> Still {
        processes.iter().for_each(|id| send_signal(*id, libc::SIGSTOP));
        Still(processes)
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        self.0.iter().for_each(|id| send_signal(*id, libc::SIGCONT));
    }
}

/// A backup that ends with us.
struct UnderWay(Child);

impl UnderWay {
    fn end(mut self) -> Result<std::process::Output> {
        let stdout = self.0.stdout.take().context("its output is piped")?;
        let lines: std::io::Result<Vec<String>> = BufReader::new(stdout).lines().collect();
        let status = self.0.wait()?;
        Ok(std::process::Output { status, stdout: lines?.join("\n").into_bytes(), stderr: Vec::new() })
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn path_text(path: &Path) -> String {
    path.display().to_string()
}

//! The real program, killed right before each change that it makes to a repository and to its own files, or that it asks a bucket
//! for: all that was there stays, the next run goes on with what is stored, and a collection removes what is left over.
//!
//! An ordinary run kills at some of the steps, `cargo xtask kill` at each.

mod at_once;
mod backup;
mod buckets;
mod collection;
mod copy;
mod forget;
mod key;
mod repair;
mod undelete;

use crate::backup::Vault;
use crate::killer::{self, Run, Step, Watched};
use crate::lab::Server;
use crate::rack::{Rack, noise};
use crate::stage::{AT_ONCE, CHUNK, MIB, PREFIX, Place, Stage, bytes_below, with};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::File;
use std::process::Command;
use std::sync::Arc;

/// Bytes that a commit itself puts: nodes, and what frames them.
const COMMIT: u64 = 16 << 10;

/// A repository, or two, that every kill begins with anew.
struct Story {
    template: Vault,
    /// The one that is looked at, and what opens it, in the template's folder.
    repository: &'static str,
    key: &'static str,
    /// It is put into a bucket of this one each time.
    server: Option<Server>,
    buckets: Cell<u32>,
    killed: Box<dyn Fn(&Stage) -> Command>,
    /// Kills in an ordinary run.
    slice: usize,
}

/// What a killed command left.
struct Left {
    context: String,
    /// Bytes that it puts into packs if it is not killed.
    put: u64,
    /// Bytes of packs that it told the log of.
    told: u64,
}

impl Story {
    /// Of the template's own repository.
    fn new(template: Vault, killed: impl Fn(&Stage) -> Command + 'static) -> Story {
        Story {
            template,
            repository: "repo",
            key: "key",
            server: None,
            buckets: Cell::default(),
            killed: Box::new(killed),
            slice: 8,
        }
    }

    /// A copy, as if nobody had touched it.
    fn begin(&self) -> Stage<'_> {
        let vault = copy_of(&self.template);
        let folder = vault.rack.path(self.repository);
        let place = match &self.server {
            None => Place::Directory(folder),
            Some(server) => {
                let name = format!("stage-{}", self.buckets.replace(self.buckets.get() + 1));
                Place::in_bucket(server, name, &folder)
            }
        };
        Stage { vault: Arc::new(vault), place, key: self.key }
    }

    fn run(&self, stage: &Stage, before: Option<usize>) -> Run {
        let mut command = (self.killed)(stage);
        let said = || File::create(stage.vault.rack.path("said")).expect("a file");
        command.stdout(said()).stderr(said());
        let folder = &stage.vault.rack.path("");
        killer::run(command, Watched { folder, requests: self.server.is_some() }, before)
    }

    /// Kills the command at steps of its own, and has `examine` look at what is left each time. It is told how much the whole
    /// command puts into packs, and how much of that is told in the log when it is killed.
    fn play(&self, examine: impl Fn(&Stage, &Left)) {
        let stage = self.begin();
        let before = stage.bytes("packs/");
        let whole = self.run(&stage, None);
        assert_eq!(whole.status, Some(0), "{}", said(&stage));
        let put = stage.bytes("packs/").saturating_sub(before);
        let calls: BTreeSet<_> = whole.steps.iter().map(|step| step.call).collect();
        let expected: &[_] = match self.server {
            None => &["create", "write", "fsync", "link", "unlink"],
            Some(_) => &["PUT"],
        };
        for call in expected {
            assert!(calls.contains(call), "no {call} was seen, only {calls:?}");
        }
        let every = match std::env::var("REMPART_KILL_EVERY") {
            Ok(every) => every.parse().expect("REMPART_KILL_EVERY is a number of steps"),
            Err(_) => whole.steps.len().div_ceil(self.slice),
        };
        let (mut kills, mut at) = (0, every / 2);
        // Threads may take more steps, or fewer, the next time.
        loop {
            let stage = self.begin();
            let run = self.run(&stage, Some(at));
            if run.status.is_some() {
                assert_eq!(run.status, Some(0), "{}", said(&stage));
                break;
            }
            let told = told(&run.steps, &stage);
            let context = format!("killed before step {at}, after {}", shown(&run.steps, &stage));
            println!("{context}; {told} of {put} bytes told");
            examine(&stage, &Left { context, put, told });
            (kills, at) = (kills + 1, at + every);
        }
        println!("{kills} kills in {} steps", whole.steps.len());
        assert!(kills + 1 >= self.slice, "{kills} kills in {} steps", whole.steps.len());
    }
}

impl Stage<'_> {
    /// The object that a step creates.
    fn created(&self, step: &Step) -> Option<String> {
        let created = match &self.place {
            Place::Directory(folder) if step.call == "link" => step.path.strip_prefix(folder).ok(),
            Place::Bucket { name, .. } if step.call == "PUT" => {
                step.path.strip_prefix(format!("/{name}/{PREFIX}")).ok()
            }
            _ => None,
        };
        created.map(|name| name.to_str().expect("text").to_owned())
    }

    /// These points are whole before a collection and after it, and each is the disk of its round, of 8 MiB.
    fn all_is_there(&self, points: &[String], context: &str) {
        assert_eq!(self.verify_all(context), points, "{context}");
        self.collect(context);
        assert_eq!(self.verify_all(context), points, "{context}");
        for (point, round) in points.iter().zip(0..) {
            assert!(self.restored(point, context) == disk(round, 8), "{context}: {point} is another");
        }
    }
}

fn copy_of(vault: &Vault) -> Vault {
    let copy = Vault { rack: Rack::new() };
    let status = Command::new("cp")
        .args(["--archive", "--no-target-directory"])
        .args([vault.rack.path(""), copy.rack.path("")])
        .status();
    assert!(status.expect("cp runs").success());
    copy
}

/// The last steps, for people.
fn shown(steps: &[Step], stage: &Stage) -> String {
    let root = stage.vault.rack.path("");
    let shown = |step: &Step| {
        let path = step.path.strip_prefix(&root).unwrap_or(&step.path).display().to_string();
        let path = path.rsplit_once(PREFIX).map_or(&*path, |(_, name)| name);
        format!("{} {}", step.call, path.chars().take(24).collect::<String>())
    };
    let last = &steps[steps.len().saturating_sub(2)..];
    last.iter().map(shown).collect::<Vec<_>>().join(", ")
}

fn said(stage: &Stage) -> String {
    std::fs::read_to_string(stage.vault.rack.path("said")).unwrap_or_default()
}

/// Bytes of the packs that were put before an index segment of which the log was told.
fn told(steps: &[Step], stage: &Stage) -> u64 {
    let objects = stage.objects("");
    // What was asked for last may have come to nothing.
    let created = |(at, step)| Some((at, stage.created(step).filter(|name| objects.contains_key(name))?));
    let created: Vec<(usize, String)> = steps.iter().enumerate().filter_map(created).collect();
    let of = |folder: &'static str| created.iter().filter(move |(_, name)| name.starts_with(folder));
    let Some((last_entry, _)) = of("log/").next_back() else { return 0 };
    let Some((segment, _)) = of("segments/").rfind(|(at, _)| at < last_entry) else { return 0 };
    of("packs/").filter(|(at, _)| at < segment).map(|(_, name)| objects[name]).sum()
}

fn write_disk(vault: &Vault, content: &[u8]) {
    std::fs::write(vault.rack.path("disk.raw"), content).expect("a disk");
}

/// Into the vault's own repository.
fn back_up(vault: &Vault) -> String {
    let disk = vault.rack.path("disk.raw");
    let done = vault.json(&["backup", "shop", "--disk", disk.to_str().expect("text")]);
    format!("shop@{}", done["point"])
}

/// The disk in the template's points, of which `changed` chunks are others in each.
fn disk(round: u64, changed: usize) -> Vec<u8> {
    let mut content = noise(1, 2 * MIB);
    content[..changed * CHUNK].copy_from_slice(&noise(round + 2, changed * CHUNK));
    content
}

/// A repository with a point of each of the first rounds, and their names.
fn with_points(rounds: u64, changed: usize) -> (Vault, Vec<String>) {
    let vault = Vault::opened_by_file();
    let point = |round| {
        write_disk(&vault, &disk(round, changed));
        back_up(&vault)
    };
    let points = (0..rounds).map(point).collect();
    (vault, points)
}

//! The real program, killed right before each change that it makes to a repository in a directory and to its own files: all that
//! was there stays, the next run goes on with what is stored, and a collection removes what is left over.
//!
//! An ordinary run kills at some of the steps, `cargo xtask kill` at each.

use crate::backup::Vault;
use crate::killer::{self, Run, Step};
use crate::rack::{Rack, noise};
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

const MIB: usize = 1 << 20;
const CHUNK: usize = 128 << 10;
/// Kills of each command in an ordinary run.
const SLICE: usize = 8;
/// Bytes that a commit itself puts: nodes, and what frames them.
const COMMIT: u64 = 16 << 10;
/// No machine writes into its repository for so long before it is taken for dead.
const AT_ONCE: [&str; 3] = ["gc", "--idle", "0s"];

/// A repository, or two, that every kill begins with anew.
struct Story {
    template: Vault,
    /// The one that is looked at, in the template's folder.
    repository: &'static str,
    killed: fn(&Vault) -> Command,
}

impl Story {
    /// A copy, as if nobody had touched it.
    fn begin(&self) -> Vault {
        let vault = Vault { rack: Rack::new() };
        let status = Command::new("cp")
            .args(["--archive", "--no-target-directory"])
            .args([self.template.rack.path(""), vault.rack.path("")])
            .status();
        assert!(status.expect("cp runs").success());
        vault
    }

    fn run(&self, vault: &Vault, before: Option<usize>) -> Run {
        let mut command = (self.killed)(vault);
        let said = || File::create(vault.rack.path("said")).expect("a file");
        command.stdout(said()).stderr(said());
        killer::run(command, &vault.rack.path(""), before)
    }

    /// Kills the command at steps of its own, and has `examine` look at what is left each time. It is told how much the whole
    /// command puts into packs, and how much of that is told in the log when it is killed.
    fn play(&self, examine: impl Fn(&Vault, &Left)) {
        let vault = self.begin();
        let before = bytes_below(&vault.rack.path(self.repository).join("packs"));
        let whole = self.run(&vault, None);
        assert_eq!(whole.status, Some(0), "{}", said(&vault));
        let put = bytes_below(&vault.rack.path(self.repository).join("packs")).saturating_sub(before);
        let calls: std::collections::BTreeSet<_> = whole.steps.iter().map(|step| step.call).collect();
        for call in ["create", "write", "fsync", "link", "unlink"] {
            assert!(calls.contains(call), "no {call} was seen, only {calls:?}");
        }
        let every = match std::env::var("REMPART_KILL_EVERY") {
            Ok(every) => every.parse().expect("REMPART_KILL_EVERY is a number of steps"),
            Err(_) => whole.steps.len().div_ceil(SLICE),
        };
        let (mut kills, mut at) = (0, every / 2);
        // Threads may take more steps, or fewer, the next time.
        loop {
            let vault = self.begin();
            let run = self.run(&vault, Some(at));
            if run.status.is_some() {
                assert_eq!(run.status, Some(0), "{}", said(&vault));
                break;
            }
            let told = told(&run.steps, &vault.rack.path(self.repository));
            let context = format!("killed before step {at}, after {}", shown(&run.steps, &vault));
            println!("{context}; {told} of {put} bytes told");
            examine(&vault, &Left { context, put, told });
            (kills, at) = (kills + 1, at + every);
        }
        println!("{kills} kills in {} steps", whole.steps.len());
        assert!(kills >= SLICE - 1, "{kills} kills in {} steps", whole.steps.len());
    }
}

/// What a killed command left.
struct Left {
    context: String,
    /// Bytes that it puts into packs if it is not killed.
    put: u64,
    /// Bytes of packs that it told the log of.
    told: u64,
}

/// The last steps, for people.
fn shown(steps: &[Step], vault: &Vault) -> String {
    let root = vault.rack.path("");
    let shown = |step: &Step| {
        let path = step.path.strip_prefix(&root).unwrap_or(&step.path).display().to_string();
        format!("{} {}", step.call, path.chars().take(24).collect::<String>())
    };
    let last = &steps[steps.len().saturating_sub(2)..];
    last.iter().map(shown).collect::<Vec<_>>().join(", ")
}

fn said(vault: &Vault) -> String {
    std::fs::read_to_string(vault.rack.path("said")).unwrap_or_default()
}

/// Bytes of the packs that were put before an index segment of which the log was told.
fn told(steps: &[Step], repository: &Path) -> u64 {
    let links = |folder: &str| {
        let folder = repository.join(folder);
        let is_one = move |step: &Step| step.call == "link" && step.path.starts_with(&folder);
        steps.iter().enumerate().filter(move |(_, step)| is_one(step))
    };
    let Some((last_entry, _)) = links("log").next_back() else { return 0 };
    let Some((segment, _)) = links("segments").rfind(|(at, _)| *at < last_entry) else {
        return 0;
    };
    let packs = links("packs").filter(|(at, _)| *at < segment);
    packs.map(|(_, step)| std::fs::metadata(&step.path).expect("it was put").len()).sum()
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let below = |path: PathBuf| if path.is_dir() { files_below(&path) } else { vec![path] };
    entries.flat_map(|entry| below(entry.expect("it is listed").path())).collect()
}

fn bytes_below(folder: &Path) -> u64 {
    files_below(folder).iter().map(|file| std::fs::metadata(file).expect("it is there").len()).sum()
}

/// Points of the machine `shop`, the oldest first.
fn points(vault: &Vault, access: &[&str]) -> Vec<String> {
    let listed = vault.json(&[&["points"], access].concat());
    let points = listed.as_array().expect("points");
    points.iter().map(|point| format!("shop@{}", point["point"])).collect()
}

/// Reads all points, each chunk of them.
fn verify(vault: &Vault, access: &[&str], context: &str) -> Vec<String> {
    let points = points(vault, access);
    if !points.is_empty() {
        let names: Vec<&str> = points.iter().map(String::as_str).collect();
        let answer = vault.run(&[&["verify"], &names[..], access].concat());
        assert_eq!(answer.code, 0, "{context}: {}", answer.err);
    }
    points
}

/// Nothing remains of nothing: what no point has is removed, whoever left it there.
fn all_is_removed(vault: &Vault, access: &[&str], repository: &Path, context: &str) {
    let points = points(vault, access);
    let names: Vec<&str> = points.iter().map(String::as_str).collect();
    if !names.is_empty() {
        vault.ok(&[&["forget"], &names[..], access].concat());
    }
    // Files of whoever died in writing them go when nobody can be at them any more.
    for file in files_below(&repository.join(".tmp")) {
        let old = SystemTime::now() - Duration::from_secs(25 * 3600);
        File::options().write(true).open(file).and_then(|file| file.set_modified(old)).expect("it is ours");
    }
    vault.ok(&[&AT_ONCE[..], access].concat());
    for folder in ["packs", "segments", ".tmp"] {
        let left = files_below(&repository.join(folder));
        assert!(left.is_empty(), "{context}: left are {left:?}");
    }
}

fn write_disk(vault: &Vault, content: &[u8]) {
    std::fs::write(vault.rack.path("disk.raw"), content).expect("a disk");
}

fn back_up(vault: &Vault) -> Value {
    vault.json(&["backup", "shop", "--disk", vault.rack.path("disk.raw").to_str().expect("text")])
}

/// The disk in the template's points, of which `changed` chunks are others in each.
fn disk(round: u64, changed: usize) -> Vec<u8> {
    let mut content = noise(1, 2 * MIB);
    content[..changed * CHUNK].copy_from_slice(&noise(round + 2, changed * CHUNK));
    content
}

#[test]
fn a_backup_that_is_killed_at_any_step_leaves_every_point_and_the_next_goes_on() {
    let template = Vault::opened_by_file();
    for round in 0..2 {
        write_disk(&template, &disk(round, 4));
        back_up(&template);
    }
    write_disk(&template, &disk(2, 12));
    let killed = |vault: &Vault| {
        vault.command(&["backup", "shop", "--disk", vault.rack.path("disk.raw").to_str().expect("text")])
    };
    Story { template, repository: "repo", killed }.play(|vault, left| {
        let context = &left.context;
        let whole = verify(vault, &[], context);
        assert!((2..=3).contains(&whole.len()), "{context}: {whole:?}");
        let there = bytes_below(&vault.repo().join("packs"));
        back_up(vault);
        let put = bytes_below(&vault.repo().join("packs")) - there;
        let most = left.put.saturating_sub(left.told) + COMMIT;
        assert!(put <= most, "{context}: {put} bytes were put, and {most} at most were missing");
        assert_eq!(verify(vault, &[], context).len(), whole.len() + 1, "{context}");
        let restored = vault.restored("shop", "back");
        assert!(restored == [disk(2, 12)], "{context}: the newest point is another");
        // What is reached remains, and nothing else.
        vault.ok(&AT_ONCE);
        assert_eq!(verify(vault, &[], context).len(), whole.len() + 1, "{context}");
        all_is_removed(vault, &[], &vault.repo(), context);
    });
}

#[test]
fn a_collection_that_is_killed_at_any_step_leaves_every_point_and_the_next_goes_on() {
    let template = Vault::opened_by_file();
    // Enough segments to be put together, and a pack of which little is of use once the first points are gone.
    for round in 0..18 {
        write_disk(&template, &disk(round, if round == 0 { 0 } else { 12 }));
        back_up(&template);
    }
    let points = points(&template, &[]);
    let forgotten: Vec<&str> = points[..15].iter().map(String::as_str).collect();
    template.ok(&[&["forget"], &forgotten[..]].concat());
    let story = {
        let story = Story { template, repository: "repo", killed: |vault| vault.command(&AT_ONCE) };
        let done = story.begin().json(&AT_ONCE);
        assert!(done["rewritten_packs"].as_u64() > Some(0), "{done}");
        assert!(done["removed_objects"].as_u64() > Some(20), "{done}");
        story
    };
    story.play(|vault, left| {
        let context = &left.context;
        assert_eq!(verify(vault, &[], context).len(), 3, "{context}");
        let there = bytes_below(&vault.repo().join("packs"));
        back_up(vault);
        let put = bytes_below(&vault.repo().join("packs")) - there;
        assert!(put <= COMMIT, "{context}: {put} bytes were put of what is all there");
        vault.ok(&AT_ONCE);
        assert_eq!(verify(vault, &[], context).len(), 4, "{context}");
        let again = vault.json(&AT_ONCE);
        assert_eq!(again["removed_objects"], 0, "{context}: {again}");
        all_is_removed(vault, &[], &vault.repo(), context);
    });
}

/// By a machine's own key, which only adds.
fn by_its_own(vault: &Vault) -> Command {
    let disk = vault.rack.path("disk.raw");
    let mut command = vault.command(&["agent", "backup", "--device", disk.to_str().expect("text"), "--json"]);
    command.env("REMPART_KEY_FILE", vault.rack.path("its-key"));
    command.env("REMPART_CACHE_DIR", vault.rack.path("its-cache"));
    command
}

fn back_up_by_its_own(vault: &Vault) {
    let answer = by_its_own(vault).output().expect("it runs");
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
}

/// A collection puts what a machine with a key of its own needs anew in that machine's domain, in sessions beside its own.
#[test]
fn a_collection_in_an_agents_domain_that_is_killed_at_any_step_leaves_every_point_and_the_next_goes_on() {
    let template = Vault::opened_by_file();
    let key = template.rack.path("its-key");
    let add = ["repo", "key", "add", "--write-only", "--name", "shop", "--new-key-file"];
    template.ok(&[&add[..], &[key.to_str().expect("text")]].concat());
    for round in 0..18 {
        write_disk(&template, &disk(round, if round == 0 { 0 } else { 12 }));
        back_up_by_its_own(&template);
    }
    let points = points(&template, &[]);
    let forgotten: Vec<&str> = points[..15].iter().map(String::as_str).collect();
    template.ok(&[&["forget"], &forgotten[..]].concat());
    let story = {
        let story = Story { template, repository: "repo", killed: |vault| vault.command(&AT_ONCE) };
        let vault = story.begin();
        let before = bytes_below(&vault.repo().join("packs"));
        let done = vault.json(&AT_ONCE);
        assert!(done["rewritten_packs"].as_u64() > Some(0), "{done}");
        let after = bytes_below(&vault.repo().join("packs"));
        let needed = (2 * MIB + 2 * 12 * CHUNK) as u64;
        assert!(after < needed + needed / 20 && after < before / 4, "{after} of {before} bytes are left");
        story
    };
    story.play(|vault, left| {
        let context = &left.context;
        assert_eq!(verify(vault, &[], context).len(), 3, "{context}");
        let there = bytes_below(&vault.repo().join("packs"));
        back_up_by_its_own(vault);
        let put = bytes_below(&vault.repo().join("packs")) - there;
        assert!(put <= COMMIT, "{context}: {put} bytes were put of what is all there");
        vault.ok(&AT_ONCE);
        let whole = verify(vault, &[], context);
        assert_eq!(whole.len(), 4, "{context}");
        for (point, round) in whole.iter().zip([15, 16, 17, 17]) {
            let to = vault.rack.path(&point.replace('@', "-"));
            vault.ok(&["restore", point, "--to", to.to_str().expect("text")]);
            let back = std::fs::read(to.join("disk.raw.raw")).expect("a disk");
            assert!(back == disk(round, 12), "{context}: {point} is another");
        }
        let again = vault.json(&AT_ONCE);
        assert_eq!(again["removed_objects"], 0, "{context}: {again}");
        all_is_removed(vault, &[], &vault.repo(), context);
    });
}

#[test]
fn a_copy_that_is_killed_at_any_step_is_gone_on_with() {
    fn of_second(vault: &Vault) -> [String; 4] {
        let text = |name: &str| vault.rack.path(name).to_str().expect("text").to_owned();
        ["--repo".to_owned(), text("second"), "--key-file".to_owned(), text("key-of-second")]
    }
    fn copy(vault: &Vault) -> Command {
        let [_, second, _, key] = of_second(vault);
        vault.command(&["copy", "--all", "--to", &second, "--to-key-file", &key, "--json"])
    }
    let template = Vault::opened_by_file();
    for round in 0..2 {
        write_disk(&template, &disk(round, 8));
        back_up(&template);
    }
    let [_, second, _, key] = of_second(&template);
    template.ok(&["repo", "create", &second, "--new-key-file", &key]);
    Story { template, repository: "second", killed: copy }.play(|vault, left| {
        let (context, second) = (&left.context, vault.rack.path("second"));
        let access = of_second(vault);
        let access = access.each_ref().map(String::as_str);
        let copied = verify(vault, &access, context);
        let there = bytes_below(&second.join("packs"));
        let again = copy(vault).output().expect("it runs");
        assert!(again.status.success(), "{context}: {}", String::from_utf8_lossy(&again.stderr));
        let told: Value = serde_json::from_slice(&again.stdout).expect("one JSON value");
        let told = told.as_array().expect("points");
        let was_there = told.iter().filter(|copy| copy["was_there"] == true).count();
        assert_eq!(was_there, copied.len(), "{context}: {told:?}");
        let put = bytes_below(&second.join("packs")) - there;
        let most = left.put.saturating_sub(left.told) + 2 * COMMIT;
        assert!(put <= most, "{context}: {put} bytes were sent, and {most} at most were missing");
        assert_eq!(verify(vault, &access, context).len(), 2, "{context}");
        assert_eq!(verify(vault, &[], context).len(), 2, "{context}: of the first");
        all_is_removed(vault, &access, &second, context);
    });
}

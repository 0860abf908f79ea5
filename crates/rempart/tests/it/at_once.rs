//! Two backups, a collection, a copy and a verify of one repository at once: no command locks it against the others.
//!
//! What machines hold comes back now and then, so that a backup builds on what is removed under it, and a collection moves
//! what others read.

use crate::backup::Vault;
use crate::killer::{self, Run, Watched};
use crate::lab::{Server, moto};
use crate::rack::{Answer, noise};
use crate::running::{Running, until};
use crate::stage::{self, AT_ONCE, CHUNK, Place, SECOND, Stage, with};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{PipeReader, Read};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

const MACHINES: [&str; 2] = ["shop", "till"];
/// Chunks of each machine's disk.
const CHUNKS: u64 = 16;
/// What each chunk may hold; a machine's next disk draws each anew.
const VERSIONS: u64 = 8;
/// Times that everybody begins anew, at least, in each round.
const TURNS: u64 = 2;

/// What a disk holds: a seed for each chunk.
type Disk = Vec<u64>;

fn bytes(disk: &[u64]) -> Vec<u8> {
    disk.iter().flat_map(|seed| noise(*seed, CHUNK)).collect()
}

/// One of so many, by a seed.
fn drawn(seed: u64, below: u64) -> u64 {
    u64::from_le_bytes(noise(seed, 8).try_into().expect("8 bytes")) % below
}

/// As many as in an ordinary run, or as somebody wants.
pub fn rounds(ordinary: u64) -> u64 {
    match std::env::var("REMPART_ROUNDS_AT_ONCE") {
        Ok(rounds) => rounds.parse().expect("REMPART_ROUNDS_AT_ONCE is a number of rounds"),
        Err(_) => ordinary,
    }
}

/// Two repositories, and what is known of the first one's points.
pub struct AtOnce<'s> {
    first: Stage<'s>,
    second: Stage<'s>,
    points: Mutex<BTreeMap<String, Disk>>,
    /// What was held against what was backed up.
    compared: Mutex<BTreeSet<String>>,
}

impl<'s> AtOnce<'s> {
    /// The first one in a bucket of that server, if there is one.
    pub fn new(server: Option<&'s Server>) -> AtOnce<'s> {
        let vault = Arc::new(Vault::opened_by_file());
        stage::second(&vault);
        let folder = vault.repo();
        let place = match server {
            None => Place::Directory(folder),
            Some(server) => Place::in_bucket(server, "at-once".to_owned(), &folder),
        };
        let first = Stage { vault: vault.clone(), place, key: "key" };
        let folder = vault.rack.path(SECOND.0);
        let second = Stage { vault, place: Place::Directory(folder), key: SECOND.1 };
        AtOnce { first, second, points: Mutex::default(), compared: Mutex::default() }
    }

    fn points(&self) -> MutexGuard<'_, BTreeMap<String, Disk>> {
        self.points.lock().expect("no holder panics")
    }

    /// Of a machine whose disk is this now. One is not on the host of the other: it has an index of its own.
    fn backup(&self, vm: &str, disk: &[u64]) -> Command {
        let image = self.first.path(&format!("{vm}.raw"));
        std::fs::write(&image, bytes(disk)).expect("a disk");
        let mut command = self.first.command(&["backup", vm, "--disk", &image]);
        command.env("REMPART_CACHE_DIR", self.first.path(&format!("cache-of-{vm}")));
        command
    }

    fn back_up(&self, vm: &str, disk: Disk) -> String {
        let answer = Answer::of(self.backup(vm, &disk).arg("--json").output().expect("it runs"));
        assert_eq!(answer.code, 0, "{}", answer.err);
        self.is_there(vm, disk, &answer)
    }

    fn is_there(&self, vm: &str, disk: Disk, answer: &Answer) -> String {
        let told: Value = serde_json::from_str(&answer.out).expect("one JSON value");
        let point = format!("{vm}@{}", told["point"]);
        self.points().insert(point.clone(), disk);
        point
    }

    /// A point of a machine that nobody told of: it holds this.
    fn look_for(&self, vm: &str, disk: &[u64], context: &str) {
        for point in self.first.points(context) {
            if point.starts_with(&format!("{vm}@")) {
                self.points().entry(point).or_insert_with(|| disk.to_vec());
            }
        }
    }

    fn copy(&self, points: &[&str]) -> Command {
        let (to, key) = (self.second.url(), self.second.path(self.second.key));
        self.first.command(&[&["copy"], points, &["--to", &to, "--to-key-file", &key]].concat())
    }

    /// Round after round. In the first one it is counted what steps each command has; from then on, if `kills`, one of somebody
    /// else's is killed in each.
    pub fn play(&self, rounds: u64, kills: bool) {
        for vm in MACHINES {
            self.back_up(vm, (0..CHUNKS).map(|place| place * VERSIONS).collect());
        }
        let (mut steps, mut killed) = (Vec::new(), 0);
        for seed in 0..rounds {
            let kills = match (kills, seed) {
                (false, _) => Vec::new(),
                (true, 0) => EVERYBODY.map(|who| Kill { who, before: None }).to_vec(),
                (true, _) => {
                    let place = (seed - 1) as usize % EVERYBODY.len();
                    let before = drawn(seed, steps[place]) as usize;
                    vec![Kill { who: EVERYBODY[place], before: Some(before) }]
                }
            };
            let begun = Instant::now();
            let runs = Round::new(self, seed, kills).play();
            let played = begun.elapsed();
            let context = format!("after seed {seed}");
            if seed == 0 {
                steps = runs.iter().map(|(_, run)| run.steps.len() as u64).collect();
            } else {
                killed += runs.iter().filter(|(_, run)| run.status.is_none()).count();
            }
            self.is_sound(&context);
            let forget = ["retain", "--all", "--keep-last", "2"];
            self.second.ok(&forget, &context);
            self.second.ok(&["gc"], &context);
            println!("{context}: {played:?}, and {:?} to look at what is left", begun.elapsed() - played);
        }
        assert!(!kills || 2 * killed as u64 >= rounds - 1, "only {killed} were killed in {rounds} rounds");
        self.is_copied("at the end");
        self.ends("at the end");
    }

    /// What stands in one of the two, and what it has to be.
    fn standing(&self, stage: &Stage, context: &str) -> BTreeMap<String, Disk> {
        let (listed, points) = (stage.json(&["points"], context), self.points());
        let listed = listed.as_array().expect("points").iter();
        let known = |point| {
            let expected = points.get(&origin(point));
            (name(point), expected.unwrap_or_else(|| panic!("{context}: {point} is nobody's")).clone())
        };
        listed.map(known).collect()
    }

    /// Everything that stands is what was backed up, in both. What was restored before is only read.
    fn is_sound(&self, context: &str) {
        for stage in [&self.first, &self.second] {
            stage.ok(&["repo", "check"], context);
            let standing = self.standing(stage, context);
            stage.verify(&Vec::from_iter(standing.keys().cloned()), context);
            for (point, disk) in standing {
                let mut compared = self.compared.lock().expect("no holder panics");
                if compared.insert(format!("{point} of {}", stage.url())) {
                    assert!(stage.restored(&point, context) == bytes(&disk), "{context}: {point} is another");
                }
            }
        }
    }

    /// Every point that stands in the first is in the second.
    fn is_copied(&self, context: &str) {
        let copied = Answer::of(self.copy(&["--all"]).output().expect("it runs"));
        assert_eq!(copied.code, 0, "{context}: {}", copied.err);
        let listed = self.second.json(&["points"], context);
        let copies: BTreeSet<String> = listed.as_array().expect("points").iter().map(origin).collect();
        let points = self.first.points(context);
        assert!(points.iter().all(|point| copies.contains(point)), "{context}: {points:?}, {copies:?}");
    }

    /// A collection leaves nothing that no point reaches, whoever stored it or began to; when all is forgotten it leaves nothing.
    fn ends(&self, context: &str) {
        for stage in [&self.first, &self.second] {
            stage.ok(&AT_ONCE, context);
            let outlook = stage.json(&["gc", "--dry-run"], context);
            assert_eq!((&outlook["removable_packs"], &outlook["open_sessions"]), (&json!(0), &json!(0)));
            let (live, there) = (stage.json(&["repo", "show"], context), stage.objects("packs/"));
            assert_eq!(live["packs"], there.len(), "{context}: {there:?}");
        }
        self.compared.lock().expect("no holder panics").clear();
        self.is_sound(context);
        self.first.all_is_removed(context);
        self.second.all_is_removed(context);
    }

    /// Nothing lies twice, or beside what points need.
    fn is_tight(&self, context: &str) {
        for stage in [&self.first, &self.second] {
            stage.collect(context);
            // Not even the part of a pack that is not worth the while.
            stage.ok(&with(&AT_ONCE, &["--repack", "100"].map(str::to_owned)), context);
            let chunks: BTreeSet<u64> = self.standing(stage, context).into_values().flatten().collect();
            let (needed, there) = ((chunks.len() * CHUNK) as u64, stage.bytes("packs/"));
            let is_tight = (needed..=needed + needed / 20).contains(&there);
            assert!(is_tight, "{context}: {there} bytes, and {needed} are needed");
        }
    }
}

fn name(point: &Value) -> String {
    format!("{}@{}", point["vm"].as_str().expect("text"), point["point"])
}

/// The point that this one is a copy of; or it itself.
fn origin(point: &Value) -> String {
    let mut notes = point["notes"].as_array().expect("notes").iter().rev();
    let number = notes.find_map(|note| note.as_str()?.split_once(" from point ")?.1.split(' ').next());
    number.map_or_else(|| name(point), |number| format!("{}@{number}", point["vm"].as_str().expect("text")))
}

/// What they build on is condemned, what they read is moved, and what they continue is forgotten, while they stand still.
fn stands_still(all: &AtOnce) {
    let context = "while they stand still";
    let back_up = |vm, seed, disk: &dyn Fn(u64) -> u64| {
        all.back_up(vm, (0..CHUNKS).map(|place| seed + disk(place)).collect())
    };
    // Of the first points only a quarter is in those that stay.
    let mut old = Vec::new();
    for (vm, seed) in MACHINES.into_iter().zip([1000, 2000]) {
        old.push(back_up(vm, seed, &|place| place));
    }
    let [shop, till] = MACHINES;
    let copied = back_up(shop, 1000, &|place| place + 16);
    let sent = Answer::of(all.copy(&[&copied]).output().expect("it runs"));
    assert_eq!(sent.code, 0, "{}", sent.err);
    let quarter = |place| if place < 4 { place } else { place + 32 };
    let stay = [back_up(shop, 1000, &quarter), back_up(till, 2000, &quarter)];
    let next = [1000, 2000].map(|seed| {
        let next = |place| if (4..8).contains(&place) { place } else { place + 64 };
        (0..CHUNKS).map(|place| seed + next(place)).collect::<Disk>()
    });
    all.first.ok(&with(&["forget"], &old), context);

    let packs = || all.first.objects("packs/").into_keys().collect::<BTreeSet<String>>();
    let before = packs();
    let vault = &all.first.vault;
    let backups = MACHINES.iter().zip(&next).map(|(vm, disk)| all.backup(vm, disk));
    let mut running: Vec<_> = backups.map(|backup| Running::unheard(vault, backup)).collect();
    // It says that the first point is there, and has read nothing of the others.
    running.push(Running::unheard(vault, all.copy(&["--all"])));
    // It has read the first, at most.
    running.push(Running::unheard(vault, all.first.command(&["verify", &stay[1], &stay[0]])));
    // No entry of the log tells of it yet.
    until("both backups stored what is new", || packs().len() >= before.len() + 2);
    let outlook = || all.first.json(&["gc", "--dry-run"], context);
    until("everybody is there", || outlook()["open_sessions"] == 4);
    let judged = all.first.json(&["retain", "--all", "--keep-none"], context);
    let kept = |point: &&Value| point["kept"] == true && point["why"] == json!(["in-use"]);
    let kept = judged.as_array().expect("points").iter().filter(kept);
    assert!(kept.map(name).eq(stay.iter().cloned()), "{judged}");

    let stored: BTreeSet<String> = packs().difference(&before).cloned().collect();
    let collected = all.first.json(&["gc"], context);
    assert!(stored.is_subset(&packs()), "{context}: {stored:?}");
    assert!(collected["rewritten_packs"].as_u64() >= Some(2), "{collected}");
    assert!(collected["removed_objects"].as_u64() >= Some(3), "{collected}");
    assert_eq!((&collected["ended_sessions"], &outlook()["open_sessions"]), (&json!(0), &json!(4)));

    let heard = |(running, mut said): (Running, PipeReader)| {
        let mut heard = String::new();
        said.read_to_string(&mut heard).expect("text");
        assert_eq!(running.ended(), 0, "{}", heard.trim());
        heard
    };
    let heard: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = running.into_iter().map(|running| scope.spawn(|| heard(running))).collect();
        threads.into_iter().map(|thread| thread.join().expect("it ended well")).collect()
    });
    for heard in &heard[..2] {
        assert!(heard.contains("what it built on was removed meanwhile; once more"), "{}", heard.trim());
    }
    for (vm, disk) in MACHINES.iter().zip(&next) {
        all.look_for(vm, disk, context);
    }
    assert_eq!((all.first.points(context).len(), all.second.points(context).len()), (4, 3));
    all.is_sound(context);
    all.is_tight(context);
    all.ends(context);
}

/// Who goes on at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Machine(&'static str),
    Collector,
    Copier,
    Verifier,
}

const EVERYBODY: [Who; 5] =
    [Who::Machine(MACHINES[0]), Who::Machine(MACHINES[1]), Who::Collector, Who::Copier, Who::Verifier];

/// Whose command is killed, and before which of its steps; or it is only seen how many there are.
#[derive(Debug, Clone, Copy)]
struct Kill {
    who: Who,
    before: Option<usize>,
}

/// A time in which everybody begins again and again, until the last one did so often enough.
struct Round<'a, 's> {
    all: &'a AtOnce<'s>,
    seed: u64,
    kills: Vec<Kill>,
    /// Those that did not yet.
    missing: AtomicUsize,
    failed: AtomicBool,
    times: Mutex<Vec<(Who, Instant, Instant)>>,
    killed: Mutex<Vec<(Who, Run)>>,
}

/// Its thread panics, or not.
struct Part<'a>(&'a AtomicBool);

impl Drop for Part<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

impl<'a, 's> Round<'a, 's> {
    fn new(all: &'a AtOnce<'s>, seed: u64, kills: Vec<Kill>) -> Round<'a, 's> {
        let (times, killed) = (Mutex::default(), Mutex::default());
        let (missing, failed) = (AtomicUsize::new(EVERYBODY.len()), AtomicBool::new(false));
        Round { all, seed, kills, missing, failed, times, killed }
    }

    /// What those did that were watched, in the order of `EVERYBODY`.
    fn play(self) -> Vec<(Who, Run)> {
        std::thread::scope(|scope| {
            for who in EVERYBODY {
                let round = &self;
                scope.spawn(move || round.goes_on(who));
            }
        });
        self.all_were_there();
        let mut runs = self.killed.into_inner().expect("no holder panics");
        for (who, run) in runs.iter().filter(|(_, run)| run.status.is_none()) {
            println!("seed {}: {who:?} was killed after {} steps", self.seed, run.steps.len());
        }
        runs.sort_by_key(|(who, _)| EVERYBODY.iter().position(|one| one == who));
        runs
    }

    fn goes_on(&self, who: Who) {
        let _part = Part(&self.failed);
        for turn in 0.. {
            match who {
                Who::Machine(vm) => self.backs_up(vm, turn),
                Who::Collector => self.collects(turn),
                Who::Copier => self.copies(turn),
                Who::Verifier => self.verifies(turn),
            }
            if turn + 1 == TURNS {
                self.missing.fetch_sub(1, Ordering::Relaxed);
            }
            if self.missing.load(Ordering::Relaxed) == 0 || self.failed.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    /// `None` if it was killed.
    fn ran(&self, who: Who, turn: u64, mut command: Command) -> Option<Answer> {
        let began = Instant::now();
        let answer = match self.kills.iter().find(|kill| kill.who == who && turn == 0) {
            None => Some(Answer::of(command.output().expect("it runs"))),
            Some(kill) => {
                let rack = &self.all.first.vault.rack;
                let [out, err] = ["out", "err"].map(|name| rack.path(&format!("{who:?}.{name}")));
                let [to, and_to] = [&out, &err].map(|path| File::create(path).expect("a file"));
                command.stdout(to).stderr(and_to);
                let requests = matches!(self.all.first.place, Place::Bucket { .. });
                let watched = Watched { folder: &rack.path(""), requests };
                let run = killer::run(command, watched, kill.before);
                let [out, err] = [out, err].map(|path| std::fs::read_to_string(path).expect("text"));
                let answer = run.status.map(|code| Answer { code, out, err });
                self.killed.lock().expect("no holder panics").push((who, run));
                answer
            }
        };
        self.times.lock().expect("no holder panics").push((who, began, Instant::now()));
        answer
    }

    fn context(&self, who: Who, turn: u64) -> String {
        format!("seed {}, {who:?}, turn {turn}", self.seed)
    }

    fn backs_up(&self, vm: &'static str, turn: u64) {
        let (who, all) = (Who::Machine(vm), self.all);
        let at = MACHINES.iter().position(|name| *name == vm).expect("one of them") as u64;
        let draw = |place: u64| drawn(((self.seed * 100 + turn) * 2 + at) * CHUNKS + place, VERSIONS);
        // The other machine may hold the same.
        let disk: Disk = (0..CHUNKS).map(|place| place * VERSIONS + draw(place)).collect();
        let mut command = all.backup(vm, &disk);
        command.arg("--json");
        let context = self.context(who, turn);
        match self.ran(who, turn, command) {
            Some(answer) => {
                assert_eq!(answer.code, 0, "{context}: {}", answer.err);
                let point = all.is_there(vm, disk, &answer);
                // The newest of a machine is forgotten by no rule.
                assert!(all.first.points(&context).contains(&point), "{context}: {point} is lost");
            }
            None => all.look_for(vm, &disk, &context),
        }
    }

    fn collects(&self, turn: u64) {
        let (who, first) = (Who::Collector, &self.all.first);
        let context = self.context(who, turn);
        first.ok(&["retain", "--all", "--keep-last", "2"], &context);
        if let Some(answer) = self.ran(who, turn, first.command(&["gc", "--json"])) {
            assert_eq!(answer.code, 0, "{context}: {}", answer.err);
        }
    }

    fn copies(&self, turn: u64) {
        let context = self.context(Who::Copier, turn);
        if let Some(answer) = self.ran(Who::Copier, turn, self.all.copy(&["--all"])) {
            assert_eq!(answer.code, 0, "{context}: {}", answer.err);
        }
    }

    /// Any two points.
    fn verifies(&self, turn: u64) {
        let context = self.context(Who::Verifier, turn);
        let points = self.all.first.points(&context);
        let some = [0, 1].map(|which| {
            let place = drawn((self.seed * 100 + turn) * 2 + which, points.len() as u64);
            points[place as usize].clone()
        });
        let command = self.all.first.command(&with(&["verify"], &some));
        let Some(answer) = self.ran(Who::Verifier, turn, command) else { return };
        // Forgotten before it was found.
        let is_gone = answer.code == 1 && answer.err.contains("there is no restore point");
        assert!(answer.code == 0 || is_gone, "{context}: {}", answer.err);
    }

    /// There was a moment in which a command of each of them ran.
    fn all_were_there(&self) {
        let times = self.times.lock().expect("no holder panics");
        let ran = |who: Who, at: Instant| {
            times.iter().any(|(whose, began, ended)| *whose == who && (*began..*ended).contains(&at))
        };
        let together = times.iter().filter(|(_, at, _)| EVERYBODY.iter().all(|who| ran(*who, *at))).count();
        println!("seed {}: {} commands, {together} begun while all others ran", self.seed, times.len());
        assert!(together > 0, "seed {}: they did not run at once: {times:?}", self.seed);
    }
}

#[test]
fn two_backups_a_collection_a_copy_and_a_verify_run_at_once() {
    AtOnce::new(None).play(rounds(5), false);
}

#[test]
fn a_collection_in_the_middle_of_two_backups_a_copy_and_a_verify_takes_nothing_from_them() {
    stands_still(&AtOnce::new(None));
}

#[test]
fn a_collection_in_a_bucket_in_the_middle_of_the_others_takes_nothing_from_them() {
    let Some(server) = moto() else { return };
    stands_still(&AtOnce::new(Some(&server)));
}

#[test]
fn they_run_at_once_in_a_bucket() {
    let Some(server) = moto() else { return };
    AtOnce::new(Some(&server)).play(rounds(1), false);
}

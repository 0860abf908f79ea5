//! A repository in a directory or in a bucket, and what stories do with it whatever becomes of its commands.

use crate::backup::Vault;
use crate::buckets::{self as bucket, Client};
use crate::lab::{Server, moto_ask};
use crate::rack::Answer;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub const MIB: usize = 1 << 20;
pub const CHUNK: usize = 128 << 10;
/// No machine writes into its repository for so long before it is taken for dead.
pub const AT_ONCE: [&str; 3] = ["gc", "--idle", "0s"];
/// Where a repository lies in its bucket.
pub const PREFIX: &str = "some/where";

/// The second repository of a vault, and what opens it.
pub const SECOND: (&str, &str) = ("second", "key-of-second");

/// Makes an empty one.
pub fn second(vault: &Vault) {
    let [second, key] = [SECOND.0, SECOND.1].map(|name| vault.rack.path(name));
    let [second, key] = [&second, &key].map(|path| path.to_str().expect("text"));
    vault.ok(&["repo", "create", second, "--new-key-file", key]);
}

/// A repository that is looked at, and the folder that is around it.
pub struct Stage<'s> {
    pub vault: Arc<Vault>,
    pub place: Place<'s>,
    /// What opens it, in that folder.
    pub key: &'static str,
}

/// Where it lies.
pub enum Place<'s> {
    Directory(PathBuf),
    Bucket { server: &'s Server, name: String },
}

impl<'s> Place<'s> {
    /// What lies in a directory, in a bucket that is made for it.
    pub fn in_bucket(server: &'s Server, name: String, folder: &Path) -> Place<'s> {
        assert_eq!(moto_ask(server, "PUT", &format!("/{name}"), &[], ""), 200);
        let client = Client::new(server, &name);
        for file in files_below(folder) {
            let name = file.strip_prefix(folder).expect("below it").to_str().expect("text");
            client.put(&format!("{PREFIX}/{name}"), std::fs::read(&file).expect("it is there"));
        }
        Place::Bucket { server, name }
    }
}

impl Stage<'_> {
    /// On the repository that is looked at.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.vault.command(arguments);
        command.env("REMPART_REPOSITORY", self.url()).env("REMPART_KEY_FILE", self.vault.rack.path(self.key));
        if let Place::Bucket { .. } = self.place {
            command.envs(bucket::CREDENTIALS);
        }
        command
    }

    pub fn url(&self) -> String {
        match &self.place {
            Place::Directory(folder) => folder.to_str().expect("text").to_owned(),
            Place::Bucket { server, name } => bucket::url(server, name, PREFIX),
        }
    }

    pub fn path(&self, name: &str) -> String {
        self.vault.rack.path(name).to_str().expect("text").to_owned()
    }

    pub fn run(&self, arguments: &[&str]) -> Answer {
        Answer::of(self.command(arguments).output().expect("it runs"))
    }

    pub fn ok(&self, arguments: &[&str], context: &str) -> Answer {
        let answer = self.run(arguments);
        assert_eq!(answer.code, 0, "{context}: {arguments:?}: {}", answer.err);
        answer
    }

    pub fn json(&self, arguments: &[&str], context: &str) -> Value {
        let answer = self.ok(&[arguments, &["--json"]].concat(), context);
        serde_json::from_str(&answer.out).expect("one JSON value")
    }

    /// Objects whose names begin with `prefix`, and their bytes.
    pub fn objects(&self, prefix: &str) -> BTreeMap<String, u64> {
        match &self.place {
            Place::Directory(folder) => {
                let named = |file: PathBuf| {
                    let name = file.strip_prefix(folder).expect("below it").to_str().expect("text");
                    // It may be gone by now: somebody writes, or removes.
                    Some((name.to_owned(), std::fs::metadata(&file).ok()?.len()))
                };
                let files = files_below(folder).into_iter().filter_map(named);
                files.filter(|(name, _)| name.starts_with(prefix)).collect()
            }
            Place::Bucket { server, name } => {
                let objects = Client::new(server, name).objects().into_iter();
                let named = objects.map(|object| {
                    let name = object.location.as_ref().strip_prefix(PREFIX).expect("below it");
                    (name.trim_start_matches('/').to_owned(), object.size)
                });
                named.filter(|(name, _)| name.starts_with(prefix)).collect()
            }
        }
    }

    pub fn bytes(&self, prefix: &str) -> u64 {
        self.objects(prefix).values().sum()
    }

    /// All points, the oldest first.
    pub fn points(&self, context: &str) -> Vec<String> {
        let listed = self.json(&["points"], context);
        let points = listed.as_array().expect("points");
        let name = |point: &Value| format!("{}@{}", point["vm"].as_str().expect("text"), point["point"]);
        points.iter().map(name).collect()
    }

    /// Reads these points, each chunk of them.
    pub fn verify(&self, points: &[String], context: &str) {
        if !points.is_empty() {
            self.ok(&with(&["verify"], points), context);
        }
    }

    /// Reads all points; their names.
    pub fn verify_all(&self, context: &str) -> Vec<String> {
        let points = self.points(context);
        self.verify(&points, context);
        points
    }

    pub fn back_up(&self, context: &str) -> Value {
        self.json(&["backup", "shop", "--disk", &self.path("disk.raw")], context)
    }

    /// The disk of a point.
    pub fn restored(&self, point: &str, context: &str) -> Vec<u8> {
        let to = self.vault.rack.path(&point.replace('@', "-"));
        self.ok(&["restore", point, "--to", to.to_str().expect("text")], context);
        let [disk] = &files_below(&to)[..] else { panic!("{context}: not one disk") };
        let content = std::fs::read(disk).expect("a disk");
        std::fs::remove_dir_all(to).expect("it is ours");
        content
    }

    /// What is reached remains, and nothing else: a second collection finds nothing more.
    pub fn collect(&self, context: &str) {
        self.ok(&AT_ONCE, context);
        let again = self.json(&AT_ONCE, context);
        assert_eq!(again["removed_objects"], 0, "{context}: {again}");
    }

    /// Nothing remains of nothing: what no point has is removed, whoever left it there.
    pub fn all_is_removed(&self, context: &str) {
        let points = self.points(context);
        if !points.is_empty() {
            self.ok(&with(&["forget"], &points), context);
        }
        if let Place::Directory(folder) = &self.place {
            // Files of whoever died in writing them go when nobody can be at them any more.
            for file in files_below(&folder.join(".tmp")) {
                let old = SystemTime::now() - Duration::from_secs(25 * 3600);
                let file = File::options().write(true).open(file);
                file.and_then(|file| file.set_modified(old)).expect("it is ours");
            }
        }
        self.ok(&AT_ONCE, context);
        for folder in ["packs/", "segments/", ".tmp/"] {
            let left = self.objects(folder);
            assert!(left.is_empty(), "{context}: left are {left:?}");
        }
    }
}

pub fn with<'a>(arguments: &[&'a str], points: &'a [String]) -> Vec<&'a str> {
    arguments.iter().copied().chain(points.iter().map(String::as_str)).collect()
}

pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let below = |path: PathBuf| if path.is_dir() { files_below(&path) } else { vec![path] };
    entries.flat_map(|entry| below(entry.expect("it is listed").path())).collect()
}

pub fn bytes_below(folder: &Path) -> u64 {
    files_below(folder).iter().map(|file| std::fs::metadata(file).expect("it is there").len()).sum()
}

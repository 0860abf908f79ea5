//! Stories, read aloud: `testdata/*.txt` holds commands and, below each `----`, what they lead to.
//!
//! Two or three members, a register, connections and guards under a virtual clock. Everything takes a little time:
//! a message 1 ms, a durable superblock 2 ms, the register 5 ms, a drain 10 ms, a machine 20 ms to start or stop.
//! Beacons, their answers and the leases they renew are left out unless asked for.
//! `REWRITE_TRANSCRIPTS=1 cargo test` writes what it sees; then read the difference.

mod stage;

use stage::Stage;
use std::path::{Path, PathBuf};

fn stories() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let entries = std::fs::read_dir(directory).expect("list the stories");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("list the stories").path()).collect();
    paths.sort();
    paths
}

/// Plays a story: comments stay, outputs are replaced by what happens.
fn play(text: &str) -> String {
    let mut stage = Stage::new();
    let mut told = String::new();
    let mut commands: Vec<&str> = Vec::new();
    let mut in_output = false;
    for line in text.lines() {
        if line == "----" {
            told.push_str("----\n");
            for command in commands.drain(..) {
                stage.command(command);
            }
            told.push_str(&stage.take_told());
            in_output = true;
        } else if line.is_empty() {
            told.push('\n');
            in_output = false;
        } else if !in_output {
            told.push_str(line);
            told.push('\n');
            if !line.starts_with('#') {
                commands.push(line);
            }
        }
    }
    told
}

#[test]
fn every_story_is_told_as_it_was_written() {
    let stories = stories();
    assert!(stories.len() >= 12, "stories are missing");
    let mut changed = Vec::new();
    for path in stories {
        let written = std::fs::read_to_string(&path).expect("read a story");
        let told = play(&written);
        if told == written {
            continue;
        }
        if std::env::var_os("REWRITE_TRANSCRIPTS").is_some() {
            std::fs::write(&path, told).expect("write a story");
        } else {
            let first = written.lines().zip(told.lines()).find(|(was, is)| was != is);
            changed.push(format!("{}: {first:?}", path.display()));
        }
    }
    assert!(changed.is_empty(), "told otherwise than written:\n{}", changed.join("\n"));
}

//! What the program says, kept in files: `testdata/*.txt` is what it said when somebody last read it.
//! `REWRITE_TRANSCRIPTS=1 cargo test` writes what it says now; then read the difference.

use crate::rack::Server;
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;

/// Commands and their answers, in the order given.
#[derive(Debug, Default)]
pub struct Transcript {
    text: String,
}

impl Transcript {
    pub fn comment(&mut self, text: &str) {
        writeln!(self.text, "# {text}").unwrap();
    }

    /// Has `server` run a command, and writes down what came of it.
    pub fn run(&mut self, server: &Server, arguments: &[&str]) {
        let answer = server.run(arguments);
        self.told(&format!("rempart {}", arguments.join(" ")), answer.code, &answer.out, &answer.err);
    }

    pub fn told(&mut self, command: &str, code: i32, out: &str, err: &str) {
        writeln!(self.text, "$ {command}\n[{code}]").unwrap();
        // How far something is depends on how fast the machine is.
        let said = err.lines().chain(out.lines()).filter(|line| !line.contains('%') && !is_progress(line));
        for line in said {
            writeln!(self.text, "{line}").unwrap();
        }
        self.text.push('\n');
    }

    /// Writes down what is in a JSON value, and not what it says. `command` is without `--json`.
    pub fn shape(&mut self, command: &str, value: &Value) {
        let mut text = String::new();
        shape(value, 0, &mut text);
        let text = text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
        self.told(&format!("{command} --json"), 0, &text, "");
    }

    /// Compares with the file, or writes it. `hide` are texts that differ from run to run, and what stands for them.
    #[track_caller]
    pub fn check(&self, name: &str, hide: &[(String, &str)]) {
        let mut told = self.text.clone();
        for (text, placeholder) in hide {
            told = told.replace(text, placeholder);
        }
        let told = without_ids(&told);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/testdata").join(name);
        if std::env::var_os("REWRITE_TRANSCRIPTS").is_some() {
            std::fs::write(&path, told).unwrap();
            return;
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        let first = written.lines().zip(told.lines()).find(|(was, is)| was != is);
        assert!(written == told, "{name} differs: {first:?}\n{told}");
    }
}

/// Names and types, not values.
fn shape(value: &Value, indent: usize, text: &mut String) {
    let pad = "  ".repeat(indent);
    match value {
        Value::Null => text.push_str("null\n"),
        Value::Bool(_) => text.push_str("bool\n"),
        Value::Number(_) => text.push_str("number\n"),
        Value::String(_) => text.push_str("string\n"),
        Value::Array(items) => match items.first() {
            None => text.push_str("[]\n"),
            Some(first) => {
                text.push_str("list of ");
                shape(first, indent, text);
            }
        },
        Value::Object(fields) => {
            text.push('\n');
            for (name, value) in fields {
                write!(text, "{pad}  {name}: ").unwrap();
                shape(value, indent + 1, text);
            }
        }
    }
}

/// A line of a job that is under way.
fn is_progress(line: &str) -> bool {
    ["inspecting images", "writing the journal", "checking `", "preparing the copy", "leaving `", "copying "]
        .iter()
        .any(|phase| line.starts_with(phase))
}

/// Identifiers are random, and so are ports.
fn without_ids(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let digits = rest.bytes().take_while(u8::is_ascii_hexdigit).count();
        if digits >= 32 {
            out.push_str("ID");
            rest = &rest[digits..];
        } else if let Some(after) = rest.strip_prefix("127.0.0.1:") {
            out.push_str("127.0.0.1:PORT");
            rest = after.trim_start_matches(|c: char| c.is_ascii_digit());
        } else {
            // A shorter run of digits cannot contain the start of a longer one.
            let taken = digits.max(c.len_utf8());
            out.push_str(&rest[..taken]);
            rest = &rest[taken..];
        }
    }
    out
}

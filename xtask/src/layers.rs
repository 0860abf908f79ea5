//! `cargo xtask layers`: who may depend on whom.
//!
//! The rules are the table under "Crates" in docs/architecture.md, read from there: the document cannot go out of date.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::workspace::{cargo, output, root};

/// Crates whose code must be the same run in a daemon and in virtual time.
const CORES: &[&str] = &["types", "cluster", "replication", "engine"];
/// It holds the executor of its own commands on real files (`store::file`), so what lies behind it is not looked at;
/// its logic is, by [`BANNED_WORDS`].
const NOT_LOOKED_BEHIND: &str = "rempart-store";
/// What a core must not reach, directly or through another crate.
const BANNED_CRATES: &[&str] = &[
    "tokio",
    "mio",
    "socket2",
    "io-uring",
    "rustix",
    "libc",
    "nix",
    "getrandom",
    "rand",
    "async-std",
    "smol",
];
/// What a core, and the logic of `store`, must not call.
const BANNED_WORDS: &[&str] = &[
    "std::fs",
    "std::net",
    "std::os",
    "std::thread",
    "std::process",
    "Instant::now",
    "SystemTime",
    "RandomState",
];

/// Prints nothing and succeeds, or fails with every violation.
pub fn check() -> Result<()> {
    let document =
        fs::read_to_string(root().join("docs/architecture.md")).context("read the architecture")?;
    let rules = rules(&document)?;
    let metadata = output(cargo().args(["metadata", "--format-version", "1", "--locked", "--offline"]))
        .or_else(|_| output(cargo().args(["metadata", "--format-version", "1"])))?;
    let metadata: Value = serde_json::from_str(&metadata).context("parse cargo's metadata")?;
    let mut violations = edges_outside(&rules, &metadata);
    violations.extend(banned_crates(&metadata)?);
    violations.extend(banned_words(&root())?);
    if violations.is_empty() {
        return Ok(());
    }
    bail!("the layers are broken:\n  {}", violations.join("\n  "));
}

/// Crate → crates it may know.
type Rules = BTreeMap<String, BTreeSet<String>>;

fn rules(document: &str) -> Result<Rules> {
    let mut rules = Rules::new();
    let rows = document.lines().skip_while(|line| !line.starts_with("| crate |")).skip(2);
    for row in rows.take_while(|line| line.starts_with('|')) {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, _, knows] = cells[..] else { bail!("the crate table has a row of {} cells", cells.len()) };
        let name = name.trim_matches('`').to_owned();
        let known = match knows {
            "nothing" => BTreeSet::new(),
            "all of the above" => rules.keys().cloned().collect(),
            _ => match knows.strip_suffix(" and below") {
                Some(top) => {
                    let below = rules.get(top).with_context(|| format!("`{name}` knows unknown `{top}`"))?;
                    below.iter().cloned().chain([top.to_owned()]).collect()
                }
                None => knows.split(", ").map(str::to_owned).collect(),
            },
        };
        for other in &known {
            ensure!(
                rules.contains_key(other),
                "`{name}` knows `{other}`, which is not above it in the table"
            );
        }
        rules.insert(name, known);
    }
    ensure!(!rules.is_empty(), "docs/architecture.md has no table of crates");
    Ok(rules)
}

/// `rempart-store` → `store`; the program itself is `rempart`; nothing for other packages.
fn layer(package: &str) -> Option<&str> {
    if package == "rempart" { Some(package) } else { package.strip_prefix("rempart-") }
}

fn edges_outside(rules: &Rules, metadata: &Value) -> Vec<String> {
    let mut violations = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let Some(from) = package["name"].as_str().and_then(layer) else { continue };
        let Some(known) = rules.get(from) else {
            violations.push(format!("crate `{from}` is not in the table of docs/architecture.md"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            // Tests may look anywhere.
            if dependency["kind"] == "dev" {
                continue;
            }
            if let Some(to) = dependency["name"].as_str().and_then(layer)
                && !known.contains(to)
            {
                violations.push(format!("`{from}` must not depend on `{to}`"));
            }
        }
    }
    violations
}

fn banned_crates(metadata: &Value) -> Result<Vec<String>> {
    let mut names = BTreeMap::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        if let (Some(id), Some(name)) = (package["id"].as_str(), package["name"].as_str()) {
            names.insert(id, name);
        }
    }
    let mut dependencies: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in metadata["resolve"]["nodes"].as_array().context("cargo's metadata has no graph")? {
        let id = node["id"].as_str().context("a node has no id")?;
        for dependency in node["deps"].as_array().into_iter().flatten() {
            let kinds = dependency["dep_kinds"].as_array();
            // A normal dependency has kind null; what builds or tests a core does not run in it.
            if kinds.into_iter().flatten().any(|kind| kind["kind"].is_null())
                && let Some(to) = dependency["pkg"].as_str()
            {
                dependencies.entry(id).or_default().push(to);
            }
        }
    }
    let mut violations = Vec::new();
    for core in CORES {
        let package = format!("rempart-{core}");
        let Some((start, _)) = names.iter().find(|(_, name)| **name == package) else { continue };
        let mut reached = BTreeSet::from([*start]);
        let mut ahead = vec![*start];
        while let Some(id) = ahead.pop() {
            for next in dependencies.get(id).into_iter().flatten() {
                if reached.insert(next) && names.get(next) != Some(&NOT_LOOKED_BEHIND) {
                    ahead.push(next);
                }
            }
        }
        let found = reached.iter().filter_map(|id| names.get(id)).filter(|name| BANNED_CRATES.contains(name));
        violations.extend(found.map(|banned| format!("core `{core}` reaches `{banned}`")));
    }
    Ok(violations)
}

fn banned_words(root: &Path) -> Result<Vec<String>> {
    let mut violations = Vec::new();
    for name in CORES.iter().copied().chain(["store"]) {
        let mut folders = vec![root.join("crates").join(name).join("src")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
                let path = entry?.path();
                let stem = path.file_stem().unwrap_or_default();
                // `store::file` is the one part that runs commands on real files; tests may do what they like.
                if (name == "store" && stem == "file") || stem == "tests" {
                    continue;
                }
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let text = fs::read_to_string(&path)?;
                    let shown = path.strip_prefix(root).unwrap_or(&path).display();
                    violations.extend(
                        words_in(&text).map(|(line, word)| format!("{shown}:{line}: `{word}` in a core")),
                    );
                }
            }
        }
    }
    Ok(violations)
}

/// Banned words in code before the first test module, with their line numbers.
fn words_in(text: &str) -> impl Iterator<Item = (usize, &'static str)> + '_ {
    let code = text.lines().enumerate().take_while(|(_, line)| line.trim() != "#[cfg(test)]");
    code.filter(|(_, line)| !line.trim_start().starts_with("//")).flat_map(|(index, line)| {
        BANNED_WORDS.iter().filter(move |word| line.contains(**word)).map(move |word| (index + 1, *word))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TABLE: &str = "text\n\n| crate | what it is | knows |\n|---|---|---|\n| `types` | t | nothing |\n\
        | `store` | s | types |\n| `engine` | e | types, store |\n| `node` | n | all of the above |\n\
        | `sim` | w | engine and below |\n\nmore\n";

    #[test]
    fn the_table_becomes_rules() {
        let rules = rules(TABLE).unwrap();
        let known = |name: &str| rules[name].iter().map(String::as_str).collect::<Vec<_>>();
        assert_eq!(known("types"), [""; 0]);
        assert_eq!(known("node"), ["engine", "store", "types"]);
        assert_eq!(known("sim"), ["engine", "store", "types"]);
    }

    #[test]
    fn an_edge_that_the_table_lacks_is_found_and_a_test_may_have_it() {
        let package = |kind: Value| json!({"packages": [{"name": "rempart-types", "dependencies": [{"name": "rempart-store", "kind": kind}]}]});
        let rules = rules(TABLE).unwrap();
        assert_eq!(edges_outside(&rules, &package(Value::Null)), ["`types` must not depend on `store`"]);
        assert!(edges_outside(&rules, &package(json!("dev"))).is_empty());
    }

    #[test]
    fn ambient_time_is_found_in_code_and_not_in_comments_or_tests() {
        let text = "// std::fs\nfn a() { Instant::now(); }\n#[cfg(test)]\nuse std::fs;\n";
        assert_eq!(words_in(text).collect::<Vec<_>>(), [(2, "Instant::now")]);
    }
}

//! `cargo xtask layers`: who may depend on whom.
//!
//! The rules are the table under "Crates" in docs/architecture.md, read from there: the document cannot go out of date.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

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
        let mut files = Vec::new();
        rust_files(&root.join("crates").join(name).join("src"), &mut files)?;
        let tests: BTreeSet<&str> = files.iter().flat_map(|(_, text)| test_modules(text)).collect();
        for (path, text) in &files {
            let shown = path.strip_prefix(root).unwrap_or(path);
            let mut parts = shown.components().filter_map(|part| part.as_os_str().to_str());
            // `store::file` is the one part that runs commands on real files; tests may do what they like.
            let free = parts.any(|part| {
                let stem = part.strip_suffix(".rs").unwrap_or(part);
                tests.contains(stem) || (name == "store" && stem == "file")
            });
            if !free {
                let found = words_in(text);
                violations.extend(
                    found.map(|(line, word)| format!("{}:{line}: `{word}` in a core", shown.display())),
                );
            }
        }
    }
    Ok(violations)
}

fn rust_files(folder: &Path, into: &mut Vec<(PathBuf, String)>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            rust_files(&path, into)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path)?;
            into.push((path, text));
        }
    }
    Ok(())
}

/// Modules in files of their own that exist in tests only.
fn test_modules(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().zip(text.lines().skip(1));
    lines.filter(|(attribute, _)| attribute.trim() == "#[cfg(test)]").filter_map(|(_, module)| {
        let (_, name) = module.trim().strip_suffix(';')?.split_once("mod ")?;
        Some(name)
    })
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
    fn modules_for_tests_are_known() {
        let text =
            "mod a;\n#[cfg(test)]\nmod b;\n#[cfg(test)]\npub(crate) mod c;\n#[cfg(test)]\nmod tests {\n";
        assert_eq!(test_modules(text).collect::<Vec<_>>(), ["b", "c"]);
    }

    #[test]
    fn ambient_time_is_found_in_code_and_not_in_comments_or_tests() {
        let text = "// std::fs\nfn a() { Instant::now(); }\n#[cfg(test)]\nuse std::fs;\n";
        assert_eq!(words_in(text).collect::<Vec<_>>(), [(2, "Instant::now")]);
    }
}

//! The backports suite, taken from wherever this machine takes its other Debian packages.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

const SUITE: &str = "bookworm";
const BACKPORTS: &str = "bookworm-backports";
const FILE: &str = "/etc/apt/sources.list.d/rempart-backports.sources";

/// One `deb` source of the machine: where from, which suites, trusted by which key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
}

/// The source to add so that backports can be installed; none when the machine has one.
pub fn missing_source() -> Result<Option<Source>> {
    missing_among(configured(Path::new("/etc/apt")).context("read the machine's package sources")?)
}

fn missing_among(sources: Vec<Source>) -> Result<Option<Source>> {
    if sources.iter().any(|source| source.suites.iter().any(|suite| suite == BACKPORTS)) {
        return Ok(None);
    }
    let base = sources.into_iter().find(|source| {
        source.suites.iter().any(|suite| suite == SUITE) && source.components.iter().any(|c| c == "main")
    });
    let Some(base) = base else {
        bail!(
            "no configured package source has suite `{SUITE}`, component `main`\nhint: add one to /etc/apt"
        );
    };
    Ok(Some(Source { suites: vec![BACKPORTS.to_owned()], components: vec!["main".to_owned()], ..base }))
}

impl Source {
    fn text(&self) -> String {
        let mut text = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: {}\n",
            self.uris.join(" "),
            self.suites.join(" "),
            self.components.join(" ")
        );
        if let Some(key) = &self.signed_by {
            text += &format!("Signed-By: {key}\n");
        }
        text
    }

    pub fn as_command(&self) -> String {
        format!("printf '{}' > {FILE}", self.text().replace('\n', "\\n"))
    }

    pub fn write(&self) -> Result<()> {
        fs::write(FILE, self.text()).with_context(|| format!("write {FILE}"))
    }
}

fn configured(folder: &Path) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    let mut read = |path: &Path| -> Result<()> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => sources.extend(parse_stanzas(&text)),
            Some("list") => sources.extend(text.lines().filter_map(parse_line)),
            _ => {}
        }
        Ok(())
    };
    let single = folder.join("sources.list");
    if single.exists() {
        read(&single)?;
    }
    let mut paths: Vec<_> = match fs::read_dir(folder.join("sources.list.d")) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    };
    paths.sort();
    for path in paths {
        read(&path)?;
    }
    Ok(sources)
}

/// deb822 stanzas; inline keys (continued lines) are kept as they are.
fn parse_stanzas(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for stanza in text.split("\n\n") {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza.lines().filter(|line| !line.starts_with('#')) {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    *value += &format!("\n{line}");
                }
            } else if let Some((name, value)) = line.split_once(':') {
                fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
        let field =
            |wanted: &str| fields.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
        let words =
            |wanted| field(wanted).unwrap_or("").split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let disabled = field("enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
        if words("types").iter().any(|kind| kind == "deb") && !disabled {
            sources.push(Source {
                uris: words("uris"),
                suites: words("suites"),
                components: words("components"),
                signed_by: field("signed-by").map(str::to_owned),
            });
        }
    }
    sources
}

/// A one-line source: `deb [signed-by=…] URI SUITE COMPONENT…`
fn parse_line(line: &str) -> Option<Source> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    let mut words = rest.split('#').next()?.split_whitespace().map(str::to_owned);
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by: signed_by.map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Source {
        Source {
            uris: vec!["http://mirror.example/debian".to_owned()],
            suites: vec!["bookworm".to_owned(), "bookworm-updates".to_owned()],
            components: vec!["main".to_owned()],
            signed_by: Some("/k.gpg".to_owned()),
        }
    }

    #[test]
    fn both_ways_of_writing_a_source_are_read() {
        let stanzas = "# first\nTypes: deb\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
                       Components: main\nSigned-By: /k.gpg\n\nTypes: deb-src\nURIs: x\nSuites: bookworm\n";
        assert_eq!(parse_stanzas(stanzas), [source()]);
        assert_eq!(
            parse_line("deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main # here"),
            Some(Source { suites: vec!["bookworm".to_owned()], ..source() })
        );
        assert_eq!(parse_line("# deb http://mirror.example/debian bookworm main"), None);
    }

    #[test]
    fn backports_come_from_where_the_machine_takes_its_packages() {
        let added = missing_among(vec![source()]).unwrap().expect("backports are missing");
        assert_eq!(added, Source { suites: vec![BACKPORTS.to_owned()], ..source() });
        assert_eq!(missing_among(vec![source(), added]).unwrap(), None);
        assert!(missing_among(Vec::new()).is_err());
    }

    #[test]
    fn what_is_written_reads_back() {
        assert_eq!(parse_stanzas(&source().text()), [source()]);
    }
}

//! Which files are backed up.

use super::entry::{is_below, order};
use crate::BackupError;
use crate::snapshot::SubvolumeSnapshot;
use globset::{Candidate, GlobBuilder, GlobSet, GlobSetBuilder};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Folders and files, and what of them is left out.
#[derive(Debug)]
pub struct Selection {
    /// Without links in them, in order, none below another.
    pub(super) roots: Vec<PathBuf>,
    excluded: GlobSet,
    /// Folders that say by `CACHEDIR.TAG` that they are caches are left empty.
    pub(super) no_caches: bool,
    snapshots: Vec<SubvolumeSnapshot>,
}

/// A pattern that means nothing.
#[derive(Debug, Error)]
#[error("`{pattern}` is no pattern of paths")]
pub struct InvalidPattern {
    pattern: String,
    source: globset::Error,
}

impl Selection {
    /// A pattern without a slash is that of a name, anywhere; others are of whole paths, from `/` on.
    pub fn patterns(patterns: &[String]) -> Result<GlobSet, InvalidPattern> {
        let mut set = GlobSetBuilder::new();
        for pattern in patterns {
            let whole = if pattern.contains('/') { pattern.clone() } else { format!("**/{pattern}") };
            let glob = GlobBuilder::new(&whole).literal_separator(true).build();
            set.add(glob.map_err(|source| InvalidPattern { pattern: pattern.clone(), source })?);
        }
        set.build().map_err(|source| InvalidPattern { pattern: patterns.join(" "), source })
    }

    pub fn new(roots: &[PathBuf], excluded: GlobSet, no_caches: bool) -> Result<Selection, BackupError> {
        let mut whole = Vec::new();
        for root in roots {
            let path = std::fs::canonicalize(root);
            whole.push(path.map_err(|source| BackupError::File {
                action: "look at",
                path: root.clone(),
                source,
            })?);
        }
        whole.sort_by(|one, other| order(below_root(one), below_root(other)));
        whole.dedup_by(|next, before| {
            let (next, before) = (below_root(next), below_root(before));
            next == before || before.is_empty() || is_below(next, before)
        });
        Ok(Selection { roots: whole, excluded, no_caches, snapshots: Vec::new() })
    }

    /// Has all that can be read from snapshots, which live as long as this. Tells why one could not be taken, if that is so.
    pub fn take_snapshots(&mut self) -> Option<BackupError> {
        let mut failed = None;
        for root in &self.roots {
            if self.place(root).1.is_none() {
                match SubvolumeSnapshot::of(root) {
                    Ok(made) => self.snapshots.extend(made),
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
        }
        failed
    }

    /// How many snapshots all is read from; `None` if not all is.
    pub fn snapshots(&self) -> Option<usize> {
        let is_all = self.roots.iter().all(|root| self.place(root).1.is_some());
        is_all.then_some(self.snapshots.len())
    }

    /// Where a path without links is read, and in which snapshot that is.
    pub(super) fn place(&self, path: &Path) -> (PathBuf, Option<&SubvolumeSnapshot>) {
        let in_snapshot = self.snapshots.iter().find_map(|snapshot| {
            let place = snapshot.place(path).filter(|_| !snapshot.lacks(path))?;
            Some((place, Some(snapshot)))
        });
        in_snapshot.unwrap_or_else(|| (path.to_owned(), None))
    }

    /// A text that stands for it: what is remembered of one selection is not that of another.
    pub(super) fn identity(&self) -> Vec<u8> {
        self.roots.iter().flat_map(|root| [root.as_os_str().as_bytes(), &[0]].concat()).collect()
    }

    pub(super) fn is_excluded(&self, path: &[u8]) -> bool {
        let whole = [b"/", path].concat();
        !self.excluded.is_empty()
            && self.excluded.is_match_candidate(&Candidate::new(Path::new(OsStr::from_bytes(&whole))))
    }
}

/// The path of an entry.
pub(super) fn below_root(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes().strip_prefix(b"/").unwrap_or(path.as_os_str().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_anywhere_and_paths_from_the_root() {
        let patterns = ["*.tmp", "/var/cache/**", "/home/*/.cache"].map(str::to_owned);
        let excluded = Selection::patterns(&patterns).expect("patterns");
        let selection = Selection { roots: Vec::new(), excluded, no_caches: false, snapshots: Vec::new() };
        for path in ["a.tmp", "etc/b.tmp", "var/cache/apt/x", "home/me/.cache"] {
            assert!(selection.is_excluded(path.as_bytes()), "{path}");
        }
        for path in ["a.tmpx", "srv/var/cache/x", "home/me/you/.cache", "var/cache"] {
            assert!(!selection.is_excluded(path.as_bytes()), "{path}");
        }
        let error = Selection::patterns(&["a[".to_owned()]).expect_err("no pattern");
        assert!(error.to_string().contains("`a[`"), "{error}");
    }

    #[test]
    fn what_is_in_another_is_read_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        for name in ["a", "a/b", "a c"] {
            std::fs::create_dir(path(name)).expect("made");
        }
        let wanted = [path("a c"), path("a/b"), path("a"), path("a")];
        let selection = Selection::new(&wanted, GlobSet::empty(), false).expect("they are there");
        assert_eq!(selection.roots, [path("a"), path("a c")]);
        let all = Selection::new(&[path("a"), PathBuf::from("/")], GlobSet::empty(), false).expect("there");
        assert_eq!(all.roots, [PathBuf::from("/")]);
        Selection::new(&[path("nowhere")], GlobSet::empty(), false).expect_err("not there");
    }
}

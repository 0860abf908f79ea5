//! Files of a directory, in the order of their objects' names.

use super::file_system::{Entry, FileSystem};
use crate::{Listed, Name};
use std::collections::BinaryHeap;
use std::io;

/// Objects of a page. Each page reads the directories anew.
const PAGE: usize = 10_000;

#[derive(Debug)]
struct Walk<'a, F> {
    files: &'a F,
    prefix: &'a str,
    after: &'a str,
    page: Vec<Listed>,
    /// Objects of the page at most, and names of a directory that are in memory at a time.
    most: usize,
}

/// The first objects whose names start with `prefix` and sort behind `after`.
pub fn page<F: FileSystem>(
    files: &F,
    root: &F::Dir,
    prefix: &str,
    after: Option<&Name>,
) -> io::Result<Vec<Listed>> {
    page_of(files, root, prefix, after, PAGE)
}

fn page_of<F: FileSystem>(
    files: &F,
    root: &F::Dir,
    prefix: &str,
    after: Option<&Name>,
    most: usize,
) -> io::Result<Vec<Listed>> {
    let mut walk = Walk { files, prefix, after: after.map_or("", Name::as_str), page: Vec::new(), most };
    walk.visit(root, "")?;
    Ok(walk.page)
}

impl<F: FileSystem> Walk<'_, F> {
    /// `path` ends with `/`, but for the root's. The depth is bounded by the length of a name.
    fn visit(&mut self, dir: &F::Dir, path: &str) -> io::Result<()> {
        let mut behind = String::new();
        loop {
            let (keys, are_all) = self.first_keys(dir, path, &behind)?;
            for key in &keys {
                if self.page.len() == self.most {
                    return Ok(());
                }
                self.visit_key(dir, key)?;
            }
            if are_all {
                return Ok(());
            }
            // Some of them may be directories in which nothing is.
            behind = keys.into_iter().next_back().expect("there is room for one");
        }
    }

    fn visit_key(&mut self, dir: &F::Dir, key: &str) -> io::Result<()> {
        let own = super::split(key.trim_end_matches('/')).1;
        let visited = if key.ends_with('/') {
            self.files.open_dir(dir, own).and_then(|inner| self.visit(&inner, key))
        } else {
            self.files.stat_at(dir, own).map(|stat| {
                let name = Name::new(key).expect("it was checked");
                self.page.push(Listed { name, len: stat.len });
            })
        };
        match visited {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            visited => visited,
        }
    }

    /// The first of a directory's keys behind `behind`, in order, and whether these are all: a directory may have more of them
    /// than shall be in memory.
    fn first_keys(&self, dir: &F::Dir, path: &str, behind: &str) -> io::Result<(Vec<String>, bool)> {
        let (mut keys, mut are_all) = (BinaryHeap::new(), true);
        self.files.entries(dir, &mut |entry| {
            keys.extend(self.key(path, &entry).filter(|key| **key > *behind));
            if keys.len() > self.most {
                keys.pop();
                are_all = false;
            }
        })?;
        Ok((keys.into_sorted_vec(), are_all))
    }

    /// An entry's full name, if it is wanted or may hold something that is. A directory's ends with `/`, so that it sorts
    /// as what it holds does.
    fn key(&self, path: &str, entry: &Entry<'_>) -> Option<String> {
        let mut key = format!("{path}{}", entry.name);
        // Others' files have no place in the list.
        Name::new(&*key).ok()?;
        let wanted = if entry.is_dir {
            key.push('/');
            let holds_prefix = key.starts_with(self.prefix) || self.prefix.starts_with(&key);
            holds_prefix && (*key > *self.after || self.after.starts_with(&key))
        } else {
            key.starts_with(self.prefix) && *key > *self.after
        };
        wanted.then_some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::super::file_system::Linux;
    use super::*;

    /// Pages that are so short that a directory has more names than one of them, and more empty directories before the next object.
    #[test]
    fn pages_of_any_length_tell_the_same() {
        let home = tempfile::tempdir().expect("a directory");
        let path = |name: &str| home.path().join(name);
        for empty in ["a/1", "a/2", "a/3", "a/4", "b/0/1", "b/0/2", "b/9", "c"] {
            std::fs::create_dir_all(path(empty)).expect("made");
        }
        let files = ["0", "a/5/x", "a/5/y", "a/6", "b/0/3", "b/1", "b/2", "b/3", "d/e/f/g"];
        for file in files {
            std::fs::create_dir_all(path(file).parent().expect("it has one")).expect("made");
            std::fs::write(path(file), file).expect("written");
        }
        let root = Linux::open_root(home.path()).expect("it opens");
        for (prefix, most) in
            ["", "a/", "a/5", "b/", "c", "d/e/"].into_iter().flat_map(|p| [(p, 1), (p, 2), (p, 3), (p, 20)])
        {
            let (mut found, mut after) = (Vec::new(), None);
            loop {
                let page = page_of(&Linux, &root, prefix, after.as_ref(), most).expect("listed");
                assert!(page.len() <= most);
                let Some(last) = page.last() else { break };
                after = Some(last.name.clone());
                found.extend(page.into_iter().map(|listed| (listed.name.to_string(), listed.len)));
            }
            let of_prefix = files.into_iter().filter(|name| name.starts_with(prefix));
            let expected: Vec<_> = of_prefix.map(|name| (name.to_owned(), name.len() as u64)).collect();
            assert_eq!(found, expected, "`{prefix}`, {most} a page");
        }
    }
}

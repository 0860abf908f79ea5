//! Files of a directory, in the order of their objects' names.

use super::file_system::{Entry, FileSystem};
use crate::{Listed, Name};
use std::io;

/// Objects of a page. Each page reads the directories anew.
const PAGE: usize = 10_000;

#[derive(Debug)]
struct Walk<'a, F> {
    files: &'a F,
    prefix: &'a str,
    after: &'a str,
    page: Vec<Listed>,
}

/// The first objects whose names start with `prefix` and sort behind `after`.
pub fn page<F: FileSystem>(
    files: &F,
    root: &F::Dir,
    prefix: &str,
    after: Option<&Name>,
) -> io::Result<Vec<Listed>> {
    let mut walk = Walk { files, prefix, after: after.map_or("", Name::as_str), page: Vec::new() };
    walk.visit(root, "")?;
    Ok(walk.page)
}

impl<F: FileSystem> Walk<'_, F> {
    /// `path` ends with `/`, but for the root's. The depth is bounded by the length of a name.
    fn visit(&mut self, dir: &F::Dir, path: &str) -> io::Result<()> {
        let mut keys: Vec<String> =
            self.files.entries(dir)?.iter().filter_map(|entry| self.key(path, entry)).collect();
        keys.sort_unstable();
        for key in keys {
            if self.page.len() == PAGE {
                break;
            }
            match key.strip_suffix('/') {
                Some(inner) => match self.files.open_dir(dir, super::split(inner).1) {
                    Ok(inner) => self.visit(&inner, &key)?,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                },
                None => match self.files.stat_at(dir, super::split(&key).1) {
                    Ok(stat) => {
                        let name = Name::new(key).expect("it was checked");
                        self.page.push(Listed { name, len: stat.len });
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// An entry's full name, if it is wanted or may hold something that is. A directory's ends with `/`, so that it sorts
    /// as what it holds does.
    fn key(&self, path: &str, entry: &Entry) -> Option<String> {
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

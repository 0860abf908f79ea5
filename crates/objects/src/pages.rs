//! A list, page by page.

use crate::{Error, Listed, Objects};

/// All that [`list`](Objects::list) tells, page by page, up to the first error.
pub fn pages<'a>(
    objects: &'a dyn Objects,
    prefix: &'a str,
) -> impl Iterator<Item = Result<Vec<Listed>, Error>> + 'a {
    let mut after = None;
    let mut is_over = false;
    std::iter::from_fn(move || {
        let page = (!is_over).then(|| objects.list(prefix, after.as_ref()))?;
        after = page.as_ref().ok().and_then(|page| page.last()).map(|last| last.name.clone());
        is_over = after.is_none();
        page.map(|page| (!is_over).then_some(page)).transpose()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ErrorKind, Front, Memory, Name};

    /// A place whose pages have two names, and that cannot be listed behind one of them.
    #[derive(Debug)]
    struct Narrow {
        place: Memory,
        broken: &'static str,
    }

    impl Front for Narrow {
        fn behind(&self) -> &dyn Objects {
            &self.place
        }

        fn list(&self, prefix: &str, after: Option<&Name>) -> Result<Vec<Listed>, Error> {
            if let Some(name) = after.filter(|name| name.as_str() == self.broken) {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "list",
                    name,
                    self.url(),
                    "the test wants it",
                ));
            }
            let mut page = self.place.list(prefix, after)?;
            page.truncate(2);
            Ok(page)
        }
    }

    /// Names by pages, and how often an error came in place of one.
    fn told(broken: &'static str, prefix: &str) -> (Vec<Vec<String>>, usize) {
        let narrow = Narrow { place: Memory::default(), broken };
        for name in ["a/1", "a/2", "a/3", "a/4", "a/5", "b/1"] {
            narrow.place.create(&Name::new(name).expect("a name"), &[], None).expect("created");
        }
        let (mut names, mut errors) = (Vec::new(), 0);
        for page in pages(&narrow, prefix).take(20) {
            match page {
                Ok(page) => names.push(page.iter().map(|listed| listed.name.to_string()).collect()),
                Err(_) => errors += 1,
            }
        }
        (names, errors)
    }

    #[test]
    fn they_go_on_behind_each_other_to_the_end_or_the_first_error() {
        let page = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let [one, two, three] = [&["a/1", "a/2"][..], &["a/3", "a/4"], &["a/5"]].map(page);
        assert_eq!(told("", "a/"), (vec![one.clone(), two.clone(), three], 0));
        assert_eq!(told("a/4", "a/"), (vec![one, two], 1));
        assert_eq!(told("", "c/"), (vec![], 0));
    }
}

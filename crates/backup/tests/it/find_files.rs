//! Single files of a point, found in its pages: against all that stands in them, where pages are lost, and in what an enemy wrote.

use crate::files::{entry, forged};
use crate::lab::Lab;
use crate::random_access::Counting;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rempart_backup::{ChunkCache, Entry, FileFinder, Kind};
use rempart_repository::{ChunkSize, FileTree};
use std::collections::BTreeMap;
use std::time::Duration;

const CACHE: u64 = 16 << 20;

fn finder(lab: &Lab, tree: &FileTree) -> FileFinder {
    let cache = ChunkCache::new(lab.repository.clone(), CACHE).expect("opens");
    FileFinder::new(&cache, "web@1", tree)
}

/// As entries are ordered: by their parts.
fn parts(path: &str) -> Vec<String> {
    path.split('/').map(str::to_owned).collect()
}

/// Folders and files, some deep, in pages of random lengths.
fn random_tree(random: &mut SmallRng) -> (BTreeMap<Vec<String>, Kind>, Vec<Vec<Entry>>) {
    let mut all = BTreeMap::new();
    for _ in 0..random.random_range(1..200) {
        let mut path = String::new();
        for level in 0..random.random_range(1..5) {
            let name = ["a", "b", "c!", "c", "d0", "é", "z.z"][random.random_range(0..7)];
            path = if level == 0 { name.to_owned() } else { format!("{path}/{name}") };
            all.entry(parts(&path)).or_insert(Kind::Folder);
        }
    }
    let is_empty =
        |path: &Vec<String>| !all.keys().any(|other| other.len() > path.len() && other.starts_with(path));
    let files: Vec<Vec<String>> = all.keys().filter(|path| is_empty(path)).cloned().collect();
    for path in files {
        all.insert(path, Kind::File { size: 0 });
    }
    let (mut pages, mut page) = (Vec::new(), Vec::new());
    for (path, kind) in &all {
        page.push(entry(&path.join("/"), kind.clone()));
        if random.random_range(0..7) == 0 {
            pages.push(std::mem::take(&mut page));
        }
    }
    if !page.is_empty() {
        pages.push(page);
    }
    (all, pages)
}

#[test]
fn every_entry_is_found_and_every_folder_has_what_is_in_it() {
    let lab = Lab::new();
    for seed in 0..30 {
        let (all, pages) = random_tree(&mut SmallRng::seed_from_u64(seed));
        let files = finder(&lab, &forged(&lab, &pages, &[]));
        let below = |folder: &[String]| {
            let found = files.children(folder.join("/").as_bytes()).expect("whole");
            found
                .into_iter()
                .map(|found| String::from_utf8(found.entry.path).expect("text"))
                .collect::<Vec<_>>()
        };
        let expected = |folder: &[String]| {
            let is_child = |path: &&Vec<String>| path.len() == folder.len() + 1 && path.starts_with(folder);
            all.keys().filter(is_child).map(|path| path.join("/")).collect::<Vec<_>>()
        };
        assert_eq!(below(&[]), expected(&[]), "{seed}");
        for (path, kind) in &all {
            let found = files.find(path.join("/").as_bytes()).expect("whole").expect("it is there");
            assert_eq!(
                (&found.entry.kind, files.get(found.number).expect("whole")),
                (kind, found.entry.clone())
            );
            assert_eq!(below(path), expected(path), "{seed}: {path:?}");
            for absent in [format!("{}/no", path.join("/")), format!("{}!", path.join("/"))] {
                let is_there = all.contains_key(&parts(&absent));
                assert_eq!(
                    files.find(absent.as_bytes()).expect("whole").is_some(),
                    is_there,
                    "{seed}: {absent}"
                );
            }
        }
    }
}

#[test]
fn a_file_is_found_by_reading_a_few_pages_and_none_of_the_others_contents() {
    let lab = Lab::new();
    let page = |page: usize| {
        let name = |file: usize| entry(&format!("folder/{page:03}-{file:03}"), Kind::File { size: 5 });
        (0..20).map(name).collect::<Vec<_>>()
    };
    let mut pages: Vec<Vec<Entry>> = (0..300).map(page).collect();
    pages[0].insert(0, entry("folder", Kind::Folder));
    let tree = forged(&lab, &pages, &[&b"hello"[..]; 6000]);
    let place = Counting::place(&lab, Duration::ZERO);
    let files = FileFinder::new(&place.cache(&lab, CACHE), "web@1", &tree);
    place.taken();
    let found = files.find(b"folder/123-007").expect("whole").expect("it is there");
    let looked_at = place.taken();
    // Starts, two leaves of the pages' tree, nine pages, each at its own place.
    assert!(looked_at <= 16, "{looked_at}");
    files.find(b"folder/123-019").expect("whole").expect("it is there");
    assert_eq!(place.taken(), 0, "what was read is there");
    // Its page's first chunk is said to be the first of all.
    let content = files.content(found.number).expect("whole").expect("a file");
    let mut bytes = [0; 5];
    content.read_into(0, &mut bytes).expect("reads");
    assert_eq!(&bytes, b"hello");
    assert!(place.taken() <= 3);
}

#[test]
fn where_pages_are_lost_nothing_is_said_not_to_be_there() {
    let lab = Lab::new();
    let names = |page: usize| (0..9).map(move |file| format!("{}{file}", (b'a' + page as u8) as char));
    let pages: Vec<Vec<Entry>> =
        (0..9).map(|page| names(page).map(|name| entry(&name, Kind::Pipe)).collect()).collect();
    let whole = forged(&lab, &pages, &[]);
    for lost in 0..9 {
        // No page has such an entry.
        let mut pages = pages.clone();
        pages[lost] = vec![Entry { mode: 1 << 30, ..entry("x", Kind::Pipe) }];
        let files = finder(&lab, &forged(&lab, &pages, &[]));
        files.children(b"").expect_err("a part of it is not known");
        for page in 0..9 {
            for name in names(page) {
                match files.find(name.as_bytes()) {
                    Ok(Some(_)) => assert_ne!(page, lost),
                    Ok(None) => panic!("{name} is said not to be there, and page {lost} is lost"),
                    Err(_) => assert_eq!(page, lost, "{name}"),
                }
            }
        }
        assert_eq!(files.find(b"a99").is_ok(), lost > 1, "behind the first page, before the second");
    }
    assert_eq!(finder(&lab, &whole).children(b"").expect("whole").len(), 81);
}

#[test]
fn what_an_enemy_wrote_ends_and_leads_nowhere() {
    let lab = Lab::new();
    let folder = |path: &str| entry(path, Kind::Folder);
    let names = |files: &FileFinder, path: &str| {
        let found = files.children(path.as_bytes()).map(|found| found.len());
        found.map_err(|error| error.to_string())
    };
    // Out of order from page to page, again and again the same, something below what is no folder, or is not there.
    let unsorted =
        forged(&lab, &[vec![folder("b")], vec![folder("a")], vec![folder("b")], vec![folder("a")]], &[]);
    assert!(names(&finder(&lab, &unsorted), "").is_err());
    let orphans =
        [folder("a/b/c"), folder("b"), entry("c", Kind::Pipe), folder("c/d"), folder("d/e"), folder("d/f")];
    let files = finder(&lab, &forged(&lab, &[orphans.to_vec()], &[]));
    assert_eq!((names(&files, ""), names(&files, "a"), names(&files, "d")), (Ok(2), Ok(0), Ok(2)));
    // Numbers that do not fit each other, or lead behind the end.
    let good = forged(&lab, &[vec![entry("a", Kind::File { size: 70_000 })]], &[b"x"]);
    let files = finder(&lab, &good);
    let number = files.find(b"a").expect("whole").expect("there").number;
    files.content(number).expect_err("it holds more than there is");
    for number in [0, number + 1, u64::MAX, 1 << 43] {
        assert!(files.get(number).is_err() && !matches!(files.content(number), Ok(Some(_))), "{number}");
    }
    let chunk_size = ChunkSize::new(64 << 10).expect("a size").bytes();
    for change in [
        &(|tree: &mut FileTree| tree.starts.1 += 8) as &dyn Fn(&mut FileTree),
        &|tree| tree.pages.chunks = u64::MAX,
        &|tree| tree.pages.chunks = 1 << 23,
        &|tree| tree.chunk_size = 7,
        &|tree| tree.starts.0.clear(),
    ] {
        let mut tree = good.clone();
        change(&mut tree);
        assert!(finder(&lab, &tree).find(b"a").is_err(), "{tree:?}");
    }
    let odd = FileTree { chunk_size: chunk_size + 512, ..good };
    assert!(finder(&lab, &odd).content(number).is_err(), "chunks of a length that no repository has");
    let random = &mut SmallRng::seed_from_u64(3);
    for _ in 0..50 {
        let (_, mut pages) = random_tree(random);
        for _ in 0..3 {
            let (one, other) = (random.random_range(0..pages.len()), random.random_range(0..pages.len()));
            pages.swap(one, other);
        }
        let files = finder(&lab, &forged(&lab, &pages, &[]));
        // Whatever comes of it, it comes.
        for path in ["", "a", "a/b", "z.z", "c/d0/a"] {
            let _ = (files.find(path.as_bytes()), files.children(path.as_bytes()));
        }
    }
}

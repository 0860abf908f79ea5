//! What every place of objects must do, whatever it is made of. Each adapter's tests call [`check`], and [`race`] where the
//! place is up to it.
//!
//! Panics with the broken promise.

use crate::{Created, ErrorKind, Name, Objects, pages};
use rempart_types::WallTime;
use std::collections::BTreeSet;
use std::sync::{Arc, Barrier};

/// Contenders in the race, and names they race for.
const CONTENDERS: u8 = 8;
const RACES: u32 = 20;
/// More objects than a page of any place's list holds would take long to make; pages are forced by starting behind
/// each name instead.
const LISTED: u32 = 30;

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn create(objects: &dyn Objects, text: &str, content: &[u8]) -> Created {
    objects.create(&name(text), &[content], None).unwrap_or_else(|error| panic!("{error}: {}", error.source))
}

fn names(objects: &dyn Objects, prefix: &str) -> Vec<String> {
    let listed = pages(objects, prefix).flat_map(|page| page.expect("listed"));
    listed.map(|listed| listed.name.to_string()).collect()
}

/// Everything but what needs several threads. `make` makes an empty place.
pub fn check(make: impl Fn() -> Arc<dyn Objects>) {
    what_is_not_there_is_missing(&*make());
    what_is_read_is_what_was_written(&*make());
    a_name_is_given_once(&*make());
    ranges_lie_within_the_object(&*make());
    a_limit_is_kept(&*make());
    a_list_is_in_order_whole_and_of_the_prefix(&*make());
    what_is_removed_is_gone(&*make());
    a_removed_name_is_free(&*make());
    objects_are_kept_as_long_as_they_must(&*make());
    a_large_object_is_kept_whole(&*make());
}

fn what_is_not_there_is_missing(objects: &dyn Objects) {
    create(objects, "a/b", b"b");
    for text in ["x", "a/x", "x/y", "a/b/c", "a"] {
        let kinds = [
            objects.get(&name(text), 100).expect_err("nothing").kind,
            objects.get_range(&name(text), 0..1).expect_err("nothing").kind,
            objects.len(&name(text)).expect_err("nothing").kind,
        ];
        // A directory stands in the way of some names; to say that it is no object is as good.
        assert!(
            kinds.iter().all(|kind| matches!(kind, ErrorKind::Missing | ErrorKind::Failed)),
            "`{text}`: {kinds:?}"
        );
        if !text.starts_with('a') {
            assert_eq!(kinds, [ErrorKind::Missing; 3], "`{text}`");
        }
    }
    objects.remove(&name("x/y")).expect("removing nothing is no error");
    assert_eq!(names(objects, "x"), [""; 0]);
}

fn what_is_read_is_what_was_written(objects: &dyn Objects) {
    let parts: [&[u8]; 5] = [b"", b"one", b"", b"\0two\xff", b""];
    assert_eq!(objects.create(&name("log/1"), &parts, None).expect("created"), Created::New);
    assert_eq!(objects.get(&name("log/1"), 100).expect("read"), b"one\0two\xff");
    assert_eq!(objects.len(&name("log/1")).expect("its length"), 8);
    assert_eq!(create(objects, "empty", b""), Created::New);
    assert_eq!(objects.get(&name("empty"), 0).expect("read"), b"");
    assert_eq!(objects.len(&name("empty")).expect("its length"), 0);
    // As long as a name may be.
    let long = format!("packs/{}", "0123456789".repeat(19));
    assert_eq!(create(objects, &long, b"long"), Created::New);
    assert_eq!(objects.get(&name(&long), 100).expect("read"), b"long");
    let many: Vec<[u8; 1]> = (0..3000u32).map(|number| [number as u8]).collect();
    let parts: Vec<&[u8]> = many.iter().map(|part| &part[..]).collect();
    assert_eq!(objects.create(&name("many"), &parts, None).expect("created"), Created::New);
    assert_eq!(objects.get(&name("many"), 3000).expect("read"), many.concat());
}

fn a_name_is_given_once(objects: &dyn Objects) {
    assert_eq!(create(objects, "log/1", b"first"), Created::New);
    for content in [&b"second"[..], b"first", b""] {
        assert_eq!(create(objects, "log/1", content), Created::Taken);
        assert_eq!(objects.get(&name("log/1"), 100).expect("read"), b"first", "nothing is changed");
    }
    assert_eq!(create(objects, "log/10", b"other"), Created::New, "only the whole name counts");
    assert_eq!(create(objects, "log/1.a", b"other"), Created::New);
}

fn ranges_lie_within_the_object(objects: &dyn Objects) {
    create(objects, "p", b"0123456789");
    for (range, expected) in [(0..10, &b"0123456789"[..]), (0..1, b"0"), (9..10, b"9"), (3..7, b"3456")] {
        assert_eq!(objects.get_range(&name("p"), range.clone()).expect("read"), expected, "{range:?}");
    }
    for empty in [0..0, 5..5, 10..10] {
        assert_eq!(objects.get_range(&name("p"), empty).expect("read"), b"");
    }
    for beyond in [0..11, 9..11, 10..11, 11..12, 100..u64::MAX, 0..u64::MAX] {
        let error = objects.get_range(&name("p"), beyond.clone()).expect_err("it ends before");
        assert_eq!(error.kind, ErrorKind::TooShort, "{beyond:?}: {error}: {}", error.source);
    }
}

fn a_limit_is_kept(objects: &dyn Objects) {
    create(objects, "p", &[7; 1000]);
    for limit in [1000, 1001, u64::MAX] {
        assert_eq!(objects.get(&name("p"), limit).expect("read").len(), 1000);
    }
    for limit in [0, 999] {
        assert_eq!(objects.get(&name("p"), limit).expect_err("too long").kind, ErrorKind::TooLong);
    }
}

fn a_list_is_in_order_whole_and_of_the_prefix(objects: &dyn Objects) {
    assert_eq!(names(objects, ""), [""; 0]);
    let mut expected = BTreeSet::new();
    // `-` and `.` sort before `/`, digits and letters behind it.
    for text in ["a", "a-b/c", "a-b", "a.b", "a0", "b/a/b/c", "b/a.a", "b/a-/x", "b/a0/x", "z/0"] {
        // A directory and a file may not have one name; a repository has no such names.
        if text != "a" && text != "a-b" {
            create(objects, text, text.as_bytes());
            expected.insert(text.to_owned());
        }
    }
    for number in 0..LISTED {
        let text = format!("log/{number:016x}");
        create(objects, &text, text.as_bytes());
        expected.insert(text);
    }
    for prefix in [
        "",
        "a",
        "a-",
        "a-b",
        "a-b/",
        "b",
        "b/a",
        "b/a/",
        "b/a0/x",
        "log/",
        "log/000000000000001",
        "lo",
        "no",
        "z/0",
    ] {
        let of_prefix: Vec<String> =
            expected.iter().filter(|text| text.starts_with(prefix)).cloned().collect();
        assert_eq!(names(objects, prefix), of_prefix, "prefix `{prefix}`");
    }
    for after in expected.iter().map(String::as_str).chain(["0", "a-b/a", "a-b/d", "b", "b/a/b", "m", "zz"]) {
        let page = objects.list("", Some(&name(after))).expect("listed");
        let behind: Vec<&String> = expected.iter().filter(|text| text.as_str() > after).collect();
        assert_eq!(page.is_empty(), behind.is_empty(), "behind `{after}`");
        for (listed, text) in page.iter().zip(behind) {
            assert_eq!(
                (listed.name.as_str(), listed.len),
                (text.as_str(), text.len() as u64),
                "behind `{after}`"
            );
        }
    }
    let page = objects.list("b/", Some(&name("b/a/b"))).expect("listed");
    assert_eq!(page[0].name, name("b/a/b/c"), "prefix and start together");
    assert_eq!(objects.list("b/", Some(&name("c"))).expect("listed"), [], "a start behind the prefix");
    assert_eq!(
        objects.list("b/", Some(&name("a"))).expect("listed")[0].name,
        name("b/a-/x"),
        "a start before it"
    );
}

fn what_is_removed_is_gone(objects: &dyn Objects) {
    for text in ["packs/s/1", "packs/s/2", "packs/t/1"] {
        create(objects, text, b"x");
    }
    objects.remove(&name("packs/s/1")).expect("removed");
    assert_eq!(objects.get(&name("packs/s/1"), 10).expect_err("gone").kind, ErrorKind::Missing);
    assert_eq!(names(objects, "packs/"), ["packs/s/2", "packs/t/1"]);
    objects.remove(&name("packs/s/1")).expect("removing nothing is no error");
    objects.remove(&name("packs/s/2")).expect("removed");
    assert_eq!(names(objects, "packs/"), ["packs/t/1"]);
    // Refused or nothing to do: what is below it stays.
    let _ = objects.remove(&name("packs"));
    assert_eq!(names(objects, "packs/"), ["packs/t/1"]);
}

fn a_removed_name_is_free(objects: &dyn Objects) {
    for content in [b"1", b"2", b"3"] {
        assert_eq!(create(objects, "packs/s/1", content), Created::New);
        assert_eq!(objects.get(&name("packs/s/1"), 10).expect("read"), content);
        objects.remove(&name("packs/s/1")).expect("removed");
    }
}

fn objects_are_kept_as_long_as_they_must(objects: &dyn Objects) {
    if !objects.abilities().retention {
        create(objects, "p", b"p");
        let error = objects.retain(&name("p"), WallTime(1)).expect_err("it cannot");
        assert_eq!(error.kind, ErrorKind::Unsupported);
        let error = objects.create(&name("q"), &[b"q"], Some(WallTime(1))).expect_err("it cannot");
        assert_eq!(error.kind, ErrorKind::Unsupported);
        assert_eq!(objects.len(&name("q")).expect_err("it was not made").kind, ErrorKind::Missing);
        return;
    }
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("it is later than 1970");
    let in_an_hour = WallTime(now.as_millis() as u64 + 3_600_000);
    let created = objects.create(&name("born"), &[b"b"], Some(in_an_hour)).expect("created");
    assert_eq!(created, Created::New);
    create(objects, "later", b"l");
    objects.retain(&name("later"), in_an_hour).expect("retained");
    // Shortening is refused or does nothing.
    let _ = objects.retain(&name("born"), WallTime(in_an_hour.0 - 1_800_000));
    for text in ["born", "later"] {
        assert_eq!(
            objects.remove(&name(text)).expect_err("it must be kept").kind,
            ErrorKind::Retained,
            "`{text}`"
        );
        assert_eq!(objects.len(&name(text)).expect("it is there"), 1);
    }
    assert_eq!(
        objects.retain(&name("none"), in_an_hour).expect_err("nothing there").kind,
        ErrorKind::Missing
    );
}

fn a_large_object_is_kept_whole(objects: &dyn Objects) {
    let pack: Vec<u8> = (0..9_000_001u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (head, tail) = pack.split_at(5_000_000);
    assert_eq!(objects.create(&name("packs/s/1"), &[head, tail], None).expect("created"), Created::New);
    assert_eq!(objects.len(&name("packs/s/1")).expect("its length"), pack.len() as u64);
    let middle = objects.get_range(&name("packs/s/1"), 4_999_990..5_000_010).expect("read");
    assert_eq!(middle, pack[4_999_990..5_000_010]);
    let whole = objects.get(&name("packs/s/1"), pack.len() as u64).expect("read");
    // Not by assert_eq, which would print them.
    assert!(whole == pack, "it came back changed");
}

/// Contenders create the same names at once: of each exactly one is told that it did, and what it wrote is there. Each uses a
/// place of its own that `open` opens anew.
pub fn race(open: impl Fn() -> Arc<dyn Objects>) {
    let barrier = Barrier::new(usize::from(CONTENDERS));
    let wins: Vec<BTreeSet<u32>> = std::thread::scope(|scope| {
        let contend = |contender: u8, objects: Arc<dyn Objects>| {
            let barrier = &barrier;
            move || {
                let race = |number: &u32| {
                    barrier.wait();
                    let content = [contender; 2000];
                    let created = create(&*objects, &format!("race/{number}/x"), &content);
                    let found =
                        objects.get(&name(&format!("race/{number}/x")), 2000).expect("somebody created it");
                    assert!(
                        found.len() == 2000 && found.iter().all(|byte| *byte == found[0]),
                        "seen in part"
                    );
                    assert_eq!(created == Created::New, found[0] == contender, "race {number}");
                    created == Created::New
                };
                (0..RACES).filter(race).collect()
            }
        };
        let contenders: Vec<_> = (0..CONTENDERS).map(|number| scope.spawn(contend(number, open()))).collect();
        contenders.into_iter().map(|contender| contender.join().expect("it kept its promises")).collect()
    });
    for number in 0..RACES {
        let winners = wins.iter().filter(|wins| wins.contains(&number)).count();
        assert_eq!(winners, 1, "race {number}");
    }
}

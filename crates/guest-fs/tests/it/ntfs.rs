use crate::images::{ALL, MIB, bytes_of, look, run, sum, text, without};
use rempart_guest_fs::{Reason, Wanted};
use std::path::Path;

const QUIET: Wanted = Wanted { is_quiet: true, ..ALL };

fn make(folder: &Path, hibernation: &[u8]) -> Vec<u8> {
    let image = folder.join("disk");
    std::fs::write(&image, vec![0; 64 * MIB as usize]).unwrap();
    run("mkntfs", &["-q", "-F", "-f", text(&image)]);
    let file = folder.join("file");
    for (name, content) in
        [("pagefile.sys", vec![0xa5; 6 * MIB as usize]), ("hiberfil.sys", hibernation.to_vec())]
    {
        std::fs::write(&file, content).unwrap();
        run("ntfscp", &["-q", "-f", text(&image), text(&file), name]);
    }
    std::fs::read(&image).unwrap()
}

#[test]
fn page_files_are_left_out_where_the_file_system_is_quiet() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = make(folder.path(), &[0; 100_000]);
    // This log is empty, as of one that is mounted by a program other than Windows.
    let found = look(&bytes, ALL);
    assert_eq!(bytes_of(&found, Reason::FreeSpace), []);
    assert!(found.remarks[0].what.contains("without a log"), "{:?}", found.remarks);
    let pages = bytes_of(&found, Reason::PageFile);
    assert_eq!(sum(&pages), 6 * MIB);
    for range in &pages {
        assert!(bytes[range.start as usize..range.end as usize].iter().all(|byte| *byte == 0xa5));
        bytes[range.start as usize..range.end as usize].fill(0);
    }
    let image = folder.path().join("restored");
    std::fs::write(&image, &bytes).unwrap();
    run("ntfsfix", &["-n", text(&image)]);
    assert_eq!(run("ntfscat", &[text(&image), "hiberfil.sys"]).len(), 100_000);
}

/// The log's restart page as Windows keeps it: with one client while the file system is mounted, closed behind it.
fn write_log(bytes: &mut [u8], is_closed: bool) {
    let log = bytes.windows(4096).step_by(4096).position(|page| page.iter().all(|byte| *byte == 0xff));
    let page = &mut bytes[log.unwrap() * 4096..][..4096];
    page[..4].copy_from_slice(b"RSTR");
    page[0x18..0x1a].copy_from_slice(&0x30u16.to_le_bytes());
    let client = if is_closed { [0xff, 0xff] } else { [0, 0] };
    page[0x30..0x38].copy_from_slice(&9u64.to_le_bytes());
    page[0x38..0x3a].copy_from_slice(&1u16.to_le_bytes());
    page[0x3a..0x3c].copy_from_slice(&[0xff, 0xff]);
    page[0x3c..0x3e].copy_from_slice(&client);
    page[0x3e..0x40].fill(0);
}

/// With files over old garbage, and space that was used and given back. `files` in the folder has them, too.
fn make_used(folder: &Path) -> Vec<u8> {
    let image = folder.join("disk");
    std::fs::write(&image, vec![0x5a; 64 * MIB as usize]).unwrap();
    run("mkntfs", &["-q", "-F", "-f", text(&image)]);
    let script = "set -e; cd $0; rm -rf mounted files; mkdir mounted files; cd files; mkdir many; head -c 9000000 /dev/urandom > large
        for a in $(seq 300); do head -c 9000 /dev/urandom > many/$a; done; head -c 2M /dev/urandom > pagefile.sys; cd ..
        ntfs-3g disk mounted; trap 'umount mounted' EXIT; cp -r files/many mounted/gone; cp -r files/. mounted; rm -r mounted/gone";
    run("bash", &["-c", script, text(folder)]);
    std::fs::read(&image).unwrap()
}

/// Of one that Windows unmounted, and of one that it has mounted and froze.
#[test]
fn free_clusters_are_left_out_and_every_file_is_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (is_closed, wanted) in [(true, ALL), (false, QUIET)] {
        let mut bytes = make_used(folder);
        write_log(&mut bytes, is_closed);
        let found = look(&bytes, wanted);
        assert_eq!(found.remarks, []);
        let told = run("ntfsinfo", &["-f", "-m", text(&folder.join("disk"))]);
        let (_, told) = told.split_once("Free Clusters: ").unwrap();
        let free: u64 = told.split(' ').next().unwrap().parse().unwrap();
        assert_eq!(sum(&bytes_of(&found, Reason::FreeSpace)), free * 4096);
        assert_eq!(sum(&bytes_of(&found, Reason::PageFile)), 2 * MIB);
        let only = |swap, free_space| look(&bytes, Wanted { swap, free_space, ..wanted });
        assert_eq!(sum(&bytes_of(&only(false, true), Reason::FreeSpace)), free * 4096);
        assert_eq!(only(false, true).left_out.len() + 1, found.left_out.len());
        assert_eq!(sum(&bytes_of(&only(true, false), Reason::FreeSpace)), 0);

        std::fs::write(folder.join("restored"), without(&found, bytes)).unwrap();
        // It does not read what it did not write, unless that is closed.
        let script = "set -e; cd $0; ntfsfix -n restored; ntfsfix restored; ntfs-3g restored mounted; trap 'umount mounted' EXIT
            diff -r -x pagefile.sys files mounted";
        run("bash", &["-c", script, text(folder)]);
    }
}

#[test]
fn free_clusters_are_kept_where_they_may_be_needed() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = make_used(folder.path());
    write_log(&mut bytes, true);
    assert!(look(&bytes, ALL).left_out.len() > 2);
    // A volume with shadow copies, which show what it gave away.
    let mut shadowed = bytes.clone();
    shadowed[0x1e00..0x1e10]
        .copy_from_slice(b"\x6b\x87\x08\x38\x76\xc1\x48\x4e\xb7\xae\x04\x04\x6e\x6c\xc7\x52");
    let found = look(&shadowed, ALL);
    assert_eq!(
        (sum(&bytes_of(&found, Reason::FreeSpace)), sum(&bytes_of(&found, Reason::PageFile))),
        (0, 2 * MIB)
    );
    assert!(found.remarks[0].what.contains("shadow copies"), "{:?}", found.remarks);
    // A bitmap that calls the table of files free.
    let content = run(
        "bash",
        &["-c", "ntfscat -f -i 6 $0 | od -An -v -tx1 -w64 | head -1", text(&folder.path().join("disk"))],
    );
    let begin: Vec<u8> =
        content.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let bitmap =
        (0..bytes.len()).step_by(4096).find(|at| bytes[*at..][..64] == begin[..]).expect("the bitmap");
    let table = u64::from_le_bytes(bytes[0x30..0x38].try_into().unwrap()) as usize;
    bytes[bitmap + table / 8] &= !(1 << (table % 8));
    let found = look(&bytes, ALL);
    assert_eq!(found.left_out, []);
    assert!(found.remarks[0].what.contains("bitmap makes no sense"), "{:?}", found.remarks);
}

#[test]
fn a_file_system_in_use_is_left_alone_unless_it_was_frozen() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = make(folder.path(), &[0; 100_000]);
    write_log(&mut bytes, false);
    let found = look(&bytes, ALL);
    assert_eq!(found.left_out, []);
    assert!(found.remarks[0].what.contains("mounted and was not frozen"), "{:?}", found.remarks);
    assert_eq!(sum(&bytes_of(&look(&bytes, QUIET), Reason::PageFile)), 6 * MIB);
}

#[test]
fn where_windows_sleeps_nothing_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = make(
        folder.path(),
        b"HIBR and then a lot of memory, more than fits into a record of the table of files",
    );
    for wanted in [ALL, QUIET, Wanted { swap: false, ..QUIET }] {
        let found = look(&bytes, wanted);
        assert_eq!(found.left_out, []);
        assert!(found.remarks[0].what.contains("Windows hibernates"), "{:?}", found.remarks);
    }
}

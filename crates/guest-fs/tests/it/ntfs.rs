use crate::images::{ALL, MIB, bytes_of, look, run, sum, text};
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
    let found = look(&bytes, ALL);
    assert_eq!(found.remarks, []);
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

#[test]
fn a_file_system_in_use_is_left_alone_unless_it_was_frozen() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = make(folder.path(), &[0; 100_000]);
    // The log's restart page as Windows keeps it while the file system is mounted: one client.
    let log =
        bytes.windows(4096).step_by(4096).position(|page| page.iter().all(|byte| *byte == 0xff)).unwrap()
            * 4096;
    let page = &mut bytes[log..log + 4096];
    page[..4].copy_from_slice(b"RSTR");
    page[0x18..0x1a].copy_from_slice(&0x30u16.to_le_bytes());
    page[0x30..0x40].copy_from_slice(&[9, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0xff, 0xff, 0, 0, 0, 0]);
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

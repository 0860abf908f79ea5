//! Images of QEMU's formats, written by qemu-img and qemu-io, read through our own storage daemon.

use rempart_backup::{QemuImage, Source};
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1024 * 1024;
const CHUNK: u64 = 256 * 1024;

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect("it starts");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// An image of 64 MiB and a bit, with 1 MiB written at 5 MiB and 64 KiB in the last piece.
fn image(folder: &Path, format: &str) -> PathBuf {
    let path = folder.join("image");
    run("qemu-img", &["create", "-q", "-f", format, text(&path), "67239936"]);
    run("qemu-io", &["-f", format, "-c", "write -P 7 5M 1M", "-c", "write -P 9 67174400 64k", text(&path)]);
    path
}

fn read_all(source: &dyn Source) -> Vec<u8> {
    let mut content = vec![0xff; source.size() as usize];
    source.reader().expect("a reader").read(0, &mut content).expect("reads");
    content
}

#[test]
fn every_format_gives_the_bytes_that_qemu_img_gives() {
    for format in ["qcow2", "vmdk", "vhdx", "vdi"] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = image(folder.path(), format);
        let raw = folder.path().join("raw");
        run("qemu-img", &["convert", "-f", format, "-O", "raw", text(&path), text(&raw)]);
        let source = QemuImage::open(&path, format).expect("opens");
        assert!(read_all(&source) == std::fs::read(&raw).expect("reads"), "{format}");
        let data = source.data(CHUNK).expect("tells");
        assert!(data.contains(5 * MIB / CHUNK) && data.contains(data.chunks() - 1), "{format}");
        // QEMU's driver for VHDX does not tell: then everything is read.
        assert!(
            data.bytes() < 8 * MIB || format == "vhdx",
            "{format}: {} bytes are said to hold something",
            data.bytes()
        );
    }
}

#[test]
fn the_daemon_goes_with_its_source() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = image(folder.path(), "qcow2");
    let running = || {
        let listed = Command::new("pgrep").args(["-f", text(&path)]).output().expect("pgrep starts");
        !listed.stdout.is_empty()
    };
    // Opened by a thread that is gone while it is read.
    let source = std::thread::spawn({
        let path = path.clone();
        move || QemuImage::open(&path, "qcow2").expect("opens")
    });
    let source = source.join().expect("it opened");
    assert!(running());
    assert_eq!(read_all(&source).len() as u64, source.size());
    drop(source);
    assert!(!running());
}

#[test]
fn what_cannot_be_read_is_refused_with_the_daemons_words() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = image(folder.path(), "qcow2");
    let refusal = |path: &Path, format: &str| {
        let error = QemuImage::open(path, format).expect_err("refused");
        assert_eq!(error.to_string(), format!("open `{}`", path.display()));
        error.source.to_string()
    };
    assert!(refusal(&path, "vmdk").contains("VMDK"), "{}", refusal(&path, "vmdk"));
    assert!(refusal(&folder.path().join("nothing"), "qcow2").contains("No such file"));
    std::fs::write(&path, b"QFI\xfb garbage").expect("writes");
    refusal(&path, "qcow2");
    let secret = "secret,id=s,data=pass";
    let locked = folder.path().join("locked");
    let encrypt = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    run("qemu-img", &["create", "-q", "--object", secret, "-f", "qcow2", "-o", encrypt, text(&locked), "1M"]);
    assert!(refusal(&locked, "qcow2").contains("encrypt"), "{}", refusal(&locked, "qcow2"));
}

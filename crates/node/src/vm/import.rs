//! Bringing a disk image in: inspected first, then copied to a raw sparse file or adopted where it is.

use super::partition;
use crate::jobs::Reporter;
use rempart_api::{DiskSource, Error};
use serde::Deserialize;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// The largest disk: its change map takes 128 MiB of memory per TiB.
const MAX_DISK_BYTES: u64 = 64 << 40;

/// What `qemu-img info` tells.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    format: String,
    virtual_size: u64,
    #[serde(default)]
    encrypted: bool,
    backing_filename: Option<String>,
    #[serde(default)]
    format_specific: Option<FormatSpecific>,
}

#[derive(Debug, Deserialize)]
struct FormatSpecific {
    data: Option<FormatData>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FormatData {
    data_file: Option<String>,
    encrypt: Option<serde_json::Value>,
}

/// An image that may be brought in.
#[derive(Debug)]
pub struct Image {
    pub source: DiskSource,
    format: String,
    /// Size of the disk it holds, a multiple of 512.
    pub size_bytes: u64,
}

impl Image {
    /// One of ours, which needs no inspection.
    pub fn raw(path: PathBuf, size_bytes: u64) -> Image {
        Image { source: DiskSource { path, adopt: false }, format: "raw".into(), size_bytes }
    }
}

/// Refuses whatever would not boot, or not be the disk that the user means.
pub async fn inspect(source: DiskSource) -> Result<Image, Error> {
    let path = &source.path;
    let shown = path.display();
    let refuse = |why: String| Error::invalid(format!("cannot import `{shown}`: {why}"));
    if !path.is_absolute() {
        return Err(refuse("the path is not absolute".into()));
    }
    let meta = std::fs::metadata(path).map_err(|e| {
        Error::invalid(format!("cannot import `{shown}`")).cause(e).hint("name an existing disk image")
    })?;
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return Err(refuse("it is neither a file nor a block device".into()));
    }
    let run = Command::new("qemu-img")
        .args(["info", "--output=json"])
        .arg(path)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(no_qemu_img)?;
    if !run.status.success() {
        return Err(unreadable(path, &run.stderr));
    }
    let info: Info = serde_json::from_slice(&run.stdout)
        .map_err(|e| Error::failed(format!("cannot read what qemu-img says of `{shown}`")).cause(e))?;
    let data = info.format_specific.as_ref().and_then(|f| f.data.as_ref());
    if info.encrypted || data.is_some_and(|d| d.encrypt.is_some()) || info.format == "luks" {
        return Err(refuse("it is encrypted, and would be copied as ciphertext".into())
            .hint("decrypt it first with `qemu-img convert --object secret,…`"));
    }
    if info.format != "raw" && info.format != "qcow2" {
        return Err(refuse(format!("its format is {}; raw and qcow2 can be brought in", info.format))
            .hint(format!("convert it: `qemu-img convert -f {} -O qcow2 {shown} disk.qcow2`", info.format)));
    }
    if let Some(other) = info.backing_filename.as_ref().or(data.and_then(|d| d.data_file.as_ref())) {
        return Err(refuse(format!("it is only complete together with `{other}`"))
            .hint(format!("flatten it: `qemu-img convert -O qcow2 {shown} flat.qcow2`")));
    }
    if source.adopt && info.format != "raw" {
        return Err(refuse(format!("a {} file cannot be used in place", info.format))
            .hint("leave out --adopt to copy it"));
    }
    if source.adopt {
        std::fs::File::options().read(true).write(true).open(path).map_err(|e| not_writable(path, e))?;
    }
    if info.virtual_size == 0 || info.virtual_size > MAX_DISK_BYTES {
        return Err(refuse(format!("its disk has {} bytes", info.virtual_size)));
    }
    if !info.virtual_size.is_multiple_of(512) {
        return Err(refuse(format!("its size of {} bytes is no multiple of 512", info.virtual_size)));
    }
    if info.format == "qcow2" {
        check(path).await?;
    }
    if let Some(needed) = partition::required_bytes(&head(path, &info.format).await?)
        && needed > info.virtual_size
    {
        return Err(refuse(format!(
            "its partition table needs {needed} bytes, but the disk has {}",
            info.virtual_size
        ))
        .hint("the copy is probably cut off; compare its size with the original's"));
    }
    Ok(Image { format: info.format, size_bytes: info.virtual_size, source })
}

/// Why `qemu-img` did not open the image.
fn unreadable(path: &Path, stderr: &[u8]) -> Error {
    let shown = path.display();
    let text = String::from_utf8_lossy(stderr).trim().to_owned();
    if says_locked(&text, path) {
        return Error::conflict(format!("cannot import `{shown}`: another program has it open for writing"))
            .cause(text)
            .hint("stop the virtual machine that uses it first");
    }
    Error::invalid(format!("cannot import `{shown}`: it cannot be read as a disk image")).cause(text)
}

/// QEMU names the lock that it did not get: `Failed to get shared "write" lock`. Its answer holds the path, too, which
/// may be called anything.
fn says_locked(text: &str, path: &Path) -> bool {
    let text = text.replace(&*path.to_string_lossy(), "");
    text.lines().any(|line| {
        line.split_once("Failed to get ").is_some_and(|(_, what)| what.trim_end().ends_with("lock"))
            || line.contains("Failed to lock byte")
    })
}

/// An image that is used in place is written.
fn not_writable(path: &Path, cause: std::io::Error) -> Error {
    let hint = match cause.kind() {
        std::io::ErrorKind::ReadOnlyFilesystem => {
            "its file system is mounted read-only; under systemd, /home, /root and /run/user are that for the \
             daemon (ProtectHome= in rempart.service): move the image elsewhere, or leave out --adopt to copy it"
        }
        _ => "leave out --adopt to copy it",
    };
    Error::invalid(format!("cannot use `{}` in place: it cannot be opened for writing", path.display()))
        .cause(cause)
        .hint(hint)
}

/// The program, to be listened to while it runs.
fn qemu_img() -> Command {
    let mut command = Command::new("qemu-img");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// How many wrong references `qemu-img check` counted.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Checked {
    corruptions: u64,
    check_errors: u64,
}

/// Of what it tells of each wrong reference, this much is kept: there may be millions.
const CHECK_SAYS_BYTES: u64 = 4096;

/// Refuses a qcow2 file whose tables are damaged or name what is not there: a file that was cut off still opens, and
/// what it lacks reads as zeroes. Leaked clusters cost space only, and are fine.
async fn check(path: &Path) -> Result<(), Error> {
    let shown = path.display();
    let failed = |e: std::io::Error| Error::failed(format!("cannot check `{shown}`")).cause(e);
    let mut child =
        qemu_img().args(["check", "--output=json", "-f", "qcow2"]).arg(path).spawn().map_err(no_qemu_img)?;
    let mut stderr = child.stderr.take().expect("stderr was piped");
    let mut said = Vec::new();
    (&mut stderr).take(CHECK_SAYS_BYTES).read_to_end(&mut said).await.map_err(failed)?;
    tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await.map_err(failed)?;
    let run = child.wait_with_output().await.map_err(failed)?;
    // 0: nothing found; 3: leaks only; 2: corruptions; 1: it could not be checked to the end.
    if matches!(run.status.code(), Some(0 | 3)) {
        return Ok(());
    }
    // It prints no figures of an image that it could not open.
    let Ok(checked) = serde_json::from_slice::<Checked>(&run.stdout) else {
        return Err(unreadable(path, &said));
    };
    let first = String::from_utf8_lossy(&said).lines().next().unwrap_or_default().trim().to_owned();
    let why = match checked {
        Checked { corruptions: 0, check_errors } => {
            format!("it cannot be checked to its end, by {check_errors} errors")
        }
        Checked { corruptions, .. } => {
            format!("it is damaged: `qemu-img check` finds {corruptions} corruptions")
        }
    };
    Err(Error::invalid(format!("cannot import `{shown}`: {why}")).cause(first).hint(
        "the copy is cut off, or its last user did not close it: compare its checksum with the original's; \
             `qemu-img check -r all` mends the latter (on a copy)",
    ))
}

/// The first bytes of the disk, whatever the format.
async fn head(path: &Path, format: &str) -> Result<Vec<u8>, Error> {
    let failed =
        |e: std::io::Error| Error::failed(format!("cannot read the start of `{}`", path.display())).cause(e);
    if format == "raw" {
        let mut file = tokio::fs::File::open(path).await.map_err(failed)?;
        let mut head = vec![0; partition::HEAD_BYTES];
        let mut filled = 0;
        while filled < head.len() {
            match file.read(&mut head[filled..]).await.map_err(failed)? {
                0 => break,
                n => filled += n,
            }
        }
        head.truncate(filled);
        return Ok(head);
    }
    let aside = tempfile_path(path);
    let run = Command::new("qemu-img")
        .args(["dd", "-f", format, "-O", "raw", "bs=512"])
        .arg(format!("count={}", partition::HEAD_BYTES / 512))
        .arg(prefixed("if=", path))
        .arg(prefixed("of=", &aside))
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(no_qemu_img)?;
    let head = tokio::fs::read(&aside).await;
    let _ = tokio::fs::remove_file(&aside).await;
    if !run.status.success() {
        return Err(Error::failed(format!("cannot read the start of `{}`", path.display()))
            .cause(String::from_utf8_lossy(&run.stderr).trim()));
    }
    head.map_err(failed)
}

fn tempfile_path(path: &Path) -> PathBuf {
    use std::hash::{BuildHasher, Hasher};
    let salt = std::collections::hash_map::RandomState::new().build_hasher().finish();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    std::env::temp_dir().join(format!("rempart-head-{name}-{salt:016x}"))
}

fn prefixed(prefix: &str, path: &Path) -> std::ffi::OsString {
    let mut text = std::ffi::OsString::from(prefix);
    text.push(path);
    text
}

fn no_qemu_img(cause: std::io::Error) -> Error {
    Error::failed("cannot run `qemu-img`").cause(cause).hint("install the package qemu-utils")
}

/// Copies the image to a raw, sparse file at `target`, which must not exist, and syncs it.
pub async fn copy(image: &Image, target: &Path, reporter: &Reporter, phase: &str) -> Result<(), Error> {
    if target.exists() {
        return Err(Error::conflict(format!("`{}` exists already", target.display())));
    }
    let result = convert(image, target, reporter, phase).await;
    if result.is_err() {
        let _ = tokio::fs::remove_file(target).await;
    }
    result
}

async fn convert(image: &Image, target: &Path, reporter: &Reporter, phase: &str) -> Result<(), Error> {
    let failed =
        |why: String| Error::failed(format!("cannot copy `{}`", image.source.path.display())).cause(why);
    let mut child = qemu_img()
        .args(["convert", "-p", "-f", &image.format, "-O", "raw", "-S", "64k"])
        .arg(&image.source.path)
        .arg(target)
        .spawn()
        .map_err(no_qemu_img)?;
    let mut stdout = child.stdout.take().expect("stdout was piped");
    let mut stderr = child.stderr.take().expect("stderr was piped");
    let errors = tokio::spawn(async move {
        let mut text = String::new();
        let _ = (&mut stderr).take(64 << 10).read_to_string(&mut text).await;
        text
    });
    let mut chunk = [0; 512];
    loop {
        let n = stdout.read(&mut chunk).await.map_err(|e| failed(e.to_string()))?;
        if n == 0 {
            break;
        }
        if let Some(percent) = last_percent(&String::from_utf8_lossy(&chunk[..n])) {
            let done = (image.size_bytes as f64 * percent / 100.0) as u64;
            reporter.progress(phase, done.min(image.size_bytes), image.size_bytes);
        }
    }
    let status = child.wait().await.map_err(|e| failed(e.to_string()))?;
    let errors = errors.await.unwrap_or_default();
    if !status.success() {
        return Err(failed(errors.trim().to_owned()));
    }
    let file = tokio::fs::File::open(target).await.map_err(|e| failed(e.to_string()))?;
    file.sync_all().await.map_err(|e| failed(e.to_string()))
}

/// qemu-img prints `    (12.34/100%)\r` over and over.
fn last_percent(text: &str) -> Option<f64> {
    let start = text.rfind('(')?;
    text[start + 1..].split('/').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_api::ErrorKind;

    fn qemu_img(args: &[&str]) {
        let run = std::process::Command::new("qemu-img")
            .args(args)
            .output()
            .expect("qemu-img (package qemu-utils)");
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    }

    async fn refused(path: &Path, adopt: bool) -> Error {
        inspect(DiskSource { path: path.to_owned(), adopt }).await.expect_err("it must be refused")
    }

    #[tokio::test]
    async fn bad_images_are_refused_and_say_why() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let text = |path: &Path| path.to_str().unwrap().to_owned();

        assert!(refused(&at("missing"), false).await.message.contains("missing"));
        assert!(refused(dir.path(), false).await.message.contains("neither"));

        let vmdk = at("a.vmdk");
        qemu_img(&["create", "-q", "-f", "vmdk", &text(&vmdk), "1M"]);
        assert!(refused(&vmdk, false).await.message.contains("vmdk"));

        let luks = at("luks.qcow2");
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            "secret,id=s,data=abc123",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            &text(&luks),
            "1M",
        ]);
        assert!(refused(&luks, false).await.message.contains("encrypted"));

        let (base, overlay) = (at("base.qcow2"), at("overlay.qcow2"));
        qemu_img(&["create", "-q", "-f", "qcow2", &text(&base), "1M"]);
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &text(&base), &text(&overlay)]);
        assert!(refused(&overlay, false).await.message.contains("together with"));
        assert!(refused(&base, true).await.message.contains("in place"));

        let cut = at("cut.raw");
        let mut head = vec![0; 1 << 20];
        head[450] = 0x83;
        head[458..462].copy_from_slice(&100_000u32.to_le_bytes());
        head[510..512].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(&cut, head).unwrap();
        assert!(refused(&cut, false).await.message.contains("partition table"));
        let cut_qcow2 = at("cut.qcow2");
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &text(&cut), &text(&cut_qcow2)]);
        assert!(refused(&cut_qcow2, false).await.message.contains("partition table"));

        let short = at("short.qcow2");
        qcow2_with_data(&short);
        let whole = std::fs::metadata(&short).unwrap().len();
        std::fs::File::options().write(true).open(&short).unwrap().set_len(whole / 2).unwrap();
        let error = refused(&short, false).await;
        assert_eq!(error.kind, ErrorKind::Invalid, "{error:?}");
        assert!(error.message.contains("corruptions"), "{error:?}");
        assert!(error.cause.unwrap().contains("end of the file"));

        // A program that runs cannot be written, not even by root.
        let busy = std::env::current_exe().unwrap();
        assert!(refused(&busy, true).await.message.contains("opened for writing"));
        let read_only = not_writable(&busy, std::io::ErrorKind::ReadOnlyFilesystem.into());
        assert!(read_only.hint.unwrap().contains("ProtectHome"));

        let odd = at("odd.raw");
        std::fs::write(&odd, vec![0; 1000]).unwrap();
        // QEMU rounds a raw file up to sectors; whatever it reports must be whole sectors.
        if let Ok(image) = inspect(DiskSource { path: odd, adopt: false }).await {
            assert_eq!(image.size_bytes % 512, 0);
        }
    }

    fn qcow2_with_data(path: &Path) {
        let raw = path.with_extension("data");
        std::fs::write(&raw, vec![0xa5; 4 << 20]).unwrap();
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), path.to_str().unwrap()]);
    }

    /// They are what a crash of QEMU leaves behind, and take nothing from the disk.
    #[tokio::test]
    async fn leaked_clusters_are_no_reason_to_refuse() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leaky.qcow2");
        qcow2_with_data(&path);
        let mut bytes = std::fs::read(&path).unwrap();
        let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        // One more cluster at the end, counted as used by nobody.
        let block = number(number(48));
        let cluster = bytes.len().div_ceil(65536);
        bytes.resize((cluster + 1) * 65536, 0);
        bytes[block + 2 * cluster + 1] = 1;
        std::fs::write(&path, bytes).unwrap();
        let run = std::process::Command::new("qemu-img").arg("check").arg(&path).output().unwrap();
        assert_eq!(run.status.code(), Some(3), "{run:?}");
        assert_eq!(inspect(DiskSource { path, adopt: false }).await.unwrap().size_bytes, 4 << 20);
    }

    #[tokio::test]
    async fn a_path_that_is_called_lock_is_not_a_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Failed to get a lock.qcow2");
        // Of a version that QEMU does not know.
        std::fs::write(&path, [&b"QFI\xfb\0\0\0\x09"[..], &[0; 1024]].concat()).unwrap();
        let error = refused(&path, false).await;
        assert_eq!(error.kind, ErrorKind::Invalid, "{error:?}");
        assert!(error.cause.unwrap().contains("version"));
        for said in ["Failed to get shared \"write\" lock", "Failed to get \"write\" lock\nIs another"] {
            assert!(says_locked(
                &format!("qemu-img: Could not open '/a/lock': {said}"),
                Path::new("/a/lock")
            ));
        }
        assert!(!says_locked("qemu-img: Could not open '/a/lock': no block device", Path::new("/a/lock")));
    }

    #[tokio::test]
    async fn a_locked_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("used.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
        let mut user = std::process::Command::new("qemu-io")
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io (package qemu-utils)");
        // Its prompt says that the image is open.
        let mut prompt = [0; 1];
        std::io::Read::read_exact(user.stdout.as_mut().unwrap(), &mut prompt).unwrap();
        let error = refused(&path, false).await;
        drop(user.stdin.take());
        user.wait().unwrap();
        assert_eq!(error.kind, ErrorKind::Conflict, "{error:?}");
    }

    #[tokio::test]
    async fn a_copy_is_raw_and_equal() {
        let dir = tempfile::tempdir().unwrap();
        let (raw, qcow2, target) =
            (dir.path().join("a.raw"), dir.path().join("a.qcow2"), dir.path().join("t.raw"));
        let content: Vec<u8> = (0..300_000u32).flat_map(|i| i.to_le_bytes()).take(1 << 20).collect();
        std::fs::write(&raw, &content).unwrap();
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
        let image = inspect(DiskSource { path: qcow2, adopt: false }).await.unwrap();
        let jobs = crate::jobs::Jobs::default();
        let (target2, done) = (target.clone(), std::time::Duration::from_secs(30));
        let job = jobs.start("copy", |reporter| async move {
            copy(&image, &target2, &reporter, "copying").await?;
            assert!(copy(&image, &target2, &reporter, "copying").await.is_err(), "a second time it exists");
            Ok(serde_json::Value::Null)
        });
        let job = jobs.get(job.id, done).await.unwrap();
        // The refused second copy must not have removed the first one's result.
        assert!(matches!(job.state, rempart_api::JobState::Done { .. }), "{job:?}");
        assert_eq!(std::fs::read(&target).unwrap(), content);
    }

    #[test]
    fn progress_of_qemu_img_is_read() {
        assert_eq!(last_percent("    (0.00/100%)\r    (47.50/100%)\r"), Some(47.5));
        assert_eq!(last_percent("garbage ("), None);
    }
}

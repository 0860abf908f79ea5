//! What is mounted, by what the kernel says (proc_pid_mountinfo(5)), and what a path lies on.

use rustix::fs::{AtFlags, CWD, StatxFlags, makedev, stat, statx};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Layers that lie on each other, at most: loop devices, overlays.
const DEEPEST: usize = 8;

/// A file system at one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    id: u64,
    /// The device number of its superblock: the same wherever else it is mounted, and of all subvolumes.
    pub superblock: u64,
    pub point: PathBuf,
    source: PathBuf,
    /// Where an overlay writes to.
    upper: Option<PathBuf>,
}

/// In the order that they were mounted. Lines that are not understood are left out.
pub(super) fn mounts() -> std::io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let end = fields.iter().position(|field| *field == b"-")?;
    let [id, _, device, _, point, ..] = fields[..end] else { return None };
    let [_, source, options] = fields[end + 1..] else { return None };
    let (major, minor) = std::str::from_utf8(device).ok()?.split_once(':')?;
    let upper = options.split(|byte| *byte == b',').find_map(|option| option.strip_prefix(b"upperdir="));
    Some(Mount {
        id: std::str::from_utf8(id).ok()?.parse().ok()?,
        superblock: makedev(major.parse().ok()?, minor.parse().ok()?),
        point: unescaped(point),
        source: unescaped(source),
        upper: upper.map(unescaped),
    })
}

/// The kernel writes spaces, tabs, line ends and backslashes as `\` and three octal digits.
fn unescaped(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, behind)) = rest.split_first() {
        let code = behind.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.filter(|_| byte == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) => {
                bytes.push(code);
                rest = &behind[3..];
            }
            None => {
                bytes.push(byte);
                rest = behind;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

impl Mount {
    /// Whether it is on a block device.
    pub fn is_on(&self, device: u64) -> bool {
        // Those of several devices, such as btrfs, have a number of their own.
        self.superblock == device
            || rustix::fs::major(self.superblock) == 0
                && self.source.is_absolute()
                && stat(&self.source).is_ok_and(|source| source.st_rdev == device)
    }
}

/// The mount that a path lies on; none of what is mounted nowhere, as a pipe is.
pub(super) fn mount_of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let found = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok()?;
    let device = makedev(found.stx_dev_major, found.stx_dev_minor);
    let by_id = mounts
        .iter()
        .find(|mount| found.stx_mask & StatxFlags::MNT_ID.bits() != 0 && mount.id == found.stx_mnt_id);
    by_id.or_else(|| mounts.iter().find(|mount| mount.superblock == device))
}

/// The superblocks that are written to when something is written at a path: its own, that below an overlay, that of the file
/// behind a loop device.
pub(super) fn written_below(mounts: &[Mount], path: &Path) -> Vec<u64> {
    let (mut found, mut paths) = (Vec::new(), vec![path.to_owned()]);
    for _ in 0..DEEPEST {
        let Some(next) = paths.pop() else { break };
        let Some(mount) = mount_of(mounts, &next) else { continue };
        found.push(mount.superblock);
        paths.extend(mount.upper.clone());
        paths.extend(super::devices::backing_files(mount.superblock));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &[u8] = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
37 36 0:45 / /srv rw - overlay overlay rw,lowerdir=/a,upperdir=/up\\134per,workdir=/w
noise
38 36 0:x / /srv rw - ext4 /dev/a rw
";

    #[test]
    fn mounts_are_read_and_strange_lines_are_left_out() {
        let [first, overlay] = &parse(TEXT)[..] else { panic!("two") };
        assert_eq!((first.id, first.superblock), (36, makedev(98, 0)));
        assert_eq!((&first.point, &first.upper), (&"/mnt 2".into(), &None));
        assert_eq!((&overlay.source, &overlay.upper), (&"overlay".into(), &Some("/up\\per".into())));
    }

    #[test]
    fn a_path_lies_on_what_is_mounted_there() {
        let mounts = mounts().expect("the kernel tells");
        let found = |path: &str| mount_of(&mounts, Path::new(path)).map(|mount| mount.point.clone());
        assert_eq!(found("/proc/self/status"), Some("/proc".into()));
        assert_eq!(found("/nowhere/at/all"), None);
        let (pipe, _other) = std::io::pipe().expect("a pipe");
        let pipe = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&pipe));
        assert_eq!(found(&pipe), None);
    }

    #[test]
    fn a_file_system_is_on_its_device_or_by_its_name_where_it_has_a_number_of_its_own() {
        let is_on_null = |superblock, source: &str| {
            let mount = Mount { id: 1, superblock, point: "/".into(), source: source.into(), upper: None };
            mount.is_on(makedev(1, 3))
        };
        assert!(is_on_null(makedev(1, 3), "none"));
        assert!(is_on_null(makedev(0, 45), "/dev/null"), "as btrfs");
        assert!(!is_on_null(makedev(0, 45), "/dev/zero"));
        assert!(
            !is_on_null(makedev(0, 45), "../../../../../../../../dev/null"),
            "a word that was said when it was mounted"
        );
        assert!(!is_on_null(makedev(8, 1), "/dev/null"), "that device had another name then");
    }

    /// In the order that they were mounted: what lies in files of others came after them.
    #[test]
    fn a_file_system_is_known_once_by_all_of_its_mounts() {
        let line = |device: &str, point: &str| format!("36 35 {device} / {point} rw - ext4 /dev/x rw\n");
        let text = [("8:2", "/other"), ("8:1", "/z"), ("7:0", "/a"), ("8:1", "/b")];
        let mounts = parse(text.map(|(device, point)| line(device, point)).concat().as_bytes());
        let devices = [makedev(7, 0), makedev(8, 1)].into();
        let found = crate::freeze::devices::file_systems(&mounts, &devices);
        let points: Vec<Vec<_>> =
            found.iter().map(|mounts| mounts.iter().map(|mount| mount.point.as_path()).collect()).collect();
        assert_eq!(points, [vec![Path::new("/z"), Path::new("/b")], vec![Path::new("/a")]]);
    }

    #[test]
    fn what_is_written_to_lies_below_overlays_as_deep_as_they_go() {
        let mut mounts = mounts().expect("the kernel tells");
        let place = |mounts: &[Mount], path: &str| {
            let found = mount_of(mounts, Path::new(path)).expect("it is mounted").id;
            mounts.iter().position(|mount| mount.id == found).expect("it is one of them")
        };
        let (proc, sys) = (place(&mounts, "/proc"), place(&mounts, "/sys"));
        let [of_proc, of_sys] = [proc, sys].map(|place| mounts[place].superblock);
        let below = |mounts: &[Mount]| written_below(mounts, Path::new("/proc/self"));
        assert_eq!(below(&mounts), [of_proc]);
        mounts[proc].upper = Some("/sys".into());
        assert_eq!(below(&mounts), [of_proc, of_sys]);
        mounts[sys].upper = Some("/proc".into());
        assert_eq!(below(&mounts), [of_proc, of_sys].repeat(DEEPEST / 2), "it ends");
        // An older kernel does not tell by which mount a path was reached.
        mounts.iter_mut().for_each(|mount| mount.id += 1 << 40);
        assert_eq!(below(&mounts)[..2], [of_proc, of_sys]);
    }

    proptest! {
        #[test]
        fn nothing_that_is_read_there_panics(text in prop::collection::vec(any::<u8>(), 0..500), cut in 0..TEXT.len()) {
            parse(&text);
            parse(&[&TEXT[..cut], &text, &TEXT[cut..]].concat());
        }
    }
}

//! The lab's guest: a tiny Linux on a bootable disk that runs one program, built here without root or loop mounts.

mod disk_image;
mod initramfs;
mod program;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::setup::Kernel;
use crate::workspace::lab_dir;

pub use disk_image::{BOOT_DISK_BYTES, DATA_DISK_BYTES, RECORDS_AT, RING_END, scatter};

/// Address of the guest on the guests' network.
pub const GUEST_ADDRESS: &str = "10.77.0.50";

/// How a guest behaves; part of its boot disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// 0: as many as the disks take.
    pub records_per_second: u64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { records_per_second: 200 }
    }
}

const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=on";

impl Settings {
    fn kernel_command_line(self) -> String {
        format!(
            "{KERNEL_COMMAND_LINE} lab.address={GUEST_ADDRESS}/24 lab.report=10.77.0.255:{} lab.rate={}",
            lab_guest::report::REPORT_PORT,
            self.records_per_second
        )
    }
}

/// The two disks of a new guest.
#[derive(Debug, Clone)]
pub struct Disks {
    pub boot: PathBuf,
    pub data: PathBuf,
}

/// Makes both disks in `folder`.
///
/// The boot disk is built once and copied from a cache; the cache is rebuilt when an ingredient is newer.
pub fn make_disks(kernel: &Kernel, settings: Settings, folder: &Path) -> Result<Disks> {
    let program = program::build().context("build the guest's program")?;
    let cached = lab_dir().join(format!("guest-{}-rate{}.img", kernel.version, settings.records_per_second));
    if !is_newer(&cached, &[&program, &kernel.image, &std::env::current_exe()?]) {
        let partial = cached.with_extension("partial");
        let initramfs = initramfs::build(kernel, &program).context("build the guest's initramfs")?;
        disk_image::build_boot_disk(&partial, kernel, &initramfs, &settings.kernel_command_line())
            .context("build the guest's boot disk")?;
        fs::rename(&partial, &cached)?;
    }
    let disks = Disks { boot: folder.join("boot.raw"), data: folder.join("data.raw") };
    disk_image::copy_sparse(&cached, &disks.boot)?;
    disk_image::build_data_disk(&disks.data)?;
    Ok(disks)
}

/// QEMU's options for a guest that measures its first disk and nothing else: it says `flush MICROSECONDS` on its serial
/// port for each page that it has written and flushed.
pub fn boot_to_measure(kernel: &Kernel, folder: &Path) -> Result<Vec<OsString>> {
    let program = program::build().context("build the guest's program")?;
    let initramfs = folder.join("initramfs");
    fs::write(&initramfs, initramfs::build(kernel, &program).context("build the guest's initramfs")?)?;
    let append = format!("{KERNEL_COMMAND_LINE} lab.flushes=/dev/vda");
    let options: [(&str, &OsStr); 3] = [
        ("-kernel", kernel.image.as_os_str()),
        ("-initrd", initramfs.as_os_str()),
        ("-append", append.as_ref()),
    ];
    Ok(options.into_iter().flat_map(|(name, value)| [name.into(), value.to_owned()]).collect())
}

fn is_newer(made: &Path, of: &[&Path]) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    match time(made) {
        Some(made) => of.iter().all(|path| time(path).is_some_and(|ingredient| ingredient <= made)),
        None => false,
    }
}

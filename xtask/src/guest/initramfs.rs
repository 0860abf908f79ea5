//! The initial file system: busybox, a few kernel modules, the program, and a script that starts it.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::setup::Kernel;

/// In the order they must be loaded: each needs some of those before it.
const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "evdev",
    "button",
];

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs run /run
/bin/busybox --install -s /bin
export PATH=/bin
argument() { sed -n "s/.*\blab\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
for module in @MODULES@; do insmod "/lib/$module.ko"; done
flushes=$(argument flushes)
if [ -n "$flushes" ]; then
  while [ ! -b "$flushes" ]; do usleep 20000; done
  lab-guest flushes "$flushes"
  poweroff -f
fi
tries=0
while [ ! -b /dev/vda2 ] || [ ! -b /dev/vdb ] || [ ! -e /sys/class/net/eth0 ]; do
  [ $tries -ge 200 ] && { echo "lab-guest: devices missing"; break; }
  usleep 20000; tries=$((tries + 1))
done
ip link set lo up
ip link set eth0 up
ip addr add "$(argument address)" broadcast + dev eth0
lab-guest /dev/vda2 /dev/vdb "$(argument report)" "$(argument rate)" &
while :; do setsid cttyhack sh </dev/ttyS0 >/dev/ttyS0 2>&1; sleep 1; done
"#;

/// The compressed archive, ready for the boot loader.
pub fn build(kernel: &Kernel, program: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "etc", "lib", "proc", "run", "sys"] {
        archive.add(folder, 0o040_755, &[]);
    }
    archive.add("init", 0o100_755, INIT.replace("@MODULES@", &MODULES.join(" ")).as_bytes());
    archive.add("bin/busybox", 0o100_755, &read(&busybox()?)?);
    archive.add("bin/lab-guest", 0o100_755, &read(program)?);
    let modules = find_modules(&kernel.modules)?;
    for name in MODULES {
        match modules.get(*name) {
            Some(path) => archive.add(&format!("lib/{name}.ko"), 0o100_644, &read(path)?),
            None => bail!("kernel {} has no module {name}", kernel.version),
        }
    }
    gzip(&archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn busybox() -> Result<PathBuf> {
    let places = ["/usr/bin/busybox", "/bin/busybox"].map(PathBuf::from);
    places.into_iter().find(|path| path.exists()).context("find busybox (package busybox-static)")
}

fn find_modules(folder: &Path) -> Result<HashMap<String, PathBuf>> {
    let mut found = HashMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                folders.push(path);
            } else if let Some(name) = entry.file_name().to_string_lossy().strip_suffix(".ko") {
                found.insert(name.to_owned(), path);
            }
        }
    }
    Ok(found)
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new("gzip")
        .args(["-1", "--no-name"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start gzip")?;
    let mut input = child.stdin.take().expect("piped");
    let output = std::thread::scope(|scope| {
        let feeder = scope.spawn(move || input.write_all(bytes));
        let output = child.wait_with_output();
        feeder.join().expect("the feeder does not panic")?;
        output
    })?;
    if !output.status.success() {
        bail!("gzip failed: {}", output.status);
    }
    Ok(output.stdout)
}

/// A cpio archive in the kernel's `newc` form: an ASCII header of hexadecimal numbers, the name, the bytes, each padded
/// to four bytes (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let fields =
            [self.entries, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

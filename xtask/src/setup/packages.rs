//! Which Debian packages the lab needs, and which of them this machine lacks.

use std::collections::HashMap;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::workspace;

/// QEMU 10. Its packages move together: each is named with its suite, because `apt-get -t` would move the rest of the
/// system too, and without a suite apt refuses the mixture.
const FROM_BACKPORTS: &[&str] = &[
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "qemu-utils",
    "qemu-block-extra",
    "seabios",
];
const OLDEST_QEMU: u32 = 10;

const FROM_STABLE: &[&str] = &[
    "attr",
    "btrfs-progs",
    "busybox-static",
    "dosfstools",
    "e2fsprogs",
    "exfat-fuse",
    "exfatprogs",
    "fdisk",
    "fio",
    "gcc",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libc6-dev",
    "libnbd-bin",
    "lvm2",
    "mtools",
    "nftables",
    "ntfs-3g",
    "ovmf",
    "python3-aiosmtpd",
    "python3-venv",
    "syslinux",
    "systemd",
    "xfsprogs",
];

/// The lab is written for Debian 12 on x86-64.
pub fn check_machine() -> Result<()> {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        let line = release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or("").trim_matches('"').to_owned()
    };
    let (id, version) = (field("ID"), field("VERSION_ID"));
    if id != "debian" || version != "12" || cfg!(not(target_arch = "x86_64")) {
        bail!(
            "the lab needs Debian 12 on x86-64; this is {} on {}\n\
             hint: `cargo nextest run --workspace` and `rempart` itself run on other Linux systems too",
            if id.is_empty() { "an unknown system".to_owned() } else { format!("{id} {version}") },
            std::env::consts::ARCH
        );
    }
    Ok(())
}

/// The missing packages, as apt wants them named.
pub fn missing() -> Result<Vec<String>> {
    let installed = installed_versions()?;
    let mut missing = Vec::new();
    let qemu_is_new = installed.get("qemu-system-x86").is_some_and(|version| major(version) >= OLDEST_QEMU);
    for package in FROM_BACKPORTS {
        if !qemu_is_new || !installed.contains_key(*package) {
            missing.push(format!("{package}/bookworm-backports"));
        }
    }
    missing.extend(missing_of(FROM_STABLE)?);
    Ok(missing)
}

/// Those of `names` that are not installed.
pub fn missing_of(names: &[&str]) -> Result<Vec<String>> {
    let installed = installed_versions()?;
    let missing = names.iter().filter(|package| !installed.contains_key(**package));
    Ok(missing.map(|package| (*package).to_owned()).collect())
}

fn installed_versions() -> Result<HashMap<String, String>> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat", "${db:Status-Status} ${Package} ${Version}\n"]);
    let listing = workspace::output(&mut query).context("list installed packages")?;
    let mut installed = HashMap::new();
    for line in listing.lines() {
        if let ["installed", package, version] = line.split(' ').collect::<Vec<_>>()[..] {
            installed.insert(package.to_owned(), version.to_owned());
        }
    }
    Ok(installed)
}

/// `1:10.0.2+ds-2` → 10
fn major(version: &str) -> u32 {
    let upstream = version.split_once(':').map_or(version, |(_, upstream)| upstream);
    upstream.split(|c: char| !c.is_ascii_digit()).next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_past_the_epoch() {
        assert_eq!(major("1:10.0.2+ds-2+deb13u1~bpo12+1"), 10);
        assert_eq!(major("1:7.2+dfsg-7+deb12u15"), 7);
        assert_eq!(major("8.2.0"), 8);
        assert_eq!(major(""), 0);
    }
}

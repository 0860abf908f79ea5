//! The guest's kernel: Debian's cloud kernel, downloaded and unpacked beside the build, not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::workspace::{lab_dir, output, run};

/// The package that depends on the current cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

#[derive(Debug, Clone)]
pub struct Kernel {
    pub version: String,
    pub image: PathBuf,
    pub modules: PathBuf,
}

pub fn ensure() -> Result<Kernel> {
    let home = lab_dir().join("kernel");
    if let Some(kernel) = find(&home)? {
        return Ok(kernel);
    }
    let package = current_package()?;
    println!("setup: fetching the guest's kernel ({package})");
    // Unpacked under another name and renamed when whole: a half-unpacked kernel must not be found.
    let partial = lab_dir().join("kernel.partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).with_context(|| format!("create {}", partial.display()))?;
    let mut download = Command::new("apt-get");
    download.current_dir(&partial).args(["download", "-q", "-o", "APT::Sandbox::User=root"]).arg(&package);
    run(&mut download)?;
    let archive = fs::read_dir(&partial)?.flatten().map(|entry| entry.path()).next();
    let archive = archive.context("apt-get download left no file")?;
    run(Command::new("dpkg").arg("-x").arg(&archive).arg(&partial))?;
    fs::remove_file(archive)?;
    let _ = fs::remove_dir_all(&home);
    fs::rename(&partial, &home)?;
    match find(&home)? {
        Some(kernel) => Ok(kernel),
        None => bail!("package {package} holds no kernel"),
    }
}

fn find(home: &Path) -> Result<Option<Kernel>> {
    let Ok(entries) = fs::read_dir(home.join("boot")) else { return Ok(None) };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        if let Some(version) = name.to_string_lossy().strip_prefix("vmlinuz-") {
            let modules = home.join("lib/modules").join(version);
            if modules.is_dir() {
                return Ok(Some(Kernel { version: version.to_owned(), image: entry.path(), modules }));
            }
        }
    }
    Ok(None)
}

fn current_package() -> Result<String> {
    let depends = || -> Result<Option<String>> {
        let listing = output(Command::new("apt-cache").args(["depends", META_PACKAGE]))?;
        Ok(listing.lines().find_map(|line| {
            let package = line.trim().strip_prefix("Depends: ")?;
            package.starts_with("linux-image-").then(|| package.to_owned())
        }))
    };
    if let Ok(Some(package)) = depends() {
        return Ok(package);
    }
    if !super::is_root() {
        bail!("apt knows no package {META_PACKAGE}; as root, run:\n  apt-get update");
    }
    run(Command::new("apt-get").args(["update", "-q"]))?;
    depends()?.with_context(|| format!("apt knows no package {META_PACKAGE}"))
}

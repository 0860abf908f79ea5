//! Object stores to test against: moto speaks S3, azurite speaks Azure. Installed beside the build, from the registries of
//! their languages.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::workspace::{lab_dir, run};

const MOTO: &str = "moto[server]==5.2.5";
const AZURITE: &str = "azurite@3.35.0";
/// Last file of an installation; tests look for it.
const WHOLE: &str = "whole";

/// Installs what is missing. One that cannot be had (no registry in reach, no npm) leaves its tests out, which say so.
pub fn ensure() {
    let installed = [("moto", install("moto", moto)), ("azurite", install("azurite", azurite))];
    for (server, result) in installed {
        if let Err(error) = result {
            println!("setup: {server} is NOT installed, tests against it are left out: {error:#}");
        }
    }
}

/// What is half installed is told by the mark that comes last: a Python environment cannot be renamed.
fn install(name: &str, into: impl Fn(&Path) -> Result<()>) -> Result<()> {
    let home = lab_dir().join(name);
    if home.join(WHOLE).exists() {
        return Ok(());
    }
    println!("setup: installing {name}");
    let _ = fs::remove_dir_all(&home);
    fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
    into(&home)?;
    fs::write(home.join(WHOLE), "").with_context(|| format!("mark {} as whole", home.display()))
}

fn moto(home: &Path) -> Result<()> {
    run(Command::new("python3").args(["-m", "venv"]).arg(home))
        .context("hint: apt-get install python3-venv")?;
    run(Command::new(home.join("bin/pip")).args(["install", "--quiet", MOTO]))
}

fn azurite(home: &Path) -> Result<()> {
    let mut install = Command::new("npm");
    install.args(["install", "--silent", "--no-audit", "--no-fund", "--prefix"]).arg(home).arg(AZURITE);
    run(&mut install).context("hint: apt-get install npm")
}

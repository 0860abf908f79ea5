//! The guest's program, linked statically so that it runs on a bare kernel.

use std::path::PathBuf;

use anyhow::Result;

use crate::workspace::{cargo, run, target_dir};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds it (cargo decides whether there is anything to do).
pub fn build() -> Result<PathBuf> {
    let target_dir = target_dir().join("lab-guest");
    let mut command = cargo();
    // The target is named, although it is the host's, so that the flags stay away from build scripts and macros.
    command.args(["build", "--quiet", "--release", "--package", "lab-guest", "--target", TARGET]);
    command.arg("--target-dir").arg(&target_dir);
    command.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    run(&mut command)?;
    Ok(target_dir.join(TARGET).join("release/lab-guest"))
}

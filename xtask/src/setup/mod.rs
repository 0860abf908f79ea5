//! `cargo xtask setup`: finds out what is missing, says it, installs it.
//!
//! Every other task calls this first; with nothing missing it takes milliseconds.

mod backports;
mod kernel;
mod packages;
mod servers;

use std::process::Command;

use anyhow::{Result, bail};

use crate::workspace::{run, shown};

pub use kernel::Kernel;

/// Installs what is missing. Without the rights to, lists the commands and fails.
pub fn ensure() -> Result<Kernel> {
    packages::check_machine()?;
    install(packages::missing)?;
    servers::ensure();
    kernel::ensure()
}

/// Installs what only one task needs.
pub fn ensure_packages(names: &[&str]) -> Result<()> {
    install(|| packages::missing_of(names))
}

fn install(missing_now: impl Fn() -> Result<Vec<String>>) -> Result<()> {
    let missing = missing_now()?;
    if !missing.is_empty() {
        let plan = plan(&missing)?;
        if !is_root() {
            let mut lines = String::new();
            for step in &plan {
                lines += &format!("  {}\n", step.shown());
            }
            bail!("{} packages are missing; as root, run:\n{lines}", missing.len());
        }
        println!("setup: installing {}", missing.join(" "));
        for step in plan {
            step.apply()?;
        }
        let still_missing = missing_now()?;
        if !still_missing.is_empty() {
            bail!("apt-get succeeded, yet these packages are not as needed: {}", still_missing.join(" "));
        }
    }
    Ok(())
}

/// One change to the machine.
#[derive(Debug)]
enum Step {
    AddSource(backports::Source),
    Run(Command),
}

fn plan(missing: &[String]) -> Result<Vec<Step>> {
    let mut plan = Vec::new();
    if missing.iter().any(|package| package.contains("/bookworm-backports")) {
        plan.extend(backports::missing_source()?.map(Step::AddSource));
    }
    let mut update = Command::new("apt-get");
    update.args(["update", "-q"]);
    let mut install = Command::new("apt-get");
    install.args(["install", "-y", "-q", "--no-install-recommends"]).args(missing);
    install.env("DEBIAN_FRONTEND", "noninteractive");
    plan.extend([Step::Run(update), Step::Run(install)]);
    Ok(plan)
}

impl Step {
    fn shown(&self) -> String {
        match self {
            Step::AddSource(source) => source.as_command(),
            Step::Run(command) => shown(command),
        }
    }

    fn apply(self) -> Result<()> {
        println!("setup: {}", self.shown());
        match self {
            Step::AddSource(source) => source.write(),
            Step::Run(mut command) => run(&mut command),
        }
    }
}

pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

//! A rack in a box: two servers, a witness and an observer as network namespaces on this machine.
//!
//! ```text
//!   observer side A                                          observer side B
//!        │                                                         │
//!   ┌────┴──── node A ────────┐                      ┌──────── node B ──┴─────┐
//!   │ br0 ── guest taps       │═════ guest LAN ══════│      guest taps ── br0 │
//!   │ 10.78.0.1               │═════ peer link ══════│              10.78.0.2 │
//!   └──────────┬──────────────┘                      └────────────┬───────────┘
//!              ║ witness link A       ┌─────────┐       witness link B ║
//!              ╚══════════════════════│ witness │══════════════════════╝
//!                                     │10.78.0.3│
//!                                     └─────────┘
//! ```
//!
//! Every link runs through a namespace of its own that plays the switches: cutting a link takes the switch's ports down,
//! so both ends lose carrier as with a pulled cable and keep their addresses and routes. Each server has one address and
//! reaches each other server over one link; nothing forwards, so a cut link is cut.

mod host;
mod link;
mod namespace;
mod process;
mod stale;
mod volume;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

pub use host::{Host, Side};
pub use link::Link;
pub use namespace::{Namespace, send_signal};
pub use process::Process;
pub use volume::Volume;

/// The lab; dropping it ends everything that runs in it.
#[derive(Debug)]
pub struct Lab {
    folder: PathBuf,
    keep: bool,
    hosts: [Namespace; 3],
    switches: Namespace,
    observers: [Namespace; 2],
}

impl Lab {
    /// Builds the rack; removes what earlier runs left when they were killed.
    pub fn build(keep: bool) -> Result<Lab> {
        if !crate::setup::is_root() {
            bail!("the lab makes network namespaces: run it as root");
        }
        stale::clean_up()?;
        let folder = stale::folder_of_run(std::process::id());
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let namespace = |part: &str| Namespace::create(stale::namespace_of_run(std::process::id(), part));
        let lab = Lab {
            folder,
            keep,
            hosts: [namespace("a")?, namespace("b")?, namespace("w")?],
            switches: namespace("net")?,
            observers: [namespace("oa")?, namespace("ob")?],
        };
        lab.wire().context("wire the lab's network")?;
        Ok(lab)
    }

    /// Home of this run's files; removed at the end unless they are to be kept.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn host(&self, host: Host) -> &Namespace {
        &self.hosts[host as usize]
    }

    pub fn observer(&self, side: Side) -> &Namespace {
        &self.observers[side as usize]
    }

    fn wire(&self) -> Result<()> {
        let mut bridges: Vec<_> = Link::ALL.into_iter().map(Link::bridge).collect();
        bridges.dedup();
        for bridge in bridges {
            self.switches.ip(&[
                format!("link add {bridge} type bridge forward_delay 0 stp_state 0"),
                format!("link set {bridge} up"),
            ])?;
        }
        for link in Link::ALL {
            for host in link.ends() {
                let (port, device) = (link.port(host), link.device());
                self.switches.ip(&[
                    format!("link add {port} type veth peer name {device} netns {}", self.host(host).name()),
                    format!("link set {port} master {} up", link.bridge()),
                ])?;
            }
        }
        self.switches.nft(link::SWITCH_RULES)?;
        for side in Side::ALL {
            let host = self.host(side.host());
            host.ip(&[
                "link add br0 type bridge forward_delay 0 stp_state 0".to_owned(),
                "link set br0 up".to_owned(),
                format!("link add obs type veth peer name eth0 netns {}", self.observer(side).name()),
                "link set obs master br0 up".to_owned(),
                format!("link set {} master br0 up", Link::Guest(side).device()),
            ])?;
            self.observer(side)
                .ip(&[format!("addr add {}/24 dev eth0", side.address()), "link set eth0 up".to_owned()])?;
        }
        for host in Host::ALL {
            let mut commands = vec![format!("addr add {}/32 dev lo", host.address())];
            for link in Link::ALL {
                if let Some(other) = link.between_servers(host) {
                    commands.push(format!("link set {} up", link.device()));
                    commands.push(format!(
                        "route add {}/32 dev {} src {}",
                        other.address(),
                        link.device(),
                        host.address()
                    ));
                }
            }
            self.host(host).ip(&commands)?;
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for namespace in self.hosts.iter().chain(&self.observers).chain([&self.switches]) {
            namespace.destroy();
        }
        if self.keep {
            eprintln!("lab: files kept in {}", self.folder.display());
        } else {
            stale::remove_folder(&self.folder);
        }
    }
}

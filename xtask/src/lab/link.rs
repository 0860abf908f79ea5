//! The links and what can be done to them.

use anyhow::Result;

use super::{Host, Lab, Side};

/// A cable through a switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Between the two nodes: replication.
    Peer,
    /// Between a node and the witness.
    Witness(Side),
    /// From a node's guest bridge to the guests' switch.
    Guest(Side),
}

/// Bridge rules of the switches: frames that come in at a port of the set vanish.
pub const SWITCH_RULES: &str = "table bridge lab {
  set swallowed { type ifname; }
  chain forward { type filter hook forward priority 0; iifname @swallowed drop; }
}";

impl Link {
    pub const ALL: [Link; 5] = [
        Link::Peer,
        Link::Witness(Side::A),
        Link::Witness(Side::B),
        Link::Guest(Side::A),
        Link::Guest(Side::B),
    ];

    /// The switch it runs through. The guests' links share one, which joins the nodes' bridges.
    pub(super) fn bridge(self) -> &'static str {
        match self {
            Link::Peer => "peer",
            Link::Witness(Side::A) => "wita",
            Link::Witness(Side::B) => "witb",
            Link::Guest(_) => "guests",
        }
    }

    /// The network device at a server's end.
    pub(super) fn device(self) -> &'static str {
        match self {
            Link::Peer => "peer0",
            Link::Witness(Side::A) => "wita0",
            Link::Witness(Side::B) => "witb0",
            Link::Guest(_) => "uplink",
        }
    }

    /// The switch's port towards a server.
    pub(super) fn port(self, host: Host) -> String {
        format!("{}-{}", self.bridge(), host.letter())
    }

    pub(super) fn ends(self) -> Vec<Host> {
        match self {
            Link::Peer => vec![Host::A, Host::B],
            Link::Witness(side) => vec![side.host(), Host::Witness],
            Link::Guest(side) => vec![side.host()],
        }
    }

    /// Whom `host` reaches over this link, if it is one between servers.
    pub(super) fn between_servers(self, host: Host) -> Option<Host> {
        match self.ends()[..] {
            [one, other] if one == host => Some(other),
            [other, one] if one == host => Some(other),
            _ => None,
        }
    }
}

impl Lab {
    /// Pulls the cable: both ends lose carrier.
    pub fn cut(&self, link: Link) -> Result<()> {
        self.set_ports(link, "down")
    }

    pub fn restore(&self, link: Link) -> Result<()> {
        self.set_ports(link, "up")
    }

    fn set_ports(&self, link: Link, state: &str) -> Result<()> {
        let commands: Vec<_> =
            link.ends().into_iter().map(|host| format!("link set {} {state}", link.port(host))).collect();
        self.switches.ip(&commands)
    }

    /// Frames from `host` into the link vanish, those towards it arrive, and the carrier stays.
    pub fn swallow_from(&self, host: Host, link: Link) -> Result<()> {
        self.switches.nft(&format!("add element bridge lab swallowed {{ \"{}\" }}", link.port(host)))
    }

    /// Ends every [`Lab::swallow_from`].
    pub fn swallow_nothing(&self) -> Result<()> {
        self.switches.nft("flush set bridge lab swallowed")
    }

    /// Limits the link to a rate, in each direction.
    pub fn shape(&self, link: Link, megabits_per_second: u64) -> Result<()> {
        for host in link.ends() {
            self.switches.tc(&format!(
                "qdisc replace dev {} root tbf rate {megabits_per_second}mbit burst 256kb latency 50ms",
                link.port(host)
            ))?;
        }
        Ok(())
    }

    pub fn unshape(&self, link: Link) -> Result<()> {
        for host in link.ends() {
            self.switches.tc(&format!("qdisc del dev {} root", link.port(host)))?;
        }
        Ok(())
    }
}

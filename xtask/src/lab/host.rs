//! The servers, and which of them a guest or an observer can be at.

use std::fmt;

/// A server of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    A,
    B,
    Witness,
}

impl Host {
    pub const ALL: [Host; 3] = [Host::A, Host::B, Host::Witness];

    /// Its address on the links between servers.
    pub fn address(self) -> &'static str {
        ["10.78.0.1", "10.78.0.2", "10.78.0.3"][self as usize]
    }

    /// What users call it.
    pub fn name(self) -> &'static str {
        ["node-a", "node-b", "witness"][self as usize]
    }

    /// Letter used in the names of network devices.
    pub fn letter(self) -> char {
        ['a', 'b', 'w'][self as usize]
    }
}

impl fmt::Display for Host {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

/// A node's side of the guests' network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    A,
    B,
}

impl Side {
    pub const ALL: [Side; 2] = [Side::A, Side::B];

    pub fn host(self) -> Host {
        [Host::A, Host::B][self as usize]
    }

    /// The observer's address on this side.
    pub fn address(self) -> &'static str {
        ["10.77.0.98", "10.77.0.99"][self as usize]
    }

    pub fn other(self) -> Side {
        [Side::B, Side::A][self as usize]
    }
}

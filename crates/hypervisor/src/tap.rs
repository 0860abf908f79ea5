//! TAP devices: a guest's NIC as a port of a bridge of this host.
//!
//! They are not persistent: the guard makes one, hands its descriptor to QEMU and closes its own, so the device is
//! gone with QEMU, however QEMU goes.

use crate::command::run;
use crate::definition::VmUuid;
use crate::error::{Error, ErrorKind, Result};
use serde_json::Value;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};

/// linux/if_tun.h: `_IOW('T', 202, int)`.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

/// A bridge of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    pub name: String,
    /// Its ports must not be smaller, or the kernel shrinks the bridge.
    pub mtu: u64,
}

/// The name of a machine's TAP, at most 15 bytes: from its UUID, so that two nodes in one namespace collide early.
pub fn interface_name(uuid: VmUuid, nic: usize) -> String {
    let folded = (uuid.0 >> 96) as u32 ^ (uuid.0 >> 64) as u32 ^ (uuid.0 >> 32) as u32 ^ uuid.0 as u32;
    format!("rp{folded:08x}-{nic}")
}

/// Looks a bridge up, in the network namespace of this process. Blocks for some milliseconds.
pub fn find_bridge(name: &str) -> Result<Bridge> {
    let missing =
        |detail: &str| Error::new(ErrorKind::MissingOnHost, format!("use the bridge `{name}`"), detail);
    let output =
        run("ip", &["-json", "-details", "link", "show", "dev", name], None).map_err(|error| match error
            .kind()
        {
            ErrorKind::Refused => missing("there is no such device"),
            _ => error,
        })?;
    let links: Value = serde_json::from_slice(&output).map_err(|_| missing("`ip` is not understood"))?;
    let link = &links[0];
    if link["linkinfo"]["info_kind"] != "bridge" {
        return Err(missing("it is a device, but not a bridge"));
    }
    Ok(Bridge { name: name.into(), mtu: link["mtu"].as_u64().unwrap_or(1500) })
}

/// Makes a TAP that is a port of a bridge, and up. It lives as long as the descriptor and its copies.
pub fn open(interface: &str, bridge: &Bridge) -> Result<OwnedFd> {
    let action = || format!("make the TAP device `{interface}`");
    if interface.is_empty() || interface.len() >= libc::IFNAMSIZ {
        return Err(Error::new(ErrorKind::InvalidDefinition, action(), "its name does not fit"));
    }
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|error| Error::io(action(), error))?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *target = byte as libc::c_char;
    }
    // QEMU needs the virtio header for offloads, and takes it only from a TAP that was made with it.
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request takes a pointer to an ifreq, which lives across the call.
    if unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &mut request) } != 0 {
        return Err(Error::io(action(), std::io::Error::last_os_error()));
    }
    // The host is no neighbour of the guest's on this port: no addresses of its own. Fails without IPv6.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "1");
    let mtu = bridge.mtu.to_string();
    run("ip", &["link", "set", "dev", interface, "mtu", &mtu, "master", &bridge.name, "up"], None)?;
    Ok(device.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ_by_machine_and_nic() {
        let name = interface_name(VmUuid(u128::MAX), 7);
        assert!(name.len() < libc::IFNAMSIZ, "{name}");
        assert_ne!(interface_name(VmUuid(1), 0), interface_name(VmUuid(2), 0));
        assert_ne!(interface_name(VmUuid(1), 0), interface_name(VmUuid(1), 1));
    }

    #[test]
    fn a_missing_bridge_and_a_device_that_is_none_are_named() {
        let error = find_bridge("rempart-none").unwrap_err();
        assert_eq!(error.to_string(), "cannot use the bridge `rempart-none`: there is no such device");
        let error = find_bridge("lo").unwrap_err();
        assert_eq!(error.to_string(), "cannot use the bridge `lo`: it is a device, but not a bridge");
    }
}

//! What every TCP socket of ours is told.

use crate::Deadlines;
use rustix::net::sockopt;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

/// An idle connection is probed after that long, and that often.
const KEEPALIVE: Duration = Duration::from_secs(1);
const KEEPALIVE_PROBES: u32 = 3;

pub(crate) fn prepare(socket: impl AsFd, deadlines: Deadlines) -> io::Result<()> {
    let unacknowledged = u32::try_from(deadlines.unacknowledged.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(&socket, KEEPALIVE)?;
    sockopt::set_tcp_keepcnt(&socket, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(&socket, unacknowledged)?;
    Ok(())
}

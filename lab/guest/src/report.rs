//! What the guest says over the network: one line of text a UDP datagram.
//!
//! Reports are broadcast, so that whoever is on the guest's side of a cut hears them. A datagram may be lost: an
//! acknowledgement says that *every* record of this boot up to its number was acknowledged.

use std::fmt;
use std::str::FromStr;

/// Port the observer listens on.
pub const REPORT_PORT: u16 = 7100;
/// Port the guest answers probes on: the probe's own bytes, then a [`Report::Beat`].
pub const ECHO_PORT: u16 = 7101;

/// Something the guest says. Every report carries the nonce drawn at boot and the time since then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub boot_nonce: u64,
    pub uptime_ms: u64,
    pub body: Body,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Both disks were read: the newest record of each, 0 for none.
    Up { newest_on_disk_1: u64, newest_on_disk_2: u64 },
    /// The fsync of this record on disk 2 returned, and hence all before it on both.
    Acknowledged { sequence: u64, took_us: u64 },
    /// Said every 100 ms whatever the disks do.
    Beat { last_acknowledged: u64, longest_stall_us: u64, in_flight_us: u64 },
    /// A disk returned an error to the guest, or its contents contradict themselves.
    Broken { what: String },
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:016x} {} ", self.boot_nonce, self.uptime_ms)?;
        match &self.body {
            Body::Up { newest_on_disk_1, newest_on_disk_2 } => {
                write!(out, "up {newest_on_disk_1} {newest_on_disk_2}")
            }
            Body::Acknowledged { sequence, took_us } => write!(out, "ack {sequence} {took_us}"),
            Body::Beat { last_acknowledged, longest_stall_us, in_flight_us } => {
                write!(out, "beat {last_acknowledged} {longest_stall_us} {in_flight_us}")
            }
            Body::Broken { what } => write!(out, "broken {what}"),
        }
    }
}

/// A datagram that is no report.
#[derive(Debug, PartialEq, Eq)]
pub struct NotAReport;

impl FromStr for Report {
    type Err = NotAReport;

    fn from_str(line: &str) -> Result<Report, NotAReport> {
        let mut words = line.trim_end().splitn(4, ' ');
        let mut next = || words.next().ok_or(NotAReport);
        let boot_nonce = u64::from_str_radix(next()?, 16).map_err(|_| NotAReport)?;
        let uptime_ms = number(next()?)?;
        let (kind, rest) = (next()?, next()?);
        let mut rest_words = rest.split(' ');
        let mut field = || number(rest_words.next().ok_or(NotAReport)?);
        let body = match kind {
            "up" => Body::Up { newest_on_disk_1: field()?, newest_on_disk_2: field()? },
            "ack" => Body::Acknowledged { sequence: field()?, took_us: field()? },
            "beat" => {
                Body::Beat { last_acknowledged: field()?, longest_stall_us: field()?, in_flight_us: field()? }
            }
            "broken" => Body::Broken { what: rest.to_owned() },
            _ => return Err(NotAReport),
        };
        Ok(Report { boot_nonce, uptime_ms, body })
    }
}

fn number(word: &str) -> Result<u64, NotAReport> {
    word.parse().map_err(|_| NotAReport)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_report_reads_back() {
        for body in [
            Body::Up { newest_on_disk_1: 8, newest_on_disk_2: 7 },
            Body::Acknowledged { sequence: 3, took_us: 900 },
            Body::Beat { last_acknowledged: 3, longest_stall_us: 1_500_000, in_flight_us: 0 },
            Body::Broken { what: "disk 2: write record 4: Input/output error".to_owned() },
        ] {
            let report = Report { boot_nonce: 0xF00D, uptime_ms: 12, body };
            assert_eq!(report.to_string().parse(), Ok(report));
        }
    }

    #[test]
    fn garbage_is_refused() {
        for line in ["", "x", "00 1 ack", "00 1 ack 1", "00 1 nod 1 2", "zz 1 ack 1 2"] {
            assert_eq!(line.parse::<Report>(), Err(NotAReport), "{line:?}");
        }
    }
}

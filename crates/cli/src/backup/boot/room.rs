//! How many machines may run at once: as many as there is memory for.

use std::sync::{Condvar, Mutex};

/// Of a machine, what QEMU takes besides its guest's memory.
const BESIDES: u64 = 256 << 20;
/// What QEMU gives a machine that says nothing.
const UNSAID: u64 = 128 << 20;

/// Memory that machines share.
#[derive(Debug)]
pub struct Room {
    bytes: u64,
    taken: Mutex<Taken>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Taken {
    bytes: u64,
    machines: usize,
}

/// What a machine has of it, until this is dropped.
#[derive(Debug)]
pub struct Place<'a> {
    room: &'a Room,
    bytes: u64,
}

impl Room {
    pub fn new(bytes: u64) -> Room {
        Room { bytes, taken: Mutex::default(), freed: Condvar::new() }
    }

    /// What can be had without taking anything from others, as the kernel reckons.
    pub fn available() -> Room {
        let told = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        // Where it is not told, machines run one after the other.
        Room::new(available_bytes(&told).unwrap_or(0))
    }

    /// Waits until there is room for a machine with so much memory, or none runs: one may always. `wait` is called before.
    pub fn take(&self, memory_bytes: u64, wait: impl FnOnce()) -> Place<'_> {
        let bytes = memory_bytes.saturating_add(BESIDES);
        let has_none =
            |taken: &mut Taken| taken.machines > 0 && taken.bytes.saturating_add(bytes) > self.bytes;
        let mut taken = self.taken.lock().expect("no holder panics");
        if has_none(&mut taken) {
            wait();
            taken = self.freed.wait_while(taken, has_none).expect("no holder panics");
        }
        taken.machines += 1;
        taken.bytes = taken.bytes.saturating_add(bytes);
        Place { room: self, bytes }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut taken = self.room.taken.lock().expect("no holder panics");
        taken.machines -= 1;
        taken.bytes -= self.bytes;
        self.room.freed.notify_all();
    }
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What QEMU's own arguments give a machine. `None` if they say it in a way that is not understood here.
pub fn of_arguments(arguments: &[String]) -> Option<u64> {
    let Some(at) = arguments.iter().rposition(|argument| argument == "-m" || argument == "--m") else {
        return Some(UNSAID);
    };
    let size = arguments.get(at + 1)?.split(',').next()?;
    let size = size.strip_prefix("size=").unwrap_or(size);
    // A bare number is in MiB.
    let unit = if size.ends_with(|c: char| c.is_ascii_digit()) { "M" } else { "" };
    crate::parse::byte_count(&format!("{size}{unit}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn two_run_at_once_where_both_fit_and_a_large_one_alone() {
        let room = Room::new(2 * (BESIDES + 100));
        let waits = || panic!("there is room");
        let one = room.take(100, waits);
        let two = room.take(100, waits);
        std::thread::scope(|scope| {
            let (waiting, waits) = mpsc::channel();
            let (runs, running) = mpsc::channel();
            let room = &room;
            scope.spawn(move || {
                let large = room.take(u64::MAX, || waiting.send(()).expect("somebody listens"));
                runs.send(()).expect("somebody listens");
                drop(large);
            });
            waits.recv().expect("it waits");
            drop(one);
            running.recv_timeout(Duration::from_millis(50)).expect_err("another one runs still");
            drop(two);
            running.recv().expect("it runs alone");
        });
        drop(room.take(100, || panic!("nobody is left")));
    }

    #[test]
    fn memory_is_read_as_it_is_told() {
        let told = "MemTotal:       32797112 kB\nMemAvailable:   20000000 kB\n";
        assert_eq!(available_bytes(told), Some(20_000_000 << 10));
        for garbage in ["", "MemAvailable: x kB", "MemAvailable: 99999999999999999999 kB", "MemAvailable: 5"]
        {
            assert_eq!(available_bytes(garbage), None, "{garbage}");
        }
        let of = |text: &str| of_arguments(&text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(of("-machine q35"), Some(128 << 20));
        assert_eq!(of("-m 512 -machine q35"), Some(512 << 20));
        assert_eq!(of("-m 64M -m size=4G,slots=2"), Some(4 << 30));
        for unknown in ["-m", "-m slots=2", "-m much"] {
            assert_eq!(of(unknown), None, "{unknown}");
        }
    }
}

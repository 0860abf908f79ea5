//! The power button: a graceful stop asked for from outside.
//!
//! As on any machine its services stop first: a record under way is completed and reported, and no other is begun. A
//! kernel that goes off takes its disks away, and a write it meets then fails although no disk did.

use std::fs::File;
use std::io::Read;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::voice::Voice;

/// `struct input_event` on x86-64: two 8-byte times, u16 type, u16 code, i32 value.
const EVENT_BYTES: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

pub fn spawn_button_watcher(voice: Arc<Voice>, services: [Arc<Mutex<()>>; 2]) {
    let Ok(devices) = std::fs::read_dir("/dev/input") else {
        println!("lab-guest: no input devices, the power button is not heard");
        return;
    };
    for device in devices.flatten().filter(|device| device.file_name().to_string_lossy().starts_with("event"))
    {
        let Ok(mut events) = File::open(device.path()) else { continue };
        let (voice, services) = (voice.clone(), services.clone());
        thread::spawn(move || {
            let mut event = [0; EVENT_BYTES];
            while events.read_exact(&mut event).is_ok() {
                let (kind, code) =
                    (u16::from_le_bytes([event[16], event[17]]), u16::from_le_bytes([event[18], event[19]]));
                if kind == EV_KEY && code == KEY_POWER && event[20] == 1 {
                    println!("lab-guest: power button after {} ms", voice.uptime_ms());
                    let _stopped = services
                        .each_ref()
                        .map(|writing| writing.lock().unwrap_or_else(PoisonError::into_inner));
                    let _ = Command::new("/bin/busybox").args(["poweroff", "-f"]).status();
                }
            }
        });
    }
}

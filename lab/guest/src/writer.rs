//! The writer: finds where the machine's last life stopped, mends the one record that may be on disk 1 only, goes on.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lab_guest::record::{self, RECORD_BYTES, Record, Slot};
use lab_guest::report::Body;
use lab_guest::ring::slot_of;

use crate::Settings;
use crate::disk::{Aligned, Disk};
use crate::scatter;
use crate::voice::Voice;

/// How many of the newest records are checked at boot, on both disks.
const CHECKED_AT_BOOT: u64 = 256;
/// Pause after a disk error before the same record is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Writes for ever; returns only what makes writing impossible. `writing` is held over each record.
pub fn run(
    settings: &Settings,
    voice: &Arc<Voice>,
    writing: &Mutex<()>,
    scattering: &Arc<Mutex<()>>,
) -> String {
    let ready = prepare(settings, voice).and_then(|writer| {
        let ring = writer.slots * RECORD_BYTES as u64;
        scatter::spawn(&settings.disks[1], ring, voice.clone(), scattering.clone())?;
        Ok(writer)
    });
    match ready {
        Ok(writer) => {
            let pace = Duration::from_secs(1).checked_div(settings.records_per_second);
            writer.write_for_ever(pace.unwrap_or_default(), voice, writing)
        }
        Err(what) => what,
    }
}

struct Writer {
    disks: [Disk; 2],
    slots: u64,
    buffer: Aligned,
    last: u64,
    last_checksum: u32,
}

fn prepare(settings: &Settings, voice: &Voice) -> Result<Writer, String> {
    let open = |path: &String| Disk::open(path).map_err(|error| format!("open {path}: {error}"));
    let disks = [open(&settings.disks[0])?, open(&settings.disks[1])?];
    let slots = disks[0].bytes.min(disks[1].bytes) / RECORD_BYTES as u64;
    if slots < 2 {
        return Err("disks too small for two records".to_owned());
    }
    let mut buffer = Aligned::slot();
    let mut newest = [None; 2];
    for (index, disk) in disks.iter().enumerate() {
        newest[index] =
            disk.newest(slots, &mut buffer).map_err(|error| format!("scan disk {}: {error}", index + 1))?;
    }
    let number = |record: Option<Record>| record.map_or(0, |record| record.sequence);
    let (first, second) = (number(newest[0]), number(newest[1]));
    println!("lab-guest: newest record {first} on disk 1, {second} on disk 2, {slots} slots");
    voice.say(Body::Up { newest_on_disk_1: first, newest_on_disk_2: second });
    if !(second <= first && first <= second + 1) {
        voice.broken(&format!(
            "disk 1 ends at record {first}, disk 2 at {second}: no instant looked like this"
        ));
    }
    let mut writer = Writer {
        disks,
        slots,
        buffer,
        last: first,
        last_checksum: newest[0].map_or(0, |record| record.checksum),
    };
    writer.check_tail(second, voice);
    if first > second {
        writer.copy_to_second_disk(first).map_err(|error| format!("complete record {first}: {error}"))?;
    }
    Ok(writer)
}

impl Writer {
    /// Every record of the tail must be on both disks, the same, and follow the one before.
    fn check_tail(&mut self, newest: u64, voice: &Voice) {
        let oldest = newest.saturating_sub(CHECKED_AT_BOOT.min(self.slots) - 1).max(1);
        let mut previous: Option<Record> = None;
        for sequence in oldest..=newest {
            let mut found = [Slot::Empty; 2];
            for (index, disk) in self.disks.iter().enumerate() {
                match disk.read(slot_of(sequence, self.slots), &mut self.buffer) {
                    Ok(slot) => found[index] = slot,
                    Err(error) => return voice.broken(&format!("disk {}: read: {error}", index + 1)),
                }
            }
            let follows = |record: &Record| previous.is_none_or(|p| p.checksum == record.previous_checksum);
            match found {
                // The slot of the oldest record may already hold the newest one on disk 1.
                [Slot::Valid(one), Slot::Valid(_)] if one.sequence == sequence + self.slots => {}
                [Slot::Valid(one), Slot::Valid(two)]
                    if one == two && one.sequence == sequence && follows(&one) =>
                {
                    previous = Some(one);
                }
                _ => return voice.broken(&format!("record {sequence}: disks hold {found:?}")),
            }
        }
    }

    fn copy_to_second_disk(&mut self, sequence: u64) -> io::Result<()> {
        let slot = slot_of(sequence, self.slots);
        self.disks[0].read(slot, &mut self.buffer)?;
        self.disks[1].write(slot, &self.buffer)
    }

    fn write_for_ever(mut self, pace: Duration, voice: &Voice, writing: &Mutex<()>) -> ! {
        let mut due = Instant::now();
        loop {
            // After a stall it goes on at its pace and does not catch up.
            due = (due + pace).max(Instant::now());
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let _writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
            let sequence = self.last + 1;
            self.last_checksum = record::encode(
                &mut self.buffer,
                sequence,
                voice.boot_nonce(),
                voice.uptime_ms(),
                self.last_checksum,
            );
            voice.writing(true);
            let started = Instant::now();
            for index in 0..2 {
                self.write_until_durable(index, sequence, voice);
            }
            let took_us = started.elapsed().as_micros() as u64;
            voice.acknowledged(sequence, took_us);
            self.last = sequence;
        }
    }

    fn write_until_durable(&self, index: usize, sequence: u64, voice: &Voice) {
        while let Err(error) = self.disks[index].write(slot_of(sequence, self.slots), &self.buffer) {
            voice.broken(&format!("disk {}: write record {sequence}: {error}", index + 1));
            std::thread::sleep(RETRY_AFTER);
        }
    }
}

//! Writes all over the end of disk 2, behind the ring, for the tests of backups: random in place and length, as data, as
//! zeroes or as a trim, without waiting for the ring.
//!
//! Where they go, and by which seed, says the [`Plan`] at the ring's end. Without one nothing is written there.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use lab_guest::plan::{Kind, LONGEST, PLAN_BYTES, Plan};

use crate::disk::{Aligned, Disk};
use crate::voice::Voice;

/// Often enough that each backup finds some, seldom enough that most extents stay as they are.
const PACE: Duration = Duration::from_millis(100);
/// As many writes later, all of them are on the disk.
const FLUSHED_EVERY: u64 = 8;

/// Begins if there is a plan at `from`, where the ring ends. `writing` is held over each write.
pub fn spawn(path: &str, from: u64, voice: Arc<Voice>, writing: Arc<Mutex<()>>) -> Result<(), String> {
    let failed = |error| format!("scatter over disk 2: {error}");
    let mut disk = Disk::open(path).map_err(failed)?;
    if disk.measure().map_err(failed)? < from + PLAN_BYTES as u64 {
        return Ok(());
    }
    let mut sector = Aligned::new(PLAN_BYTES);
    disk.read_at(from, &mut sector).map_err(failed)?;
    let Some(plan) = Plan::decode(&sector) else { return Ok(()) };
    // Another life writes other things elsewhere.
    let plan = Plan { life: plan.life + 1, ..plan };
    plan.encode(&mut sector);
    disk.write_at(from, &sector).and_then(|()| disk.flush()).map_err(failed)?;
    println!("lab-guest: writes are scattered by seed {}, life {}", plan.seed, plan.life);
    thread::spawn(move || {
        if let Err(error) = scatter(&mut disk, from + PLAN_BYTES as u64, plan, &writing) {
            voice.broken(&failed(error));
        }
    });
    Ok(())
}

fn scatter(disk: &mut Disk, from: u64, plan: Plan, writing: &Mutex<()>) -> std::io::Result<()> {
    let mut buffer = Aligned::new(LONGEST);
    let mut random = plan.random();
    for number in 1u64.. {
        thread::sleep(PACE);
        let _writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
        let end = disk.measure()?;
        let (kind, place) = random.next_write(from, end);
        let bytes = (place.end - place.start) as usize;
        match kind {
            Kind::Data => {
                random.fill(&mut buffer[..bytes]);
                disk.write_at(place.start, &buffer[..bytes])?;
            }
            Kind::Zeroes => disk.write_zeroes(place.start, bytes as u64)?,
            Kind::Trim => disk.discard(place.start, bytes as u64)?,
        }
        if number.is_multiple_of(FLUSHED_EVERY) {
            disk.flush()?;
        }
    }
    Ok(())
}

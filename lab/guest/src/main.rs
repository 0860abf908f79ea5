//! The only service of the lab's guest.
//!
//! It writes record n to disk 1, waits for its fsync, writes it to disk 2, waits for its fsync, and only then says
//! over the network that n was acknowledged. After a boot it goes on after the newest record it finds. It answers
//! probes with its boot nonce, so that two running copies of one machine cannot be mistaken for one.
//!
//! Beside that it writes all over the end of disk 2, if whoever made the disk asks for it there.
//! `lab-guest flushes DISK` does nothing but measure a disk instead.

mod disk;
mod flushes;
mod power;
mod scatter;
mod voice;
mod writer;

use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use voice::Voice;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [task, disk] = &arguments[..]
        && task == "flushes"
    {
        let Err(error) = flushes::run(disk);
        println!("lab-guest: BROKEN {disk}: {error}");
        return ExitCode::FAILURE;
    }
    let settings = match Settings::from_arguments() {
        Ok(settings) => settings,
        Err(usage) => {
            eprintln!("lab-guest: {usage}");
            return ExitCode::from(2);
        }
    };
    let voice = Arc::new(match Voice::new(&settings.report_to) {
        Ok(voice) => voice,
        Err(error) => {
            eprintln!("lab-guest: open the network: {error}");
            return ExitCode::FAILURE;
        }
    });
    println!("lab-guest: boot nonce {:016x}", voice.boot_nonce());
    voice::spawn_beat(voice.clone());
    voice::spawn_echo(voice.clone());
    let [writing, scattering] = [(); 2].map(|()| Arc::new(Mutex::new(())));
    power::spawn_button_watcher(voice.clone(), [writing.clone(), scattering.clone()]);
    let error = writer::run(&settings, &voice, &writing, &scattering);
    println!("lab-guest: {error}");
    // Without records there is nothing to observe: say so until somebody looks.
    voice.broken_for_ever(&error)
}

/// What to write to and whom to tell.
#[derive(Debug)]
pub struct Settings {
    disks: [String; 2],
    /// Address and port the reports go to, usually a broadcast address.
    report_to: String,
    /// 0: as fast as the disks allow.
    records_per_second: u32,
}

impl Settings {
    fn from_arguments() -> Result<Settings, &'static str> {
        const USAGE: &str = "usage: lab-guest DISK1 DISK2 REPORT_ADDRESS:PORT RECORDS_PER_SECOND";
        let mut arguments = std::env::args().skip(1);
        let mut next = || arguments.next().ok_or(USAGE);
        Ok(Settings {
            disks: [next()?, next()?],
            report_to: next()?,
            records_per_second: next()?.parse().map_err(|_| USAGE)?,
        })
    }
}

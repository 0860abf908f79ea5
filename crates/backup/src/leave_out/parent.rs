//! The parent: it reads what the child asks for, as long as that is not too much.

use super::protocol::{ANSWER, LONGEST, read_number, read_text, write_number, write_text};
use crate::{BackupError, Source, SourceError};
use rempart_guest_fs::{LeftOut, Survey, Wanted};
use std::io::{self, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Where a source has to be read from and to: whole blocks of some device.
const ALIGNMENT: u64 = 4096;

/// What looking at one disk may take.
#[derive(Debug, Clone, Copy)]
pub struct LookLimits {
    pub time: Duration,
    /// Read from the disk, in all.
    pub bytes: u64,
}

impl Default for LookLimits {
    /// A minute, 1 GiB.
    fn default() -> LookLimits {
        LookLimits { time: Duration::from_secs(60), bytes: 1 << 30 }
    }
}

/// Why a disk could not be looked at.
enum Failure {
    Source(SourceError),
    /// Of the child.
    Child(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Child(error.to_string())
    }
}

/// Has `child`, a process that calls [`answer`](super::answer), look at a disk. Whatever it does, the worst is that nothing is
/// left out, and a remark that says why.
///
/// # Errors
/// If the disk cannot be read.
pub fn look_confined(
    child: &mut Command,
    source: &dyn Source,
    wanted: Wanted,
    limits: LookLimits,
) -> Result<Survey, BackupError> {
    let survey = match spawn(child) {
        Ok(child) => look(child, source, wanted, limits),
        Err(error) => Err(error.into()),
    };
    match survey {
        Ok(survey) => Ok(survey),
        Err(Failure::Source(error)) => Err(error.into()),
        Err(Failure::Child(why)) => Ok(Survey {
            left_out: Vec::new(),
            remarks: vec![format!("the disk could not be looked at ({why}): all of it is backed up")],
        }),
    }
}

fn spawn(command: &mut Command) -> io::Result<Child> {
    command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()
}

fn look(
    mut child: Child,
    source: &dyn Source,
    wanted: Wanted,
    limits: LookLimits,
) -> Result<Survey, Failure> {
    let (mut to, from) =
        (child.stdin.take().expect("it is piped"), child.stdout.take().expect("it is piped"));
    let (over, is_over) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        // Its death ends whatever is read or written here.
        let watch = scope.spawn(move || {
            let timed_out = is_over.recv_timeout(limits.time).is_err();
            let _ = child.kill();
            (child.wait(), timed_out)
        });
        let looked = serve(&mut to, &mut BufReader::new(from), source, wanted, limits.bytes);
        drop(to);
        let _ = over.send(());
        let (_, timed_out) = watch.join().expect("it does not panic");
        match looked {
            Err(Failure::Child(_)) if timed_out => Err(Failure::Child("it took too long".to_owned())),
            looked => looked,
        }
    })
}

fn serve(
    to: &mut impl Write,
    from: &mut impl io::Read,
    source: &dyn Source,
    wanted: Wanted,
    most: u64,
) -> Result<Survey, Failure> {
    let size = source.size();
    write_text(to, &serde_json::to_vec(&wanted).map_err(io::Error::other)?)?;
    write_number(to, size)?;
    to.flush()?;
    let mut reader = source.reader().map_err(Failure::Source)?;
    let (mut buffer, mut read) = (Vec::new(), 0);
    loop {
        let offset = read_number(from)?;
        if offset == ANSWER {
            let answer = read_text(from)?;
            let survey: Survey = serde_json::from_slice(&answer).map_err(io::Error::other)?;
            return if is_sound(&survey.left_out, size) {
                Ok(survey)
            } else {
                Err(Failure::Child("its answer makes no sense".to_owned()))
            };
        }
        let len = read_number(from)?;
        if len > LONGEST || offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Failure::Child("it asks for what is not there".to_owned()));
        }
        let start = offset / ALIGNMENT * ALIGNMENT;
        let end = (offset + len).next_multiple_of(ALIGNMENT).min(size);
        read += end - start;
        if read > most {
            return Err(Failure::Child("it would read too much of the disk".to_owned()));
        }
        buffer.resize((end - start) as usize, 0);
        reader.read(start, &mut buffer).map_err(Failure::Source)?;
        write_number(to, 1)?;
        let at = (offset - start) as usize;
        to.write_all(&buffer[at..at + len as usize])?;
        to.flush()?;
    }
}

/// In the disk, in order, apart: the child read hostile bytes, and is believed no more than they are.
fn is_sound(left_out: &[LeftOut], size: u64) -> bool {
    let mut sorted: Vec<_> = left_out.iter().map(|one| &one.range).collect();
    sorted.sort_unstable_by_key(|range| range.start);
    sorted.iter().all(|range| range.start < range.end && range.end <= size)
        && sorted.windows(2).all(|pair| pair[0].end <= pair[1].start)
}

//! The parent: it reads what the child asks for, as long as that is not too much.

use super::protocol::{ANSWER, LONGEST, Question, places, read_number, read_text, write_number, write_text};
use crate::{BackupError, Source, SourceError};
use rempart_guest_fs::{LeftOut, Remark, Survey, Wanted};
use std::io::{self, BufReader, Write};
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Where a source has to be read from and to: whole blocks of some device.
const ALIGNMENT: u64 = 4096;

/// What looking at a machine's disks may take, for each of them.
#[derive(Debug, Clone, Copy)]
pub struct LookLimits {
    pub time: Duration,
    /// Read, in all.
    pub bytes: u64,
}

impl Default for LookLimits {
    /// A minute, 1 GiB.
    fn default() -> LookLimits {
        LookLimits { time: Duration::from_secs(60), bytes: 1 << 30 }
    }
}

/// What was found on the disks of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Of each disk, in its bytes, in order.
    pub left_out: Vec<Vec<LeftOut>>,
    pub remarks: Vec<Remark>,
}

/// Why the disks could not be looked at.
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

/// Has `child`, a process that calls [`answer`](super::answer), look at the disks of a machine. Whatever it does, the worst is
/// that nothing is left out, and a remark that says why.
///
/// # Errors
/// If a disk cannot be read.
pub fn look_confined(
    child: &mut Command,
    sources: &[&dyn Source],
    wanted: Wanted,
    limits: LookLimits,
) -> Result<Found, BackupError> {
    let sizes: Vec<u64> = sources.iter().map(|source| source.size()).collect();
    let Some(places) = places(&sizes) else { return Ok(nothing(sources, "they are too large")) };
    let survey = match spawn(child) {
        Ok(child) => look(child, sources, &places, wanted, limits),
        Err(error) => Err(error.into()),
    };
    match survey {
        Ok(survey) => {
            let on_disk = |place: &Range<u64>| {
                let here = survey.left_out.iter().filter_map(|LeftOut { range, reason }| {
                    let range = range.start.max(place.start)..range.end.min(place.end);
                    (range.start < range.end).then(|| LeftOut {
                        range: range.start - place.start..range.end - place.start,
                        reason: *reason,
                    })
                });
                here.collect()
            };
            Ok(Found { left_out: places.iter().map(on_disk).collect(), remarks: survey.remarks })
        }
        Err(Failure::Source(error)) => Err(error.into()),
        Err(Failure::Child(why)) => Ok(nothing(sources, &why)),
    }
}

fn nothing(sources: &[&dyn Source], why: &str) -> Found {
    let what = format!("the disks could not be looked at ({why}): all of them is backed up");
    Found { left_out: vec![Vec::new(); sources.len()], remarks: vec![Remark { disk: None, what }] }
}

fn spawn(command: &mut Command) -> io::Result<Child> {
    command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()
}

fn look(
    mut child: Child,
    sources: &[&dyn Source],
    places: &[Range<u64>],
    wanted: Wanted,
    limits: LookLimits,
) -> Result<Survey, Failure> {
    let disks = sources.len() as u32;
    let (time, most) = (limits.time.saturating_mul(disks), limits.bytes.saturating_mul(u64::from(disks)));
    let (mut to, from) =
        (child.stdin.take().expect("it is piped"), child.stdout.take().expect("it is piped"));
    let (over, is_over) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        // Its death ends whatever is read or written here.
        let watch = scope.spawn(move || {
            let timed_out = is_over.recv_timeout(time).is_err();
            let _ = child.kill();
            (child.wait(), timed_out)
        });
        let looked = serve(&mut to, &mut BufReader::new(from), sources, places, wanted, most);
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
    sources: &[&dyn Source],
    places: &[Range<u64>],
    wanted: Wanted,
    most: u64,
) -> Result<Survey, Failure> {
    let size = places.last().map_or(0, |last| last.end);
    let question = Question { wanted, sizes: sources.iter().map(|source| source.size()).collect() };
    write_text(to, &serde_json::to_vec(&question).map_err(io::Error::other)?)?;
    to.flush()?;
    let readers: Result<Vec<_>, _> = sources.iter().map(|source| source.reader()).collect();
    let mut readers = readers.map_err(Failure::Source)?;
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
        // Nothing that lies on two disks is read at once.
        let disk = places.iter().position(|place| {
            place.contains(&offset) && offset.checked_add(len).is_some_and(|end| end <= place.end)
        });
        let Some(disk) = disk.filter(|_| len <= LONGEST) else {
            return Err(Failure::Child("it asks for what is not there".to_owned()));
        };
        let offset = offset - places[disk].start;
        let start = offset / ALIGNMENT * ALIGNMENT;
        let end = (offset + len).next_multiple_of(ALIGNMENT).min(sources[disk].size());
        read += end - start;
        if read > most {
            return Err(Failure::Child("it would read too much of them".to_owned()));
        }
        buffer.resize((end - start) as usize, 0);
        readers[disk].read(start, &mut buffer).map_err(Failure::Source)?;
        write_number(to, 1)?;
        let at = (offset - start) as usize;
        to.write_all(&buffer[at..at + len as usize])?;
        to.flush()?;
    }
}

/// On the disks, apart: the child read hostile bytes, and is believed no more than they are.
/// # Panics
/// If ranges are believed that are not on the disks, or overlap.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(sizes: &[u64], mut said: &[u8]) {
    use crate::ChunkSet;
    use crate::source::Reader;

    #[derive(Debug)]
    struct Zeroes(u64);
    impl Source for Zeroes {
        fn size(&self) -> u64 {
            self.0
        }
        fn reader(&self) -> Result<Box<dyn Reader + '_>, SourceError> {
            Ok(Box::new(Zeroes(self.0)))
        }
        fn data(&self, _: u64) -> Result<ChunkSet, SourceError> {
            unreachable!("nobody asks for it")
        }
    }
    impl Reader for Zeroes {
        fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
            assert!(offset + buffer.len() as u64 <= self.0, "read behind the end");
            buffer.fill(0);
            Ok(())
        }
    }
    let disks: Vec<Zeroes> = sizes.iter().map(|size| Zeroes(*size)).collect();
    let sources: Vec<&dyn Source> = disks.iter().map(|disk| disk as &dyn Source).collect();
    let places = places(sizes).expect("they are small");
    let wanted = Wanted { swap: true, free_space: true, is_quiet: true };
    let size = sizes.iter().sum();
    if let Ok(survey) = serve(&mut io::sink(), &mut said, &sources, &places, wanted, 16 << 20) {
        assert!(survey.left_out.iter().all(|one| one.range.end <= size), "{survey:?}");
    }
}

fn is_sound(left_out: &[LeftOut], size: u64) -> bool {
    let mut sorted: Vec<_> = left_out.iter().map(|one| &one.range).collect();
    sorted.sort_unstable_by_key(|range| range.start);
    sorted.iter().all(|range| range.start < range.end && range.end <= size)
        && sorted.windows(2).all(|pair| pair[0].end <= pair[1].start)
}

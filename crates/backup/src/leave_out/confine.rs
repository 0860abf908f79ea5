//! The child: it gives up everything but reading, writing and memory, and then looks at the disks.

use super::protocol::{ANSWER, Question, fetch, places, read_text, write_number, write_text};
use rempart_guest_fs::{Disk, survey};
use rustix::process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::cell::RefCell;
use std::io::{self, Read, Write};

/// Address space: what a hostile disk may have allocated.
const MEMORY: u64 = 1 << 30;
/// Seconds of processor time.
const PROCESSOR: u64 = 60;

/// What a program that computes still does.
const ALLOWED: [libc::c_long; 15] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mprotect,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Looks at the disks behind standard input and output, confined. For a process that does nothing else.
pub fn answer() -> io::Result<()> {
    confine(Some(PROCESSOR))?;
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    let question: Question = serde_json::from_slice(&read_text(&mut input)?)?;
    let disks = places(&question.sizes).ok_or_else(|| io::Error::other("disks that are too large"))?;
    let len = disks.last().map_or(0, |last| last.end);
    let all = Behind { len, pipes: RefCell::new((&mut input, &mut output)) };
    let found = survey(&all, &disks, question.wanted)?;
    let answer = serde_json::to_vec(&found)?;
    write_number(&mut output, ANSWER)?;
    write_text(&mut output, &answer)?;
    output.flush()
}

/// Gives up everything but reading, writing and memory; and processor time past so many seconds.
pub(crate) fn confine(processor: Option<u64>) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let limits = [(Resource::As, Some(MEMORY)), (Resource::Cpu, processor), (Resource::Nofile, Some(3))];
    for (resource, limit) in limits.into_iter().filter(|(_, limit)| limit.is_some()) {
        setrlimit(resource, Rlimit { current: limit, maximum: limit })?;
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let rules = ALLOWED.into_iter().map(|call| (call, Vec::new())).collect();
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch);
    let program: BpfProgram = filter.and_then(BpfProgram::try_from).map_err(io::Error::other)?;
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

/// Disks that the parent reads, as one.
struct Behind<'a, R, W> {
    len: u64,
    pipes: RefCell<(&'a mut R, &'a mut W)>,
}

impl<R: Read, W: Write> Disk for Behind<'_, R, W> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (input, output) = &mut *self.pipes.borrow_mut();
        fetch(*input, *output, offset, buffer)
    }
}

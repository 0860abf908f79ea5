//! The child: it reads one file system, confined.

use super::ROOT;
use super::protocol::{Answer, Reply, Request};
use crate::leave_out::confine;
use crate::leave_out::protocol::{self, ANSWER, read_number, read_text, write_number, write_text};
use rempart_guest_fs::files::{FileSystem, FileSystemKind, open};
use rempart_guest_fs::{Disk, Fault, Section, volumes};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};

/// Bytes that are asked for at once, where fewer are wanted, and kept.
const PAGE: u64 = 32 << 10;
const PAGES: usize = 256;

/// Answers questions about the file system behind standard input and output, confined. For a process that does nothing else.
pub fn read_files() -> io::Result<()> {
    confine(None)?;
    let mut input = io::stdin().lock();
    let len = read_number(&mut input)?;
    let disk = Behind { len, pipes: RefCell::new((input, io::stdout().lock())), pages: RefCell::default() };
    let mut opened: Option<Opened<'_>> = None;
    loop {
        let request = {
            let (input, _) = &mut *disk.pipes.borrow_mut();
            match read_text(input) {
                Ok(request) => request,
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error),
            }
        };
        let request = postcard::from_bytes(&request).map_err(io::Error::other)?;
        let reply: Reply = answer(&disk, &mut opened, request).map_err(|fault| match fault {
            Fault::Read(error) => error.to_string(),
            fault => fault.to_string(),
        });
        let reply = postcard::to_allocvec(&reply).map_err(io::Error::other)?;
        let (_, output) = &mut *disk.pipes.borrow_mut();
        write_number(output, ANSWER)?;
        write_text(output, &reply)?;
        output.flush()?;
    }
}

struct Opened<'a> {
    fs: Box<dyn FileSystem + 'a>,
    /// The folder that a name was last looked for in, and what is in it.
    listed: Option<(u64, HashMap<Vec<u8>, u64>)>,
}

fn answer<'a>(
    disk: &'a dyn Disk,
    opened: &mut Option<Opened<'a>>,
    request: Request,
) -> Result<Answer, Fault> {
    match request {
        Request::Volumes(disks, number) => return Ok(Answer::Volumes(volumes(disk, &disks, number)?)),
        Request::Open(kind) => {
            *opened = Some(Opened { fs: open_on(disk, kind)?, listed: None });
            return Ok(Answer::Opened);
        }
        _ => {}
    }
    let Opened { fs, listed } = opened.as_mut().ok_or(Fault::Unsupported("nothing is open"))?;
    let root = fs.root();
    let own = |file| if file == ROOT { root } else { file };
    Ok(match request {
        Request::Attributes(file) => Answer::Attributes(fs.attributes(own(file))?),
        Request::Find(folder, name) => {
            if listed.as_ref().is_none_or(|(last, _)| *last != folder) {
                let names = fs.list(own(folder))?;
                *listed = Some((folder, names.into_iter().map(|name| (name.name, name.file)).collect()));
            }
            let found = listed.as_ref().and_then(|(_, names)| names.get(&name).copied());
            Answer::Found(
                found.map(|file| fs.attributes(file).map(|attributes| (file, attributes))).transpose()?,
            )
        }
        Request::List(folder) => Answer::Names(fs.list(own(folder))?),
        Request::Content(file) => Answer::Content(fs.content(own(file))?),
        Request::Target(link) => Answer::Target(fs.target(own(link))?),
        Request::Extended(file) => Answer::Extended(fs.extended(own(file))?),
        Request::Volumes(..) | Request::Open(_) => unreachable!("handled above"),
    })
}

fn open_on<'a>(disk: &'a dyn Disk, kind: FileSystemKind) -> Result<Box<dyn FileSystem + 'a>, Fault> {
    open(Section::whole(disk), kind)
}

/// A volume that the parent reads.
struct Behind<R, W> {
    len: u64,
    pipes: RefCell<(R, W)>,
    /// Each page has one place.
    pages: RefCell<HashMap<usize, (u64, Vec<u8>)>>,
}

impl<R: Read, W: Write> Behind<R, W> {
    fn fetch(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (input, output) = &mut *self.pipes.borrow_mut();
        protocol::fetch(input, output, offset, buffer)
    }
}

impl<R: Read, W: Write> Disk for Behind<R, W> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if buffer.len() as u64 > PAGE {
            return self.fetch(offset, buffer);
        }
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let (page, within) = (at / PAGE, (at % PAGE) as usize);
            let place = page as usize % PAGES;
            let mut pages = self.pages.borrow_mut();
            let kept = pages.entry(place).or_insert((u64::MAX, Vec::new()));
            if kept.0 != page {
                kept.0 = u64::MAX;
                kept.1.resize(PAGE.min(self.len - page * PAGE) as usize, 0);
                self.fetch(page * PAGE, &mut kept.1)?;
                kept.0 = page;
            }
            let (here, behind) = rest.split_at_mut(rest.len().min(kept.1.len() - within));
            here.copy_from_slice(&kept.1[within..within + here.len()]);
            at += here.len() as u64;
            rest = behind;
        }
        Ok(())
    }
}

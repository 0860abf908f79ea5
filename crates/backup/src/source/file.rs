//! An image file or a block device, read as it is.

use super::{Reader, Source, SourceError};
use crate::ChunkSet;
use rustix::fs::{Advice, FileType, SeekFrom, fadvise, fstat, seek};
use rustix::io::Errno;
use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const PIECE: u64 = 512 << 10;

/// A raw image or a block device. Nobody may write to it meanwhile: who opens it sees to that.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    path: PathBuf,
    size: u64,
    has_holes: bool,
}

impl FileSource {
    pub fn open(path: &Path) -> Result<FileSource, SourceError> {
        let file = File::open(path).map_err(|why| error("open", path, None, why))?;
        FileSource::of(file, path)
    }

    /// One that is open already, and is told as `path`.
    pub fn of(file: File, path: &Path) -> Result<FileSource, SourceError> {
        let fail = |why: std::io::Error| error("open", path, None, why);
        let kind = FileType::from_raw_mode(fstat(&file).map_err(|errno| fail(errno.into()))?.st_mode);
        let size = match kind {
            FileType::RegularFile => file.metadata().map_err(fail)?.len(),
            FileType::BlockDevice => seek(&file, SeekFrom::End(0)).map_err(|errno| fail(errno.into()))?,
            _ => return Err(error("open", path, None, "it is neither a file nor a block device")),
        };
        if kind == FileType::BlockDevice {
            // A file system writes past the cache of its device, in which older bytes may be left.
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
        }
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        Ok(FileSource { file, path: path.to_owned(), size, has_holes: kind == FileType::RegularFile })
    }
}

fn error(
    action: &'static str,
    path: &Path,
    offset: Option<u64>,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> SourceError {
    SourceError { action, disk: path.display().to_string(), offset, source: source.into() }
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn reader(&self) -> Result<Box<dyn Reader + '_>, SourceError> {
        Ok(Box::new(self))
    }

    fn data(&self, chunk_len: u64) -> Result<ChunkSet, SourceError> {
        if !self.has_holes {
            return Ok(ChunkSet::all(self.size, chunk_len));
        }
        let mut set = ChunkSet::none(self.size, chunk_len);
        let mut at = 0;
        while at < self.size {
            let start = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(Errno::NXIO) => break,
                // A file system that does not tell.
                Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(ChunkSet::all(self.size, chunk_len)),
                Err(errno) => {
                    return Err(error(
                        "look for holes in",
                        &self.path,
                        Some(at),
                        std::io::Error::from(errno),
                    ));
                }
            };
            let end = seek(&self.file, SeekFrom::Hole(start)).map_err(|errno| {
                error("look for holes in", &self.path, Some(start), std::io::Error::from(errno))
            })?;
            set.insert_bytes(start..end);
            at = end;
        }
        Ok(set)
    }
}

impl Reader for &FileSource {
    /// So little that it is still in the processor's cache when it is looked at.
    fn piece(&self) -> u64 {
        PIECE
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let read = self.file.read_exact_at(buffer, offset);
        read.map_err(|why| error("read", &self.path, Some(offset), why))?;
        // The host's page cache belongs to its machines.
        let _ = fadvise(&self.file, offset, NonZeroU64::new(buffer.len() as u64), Advice::DontNeed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 64 * 1024;

    #[test]
    fn holes_are_not_data_and_read_as_zeroes() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk");
        let file = File::create(&path).expect("creates");
        file.set_len(100 * CHUNK + 5).expect("grows");
        file.write_all_at(&[7; 10], 3 * CHUNK).expect("writes");
        file.write_all_at(&[8; 5], 100 * CHUNK).expect("writes");
        let source = FileSource::open(&path).expect("opens");
        let data = source.data(CHUNK).expect("tells");
        assert!(data.contains(3) && data.contains(100), "{data:?}");
        assert!(data.count() < 100, "this file system tells of holes");
        let mut read = vec![1; (CHUNK + 5) as usize];
        source.reader().expect("a reader").read(99 * CHUNK, &mut read).expect("reads");
        assert_eq!(read, [vec![0; CHUNK as usize], vec![8; 5]].concat());
    }

    #[test]
    fn a_file_cut_short_while_it_is_read_is_an_error() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk");
        std::fs::write(&path, [1; 1000]).expect("writes");
        let source = FileSource::open(&path).expect("opens");
        File::options().write(true).open(&path).expect("opens").set_len(500).expect("cuts");
        let error = source.reader().expect("a reader").read(400, &mut [0; 200]).expect_err("it ends before");
        assert_eq!(error.to_string(), format!("read `{}` at byte 400", path.display()));
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        for path in ["/dev/null", "/", "/nowhere"] {
            FileSource::open(Path::new(path)).expect_err(path);
        }
    }
}

//! Bytes of a volume, and of a file in it.

use crate::{DiskReader, ReadError};
use rempart_guest_fs::Map;
use rempart_guest_fs::files::Content;
use std::fmt;
use std::sync::Arc;

/// The disks of a point, one behind the other, and where a volume lies on them.
#[derive(Clone)]
pub(super) struct Blocks {
    disks: Arc<Vec<Arc<DiskReader>>>,
    map: Map,
}

impl Blocks {
    /// `None` if the map is not all on the disks.
    pub fn new(disks: &Arc<Vec<Arc<DiskReader>>>, map: Map) -> Option<Blocks> {
        let size = disks.iter().try_fold(0u64, |sum, disk| sum.checked_add(disk.size()))?;
        map.is_sound(size).then(|| Blocks { disks: disks.clone(), map })
    }

    pub fn map(&self) -> &Map {
        &self.map
    }

    pub fn len(&self) -> u64 {
        self.map.len()
    }

    /// What lies there; the range is in the volume.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let mut rest = buffer;
        for (mut at, mut len) in self.map.pieces(offset, rest.len()) {
            for disk in self.disks.iter() {
                if at >= disk.size() {
                    at -= disk.size();
                    continue;
                }
                let here = len.min(usize::try_from(disk.size() - at).unwrap_or(usize::MAX));
                let (now, behind) = rest.split_at_mut(here);
                disk.read_into(at, now)?;
                rest = behind;
                len -= here;
                if len == 0 {
                    break;
                }
                at = 0;
            }
        }
        Ok(())
    }
}

/// What a file holds, where it lies.
pub struct FileContent {
    content: Content,
    blocks: Option<Blocks>,
}

impl FileContent {
    /// Of a volume.
    pub(super) fn new(content: Content, blocks: Blocks) -> FileContent {
        FileContent { content, blocks: Some(blocks) }
    }

    /// These bytes.
    pub fn of(bytes: Vec<u8>) -> FileContent {
        FileContent { content: Content::inline(bytes), blocks: None }
    }

    pub fn size(&self) -> u64 {
        self.content.size
    }

    /// Fills the buffer from `offset` on; what is behind the file's end is left as it is. How many bytes are in the file.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, ReadError> {
        let len = self.size().saturating_sub(offset).min(buffer.len() as u64) as usize;
        let buffer = &mut buffer[..len];
        buffer.fill(0);
        if let Some(inline) = self.content.inline.get(offset.min(self.content.inline.len() as u64) as usize..)
        {
            let here = inline.len().min(len);
            buffer[..here].copy_from_slice(&inline[..here]);
        }
        let end = offset + len as u64;
        let extents = &self.content.extents;
        let first = extents.partition_point(|extent| extent.end() <= offset);
        for extent in extents[first..].iter().take_while(|extent| extent.at < end) {
            let (from, to) = (extent.at.max(offset), extent.end().min(end));
            let place = extent.bytes.start + (from - extent.at);
            let blocks = self.blocks.as_ref().expect("what lies somewhere is in a volume");
            blocks.read(place, &mut buffer[(from - offset) as usize..(to - offset) as usize])?;
        }
        Ok(len)
    }

    /// The first byte at or behind `offset` that is data, or that is not: the file's size if there is none.
    pub fn seek(&self, offset: u64, to_data: bool) -> u64 {
        let mut at = offset.min(self.size());
        if at < self.content.inline.len() as u64 {
            return if to_data { at } else { self.size() };
        }
        let extents = &self.content.extents;
        for extent in &extents[extents.partition_point(|extent| extent.end() <= at)..] {
            if to_data {
                return at.max(extent.at);
            }
            if extent.at > at {
                return at;
            }
            at = extent.end();
        }
        if to_data { self.size() } else { at }
    }
}

impl fmt::Debug for FileContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileContent").field("size", &self.size()).finish_non_exhaustive()
    }
}

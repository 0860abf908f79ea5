//! What is known about a disk's changes since an earlier view, and by what it is known.

use super::graph::Disk;
use super::names::Tracker;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The start of a period whose changes QEMU records: what a caller stores with what it read from the view, and brings
/// along for the next one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackingToken {
    /// The bitmap's name. It ends in the period's generation, drawn at random for each disk and view: no two periods
    /// of any disks share one.
    pub bitmap: String,
    pub size_bytes: u64,
}

/// Which parts of a disk a reader of the view must read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changes {
    /// Those that this metadata context of the export calls dirty (bit 0), and no others, changed since the view that
    /// gave the token.
    Since { token: TrackingToken, context: String },
    /// All of it.
    Unknown(WhyUnknown),
}

/// Why a disk must be read in full.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhyUnknown {
    /// The caller knows no earlier view of this disk.
    FirstView,
    /// The token is of another tracker, or none at all.
    ForeignToken {
        bitmap: String,
    },
    SizeChanged {
        was_bytes: u64,
        is_bytes: u64,
    },
    /// The bitmap is not there. `kept_in_image`: QEMU stores it in the image when it ends in order.
    BitmapGone {
        bitmap: String,
        kept_in_image: bool,
    },
    /// QEMU was killed, or its host, while it recorded.
    BitmapInconsistent {
        bitmap: String,
    },
    /// Somebody stopped it, so that it missed writes.
    BitmapStopped {
        bitmap: String,
    },
    /// Another program uses a bitmap of this name.
    BitmapInUse {
        bitmap: String,
    },
}

impl fmt::Display for WhyUnknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FirstView => write!(f, "no earlier backup of this disk is known"),
            Self::ForeignToken { bitmap } => write!(f, "`{bitmap}` is not a bitmap of this job"),
            Self::SizeChanged { was_bytes, is_bytes } => {
                write!(f, "the disk's size changed from {was_bytes} to {is_bytes} bytes")
            }
            Self::BitmapGone { bitmap, kept_in_image: false } => write!(
                f,
                "QEMU has no bitmap `{bitmap}`: it was restarted, and this kind of image does not keep bitmaps"
            ),
            Self::BitmapGone { bitmap, kept_in_image: true } => write!(
                f,
                "QEMU has no bitmap `{bitmap}`: it was killed before it stored it, or the image is another one"
            ),
            Self::BitmapInconsistent { bitmap } => {
                write!(f, "bitmap `{bitmap}` missed writes: QEMU or its host did not end in order")
            }
            Self::BitmapStopped { bitmap } => {
                write!(f, "bitmap `{bitmap}` missed writes: another program stopped it")
            }
            Self::BitmapInUse { bitmap } => write!(f, "bitmap `{bitmap}` is in use by another program"),
        }
    }
}

/// Whether the period that `token` began can be relied on. Any doubt is a reason not to.
pub(super) fn judge(tracker: &Tracker, disk: &Disk, token: Option<&TrackingToken>) -> Result<(), WhyUnknown> {
    let token = token.ok_or(WhyUnknown::FirstView)?;
    let bitmap = token.bitmap.clone();
    if !tracker.owns(&bitmap) {
        return Err(WhyUnknown::ForeignToken { bitmap });
    }
    if token.size_bytes != disk.size_bytes {
        let (was_bytes, is_bytes) = (token.size_bytes, disk.size_bytes);
        return Err(WhyUnknown::SizeChanged { was_bytes, is_bytes });
    }
    let Some(found) = disk.bitmaps.iter().find(|found| found.name == bitmap) else {
        return Err(WhyUnknown::BitmapGone { bitmap, kept_in_image: disk.keeps_bitmaps });
    };
    if found.inconsistent {
        return Err(WhyUnknown::BitmapInconsistent { bitmap });
    }
    if found.busy {
        return Err(WhyUnknown::BitmapInUse { bitmap });
    }
    if !found.recording {
        return Err(WhyUnknown::BitmapStopped { bitmap });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::block::DirtyBitmap;

    fn disk(bitmap: DirtyBitmap) -> Disk {
        Disk {
            id: "disk0".into(),
            path: String::new(),
            root: "d0".into(),
            data: "d0".into(),
            driver: "qcow2".into(),
            size_bytes: 4096,
            file: None,
            keeps_bitmaps: true,
            bitmaps: vec![bitmap],
            snapshots: 0,
        }
    }

    #[test]
    fn any_doubt_means_that_changes_are_unknown() {
        let tracker = Tracker::new("nightly").unwrap();
        let name = tracker.bitmap(1);
        let token = TrackingToken { bitmap: name.clone(), size_bytes: 4096 };
        let good = DirtyBitmap {
            name: name.clone(),
            recording: true,
            busy: false,
            persistent: true,
            inconsistent: false,
            granularity: 65536,
        };
        let judged = |bitmap: &DirtyBitmap, token: Option<&TrackingToken>| {
            judge(&tracker, &disk(bitmap.clone()), token).err()
        };
        assert_eq!(judged(&good, Some(&token)), None);
        assert_eq!(judged(&good, None), Some(WhyUnknown::FirstView));
        let bitmap = || name.clone();
        assert_eq!(
            judged(&DirtyBitmap { inconsistent: true, ..good.clone() }, Some(&token)),
            Some(WhyUnknown::BitmapInconsistent { bitmap: bitmap() })
        );
        assert_eq!(
            judged(&DirtyBitmap { recording: false, ..good.clone() }, Some(&token)),
            Some(WhyUnknown::BitmapStopped { bitmap: bitmap() })
        );
        assert_eq!(
            judged(&DirtyBitmap { busy: true, ..good.clone() }, Some(&token)),
            Some(WhyUnknown::BitmapInUse { bitmap: bitmap() })
        );
        assert_eq!(
            judged(&DirtyBitmap { name: tracker.bitmap(2), ..good.clone() }, Some(&token)),
            Some(WhyUnknown::BitmapGone { bitmap: bitmap(), kept_in_image: true })
        );
        assert_eq!(
            judged(&good, Some(&TrackingToken { size_bytes: 8192, ..token.clone() })),
            Some(WhyUnknown::SizeChanged { was_bytes: 8192, is_bytes: 4096 })
        );
        let foreign = Tracker::new("weekly").unwrap().bitmap(1);
        assert_eq!(
            judged(&good, Some(&TrackingToken { bitmap: foreign.clone(), ..token })),
            Some(WhyUnknown::ForeignToken { bitmap: foreign })
        );
    }
}

//! Names of everything that a view makes in QEMU. Whoever finds such a name knows whose it is and whether it is a
//! leftover; what has another name is somebody else's, and is left alone.
//!
//! | name | what |
//! |---|---|
//! | `rempart-VIEW-ROLE-DISK` | a block node; VIEW is 8 hex digits |
//! | `rempart-VIEW-DISK` | an export |
//! | `rempart-VIEW-create-DISK` | the job that makes a scratch image |
//! | `rempart-view.VIEW` | a bitmap: what changed in the last period, as readers of the view get it |
//! | `rempart-job.TRACKER.GENERATION` | a bitmap that records one period of one tracker; GENERATION is 16 hex digits |

use std::fmt;

/// The number of a view, drawn anew for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ViewId(pub u32);

impl fmt::Display for ViewId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// What a block node of a view is for.
///
/// ```text
/// device ── top ── copy ── base ── (what was there before)
///                   │ └── access ── NBD export
///                   └ scratch ── store ── file
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// Passes everything on. Where the device meets the view: its child can be exchanged at one instant with those of
    /// the other disks.
    Top,
    /// Copies old bytes to the scratch image before the guest overwrites them.
    Copy,
    /// Passes everything on. Its child can be exchanged when a view below this one goes away.
    Base,
    /// The image that old bytes are copied to.
    Scratch,
    /// The bounded room that the scratch image has.
    Store,
    /// The disk as it was when the view was taken.
    Access,
}

impl Role {
    /// In the order in which they can be deleted: nobody before its users.
    pub(super) const ALL: [Self; 6] =
        [Self::Access, Self::Top, Self::Copy, Self::Base, Self::Scratch, Self::Store];

    fn name(self) -> &'static str {
        match self {
            Self::Top => "top",
            Self::Copy => "copy",
            Self::Base => "base",
            Self::Scratch => "scratch",
            Self::Store => "store",
            Self::Access => "access",
        }
    }
}

pub(super) fn node(view: ViewId, role: Role, disk: usize) -> String {
    format!("rempart-{view}-{}-{disk}", role.name())
}

/// The view, role and disk of a node of ours.
pub(super) fn parse_node(name: &str) -> Option<(ViewId, Role, usize)> {
    let mut parts = name.strip_prefix("rempart-")?.split('-');
    let view = parse_view(parts.next()?)?;
    let role = parts.next()?;
    let role = Role::ALL.into_iter().find(|known| known.name() == role)?;
    let disk = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some((view, role, disk))
}

pub(super) fn export(view: ViewId, disk: usize) -> String {
    format!("rempart-{view}-{disk}")
}

pub(super) fn parse_export(id: &str) -> Option<ViewId> {
    let (view, disk) = id.strip_prefix("rempart-")?.split_once('-')?;
    disk.parse::<usize>().ok()?;
    parse_view(view)
}

pub(super) fn create_job(view: ViewId, disk: usize) -> String {
    format!("rempart-{view}-create-{disk}")
}

pub(super) fn parse_create_job(id: &str) -> Option<ViewId> {
    let (view, disk) = id.strip_prefix("rempart-")?.split_once("-create-")?;
    disk.parse::<usize>().ok()?;
    parse_view(view)
}

pub(super) fn view_bitmap(view: ViewId) -> String {
    format!("rempart-view.{view}")
}

pub(super) fn parse_view_bitmap(name: &str) -> Option<ViewId> {
    parse_view(name.strip_prefix("rempart-view.")?)
}

fn parse_view(text: &str) -> Option<ViewId> {
    let number = u32::from_str_radix(text, 16).ok().map(ViewId)?;
    (number.to_string() == text).then_some(number)
}

/// Whose changes are tracked: one for each job that backs the VM up, so that jobs do not take each other's periods.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tracker(String);

impl Tracker {
    /// 1 to 64 lower-case letters, digits and hyphens; None for anything else.
    pub fn new(name: &str) -> Option<Self> {
        let fine = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
        ((1..=64).contains(&name.len()) && name.bytes().all(fine)).then(|| Self(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn bitmap(&self, generation: u64) -> String {
        format!("rempart-job.{}.{generation:016x}", self.0)
    }

    /// Whether this is a bitmap of this tracker.
    pub(super) fn owns(&self, bitmap: &str) -> bool {
        let generation = bitmap
            .strip_prefix("rempart-job.")
            .and_then(|rest| rest.strip_prefix(&self.0))
            .and_then(|rest| rest.strip_prefix('.'));
        generation.is_some_and(|hex| {
            hex.len() == 16 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nodes_exports_jobs_and_bitmaps_are_told_from_each_other_and_from_those_of_others() {
        let view = ViewId(0x0a1b_2c3d);
        assert_eq!(node(view, Role::Scratch, 7), "rempart-0a1b2c3d-scratch-7");
        for role in Role::ALL {
            let name = node(view, role, 12);
            assert!(name.len() < 32, "QEMU takes no longer names");
            assert_eq!(parse_node(&name), Some((view, role, 12)));
            assert_eq!(parse_export(&name), None);
        }
        assert_eq!(parse_export(&export(view, 3)), Some(view));
        assert_eq!(parse_node(&export(view, 3)), None);
        assert_eq!(parse_create_job(&create_job(view, 3)), Some(view));
        assert_eq!(parse_export(&create_job(view, 3)), None);
        assert_eq!(parse_view_bitmap(&view_bitmap(view)), Some(view));
        for other in ["rempart-", "rempart-0A1B2C3D-top-1", "rempart-1-top-1", "libvirt-1-format", "#block1"]
        {
            assert_eq!(parse_node(other), None, "{other}");
        }
    }

    #[test]
    fn a_tracker_knows_its_own_bitmaps() {
        let nightly = Tracker::new("nightly").unwrap();
        let bitmap = nightly.bitmap(5);
        assert_eq!(bitmap, "rempart-job.nightly.0000000000000005");
        assert!(nightly.owns(&bitmap));
        assert!(!Tracker::new("night").unwrap().owns(&bitmap));
        for other in ["rempart-job.nightly.5", "nightly", "rempart-job.nightly.000000000000000g", "bitmap0"] {
            assert!(!nightly.owns(other), "{other}");
        }
        for invalid in ["", "A", "a.b", &"a".repeat(65)] {
            assert_eq!(Tracker::new(invalid), None);
        }
    }

    proptest! {
        #[test]
        fn no_name_panics(name: String) {
            let _ = (parse_node(&name), parse_export(&name), parse_create_job(&name), parse_view_bitmap(&name));
        }
    }
}

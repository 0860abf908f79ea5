//! Names of packs and index segments in a repository.

use crate::{PackId, SegmentId, SessionId};
use rempart_objects::Name;

/// Names of packs start with it.
pub const PACKS: &str = "packs/";
/// Names of index segments start with it.
pub const SEGMENTS: &str = "segments/";

/// Names of the log's entries start with it.
pub const LOG: &str = "log/";
/// Names of pointers to checkpoints of the log start with it.
pub const CHECKPOINTS: &str = "checkpoints/";
/// Names of second copies start with it, and end with the name of the object.
pub const COPIES: &str = "copies/";

/// A pack: who wrote it, and the hash of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackName {
    pub session: SessionId,
    pub pack: PackId,
}

impl PackName {
    pub fn object(&self) -> Name {
        Name::new(format!("{PACKS}{}/{}", self.session, self.pack)).expect("hexadecimal digits make a name")
    }

    /// `None` if it is no pack's name.
    pub fn parse(name: &Name) -> Option<PackName> {
        let (session, pack) = name.as_str().strip_prefix(PACKS)?.split_once('/')?;
        Some(PackName { session: session.parse().ok()?, pack: pack.parse().ok()? })
    }
}

/// An index segment: who wrote it, and the hash of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    pub session: SessionId,
    pub segment: SegmentId,
}

impl SegmentName {
    pub fn object(&self) -> Name {
        Name::new(format!("{SEGMENTS}{}/{}", self.session, self.segment))
            .expect("hexadecimal digits make a name")
    }

    /// `None` if it is no segment's name.
    pub fn parse(name: &Name) -> Option<SegmentName> {
        let (session, segment) = name.as_str().strip_prefix(SEGMENTS)?.split_once('/')?;
        Some(SegmentName { session: session.parse().ok()?, segment: segment.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        let pack = PackName { session: SessionId([0xab; 16]), pack: PackId([0xcd; 32]) };
        assert_eq!(PackName::parse(&pack.object()), Some(pack));
        let segment = SegmentName { session: SessionId([0xab; 16]), segment: SegmentId([0xcd; 32]) };
        assert_eq!(SegmentName::parse(&segment.object()), Some(segment));
        assert_eq!(PackName::parse(&segment.object()), None);
        assert_eq!(SegmentName::parse(&pack.object()), None);
        for other in ["packs/ab/cd", "packs", "packs/x", "repository"] {
            assert_eq!(PackName::parse(&Name::new(other).expect("a name")), None);
        }
        let longer = Name::new(format!("{}/aa", pack.object())).expect("a name");
        assert_eq!(PackName::parse(&longer), None);
    }
}

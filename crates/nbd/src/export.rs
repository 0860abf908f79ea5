//! What a server offers: named exports and the sizes it asks its clients to keep to.

use crate::protocol::{MAX_STRING, transmission_flag as flag};
use rempart_types::SECTOR_SIZE;
use std::collections::BTreeSet;

/// The sizes, in bytes, that an export asks its clients to keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockSizes {
    /// Every offset and length is a multiple of it; others are refused as invalid.
    pub minimum: u32,
    /// Requests aligned to it are served efficiently.
    pub preferred: u32,
    /// The longest read or write in one request.
    pub maximum_payload: u32,
}

impl Default for BlockSizes {
    fn default() -> BlockSizes {
        BlockSizes { minimum: SECTOR_SIZE as u32, preferred: 4096, maximum_payload: 32 << 20 }
    }
}

/// One disk a server offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// In bytes, a multiple of the minimum block size.
    pub size: u64,
    pub read_only: bool,
    pub block_sizes: BlockSizes,
    /// Metadata contexts by full name, such as [`BASE_ALLOCATION`](crate::BASE_ALLOCATION). A
    /// [`ContextIndex`](crate::ContextIndex) is a place in this list.
    pub contexts: Vec<String>,
    /// Promises that a flush on one connection covers what was acknowledged on every other.
    pub multi_connection: bool,
    pub trim: bool,
    /// Accepts "zero this, but only if that is faster than writing zeroes".
    pub fast_zero: bool,
    pub cache: bool,
    pub rotational: bool,
}

impl Export {
    /// A writable export that can do everything but cache, with default block sizes and no contexts.
    pub fn new(name: impl Into<String>, size: u64) -> Export {
        Export {
            name: name.into(),
            description: String::new(),
            size,
            read_only: false,
            block_sizes: BlockSizes::default(),
            contexts: Vec::new(),
            multi_connection: true,
            trim: true,
            fast_zero: true,
            cache: false,
            rotational: false,
        }
    }

    pub(crate) fn transmission_flags(&self, structured: bool, status_payload: bool) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA;
        let mut set = |condition: bool, bit: u16| {
            if condition {
                flags |= bit;
            }
        };
        set(self.read_only, flag::READ_ONLY);
        set(self.rotational, flag::ROTATIONAL);
        set(self.trim && !self.read_only, flag::SEND_TRIM);
        set(!self.read_only, flag::SEND_WRITE_ZEROES);
        set(self.fast_zero && !self.read_only, flag::SEND_FAST_ZERO);
        set(structured, flag::SEND_DF);
        set(self.multi_connection, flag::CAN_MULTI_CONN);
        set(self.cache, flag::SEND_CACHE);
        set(status_payload, flag::BLOCK_STATUS_PAYLOAD);
        flags
    }

    fn check(&self) -> Result<(), ExportError> {
        let problem = |reason| Err(ExportError { export: self.name.clone(), reason });
        let sizes = self.block_sizes;
        if !is_valid_string(self.name.as_bytes()) || !is_valid_string(self.description.as_bytes()) {
            return problem("a name or description is at most 4096 bytes without NUL");
        }
        if !sizes.minimum.is_power_of_two() || sizes.minimum > 65536 {
            return problem("the minimum block size is a power of two of at most 65536");
        }
        if !sizes.preferred.is_power_of_two() || sizes.preferred < sizes.minimum.max(512) {
            return problem("the preferred block size is a power of two, at least 512 and the minimum");
        }
        if sizes.maximum_payload < sizes.preferred {
            return problem("the maximum payload is at least the preferred block size");
        }
        if !self.size.is_multiple_of(u64::from(sizes.minimum)) || self.size > i64::MAX as u64 {
            return problem("the size is a multiple of the minimum block size, and below 2^63");
        }
        if self.contexts.len() > MAX_CONTEXTS {
            return problem("an export has at most 32 contexts");
        }
        let well_named =
            |name: &String| is_valid_string(name.as_bytes()) && name.find(':').is_some_and(|colon| colon > 0);
        let distinct: BTreeSet<&String> = self.contexts.iter().collect();
        if !self.contexts.iter().all(well_named) || distinct.len() != self.contexts.len() {
            return problem("contexts are distinct and named `namespace:leaf`");
        }
        Ok(())
    }
}

/// Contexts an export may have.
pub(crate) const MAX_CONTEXTS: usize = 32;

pub(crate) fn is_valid_string(bytes: &[u8]) -> bool {
    bytes.len() <= MAX_STRING && !bytes.contains(&0) && std::str::from_utf8(bytes).is_ok()
}

/// An export that the protocol cannot express.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot offer export `{export}`: {reason}")]
pub struct ExportError {
    pub export: String,
    pub reason: &'static str,
}

/// The exports of one server, checked. A client that names none gets the only one, if there is only one, unless
/// [the first is for it](ExportList::with_first_as_default).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportList {
    exports: Vec<Export>,
    first_is_default: bool,
}

impl ExportList {
    /// # Errors
    /// If two share a name, or one has sizes or names the protocol does not allow.
    pub fn new(exports: Vec<Export>) -> Result<ExportList, ExportError> {
        let mut names = BTreeSet::new();
        for export in &exports {
            export.check()?;
            if !names.insert(&export.name) {
                return Err(ExportError { export: export.name.clone(), reason: "another has that name" });
            }
        }
        let first_is_default = exports.len() == 1;
        Ok(ExportList { exports, first_is_default })
    }

    /// The same, where a client that names none gets the first.
    #[must_use]
    pub fn with_first_as_default(self) -> ExportList {
        ExportList { first_is_default: !self.exports.is_empty(), ..self }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Export> {
        self.exports.iter()
    }

    pub fn get(&self, index: usize) -> Option<&Export> {
        self.exports.get(index)
    }

    pub fn len(&self) -> usize {
        self.exports.len()
    }

    pub fn is_empty(&self) -> bool {
        self.exports.is_empty()
    }

    /// The place of the export a client means by `name`.
    pub fn find(&self, name: &str) -> Option<usize> {
        match self.exports.iter().position(|export| export.name == name) {
            None if name.is_empty() && self.first_is_default => Some(0),
            found => found,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_only_export_is_the_default() {
        let one = ExportList::new(vec![Export::new("disk0", 4096)]).unwrap();
        assert_eq!((one.find(""), one.find("disk0"), one.find("disk1")), (Some(0), Some(0), None));
        let two = ExportList::new(vec![Export::new("disk0", 4096), Export::new("disk1", 4096)]).unwrap();
        assert_eq!((two.find(""), two.find("disk1")), (None, Some(1)));
        let two = two.with_first_as_default();
        assert_eq!((two.find(""), two.find("disk1"), two.find("disk2")), (Some(0), Some(1), None));
        assert_eq!(ExportList::new(Vec::new()).unwrap().with_first_as_default().find(""), None);
    }

    #[test]
    fn exports_the_protocol_cannot_express_are_refused() {
        let refused = |change: fn(&mut Export)| {
            let mut export = Export::new("disk0", 1 << 20);
            change(&mut export);
            ExportList::new(vec![export]).is_err()
        };
        assert!(!refused(|_| {}));
        assert!(refused(|export| export.size = 1000));
        assert!(refused(|export| export.size = 1 << 63));
        assert!(refused(|export| export.name = "a\0b".into()));
        assert!(refused(|export| export.name = "x".repeat(4097)));
        assert!(refused(|export| export.block_sizes.minimum = 513));
        assert!(refused(|export| export.block_sizes.preferred = 256));
        assert!(refused(|export| export.block_sizes.maximum_payload = 1024));
        assert!(refused(|export| export.contexts = vec!["allocation".into()]));
        assert!(refused(|export| export.contexts = vec!["a:b".into(), "a:b".into()]));
        assert!(ExportList::new(vec![Export::new("a", 0), Export::new("a", 0)]).is_err());
    }
}

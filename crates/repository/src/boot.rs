//! What came of starting the machine of a restore point: an entry of the log, which is gone with the point.

use crate::error::{Error, ErrorKind};
use crate::key::BoxPurpose;
use crate::log::{self, Boot, Session, State};
use crate::repository::Repository;
use crate::{ChainId, SessionId};
use rempart_types::WallTime;
use serde::{Deserialize, Serialize};

const VERSION: u8 = 1;
/// Checks that are kept, and bytes of a text: all of them fit an entry.
const MAX_CHECKS: usize = 32;
const MAX_TEXT: usize = 200;

/// What was asked of a machine that was started from its point, and what it answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootResult {
    /// When it was over, by the clock of the machine that started it.
    #[serde(rename = "at_unix_ms")]
    pub at: WallTime,
    /// The machine that started it.
    pub host: String,
    /// Whether all checks held.
    pub passed: bool,
    /// Why they did not.
    pub why: Option<String>,
    /// From the moment that the point was opened to its power-on.
    pub powered_on_ms: Option<u64>,
    /// From the same moment to the first check that held: the recovery time.
    pub answered_ms: Option<u64>,
    pub checks: Vec<BootCheck>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootCheck {
    /// As it was asked for.
    pub check: String,
    pub passed: bool,
    pub after_ms: Option<u64>,
}

impl BootResult {
    /// What is sealed: no text is longer than it may be.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bounded = self.clone();
        bounded.checks.truncate(MAX_CHECKS);
        let checks = bounded.checks.iter_mut().map(|check| &mut check.check);
        for text in checks.chain([&mut bounded.host]).chain(&mut bounded.why) {
            text.truncate(text.floor_char_boundary(MAX_TEXT));
        }
        postcard::to_extend(&bounded, vec![VERSION]).expect("writing to memory does not fail")
    }

    pub(crate) fn decode(object: &str, bytes: &[u8]) -> Result<BootResult, Error> {
        match bytes.split_first() {
            Some((&VERSION, bytes)) => match postcard::take_from_bytes(bytes) {
                Ok((result, [])) => Ok(result),
                _ => Err(Error::new(ErrorKind::Damaged, object, "what came of a boot makes no sense")),
            },
            Some((VERSION.., _)) => {
                let why = "what came of a boot was written by a newer version of this program";
                Err(Error::new(ErrorKind::Newer, object, why))
            }
            _ => Err(Error::new(ErrorKind::Damaged, object, "what came of a boot is not said")),
        }
    }
}

impl Repository {
    /// Keeps what came of starting the machine of backup `root`, in place of what was kept of it before.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`]: the backup was forgotten meanwhile.
    pub fn keep_boot(&self, root: u64, result: &BootResult, now: WallTime) -> Result<(), Error> {
        let payload = self.writer().seal(BoxPurpose::Boot, &root.to_le_bytes(), &result.encode());
        let mut session = Session::open(self.log()?, self.signer(), SessionId::random(), now)?;
        let kept = session.boot(now, Boot { root, payload });
        let ended = session.end(now);
        kept?;
        ended?;
        Ok(())
    }

    /// What came of starting backup `root` the last time; none if nobody did.
    pub fn boot(&self, state: &State, root: u64) -> Result<Option<BootResult>, Error> {
        let Some(payload) = state.boot(root) else { return Ok(None) };
        let object = format!("what came of booting {}", log::name(root));
        let opened = self.opener()?.open(BoxPurpose::Boot, &root.to_le_bytes(), payload);
        let opened = opened.ok_or_else(|| Error::new(ErrorKind::Damaged, &object, "it does not open"))?;
        BootResult::decode(&object, &opened).map(Some)
    }

    /// The newest result of any backup of a chain, by the clocks of who started them, and which backup that is. What
    /// cannot be read counts for nothing.
    pub fn last_boot(&self, state: &State, chain: ChainId) -> Option<(u64, BootResult)> {
        let roots = state.roots().iter().filter(|(_, root)| root.chain == chain);
        let results = roots.filter_map(|(root, _)| Some((*root, self.boot(state, *root).ok()??)));
        results.max_by_key(|(root, result)| (result.at, *root))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BOX_OVERHEAD;
    use crate::log::MAX_BOOT;
    use proptest::prelude::*;

    fn result() -> BootResult {
        BootResult {
            at: WallTime(5),
            host: "node-a".to_owned(),
            passed: false,
            why: Some("not all checks held within 6 s".to_owned()),
            powered_on_ms: Some(300),
            answered_ms: None,
            checks: vec![BootCheck { check: "agent".to_owned(), passed: false, after_ms: None }],
        }
    }

    #[test]
    fn it_reads_back_and_fits_an_entry_whatever_was_asked() {
        let bytes = result().encode();
        assert_eq!(BootResult::decode("boot", &bytes).expect("whole"), result());
        for length in 0..bytes.len() {
            assert!(BootResult::decode("boot", &bytes[..length]).is_err(), "{length}");
        }
        let newer = [&[VERSION + 1], &bytes[1..]].concat();
        assert_eq!(BootResult::decode("boot", &newer).expect_err("newer").kind, ErrorKind::Newer);
        let long = "ä".repeat(1 << 20);
        let check = BootCheck { check: long.clone(), passed: true, after_ms: Some(u64::MAX) };
        let longest =
            BootResult { why: Some(long.clone()), host: long, checks: vec![check; 1000], ..result() };
        assert!(longest.encode().len() + BOX_OVERHEAD <= MAX_BOOT, "{}", longest.encode().len());
        BootResult::decode("boot", &longest.encode()).expect("whole");
    }

    proptest! {
        #[test]
        fn garbage_is_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0usize..80, bit in 0u8..8) {
            let _ = BootResult::decode("boot", &bytes);
            bytes.insert(0, VERSION);
            let _ = BootResult::decode("boot", &bytes);
            let mut changed = result().encode();
            let at = at % changed.len();
            changed[at] ^= 1 << bit;
            let _ = BootResult::decode("boot", &changed);
        }
    }
}

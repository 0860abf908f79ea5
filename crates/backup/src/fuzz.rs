//! Entry points for fuzzers and the replay of their corpora: any bytes, no panic, bounded memory, and what is accepted holds
//! together.

use crate::files::fuzz_page;
use crate::guest_files::fuzz_reply;
use crate::leave_out::fuzz_survey;

/// Bytes of the disks that a hostile process looks at.
const DISKS: [u64; 2] = [1 << 20, 3 << 20];

/// A page of the entries of files, as whoever stored it made it.
///
/// # Panics
/// If entries are accepted that lead elsewhere, are not in order or do not read back.
pub fn file_page(data: &[u8]) {
    fuzz_page(data);
}

/// What a process says that looked at a guest's file systems and was taken over by them: about what may be left out, with the
/// questions before it, or the answer to one about files.
///
/// # Panics
/// If something is believed that does not lie on the disks.
pub fn confined_child(data: &[u8]) {
    let [how, data @ ..] = data else { return };
    match how % 2 {
        0 => fuzz_survey(&DISKS, data),
        _ => fuzz_reply(DISKS.iter().sum(), data),
    }
}

#[cfg(test)]
#[path = "../../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    //! What fuzzers found worth keeping, again on every build, and a few changes of each.

    use super::replay::replay;

    #[test]
    fn file_page_corpus() {
        replay("file_page", super::file_page);
    }

    #[test]
    fn confined_child_corpus() {
        replay("confined_child", super::confined_child);
    }
}

//! The log: one sequence of entries that orders all writers and collectors of a repository.
//!
//! Entry `n` is the object `log/<n>`, created if it was not there, and never changed. Whoever wants to write reads up to
//! the newest entry, sees whether what it wants is right *there*, and creates the next; somebody else's entry in that place
//! means to read it and to look again. So backups, condemnations and fences are in one order, and what is checked against
//! the state behind entry `n` still holds when entry `n + 1` says it.
//!
//! - [`Body`]: what entries say. [`State`]: all of them folded. [`State::validate`] gives a [`Valid`] body, the only thing that
//!   an entry is made of, and every reader asks the same question again: an entry that breaks a rule counts for nothing.
//! - [`Log`]: reading, appending, checkpoints. [`Session`]: what writers use.

mod append;
mod body;
mod checkpoint;
mod codec;
mod entry;
mod error;
mod history;
mod live_packs;
mod numbers;
mod read;
mod refusal;
mod session;
mod sign;
mod state;
mod table;
#[cfg(test)]
pub(crate) mod tests;

pub use append::Appended;
pub use body::{
    Body, Boot, Checkpoint, Commit, Condemn, Create, Damaged, Key, MAX_BOOT, MAX_OBJECTS, MAX_PAYLOAD,
    MAX_ROOTS, Read, Segment, Undelete,
};
pub use entry::{Header, name, number_of};
pub use error::LogError;
pub use history::{Forgetting, Forgotten, OldPack};
pub(crate) use live_packs::LivePacks;
pub use numbers::{Number, Numbers};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use read::fuzz_pointer;
pub use read::{Log, payload};
pub(crate) use read::{damaged_beginning, strange_pointers};
pub use refusal::{Refusal, Remark};
pub use session::Session;
pub use sign::{Ed25519, Sign, Verify};
#[cfg(feature = "planted-bugs")]
pub use state::forge;
pub use state::{Root, SessionRecord, State, Valid};
pub use table::{Content, Object, Status};

/// # Panics
/// If a body has two encodings.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_body(kind: u16, bytes: &[u8]) {
    if let Some(body) = Body::decode(kind, bytes) {
        assert_eq!(body.encode(), bytes, "a body has one encoding");
    }
}

/// A log's beginning, and entries behind it as a hostile holder of the maintenance key may write them: of each its kind (1
/// byte), how long its body is (1), and the body. Where it stands and what came before is made right.
///
/// # Panics
/// If what came of it contradicts itself, or does not read back.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_entries(repository: crate::RepositoryId, mut data: &[u8]) {
    use crate::{DomainId, EntryHash, SIGNATURE, SessionId, Verifier};

    /// Signatures are curves, and this is about all else.
    #[derive(Debug)]
    struct Anybody;
    impl Sign for Anybody {
        fn verifier(&self) -> Verifier {
            Verifier([7; 32])
        }
        fn sign(&self, _: &[u8]) -> [u8; SIGNATURE] {
            [8; SIGNATURE]
        }
    }
    impl Verify for Anybody {
        fn holds(&self, _: &Verifier, _: &[u8], _: &[u8; SIGNATURE]) -> bool {
            true
        }
    }
    const SESSION: SessionId = SessionId([9; 16]);
    let first = |session| Header {
        repository,
        number: 0,
        previous: EntryHash([0; 32]),
        session,
        key: Anybody.verifier().id(),
        written: rempart_types::WallTime(1000),
    };
    let create = Body::Create(Create { maintenance: Anybody.verifier(), domain: DomainId([1; 16]) });
    let bytes = entry::encode(&first(SessionId([0; 16])), &create, &Anybody);
    let mut state = State::begin(&bytes, repository, &Anybody).expect("the first entry");
    let follow = |state: &mut State, body: &Body| {
        let header = Header { number: state.next, previous: state.head, ..first(SESSION) };
        state.follow(&entry::encode(&header, body, &Anybody), &Anybody);
    };
    follow(&mut state, &Body::Session(None));
    while let [kind, len, rest @ ..] = data {
        let (body, behind) = rest.split_at((*len as usize).min(rest.len()));
        data = behind;
        let body = match Body::decode((*kind).into(), body) {
            // As long as the state itself: nobody guesses that.
            Some(Body::Checkpoint(_)) => {
                Body::Checkpoint(Checkpoint { ordinal: state.checkpoints, state: state.encode() })
            }
            Some(body) => body,
            None => continue,
        };
        follow(&mut state, &body);
    }
    assert_eq!(state.contradiction(), None);
    assert_eq!(State::decode(&state.encode(), repository), Some(state), "a state reads back");
}

/// # Panics
/// If a state that nothing contradicts does not read back.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_state(repository: crate::RepositoryId, bytes: &[u8]) {
    let Some(state) = State::decode(bytes, repository).filter(|state| state.contradiction().is_none()) else {
        return;
    };
    state.required();
    state.objects().for_each(|object| drop(state.owner(&object).clone()));
    let again = State::decode(&state.encode(), repository);
    assert_eq!(again.as_ref(), Some(&state), "a state reads back");
}

//! Changes of the group's disks, on one replica. The control plane changes every replica: where a disk appears or
//! grows, the followers first, so that none is asked to hold what it has no room for; where one goes, the leader first.

use crate::engine::sizes;
use crate::{CommandError, CommandId, CommandOutput, Engine};
use rempart_replication::Event as ReplicationEvent;
use rempart_store::{Output, Refused, Store, Token};

/// The one change under way: its token in the store, and the order it carries out.
#[derive(Debug, Default)]
pub(crate) struct DiskChange(Option<(Token, CommandId)>);

impl Engine {
    pub(crate) fn change_disks(
        &mut self,
        id: CommandId,
        change: impl FnOnce(&mut Store, Token, &mut Output) -> Result<(), Refused>,
    ) {
        if self.disk_change.0.is_some() {
            return self.command_failed(id, CommandError::Busy);
        }
        let token = Token(self.token());
        // Before the store is asked: it may answer at once.
        self.disk_change.0 = Some((token, id));
        if let Err(refused) = self.with_store(|store, io| change(store, token, io)) {
            self.disk_change.0 = None;
            let why = match refused {
                Refused::OutOfRange => "the size is smaller than it was, no multiple of 512, or too large",
                Refused::Name => "there is no such disk, or there is one already",
                _ => "the copy is not in a state in which its disks may change",
            };
            self.command_failed(id, CommandError::Refused(why));
        }
    }

    pub(crate) fn disks_changed(&mut self, token: Token) {
        self.disk_sizes = sizes(self.store.disks());
        self.replication(ReplicationEvent::Disks(self.disk_sizes.clone()));
        if let Some((_, id)) = self.disk_change.0.take_if(|(expected, _)| *expected == token) {
            self.command_done(id, CommandOutput::Done);
        }
    }

    /// The store is out: it answers nothing any more.
    pub(crate) fn disk_change_failed(&mut self) {
        if let Some((_, id)) = self.disk_change.0.take() {
            self.command_failed(id, CommandError::Aborted("the local disk failed"));
        }
    }
}

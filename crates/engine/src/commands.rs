//! Orders of the operator, and when they are carried out.

use crate::requests::FlushFor;
use crate::{Action, Command, CommandError, CommandId, CommandOutput, Engine};
use rempart_cluster::{
    Command as ClusterCommand, Condition, Event as ClusterEvent, HandoverFailure, RefusedWhy,
};
use rempart_replication::Event as ReplicationEvent;
use rempart_types::Lsn;
use std::collections::VecDeque;

/// What shows that an order of cluster is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// It is taken.
    Taken,
    Leading,
    Forced,
    HandedOver,
    Moved,
}

#[derive(Debug, Default)]
pub(crate) struct Commands {
    /// Given to cluster and not carried out yet. Cluster carries out one at a time.
    order: Option<(CommandId, Until)>,
    /// Records that are to become stable.
    records: VecDeque<(Lsn, CommandId)>,
    stopping: Option<CommandId>,
}

impl Engine {
    pub(crate) fn command(&mut self, id: CommandId, command: Command) {
        let me = self.params.cluster.me;
        match command {
            Command::Create => self.order(id, ClusterCommand::Lead, Until::Leading),
            Command::AddPeer { peer } => {
                self.order(id, ClusterCommand::AddPeer { node: peer }, Until::Taken);
                // One that was removed and forgotten may be connected all the while.
                if let Some(session) = self.replication.session(peer)
                    && !self.member.hears(peer)
                {
                    self.cluster(ClusterEvent::PeerConnected { node: peer, session });
                    // What was said of it was said to nobody: it joins, and catches up, anew.
                    self.replication(ReplicationEvent::HoldBack { peer, until: self.now });
                }
            }
            Command::RemovePeer { peer } => {
                self.order(id, ClusterCommand::RemovePeer { node: peer }, Until::Taken)
            }
            Command::Handover { to } => self.order(id, ClusterCommand::Handover { to }, Until::HandedOver),
            Command::Force { confirmed_fenced, new_register, old_register_lost } => {
                let order = ClusterCommand::Force { confirmed_fenced, new_register, old_register_lost };
                self.order(id, order, Until::Forced);
            }
            Command::MoveRegister { to } => {
                self.order(id, ClusterCommand::MoveRegister { to }, Until::Moved);
            }
            Command::Rejoin => {
                self.control.may_overwrite = true;
                self.persist_control(crate::route::ENGINE_RECEIPT);
                self.replication(ReplicationEvent::MayOverwrite);
                self.order(id, ClusterCommand::Rejoin, Until::Taken);
            }
            Command::ApproveOverwrite { peer } => {
                assert_ne!(peer, me, "a replica does not overwrite itself");
                self.replication(ReplicationEvent::ApproveOverwrite { peer });
                self.command_done(id, CommandOutput::Done);
            }
            Command::PutConfig { content } => self.put_record(id, &content, true),
            Command::Mark { name } => self.put_record(id, name.as_bytes(), false),
            Command::Compare { peer } => self.compare(id, peer),
            Command::OpenView { since, keep_bytes } => self.open_view(id, since, keep_bytes),
            Command::CloseView { view } => self.close_view(id, view),
            Command::LimitResync { bytes_per_second } => {
                self.replication(ReplicationEvent::LimitResync { bytes_per_second });
                self.command_done(id, CommandOutput::Done);
            }
            Command::AddDisk { entry } => {
                self.change_disks(id, |store, token, io| store.add_disk(token, entry, io));
            }
            Command::RemoveDisk { disk } => {
                self.change_disks(id, |store, token, io| store.remove_disk(token, disk, io));
            }
            Command::ResizeDisk { disk, size } => {
                self.change_disks(id, |store, token, io| store.resize_disk(token, disk, size, io));
            }
            Command::Stop => self.stop(id),
        }
    }

    pub(crate) fn command_done(&mut self, id: CommandId, output: CommandOutput) {
        self.out.push(Action::CommandDone { id, result: Ok(output) });
    }

    pub(crate) fn command_failed(&mut self, id: CommandId, error: CommandError) {
        self.out.push(Action::CommandDone { id, result: Err(error) });
    }

    // --- orders for cluster ---

    fn order(&mut self, id: CommandId, order: ClusterCommand, until: Until) {
        if self.commands.order.is_some() {
            return self.command_failed(id, CommandError::Busy);
        }
        self.commands.order = Some((id, until));
        self.cluster(ClusterEvent::Command(order));
        self.pump();
        // A refusal came at once and took the order away.
        if until == Until::Taken
            && let Some((id, _)) = self.commands.order.take()
        {
            self.command_done(id, CommandOutput::Done);
        }
    }

    pub(crate) fn condition_for_commands(&mut self, condition: &Condition) {
        let Some((id, until)) = self.commands.order else { return };
        let result = match (condition, until) {
            (Condition::Refused { why, .. }, _) => Err(refused(*why)),
            (Condition::HandoverFailed { why, .. }, Until::HandedOver) => {
                Err(CommandError::Aborted(match why {
                    HandoverFailure::DestinationLost => "the destination was lost",
                    HandoverFailure::Deadline => "it took too long",
                }))
            }
            // It would be waited for in vain, and in the way of the order to rejoin.
            (Condition::Superseded { .. }, Until::Leading | Until::Forced | Until::HandedOver) => {
                Err(CommandError::Aborted("the group lives on in another register"))
            }
            // Another one leads: what this one was told to do as the primary it cannot do any more.
            (Condition::Fenced { .. }, Until::HandedOver | Until::Moved) => Err(CommandError::NotPrimary),
            (Condition::Leading { .. }, Until::Leading)
            | (Condition::Forced { .. }, Until::Forced)
            | (Condition::HandedOver { .. }, Until::HandedOver)
            | (Condition::RegisterMoved { .. }, Until::Moved) => Ok(CommandOutput::Done),
            _ => return,
        };
        self.commands.order = None;
        self.out.push(Action::CommandDone { id, result });
    }

    // --- records ---

    fn put_record(&mut self, id: CommandId, content: &[u8], config: bool) {
        if !self.serving || self.frozen || self.failure.is_some() {
            return self.command_failed(id, CommandError::NotPrimary);
        }
        if content.len() > self.store.max_batch_len() / 2 {
            return self.command_failed(id, CommandError::Refused("it is larger than a record may be"));
        }
        self.make_room(content.len());
        if config {
            self.builder.config(content);
        } else {
            self.builder.mark(content);
        }
        self.sync_open_batch = true;
        self.commands.records.push_back((self.open_end(), id));
    }

    pub(crate) fn commands_stable(&mut self, stable: Lsn) {
        while let Some(&(lsn, id)) = self.commands.records.front()
            && lsn <= stable
        {
            self.commands.records.pop_front();
            self.command_done(id, CommandOutput::At(lsn));
        }
    }

    pub(crate) fn commands_stepped_down(&mut self) {
        for (_, id) in std::mem::take(&mut self.commands.records) {
            self.command_failed(id, CommandError::Aborted("this replica leads no more"));
        }
    }

    // --- stop ---

    fn stop(&mut self, id: CommandId) {
        if self.commands.stopping.is_some() {
            return self.command_failed(id, CommandError::Busy);
        }
        self.commands.stopping = Some(id);
        self.end_views("the copy is being closed");
        self.seal();
        if self.serving {
            self.start_flush(FlushFor::Nobody, true);
            self.pump();
        }
        let superseded = self.is_superseded();
        self.cluster(ClusterEvent::Command(ClusterCommand::Stop));
        self.pump();
        if superseded {
            // Nobody will ever confirm what only this copy holds: its images get all of it, to be saved as they are.
            let end = self.log_end();
            self.with_store(|store, io| store.stable_is(end, io));
        }
        if self.failure.is_some() {
            return self.stopped();
        }
        self.with_store(|store, io| store.close(io));
    }

    /// The store is being closed, and refuses whatever is new.
    pub(crate) fn is_stopping(&self) -> bool {
        self.commands.stopping.is_some()
    }

    pub(crate) fn stopped(&mut self) {
        if let Some(id) = self.commands.stopping.take() {
            self.command_done(id, CommandOutput::Done);
        }
    }

    /// The disk failed: nothing that an order to stop waits for comes any more.
    pub(crate) fn not_stopped(&mut self) {
        if let Some(id) = self.commands.stopping.take() {
            self.command_failed(id, CommandError::Aborted("this node's disk failed"));
        }
    }
}

fn refused(why: RefusedWhy) -> CommandError {
    match why {
        RefusedWhy::NotPrimary => CommandError::NotPrimary,
        RefusedWhy::PeerNotInSync => CommandError::PeerNotReady,
        RefusedWhy::Busy => CommandError::Busy,
        RefusedWhy::AlreadyPrimary => CommandError::Refused("this replica leads already"),
        RefusedWhy::AlreadyCreated => CommandError::Refused("the group exists already"),
        RefusedWhy::NotConfirmed => CommandError::Refused("that the other side is fenced was not confirmed"),
        RefusedWhy::CopyUnusable => {
            CommandError::Refused("this copy is unfinished, damaged, or its disk failed")
        }
        RefusedWhy::RegisterOutOfReach => CommandError::Refused("the register is out of reach"),
        RefusedWhy::NotAlone => CommandError::Refused("it has peers"),
        RefusedWhy::RegisterTaken => {
            CommandError::Refused("the register to move to holds somebody else's value")
        }
        RefusedWhy::NotSuperseded => CommandError::Refused("the group has not moved to another register"),
    }
}

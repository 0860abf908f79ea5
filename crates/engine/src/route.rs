//! Who is told what: the actions of one core become facts for the others, or go out.

use crate::engine::{CONFIG_SCAN, LogRead, info};
use crate::message::{Body, PeerMessage};
use crate::requests::FlushFor;
use crate::work::{Beside, Work};
use crate::{Action, Bytes, Engine, RegisterRequest, Report, VmAction};
use rempart_cluster::{Action as ClusterAction, Condition, Event as ClusterEvent, Receipt};
use rempart_replication::{Action as ReplicationAction, BatchInfo, Event as ReplicationEvent};
use rempart_store::{Batch, Health, LogChunk, LogReadError, PinId, StoreEvent, SyncingPhase, Token};
use rempart_types::{Lsn, NodeId, SessionId};

/// The journal kept for peers that are being brought up.
const PEERS_PIN: PinId = PinId(1);

impl Engine {
    pub(crate) fn received(&mut self, peer: NodeId, session: SessionId, message: PeerMessage) {
        let payload = message.payload.into_iter().next().unwrap_or_default();
        match message.body {
            Body::Cluster(message) => self.cluster(ClusterEvent::Message { from: peer, session, message }),
            Body::Replication(message) => {
                let bytes = payload.len() as u64;
                let event = ReplicationEvent::Received { peer, session, message, bytes };
                self.queue.push_back(Work::Replication(event, Beside::Payload(payload)));
            }
            Body::Compare(message) => self.queue.push_back(Work::Compare { peer, session, message }),
        }
    }

    pub(crate) fn send(&mut self, peer: NodeId, session: SessionId, body: Body, payload: Vec<Bytes>) {
        self.out.push(Action::Send { peer, session, message: PeerMessage { body, payload } });
    }

    // --- cluster ---

    pub(crate) fn perform_cluster(&mut self, action: ClusterAction) {
        match action {
            ClusterAction::ReadRegister { request, register } => {
                self.out.push(Action::Register(RegisterRequest::Read { request, register }));
            }
            ClusterAction::SwapRegister { request, register, expected, value } => {
                self.out.push(Action::Register(RegisterRequest::Swap { request, register, expected, value }));
            }
            ClusterAction::InformRegister { register, known, promise } => {
                self.out.push(Action::Register(RegisterRequest::Inform { register, known, promise }));
            }
            ClusterAction::Persist { state, receipt } => {
                self.control.cluster = state;
                if self.failure.is_none() {
                    self.persist_control(receipt.0);
                }
            }
            ClusterAction::Send { to, session, message } => {
                self.send(to, session, Body::Cluster(message), Vec::new());
            }
            ClusterAction::CloseSession { peer, session, why } => {
                self.out.push(Action::CloseSession { peer, session, why });
            }
            ClusterAction::Activate { term, acknowledgers } => {
                self.frozen = false;
                self.serving = false;
                self.draining = None;
                self.replication(ReplicationEvent::Lead { term, acknowledgers });
            }
            ClusterAction::ContinueIn { term, acknowledgers } => {
                self.replication(ReplicationEvent::Continue { term, acknowledgers });
            }
            ClusterAction::SetAcknowledgers { nodes } => {
                self.replication(ReplicationEvent::Acknowledgers(nodes));
            }
            ClusterAction::Freeze => self.frozen = true,
            ClusterAction::Thaw => {
                self.frozen = false;
                self.draining = None;
                self.answer();
            }
            ClusterAction::Drain { term } => {
                self.frozen = true;
                self.draining = Some(term);
                self.queue.push_back(Work::Seal);
                self.start_flush(FlushFor::Drain, true);
            }
            ClusterAction::Follow { primary, term } => {
                self.replication(ReplicationEvent::Follow { leader: primary, term });
            }
            ClusterAction::StepDown => {
                self.serving = false;
                self.draining = None;
                self.discard_open_batch();
                self.drop_requests();
                self.compare_aborted("this replica leads no more");
                self.end_views("this replica leads no more");
                self.commands_stepped_down();
                self.replication(ReplicationEvent::StepDown);
            }
            ClusterAction::RunVm { term } => self.out.push(Action::Vm(VmAction::Run { term })),
            ClusterAction::RenewLease { until } => self.out.push(Action::Vm(VmAction::RenewLease { until })),
            ClusterAction::PauseVm => self.out.push(Action::Vm(VmAction::Pause)),
            ClusterAction::ResumeVm => self.out.push(Action::Vm(VmAction::Resume)),
            ClusterAction::ShutDownVm => self.out.push(Action::Vm(VmAction::ShutDown)),
            ClusterAction::KillVm => self.out.push(Action::Vm(VmAction::Kill)),
            ClusterAction::Report(condition) => {
                if let Condition::JoinHeldBack { node, until } = condition {
                    self.replication(ReplicationEvent::HoldBack { peer: node, until });
                }
                self.condition_for_commands(&condition);
                self.out.push(Action::Report(Report::Cluster(condition)));
            }
        }
    }

    /// Everything is stable that cluster asked to drain.
    pub(crate) fn drained(&mut self) {
        if let Some(term) = self.draining {
            self.cluster(ClusterEvent::Drained { term });
        }
    }

    // --- replication ---

    pub(crate) fn perform_replication(&mut self, action: ReplicationAction, beside: &Beside) {
        match action {
            ReplicationAction::Send { peer, session, message, payload } => {
                let payload = payload.map_or_else(Vec::new, |index| beside.part(index));
                self.send(peer, session, Body::Replication(message), payload);
            }
            ReplicationAction::ReadLog { peer, session, after, bytes } => {
                let token = Token(self.token());
                self.log_reads.push_back(LogRead { token, peer, session, after });
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                self.with_store(|store, io| store.read_log(token, after, bytes, io));
            }
            ReplicationAction::CloseSession { peer, session, why } => {
                self.out.push(Action::CloseSession { peer, session, why });
            }
            ReplicationAction::StartTerm { term: _ } => {
                self.discard_open_batch();
                self.builder.term_start();
                self.queue.push_back(Work::Seal);
            }
            ReplicationAction::AppendForeign { peer, session, batch } => {
                self.append_foreign(peer, session, batch, beside);
            }
            ReplicationAction::Sync => self.with_store(|store, io| store.sync(io)),
            ReplicationAction::Committed(lsn) => {
                self.store.committed_is(lsn);
                self.answer();
            }
            ReplicationAction::Stable(lsn) => {
                self.with_store(|store, io| store.stable_is(lsn, io));
                self.answer();
                self.commands_stable(lsn);
            }
            ReplicationAction::FlushDone { id } => self.flush_done(id),
            ReplicationAction::TruncateAfter(lsn) => {
                // The store knows more than what was checked: where batches end, whether the copy is damaged.
                if self.with_store(|store, io| store.truncate_after(lsn, io)).is_err() {
                    self.store_refused();
                }
            }
            ReplicationAction::KeepJournal { after: Some(after) } => self.store.pin(PEERS_PIN, after),
            ReplicationAction::KeepJournal { after: None } => {
                self.with_store(|store, io| store.unpin(PEERS_PIN, io));
            }
            ReplicationAction::Serving { term } => {
                self.serving = true;
                self.cluster(ClusterEvent::TailCommitted { term });
            }
            ReplicationAction::LineageChanged => {
                let lineage = self.replication.lineage().clone();
                self.cluster(ClusterEvent::LogChanged { lineage });
            }
            ReplicationAction::CaughtUp { peer } => self.cluster(ClusterEvent::PeerCaughtUp { node: peer }),
            ReplicationAction::FellBehind { peer } => {
                self.cluster(ClusterEvent::PeerFellBehind { node: peer })
            }
            ReplicationAction::BlockedBy { peer } => {
                self.cluster(ClusterEvent::CommitBlockedBy { node: peer })
            }
            ReplicationAction::RefusedBy { peer, promise } => {
                self.cluster(ClusterEvent::PeerRefused { node: peer, promise });
            }
            ReplicationAction::CopyLost { upto } => self.copy_lost(upto),
            ReplicationAction::Report(report) => {
                self.note_resync(&report);
                self.out.push(Action::Report(Report::Replication(report)));
            }
            action => self.perform_resync(action, beside),
        }
    }

    /// Takes a batch of a leader (or of a member whose log is longer). The bytes are checked here: what the message
    /// said of them is only what the peer said.
    fn append_foreign(&mut self, peer: NodeId, session: SessionId, said: BatchInfo, beside: &Beside) {
        let Beside::Payload(payload) = beside else { panic!("a foreign batch comes with its bytes") };
        let parsed = Batch::adopt(payload.clone()).ok().filter(|batch| info(batch) == said);
        let taken = parsed.is_some_and(|batch| {
            let taken = self.with_store(|store, io| store.append(&batch, io)).is_ok();
            if taken {
                self.configs.appended(&batch);
            }
            taken
        });
        if !taken {
            self.out.push(Action::CloseSession {
                peer,
                session,
                why: "sent a batch that does not fit the log",
            });
            self.replication(ReplicationEvent::AppendRefused { end: self.store.log_end().lsn });
        }
    }

    /// A leader's message asked for something that this copy cannot do. A store that failed is told of elsewhere.
    pub(crate) fn store_refused(&mut self) {
        if self.store.failure().is_none() {
            let health = self.store.health();
            let syncing = matches!(health, Health::Syncing(SyncingPhase::Extents));
            let whole = *health == Health::Good;
            self.replication(ReplicationEvent::StoreRefused { syncing, whole });
        }
    }

    // --- store ---

    pub(crate) fn store_event(&mut self, event: StoreEvent) {
        match event {
            StoreEvent::Accepted(lsn) => self.replication(ReplicationEvent::Accepted(lsn)),
            StoreEvent::Durable(lsn) => {
                self.replication(ReplicationEvent::Durable(lsn));
                self.resync_log_durable(lsn);
            }
            StoreEvent::Applied(lsn) => {
                let chain = self.store.applied_chain().map(|chain| chain.0);
                self.replication(ReplicationEvent::Applied { upto: self.store.applied(), chain });
                self.configs.applied(lsn);
            }
            StoreEvent::Checkpointed(_) | StoreEvent::PinLost(_) => {
                self.replication(ReplicationEvent::JournalStart(self.store.oldest_available_lsn()));
            }
            StoreEvent::Truncated(end) => {
                self.configs.truncated(end);
                self.replication(ReplicationEvent::Truncated { end });
            }
            StoreEvent::Persisted(token) => self.persisted(token),
            StoreEvent::Read { token, result } => self.read_done(crate::Token(token.0), result),
            StoreEvent::LogRead { token, result } => self.log_read(token, result),
            StoreEvent::DisksChanged(token) => self.disks_changed(token),
            StoreEvent::Closed => self.stopped(),
            StoreEvent::NoRoom(error) => {
                self.out.push(Action::Report(Report::DiskFull { what: error.to_string() }));
            }
            StoreEvent::RoomAgain => self.out.push(Action::Report(Report::DiskHasRoom)),
            StoreEvent::Failed(failure) => self.store_failed(&failure),
            event => self.resync_store_event(event),
        }
    }

    fn persisted(&mut self, token: Token) {
        while let Some(&(receipt, promise)) = self.persisting.front() {
            self.persisting.pop_front();
            self.replication(ReplicationEvent::Promised { epoch: promise });
            if receipt != ENGINE_RECEIPT {
                self.cluster(ClusterEvent::Persisted { receipt: Receipt(receipt) });
            }
            if receipt == token.0 {
                return;
            }
        }
        panic!("the store persisted what it was not given");
    }

    fn log_read(&mut self, token: Token, result: Result<LogChunk, LogReadError>) {
        if token == CONFIG_SCAN {
            let Ok(chunk) = result else { return };
            let Some(last) = chunk.batches.last().map(Batch::last) else { return };
            for batch in &chunk.batches {
                self.configs.appended(batch);
            }
            if last < self.store.log_end().lsn {
                self.with_store(|store, io| store.read_log(CONFIG_SCAN, last, 1 << 20, io));
            }
            return;
        }
        let Some(place) = self.log_reads.iter().position(|read| read.token == token) else { return };
        let LogRead { peer, session, after, .. } = self.log_reads.remove(place).expect("just found");
        match result {
            Ok(chunk) => {
                let batches = chunk.batches.iter().map(info).collect();
                let event = ReplicationEvent::LogRead { peer, session, after, batches };
                self.queue.push_back(Work::Replication(event, Beside::Batches(chunk.batches)));
            }
            // A journal that cannot be read back is as good as gone: the images bring the peer up.
            Err(error) => {
                let oldest = match error {
                    LogReadError::Gone { oldest } => oldest,
                    LogReadError::Io(_) => self.store.log_end().lsn.next(),
                };
                self.replication(ReplicationEvent::LogGone { peer, session, after, oldest });
            }
        }
    }

    /// Whether this copy may lead, after something about that changed.
    pub(crate) fn weigh_copy(&mut self) {
        let usable = *self.store.health() == Health::Good && !self.images_changed;
        self.usable_is(usable);
    }

    pub(crate) fn log_end(&self) -> Lsn {
        self.store.log_end().lsn
    }
}

/// The receipt of what the engine persists for itself.
pub(crate) const ENGINE_RECEIPT: u64 = u64::MAX;

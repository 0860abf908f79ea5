//! Carries the engines' register requests to where each group's register is. Never repeats one: a repetition is the
//! cluster core's decision.

use crate::durable;
use crate::links;
use crate::members::{Cluster, MemberRecord};
use crate::vm::record::RegisterPlace;
use rempart_cluster::{ReadOutcome, SwapOutcome};
use rempart_engine::{RegisterReply, RegisterRequest};
use rempart_register::witness::{ConnectFailed, Connector, WitnessClient, WitnessClientConfig};
use rempart_register::{FileRegister, Refusal, Register, RegisterError};
use rempart_transport::{Deadlines, ErrorKind, Identity, Role, TlsContext, dial_http};
use rempart_types::{InstanceId, Intent, NodeId, NodeSet, RegisterId, RegisterValue};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

#[derive(Debug)]
pub struct Registers {
    local: FileRegister,
    /// Present once the cluster has a witness.
    witness: RwLock<Option<Arc<Witness>>>,
}

/// What a node tells a witness that does not know better.
#[derive(Debug)]
pub struct Knowledge {
    pub me: NodeId,
    pub replicas: NodeSet,
    /// Who may still report.
    pub cluster: Option<Cluster>,
}

/// The cluster's witness, as one node sees it.
#[derive(Debug)]
pub struct Witness {
    member: MemberRecord,
    client: WitnessClient,
    /// Where the instance that this node trusts is kept across restarts.
    instance_path: PathBuf,
    reachable: AtomicBool,
}

impl Witness {
    pub fn new(
        member: &MemberRecord,
        tls: TlsContext,
        deadline: Duration,
        instance_path: PathBuf,
    ) -> Witness {
        let identity = Identity { cluster: tls.identity().cluster, role: Role::Witness, id: member.id };
        let address = member.address.clone();
        let connector = Connector::new(member.name.clone(), move || {
            let (tls, address) = (tls.clone(), address.clone());
            async move {
                let socket = links::resolve(&address).await.map_err(ConnectFailed::unreachable)?;
                let deadlines = Deadlines { handshake: deadline, ..Deadlines::default() };
                dial_http(socket, &tls, Some(identity), deadlines).await.map_err(connect_failed)
            }
        });
        let instance: Option<InstanceId> = durable::read_json(&instance_path).unwrap_or_else(|error| {
            tracing::warn!(%error, "which witness state this node trusted is not known any more");
            None
        });
        let client = WitnessClient::new(connector, WitnessClientConfig { deadline, instance });
        Witness { member: member.clone(), client, instance_path, reachable: AtomicBool::new(false) }
    }

    /// Whether both mean the same member at the same address.
    pub fn is_same(&self, other: &Witness) -> bool {
        self.member == other.member
    }

    pub fn is_reachable(&self) -> bool {
        self.reachable.load(Ordering::Relaxed)
    }

    /// Looks whether it answers, for people. `registers` are all that this node has there: once each was reported to
    /// a witness that lost its state, this node trusts its new state for others, too.
    pub async fn probe(&self, registers: &[RegisterId]) {
        let health = self.client.health().await;
        self.reachable.store(health.is_ok(), Ordering::Relaxed);
        let Ok(health) = health else { return };
        if self.client.instance() == Some(health.instance) {
            return;
        }
        let waiting =
            registers.iter().find(|&&register| self.client.reported(register) != Some(health.instance));
        if let Some(register) = waiting {
            tracing::info!(%register, "the witness has other state than before, and was not told of this register yet");
            return;
        }
        // On disk first: a restart must not find the old one when registers were made on the new.
        match durable::write_json(&self.instance_path, &health.instance) {
            Ok(()) => {
                self.client.adopt(health.instance);
                tracing::warn!(instance = %health.instance, "trusts the witness's new state: it was told all registers");
            }
            Err(error) => {
                tracing::error!(%error, "which witness state this node trusts cannot be written down")
            }
        }
    }

    /// Remembers the first instance that answered, before anything relies on it.
    fn remember_instance(&self) {
        let Some(instance) = self.client.instance() else { return };
        if self.instance_path.exists() {
            return;
        }
        if let Err(error) = durable::write_json(&self.instance_path, &instance) {
            tracing::error!(%error, "which witness state this node trusts cannot be written down");
        }
    }

    fn answered<T>(&self, result: &Result<T, RegisterError>) {
        let reachable = match result {
            Ok(_) => true,
            // Who shows the wrong certificate is not our witness.
            Err(error) => error
                .refusal()
                .is_some_and(|refusal| !matches!(refusal, Refusal::WrongCluster | Refusal::Certificate(_))),
        };
        self.reachable.store(reachable, Ordering::Relaxed);
        if reachable {
            self.remember_instance();
        }
    }
}

fn connect_failed(error: rempart_transport::Error) -> ConnectFailed {
    match error.kind() {
        ErrorKind::WrongCluster => ConnectFailed::refused(Refusal::WrongCluster, error),
        ErrorKind::CertificateRevoked | ErrorKind::CertificateExpired | ErrorKind::CertificateInvalid => {
            let why = error.to_string();
            ConnectFailed::refused(Refusal::Certificate(why), error)
        }
        _ => ConnectFailed::unreachable(error),
    }
}

impl Registers {
    pub fn new(local: FileRegister) -> Registers {
        Registers { local, witness: RwLock::new(None) }
    }

    pub fn set_witness(&self, witness: Option<Witness>) {
        *self.witness.write().expect("held for a moment only") = witness.map(Arc::new);
    }

    /// Closes a register on this machine whose group lives on in `successor`.
    pub async fn close_local(
        &self,
        register: RegisterId,
        successor: RegisterId,
    ) -> Result<(), RegisterError> {
        let Some(last) = self.local.read(register).await? else { return Ok(()) };
        if matches!(last.intent, Intent::Tombstone { .. }) {
            return Ok(());
        }
        let expected = Some(last.epoch);
        let tombstone =
            RegisterValue { epoch: last.epoch.next(), intent: Intent::Tombstone { successor }, ..last };
        self.local.swap(register, expected, tombstone).await.map(drop)
    }

    pub fn witness(&self) -> Option<Arc<Witness>> {
        self.witness.read().expect("held for a moment only").clone()
    }

    /// The answer, or none where none is awaited. `knowledge` is told to a witness that lost its state.
    pub async fn carry_out(
        &self,
        place: RegisterPlace,
        request: RegisterRequest,
        knowledge: Knowledge,
    ) -> Option<RegisterReply> {
        let witness = self.witness();
        match request {
            RegisterRequest::Read { request, register } => {
                let result = match (place, &witness) {
                    (RegisterPlace::Local, _) => self.local.read(register).await,
                    (RegisterPlace::Witness, Some(witness)) => {
                        let result = witness.client.read(register).await;
                        witness.answered(&result);
                        result
                    }
                    (RegisterPlace::Witness, None) => Err(no_witness()),
                };
                let outcome = match result {
                    Ok(value) => ReadOutcome::Value(value),
                    Err(error) => {
                        tracing::info!(%register, %error, "register not read");
                        if is_amnesiac(&error) { ReadOutcome::Amnesiac } else { ReadOutcome::Unreachable }
                    }
                };
                Some(RegisterReply::Read { request, outcome })
            }
            RegisterRequest::Swap { request, register, expected, value } => {
                let result = match (place, &witness) {
                    (RegisterPlace::Local, _) => self.local.swap(register, expected, value).await,
                    (RegisterPlace::Witness, Some(witness)) => {
                        let result = witness.client.swap(register, expected, value).await;
                        witness.answered(&result);
                        result
                    }
                    (RegisterPlace::Witness, None) => Err(no_witness()),
                };
                let outcome = match result {
                    Ok(rempart_register::SwapOutcome::Won) => SwapOutcome::Won,
                    Ok(rempart_register::SwapOutcome::Lost(found)) => SwapOutcome::Lost(found),
                    Err(error) => {
                        tracing::info!(%register, %error, "register not changed");
                        // "Certainly not applied" is told as "unknown" too: the core asks again either way.
                        if is_amnesiac(&error) { SwapOutcome::Amnesiac } else { SwapOutcome::Unknown }
                    }
                };
                Some(RegisterReply::Swapped { request, outcome })
            }
            RegisterRequest::Inform { register, known, .. } => {
                if let (RegisterPlace::Witness, Some(witness)) = (place, witness) {
                    inform(&witness, register, known, knowledge).await;
                }
                None
            }
        }
    }
}

async fn inform(witness: &Witness, register: RegisterId, known: Option<RegisterValue>, knowledge: Knowledge) {
    let Knowledge { me, replicas, cluster } = knowledge;
    let mut outcome = match witness.client.report(me, register, known, replicas).await {
        Ok(outcome) => outcome,
        Err(error) => {
            return tracing::warn!(%register, %error, "the witness does not take this node's report");
        }
    };
    // Who was removed from the cluster was given up by the operator, and can never report.
    let gone: Vec<NodeId> = outcome
        .missing
        .iter()
        .filter(|&node| cluster.as_ref().is_some_and(|cluster| cluster.by_id(node).is_none()))
        .collect();
    for node in gone {
        match witness.client.excuse(node, register).await {
            Ok(excused) => outcome = excused,
            Err(error) => tracing::warn!(%register, %node, %error, "the witness goes on waiting for it"),
        }
    }
    if outcome.serving {
        tracing::info!(%register, "the witness serves the register again");
    } else {
        tracing::info!(%register, missing = ?outcome.missing, "reported to the witness");
    }
}

fn no_witness() -> RegisterError {
    RegisterError::new(rempart_register::ErrorKind::Unreachable, "ask the witness: the cluster has none")
}

fn is_amnesiac(error: &RegisterError) -> bool {
    matches!(error.refusal(), Some(Refusal::OtherInstance(_) | Refusal::Recovering { .. }))
}

//! What a witness remembers, and the decisions on it. Blocking; the server calls it from threads that may block.
//!
//! One table of registers, one of facts about the state itself. Every change is one transaction, synced before
//! it is answered. After a failed commit nothing is served any more: what the disk then holds is not known.

use super::fingerprint;
use super::server::WitnessError;
use super::wire::{Health, ReportOutcome};
use crate::{Refusal, SwapOutcome, rules};
use redb::{
    Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition, WriteTransaction,
};
use rempart_types::{Epoch, InstanceId, NodeId, NodeSet, RegisterId, RegisterValue};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const REGISTERS: TableDefinition<u128, &[u8]> = TableDefinition::new("registers");
const FACTS: TableDefinition<&str, &str> = TableDefinition::new("facts");
const FORMAT: &str = "format";
const INSTANCE: &str = "instance";
const FINGERPRINT: &str = "fingerprint";
const CHANGES: &str = "changes";
/// The layout of the tables; another one is refused.
const CURRENT_FORMAT: &str = "1";
/// Registers kept at most.
const MAX_REGISTERS: u64 = 100_000;
/// Replicas of one group at most.
const MAX_REPLICAS: usize = 16;
/// Memory for the store's pages.
const CACHE: usize = 16 * 1024 * 1024;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Entry {
    value: Option<RegisterValue>,
    /// Present while the register does not serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    recovery: Option<Recovery>,
}

/// What came in since the state lost its trust.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Recovery {
    reports: BTreeMap<NodeId, Option<RegisterValue>>,
    /// Every replica that anyone named.
    replicas: NodeSet,
    /// Replicas that an operator declared gone for good.
    excused: NodeSet,
}

impl Entry {
    fn values(&self) -> impl Iterator<Item = &RegisterValue> {
        let reports = self.recovery.iter().flat_map(|recovery| recovery.reports.values().flatten());
        self.value.iter().chain(reports)
    }

    fn newest(&self) -> Option<&RegisterValue> {
        self.values().max_by_key(|value| value.epoch)
    }

    /// Two histories of one register cannot be joined by a machine.
    fn contradicts(&self, value: &RegisterValue) -> bool {
        self.values().any(|known| known.epoch == value.epoch && known != value)
    }

    fn missing(&self) -> NodeSet {
        let Some(recovery) = &self.recovery else { return NodeSet::default() };
        let named = self.values().flat_map(|value| value.in_sync.iter());
        recovery
            .replicas
            .iter()
            .chain(named)
            .filter(|&node| !recovery.reports.contains_key(&node) && !recovery.excused.contains(node))
            .collect()
    }

    /// Ends the recovery when nobody is missing. One report at least: an excuse proves nothing.
    fn settle(&mut self) -> ReportOutcome {
        let missing = self.missing();
        if missing.is_empty() && self.recovery.as_ref().is_some_and(|recovery| !recovery.reports.is_empty()) {
            self.value = self.newest().cloned();
            self.recovery = None;
        }
        ReportOutcome { serving: self.recovery.is_none(), missing }
    }
}

/// Why a change has no result.
#[derive(Debug)]
pub(crate) enum Failure {
    Refused(Refusal),
    /// The storage failed in the middle.
    Storage(Box<redb::Error>),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        Failure::Refused(refusal)
    }
}

impl<E: Into<redb::Error>> From<E> for Failure
where
    redb::Error: From<E>,
{
    fn from(error: E) -> Failure {
        Failure::Storage(Box::new(error.into()))
    }
}

/// What a request says about the state it is meant for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Expectation {
    pub instance: Option<InstanceId>,
    pub changes: Option<u64>,
}

pub(crate) struct Store {
    database: Database,
    instance: Mutex<InstanceId>,
    changes: AtomicU64,
    broken: AtomicBool,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("instance", &self.instance()).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the state file, or creates it. State that is not at its place becomes a new instance.
    pub(crate) fn open(path: &Path) -> Result<Store, WitnessError> {
        let failed = |error: redb::Error| WitnessError::open(path, error);
        let database =
            Database::builder().set_cache_size(CACHE).create(path).map_err(|error| failed(error.into()))?;
        let place = fingerprint::of(path).map_err(|error| WitnessError::open(path, error))?;
        let store = Store {
            database,
            instance: Mutex::new(InstanceId(0)),
            changes: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        };
        match store.settle_in(&place) {
            Ok(()) => Ok(store),
            Err(Failure::Storage(error)) => Err(failed(*error)),
            Err(Failure::Refused(refusal)) => Err(WitnessError::open(path, refusal.to_string())),
        }
    }

    fn settle_in(&self, place: &str) -> Result<(), Failure> {
        let transaction = self.database.begin_write()?;
        let known = {
            let facts = transaction.open_table(FACTS)?;
            let fact = |name: &str| -> Result<Option<String>, Failure> {
                Ok(facts.get(name)?.map(|value| value.value().to_owned()))
            };
            if fact(FORMAT)?.is_some_and(|format| format != CURRENT_FORMAT) {
                return Err(Refusal::NotServing("the state has a newer format".to_owned()).into());
            }
            let changes = fact(CHANGES)?.and_then(|text| text.parse().ok()).unwrap_or(0);
            self.changes.store(changes, Ordering::Release);
            let instance = fact(INSTANCE)?.and_then(|text| text.parse::<InstanceId>().ok());
            instance.filter(|_| fact(FINGERPRINT).is_ok_and(|stored| stored.as_deref() == Some(place)))
        };
        match known {
            Some(instance) => self.set_instance(instance),
            None => {
                self.new_instance(&transaction)?;
                let mut facts = transaction.open_table(FACTS)?;
                facts.insert(FORMAT, CURRENT_FORMAT)?;
                facts.insert(FINGERPRINT, place)?;
            }
        }
        self.commit(transaction)
    }

    /// Distrusts everything: from now on another instance, with every register recovering.
    fn new_instance(&self, transaction: &WriteTransaction) -> Result<(), Failure> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
        let instance = InstanceId(u128::from_le_bytes(bytes));
        transaction.open_table(FACTS)?.insert(INSTANCE, instance.to_string().as_str())?;
        let mut table = transaction.open_table(REGISTERS)?;
        let mut ids = Vec::new();
        for item in table.iter()? {
            ids.push(item?.0.value());
        }
        for id in ids {
            let mut entry = get(&table, RegisterId(id))?;
            entry.recovery = Some(Recovery::default());
            put(&mut table, RegisterId(id), &entry)?;
        }
        self.set_instance(instance);
        Ok(())
    }

    fn set_instance(&self, instance: InstanceId) {
        *self.instance.lock().unwrap_or_else(PoisonError::into_inner) = instance;
    }

    pub(crate) fn instance(&self) -> InstanceId {
        *self.instance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Whether a request meant for another state may go on. Sound only inside a transaction, or for reads.
    fn check(&self, expectation: Expectation) -> Result<(), Refusal> {
        let instance = self.instance();
        match expectation.instance {
            Some(expected) if expected != instance => Err(Refusal::OtherInstance(instance)),
            _ => Ok(()),
        }
    }

    fn check_whole(&self) -> Result<(), Refusal> {
        if self.broken.load(Ordering::Acquire) {
            return Err(Refusal::NotServing("the storage failed".to_owned()));
        }
        Ok(())
    }

    /// If the caller has seen more changes of this very instance than it has made, its state went back.
    pub(crate) fn notice_regression(&self, expectation: Expectation) -> Result<(), Failure> {
        if expectation.instance != Some(self.instance())
            || expectation.changes.is_none_or(|seen| seen <= self.changes())
        {
            return Ok(());
        }
        self.check_whole()?;
        let transaction = self.database.begin_write()?;
        // Another caller may have noticed first.
        if expectation.instance == Some(self.instance()) {
            self.new_instance(&transaction)?;
        }
        self.commit(transaction)
    }

    pub(crate) fn read(
        &self,
        register: RegisterId,
        expectation: Expectation,
    ) -> Result<Option<RegisterValue>, Failure> {
        self.check_whole()?;
        let transaction = self.database.begin_read()?;
        // A first start committed nothing but facts: the table may be absent.
        let entry = match transaction.open_table(REGISTERS) {
            Ok(table) => get(&table, register)?,
            Err(redb::TableError::TableDoesNotExist(_)) => Entry::default(),
            Err(error) => return Err(error.into()),
        };
        self.check(expectation)?;
        serving(&entry)?;
        Ok(entry.value)
    }

    /// `caller` is `None` for a trusted local one.
    pub(crate) fn swap(
        &self,
        caller: Option<NodeId>,
        register: RegisterId,
        expected: Option<Epoch>,
        value: RegisterValue,
        expectation: Expectation,
    ) -> Result<SwapOutcome, Failure> {
        rules::check(register, expected, &value)?;
        rules::encode(&value)?;
        self.change(|transaction| {
            self.check(expectation)?;
            let mut table = transaction.open_table(REGISTERS)?;
            let mut entry = get(&table, register)?;
            serving(&entry)?;
            if let Some(lost) = rules::compare(entry.value.as_ref(), expected) {
                return Ok((lost, false));
            }
            match (&entry.value, caller) {
                (Some(current), Some(node))
                    if !current.in_sync.contains(node) && !rules::closes(&value, node) =>
                {
                    return Err(Refusal::NotAMember(Some(node)).into());
                }
                (None, _) if table.len()? >= MAX_REGISTERS => {
                    return Err(Refusal::TooLarge(format!("{MAX_REGISTERS} registers are the limit")).into());
                }
                _ => {}
            }
            entry.value = Some(value);
            put(&mut table, register, &entry)?;
            Ok((SwapOutcome::Won, true))
        })
    }

    /// A replica tells the newest value it knows.
    pub(crate) fn report(
        &self,
        node: NodeId,
        register: RegisterId,
        value: Option<RegisterValue>,
        replicas: &NodeSet,
    ) -> Result<ReportOutcome, Failure> {
        if let Some(value) = &value {
            rules::check(register, None, value)?;
            rules::encode(value)?;
        }
        if !replicas.contains(node) || replicas.len() > MAX_REPLICAS {
            return Err(Refusal::Invalid("the reporter must be among at most 16 replicas".to_owned()).into());
        }
        self.change(|transaction| {
            let mut table = transaction.open_table(REGISTERS)?;
            let mut entry = get(&table, register)?;
            if value.as_ref().is_some_and(|value| entry.contradicts(value)) {
                return Err(
                    Refusal::Invalid("another value of the same epoch is known here".to_owned()).into()
                );
            }
            let newer =
                value.as_ref().map(|value| value.epoch) > entry.value.as_ref().map(|value| value.epoch);
            if entry.recovery.is_none() && !newer {
                return Ok((ReportOutcome { serving: true, missing: NodeSet::default() }, false));
            }
            // Somebody knows a later value than we do: our state lost its memory without our noticing.
            let recovery = entry.recovery.get_or_insert_default();
            recovery.reports.insert(node, value);
            for replica in replicas.iter() {
                recovery.replicas.insert(replica);
            }
            let outcome = entry.settle();
            put(&mut table, register, &entry)?;
            Ok((outcome, true))
        })
    }

    /// An operator declares a replica gone for good: recovery does not wait for it.
    pub(crate) fn excuse(&self, node: NodeId, register: RegisterId) -> Result<ReportOutcome, Failure> {
        self.change(|transaction| {
            let mut table = transaction.open_table(REGISTERS)?;
            let mut entry = get(&table, register)?;
            let Some(recovery) = &mut entry.recovery else {
                return Ok((ReportOutcome { serving: true, missing: NodeSet::default() }, false));
            };
            recovery.excused.insert(node);
            let outcome = entry.settle();
            put(&mut table, register, &entry)?;
            Ok((outcome, true))
        })
    }

    pub(crate) fn health(&self) -> Result<Health, Failure> {
        let mut registers = 0;
        let mut recovering = 0;
        match self.database.begin_read()?.open_table(REGISTERS) {
            Ok(table) => {
                for item in table.iter()? {
                    let (_, bytes) = item?;
                    registers += 1;
                    recovering += u64::from(decode(bytes.value())?.recovery.is_some());
                }
            }
            Err(redb::TableError::TableDoesNotExist(_)) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Health {
            instance: self.instance(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            registers,
            recovering,
            changes: self.changes(),
            serving: !self.broken.load(Ordering::Acquire),
        })
    }

    /// Runs `work` alone; commits if it says that it changed something.
    fn change<T>(
        &self,
        work: impl FnOnce(&WriteTransaction) -> Result<(T, bool), Failure>,
    ) -> Result<T, Failure> {
        self.check_whole()?;
        let transaction = self.database.begin_write()?;
        // The one before us may have failed while we waited.
        self.check_whole()?;
        let (result, changed) = work(&transaction)?;
        if changed {
            self.commit(transaction)?;
        }
        Ok(result)
    }

    fn commit(&self, transaction: WriteTransaction) -> Result<(), Failure> {
        let written: Result<u64, Failure> = (|| {
            let mut facts = transaction.open_table(FACTS)?;
            // Counted in the transaction: the next one may begin before this one is told of below.
            let before = facts.get(CHANGES)?.and_then(|text| text.value().parse::<u64>().ok()).unwrap_or(0);
            let changes = before + 1;
            facts.insert(CHANGES, changes.to_string().as_str())?;
            drop(facts);
            transaction.commit()?;
            Ok(changes)
        })();
        match &written {
            // A later one may have been told of already.
            Ok(changes) => {
                self.changes.fetch_max(*changes, Ordering::AcqRel);
            }
            Err(_) => self.broken.store(true, Ordering::Release),
        }
        written.map(drop)
    }
}

fn serving(entry: &Entry) -> Result<(), Refusal> {
    match &entry.recovery {
        Some(_) => Err(Refusal::Recovering { missing: entry.missing() }),
        None => Ok(()),
    }
}

fn get(table: &impl ReadableTable<u128, &'static [u8]>, register: RegisterId) -> Result<Entry, Failure> {
    match table.get(register.0)? {
        Some(bytes) => decode(bytes.value()),
        None => Ok(Entry::default()),
    }
}

fn decode(bytes: &[u8]) -> Result<Entry, Failure> {
    serde_json::from_slice(bytes)
        .map_err(|_| Refusal::NotServing("an entry of the store is damaged".to_owned()).into())
}

fn put(
    table: &mut redb::Table<'_, u128, &'static [u8]>,
    register: RegisterId,
    entry: &Entry,
) -> Result<(), Failure> {
    let bytes = serde_json::to_vec(entry).expect("an entry always serialises");
    table.insert(register.0, bytes.as_slice())?;
    Ok(())
}

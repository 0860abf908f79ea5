//! One node: its identity, its cluster, its virtual machines.

use crate::claims::NameClaims;
use crate::clock;
use crate::config::{Compression, NodeConfig};
use crate::identity::Identity;
use crate::jobs::Jobs;
use crate::links;
use crate::members::Cluster;
use crate::operation;
use crate::paths::Paths;
use crate::registers::{Registers, Witness};
use crate::schedule::Schedules;
use crate::vm::record::{RegisterPlace, VmRecord};
use crate::vm::{First, Host, LinkWanted, Names, Vm};
use rempart_api::{Error, MemberRole};
use rempart_hypervisor::{Adopted, HostReport, Hypervisor};
use rempart_transport::pki::{Authority, Credentials};
use rempart_transport::{TlsContext, TokenBook};
use rempart_types::{GroupId, NodeId, RegisterId};
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::{OnceCell, mpsc};

/// A member heard of within this time counts as reachable.
const REACHABLE_FOR: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Node {
    pub config: Arc<NodeConfig>,
    pub paths: Paths,
    pub jobs: Jobs,
    pub schedules: Schedules,
    pub restores: operation::Restores,
    pub claims: NameClaims,
    /// Found out while machines run already: it takes longer than a lease should wait.
    host_report: OnceCell<HostReport>,
    pub started: Instant,
    pub host: Host,
    identity: Identity,
    /// Held across every change of the cluster's membership or keys.
    pub membership: tokio::sync::Mutex<Membership>,
    tls: Mutex<Option<TlsContext>>,
    vms: Mutex<BTreeMap<String, Arc<Vm>>>,
    unopened: Mutex<BTreeMap<String, Unopened>>,
    /// Every machine that is recorded here is in one of the two.
    opened_all: AtomicBool,
    heard: Mutex<BTreeMap<NodeId, Instant>>,
}

/// A virtual machine of this node that is not served, because its copy could not be opened.
#[derive(Debug)]
struct Unopened {
    error: Error,
    /// None when it could not be read either.
    record: Option<VmRecord>,
}

/// What changes when machines join and leave.
#[derive(Debug)]
pub struct Membership {
    /// Every full node holds it, so that the survivor of two can admit a replacement.
    pub authority: Option<Authority>,
    pub tokens: TokenBook,
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("held for a moment only, and nothing panics meanwhile")
}

impl Node {
    pub async fn open(
        config: NodeConfig,
        hypervisor: Arc<dyn Hypervisor>,
    ) -> Result<(Arc<Node>, mpsc::UnboundedReceiver<LinkWanted>), Error> {
        let paths = Paths::new(&config.node.data_dir, &config.node.run_dir);
        let failed = |what: &str| {
            let what = what.to_owned();
            move |e: &dyn std::fmt::Display| Error::failed(format!("cannot {what}")).cause(e)
        };
        operation::remove_unfinished(&paths);
        let identity = Identity::load(&paths)
            .map_err(|e| {
                failed("read this node's identity")(&e).hint(
                    "restore the file from a backup: the cluster knows this node by it; without one, \
                     `rempart cluster remove` this node on another, and set it up anew in an empty data_dir",
                )
            })?
            .ok_or_else(|| {
                Error::failed(format!("there is no node in `{}`", paths.data_dir().display()))
                    .hint("make one with `rempart node init`")
            })?;
        let cluster = Cluster::load(&paths.cluster()).map_err(|e| {
            failed("read the list of members")(&e)
                .hint("put the cluster.json of another node of the cluster in its place: all have the same")
        })?;
        let in_cluster = cluster.is_some();
        let tls = match in_cluster {
            true => {
                let credentials =
                    Credentials::load(&paths.pki()).map_err(|e| failed("read the certificate")(&e))?;
                Some(TlsContext::new(&credentials).map_err(|e| failed("use the certificate")(&e))?)
            }
            false => None,
        };
        let authority = match in_cluster {
            true => Some(
                Authority::load(&paths.authority()).map_err(|e| failed("read the authority's key")(&e))?,
            ),
            false => None,
        };
        let tokens = TokenBook::open(paths.tokens()).map_err(|e| failed("read the tokens")(&e))?;
        let local = rempart_register::FileRegister::open(paths.registers())
            .map_err(|e| failed("open the local registers")(&e))?;
        let (links, links_wanted) = mpsc::unbounded_channel();
        let schedules = Schedules::open(&config, &paths)?;
        let config = Arc::new(config);
        let host = Host {
            me: identity.id,
            config: config.clone(),
            hypervisor,
            registers: Arc::new(Registers::new(local)),
            names: Arc::new(Names::new(identity.id, config.node.name.clone(), cluster)),
            links,
        };
        let node = Arc::new(Node {
            config,
            paths,
            jobs: Jobs::default(),
            schedules,
            restores: operation::Restores::default(),
            host_report: OnceCell::new(),
            started: Instant::now(),
            host,
            identity,
            membership: tokio::sync::Mutex::new(Membership { authority, tokens }),
            tls: Mutex::new(tls),
            vms: Mutex::default(),
            unopened: Mutex::default(),
            claims: NameClaims::default(),
            opened_all: AtomicBool::new(false),
            heard: Mutex::default(),
        });
        node.use_witness();
        Ok((node, links_wanted))
    }

    pub fn id(&self) -> NodeId {
        self.identity.id
    }

    /// What this host offers its guests.
    pub async fn host_report(&self) -> Result<&HostReport, Error> {
        let look = || async { self.host.hypervisor.host().await };
        self.host_report.get_or_try_init(look).await.map_err(|e| {
            Error::failed("cannot look at the hypervisor")
                .cause(e)
                .hint("install the package qemu-system-x86, or name the program in [vm] qemu")
        })
    }

    /// The same, if it was found out already.
    pub fn known_host_report(&self) -> Option<&HostReport> {
        self.host_report.get()
    }

    pub fn name(&self) -> &str {
        &self.config.node.name
    }

    pub fn tls(&self) -> Option<TlsContext> {
        hold(&self.tls).clone()
    }

    pub fn cluster(&self) -> Option<Cluster> {
        self.host.names.cluster()
    }

    /// The cluster, or why there is none.
    pub fn cluster_or_refuse(&self) -> Result<(Cluster, TlsContext), Error> {
        self.cluster().zip(self.tls()).ok_or_else(|| {
            Error::conflict(format!("node `{}` is in no cluster", self.name()))
                .hint("`rempart cluster create NAME` makes one, `rempart cluster join TOKEN` joins one")
        })
    }

    /// Uses these credentials and this list from now on, durably.
    pub fn adopt_membership(&self, credentials: Option<&Credentials>, cluster: Cluster) -> Result<(), Error> {
        let failed = |e: &dyn std::fmt::Display| Error::failed("cannot save the list of members").cause(e);
        if let Some(credentials) = credentials {
            credentials.save(&self.paths.pki()).map_err(|e| failed(&e))?;
            let mut tls = hold(&self.tls);
            match &*tls {
                Some(tls) => tls.reload(credentials).map_err(|e| failed(&e))?,
                None => *tls = Some(TlsContext::new(credentials).map_err(|e| failed(&e))?),
            }
        }
        cluster.save(&self.paths.cluster()).map_err(|e| failed(&e))?;
        self.host.names.set(cluster);
        self.use_witness();
        Ok(())
    }

    /// Points the registers at the cluster's witness.
    fn use_witness(&self) {
        let member = self.cluster().and_then(|cluster| cluster.witness().cloned());
        let client = member.zip(self.tls()).map(|(member, tls)| {
            let deadline = self.config.timing.register_deadline();
            let state = self.paths.witness_instance(member.id);
            Witness::new(&member, tls, deadline, state)
        });
        // Unchanged, it keeps its connections and what it knows.
        let present = self.host.registers.witness();
        let same = matches!((&present, &client), (Some(a), Some(b)) if a.is_same(b));
        if !same {
            self.host.registers.set_witness(client);
        }
    }

    pub fn name_of(&self, id: NodeId) -> String {
        self.host.names.name_of(id)
    }

    pub async fn address_of(&self, id: NodeId) -> Result<SocketAddr, String> {
        let cluster = self.cluster().ok_or("this node is in no cluster")?;
        let member = cluster.by_id(id).ok_or_else(|| format!("{id} is no member of the cluster"))?;
        links::resolve(&member.address).await
    }

    pub fn compression(&self) -> rempart_transport::Compression {
        match self.config.replication.compression {
            Compression::Off => rempart_transport::Compression::Off,
            Compression::Auto => rempart_transport::Compression::Sampled,
        }
    }

    pub fn heard_of(&self, id: NodeId) {
        hold(&self.heard).insert(id, Instant::now());
    }

    pub fn is_reachable(&self, id: NodeId) -> bool {
        let linked = self.vms().iter().any(|vm| vm.group.status.borrow().connected.contains(&id));
        linked || hold(&self.heard).get(&id).is_some_and(|at| at.elapsed() < REACHABLE_FOR)
    }

    pub fn vms(&self) -> Vec<Arc<Vm>> {
        hold(&self.vms).values().cloned().collect()
    }

    pub fn vm(&self, name: &str) -> Result<Arc<Vm>, Error> {
        if let Some(vm) = hold(&self.vms).get(name) {
            return Ok(vm.clone());
        }
        Err(self.why_not_opened(name).unwrap_or_else(|| {
            Error::not_found(format!("there is no virtual machine `{name}` on node `{}`", self.name()))
                .hint("`rempart vm list` shows those that are")
        }))
    }

    /// Whether the name is in use here, also by one that could not be opened.
    pub fn has_vm(&self, name: &str) -> bool {
        hold(&self.vms).contains_key(name) || hold(&self.unopened).contains_key(name)
    }

    pub fn refuse_taken(&self, name: &str) -> Result<(), Error> {
        match self.has_vm(name) {
            true => Err(Error::conflict(format!("there is a virtual machine `{name}` already"))
                .hint("choose another name")),
            false => Ok(()),
        }
    }

    /// Of every machine here whose record can be read, opened or not.
    pub fn records(&self) -> Vec<VmRecord> {
        let mut records: Vec<_> = self.vms().iter().map(|vm| vm.with_record(VmRecord::clone)).collect();
        records.extend(hold(&self.unopened).values().filter_map(|unopened| unopened.record.clone()));
        records
    }

    /// The machines that could not be opened, and why.
    pub fn unopened(&self) -> Vec<(String, Error)> {
        hold(&self.unopened).iter().map(|(name, unopened)| (name.clone(), unopened.error.clone())).collect()
    }

    pub fn why_not_opened(&self, name: &str) -> Option<Error> {
        hold(&self.unopened).get(name).map(|unopened| unopened.error.clone())
    }

    /// Whether a machine that is not found here is surely not here; else why it cannot be told.
    pub fn knows_its_machines(&self) -> Result<(), Error> {
        let unknown = |why: String| Error::conflict(format!("node `{}` {why}", self.name()));
        if !self.opened_all.load(Ordering::Acquire) {
            return Err(unknown("still opens its virtual machines".into()).hint("try again in a moment"));
        }
        let unopened = hold(&self.unopened);
        let unread = unopened.iter().find(|(_, unopened)| unopened.record.is_none());
        unread.map_or(Ok(()), |(name, unopened)| {
            Err(unknown(format!("cannot tell which machine its `{name}` is")).cause(&unopened.error))
        })
    }

    fn not_opened(&self, name: String, record: Option<VmRecord>, error: Error) {
        tracing::error!(vm = name, %error, "not opened");
        let error = error.hint(format!(
            "mend what the cause names and restart the daemon; until then `rempart vm stop {name} --force` ends its \
             process, if one still runs"
        ));
        hold(&self.unopened).insert(name, Unopened { error, record });
    }

    /// Ends what an earlier daemon left running of a machine that could not be opened.
    pub async fn stop_unopened(&self, name: &str) -> Result<(), Error> {
        let (why, record) = match hold(&self.unopened).get(name) {
            Some(unopened) => (unopened.error.to_string(), unopened.record.clone()),
            None => {
                return Err(Error::conflict(format!("`{name}` was opened meanwhile")).hint("stop it again"));
            }
        };
        let failed = |e: rempart_hypervisor::Error| {
            Error::failed(format!("cannot end the process of `{name}`")).cause(crate::whole_chain(&e))
        };
        match self.host.hypervisor.adopt(&self.paths.vm(name).run).await.map_err(failed)? {
            Adopted::Running(machine) => machine.kill().await.map_err(failed)?,
            Adopted::Gone(_) => {
                return Err(Error::conflict(format!("no process of `{name}` runs on this node")).cause(why));
            }
        };
        match record {
            Some(record) if !record.config.should_run => Ok(()),
            _ => Err(Error::failed(format!(
                "the process of `{name}` is ended, but that it shall not run cannot be recorded"
            ))
            .cause(why)
            .hint("it may be started again as soon as its copy can be opened")),
        }
    }

    pub fn vm_of_group(&self, group: GroupId) -> Option<Arc<Vm>> {
        hold(&self.vms).values().find(|vm| vm.group_id() == group).cloned()
    }

    pub fn insert_vm(&self, vm: Arc<Vm>) {
        hold(&self.unopened).remove(&vm.name());
        hold(&self.vms).insert(vm.name(), vm.clone());
        // Only now: who dials looks the machine up.
        for peer in vm.peers() {
            vm.want_link(peer);
        }
    }

    pub fn remove_vm(&self, name: &str) {
        hold(&self.vms).remove(name);
    }

    /// Opens every virtual machine that is recorded here. One that cannot be opened does not keep the others down.
    pub async fn open_vms(&self) -> Result<(), Error> {
        let entries = match std::fs::read_dir(self.paths.vms()) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                self.opened_all.store(true, Ordering::Release);
                return Ok(());
            }
            Err(e) => {
                let list = self.paths.vms();
                return Err(Error::failed(format!(
                    "cannot list the virtual machines in `{}`",
                    list.display()
                ))
                .cause(e)
                .hint(
                    "mend the directory; machines that run go on under their guards until their leases end",
                ));
            }
        };
        let mut names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        let mut opening = tokio::task::JoinSet::new();
        let mut records = HashMap::new();
        for name in names {
            let paths = self.paths.vm(&name);
            let record = match VmRecord::load(&paths.record()) {
                Ok(Some(record)) => record,
                // An import that was cut off before its record was written.
                Ok(None) => continue,
                Err(e) => {
                    let error = Error::failed(format!("cannot read the record of `{name}`")).cause(e);
                    self.not_opened(name, None, error);
                    continue;
                }
            };
            let host = self.host.clone();
            let kept = (name, record.clone());
            let task = opening.spawn(Vm::open(host, paths, record, First::Nothing));
            records.insert(task.id(), kept);
        }
        while let Some(ended) = opening.join_next_with_id().await {
            let (id, result) = match ended {
                Ok((id, result)) => (id, result),
                Err(panic) => (panic.id(), Err(Error::failed("a defect of the program").cause(panic))),
            };
            let (name, record) = records.remove(&id).expect("each task ends once");
            match result {
                Ok(vm) => {
                    // A move of its register that an earlier daemon did not finish.
                    if let Err(error) = operation::finish_move(&vm).await {
                        tracing::warn!(vm = vm.name(), %error, "the old register is not closed");
                    }
                    self.insert_vm(vm);
                }
                Err(error) => self.not_opened(name, Some(record), error),
            }
        }
        self.opened_all.store(true, Ordering::Release);
        Ok(())
    }

    /// The registers that this node's machines have on the witness, also those of machines that could not be opened.
    pub fn registers_on_witness(&self) -> std::io::Result<Vec<RegisterId>> {
        let mut registers = Vec::new();
        let entries = match std::fs::read_dir(self.paths.vms()) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(registers),
            Err(e) => return Err(e),
        };
        for entry in entries {
            let Ok(name) = entry?.file_name().into_string() else { continue };
            let Some(record) = VmRecord::load(&self.paths.vm(&name).record())? else { continue };
            // A group that was led on by force has another register than it began with.
            let register =
                self.vm_of_group(record.group).and_then(|vm| vm.group.register()).unwrap_or(record.register);
            if record.place_of(register) == RegisterPlace::Witness {
                registers.push(register);
            }
        }
        Ok(registers)
    }

    /// Opens a replica that was closed.
    pub async fn reopen_vm(&self, closed: &Vm, first: First) -> Result<Arc<Vm>, Error> {
        let name = closed.name();
        let record = closed.with_record(VmRecord::clone);
        match Vm::open(self.host.clone(), closed.paths.clone(), record.clone(), first).await {
            Ok(vm) => {
                self.insert_vm(vm.clone());
                Ok(vm)
            }
            Err(error) => {
                // Nobody would answer for the one that ended.
                self.remove_vm(&name);
                self.not_opened(name, Some(record), error.clone());
                Err(error)
            }
        }
    }

    pub fn members(&self) -> Result<rempart_api::Members, Error> {
        let (cluster, _) = self.cluster_or_refuse()?;
        Ok(cluster.to_api(self.id(), |id| match cluster.by_id(id).map(|member| member.role) {
            Some(MemberRole::Witness) => {
                self.host.registers.witness().is_some_and(|witness| witness.is_reachable())
            }
            _ => self.is_reachable(id),
        }))
    }

    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn now(&self) -> rempart_types::WallTime {
        clock::wall()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_hypervisor::definition::CpuModel;
    use rempart_hypervisor::fake::FakeHypervisor;
    use rempart_hypervisor::{Machine, Pending, StartRequest};
    use std::path::Path;

    /// Looking around takes for ever.
    #[derive(Debug)]
    struct SlowToLookAround(FakeHypervisor);

    impl Hypervisor for SlowToLookAround {
        fn start(&self, request: StartRequest) -> Pending<'_, rempart_hypervisor::Result<Arc<dyn Machine>>> {
            self.0.start(request)
        }

        fn adopt<'a>(&'a self, run_dir: &'a Path) -> Pending<'a, rempart_hypervisor::Result<Adopted>> {
            self.0.adopt(run_dir)
        }

        fn try_processor<'a>(&'a self, model: &'a CpuModel) -> Pending<'a, Result<(), String>> {
            self.0.try_processor(model)
        }

        fn host(&self) -> Pending<'_, rempart_hypervisor::Result<HostReport>> {
            Box::pin(std::future::pending())
        }
    }

    /// A lease ran out once because a restarted daemon first tried KVM, and then looked after its machines.
    #[tokio::test]
    async fn machines_are_opened_before_the_host_is_looked_at() {
        let home = tempfile::tempdir().unwrap();
        let (data, run) = (home.path().join("data"), home.path().join("run"));
        let config = home.path().join("rempart.toml");
        crate::init(&config, "node-a", "127.0.0.1:0".parse().unwrap(), &data, &run).unwrap();
        let config = NodeConfig::load(&config).unwrap();
        let hypervisor = Arc::new(SlowToLookAround(FakeHypervisor::new()));
        let opened = tokio::time::timeout(Duration::from_secs(20), async {
            let (node, _links) = Node::open(config, hypervisor).await.unwrap();
            node.open_vms().await.unwrap();
            node
        });
        let node = opened.await.expect("it waits for nothing that takes long");
        assert!(node.unopened().is_empty());
        assert!(node.known_host_report().is_none());
    }
}

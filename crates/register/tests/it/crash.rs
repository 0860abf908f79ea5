//! A real witness process, killed in the middle of concurrent swaps, again and again.

use crate::support::client;
use rempart_register::conformance::{fresh_register, value};
use rempart_register::witness::{Caller, Witness, WitnessConfig};
use rempart_register::{ErrorKind, Register, SwapOutcome};
use rempart_types::{Epoch, Nonce, RegisterId};
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};

const DIRECTORY: &str = "REMPART_TEST_WITNESS_DIRECTORY";
const ROUNDS: u64 = 8;
const CONTENDERS: u64 = 4;
/// Acknowledged swaps before each kill.
const WINS_A_ROUND: u64 = 12;

/// Not a test of its own: the witness process that the test below starts from this same program.
#[test]
fn child_witness() {
    let Some(directory) = std::env::var_os(DIRECTORY) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let witness = Witness::open(&WitnessConfig { directory: directory.into() }).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("\nlistening {}", listener.local_addr().unwrap());
        let (_stop, stopped) = watch::channel(false);
        let admit = |socket: TcpStream| async move { Ok::<_, Infallible>((socket, Caller::Trusted)) };
        witness.serve(listener, admit, stopped).await;
    });
}

struct Process {
    child: Child,
    address: SocketAddr,
}

impl Process {
    fn start(directory: &Path) -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::child_witness", "--nocapture"])
            .env(DIRECTORY, directory)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("the witness starts").unwrap();
            if let Some(address) = line.strip_prefix("listening ") {
                break address.parse().unwrap();
            }
        };
        Process { child, address }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A failed assertion must not leave a process behind; a second kill is harmless.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the contenders know, across all rounds.
#[derive(Default)]
struct Ledger {
    won: BTreeMap<Epoch, Nonce>,
    unknown: BTreeSet<(Epoch, Nonce)>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_acknowledged_swap_survives_sigkill_and_each_epoch_has_one_winner() {
    let directory = tempfile::tempdir().unwrap();
    let id = fresh_register();
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let nonces = Arc::new(AtomicU64::new(1));
    let mut instance = None;
    let mut unknown_outcomes = 0;
    for round in 0..ROUNDS {
        let process = Process::start(directory.path());
        let register = client(process.address, instance);
        let current = register.read(id).await.expect("the state opens after a kill, as the same instance");
        instance = register.instance();
        check(&ledger.lock().unwrap(), current.as_ref().map(|value| (value.epoch, value.nonce)));
        if round == 0 {
            register.swap(id, None, value(id, 1, 0)).await.unwrap();
            ledger.lock().unwrap().won.insert(Epoch(1), Nonce(0));
        }
        let enough = Arc::new(Notify::new());
        let target = ledger.lock().unwrap().won.len() as u64 + WINS_A_ROUND;
        let contenders: Vec<_> = (0..CONTENDERS)
            .map(|_| {
                let (ledger, nonces, enough) = (ledger.clone(), nonces.clone(), enough.clone());
                tokio::spawn(contend(client(process.address, instance), id, ledger, nonces, enough, target))
            })
            .collect();
        enough.notified().await;
        process.kill();
        for contender in contenders {
            unknown_outcomes += contender.await.unwrap();
        }
    }
    let process = Process::start(directory.path());
    let last = client(process.address, instance).read(id).await.unwrap().unwrap();
    check(&ledger.lock().unwrap(), Some((last.epoch, last.nonce)));
    assert!(ledger.lock().unwrap().won.len() as u64 >= ROUNDS * WINS_A_ROUND);
    println!("{} swaps won, {unknown_outcomes} unknown", ledger.lock().unwrap().won.len());
}

/// Swaps until the witness is gone. Returns how many outcomes stayed unknown.
async fn contend(
    register: impl Register,
    id: RegisterId,
    ledger: Arc<Mutex<Ledger>>,
    nonces: Arc<AtomicU64>,
    enough: Arc<Notify>,
    target: u64,
) -> u64 {
    loop {
        let Ok(current) = register.read(id).await else { return 0 };
        let epoch = current.expect("it was created").epoch;
        let nonce = nonces.fetch_add(1, Ordering::Relaxed);
        let next = value(id, epoch.next().0, nonce.into());
        match register.swap(id, Some(epoch), next.clone()).await {
            Ok(SwapOutcome::Won) => {
                let mut ledger = ledger.lock().unwrap();
                let other = ledger.won.insert(next.epoch, next.nonce);
                assert_eq!(other, None, "two winners of epoch {}", next.epoch);
                if ledger.won.len() as u64 >= target {
                    enough.notify_one();
                }
            }
            Ok(SwapOutcome::Lost(_)) => {}
            Err(error) => {
                if *error.kind() == ErrorKind::Unknown {
                    ledger.lock().unwrap().unknown.insert((next.epoch, next.nonce));
                    return 1;
                }
                assert!(error.certainly_not_applied());
                return 0;
            }
        }
    }
}

/// What stands is the last acknowledged swap, or an unknown one after it.
fn check(ledger: &Ledger, stands: Option<(Epoch, Nonce)>) {
    let Some((&last, &nonce)) = ledger.won.last_key_value() else {
        assert_eq!(stands, None);
        return;
    };
    let stands = stands.expect("an acknowledged swap is never lost");
    if stands != (last, nonce) {
        assert!(stands.0 > last, "epoch {} stands, but {last} was acknowledged", stands.0);
        assert!(ledger.unknown.contains(&stands), "nobody tried to write what stands");
    }
    // Each swap expected the epoch before, so every gap in the acknowledged ones was an unknown that won.
    let unknown = |epoch| ledger.unknown.iter().any(|&(tried, _)| tried == epoch);
    for epoch in (1..last.0).map(Epoch) {
        assert!(ledger.won.contains_key(&epoch) || unknown(epoch), "epoch {epoch} came from nowhere");
    }
}

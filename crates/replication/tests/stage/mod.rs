//! Replicas on a stage: real cores, stores that do at once what they are told, a network that waits for its cue.

use rempart_replication::{
    Action, BatchInfo, Config, Event, ExtentPiece, FlushId, LogState, Message, Recovered, Region, RegionBits,
    Replication, Syncing,
};
use rempart_types::{
    DiskIndex, Epoch, ExtentIndex, Lineage, LogPosition, Lsn, MonotonicTime, NodeId, NodeSet, SessionId, Term,
};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

struct Replica {
    core: Replication,
    /// The whole log, although the journal may start later.
    log: Vec<BatchInfo>,
    journal_start: Lsn,
    accepted: Lsn,
    durable: Lsn,
    stable: Lsn,
    applied: Lsn,
    /// Extents and the record that last touched them.
    extents: BTreeMap<u64, Lsn>,
    /// Its store is slow: nothing is accepted, or made durable, until it is released.
    slow_write: bool,
    slow_sync: bool,
    sync_waits: bool,
    /// What it was told to truncate to, if it is slow.
    truncation_waits: Option<Lsn>,
    wrote_alone: bool,
    whole: bool,
    resync: Option<(LogPosition, Lineage)>,
}

struct Letter {
    from: NodeId,
    to: NodeId,
    session: SessionId,
    message: Message,
    batch: Option<BatchInfo>,
    bytes: u64,
}

#[derive(Default)]
pub struct Stage {
    now: MonotonicTime,
    replicas: BTreeMap<NodeId, Replica>,
    sessions: BTreeMap<(NodeId, NodeId), SessionId>,
    next_session: u64,
    post: VecDeque<Letter>,
    /// Facts not handed in yet, and the batches beside them.
    facts: VecDeque<(NodeId, Event, Vec<BatchInfo>)>,
    busy: bool,
    told: Vec<String>,
}

fn node(name: &str) -> NodeId {
    assert_eq!(name.len(), 1, "a replica's name is a letter: {name}");
    NodeId(u128::from(name.as_bytes()[0] - b'A' + 0xa))
}

fn name(node: NodeId) -> char {
    char::from(b'A' + u8::try_from(node.0 - 0xa).expect("a letter"))
}

fn term(text: &str) -> Term {
    let (epoch, incarnation) = text.split_once('.').unwrap_or((text, "0"));
    Term::new(epoch.parse().expect("an epoch"), incarnation.parse().expect("an incarnation"))
}

fn set(words: &[&str]) -> NodeSet {
    words.iter().map(|word| node(word)).collect()
}

fn pair(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    (a.min(b), a.max(b))
}

impl Stage {
    pub fn command(&mut self, line: &str) -> Vec<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        self.now = self.now.max(MonotonicTime(1_000_000_000));
        match words[..] {
            ["replica", who, ref rest @ ..] => self.replica(node(who), rest),
            ["connect", a, b] => self.connect(node(a), node(b)),
            ["disconnect", a, b] => self.disconnect(node(a), node(b)),
            ["lead", who, in_term, "with", ref members @ ..] => {
                let event = Event::Lead { term: term(in_term), acknowledgers: set(members) };
                self.feed(node(who), event);
            }
            ["continue", who, in_term, "with", ref members @ ..] => {
                let event = Event::Continue { term: term(in_term), acknowledgers: set(members) };
                self.feed(node(who), event);
            }
            ["acknowledgers", who, ref members @ ..] => {
                self.feed(node(who), Event::Acknowledgers(set(members)));
            }
            ["follow", who, leader, in_term] => {
                self.feed(node(who), Event::Follow { leader: node(leader), term: term(in_term) });
            }
            ["promise", who, epoch] => {
                self.feed(node(who), Event::Promised { epoch: Epoch(epoch.parse().expect("an epoch")) });
            }
            ["step-down", who] => self.feed(node(who), Event::StepDown),
            ["approve", who, peer] => self.feed(node(who), Event::ApproveOverwrite { peer: node(peer) }),
            ["write", who, records] => self.write(node(who), records.parse().expect("a number"), false),
            ["write", who, records, "fua"] => self.write(node(who), records.parse().expect("a number"), true),
            ["flush", who, id] => {
                self.feed(node(who), Event::Flush { id: FlushId(id.parse().expect("a number")), all: false });
            }
            ["slow", "writes", who] => self.at(node(who)).slow_write = true,
            ["slow", "syncs", who] => self.at(node(who)).slow_sync = true,
            ["fast", who] => self.fast(node(who)),
            ["trim", who, start] => {
                let start = Lsn(start.parse().expect("a number"));
                self.at(node(who)).journal_start = start;
                self.feed(node(who), Event::JournalStart(start));
            }
            ["run"] => while self.deliver() {},
            ["deliver", count] => {
                for _ in 0..count.parse().expect("a number") {
                    self.deliver();
                }
            }
            ["lose"] => {
                for letter in std::mem::take(&mut self.post) {
                    self.told.push(format!("lost: {}", told(&letter)));
                }
            }
            ["wait", milliseconds] => {
                self.now = self.now + Duration::from_millis(milliseconds.parse().expect("milliseconds"));
                let everyone: Vec<NodeId> = self.replicas.keys().copied().collect();
                for who in everyone {
                    self.feed(who, Event::Tick);
                }
            }
            ["restart", who] => self.restart(node(who), false),
            ["power-cut", who] => self.restart(node(who), true),
            ["show"] => self.show(),
            _ => panic!("unknown command: {line}"),
        }
        std::mem::take(&mut self.told)
    }

    fn at(&mut self, who: NodeId) -> &mut Replica {
        self.replicas.get_mut(&who).expect("a replica of that name")
    }

    fn config() -> Config {
        Config { log_read_bytes: 3 * 4096, adoption_wait: Duration::from_millis(100), ..Config::default() }
    }

    /// `replica A [alone] [log 1:1-5 2:6-7] [stable 5] [blank no]`
    fn replica(&mut self, who: NodeId, words: &[&str]) {
        let mut replica = Replica {
            core: Replication::new(who, Stage::config(), Stage::recovered(&Replica::empty())),
            ..Replica::empty()
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "alone" => replica.wrote_alone = true,
                "stable" => {
                    let stable = Lsn(words.next().and_then(|lsn| lsn.parse().ok()).expect("a number"));
                    (replica.stable, replica.applied) = (stable, stable);
                }
                run => {
                    let (in_term, range) = run.split_once(':').expect("a run: term:first-last");
                    let (first, last) = range.split_once('-').expect("a run: term:first-last");
                    for lsn in first.parse::<u64>().expect("a number")..=last.parse().expect("a number") {
                        replica.append(BatchInfo {
                            term: term(in_term),
                            first: Lsn(lsn),
                            last: Lsn(lsn),
                            bytes: 4096,
                        });
                    }
                    replica.accepted = replica.end();
                    replica.durable = replica.end();
                }
            }
        }
        replica.core = Replication::new(who, Stage::config(), Stage::recovered(&replica));
        self.replicas.insert(who, replica);
    }

    fn recovered(replica: &Replica) -> Recovered {
        let mut lineage = Lineage::new();
        for batch in &replica.log {
            lineage.append(batch.term, batch.first);
        }
        let state = LogState {
            lineage,
            end: replica.end(),
            durable: replica.end(),
            stable: replica.stable,
            applied: replica.applied,
            wrote_alone: replica.wrote_alone,
            image_unknown: false,
            blank_start: true,
            may_overwrite: false,
            syncing: (!replica.whole).then(Syncing::default),
        };
        Recovered {
            applied_chain: None,
            state,
            journal_start: replica.journal_start,
            promise: Epoch(0),
            whole: replica.whole,
            disks: vec![1 << 20],
        }
    }

    fn restart(&mut self, who: NodeId, power: bool) {
        let peers: Vec<NodeId> = self.replicas.keys().copied().filter(|peer| *peer != who).collect();
        for peer in peers {
            self.disconnect(who, peer);
        }
        let replica = self.at(who);
        if power {
            let durable = replica.durable;
            replica.log.retain(|batch| batch.last <= durable);
        }
        replica.accepted = replica.end();
        replica.durable = replica.end();
        replica.core = Replication::new(who, Stage::config(), Stage::recovered(replica));
    }

    fn connect(&mut self, a: NodeId, b: NodeId) {
        self.next_session += 1;
        let session = SessionId(self.next_session);
        self.sessions.insert(pair(a, b), session);
        self.feed(a, Event::Connected { peer: b, session });
        self.feed(b, Event::Connected { peer: a, session });
    }

    fn disconnect(&mut self, a: NodeId, b: NodeId) {
        if let Some(session) = self.sessions.remove(&pair(a, b)) {
            self.post.retain(|letter| letter.session != session);
            self.feed(a, Event::Disconnected { peer: b, session });
            self.feed(b, Event::Disconnected { peer: a, session });
        }
    }

    fn write(&mut self, who: NodeId, records: u64, fua: bool) {
        let replica = self.at(who);
        let Some(in_term) = replica.core.leads_in() else { panic!("{} does not lead", name(who)) };
        let first = replica.end().next();
        let last = Lsn(replica.end().0 + records);
        let batch = BatchInfo { term: in_term, first, last, bytes: 4096 * records };
        self.seal(who, batch, fua);
    }

    fn seal(&mut self, who: NodeId, batch: BatchInfo, sync: bool) {
        self.feed_with(who, Event::Sealed { batch, sync }, &[batch]);
        self.at(who).append(batch);
        self.write_done(who);
    }

    fn write_done(&mut self, who: NodeId) {
        let replica = self.at(who);
        if !replica.slow_write && replica.accepted < replica.end() {
            replica.accepted = replica.end();
            let accepted = replica.accepted;
            self.feed(who, Event::Accepted(accepted));
        }
    }

    fn sync_done(&mut self, who: NodeId) {
        let replica = self.at(who);
        if replica.slow_sync {
            replica.sync_waits = true;
            return;
        }
        replica.durable = replica.accepted;
        let durable = replica.durable;
        self.feed(who, Event::Durable(durable));
        self.apply(who);
    }

    fn apply(&mut self, who: NodeId) {
        let replica = self.at(who);
        let applied = replica.stable.min(replica.durable);
        if applied > replica.applied {
            replica.applied = applied;
            self.feed(who, Event::Applied { upto: applied, chain: None });
        }
    }

    fn fast(&mut self, who: NodeId) {
        let replica = self.at(who);
        (replica.slow_write, replica.slow_sync) = (false, false);
        let waits = std::mem::take(&mut replica.sync_waits);
        if let Some(end) = replica.truncation_waits.take() {
            self.feed(who, Event::Truncated { end });
        }
        self.write_done(who);
        if waits {
            self.sync_done(who);
        }
    }

    fn deliver(&mut self) -> bool {
        let Some(letter) = self.post.pop_front() else { return false };
        self.told.push(told(&letter));
        let Letter { from, to, session, message, batch, bytes } = letter;
        let event = Event::Received { peer: from, session, message, bytes };
        self.feed_with(to, event, batch.as_slice());
        true
    }

    fn feed(&mut self, who: NodeId, event: Event) {
        self.feed_with(who, event, &[]);
    }

    fn feed_with(&mut self, who: NodeId, event: Event, batches: &[BatchInfo]) {
        self.facts.push_back((who, event, batches.to_vec()));
        if std::mem::replace(&mut self.busy, true) {
            return;
        }
        while let Some((who, event, batches)) = self.facts.pop_front() {
            let now = self.now;
            let mut actions = Vec::new();
            let bytes = match &event {
                Event::RegionRead { bytes, .. } => *bytes,
                _ => 0,
            };
            self.at(who).core.handle(event, now, &mut actions);
            for action in actions.drain(..) {
                self.perform(who, action, &batches, bytes);
            }
            // A turn ends when nothing more is ready.
            if self.facts.is_empty() {
                let everyone: Vec<NodeId> = self.replicas.keys().copied().collect();
                for who in everyone {
                    self.at(who).core.end_turn(now, &mut actions);
                    for action in actions.drain(..) {
                        self.perform(who, action, &[], 0);
                    }
                }
            }
        }
        self.busy = false;
    }

    fn perform(&mut self, who: NodeId, action: Action, batches: &[BatchInfo], bytes: u64) {
        let me = name(who);
        match action {
            Action::Send { peer, session, message, payload } => {
                let batch = payload.and_then(|index| batches.get(index)).copied();
                let bytes = batch.map_or(bytes, |batch| batch.bytes);
                self.post.push_back(Letter { from: who, to: peer, session, message, batch, bytes });
            }
            Action::ReadLog { peer, session, after, bytes } => {
                let replica = self.at(who);
                let oldest = replica.journal_start;
                if after.next() < oldest {
                    return self.feed(who, Event::LogGone { peer, session, after, oldest });
                }
                let most = usize::try_from(bytes / 4096).expect("few").max(1);
                let batches: Vec<BatchInfo> =
                    replica.log.iter().filter(|batch| batch.first > after).take(most).copied().collect();
                let event = Event::LogRead { peer, session, after, batches: batches.clone() };
                self.feed_with(who, event, &batches);
            }
            Action::CloseSession { peer, why, .. } => {
                self.told.push(format!("{me} closes the session with {}: {why}", name(peer)));
                self.disconnect(who, peer);
            }
            Action::StartTerm { term } => {
                let first = self.at(who).end().next();
                self.seal(who, BatchInfo { term, first, last: first, bytes: 4096 }, false);
            }
            Action::AppendForeign { batch, .. } => {
                self.at(who).append(batch);
                self.write_done(who);
            }
            Action::Sync => self.sync_done(who),
            Action::Committed(lsn) => self.told.push(format!("{me} committed {lsn}")),
            Action::Stable(lsn) => {
                self.told.push(format!("{me} stable {lsn}"));
                self.at(who).stable = lsn;
                self.apply(who);
            }
            Action::FlushDone { id } => self.told.push(format!("{me} flush {} done", id.0)),
            Action::TruncateAfter(end) => {
                self.told.push(format!("{me} truncates after {end}"));
                let replica = self.at(who);
                replica.log.retain(|batch| batch.last <= end);
                replica.accepted = replica.accepted.min(end);
                replica.durable = replica.durable.min(end);
                if replica.slow_sync {
                    replica.truncation_waits = Some(end);
                } else {
                    self.feed(who, Event::Truncated { end });
                }
            }
            Action::KeepJournal { after } => match after {
                Some(after) => self.told.push(format!("{me} keeps its journal after {after}")),
                None => self.told.push(format!("{me} keeps its journal for nobody")),
            },
            Action::Serving { term } => self.told.push(format!("{me} serves in {term}")),
            Action::LineageChanged => {}
            Action::CaughtUp { peer } => self.told.push(format!("{me} says that {} caught up", name(peer))),
            Action::FellBehind { peer } => {
                self.told.push(format!("{me} says that {} fell behind", name(peer)))
            }
            Action::BlockedBy { peer } => self.told.push(format!("{me} is blocked by {}", name(peer))),
            Action::RefusedBy { peer, promise } => {
                self.told.push(format!("{me} is refused by {}, which promised {promise}", name(peer)));
            }
            Action::CopyLost { upto } => self.told.push(format!("{me} lost its records to {upto}")),
            Action::Report(report) => {
                self.told.push(format!("{me} reports {}", lettered(&format!("{report:?}"))))
            }
            action => self.perform_resync(who, action),
        }
    }

    fn perform_resync(&mut self, who: NodeId, action: Action) {
        let me = name(who);
        match action {
            Action::ResyncSetAside { round, .. } => {
                self.told.push(format!("{me} sets its copy aside"));
                self.at(who).whole = false;
                self.feed(who, Event::ResyncSetAside { round });
            }
            Action::KnowRegion { round, region, since, .. } => {
                let mut changed = RegionBits::default();
                for (&extent, _) in self.at(who).extents.iter().filter(|(_, lsn)| **lsn > since) {
                    changed.insert(extent);
                }
                self.feed(who, Event::RegionKnown { round, region, changed, digests: None });
            }
            Action::ReadRegion { round, region, since, also, .. } => {
                let extents = &self.at(who).extents;
                let pieces: Vec<ExtentPiece> = (0..16)
                    .filter(|extent| {
                        also.contains(*extent) || extents.get(extent).is_some_and(|lsn| *lsn > since)
                    })
                    .map(|extent| ExtentPiece {
                        disk: DiskIndex(0),
                        extent: ExtentIndex(extent),
                        lsn: extents.get(&extent).copied().unwrap_or_default(),
                        length: 65536,
                    })
                    .collect();
                let bytes = pieces.len() as u64 * 65536;
                self.feed(who, Event::RegionRead { round, region, pieces, bytes, next: None });
            }
            Action::WriteExtents { round, sequence, pieces } => {
                for piece in pieces {
                    self.told.push(format!("{me} takes extent {} as of {}", piece.extent.0, piece.lsn));
                    self.at(who).extents.insert(piece.extent.0, piece.lsn);
                }
                self.feed(who, Event::ExtentsWritten { round, sequence });
            }
            Action::StartResyncLog { from, lineage, .. } => {
                self.told.push(format!("{me} starts its log after {}", from.lsn));
                let replica = self.at(who);
                replica.resync = Some((from, lineage));
                // The part before is never read; it stands for the lineage.
                replica.log = vec![BatchInfo { term: from.term, first: Lsn(1), last: from.lsn, bytes: 4096 }];
                (replica.accepted, replica.durable) = (from.lsn, from.lsn);
                (replica.stable, replica.applied) = (from.lsn, from.lsn);
                replica.journal_start = from.lsn.next();
                replica.whole = true;
                self.feed(who, Event::ResyncLogStarted { from: from.lsn });
                self.feed(who, Event::Whole);
            }
            action => panic!("{action:?} is not performed here"),
        }
    }

    fn show(&mut self) {
        for (&who, replica) in &self.replicas {
            let runs: Vec<String> = replica
                .core
                .lineage()
                .runs()
                .iter()
                .map(|run| format!("{} from {}", run.term, run.first))
                .collect();
            let Replica { accepted, durable, stable, applied, .. } = replica;
            self.told.push(format!(
                "{}: end {} accepted {accepted} durable {durable} stable {stable} applied {applied}, terms {}",
                name(who),
                replica.end(),
                runs.join(", ")
            ));
        }
    }
}

impl Replica {
    fn empty() -> Replica {
        let recovered = Recovered {
            applied_chain: None,
            state: LogState {
                lineage: Lineage::new(),
                end: Lsn(0),
                durable: Lsn(0),
                stable: Lsn(0),
                applied: Lsn(0),
                wrote_alone: false,
                image_unknown: false,
                blank_start: true,
                may_overwrite: false,
                syncing: None,
            },
            journal_start: Lsn(1),
            promise: Epoch(0),
            whole: true,
            disks: vec![1 << 20],
        };
        Replica {
            core: Replication::new(NodeId(0), Stage::config(), recovered),
            log: Vec::new(),
            journal_start: Lsn(1),
            accepted: Lsn(0),
            durable: Lsn(0),
            stable: Lsn(0),
            applied: Lsn(0),
            extents: BTreeMap::new(),
            slow_write: false,
            slow_sync: false,
            sync_waits: false,
            truncation_waits: None,
            wrote_alone: false,
            whole: true,
            resync: None,
        }
    }

    fn end(&self) -> Lsn {
        self.log.last().map_or(Lsn::ZERO, |batch| batch.last)
    }

    /// Record n touches extent n modulo 16.
    fn append(&mut self, batch: BatchInfo) {
        assert_eq!(batch.first, self.end().next(), "a log is dense");
        self.log.push(batch);
        for lsn in batch.first.0..=batch.last.0 {
            self.extents.insert(lsn % 16, Lsn(lsn));
        }
    }
}

/// Identifiers as letters.
fn lettered(text: &str) -> String {
    let mut text = text.to_owned();
    for letter in 'A'..='D' {
        text = text.replace(&format!("NodeId({:x})", 0xa + letter as u32 - 'A' as u32), &letter.to_string());
    }
    text
}

fn told(letter: &Letter) -> String {
    let body = match &letter.message {
        Message::Probe { term } => format!("I lead {term}; what do you hold?"),
        Message::State { state, .. } => {
            let last = state.lineage.last_term();
            format!("to {} in {last}, durable {}, stable {}", state.end, state.durable, state.stable)
        }
        Message::Refused { promise, .. } => format!("no, I promised {promise}"),
        Message::Truncate { to, stable, .. } => format!("end at {to}; stable is {stable}"),
        Message::Truncated { end, .. } => format!("I end at {end}"),
        Message::Append { written, first, last, stable, sync, .. } => {
            let sync = if *sync { ", sync" } else { "" };
            format!("records {first}-{last} of {written}; stable is {stable}{sync}")
        }
        Message::Sync { upto, .. } => format!("sync to {upto}"),
        Message::Stable { stable, .. } => format!("stable is {stable}"),
        Message::Ack { accepted, durable, applied, whole, .. } => {
            let whole = if *whole { "" } else { ", not whole" };
            format!("accepted {accepted}, durable {durable}, applied {applied}{whole}")
        }
        Message::Pull { from, .. } => format!("give me your log from {from}"),
        Message::Pulled { written, first, last, .. } => format!("here is {first}-{last} of {written}"),
        Message::ResyncBegin { base, mode, .. } => format!("resync, {mode:?} since {}", base.lsn),
        Message::ResyncReady { .. } => "ready for extents".to_owned(),
        Message::ResyncFrom { at, .. } => format!("extents as of {}", at.lsn),
        Message::ResyncRegion { region: Region { disk, index }, since, changed, .. } => {
            format!("region {disk}/{index} since {since}, and {} I changed", changed.count())
        }
        Message::ResyncExtents { pieces, last, .. } => {
            let last = if *last { ", that is all" } else { "" };
            format!("{} extents{last}", pieces.len())
        }
        Message::ResyncTaken { sequence, .. } => format!("took message {sequence}"),
        Message::ResyncLog { at, .. } => format!("go on with the log after {at}"),
        Message::ResyncFailed { .. } => "this resync fails".to_owned(),
    };
    format!("{} -> {}: {body}", name(letter.from), name(letter.to))
}

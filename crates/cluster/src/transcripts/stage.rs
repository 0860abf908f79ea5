//! The stage the stories are played on.

use crate::{
    Action, Command, Condition, Config, Event, Member, Message, PersistentState, ReadOutcome, RequestId,
    SwapOutcome, Timing,
};
use rempart_types::{
    Epoch, GroupId, Intent, MonotonicTime, NodeId, NodeSet, RegisterId, RegisterValue, SessionId,
};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

const FIRST_REGISTER: RegisterId = RegisterId(0xf1);
const SECOND_REGISTER: RegisterId = RegisterId(0xf2);
const START: MonotonicTime = MonotonicTime(1_000_000_000_000);

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn node_of(name: &str) -> NodeId {
    let letter = name.bytes().next().expect("a node has a name");
    NodeId(u128::from(letter - b'a' + 1))
}

fn name(node: NodeId) -> char {
    char::from(b'a' + u8::try_from(node.0 - 1).expect("few nodes"))
}

fn names(nodes: &NodeSet) -> String {
    let names: Vec<String> = nodes.iter().map(|node| name(node).to_string()).collect();
    format!("{{{}}}", names.join(","))
}

fn value_in_words(value: &RegisterValue) -> String {
    let intent = match &value.intent {
        Intent::Lead => String::new(),
        Intent::Handover { from } => format!(", handed over by {}", name(*from)),
        Intent::Tombstone { successor } => format!(", closed for register {:x}", successor.0),
    };
    format!("epoch {}: {} leads {}{intent}", epoch(value.epoch), name(value.primary), names(&value.in_sync))
}

fn register_in_words(register: RegisterId) -> String {
    if register == FIRST_REGISTER { "register".to_owned() } else { format!("register {:x}", register.0) }
}

fn epoch(epoch: Epoch) -> String {
    if epoch.0 >> 32 == 0 { epoch.to_string() } else { format!("{}g{:x}", epoch.0 >> 32, epoch.0 as u32) }
}

struct Player {
    member: Option<Member>,
    life: u32,
    persisted: PersistentState,
    usable: bool,
    machine: Machine,
    lease: Option<MonotonicTime>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Machine {
    Absent,
    Running,
    Paused,
}

#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there are few")]
enum Cue {
    Message {
        from: NodeId,
        to: NodeId,
        session: SessionId,
        message: Message,
    },
    /// For a member in this life only.
    Fact {
        node: NodeId,
        life: u32,
        event: Event,
    },
    Written {
        node: NodeId,
        life: u32,
        state: PersistentState,
        event: Event,
    },
    Read {
        node: NodeId,
        life: u32,
        request: RequestId,
        register: RegisterId,
    },
    Swap {
        node: NodeId,
        life: u32,
        request: RequestId,
        register: RegisterId,
        expected: Option<Epoch>,
        value: RegisterValue,
    },
    MachineStarts {
        node: NodeId,
    },
    MachineEnds {
        node: NodeId,
    },
}

pub(super) struct Stage {
    now: MonotonicTime,
    players: BTreeMap<NodeId, Player>,
    registers: BTreeMap<RegisterId, RegisterValue>,
    /// Nodes that cannot reach the register.
    cut_off: NodeSet,
    /// The first register lost its state.
    forgot: bool,
    /// Requests reach the register but answers do not come back.
    mute: bool,
    /// Swaps wait here instead of reaching the register.
    held: Option<Vec<Cue>>,
    /// Swaps of these nodes never arrive.
    lost: NodeSet,
    sessions: BTreeMap<(NodeId, NodeId), SessionId>,
    last_session: u64,
    cues: BTreeMap<(MonotonicTime, u64), Cue>,
    last_cue: u64,
    show_beacons: bool,
    last_no: String,
    /// Where a new member looks for its group.
    register: RegisterId,
    told: String,
}

impl Stage {
    pub(super) fn new() -> Stage {
        Stage {
            now: START,
            players: BTreeMap::new(),
            registers: BTreeMap::new(),
            cut_off: NodeSet::default(),
            forgot: false,
            mute: false,
            held: None,
            lost: NodeSet::default(),
            last_no: String::new(),
            register: FIRST_REGISTER,
            sessions: BTreeMap::new(),
            last_session: 0,
            cues: BTreeMap::new(),
            last_cue: 0,
            show_beacons: false,
            told: String::new(),
        }
    }

    pub(super) fn take_told(&mut self) -> String {
        std::mem::take(&mut self.told)
    }

    fn say(&mut self, text: &str) {
        let at = self.now.since(START).as_millis();
        writeln!(self.told, "{:>3}.{:03} {text}", at / 1000, at % 1000).expect("strings take text");
    }

    fn cue(&mut self, after: Duration, cue: Cue) {
        self.last_cue += 1;
        self.cues.insert((self.now + after, self.last_cue), cue);
    }

    pub(super) fn command(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let node = |place: usize| node_of(words[place]);
        let order = |stage: &mut Stage, node, command| stage.give(node, Event::Command(command));
        match words[0] {
            "nodes" => {
                let all: NodeSet = words[1..].iter().map(|word| node_of(word)).collect();
                for node in all.iter() {
                    self.add(node);
                }
                for node in all.iter() {
                    self.start(node, all.without(node));
                }
            }
            // A pair in sync, its machine running on the first; how it came about is another story.
            "mirrored" => {
                for line in
                    ["nodes a b", "lead a", "run 100", "connect a b", "run 300", "caught-up a b", "run 600"]
                {
                    self.command(line);
                }
                self.told.clear();
            }
            "start" => {
                let peers = self.players.keys().copied().filter(|&other| other != node(1)).collect();
                self.start(node(1), peers);
            }
            "connect" => self.connect(node(1), node(2)),
            "cut" => self.cut(node(1), node(2)),
            "run" => self.run(millis(words[1].parse().expect("milliseconds"))),
            "lead" => order(self, node(1), Command::Lead),
            "hand-over" => order(self, node(1), Command::Handover { to: node(2) }),
            "move-register" => order(self, node(1), Command::MoveRegister { to: SECOND_REGISTER }),
            // A new copy, told where its group lives now.
            "protect" => {
                self.register = SECOND_REGISTER;
                self.add(node(2));
                self.start(node(2), NodeSet::only(node(1)));
                order(self, node(1), Command::AddPeer { node: node(2) });
            }
            "rejoin" => order(self, node(1), Command::Rejoin),
            "remove" => order(self, node(1), Command::RemovePeer { node: node(2) }),
            "force" => {
                let into = words.iter().position(|&word| word == "into").map(|place| words[place + 1]);
                let named = |id| RegisterId(u128::from_str_radix(id, 16).expect("a register's id"));
                let command = Command::Force {
                    confirmed_fenced: words.contains(&"fenced"),
                    new_register: into.map_or(SECOND_REGISTER, named),
                    old_register_lost: words.contains(&"register-lost"),
                };
                order(self, node(1), command);
            }
            "caught-up" => self.give(node(1), Event::PeerCaughtUp { node: node(2) }),
            "blocks" => self.give(node(1), Event::CommitBlockedBy { node: node(2) }),
            "disk-fails" => self.give(node(1), Event::LocalDiskFailed),
            "loses-records" => self.give(node(1), Event::CopyUsable(false)),
            "unusable" => self.players.get_mut(&node(1)).expect("a node").usable = false,
            "kill" => self.crash(node(1), false),
            "power-off" => self.crash(node(1), true),
            "register" => match words[1] {
                "cut-off" => self.cut_off = words[2..].iter().map(|word| node_of(word)).collect(),
                "forgets" => self.forgot = true,
                "mute" => self.mute = true,
                "hold" => self.held = Some(Vec::new()),
                "lose" => self.lost = words[2..].iter().map(|word| node_of(word)).collect(),
                "back" => {
                    self.cut_off = NodeSet::default();
                    self.mute = false;
                    self.held = None;
                    self.lost = NodeSet::default();
                }
                "late" => {
                    for cue in self.held.take().unwrap_or_default() {
                        self.cue(Duration::ZERO, cue);
                    }
                }
                other => panic!("register {other}?"),
            },
            "show" => self.show_beacons = true,
            "hide" => self.show_beacons = false,
            "status" => self.tell_status(),
            other => panic!("{other}?"),
        }
    }

    fn add(&mut self, node: NodeId) {
        let player = Player {
            member: None,
            life: 0,
            persisted: PersistentState::default(),
            usable: true,
            machine: Machine::Absent,
            lease: None,
        };
        self.players.insert(node, player);
    }

    fn start(&mut self, node: NodeId, peers: NodeSet) {
        let now = self.now;
        let player = self.players.get_mut(&node).expect("a node");
        player.life += 1;
        let config = Config {
            me: node,
            group: GroupId(1),
            peers,
            register: self.register,
            timing: Timing::default(),
            nonce_seed: node.0 * 1000 + u128::from(player.life) * 100,
        };
        player.member = Some(Member::new(config, player.persisted.clone(), player.usable, now));
        let seen = if player.machine == Machine::Absent { Event::VmStopped } else { Event::VmRunning };
        self.say(&format!("{} starts", name(node)));
        self.give(node, seen);
    }

    fn crash(&mut self, node: NodeId, power: bool) {
        self.say(&format!("{} {}", name(node), if power { "loses power" } else { "is killed" }));
        let player = self.players.get_mut(&node).expect("a node");
        player.member = None;
        player.life += 1;
        if power {
            player.machine = Machine::Absent;
            player.lease = None;
        }
        let open: Vec<_> = self.sessions.keys().copied().filter(|&(a, b)| a == node && a != b).collect();
        for (_, other) in open {
            self.sessions.remove(&(node, other));
            if let Some(session) = self.sessions.remove(&(other, node)) {
                self.give(other, Event::PeerDisconnected { node, session });
            }
        }
    }

    fn connect(&mut self, a: NodeId, b: NodeId) {
        self.last_session += 1;
        let session = SessionId(self.last_session);
        self.sessions.insert((a, b), session);
        self.sessions.insert((b, a), session);
        self.give(a, Event::PeerConnected { node: b, session });
        self.give(b, Event::PeerConnected { node: a, session });
    }

    /// The link goes dark: nobody sees a close.
    fn cut(&mut self, a: NodeId, b: NodeId) {
        self.sessions.remove(&(a, b));
        self.sessions.remove(&(b, a));
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let cue = self.cues.first_key_value().map(|((at, _), _)| *at);
            let member = self.players.values().filter_map(|player| player.member.as_ref()?.next_wake()).min();
            let guard = self.players.values().filter_map(|player| player.lease).min();
            let next = [cue, member, guard].into_iter().flatten().min().unwrap_or(end).max(self.now);
            if next > end {
                break;
            }
            self.now = next;
            self.guards();
            if cue.is_some_and(|at| at <= next) {
                let (_, cue) = self.cues.pop_first().expect("it is there");
                self.play(cue);
            } else if member.is_some_and(|at| at <= next) {
                let due = self.players.iter().find_map(|(&node, player)| {
                    (player.member.as_ref()?.next_wake()? <= next).then_some(node)
                });
                self.give(due.expect("somebody is due"), Event::Tick);
            } else if next == end {
                break;
            }
        }
        self.now = end;
    }

    fn guards(&mut self) {
        let now = self.now;
        let ended: Vec<NodeId> = self
            .players
            .iter_mut()
            .filter(|(_, player)| player.lease.is_some_and(|until| until <= now))
            .map(|(&node, player)| {
                player.lease = None;
                (node, std::mem::replace(&mut player.machine, Machine::Paused), player)
            })
            .filter_map(|(node, before, player)| {
                player.machine = if before == Machine::Running { Machine::Paused } else { before };
                (before == Machine::Running).then_some(node)
            })
            .collect();
        for node in ended {
            self.say(&format!("guard of {}: the lease is over, the vCPUs stop", name(node)));
        }
    }

    fn play(&mut self, cue: Cue) {
        match cue {
            Cue::Message { from, to, session, message } => {
                if self.sessions.get(&(to, from)) == Some(&session) {
                    self.give(to, Event::Message { from, session, message });
                }
            }
            Cue::Fact { node, life, event } => self.give_in(node, life, event),
            Cue::Written { node, life, state, event } => {
                if self.players[&node].life == life {
                    self.players.get_mut(&node).expect("a node").persisted = state;
                }
                self.give_in(node, life, event);
            }
            Cue::Read { node, life, request, register } => {
                let outcome = if self.cut_off.contains(node) || self.mute {
                    ReadOutcome::Unreachable
                } else if self.forgot && register == FIRST_REGISTER {
                    ReadOutcome::Amnesiac
                } else {
                    ReadOutcome::Value(self.registers.get(&register).cloned())
                };
                self.give_in(node, life, Event::RegisterRead { request, outcome });
            }
            Cue::Swap { node, life, request, register, expected, value } => {
                if self.cut_off.contains(node) {
                    let event = Event::RegisterSwapped { request, outcome: SwapOutcome::Unknown };
                    return self.give_in(node, life, event);
                }
                let current = self.registers.get(&register).map(|value| value.epoch);
                let outcome = if current == expected {
                    self.say(&format!("{}: {}", register_in_words(register), value_in_words(&value)));
                    self.registers.insert(register, value);
                    SwapOutcome::Won
                } else {
                    SwapOutcome::Lost(self.registers.get(&register).cloned())
                };
                let outcome = if self.mute { SwapOutcome::Unknown } else { outcome };
                self.give_in(node, life, Event::RegisterSwapped { request, outcome });
            }
            Cue::MachineStarts { node } => {
                self.players.get_mut(&node).expect("a node").machine = Machine::Running;
                self.say(&format!("machine runs on {}", name(node)));
                self.give(node, Event::VmRunning);
                let running = self.players.values().filter(|p| p.machine == Machine::Running).count();
                assert!(running <= 1, "the machine runs twice");
            }
            Cue::MachineEnds { node } => {
                self.players.get_mut(&node).expect("a node").machine = Machine::Absent;
                self.say(&format!("machine gone from {}", name(node)));
                self.give(node, Event::VmStopped);
            }
        }
    }

    fn give_in(&mut self, node: NodeId, life: u32, event: Event) {
        if self.players[&node].life == life {
            self.give(node, event);
        }
    }

    fn give(&mut self, node: NodeId, event: Event) {
        let now = self.now;
        let Some(member) = self.players.get_mut(&node).and_then(|player| player.member.as_mut()) else {
            return;
        };
        let mut out = Vec::new();
        member.handle(event, now, &mut out);
        for action in out {
            self.perform(node, action);
        }
    }

    fn perform(&mut self, node: NodeId, action: Action) {
        let life = self.players[&node].life;
        if let Some(words) = self.in_words(&action) {
            let line = format!("{} {words}", name(node));
            // A refusal is repeated with every beacon.
            let repeated = matches!(&action, Action::Send { message: Message::Nack { .. }, .. })
                && std::mem::replace(&mut self.last_no, line.clone()) == line;
            if !repeated {
                self.say(&line);
            }
        }
        let fact = |event| Cue::Fact { node, life, event };
        match action {
            Action::ReadRegister { request, register } => {
                let after = if self.cut_off.contains(node) { millis(1000) } else { millis(5) };
                self.cue(after, Cue::Read { node, life, request, register });
            }
            Action::SwapRegister { request, register, expected, value } => {
                let cue = Cue::Swap { node, life, request, register, expected, value };
                if self.lost.contains(node) {
                    let event = Event::RegisterSwapped { request, outcome: SwapOutcome::Unknown };
                    self.cue(millis(1000), Cue::Fact { node, life, event });
                } else if let Some(held) = &mut self.held {
                    held.push(cue);
                    let event = Event::RegisterSwapped { request, outcome: SwapOutcome::Unknown };
                    self.cue(millis(1000), Cue::Fact { node, life, event });
                } else {
                    let after = if self.cut_off.contains(node) { millis(1000) } else { millis(5) };
                    self.cue(after, cue);
                }
            }
            Action::Persist { state, receipt } => {
                self.cue(millis(2), Cue::Written { node, life, state, event: Event::Persisted { receipt } });
            }
            Action::Send { to, session, message } => {
                self.cue(millis(1), Cue::Message { from: node, to, session, message });
            }
            Action::Activate { term, .. } => self.cue(millis(10), fact(Event::TailCommitted { term })),
            Action::Drain { term } => self.cue(millis(10), fact(Event::Drained { term })),
            Action::RunVm { .. } => {
                if self.players[&node].machine == Machine::Absent {
                    self.cue(millis(20), Cue::MachineStarts { node });
                } else {
                    self.players.get_mut(&node).expect("a node").machine = Machine::Running;
                }
            }
            Action::ResumeVm => self.players.get_mut(&node).expect("a node").machine = Machine::Running,
            Action::PauseVm => {
                let player = self.players.get_mut(&node).expect("a node");
                if player.machine == Machine::Running {
                    player.machine = Machine::Paused;
                }
            }
            Action::ShutDownVm | Action::KillVm => self.cue(millis(20), Cue::MachineEnds { node }),
            Action::RenewLease { until } => {
                self.players.get_mut(&node).expect("a node").lease = Some(until);
            }
            Action::CloseSession { why, .. } => panic!("an honest peer {why}"),
            Action::InformRegister { .. }
            | Action::ContinueIn { .. }
            | Action::SetAcknowledgers { .. }
            | Action::Freeze
            | Action::Thaw
            | Action::Follow { .. }
            | Action::StepDown
            | Action::Report(_) => {}
        }
    }

    fn in_words(&self, action: &Action) -> Option<String> {
        Some(match action {
            Action::ReadRegister { .. } => "reads the register".to_owned(),
            Action::SwapRegister { register, expected, value, .. } => {
                let expected = expected.map_or("nothing".to_owned(), epoch);
                let of = if *register == FIRST_REGISTER {
                    String::new()
                } else {
                    format!(" of {}", register_in_words(*register))
                };
                format!("swaps {expected}{of} for {}", value_in_words(value))
            }
            Action::InformRegister { .. } => "tells the register what it knows".to_owned(),
            Action::Persist { state, .. } => format!(
                "writes down: promise {}, opened {}.{}, known {}, {} open",
                epoch(state.promise),
                epoch(state.activated.epoch),
                state.activated.incarnation,
                epoch(state.known_epoch()),
                state.attempts.len(),
            ),
            Action::Send { to, message, .. } => match message {
                Message::Beacon { .. } | Message::BeaconAck { .. } if !self.show_beacons => return None,
                Message::Beacon { term, .. } => {
                    format!("to {}: beacon of {}.{}", name(*to), epoch(term.epoch), term.incarnation)
                }
                Message::BeaconAck { .. } => format!("to {}: heard you", name(*to)),
                Message::Hello { promise, .. } => {
                    format!("to {}: hello, my promise is {}", name(*to), epoch(*promise))
                }
                Message::Nack { promise, .. } => {
                    format!("to {}: no, I promised {}", name(*to), epoch(*promise))
                }
                Message::Leaving => format!("to {}: I leave", name(*to)),
                Message::YourTurn { epoch: of } => {
                    format!("to {}: your turn, epoch {}", name(*to), epoch(*of))
                }
                Message::StepAside { .. } => format!("to {}: I step aside", name(*to)),
            },
            Action::Activate { term, acknowledgers } => {
                format!("activates {}.{}, with {}", epoch(term.epoch), term.incarnation, names(acknowledgers))
            }
            Action::ContinueIn { term, acknowledgers } => {
                format!(
                    "continues in {}.{}, with {}",
                    epoch(term.epoch),
                    term.incarnation,
                    names(acknowledgers)
                )
            }
            Action::SetAcknowledgers { nodes } => format!("needs {}", names(nodes)),
            Action::Freeze => "freezes".to_owned(),
            Action::Thaw => "thaws".to_owned(),
            Action::Drain { .. } => "drains".to_owned(),
            Action::Follow { primary, term } => {
                format!("follows {} in {}.{}", name(*primary), epoch(term.epoch), term.incarnation)
            }
            Action::CloseSession { why, .. } => format!("closes a session: {why}"),
            Action::StepDown => "steps down".to_owned(),
            Action::RunVm { .. } => "lets the machine run".to_owned(),
            Action::RenewLease { until } => {
                if !self.show_beacons {
                    return None;
                }
                let at = until.since(START).as_millis();
                format!("renews the lease until {}.{:03}", at / 1000, at % 1000)
            }
            Action::PauseVm => "pauses the machine".to_owned(),
            Action::ResumeVm => "resumes the machine".to_owned(),
            Action::ShutDownVm => "shuts the machine down".to_owned(),
            Action::KillVm => "kills the machine".to_owned(),
            Action::Report(condition) => match condition {
                Condition::Leading { .. } | Condition::Following { .. } => return None,
                condition => {
                    format!("reports {condition:?}").replace("NodeId(1)", "a").replace("NodeId(2)", "b")
                }
            },
        })
    }

    fn tell_status(&mut self) {
        let lines: Vec<String> = self
            .players
            .iter()
            .map(|(&node, player)| {
                let Some(member) = &player.member else { return format!("{}: down", name(node)) };
                let status = member.status();
                let primary = status.primary.map_or("nobody".to_owned(), |primary| name(primary).to_string());
                format!(
                    "{}: {:?}, primary {primary}, epoch {}, in sync {}, frozen {:?}, machine {:?}",
                    name(node),
                    status.role,
                    epoch(status.epoch),
                    names(&status.in_sync),
                    status.frozen,
                    player.machine,
                )
            })
            .collect();
        for line in lines {
            self.say(&line);
        }
    }
}

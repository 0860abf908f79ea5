//! The guest's requests on their way to the daemon and back.

use crate::faults::Planted;
use crate::history::Request;
use crate::pattern::{self, Tag};
use crate::world::{DaemonEvent, Event, World};
use rempart_engine::{DiskRange, ReadPiece, Reply, Token};
use rempart_store::FileId;
use std::collections::BTreeSet;
use std::time::Duration;

impl World {
    /// Plans the guest's next requests, unless they are planned already.
    pub(crate) fn wake_guest(&mut self, node: usize) {
        let Some(machine) = &mut self.nodes[node].machine else { return };
        if machine.booted && !std::mem::replace(&mut machine.burst_planned, true) {
            let nonce = machine.nonce;
            self.after(Duration::from_millis(1), Event::Burst { node, nonce });
        }
    }

    /// The guest makes a few requests, if it runs and has room for more.
    pub(crate) fn burst(&mut self, node: usize, nonce: u64) {
        let runs = self.machine_runs(node);
        let now = self.now();
        let Some(machine) = self.nodes[node].machine.as_mut().filter(|machine| machine.nonce == nonce) else {
            return;
        };
        machine.burst_planned = false;
        // What stops it wakes it again.
        if !runs || self.quiet {
            return;
        }
        machine.burst_planned = true;
        let workload = machine.workload.clone();
        if let Some(life) = machine.life {
            for _ in 0..workload.burst(&mut self.rng) {
                if self.history.in_flight(life).len() >= workload.depth {
                    break;
                }
                let request = workload.request(&mut self.rng);
                let tag = self.history.begin(life, request, now);
                self.hand_over(node, tag);
            }
        }
        let pause = workload.pause(&mut self.rng);
        self.after(pause, Event::Burst { node, nonce });
    }

    /// Puts a request into the daemon's socket, if there is a connection; otherwise it waits for the next one.
    pub(crate) fn hand_over(&mut self, node: usize, tag: Tag) {
        let node_state = &mut self.nodes[node];
        let (Some(machine), Some(daemon)) = (&mut node_state.machine, &mut node_state.daemon) else { return };
        if machine.connection.open {
            machine.connection.sent.insert(tag);
            daemon.inbox.push_back(tag);
            // One look at the socket takes all that is in it.
            if daemon.inbox.len() == 1 {
                self.tell_daemon(node, Duration::from_micros(5), DaemonEvent::GuestRequests);
            }
        }
    }

    /// The machine's driver connects, and sends again what was not answered.
    pub(crate) fn reconnect(&mut self, node: usize, nonce: u64) {
        let now = self.now();
        let frozen = self.nodes[node].frozen;
        let node_state = &mut self.nodes[node];
        let Some(machine) = node_state.machine.as_mut().filter(|machine| machine.nonce == nonce) else {
            return;
        };
        // A machine that never asked for anything and was stopped will not begin now.
        if machine.connection.open || (machine.life.is_none() && machine.stopped_by_guard) {
            return;
        }
        // One connection is finished before its successor is served.
        let ready =
            node_state.daemon.as_ref().is_some_and(|daemon| !daemon.frozen && daemon.leftover.is_empty());
        if !ready || frozen {
            let pause = self.rng.duration(Duration::from_millis(20)..Duration::from_millis(150));
            return self.after(pause, Event::Reconnect { node, nonce });
        }
        machine.connection.open = true;
        let life = match machine.life {
            Some(life) => life,
            None => {
                let life = self.history.machine_started(now);
                machine.life = Some(life);
                life
            }
        };
        let waiting = self.history.in_flight(life).to_vec();
        for tag in waiting {
            self.history.resent(tag);
            self.hand_over(node, tag);
        }
        self.wake_guest(node);
    }

    /// The daemon takes what is in its socket, as far as it wants more.
    pub(crate) fn take_guest_requests(&mut self, node: usize) {
        let mut early = Vec::new();
        loop {
            let Some(daemon) = &mut self.nodes[node].daemon else { return };
            if daemon.inbox.is_empty() || !daemon.engine.accepts_writes() {
                break;
            }
            let tag = daemon.inbox.pop_front().expect("not empty");
            let token = Token(tag.0);
            let range = |span: &crate::history::Span| DiskRange {
                disk: span.disk,
                offset: span.offset(),
                length: span.length(),
            };
            match (self.options.planted, self.history.request(tag)) {
                (Some(Planted::WriteAnsweredEarly), Request::Write { fua: false, .. }) if tag.0 % 4 == 0 => {
                    early.push(token);
                }
                (Some(Planted::FlushAnsweredEarly), Request::Flush) => early.push(token),
                (Some(Planted::DiscardDropped), Request::Zero { discard: true, .. }) => {
                    early.push(token);
                    continue;
                }
                _ => {}
            }
            match self.history.request(tag) {
                Request::Write { span, fua } => {
                    let sectors = span.sectors.end - span.sectors.start;
                    let bytes = pattern::fill(tag, span.disk, span.sectors.start, sectors);
                    let fua = *fua && self.options.planted != Some(Planted::FuaIgnored);
                    daemon.engine.write(token, span.disk, span.offset(), &bytes, fua);
                }
                Request::Zero { span, discard: true } => daemon.engine.discard(token, range(span), false),
                Request::Zero { span, discard: false } => {
                    daemon.engine.write_zeroes(token, range(span), tag.0 % 2 == 0, false);
                }
                Request::Read { span } => daemon.engine.read(token, range(span)),
                Request::Flush => daemon.engine.flush(token),
            }
        }
        for token in early {
            self.reply(node, token, Reply::Done);
        }
        if self.options.planted == Some(Planted::ConnectionNotDrained) {
            self.take_zombie(node);
        }
    }

    /// The daemon answers a guest.
    pub(crate) fn reply(&mut self, node: usize, token: Token, reply: Reply) {
        let now = self.now();
        let tag = Tag(token.0);
        if let Some(daemon) = &mut self.nodes[node].daemon
            && daemon.leftover.remove(&token)
        {
            return; // Of a connection that is no more.
        }
        let Some(machine) = &mut self.nodes[node].machine else { return };
        if !machine.connection.sent.remove(&tag) {
            return;
        }
        match reply {
            Reply::Done => {
                self.tell_request("done", tag);
                self.note_stall(tag);
                let covered = self.history.covers(tag).to_vec();
                let result = self.history.acknowledged(tag, now);
                self.must(result);
                if !covered.is_empty() && self.rng.chance(8) {
                    self.audit_flush(&covered);
                }
            }
            Reply::Data(pieces) => {
                let mut bytes = Vec::new();
                for piece in pieces {
                    match piece {
                        ReadPiece::Data(data) => bytes.extend_from_slice(&data),
                        ReadPiece::Zeroes(count) => bytes.resize(bytes.len() + count as usize, 0),
                    }
                }
                self.tell_request("read", tag);
                self.note_stall(tag);
                if self.options.planted == Some(Planted::ReadsFromImage)
                    && let Some(span) = self.history.request(tag).span()
                {
                    let image = self.nodes[node].drive.disk.content(FileId::Image(span.disk));
                    let range = span.offset() as usize..(span.offset() + span.length()) as usize;
                    image.and_then(|image| image.get(range).map(|found| bytes.copy_from_slice(found)));
                }
                let result = self.history.read(tag, &bytes, now);
                self.must(result);
            }
            Reply::Failed(error) => {
                self.tell(|| format!("node {node}: request {} failed: {error}", tag.0));
                self.reached("guest request failed");
                self.history.refused(tag, now);
            }
            Reply::Dropped => {
                machine.connection.sent.insert(tag);
                self.close_connection(node);
            }
        }
    }

    /// The daemon hangs up; the guest's driver tries again later.
    pub(crate) fn close_connection(&mut self, node: usize) {
        let Some(machine) = &mut self.nodes[node].machine else { return };
        if !std::mem::replace(&mut machine.connection.open, false) {
            return;
        }
        let (nonce, sent) = (machine.nonce, std::mem::take(&mut machine.connection.sent));
        self.abandon(node, sent);
        let pause = self.rng.duration(Duration::from_millis(10)..Duration::from_millis(100));
        self.after(pause, Event::Reconnect { node, nonce });
    }

    /// The daemon sees that a connection is gone, with these requests unanswered.
    pub(crate) fn abandon(&mut self, node: usize, sent: BTreeSet<Tag>) {
        let Some(daemon) = &mut self.nodes[node].daemon else { return };
        // What it had not taken yet it never will.
        let untaken: BTreeSet<Tag> = std::mem::take(&mut daemon.inbox).into_iter().collect();
        let tokens: Vec<Token> = sent.difference(&untaken).map(|tag| Token(tag.0)).collect();
        if self.options.planted == Some(Planted::ConnectionNotDrained) {
            daemon.zombies.extend(&sent);
        }
        if !tokens.is_empty() {
            daemon.leftover.extend(daemon.engine.abandon(&tokens));
            self.plan_turn(node);
        }
    }

    /// A bug: a write of a connection that is gone is taken now.
    fn take_zombie(&mut self, node: usize) {
        let Some(daemon) = &mut self.nodes[node].daemon else { return };
        if !daemon.engine.accepts_writes() || !self.rng.chance(100) {
            return;
        }
        let Some(tag) = daemon.zombies.pop_front() else { return };
        if let Request::Write { span, .. } = self.history.request(tag) {
            let sectors = span.sectors.end - span.sectors.start;
            let bytes = pattern::fill(tag, span.disk, span.sectors.start, sectors);
            daemon.engine.write(Token(tag.0), span.disk, span.offset(), &bytes, false);
        }
    }

    fn tell_request(&mut self, what: &str, tag: Tag) {
        if self.trace.is_on() {
            let line = format!("guest: {what} {} {:?}", tag.0, self.history.request(tag));
            self.tell(|| line);
        }
    }

    fn note_stall(&mut self, tag: Tag) {
        self.answered += 1;
        let waited = self.now().since(self.history.started(tag));
        self.longest_stall = self.longest_stall.max(waited);
    }
}

//! The start of a term: what the acknowledgers hold that this replica does not.

use crate::leader::{Leader, Phase};
use crate::link::Progress;
use crate::local::Local;
use crate::recent::RecentBytes;
use crate::{Action, BatchInfo, LogState, Message, Report};
use rempart_types::{MonotonicTime, NodeId};

impl Leader {
    /// Goes on once every acknowledger told what it holds.
    pub fn gather(&mut self, local: &mut Local, now: MonotonicTime, out: &mut Vec<Action>) {
        let Phase::Gathering { until } = self.phase else { return };
        // What the leader before ordered is under way in the store. What the log ends with is not decided before.
        if local.busy > 0 {
            return;
        }
        if self.look_for_loss(local, out) {
            return;
        }
        let progress = |peer: NodeId| self.links.get(&peer).map(|link| &link.progress);
        let others = self.acknowledgers.others(local.node);
        // Who promised a later term tells what it holds when this leader is there, too; nothing is committed before.
        let (refused, silent): (Vec<NodeId>, Vec<NodeId>) = others
            .filter(|&peer| !matches!(progress(peer), Some(Progress::Known(_))))
            .partition(|&peer| matches!(progress(peer), Some(Progress::Refused)));
        if !silent.is_empty() {
            // Without them nothing would be committed anyway, and they may hold what is missing here. Only what left
            // is given up.
            if now >= until {
                self.phase = Phase::Gathering { until: now + local.config.adoption_wait };
                out.extend(silent.into_iter().map(|peer| Action::BlockedBy { peer }));
            }
            return;
        }
        if !refused.is_empty() {
            return;
        }
        let longer =
            self.longer_logs(local).map(|(peer, state)| (state.lineage.last_term(), state.end, peer));
        let Some((_, end, peer)) = longer.max() else { return self.start(local, out) };
        let link = self.links.get_mut(&peer).expect("it answered");
        link.progress = Progress::Pulling { end };
        link.asked_at = now;
        let first = local.end.next();
        link.send(Message::Pull { term: self.term, from: first }, None, out);
        self.phase = Phase::Adopting { from: peer, first, until: now + local.config.answer_deadline };
    }

    /// Acknowledgers that hold all of this log and more, in whole copies.
    fn longer_logs<'a>(&'a self, local: &'a Local) -> impl Iterator<Item = (NodeId, &'a LogState)> {
        self.acknowledgers.others(local.node).filter_map(|peer| {
            let Progress::Known(state) = &self.links.get(&peer)?.progress else { return None };
            let usable = state.syncing.is_none() && !state.image_unknown;
            let common = local.lineage.common_point(local.end, &state.lineage, state.end);
            let extends = common == local.end && state.end > local.end;
            (usable && extends).then_some((peer, &**state))
        })
    }

    /// What a member of the in-sync set calls stable was durable here, too. If the log ends before, it is not a torn
    /// tail that recovery cut off: this copy lost what it had flushed. Its image is not to be trusted either, and the
    /// member may have trimmed the records: that one leads, and this copy is brought up again.
    fn look_for_loss(&mut self, local: &mut Local, out: &mut Vec<Action>) -> bool {
        let known = self.longer_logs(local).map(|(peer, state)| (state.stable.min(state.end), peer));
        let Some((upto, peer)) = known.max().filter(|(upto, _)| *upto > local.end) else { return false };
        self.phase = Phase::Lost;
        local.image_unknown = true;
        local.whole = false;
        out.push(Action::Report(Report::Lost { peer, end: local.end, upto }));
        out.push(Action::CopyLost { upto });
        true
    }

    pub fn start(&mut self, local: &Local, out: &mut Vec<Action>) {
        self.recent = RecentBytes::new(local.end);
        self.phase = Phase::Starting;
        out.push(Action::StartTerm { term: self.term });
    }

    /// A member sent a batch of its longer log. False if it is not the next.
    pub fn pulled(
        &mut self,
        peer: NodeId,
        batch: BatchInfo,
        local: &mut Local,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) -> bool {
        let Phase::Adopting { from, first, .. } = self.phase else { return true };
        let Some(link) = self.links.get_mut(&peer) else { return true };
        let (Progress::Pulling { end }, Some(session)) = (&link.progress, link.session) else { return true };
        let end = *end;
        let follows = batch.first == local.end.next() && batch.last >= batch.first;
        let sound = follows && batch.last <= end && batch.bytes > 0;
        if from != peer || !sound || batch.term < local.lineage.last_term() || batch.term >= self.term {
            return false;
        }
        local.append(batch.term, batch.first, batch.last, out);
        out.push(Action::AppendForeign { peer, session, batch });
        if local.end >= end {
            out.push(Action::Report(Report::Adopted { from: peer, first, last: local.end }));
            link.probe(self.term, now, out);
            self.start(local, out);
        }
        true
    }

    /// The store did not take what a member sent.
    pub fn append_refused(&mut self, local: &Local, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Adopting { from, .. } => {
                self.links[&from].close("sent records that do not fit", out);
                self.start(local, out);
            }
            // They were to be the last that it takes over.
            Phase::Starting => self.recent = RecentBytes::new(local.end),
            _ => {}
        }
    }
}

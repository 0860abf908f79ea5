use super::*;
use std::collections::VecDeque;

const W: Duration = Duration::from_secs(1);
const ASKER: Asker = Asker { connection: 1, request: 1 };

fn at(millis: u64) -> MonotonicTime {
    MonotonicTime(millis * 1_000_000)
}

fn until(millis: u64) -> Lease {
    Lease::until(at(millis))
}

/// Plays one story: each input at its time, and what came of it.
fn told(watch: &mut Watch, story: &[(u64, Input)]) -> Vec<Vec<Action>> {
    story
        .iter()
        .map(|(millis, input)| {
            let mut out = Vec::new();
            watch.handle(input.clone(), at(*millis), &mut out);
            out
        })
        .collect()
}

fn running(lease: Lease) -> Watch {
    let mut watch = Watch::new(lease, W, true);
    let out =
        told(&mut watch, &[(0, Input::MonitorReady), (1, Input::Resumed), (1, Input::ContAnswered(Ok(())))]);
    assert_eq!(out, [vec![Action::SendCont], vec![Action::TellResumed], vec![]]);
    watch
}

#[test]
fn a_lease_that_runs_out_pauses_the_machine() {
    let mut watch = running(until(3000));
    assert_eq!(watch.next_wake(), Some(at(3000)));
    let out = told(&mut watch, &[(2999, Input::Tick), (3000, Input::Tick), (3020, Input::Stopped)]);
    assert_eq!(out[0], []);
    assert_eq!(out[1], [Action::TellLeaseExpired, Action::SendStop]);
    assert_eq!(out[2], [Action::TellPaused(PauseCause::Lease)]);
    assert_eq!((watch.run_state(), watch.next_wake()), (RunState::Paused, None));
}

#[test]
fn a_pause_that_is_not_confirmed_in_time_kills() {
    let mut watch = running(until(3000));
    told(&mut watch, &[(3000, Input::Tick)]);
    assert_eq!(watch.next_wake(), Some(at(3500)));
    // Some thread of QEMU does not even stop for the kernel.
    let out = told(
        &mut watch,
        &[(3500, Input::Tick), (3999, Input::Tick), (4000, Input::Tick), (4001, Input::Tick)],
    );
    assert_eq!(out, [vec![Action::Freeze], vec![], vec![Action::Kill], vec![]]);
    assert_eq!(watch.killed(), Some(ExitCause::Lease));
}

#[test]
fn a_qemu_that_waits_for_its_disks_is_frozen_and_not_killed() {
    let mut watch = running(until(3000));
    let out = told(
        &mut watch,
        &[(3000, Input::Tick), (3500, Input::Tick), (3501, Input::Frozen), (9000, Input::Tick)],
    );
    assert_eq!(out[1], [Action::Freeze]);
    assert_eq!(out[2], [Action::TellPaused(PauseCause::Lease)]);
    assert_eq!(out[3], []);
    // The daemon is back, and its disks answer.
    let out = told(
        &mut watch,
        &[
            (9000, Input::Renew(ASKER, until(12_000))),
            (9000, Input::Resume(ASKER)),
            (9001, Input::Thawed),
            (9002, Input::Stopped),
            (9002, Input::StopAnswered),
            (9003, Input::Resumed),
        ],
    );
    assert_eq!(out[1], [Action::Thaw, Action::SendCont]);
    assert_eq!([&out[2][..], &out[3], &out[4]], [[], [], []]);
    assert_eq!(out[5], [Action::TellResumed, Action::Answer(ASKER, Ok(()))]);
}

#[test]
fn a_pause_on_request_does_not_wait_for_the_disks_either() {
    let mut watch = running(Lease::Unlimited);
    let out = told(&mut watch, &[(100, Input::Pause(ASKER)), (600, Input::Tick), (601, Input::Frozen)]);
    assert_eq!(out[0], [Action::SendStop]);
    assert_eq!(out[1], [Action::Freeze]);
    assert_eq!(out[2], [Action::TellPaused(PauseCause::Request), Action::Answer(ASKER, Ok(()))]);
}

#[test]
fn a_qemu_that_stopped_while_it_was_being_frozen_goes_on_at_once() {
    let mut watch = running(until(3000));
    let out = told(
        &mut watch,
        &[(3000, Input::Tick), (3500, Input::Tick), (3500, Input::Stopped), (3501, Input::Frozen)],
    );
    assert_eq!(out[2], [Action::TellPaused(PauseCause::Lease)]);
    assert_eq!(out[3], [Action::Thaw]);
    assert_eq!(watch.run_state(), RunState::Paused);
}

#[test]
fn a_qemu_that_somebody_else_froze_is_killed() {
    let mut watch = running(until(3000));
    let out = told(
        &mut watch,
        &[(1000, Input::Frozen), (3000, Input::Tick), (3500, Input::Tick), (4000, Input::Tick)],
    );
    assert_eq!(out[1..], [vec![Action::TellLeaseExpired, Action::SendStop], vec![], vec![Action::Kill]]);
}

#[test]
fn a_frozen_machine_that_somebody_else_thaws_after_its_lease_is_killed() {
    let mut watch = running(until(3000));
    told(&mut watch, &[(3000, Input::Tick), (3500, Input::Tick), (3501, Input::Frozen)]);
    let out = told(&mut watch, &[(9000, Input::Thawed)]);
    assert!(out[0].contains(&Action::Kill), "{out:?}");
}

#[test]
fn a_guard_that_slept_past_the_time_to_stop_kills_at_once() {
    let mut watch = running(until(3000));
    let out = told(&mut watch, &[(60_000, Input::Tick)]);
    assert_eq!(out, [vec![Action::TellLeaseExpired, Action::SendStop, Action::Kill]]);
}

#[test]
fn a_lease_only_gets_longer_and_not_beyond_the_bound() {
    let mut watch = running(until(3000));
    told(&mut watch, &[(1000, Input::Renew(ASKER, until(4000))), (1100, Input::Renew(ASKER, until(3500)))]);
    assert_eq!(watch.lease(), until(4000));
    let out = told(&mut watch, &[(1200, Input::Renew(ASKER, until(61_201)))]);
    assert_eq!(out, [vec![Action::Answer(ASKER, Err("a lease is at most 60 s long".into()))]]);
    assert_eq!(watch.lease(), until(4000));
}

#[test]
fn a_machine_paused_by_its_lease_waits_for_an_explicit_resume() {
    let mut watch = running(until(3000));
    told(&mut watch, &[(3000, Input::Tick), (3010, Input::Stopped)]);
    let out = told(
        &mut watch,
        &[
            (3500, Input::Resume(ASKER)),
            (5000, Input::Renew(ASKER, until(8000))),
            (5000, Input::Resume(ASKER)),
        ],
    );
    assert_eq!(out[0], [Action::Answer(ASKER, Err("its lease is over".into()))]);
    assert_eq!(out[1], [Action::Answer(ASKER, Ok(()))]);
    assert_eq!(out[2], [Action::SendCont]);
    let out = told(&mut watch, &[(5001, Input::Resumed)]);
    assert_eq!(out, [vec![Action::TellResumed, Action::Answer(ASKER, Ok(()))]]);
}

#[test]
fn a_stop_seen_before_cont_took_effect_proves_nothing() {
    // QEMU stopped itself (an I/O error) while our cont was on its way: it runs again after that.
    let mut watch = Watch::new(until(3000), W, true);
    told(&mut watch, &[(0, Input::MonitorReady), (1, Input::Stopped)]);
    assert_eq!(watch.run_state(), RunState::Running);
    let out = told(&mut watch, &[(2, Input::Resumed), (3, Input::Stopped)]);
    assert_eq!(out[1], [Action::TellPaused(PauseCause::Qemu)]);
}

#[test]
fn the_late_answer_of_a_stop_does_not_hide_the_resume_behind_it() {
    let mut watch = running(until(3000));
    told(&mut watch, &[(3000, Input::Tick), (3001, Input::Stopped)]);
    // QEMU still waits for I/O in flight; the answer to stop comes after our cont was sent.
    told(&mut watch, &[(5000, Input::Renew(ASKER, until(8000))), (5000, Input::Resume(ASKER))]);
    told(&mut watch, &[(5100, Input::StopAnswered)]);
    assert_eq!(watch.run_state(), RunState::Running);
    told(&mut watch, &[(5101, Input::Resumed), (5101, Input::ContAnswered(Ok(())))]);
    assert_eq!(watch.run_state(), RunState::Running);
}

#[test]
fn a_machine_resumed_behind_the_guards_back_after_its_lease_is_killed() {
    let mut watch = running(until(3000));
    told(&mut watch, &[(3000, Input::Tick), (3001, Input::Stopped)]);
    let out = told(&mut watch, &[(9000, Input::Resumed)]);
    assert_eq!(out, [vec![Action::TellResumed, Action::TellLeaseExpired, Action::SendStop, Action::Kill]]);
}

#[test]
fn a_machine_whose_lease_was_over_before_it_was_up_does_not_run() {
    let mut watch = Watch::new(until(3000), W, true);
    let out = told(&mut watch, &[(3500, Input::MonitorReady)]);
    assert_eq!(out, [vec![Action::TellLeaseExpired, Action::TellPaused(PauseCause::Lease)]]);
}

#[test]
fn a_machine_without_a_lease_is_never_stopped() {
    let mut watch = running(Lease::Unlimited);
    assert_eq!(watch.next_wake(), None);
    assert_eq!(told(&mut watch, &[(1_000_000, Input::Tick)]), [vec![]]);
    // It gets a peer while it runs.
    told(&mut watch, &[(1_000_000, Input::Renew(ASKER, until(1_003_000)))]);
    assert_eq!(watch.next_wake(), Some(at(1_003_000)));
}

/// QEMU as the guard sees it: commands take effect in order, at any later time, or never.
#[derive(Debug, Default)]
struct Model {
    runs: bool,
    frozen: bool,
    frozen_by_others: bool,
    /// What the kernel has to tell of it: only the latest.
    child_state: Option<Input>,
    commands: VecDeque<Action>,
    heard: VecDeque<Input>,
}

impl Model {
    fn freeze(&mut self) {
        if !self.frozen {
            self.frozen = true;
            self.child_state = Some(Input::Frozen);
        }
    }

    fn thaw(&mut self) {
        if self.frozen {
            self.frozen = false;
            self.child_state = Some(Input::Thawed);
        }
    }

    fn execute_one(&mut self) {
        if self.frozen {
            return;
        }
        match self.commands.pop_front() {
            Some(Action::SendCont) => {
                if !self.runs {
                    self.runs = true;
                    self.heard.push_back(Input::Resumed);
                }
                self.heard.push_back(Input::ContAnswered(Ok(())));
            }
            Some(Action::SendStop) => {
                self.stop_itself();
                self.heard.push_back(Input::StopAnswered);
            }
            _ => {}
        }
    }

    fn stop_itself(&mut self) {
        if self.runs && !self.frozen {
            self.runs = false;
            self.heard.push_back(Input::Stopped);
        }
    }

    fn refuse_one(&mut self) {
        if self.commands.front() == Some(&Action::SendCont) && !self.runs && !self.frozen {
            self.commands.pop_front();
            self.heard.push_back(Input::ContAnswered(Err("no".into())));
        }
    }
}

/// A stream of numbers from a seed (splitmix64): proptest's own machinery is too slow for this many stories.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// Plays one random story to its end or the machine's. The error says what broke the promise.
fn play(seed: u64) -> Result<(), String> {
    let mut chance = Chance(seed);
    let mut watch = Watch::new(until(3000), W, true);
    let mut model = Model::default();
    let mut now = 0;
    let mut inputs = VecDeque::from([Input::MonitorReady]);
    for _ in 0..chance.below(120) {
        match chance.below(16) {
            0 => {
                // The guard's own timer is on time; that it may be late is another test's.
                let target = now + chance.below(2000);
                let wake = watch.next_wake().map_or(u64::MAX, |wake| wake.0 / 1_000_000);
                now = target.min(wake.max(now));
                inputs.push_back(Input::Tick);
            }
            1 | 2 => inputs.push_back(Input::Renew(ASKER, until(now + chance.below(5000)))),
            3 => inputs.push_back(Input::Pause(ASKER)),
            4 => inputs.push_back(Input::Resume(ASKER)),
            5 | 6 => model.execute_one(),
            7 => model.refuse_one(),
            8 => model.stop_itself(),
            9 if chance.below(4) == 0 && !model.frozen => {
                model.frozen_by_others = true;
                model.freeze();
            }
            // That somebody thaws what the guard froze is another test's.
            10 if model.frozen_by_others => {
                model.frozen_by_others = false;
                model.thaw();
            }
            9..=11 => inputs.extend(model.child_state.take()),
            _ => inputs.extend(model.heard.pop_front()),
        }
        for input in inputs.drain(..) {
            let mut out = Vec::new();
            watch.handle(input, at(now), &mut out);
            for action in out {
                match action {
                    Action::SendStop | Action::SendCont => model.commands.push_back(action),
                    Action::Kill => return Ok(()),
                    Action::Freeze => {
                        // Who thaws it from now on undoes the guard's.
                        model.frozen_by_others = false;
                        model.freeze();
                    }
                    Action::Thaw => {
                        model.frozen_by_others = false;
                        model.thaw();
                    }
                    _ => {}
                }
            }
        }
        let Lease::UntilBoottimeNs(end) = watch.lease() else { unreachable!() };
        if at(now) >= MonotonicTime(end) + W && !model.frozen {
            if model.runs {
                return Err(format!("it runs at {now} ms: {watch:?}"));
            }
            if model.commands.contains(&Action::SendCont) {
                return Err(format!("a cont is on its way at {now} ms: {watch:?}"));
            }
        }
    }
    Ok(())
}

/// Whatever QEMU does and however late its events are: when the time to stop is over, the machine is killed, or it
/// stands still and nothing on its way to QEMU could make it run.
#[test]
fn no_machine_runs_after_its_lease_and_the_time_to_stop() {
    for seed in 0..20_000 {
        if let Err(broken) = play(seed) {
            panic!("seed {seed}: {broken}");
        }
    }
}

//! When a schedule is due. No clock: whoever asks says what time it is.

use croner::Cron;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use rempart_types::WallTime;
use std::str::FromStr;

/// A run that begins within this time of when it was due is on time.
const ON_TIME_MS: u64 = 60_000;

/// Cron's pattern in a time zone. At a change of the clocks it goes as with cron: what falls into the hour that is left
/// out runs right after it, what falls into the hour that comes twice runs once.
#[derive(Debug, Clone)]
pub struct Calendar {
    cron: Cron,
    zone: TimeZone,
}

/// What a schedule does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// It was due then.
    Now {
        since: WallTime,
        missed: bool,
    },
    At(WallTime),
    /// Its pattern fits no day to come.
    Never,
}

impl Calendar {
    pub fn parse(pattern: &str, zone: Option<&str>) -> Result<Calendar, String> {
        let zone = match zone {
            Some(name) => TimeZone::get(name).map_err(|_| {
                format!("`{name}` is no time zone that this machine knows; write one such as `Europe/Zurich`")
            })?,
            None => TimeZone::try_system().unwrap_or(TimeZone::UTC),
        };
        let cron = Cron::from_str(pattern)
            .map_err(|e| format!("`{pattern}` is no time in cron's form, such as `15 2 * * *`: {e}"))?;
        Ok(Calendar { cron, zone })
    }

    pub fn zone_name(&self) -> &str {
        self.zone.iana_name().unwrap_or("UTC")
    }

    fn local(&self, time: WallTime) -> Option<Zoned> {
        let time = Timestamp::from_millisecond(i64::try_from(time.0).ok()?).ok()?;
        Some(time.to_zoned(self.zone.clone()))
    }

    /// The first time that is later.
    pub fn after(&self, time: WallTime) -> Option<WallTime> {
        let next = self.cron.find_next_occurrence(&self.local(time)?, false).ok()?;
        u64::try_from(next.timestamp().as_millisecond()).ok().map(WallTime)
    }

    /// `since`: when the run before ended, or when the schedule was first seen. What was missed is run once, however often
    /// it was missed; without `catch_up` it is not.
    pub fn due(&self, since: WallTime, now: WallTime, catch_up: bool) -> Due {
        // A clock that was set back must not silence a schedule until it is there again.
        let since = since.min(now);
        let first = match self.after(since) {
            Some(first) if first <= now => first,
            Some(first) => return Due::At(first),
            None => return Due::Never,
        };
        let recent = self.after(since.max(WallTime(now.0.saturating_sub(ON_TIME_MS))));
        match recent.filter(|recent| *recent <= now) {
            Some(since) => Due::Now { since, missed: false },
            None if catch_up => Due::Now { since: first, missed: true },
            None => self.after(now).map_or(Due::Never, Due::At),
        }
    }
}

/// A time of the day, such as `22:00-06:00`, in which machines may be begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Minutes of the day.
    from: u16,
    to: u16,
}

impl Window {
    pub fn parse(text: &str) -> Result<Window, String> {
        let wrong = || format!("`{text}` is no time of the day such as `22:00-06:00`");
        let minutes = |text: &str| {
            let (hour, minute) = text.split_once(':')?;
            let two = |text: &str| {
                let digits = text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
                digits.then(|| text.parse::<u16>().ok()).flatten()
            };
            let (hour, minute) = (two(hour)?, two(minute)?);
            (hour < 24 && minute < 60 || (hour, minute) == (24, 0)).then_some(hour * 60 + minute)
        };
        let (from, to) = text.split_once('-').ok_or_else(wrong)?;
        let (from, to) = minutes(from.trim()).zip(minutes(to.trim())).ok_or_else(wrong)?;
        if from == to {
            return Err(format!("{}: it has no length", wrong()));
        }
        Ok(Window { from, to })
    }

    pub fn is_open(&self, calendar: &Calendar, now: WallTime) -> bool {
        let Some(local) = calendar.local(now) else { return true };
        let minute = local.hour() as u16 * 60 + local.minute() as u16;
        if self.from < self.to {
            (self.from..self.to).contains(&minute)
        } else {
            minute >= self.from || minute < self.to
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> WallTime {
        let zoned: Zoned = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        WallTime(zoned.timestamp().as_millisecond() as u64)
    }

    fn zurich(pattern: &str) -> Calendar {
        Calendar::parse(pattern, Some("Europe/Zurich")).unwrap()
    }

    /// All times up to another, as RFC 3339 has them in UTC.
    fn times(calendar: &Calendar, from: &str, to: &str) -> Vec<String> {
        let (mut time, end) = (at(from), at(to));
        let mut times = Vec::new();
        while let Some(next) = calendar.after(time).filter(|next| *next <= end) {
            times.push(Timestamp::from_millisecond(next.0 as i64).unwrap().to_string());
            time = next;
        }
        times
    }

    #[test]
    fn clocks_that_change_run_what_is_daily_once_a_day() {
        let nightly = zurich("30 2 * * *");
        let spring = times(&nightly, "2026-03-28T00:00[Europe/Zurich]", "2026-03-31T00:00[Europe/Zurich]");
        assert_eq!(spring, ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]);
        let autumn = times(&nightly, "2026-10-24T00:00[Europe/Zurich]", "2026-10-27T00:00[Europe/Zurich]");
        assert_eq!(autumn, ["2026-10-24T00:30:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]);
        // What is hourly goes on hour by hour.
        let hourly =
            times(&zurich("0 * * * *"), "2026-10-25T01:30[Europe/Zurich]", "2026-10-25T03:30[Europe/Zurich]");
        assert_eq!(hourly, ["2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z", "2026-10-25T02:00:00Z"]);
    }

    #[test]
    fn what_was_missed_is_run_once() {
        let nightly = zurich("15 2 * * *");
        let due = |since: &str, now: &str, catch_up| {
            let full = |text: &str| at(&format!("{text}[Europe/Zurich]"));
            nightly.due(full(since), full(now), catch_up)
        };
        let at = |text: &str| at(&format!("{text}[Europe/Zurich]"));
        let (before, night) = ("2026-11-20T02:20", "2026-11-21T02:15");
        assert_eq!(due(before, "2026-11-20T22:00", true), Due::At(at(night)));
        assert_eq!(due(before, "2026-11-21T02:15:01", true), Due::Now { since: at(night), missed: false });
        assert_eq!(due(before, "2026-11-21T02:15:01", false), Due::Now { since: at(night), missed: false });
        // A week without a daemon.
        let monday = "2026-11-27T09:00";
        assert_eq!(due(before, monday, true), Due::Now { since: at(night), missed: true });
        assert_eq!(due(before, monday, false), Due::At(at("2026-11-28T02:15")));
        assert_eq!(due(monday, "2026-11-27T09:01", true), Due::At(at("2026-11-28T02:15")), "once");
        // One that starts just in time after a week is on time.
        let now = "2026-11-27T02:15:30";
        assert_eq!(due(before, now, false), Due::Now { since: at("2026-11-27T02:15"), missed: false });
        // A clock that was a year ahead when the run before ended.
        assert_eq!(due("2027-11-20T02:20", "2026-11-20T22:00", true), Due::At(at(night)));
    }

    #[test]
    fn a_pattern_that_fits_no_day_is_never_due() {
        let calendar = zurich("0 0 30 2 *");
        let now = at("2026-11-20T02:20[Europe/Zurich]");
        assert_eq!(calendar.due(now, now, true), Due::Never);
    }

    /// Asked every so often, with the daemon away now and then, no schedule runs twice for one time, and none is forgotten.
    #[test]
    fn asked_over_and_over_it_runs_once_for_each_time() {
        let mut random = 7u64;
        let mut draw = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % below
        };
        for pattern in ["15 2 * * *", "*/20 * * * *", "0 0 1 * *", "30 2 * * 0"] {
            let calendar = zurich(pattern);
            let begin = at("2026-01-01T00:00[Europe/Zurich]");
            let end = begin.0 + 400 * 86_400_000;
            let (mut since, mut now) = (begin, begin.0);
            let mut begun = Vec::new();
            while now < end {
                if let Due::Now { since: due, .. } = calendar.due(since, WallTime(now), true) {
                    assert!(due > since && due.0 <= now, "{pattern}");
                    begun.push(due);
                    // It takes a while.
                    now += draw(600_000);
                    since = WallTime(now);
                } else {
                    // Nothing that was due lies behind it.
                    assert!(calendar.after(since).is_none_or(|next| next.0 > now), "{pattern}");
                }
                now += if draw(50) == 0 { draw(10 * 86_400_000) } else { draw(3_600_000) };
            }
            let mut once = begun.clone();
            once.dedup();
            assert_eq!(begun, once, "{pattern}");
            assert!(begun.len() > 10, "{pattern}: {}", begun.len());
        }
    }

    #[test]
    fn a_window_may_pass_midnight() {
        let calendar = zurich("* * * * *");
        let open = |window: &str, time: &str| {
            let time = at(&format!("2026-11-20T{time}[Europe/Zurich]"));
            Window::parse(window).unwrap().is_open(&calendar, time)
        };
        for (time, night, day) in [
            ("21:59:59", false, false),
            ("22:00", true, false),
            ("00:00", true, false),
            ("05:59:59", true, false),
            ("06:00", false, false),
            ("08:00", false, true),
            ("16:59", false, true),
            ("17:00", false, false),
        ] {
            assert_eq!(open("22:00-06:00", time), night, "{time}");
            assert_eq!(open("08:00-17:00", time), day, "{time}");
        }
        assert!(open("00:00-24:00", "23:59"));
        for wrong in
            ["", "22:00", "22-6", "25:00-06:00", "22:60-06:00", "06:00-06:00", "2:00-3:00", "é:00-06:00"]
        {
            assert!(Window::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_no_pattern_or_zone_is_refused() {
        for pattern in ["", "whenever", "61 * * * *", "* * * *", "* * * * * * * *"] {
            assert!(Calendar::parse(pattern, None).is_err(), "{pattern}");
        }
        assert!(Calendar::parse("@daily", Some("Europe/Nowhere")).is_err());
        Calendar::parse("@daily", Some("UTC")).unwrap();
    }
}

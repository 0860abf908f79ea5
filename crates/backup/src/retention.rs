//! Which restore points are kept.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use rempart_types::WallTime;
use serde::Serialize;
use std::collections::BTreeSet;
use std::str::FromStr;

/// How many of a machine's points are kept. A point is kept if any of these keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// The newest ones.
    pub last: u64,
    /// The newest of each of the last so many hours, days, weeks, months and years that have any.
    pub hourly: u64,
    pub daily: u64,
    pub weekly: u64,
    pub monthly: u64,
    pub yearly: u64,
    /// Everything that is no older than that, counted from the newest point.
    pub within_ms: Option<u64>,
}

/// What keeps a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The newest point is kept whatever the numbers say.
    Newest,
    Last,
    Hourly,
    Daily,
    Weekly,
    Monthly,
    Yearly,
    Within,
}

/// Where days begin.
#[derive(Debug, Clone)]
pub struct Zone(TimeZone);

/// A time zone that this machine does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no time zone that this machine knows; write one such as `UTC` or `Europe/Berlin`")]
pub struct UnknownZone(String);

impl Zone {
    pub const UTC: Zone = Zone(TimeZone::UTC);

    /// This machine's.
    pub fn system() -> Zone {
        Zone(TimeZone::try_system().unwrap_or(TimeZone::UTC))
    }

    pub fn name(&self) -> &str {
        self.0.iana_name().unwrap_or("UTC")
    }
}

impl FromStr for Zone {
    type Err = UnknownZone;

    fn from_str(text: &str) -> Result<Zone, UnknownZone> {
        TimeZone::get(text).map(Zone).map_err(|_| UnknownZone(text.to_owned()))
    }
}

/// Which hour, day, week, month, year a time is in. Those of two times are equal if and only if it is the same one.
fn periods(time: WallTime, zone: &Zone) -> [i64; 5] {
    let millis = i64::try_from(time.0).unwrap_or(i64::MAX).min(Timestamp::MAX.as_millisecond());
    let zoned =
        Timestamp::from_millisecond(millis).expect("it is no later than the last").to_zoned(zone.0.clone());
    let (date, week) = (zoned.date(), zoned.date().iso_week_date());
    let day = i64::from(date.year()) * 400 + i64::from(date.day_of_year());
    // Where clocks are put back, an hour comes twice; by its offset it is another one.
    let hour = (day * 24 + i64::from(zoned.hour())) * 200_000 + i64::from(zoned.offset().seconds());
    [
        hour,
        day,
        i64::from(week.year()) * 60 + i64::from(week.week()),
        i64::from(date.year()) * 12 + i64::from(date.month()),
        i64::from(date.year()),
    ]
}

impl Retention {
    /// Whether it keeps nothing by itself.
    pub fn is_empty(&self) -> bool {
        *self == Retention::default()
    }

    /// What keeps each of a machine's points, by the times they were taken; nothing keeps those that may go.
    pub fn reasons(&self, taken: &[WallTime], zone: &Zone) -> Vec<BTreeSet<Reason>> {
        let mut reasons = vec![BTreeSet::new(); taken.len()];
        let mut newest_first: Vec<usize> = (0..taken.len()).collect();
        // Of points taken at the same time the later one in the list is the newer.
        newest_first.sort_unstable_by_key(|point| std::cmp::Reverse((taken[*point], *point)));
        let (Some(&newest), Some(&oldest)) = (newest_first.first(), newest_first.last()) else {
            return reasons;
        };
        reasons[newest].insert(Reason::Newest);
        let last = usize::try_from(self.last).unwrap_or(usize::MAX);
        for point in newest_first.iter().take(last) {
            reasons[*point].insert(Reason::Last);
        }
        if let Some(within) = self.within_ms {
            let from = taken[newest].0.saturating_sub(within);
            for point in newest_first.iter().filter(|point| taken[**point].0 >= from) {
                reasons[*point].insert(Reason::Within);
            }
        }
        let rules = [
            (Reason::Hourly, self.hourly),
            (Reason::Daily, self.daily),
            (Reason::Weekly, self.weekly),
            (Reason::Monthly, self.monthly),
            (Reason::Yearly, self.yearly),
        ];
        for (which, (reason, count)) in rules.into_iter().enumerate() {
            let (mut left, mut before) = (count, None);
            for point in &newest_first {
                let period = periods(taken[*point], zone)[which];
                if left > 0 && before != Some(period) {
                    reasons[*point].insert(reason);
                    left -= 1;
                }
                before = Some(period);
            }
            // As long as there are not enough, the oldest point stands for what came before it: else a rule that looks far
            // back would forget the only point that is old.
            if left > 0 {
                reasons[oldest].insert(reason);
            }
        }
        reasons
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: u64 = 3_600_000;
    const DAY: u64 = 24 * HOUR;

    /// 2026-01-01T00:00Z, a Thursday.
    const YEAR_2026: u64 = 1_767_225_600_000;

    fn kept(rule: Retention, taken: &[u64], zone: &Zone) -> Vec<usize> {
        let taken: Vec<WallTime> = taken.iter().map(|at| WallTime(*at)).collect();
        let reasons = rule.reasons(&taken, zone);
        (0..taken.len()).filter(|point| !reasons[*point].is_empty()).collect()
    }

    #[test]
    fn a_rule_says_what_people_expect() {
        // A point every six hours, for 40 days.
        let taken: Vec<u64> = (0..160).map(|at| YEAR_2026 + at * 6 * HOUR).collect();
        let none = Retention::default();
        for (rule, expected) in [
            (none, vec![159]),
            (Retention { last: 2, ..none }, vec![158, 159]),
            (Retention { daily: 3, ..none }, vec![151, 155, 159]),
            (Retention { hourly: 3, ..none }, vec![157, 158, 159]),
            // Ends of January and of what there is of February; and the oldest, for there is no third month.
            (Retention { monthly: 3, ..none }, vec![0, 123, 159]),
            // Sundays, and the last.
            (Retention { weekly: 3, ..none }, vec![127, 155, 159]),
            (Retention { yearly: 1, ..none }, vec![159]),
            (Retention { within_ms: Some(12 * HOUR), ..none }, vec![157, 158, 159]),
        ] {
            assert_eq!(kept(rule, &taken, &Zone::UTC), expected, "{rule:?}");
        }
    }

    #[test]
    fn days_begin_where_the_zone_says() {
        let berlin: Zone = "Europe/Berlin".parse().expect("a zone");
        // 23:30 UTC is the next day in Berlin.
        let taken = [YEAR_2026 + 22 * HOUR, YEAR_2026 + 23 * HOUR + HOUR / 2, YEAR_2026 + 25 * HOUR];
        let rule = Retention { daily: 2, ..Retention::default() };
        assert_eq!(kept(rule, &taken, &Zone::UTC), [1, 2]);
        assert_eq!(kept(rule, &taken, &berlin), [0, 2]);
        assert_eq!(berlin.name(), "Europe/Berlin");
        "Europe/Nowhere".parse::<Zone>().expect_err("no zone");
        // 2026-10-25: from 03:00 back to 02:00.
        let twice = 1_792_886_400_000;
        let hours: Vec<u64> = (0..4).map(|hour| twice + hour * HOUR).collect();
        assert_eq!(kept(Retention { hourly: 4, ..Retention::default() }, &hours, &berlin), [0, 1, 2, 3]);
    }

    /// The rule as a person would say it, with sets of whole periods.
    fn slow(rule: Retention, taken: &[u64], zone: &Zone) -> Vec<usize> {
        let newer = |one: usize, other: usize| (taken[one], one) > (taken[other], other);
        let period = |point: usize, which: usize| periods(WallTime(taken[point]), zone)[which];
        let counts = [rule.hourly, rule.daily, rule.weekly, rule.monthly, rule.yearly];
        let all = 0..taken.len();
        let is_kept = |point: &usize| {
            let ahead = all.clone().filter(|other| newer(*other, *point)).count() as u64;
            if ahead == 0 || ahead < rule.last {
                return true;
            }
            let newest = taken.iter().max().expect("there is one");
            if rule.within_ms.is_some_and(|within| taken[*point] + within >= *newest) {
                return true;
            }
            counts.iter().enumerate().any(|(which, count)| {
                let own = period(*point, which);
                let is_newest_of_its_own =
                    !all.clone().any(|other| newer(other, *point) && period(other, which) == own);
                let newer_periods: BTreeSet<i64> = all
                    .clone()
                    .filter(|other| newer(*other, *point) && period(*other, which) != own)
                    .map(|other| period(other, which))
                    .collect();
                let periods: BTreeSet<i64> = all.clone().map(|other| period(other, which)).collect();
                let is_oldest = ahead + 1 == taken.len() as u64;
                (is_newest_of_its_own && (newer_periods.len() as u64) < *count)
                    || (is_oldest && *count > periods.len() as u64)
            })
        };
        all.clone().filter(is_kept).collect()
    }

    proptest! {
        #[test]
        fn it_is_what_a_slow_model_says(
            gaps in prop::collection::vec(prop_oneof![0..2 * HOUR, 0..3 * DAY, 0..60 * DAY], 1..40),
            shuffle in any::<u64>(),
            numbers in prop::collection::vec(0u64..5, 6),
            within in prop::option::of(0..30 * DAY),
            zone in prop_oneof![Just("UTC"), Just("America/New_York"), Just("Asia/Kathmandu")],
        ) {
            let mut at = YEAR_2026 - 300 * DAY;
            let mut taken: Vec<u64> = gaps.iter().map(|gap| { at += gap; at }).collect();
            // A clock that jumped: points are not in the order of their times.
            let turn = (shuffle % taken.len() as u64) as usize;
            taken.rotate_left(turn);
            let zone: Zone = zone.parse().expect("a zone");
            let rule = Retention {
                last: numbers[0], hourly: numbers[1], daily: numbers[2], weekly: numbers[3],
                monthly: numbers[4], yearly: numbers[5], within_ms: within,
            };
            prop_assert_eq!(kept(rule, &taken, &zone), slow(rule, &taken, &zone));
        }
    }
}

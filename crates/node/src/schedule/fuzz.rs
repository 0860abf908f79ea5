//! What an operator writes about a schedule, and what is kept of its runs.

use super::config::BackupSection;
use super::plan::{Calendar, Due, Window};
use rempart_api::BackupRun;
use rempart_types::WallTime;

/// A time of this program, and one behind which dates soon end.
const TIMES: [u64; 2] = [1_800_000_000_000, 253_402_000_000_000];

/// # Panics
/// If a run is due in the past, or a pattern's next time is not later.
pub(crate) fn fuzz(text: &str) {
    let (pattern, rest) = text.split_once('\n').unwrap_or((text, ""));
    // One zone and one time: a pattern that fits no day is looked for through thousands of years.
    let zone = if text.len().is_multiple_of(2) { "UTC" } else { "Europe/Zurich" };
    if let Ok(calendar) = Calendar::parse(pattern, Some(zone)) {
        let now = WallTime(TIMES[text.len() / 2 % 2]);
        assert!(calendar.after(now).is_none_or(|next| next > now), "`{pattern}` after {now:?}");
        match calendar.due(WallTime(now.0 - (1 << 30)), now, true) {
            Due::Now { since, .. } => assert!(since <= now, "`{pattern}` at {now:?}"),
            Due::At(next) => assert!(next > now, "`{pattern}` at {now:?}"),
            Due::Never => {}
        }
        if let Ok(window) = Window::parse(rest) {
            let _ = window.is_open(&calendar, now);
        }
    }
    if let Ok(section) = toml::from_str::<BackupSection>(text) {
        let _ =
            (section.check().is_ok(), section.backup_arguments("shop"), section.retain_arguments(&["shop"]));
    }
    let _ = serde_json::from_str::<BackupRun>(text).is_ok();
}

//! What happened to a virtual machine lately, for people.

use rempart_api::{Condition, Severity};
use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

const KEPT: usize = 200;

#[derive(Debug, Default)]
pub struct EventLog {
    events: Mutex<VecDeque<Condition>>,
}

impl EventLog {
    /// Notes it here and in the daemon's log.
    pub fn note(&self, vm: &str, severity: Severity, text: impl Into<String>) {
        let text = text.into();
        match severity {
            Severity::Info => tracing::info!(vm, "{text}"),
            Severity::Warning => tracing::warn!(vm, "{text}"),
            Severity::Critical => tracing::error!(vm, "{text}"),
        }
        let mut events = self.events.lock().expect("nothing panics while it holds the events");
        if events.len() == KEPT {
            events.pop_front();
        }
        events.push_back(Condition { severity, text, since_unix_ms: unix_ms() });
    }

    pub fn list(&self) -> Vec<Condition> {
        self.events.lock().expect("nothing panics while it holds the events").iter().cloned().collect()
    }
}

pub fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

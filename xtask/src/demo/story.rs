//! What is told while a scenario runs, and its outcome as a table or as JSON.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Fault;

#[derive(Debug)]
pub struct Story {
    started: Instant,
    /// Standard output is for JSON.
    to_stderr: bool,
}

impl Story {
    pub fn new(to_stderr: bool) -> Story {
        Story { started: Instant::now(), to_stderr }
    }

    pub fn title(&self, text: &str) {
        self.print(&format!("\n── {text}"));
    }

    pub fn tell(&self, text: &str) {
        self.print(&format!("{:7.1} s  {text}", self.started.elapsed().as_secs_f64()));
    }

    pub fn table(&self, report: &Report) {
        let width = report.figures.iter().map(|figure| figure.name.chars().count()).max().unwrap_or(0);
        self.print("");
        for figure in &report.figures {
            let pad = " ".repeat(width - figure.name.chars().count());
            self.print(&format!("  {}{pad}  {}", figure.name, figure.value.shown()));
        }
        self.print("");
        for check in &report.checks {
            let mark = if check.held { "kept  " } else { "BROKEN" };
            self.print(&format!("  {mark}  {}: {}", check.promise, check.detail));
        }
        if let Some(error) = &report.error {
            self.print(&format!("  BROKEN  {error}"));
        }
    }

    fn print(&self, line: &str) {
        if self.to_stderr {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    }
}

/// One number of the final table.
#[derive(Debug, Clone)]
pub struct Figure {
    pub name: &'static str,
    pub value: Amount,
}

#[derive(Debug, Clone, Copy)]
pub enum Amount {
    Count(u64),
    Bytes(u64),
    Time(Duration),
    Percent(f64),
}

impl Amount {
    fn shown(self) -> String {
        match self {
            Amount::Count(count) => count.to_string(),
            Amount::Bytes(bytes) => bytes_shown(bytes),
            Amount::Time(time) => format!("{:.2} s", time.as_secs_f64()),
            Amount::Percent(percent) => format!("{percent:.1} %"),
        }
    }

    fn as_json(self) -> Value {
        match self {
            Amount::Count(count) | Amount::Bytes(count) => json!(count),
            Amount::Time(time) => json!(time.as_millis() as f64 / 1000.0),
            Amount::Percent(percent) => json!(percent),
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Amount::Count(_) => "records",
            Amount::Bytes(_) => "B",
            Amount::Time(_) => "s",
            Amount::Percent(_) => "%",
        }
    }
}

pub fn bytes_shown(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

/// A promise and whether it was kept.
#[derive(Debug, Clone)]
pub struct Check {
    pub promise: String,
    pub held: bool,
    pub detail: String,
}

/// The outcome of one scenario.
#[derive(Debug, Clone)]
pub struct Report {
    pub fault: Fault,
    pub figures: Vec<Figure>,
    pub checks: Vec<Check>,
    pub error: Option<String>,
}

impl Report {
    /// A scenario that could not be played because one before it broke the stage.
    pub fn not_played(fault: Fault) -> Report {
        let error = Some("not played: the scenario before it left no stage".to_owned());
        Report { fault, figures: Vec::new(), checks: Vec::new(), error }
    }

    /// Whether everything was checked and every promise kept.
    pub fn is_good(&self) -> bool {
        self.error.is_none() && self.checks.iter().all(|check| check.held)
    }
}

pub fn as_json(reports: &[Report]) -> Value {
    let report = |report: &Report| {
        let figures: serde_json::Map<String, Value> = report
            .figures
            .iter()
            .map(|figure| {
                let value = json!({ "value": figure.value.as_json(), "unit": figure.value.unit() });
                (figure.name.replace(' ', "_"), value)
            })
            .collect();
        let checks: Vec<_> = report
            .checks
            .iter()
            .map(|check| json!({ "promise": check.promise, "kept": check.held, "detail": check.detail }))
            .collect();
        json!({
            "fault": report.fault.name(),
            "kept": report.is_good(),
            "figures": figures,
            "checks": checks,
            "error": report.error,
        })
    };
    json!({ "scenarios": reports.iter().map(report).collect::<Vec<_>>() })
}

//! What came of a machine that was started: for programs, for a terminal, and as a page for people.
//!
//! Much of it was said by the guest, which nobody has a reason to trust: on the page all of it is text.

use super::check::{Probe, plain};
use super::milliseconds;
use crate::Output;
use crate::backup::access::now;
use crate::backup::create::host_name;
use crate::backup::points::time;
use data_encoding::BASE64;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use rempart_notify::{Attachment, Message};
use rempart_repository::{BootCheck, BootResult, Point};
use serde::Serialize;
use std::path::PathBuf;

/// No script, and nothing from elsewhere.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";
const STYLE: &str = "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}\
    h2{border-top:1px solid #ccc;padding-top:1em}table{border-collapse:collapse}td,th{text-align:left;padding:.2em 1em \
    .2em 0;vertical-align:top}pre{background:#f4f4f4;padding:1em;overflow:auto;max-height:20em}img{max-width:100%;border:\
    1px solid #ccc}.yes{color:#060}.no{color:#a00}";

/// One machine.
#[derive(Debug, Default, Serialize)]
pub struct Verified {
    pub vm: String,
    pub point: u64,
    pub taken_unix_ms: u64,
    pub passed: bool,
    /// Why it did not.
    pub why: Option<String>,
    /// All times from the moment that its point was opened.
    pub powered_on_ms: Option<u64>,
    /// When the first check held: the recovery time.
    pub answered_ms: Option<u64>,
    pub ended_ms: Option<u64>,
    pub checks: Vec<Checked>,
    /// What nobody looked at.
    pub unchecked: Vec<&'static str>,
    pub isolation: &'static str,
    pub accelerator: Option<String>,
    /// How often it began anew by itself.
    pub resets: u32,
    pub disks_read_bytes: u64,
    /// What the repository could not give, when it was asked.
    pub unreadable: Vec<String>,
    /// The end of what its serial console said.
    pub console: String,
    pub screen_is_blank: Option<bool>,
    pub screenshot_file: Option<PathBuf>,
    /// Whether the repository keeps what came of it.
    pub kept: bool,
    /// PNG.
    #[serde(skip)]
    pub screenshot: Vec<u8>,
    #[serde(skip)]
    taken: String,
}

#[derive(Debug, Serialize)]
pub struct Checked {
    pub check: String,
    pub passed: bool,
    pub after_ms: Option<u64>,
    pub detail: String,
}

impl From<Probe> for Checked {
    fn from(probe: Probe) -> Checked {
        Checked {
            check: probe.check.to_string(),
            passed: probe.held.is_some(),
            after_ms: probe.held.map(milliseconds),
            detail: probe.detail,
        }
    }
}

impl Verified {
    pub fn of(root: u64, point: &Point) -> Verified {
        Verified {
            vm: point.vm.clone(),
            point: root,
            taken_unix_ms: point.taken.0,
            taken: time(point.taken),
            ..Verified::default()
        }
    }

    /// What the repository keeps of it.
    pub fn result(&self) -> BootResult {
        let checks = self.checks.iter().map(|checked| BootCheck {
            check: checked.check.clone(),
            passed: checked.passed,
            after_ms: checked.after_ms,
        });
        BootResult {
            at: now(),
            host: host_name(),
            passed: self.passed,
            why: self.why.as_ref().map(|why| plain(why.as_bytes(), 2000)),
            powered_on_ms: self.powered_on_ms,
            answered_ms: self.answered_ms,
            checks: checks.collect(),
        }
    }

    pub fn tell(&self, output: Output) {
        let name = format!("{}@{}", self.vm, self.point);
        for check in &self.checks {
            let Checked { check, passed, detail, .. } = check;
            let holds = if *passed { "holds" } else { "does not hold" };
            output.tell(&format!(
                "{name}: `{check}` {holds}{}: {detail}",
                seconds(" after ", self.after(check))
            ));
        }
        for what in &self.unchecked {
            output.tell(&format!("{name}: nobody looked {what}"));
        }
        match &self.why {
            None => output.tell(&format!(
                "{name}: it came up{}",
                seconds(", and first answered after ", self.answered_ms)
            )),
            Some(why) => output.tell(&format!("{name}: it did not come up: {}", plain(why.as_bytes(), 2000))),
        }
    }

    fn after(&self, check: &str) -> Option<u64> {
        self.checks.iter().find(|checked| checked.check == check)?.after_ms
    }
}

fn seconds(before: &str, ms: Option<u64>) -> String {
    ms.map_or(String::new(), |ms| format!("{before}{:.1} s", ms as f64 / 1000.0))
}

/// One page that needs nothing else.
pub fn page(repository: String, machines: &[Verified]) -> String {
    let failed = machines.iter().filter(|machine| !machine.passed).count();
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                title { "Verified backups" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { "Verified backups" }
                p { (machines.len()) " machines of " code { (repository) } ", " (failed) " of which did not come up." }
                table {
                    tr { th { "Machine" } th { "Taken" } th { "Result" } th { "First answer" } }
                    @for machine in machines {
                        tr {
                            td { (machine.vm) "@" (machine.point) }
                            td { (machine.taken) }
                            td { (verdict(machine)) }
                            td { (seconds("", machine.answered_ms)) }
                        }
                    }
                }
                @for machine in machines { (section(machine)) }
            }
        }
    };
    page.into_string()
}

/// The page as an attachment: few programs that show mail show pictures in it.
pub fn mail(page: String, machines: &[Verified]) -> Message {
    let failed = machines.iter().filter(|machine| !machine.passed).count();
    let result = |machine: &Verified| match &machine.why {
        None => format!("came up{}", seconds(", and first answered after ", machine.answered_ms)),
        Some(why) => format!("did not come up: {}", plain(why.as_bytes(), 500)),
    };
    let line = |machine: &Verified| format!("{}@{}: {}\n", machine.vm, machine.point, result(machine));
    Message {
        subject: format!("verified backups: {failed} of {} machines did not come up", machines.len()),
        text: machines.iter().map(line).collect(),
        html: None,
        attachments: vec![Attachment {
            name: "report.html".to_owned(),
            media_type: "text/html".to_owned(),
            content: page.into_bytes(),
        }],
    }
}

fn verdict(machine: &Verified) -> Markup {
    match &machine.why {
        None => html! { span.yes { "came up" } },
        Some(_) => html! { span.no { "did not come up" } },
    }
}

fn section(machine: &Verified) -> Markup {
    html! {
        h2 { (machine.vm) "@" (machine.point) ": " (verdict(machine)) }
        @if let Some(why) = &machine.why { p.no { (why) } }
        table {
            tr { th { "Check" } th { "Holds" } th { "After" } th { "What was seen" } }
            @for check in &machine.checks {
                tr {
                    td { code { (check.check) } }
                    td { @if check.passed { span.yes { "yes" } } @else { span.no { "no" } } }
                    td { (seconds("", check.after_ms)) }
                    td { (check.detail) }
                }
            }
        }
        ul {
            @for what in &machine.unchecked { li { "Nobody looked " (what) "." } }
            @if let Some(on) = machine.powered_on_ms { li { "Power on" (seconds(" after ", Some(on))) "." } }
            @if let Some(accelerator) = &machine.accelerator { li { "Run by " (accelerator) "." } }
            li { "It had " (machine.isolation) "." }
            li { "It read " (crate::output::bytes(machine.disks_read_bytes)) " of its disks." }
            @if machine.resets > 0 { li { "It began anew " (machine.resets) " times." } }
            @for what in &machine.unreadable { li.no { (what) } }
        }
        @if !machine.screenshot.is_empty() {
            img alt="its screen" src={ "data:image/png;base64," (BASE64.encode(&machine.screenshot)) };
        }
        @if !machine.console.is_empty() {
            h3 { "The end of its serial console" }
            pre { (lines(&machine.console)) }
        }
    }
}

/// Without what no text has.
fn lines(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_is_text() {
        let evil = "<script>alert('x')</script>\"&";
        let check = Checked { check: evil.into(), passed: false, after_ms: None, detail: evil.into() };
        let machine = Verified {
            vm: evil.into(),
            why: Some(evil.into()),
            checks: vec![check],
            unreadable: vec![evil.into()],
            console: format!("{evil}\x1b[2J"),
            screenshot: vec![0x89],
            ..Verified::default()
        };
        let page = page(evil.into(), &[machine]);
        assert!(!page.contains("<script") && !page.contains('\x1b'), "{page}");
        assert_eq!(page.matches("&lt;script&gt;").count(), 8);
        assert!(page.contains("data:image/png;base64,iQ=="));
    }
}

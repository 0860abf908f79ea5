//! What reaches the terminal: data on stdout, everything else on stderr.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rempart_api::{Error, Progress};
use serde::Serialize;
use serde_json::json;
use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How results are shown.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    pub json: bool,
    pub progress: ProgressFormat,
}

/// How a command tells how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ProgressFormat {
    /// A bar on a terminal, a line every few seconds elsewhere, nothing with `--json`.
    Auto,
    /// Each second a line with a JSON object that has the one field `progress`.
    Json,
    None,
}

impl Output {
    /// Only what is printed.
    pub fn silent() -> Output {
        Output { json: true, progress: ProgressFormat::None }
    }

    /// One JSON value on stdout.
    pub fn print_json(self, value: &impl Serialize) -> Result<(), Error> {
        let text =
            serde_json::to_string_pretty(value).map_err(|e| Error::failed("cannot write JSON").cause(e))?;
        write(&printable_json(&text))
    }

    /// Lines of data.
    pub fn print(self, text: &str) -> Result<(), Error> {
        write(&printable_lines(text))
    }

    /// A sentence for the person, on stderr; silent with `--json`.
    pub fn tell(self, text: &str) {
        if !self.json {
            let _ = writeln!(std::io::stderr(), "{}", printable_lines(text));
        }
    }

    pub fn table(self, header: &[&str], rows: Vec<Vec<String>>) -> Result<(), Error> {
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::NOTHING).set_header(header.iter().map(|h| h.to_uppercase()));
        table.add_rows(rows.iter().map(|row| row.iter().map(|cell| printable(cell))));
        if let Some(first) = table.column_mut(0) {
            first.set_padding((0, 1));
        }
        write(&table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n"))
    }

    pub fn progress(self) -> ProgressShow {
        ProgressShow::new(self)
    }
}

/// A closed pipe, as of `| head`, is no error.
fn write(text: &str) -> Result<(), Error> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::failed("cannot write to stdout").cause(e))
        }
        _ => Ok(()),
    }
}

/// What somebody named, or a repository holds, in one line that writes nothing else on a terminal.
pub fn printable(text: &str) -> String {
    escape(text, char::is_control, |c| c.escape_default().to_string())
}

/// The same of a text of several lines.
fn printable_lines(text: &str) -> String {
    escape(text, |c| c.is_control() && c != '\n', |c| c.escape_default().to_string())
}

/// The same value: JSON itself escapes what is below the space, and neither DEL nor the controls of Latin-1.
fn printable_json(json: &str) -> String {
    escape(json, |c| c.is_control() && c != '\n', |c| format!("\\u{:04x}", u32::from(c)))
}

fn escape(text: &str, is_escaped: impl Fn(char) -> bool, escaped: impl Fn(char) -> String) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_escaped(c) { shown += &escaped(c) } else { shown.push(c) }
    }
    shown
}

/// A bar on a terminal, a line every few seconds otherwise; or JSON for programs.
#[derive(Debug)]
pub struct ProgressShow {
    bar: Option<ProgressBar>,
    format: ProgressFormat,
    rate: Rate,
    last_line: Option<(Instant, String)>,
}

/// Bytes a second, of late.
#[derive(Debug, Default)]
struct Rate {
    /// The newest, and those of the seconds before it.
    known: VecDeque<(Instant, u64)>,
}

impl Rate {
    const OVER: Duration = Duration::from_secs(10);

    fn tell(&mut self, done_bytes: u64, now: Instant) {
        if self.known.back().is_some_and(|(_, before)| *before > done_bytes) {
            // Something else began.
            self.known.clear();
        }
        self.known.push_back((now, done_bytes));
        while self.known.get(1).is_some_and(|(at, _)| now - *at >= Rate::OVER) {
            self.known.pop_front();
        }
    }

    /// Not before something can be said.
    fn per_second(&self) -> Option<u64> {
        let ((start, from), (end, to)) = (self.known.front()?, self.known.back()?);
        let seconds = (*end - *start).as_secs_f64();
        (seconds >= 0.5).then(|| ((to - from) as f64 / seconds) as u64)
    }

    fn left(&self, progress: &Progress) -> Option<Duration> {
        let rate = self.per_second().filter(|rate| *rate > 0 && progress.total_bytes > 0)?;
        Some(Duration::from_secs(progress.total_bytes.saturating_sub(progress.done_bytes).div_ceil(rate)))
    }
}

impl ProgressShow {
    fn new(output: Output) -> ProgressShow {
        let format = match output.progress {
            ProgressFormat::Auto if output.json => ProgressFormat::None,
            asked => asked,
        };
        let terminal = std::io::stderr().is_terminal() && format == ProgressFormat::Auto;
        let bar = terminal.then(|| {
            let style = ProgressStyle::with_template(
                "{msg:24} {bar:30} {bytes}/{total_bytes}{prefix} {bytes_per_sec} {eta}",
            )
            .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
        });
        ProgressShow { bar, format, rate: Rate::default(), last_line: None }
    }

    pub fn show(&mut self, progress: &Progress) {
        if let Some(bar) = &self.bar {
            bar.set_message(printable(&progress.phase));
            bar.set_prefix(new(progress));
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
            return;
        }
        if self.format == ProgressFormat::None || progress.phase.is_empty() {
            return;
        }
        let now = Instant::now();
        self.rate.tell(progress.done_bytes, now);
        let every = Duration::from_secs(if self.format == ProgressFormat::Json { 1 } else { 5 });
        let due = self.last_line.as_ref().is_none_or(|(at, phase)| {
            *phase != progress.phase || progress.total_bytes != 0 && now - *at >= every
        });
        if due {
            self.line(progress);
            self.last_line = Some((now, progress.phase.clone()));
        }
    }

    fn line(&self, progress: &Progress) {
        let line = match self.format {
            ProgressFormat::Json => printable_json(&json_line(progress, &self.rate)),
            _ => printable(&plain_line(progress, &self.rate)),
        };
        let _ = writeln!(std::io::stderr(), "{line}");
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Where it ended, for programs.
    pub fn end(&mut self, progress: &Progress) {
        if self.format == ProgressFormat::Json {
            self.rate.tell(progress.done_bytes, Instant::now());
            self.line(progress);
        }
        self.finish();
    }
}

fn new(progress: &Progress) -> String {
    progress.new_bytes.map_or_else(String::new, |count| format!(", new {}", bytes(count)))
}

fn plain_line(progress: &Progress, rate: &Rate) -> String {
    let Progress { phase, done_bytes, total_bytes, .. } = progress;
    if *total_bytes == 0 {
        return phase.clone();
    }
    let mut line = format!("{phase} {}/{}{}", bytes(*done_bytes), bytes(*total_bytes), new(progress));
    if let Some(rate) = rate.per_second() {
        line += &format!(", {}/s", bytes(rate));
    }
    if let Some(left) = rate.left(progress).map(|left| left.as_secs()) {
        line += &format!(", {}:{:02}:{:02} left", left / 3600, left / 60 % 60, left % 60);
    }
    line
}

fn json_line(progress: &Progress, rate: &Rate) -> String {
    json!({ "progress": {
        "phase": progress.phase,
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes,
        "remaining_bytes": progress.total_bytes.saturating_sub(progress.done_bytes),
        "new_bytes": progress.new_bytes,
        "bytes_per_s": rate.per_second(),
        "eta_s": rate.left(progress).map(|left| left.as_secs()),
    }})
    .to_string()
}

/// `error:`, `cause:` and `hint:` lines on stderr.
pub fn print_error(error: &Error) {
    let paint = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let _ = write!(std::io::stderr(), "{}", render_error(error, paint));
}

fn render_error(error: &Error, paint: bool) -> String {
    let label = |word: &str, color: &str| {
        if paint { format!("\x1b[1;{color}m{word}\x1b[0m") } else { word.to_owned() }
    };
    let mut text = format!("{} {}\n", label("error:", "31"), printable_lines(&error.message));
    if let Some(cause) = &error.cause {
        text += &format!("{} {}\n", label("cause:", "33"), printable_lines(cause));
    }
    if let Some(hint) = &error.hint {
        text += &format!("{}  {}\n", label("hint:", "36"), printable_lines(hint));
    }
    text
}

/// A byte count with a binary unit, to three digits.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let (mut value, mut unit) = (count as f64 / 1024.0, 0);
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_tells_what_why_and_what_to_do() {
        let error =
            Error::refused("cannot promote `db-01` on `b`: its copy is at epoch 41, the group is at 42")
                .cause("last contact with `a` was 38 s ago")
                .hint("run `rempart failover db-01 --force` to give up what was written since");
        assert_eq!(
            render_error(&error, false),
            "error: cannot promote `db-01` on `b`: its copy is at epoch 41, the group is at 42\n\
             cause: last contact with `a` was 38 s ago\n\
             hint:  run `rempart failover db-01 --force` to give up what was written since\n"
        );
    }

    #[test]
    fn what_somebody_named_writes_on_no_terminal() {
        let hostile = "a\u{1b}[2J\rb\u{9b}2Jc";
        let error = Error::refused(hostile).cause(format!("of two\nlines: {hostile}")).hint(hostile);
        let shown = render_error(&error, false);
        assert_eq!(shown.lines().count(), 4, "{shown:?}");
        assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{shown:?}");
        let json = serde_json::to_string_pretty(&json!({ hostile: [hostile, "\u{7f}"] })).unwrap();
        let shown = printable_json(&json);
        assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{shown:?}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&shown).unwrap(),
            json!({ hostile: [hostile, "\u{7f}"] })
        );
        assert_eq!(printable("büro\n"), "büro\\n");
    }

    #[test]
    fn progress_tells_rate_and_time_left() {
        const MIB: u64 = 1 << 20;
        let begun = Instant::now();
        let mut rate = Rate::default();
        let progress = |done: u64| Progress {
            phase: "back up shop".to_owned(),
            done_bytes: done * MIB,
            total_bytes: 4000 * MIB,
            new_bytes: Some(3 * MIB),
        };
        rate.tell(0, begun);
        assert_eq!(plain_line(&progress(0), &rate), "back up shop 0 B/3.9 GiB, new 3.0 MiB");
        // Slow at first, which is forgotten.
        for second in 1..=20 {
            rate.tell(10 * MIB, begun + Duration::from_secs(second));
        }
        rate.tell(110 * MIB, begun + Duration::from_secs(30));
        let expected = "back up shop 110.0 MiB/3.9 GiB, new 3.0 MiB, 10.0 MiB/s, 0:06:29 left";
        assert_eq!(plain_line(&progress(110), &rate), expected);
        let line: serde_json::Value = serde_json::from_str(&json_line(&progress(110), &rate)).unwrap();
        assert_eq!(line["progress"]["bytes_per_s"], 10 * MIB);
        assert_eq!(line["progress"]["eta_s"], 389);
        assert_eq!(line["progress"]["remaining_bytes"], 3890 * MIB);
        rate.tell(0, begun + Duration::from_secs(31));
        assert_eq!(rate.per_second(), None, "something else began");
    }

    #[test]
    fn byte_counts_read_well() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(64 << 10), "64.0 KiB");
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(bytes(5 << 40), "5.0 TiB");
    }
}

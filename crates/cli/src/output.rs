//! What reaches the terminal: data on stdout, everything else on stderr.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rempart_api::{Error, Progress};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How results are shown.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    pub json: bool,
}

impl Output {
    /// One JSON value on stdout.
    pub fn print_json(self, value: &impl Serialize) -> Result<(), Error> {
        let text =
            serde_json::to_string_pretty(value).map_err(|e| Error::failed("cannot write JSON").cause(e))?;
        self.print(&text)
    }

    /// Data. A closed pipe, as of `| head`, is no error.
    pub fn print(self, text: &str) -> Result<(), Error> {
        match writeln!(std::io::stdout(), "{text}") {
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
                Err(Error::failed("cannot write to stdout").cause(e))
            }
            _ => Ok(()),
        }
    }

    /// A sentence for the person, on stderr; silent with `--json`.
    pub fn tell(self, text: &str) {
        if !self.json {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    pub fn table(self, header: &[&str], rows: Vec<Vec<String>>) -> Result<(), Error> {
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::NOTHING).set_header(header.iter().map(|h| h.to_uppercase()));
        table.add_rows(rows);
        if let Some(first) = table.column_mut(0) {
            first.set_padding((0, 1));
        }
        self.print(&table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n"))
    }

    pub fn progress(self) -> ProgressShow {
        ProgressShow::new(self)
    }
}

/// A bar on a terminal, a line every few seconds otherwise.
#[derive(Debug)]
pub struct ProgressShow {
    bar: Option<ProgressBar>,
    quiet: bool,
    last_line: Option<(Instant, String)>,
}

impl ProgressShow {
    fn new(output: Output) -> ProgressShow {
        let terminal = std::io::stderr().is_terminal() && !output.json;
        let bar = terminal.then(|| {
            let style =
                ProgressStyle::with_template("{msg:24} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
        });
        ProgressShow { bar, quiet: output.json, last_line: None }
    }

    pub fn show(&mut self, progress: &Progress) {
        if let Some(bar) = &self.bar {
            bar.set_message(progress.phase.clone());
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
            return;
        }
        if self.quiet || progress.phase.is_empty() {
            return;
        }
        let due = self.last_line.as_ref().is_none_or(|(at, phase)| {
            let moved = progress.total_bytes != 0 && at.elapsed() >= Duration::from_secs(5);
            *phase != progress.phase || moved
        });
        if due {
            let share = if progress.total_bytes == 0 {
                String::new()
            } else {
                format!(" {}/{}", bytes(progress.done_bytes), bytes(progress.total_bytes))
            };
            let _ = writeln!(std::io::stderr(), "{}{share}", progress.phase);
            self.last_line = Some((Instant::now(), progress.phase.clone()));
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
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
    let mut text = format!("{} {}\n", label("error:", "31"), error.message);
    if let Some(cause) = &error.cause {
        text += &format!("{} {cause}\n", label("cause:", "33"));
    }
    if let Some(hint) = &error.hint {
        text += &format!("{}  {hint}\n", label("hint:", "36"));
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
    fn byte_counts_read_well() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(64 << 10), "64.0 KiB");
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(bytes(5 << 40), "5.0 TiB");
    }
}

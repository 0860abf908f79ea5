//! `rempart retain` and `rempart forget`.

use super::access::{Access, describe, now};
use super::points::{find, open_log, time};
use crate::{Output, parse};
use clap::Args;
use rempart_api::Error;
use rempart_backup::{Reason, Retention, Zone};
use rempart_repository::log::{Log, LogError, MAX_ROOTS, Refusal, Session};
use rempart_repository::{ChainId, Point, PointReader, Repository, SessionId};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Points that somebody began to read just as they were judged, this many times in a row, are not bad luck.
const TRIES: u32 = 3;

/// Forgets restore points by a rule, machine by machine. A point is kept if any part of the rule keeps it; the newest of a
/// machine always is. What only forgotten points had is removed by `rempart gc`.
#[derive(Debug, Args)]
pub struct Retain {
    #[command(flatten)]
    access: Access,
    /// The virtual machines.
    #[arg(required_unless_present = "all")]
    vms: Vec<String>,
    /// Every machine that has points.
    #[arg(long, conflicts_with = "vms")]
    all: bool,
    #[command(flatten)]
    keep: Keep,
    /// Where days, weeks, months and years begin, such as `UTC` or `Europe/Berlin`; without it, in this machine's zone.
    #[arg(long, value_name = "ZONE")]
    time_zone: Option<Zone>,
    /// Only say what would be forgotten.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
struct Keep {
    /// The newest N points.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_last: u64,
    /// The newest point of each of the last N hours that have one.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_hourly: u64,
    /// The newest point of each of the last N days that have one.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_daily: u64,
    /// The newest point of each of the last N weeks that have one. They begin on Mondays.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_weekly: u64,
    /// The newest point of each of the last N months that have one.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_monthly: u64,
    /// The newest point of each of the last N years that have one.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_yearly: u64,
    /// All points that are no older than that, such as `14d`, counted from the machine's newest point.
    #[arg(long, value_name = "DURATION", value_parser = parse::seconds)]
    keep_within: Option<u64>,
    /// Nothing, not even the newest point: for machines that are gone.
    #[arg(long, conflicts_with_all = ["keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly", "keep_within"])]
    keep_none: bool,
}

impl Keep {
    /// Nothing keeps anything if there is none.
    fn rule(&self) -> Result<Option<Retention>, Error> {
        let rule = Retention {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
            within_ms: self.keep_within.map(|seconds| seconds.saturating_mul(1000)),
        };
        match (self.keep_none, rule.is_empty()) {
            (true, _) => Ok(None),
            (false, true) => Err(Error::invalid("nothing says which restore points are to be kept")
                .hint("`--keep-daily 7 --keep-weekly 4`, for one")),
            (false, false) => Ok(Some(rule)),
        }
    }
}

/// Forgets single restore points, also such as cannot be read. What only they had is removed by `rempart gc`.
#[derive(Debug, Args)]
pub struct Forget {
    #[command(flatten)]
    access: Access,
    /// Also points that are served, mounted, recovered from or verified: who reads them may not be able to soon.
    #[arg(long)]
    force: bool,
    /// `VM@POINT`; `@POINT` if nobody can tell whose it is.
    #[arg(required = true)]
    points: Vec<String>,
}

struct Judged {
    root: u64,
    point: Point,
    reasons: BTreeSet<Reason>,
    is_in_use: bool,
}

impl Judged {
    fn is_kept(&self) -> bool {
        self.is_in_use || !self.reasons.is_empty()
    }

    fn why(&self) -> Vec<String> {
        let name = |reason| serde_json::to_value(reason).ok()?.as_str().map(str::to_owned);
        let in_use = self.is_in_use.then(|| "in-use".to_owned());
        self.reasons.iter().filter_map(name).chain(in_use).collect()
    }
}

pub fn run(command: &Retain, output: Output) -> Result<(), Error> {
    let rule = command.keep.rule()?;
    let zone = command.time_zone.clone().unwrap_or_else(Zone::system);
    let repository = command.access.open()?;
    let mut attempt = 1;
    let (judged, forgotten) = loop {
        let log = open_log(&repository)?;
        let judged = judge(command, &repository, &log, rule.as_ref(), &zone, output)?;
        let forgotten: Vec<u64> =
            judged.iter().filter(|judged| !judged.is_kept()).map(|judged| judged.root).collect();
        let told = if command.dry_run { Ok(()) } else { forget_all(&repository, log, &forgotten) };
        match told {
            // Somebody began to read one of them, or forgot it, before it was forgotten here.
            Err(LogError::Refused(Refusal::InUse(..) | Refusal::NoSuchRoot(_))) if attempt < TRIES => {
                attempt += 1
            }
            told => {
                told.map_err(unforgotten)?;
                break (judged, forgotten);
            }
        }
    };
    if output.json {
        let points = judged.iter().map(|judged| {
            json!({
                "vm": judged.point.vm, "point": judged.root, "taken_unix_ms": judged.point.taken.0,
                "kept": judged.is_kept(), "why": judged.why(),
            })
        });
        return output.print_json(&points.collect::<Vec<_>>());
    }
    let rows = judged.iter().map(|judged| {
        let what = if judged.is_kept() { judged.why().join(", ") } else { "forgotten".to_owned() };
        vec![format!("{}@{}", judged.point.vm, judged.root), time(judged.point.taken), what]
    });
    output.table(&["point", "taken", "kept for"], rows.collect())?;
    let verb = if command.dry_run { "would be forgotten" } else { "were forgotten" };
    output.tell(&format!(
        "{} of {} points {verb}, by days of {}; `rempart gc` removes what only they had",
        forgotten.len(),
        judged.len(),
        zone.name()
    ));
    Ok(())
}

fn judge(
    command: &Retain,
    repository: &Repository,
    log: &Log,
    rule: Option<&Retention>,
    zone: &Zone,
    output: Output,
) -> Result<Vec<Judged>, Error> {
    let mut machines: BTreeMap<(String, ChainId), Vec<(u64, Point)>> = BTreeMap::new();
    for (root, record) in log.state().roots() {
        match repository.point(log, *root) {
            Ok(point) => {
                machines.entry((point.vm.clone(), record.chain)).or_default().push((*root, point));
            }
            Err(error) => {
                let error = describe(&format!("point {root} cannot be read, and is kept"), &error);
                output.tell(&format!("{}: {}", error.message, error.cause.unwrap_or_default()));
            }
        }
    }
    for vm in &command.vms {
        if !machines.keys().any(|(name, _)| name == vm) {
            return Err(Error::not_found(format!("`{vm}` has no restore points"))
                .hint("`rempart points` lists them; nothing was forgotten"));
        }
    }
    let readers = readers(repository, log)?;
    let in_use: BTreeSet<u64> = readers.iter().flat_map(|reader| reader.roots.iter().copied()).collect();
    let mut judged = Vec::new();
    for ((vm, _), points) in machines {
        if !command.all && !command.vms.contains(&vm) {
            continue;
        }
        let taken: Vec<_> = points.iter().map(|(_, point)| point.taken).collect();
        let reasons = match rule {
            Some(rule) => rule.reasons(&taken, zone),
            None => vec![BTreeSet::new(); points.len()],
        };
        let all = points.into_iter().zip(reasons);
        judged.extend(all.map(|((root, point), reasons)| {
            let is_in_use = in_use.contains(&root);
            Judged { root, point, reasons, is_in_use }
        }));
    }
    Ok(judged)
}

pub fn forget(command: &Forget, output: Output) -> Result<(), Error> {
    if let Some(point) = command.points.iter().find(|point| !point.contains('@')) {
        return Err(Error::invalid(format!("`{point}` does not say which point is to be forgotten"))
            .hint("`VM@POINT` does; `rempart points` lists them"));
    }
    let repository = command.access.open()?;
    let log = open_log(&repository)?;
    let mut roots = BTreeSet::new();
    for wanted in &command.points {
        let unread = wanted.strip_prefix('@').and_then(|number| number.parse().ok());
        roots.insert(match unread.filter(|root| log.state().roots().contains_key(root)) {
            Some(root) if repository.point(&log, root).is_err() => root,
            _ => find(&repository, &log, wanted)?.0,
        });
    }
    let mut readers = readers(&repository, &log)?;
    readers.retain(|reader| reader.roots.iter().any(|root| roots.contains(root)));
    match readers.first() {
        Some(reader) if !command.force => return Err(in_use(reader, &roots)),
        Some(_) => {
            let sessions: Vec<SessionId> = readers.iter().map(|reader| reader.session).collect();
            let ended = repository.end_readers(&sessions, now());
            ended.map_err(|e| describe("cannot take restore points from those who read them", &e))?;
        }
        None => {}
    }
    let some: Vec<u64> = roots.iter().copied().collect();
    forget_all(&repository, log, &some).map_err(unforgotten)?;
    if output.json {
        return output.print_json(&json!({ "forgotten": roots }));
    }
    output.tell(&format!("{} points were forgotten; `rempart gc` removes what only they had", roots.len()));
    Ok(())
}

fn readers(repository: &Repository, log: &Log) -> Result<Vec<PointReader>, Error> {
    let readers = repository.readers(log.state());
    readers.map_err(|e| describe("cannot read who has restore points in use", &e))
}

fn in_use(reader: &PointReader, roots: &BTreeSet<u64>) -> Error {
    let wanted = reader.roots.iter().filter(|root| roots.contains(root));
    let wanted: Vec<String> = wanted.map(u64::to_string).collect();
    Error::refused(format!("cannot forget what is in use: point {}", wanted.join(", ")))
        .cause(format!("by {}, heard of last at {}", reader.who, time(reader.heard)))
        .hint("end that command; if it is gone for good, `--force`, or `rempart gc` once it was silent for `--idle`")
}

fn unforgotten(error: LogError) -> Error {
    describe("cannot forget restore points", &error.into())
}

fn forget_all(repository: &Arc<Repository>, log: Log, roots: &[u64]) -> Result<(), LogError> {
    if roots.is_empty() {
        return Ok(());
    }
    let mut session = Session::open(log, repository.signer(), SessionId::random(), now())?;
    let mut forget = |some: &[u64]| session.forget(now(), some.to_vec()).map(drop);
    let told = roots.chunks(MAX_ROOTS).try_for_each(&mut forget);
    told.and(session.end(now()).map(drop))
}

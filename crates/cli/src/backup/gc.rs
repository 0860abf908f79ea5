//! `rempart gc`.

use super::access::{Access, chain, describe, now};
use crate::{Output, output::bytes, parse};
use clap::Args;
use rempart_api::Error;
use rempart_repository::collect::{CollectError, Collected, Collection, Outlook, Rewritten, collect, look};
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;

/// Entries of the log that call for a checkpoint: whoever opens a repository reads each of those behind the last one.
const CHECKPOINT_AFTER: u64 = 200;

/// Removes what no restore point has any more. Backups may go on meanwhile.
#[derive(Debug, Args)]
pub struct Gc {
    #[command(flatten)]
    access: Access,
    /// Write packs anew of which less than that many percent is of use, and small ones together; 0: none.
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    repack: u8,
    /// A backup that has told nothing of itself for so long is taken for dead: what it stored is removed, and if it lives it
    /// begins again.
    #[arg(long, value_name = "DURATION", default_value = "7d", value_parser = parse::seconds)]
    idle: u64,
    /// Go on although entries of the log cannot be read: they may have been restore points, and somebody has looked at them.
    #[arg(long)]
    accept_unreadable_entries: bool,
    /// Only say what would be removed.
    #[arg(long)]
    dry_run: bool,
}

pub fn run(command: &Gc, output: Output) -> Result<(), Error> {
    let how = Collection {
        now: now(),
        idle: Duration::from_secs(command.idle),
        follow: true,
        repack: Some(command.repack).filter(|percent| *percent > 0),
        accept_doubtful: command.accept_unreadable_entries,
        checkpoint_after: CHECKPOINT_AFTER,
    };
    let repository = command.access.open()?;
    let failed = |error: CollectError| tell_error(error, command.access.name());
    if command.dry_run {
        return tell_outlook(&look(&repository, &how).map_err(failed)?, output);
    }
    tell_done(&collect(&repository, &how).map_err(failed)?, output)
}

fn tell_error(error: CollectError, name: &str) -> Error {
    let what = format!("cannot collect what is of no use in `{name}`");
    match error {
        CollectError::Repository(error) => describe(&what, &error),
        CollectError::Log(error) => describe(&what, &error.into()),
        CollectError::Doubtful(_) => Error::refused(what)
            .cause(chain(&error))
            .hint("`--accept-unreadable-entries` goes on without what they may have been"),
        _ => Error::failed(what).cause(chain(&error)),
    }
}

fn tell_unreadable(unreadable: &BTreeMap<u64, String>, output: Output) {
    for (point, why) in unreadable {
        output.tell(&format!("point {point} cannot be followed, so all that it claims is kept: {why}"));
    }
}

fn tell_done(done: &Collected, output: Output) -> Result<(), Error> {
    if output.json {
        return output.print_json(&json!({
            "removed_objects": done.removed.objects,
            "freed_bytes": done.removed.bytes,
            "rewritten_packs": done.rewritten.packs,
            "rewritten_bytes": done.rewritten.bytes,
            "retained_objects": done.removed.retained + done.condemned.retained.len(),
            "retained_bytes": done.removed.retained_bytes + done.retained_bytes,
            "unsettled_objects": done.removed.unsettled,
            "merged_segments": done.segments,
            "ended_sessions": done.fenced,
            "removed_log_entries": done.truncated,
            "unreadable_points": done.unreadable,
        }));
    }
    tell_unreadable(&done.unreadable, output);
    let removed = &done.removed;
    output.tell(&format!("removed {} objects: {} are free", removed.objects, bytes(removed.bytes)));
    if done.rewritten.packs > 0 {
        let Rewritten { packs, bytes: written } = done.rewritten;
        output.tell(&format!("of {packs} packs, what is of use was written anew: {}", bytes(written)));
    }
    let retained = removed.retained + done.condemned.retained.len();
    if retained > 0 {
        let held = bytes(removed.retained_bytes + done.retained_bytes);
        output.tell(&format!("{retained} objects, {held}, are of no use, and the place must keep them yet"));
    }
    if removed.unsettled > 0 {
        let unsettled = removed.unsettled;
        output.tell(&format!(
            "whether {unsettled} objects were removed is not known: the next run looks again"
        ));
    }
    if done.fenced > 0 {
        output.tell(&format!(
            "{} backups, or readers of points, that were idle for too long were ended",
            done.fenced
        ));
    }
    Ok(())
}

fn tell_outlook(outlook: &Outlook, output: Output) -> Result<(), Error> {
    if output.json {
        return output.print_json(&json!({
            "removable_packs": outlook.packs,
            "removable_bytes": outlook.bytes,
            "sparse_packs": outlook.sparse,
            "sparse_waste_bytes": outlook.sparse_waste,
            "retained_packs": outlook.retained,
            "retained_bytes": outlook.retained_bytes,
            "open_sessions": outlook.open_sessions,
            "unreadable_points": outlook.unreadable,
        }));
    }
    tell_unreadable(&outlook.unreadable, output);
    output.tell(&format!("{} packs, {}, would be removed", outlook.packs, bytes(outlook.bytes)));
    if outlook.sparse > 0 {
        let waste = bytes(outlook.sparse_waste);
        output
            .tell(&format!("{} packs would be written anew, without the {waste} of no use", outlook.sparse));
    }
    if outlook.retained > 0 {
        let held = bytes(outlook.retained_bytes);
        output.tell(&format!(
            "{} packs, {held}, are of no use, and the place must keep them yet",
            outlook.retained
        ));
    }
    if outlook.open_sessions > 0 {
        output.tell(&format!("{} sessions are open: what they stored is left alone", outlook.open_sessions));
    }
    Ok(())
}

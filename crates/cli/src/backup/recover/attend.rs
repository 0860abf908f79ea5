//! A machine that runs from a restore point: its disks are moved to their overlays while it does.

use super::super::hardware::Hardware;
use super::folder::{Folder, Record, point_node};
use crate::Output;
use rempart_api::{Error, Progress};
use rempart_hypervisor::qmp::{Client, Event, Heard};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

const QUICK: Duration = Duration::from_secs(60);
/// All that a disk's cache holds may have to be written.
const FLUSH: Duration = Duration::from_secs(600);
/// A move that failed is begun again after so long.
const AGAIN: Duration = Duration::from_secs(10);
/// Between two looks at how far the move is.
const LOOK: Duration = Duration::from_millis(500);

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// No disk needs the repository any more; it runs on.
    Moved,
    /// It was switched off, or QEMU died.
    Off,
    /// By a signal: so was QEMU, in order.
    Stopped,
}

pub fn job(place: usize) -> String {
    format!("move-{place}")
}

/// Lets it run, and moves its disks.
pub async fn attend(
    client: &Client,
    folder: &Folder,
    record: &Record,
    hardware: &Hardware,
    limit: Option<u64>,
    output: Output,
) -> Result<Ended, Error> {
    let failed = |e: &dyn std::fmt::Display| Error::failed(folder.what()).cause(e);
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| failed(&e))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| failed(&e))?;
    let mut events = client.events();
    let status = client.query_status().await.map_err(|e| failed(&e))?;
    // It waits for that, or for what could not be read before. Whoever stopped it otherwise had a reason.
    if matches!(status.status.as_str(), "prelaunch" | "io-error") {
        client.cont().await.map_err(|e| failed(&e))?;
    }
    let under_way = jobs(client).await.map_err(|e| failed(&e))?;
    let mut left = BTreeSet::new();
    for (place, disk) in record.disks.iter().enumerate() {
        if !folder.needs_point(disk)? {
            forget_point(client, place).await;
            continue;
        }
        left.insert(place);
        if is_of(&under_way, place) {
            let speed = json!({ "device": job(place), "speed": limit.unwrap_or(0) });
            client.execute("block-job-set-speed", speed, QUICK).await.map_err(|e| failed(&e))?;
        } else {
            begin(client, &hardware.node(&disk.name, place), place, limit).await.map_err(|e| failed(&e))?;
        }
    }
    let mut begun = vec![Instant::now(); record.disks.len()];
    let mut show = output.progress();
    let mut look = tokio::time::interval(LOOK);
    let ended = loop {
        if left.is_empty() {
            break Ended::Moved;
        }
        tokio::select! {
            _ = terminate.recv() => break Ended::Stopped,
            _ = interrupt.recv() => break Ended::Stopped,
            heard = events.next() => match heard {
                None => break Ended::Off,
                Some(Heard::Event(event)) => hear(&event, output),
                Some(Heard::Missed(_)) => {}
            },
            _ = look.tick() => {
                let Ok(found) = jobs(client).await else { break Ended::Off };
                let number = |job: &Value, key: &str| job[key].as_u64().unwrap_or(0);
                let (done_bytes, total_bytes) = found.iter().fold((0, 0), |(done, total), job| {
                    (done + number(job, "offset"), total + number(job, "len"))
                });
                if total_bytes > 0 {
                    let phase = "move the disks".to_owned();
                    show.show(&Progress { phase, done_bytes, total_bytes, new_bytes: None });
                }
                for place in left.iter().copied() {
                    let is_through = |found: &&Value| {
                        found["device"] == job(place).as_str() && found["status"] == "pending"
                    };
                    if found.iter().any(|found| is_through(&found)) {
                        let node = hardware.node(&record.disks[place].name, place);
                        finalize(client, &node, place).await.map_err(|e| failed(&e))?;
                    }
                }
                for place in left.iter().copied().filter(|place| !is_of(&found, *place)).collect::<Vec<_>>() {
                    let disk = &record.disks[place];
                    if !folder.needs_point(disk)? {
                        forget_point(client, place).await;
                        left.remove(&place);
                    } else if begun[place].elapsed() > AGAIN {
                        begun[place] = Instant::now();
                        let node = hardware.node(&disk.name, place);
                        begin(client, &node, place, limit).await.map_err(|e| failed(&e))?;
                    }
                }
            }
        }
    };
    show.finish();
    if ended == Ended::Stopped {
        client.quit().await.map_err(|e| failed(&e))?;
        // Until it is gone: then everything is on the disk.
        while events.next().await.is_some() {}
    }
    Ok(ended)
}

/// Whether one of these jobs is the move of that disk.
fn is_of(jobs: &[Value], place: usize) -> bool {
    jobs.iter().any(|found| found["device"] == job(place).as_str())
}

async fn begin(
    client: &Client,
    node: &str,
    place: usize,
    limit: Option<u64>,
) -> rempart_hypervisor::Result<()> {
    let arguments = json!({
        "job-id": job(place), "device": node, "on-error": "report", "auto-finalize": false,
        "speed": limit.unwrap_or(0),
    });
    client.execute("block-stream", arguments, QUICK).await.map(drop)
}

/// Has QEMU forget the point behind a disk. It writes that into the image's header whatever else is on its way there: what
/// it moved has to be on the disk before, or whoever kills QEMU then loses it.
async fn finalize(client: &Client, node: &str, place: usize) -> Result<(), String> {
    let flush = json!({ "command-line": format!("qemu-io {node} \"flush\"") });
    let told = client.execute("human-monitor-command", flush, FLUSH).await.map_err(|e| e.to_string())?;
    match told.as_str().map(str::trim) {
        Some("") => {}
        _ => return Err(format!("flush `{node}`: {told}")),
    }
    let ended = client.execute("job-finalize", json!({ "id": job(place) }), QUICK).await;
    ended.map(drop).map_err(|e| e.to_string())
}

/// Has QEMU close its connection to it, if it has one still.
async fn forget_point(client: &Client, place: usize) {
    let _ = client.blockdev_del(&point_node(place)).await;
}

async fn jobs(client: &Client) -> rempart_hypervisor::Result<Vec<Value>> {
    let told = client.execute("query-block-jobs", Value::Null, QUICK).await?;
    Ok(told.as_array().cloned().unwrap_or_default())
}

/// Tells what people should know.
fn hear(event: &Event, output: Output) {
    match event {
        Event::BlockIoError { node_name, write, action, reason, .. } => {
            let what = if *write { "written" } else { "read" };
            let stands = if action == "stop" { "; the machine waits" } else { "" };
            output.tell(&format!("`{node_name}` could not be {what}: {reason}{stands}"));
        }
        Event::Other { name, data } if name == "BLOCK_JOB_COMPLETED" && data["error"].is_string() => {
            // The machine runs on from the point.
            let (job, why) = (data["device"].as_str(), data["error"].as_str());
            let (job, why) = (job.unwrap_or_default(), why.unwrap_or_default());
            output.tell(&format!("`{job}` ended: {why}; it tries again within {} s", AGAIN.as_secs()));
        }
        _ => {}
    }
}

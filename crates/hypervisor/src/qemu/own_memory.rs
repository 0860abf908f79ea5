//! The memory of a machine of ours, kept while its guard has it stand still.
//!
//! QEMU has a guest go on by itself when a migration fails that stopped it, whatever has become of its lease by then. It does
//! not with one that stood still before the migration began. So the guard pauses the guest first, nobody but the guard
//! resumes it, and not before it is known that QEMU sends no more: a guest that goes on while it is sent is stopped by QEMU.
//!
//! | the guest | what is done | when it is lost half way |
//! |---|---|---|
//! | is paused by its guard | QEMU has answered: its disks are at rest | resumed as any other that was paused |
//! | stands still | the [`MARK`] is made, QEMU sends memory and devices | QEMU gives up, as its reader is gone, and the guest stands still; [`end`] sees to that |
//! | stands still | QEMU has sent all, and given its images up | `cont` takes them back |
//! | goes on, by [`end`] and then the guard | | the next who resumes it ends it first, for the mark is there |

use super::backup::description::describe;
use super::saved_memory::{Receiver, all_came, not_sent, refuse_strange_capabilities, refused};
use crate::error::{Error, ErrorKind, Result};
use crate::machine::{KeptMemory, MemoryWanted};
use crate::qmp::Client;
use crate::qmp::migration::{MigratedMemory, MigrationParameters};
use crate::run_dir::RunDir;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::net::UnixListener;
use tokio::sync::oneshot;

/// In the run directory from before QEMU begins to send until it is known that it does not any more.
pub(super) const MARK: &str = "memory.saving";

/// Nobody else uses the machine's processors meanwhile, nor its disks.
const BANDWIDTH: u64 = 1 << 40;
const TICK: Duration = Duration::from_millis(100);
/// Between two looks at something that takes milliseconds.
const POLL: Duration = Duration::from_millis(5);
/// QEMU gives a migration up at once, unless its disks hang.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// Has a machine that its guard paused write its memory and devices.
pub(super) async fn save(client: &Client, run_dir: &RunDir, wanted: MemoryWanted) -> Result<KeptMemory> {
    let begun = Instant::now();
    // QEMU answers one at a time: by now its `stop` is over, and with it whatever its disks had to do.
    let status = client.query_status().await?;
    if status.status != "paused" {
        return Err(refused(format!("QEMU does not say that it is paused but `{}`", status.status)));
    }
    refuse_strange_capabilities(client).await?;
    let before = client.query_migrate_parameters().await?;
    if !before.tls_creds.is_empty() {
        return Err(refused("QEMU is set up to migrate by TLS only (`tls-creds`)"));
    }
    let description = describe(client).await;
    let (listener, socket) = listen(run_dir)?;
    client.migrate_set_parameters(&MigrationParameters { max_bandwidth: BANDWIDTH, ..before }).await?;
    run_dir.write(MARK, b"")?;
    let MemoryWanted { file, most_bytes, limit } = wanted;
    let (receiver, ended) = Receiver::of_migration(client, listener, &socket, file, most_bytes).await?;
    let sent = all_is_sent(client, &receiver, ended, begun, limit).await;
    if sent.is_err() {
        receiver.break_off();
    }
    sent?;
    Ok(KeptMemory { bytes: receiver.finish().bytes, description })
}

/// A socket that QEMU, as its user, can connect to: the directory is that user's.
fn listen(run_dir: &RunDir) -> Result<(UnixListener, PathBuf)> {
    run_dir.remove("memory.sock")?;
    let path = run_dir.file("memory.sock");
    let make = || {
        let listener = UnixListener::bind(&path)?;
        let owner = std::fs::metadata(run_dir.path())?;
        lchown(&path, Some(owner.uid()), Some(owner.gid()))?;
        Ok(listener)
    };
    let made =
        make().map_err(|error: std::io::Error| Error::io(format!("listen on `{}`", path.display()), error));
    Ok((made?, path))
}

async fn all_is_sent(
    client: &Client,
    receiver: &Receiver,
    mut ended: oneshot::Receiver<std::io::Result<()>>,
    begun: Instant,
    limit: Duration,
) -> Result<()> {
    let too_long = || Error::deadline("have QEMU send the guest's memory", limit);
    let mut tick = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            biased;
            end = &mut ended => {
                all_came(end)?;
                break;
            }
            _ = tick.tick() => {}
        }
        let elapsed = begun.elapsed();
        if elapsed > limit {
            return Err(too_long());
        }
        if elapsed < limit / 4 {
            continue;
        }
        // In its last moments QEMU does not answer.
        if let Ok(Ok(migration)) = tokio::time::timeout(TICK, client.query_migrate()).await
            && let Some(expected) = expected(&migration.ram, elapsed).filter(|expected| *expected > limit)
        {
            return Err(refused(format!(
                "the guest would have to stand still for about {:.1} s, and {:.1} s are allowed: {} MiB of its memory were \
                 taken in {} ms",
                expected.as_secs_f64(),
                limit.as_secs_f64(),
                receiver.bytes() >> 20,
                elapsed.as_millis()
            )));
        }
    }
    loop {
        let migration = client.query_migrate().await?;
        match migration.status.as_str() {
            "completed" if client.query_status().await?.status == "postmigrate" => return Ok(()),
            "failed" | "cancelled" => return Err(not_sent(migration.error_desc)),
            _ if begun.elapsed() > limit => return Err(too_long()),
            _ => tokio::time::sleep(POLL).await,
        }
    }
}

/// How long all of it takes, by what was sent so far.
fn expected(memory: &MigratedMemory, elapsed: Duration) -> Option<Duration> {
    let sent = memory.total.checked_sub(memory.remaining).filter(|sent| *sent > 0)?;
    Some(elapsed.mul_f64(memory.total as f64 / sent as f64))
}

/// Whether nothing has happened to the machine since its memory was kept.
pub(super) async fn stands_as_kept(client: &Client) -> Result<bool> {
    Ok(client.query_status().await?.status == "postmigrate")
}

/// Whether [`end`] is to be called before the machine goes on.
pub(super) fn is_marked(run_dir: &RunDir) -> bool {
    run_dir.file(MARK).exists()
}

/// Makes sure that QEMU sends no more.
pub(super) async fn end(client: &Client, run_dir: &RunDir) -> Result<()> {
    let deadline = Instant::now() + END_DEADLINE;
    loop {
        let migration = client.query_migrate().await?;
        let is_over = matches!(migration.status.as_str(), "" | "none" | "completed" | "failed" | "cancelled");
        if is_over && client.query_status().await?.status != "finish-migrate" {
            break;
        }
        if Instant::now() > deadline {
            let detail = format!("QEMU says `{}`", migration.status);
            return Err(Error::new(
                ErrorKind::Deadline,
                "have QEMU send no more of the guest's memory",
                detail,
            ));
        }
        if !is_over && migration.status != "cancelling" {
            client.migrate_cancel().await?;
        }
        tokio::time::sleep(POLL).await;
    }
    run_dir.remove("memory.sock")?;
    run_dir.remove(MARK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_takes_is_reckoned_by_what_was_sent() {
        let memory = |total, remaining| MigratedMemory { total, remaining, ..MigratedMemory::default() };
        let second = Duration::from_secs(1);
        assert_eq!(expected(&memory(100, 75), second), Some(4 * second));
        assert_eq!(expected(&memory(100, 0), second), Some(second));
        // Nothing is known: before the first byte, and where QEMU's numbers make no sense.
        assert_eq!(expected(&memory(100, 100), second), None);
        assert_eq!(expected(&memory(0, 100), second), None);
        assert_eq!(expected(&memory(0, 0), second), None);
    }
}

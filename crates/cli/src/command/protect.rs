use super::status::find;
use crate::Output;
use clap::Args;
use rempart_api::{Client, Error, Job, Progress, ProtectRequest};
use std::time::Duration;

#[derive(Debug, Args)]
pub struct Protect {
    name: String,
    /// The node that keeps the second copy.
    #[arg(long)]
    peer: String,
    /// Wait until every write is on both nodes.
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Args)]
pub struct Unprotect {
    name: String,
}

pub async fn protect(command: Protect, client: &Client, output: Output) -> Result<(), Error> {
    let name = &command.name;
    let request = ProtectRequest { peer: command.peer.clone(), seed: false };
    let job: Job = client.post(&format!("/v1/vms/{name}/protect"), &request).await?;
    let mut show = output.progress();
    let done = client.wait(job.id, |progress| show.show(progress)).await;
    if done.is_err() || !command.wait {
        show.finish();
    }
    done?;
    if command.wait {
        loop {
            let status = find(client, name).await?;
            if status.mirrored {
                break;
            }
            if let Some(resync) = &status.resync {
                show.show(&Progress {
                    phase: format!("copying to `{}`", command.peer),
                    done_bytes: resync.bytes_sent,
                    total_bytes: resync.bytes_changed,
                });
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        show.finish();
    }
    if output.json {
        return output.print_json(&find(client, name).await?);
    }
    if command.wait {
        output.tell(&format!("`{name}` is mirrored to `{}`", command.peer));
    } else {
        output.tell(&format!(
            "`{name}` is being copied to `{}`; follow it with `rempart status --watch`",
            command.peer
        ));
    }
    Ok(())
}

pub async fn unprotect(command: Unprotect, client: &Client, output: Output) -> Result<(), Error> {
    let name = &command.name;
    let job: Job = client.post(&format!("/v1/vms/{name}/unprotect"), &()).await?;
    super::finish_job(client, output, job, &format!("`{name}` is no longer mirrored")).await.map(drop)
}

use super::status::find;
use crate::Output;
use clap::Args;
use rempart_api::{Client, Error, Job, ProtectRequest};

#[derive(Debug, Args)]
pub struct Protect {
    name: String,
    /// The node that keeps the second copy.
    #[arg(long)]
    peer: String,
    /// Wait until every write is on both nodes. This is the default.
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Return as soon as the copying goes on by itself.
    #[arg(long, overrides_with = "wait")]
    no_wait: bool,
}

#[derive(Debug, Args)]
pub struct Unprotect {
    name: String,
}

pub async fn protect(command: Protect, client: &Client, output: Output) -> Result<(), Error> {
    let name = &command.name;
    let wait = command.wait || !command.no_wait;
    let request = ProtectRequest { peer: command.peer.clone(), wait };
    let job: Job = client.post(&format!("/v1/vms/{name}/protect"), &request).await?;
    let mut show = output.progress();
    let done = client.wait(job.id, |progress| show.show(progress)).await;
    show.finish();
    done?;
    if output.json {
        return output.print_json(&find(client, name).await?);
    }
    let peer = &command.peer;
    output.tell(&match wait {
        true => format!("`{name}` is mirrored to `{peer}`"),
        false => format!("`{name}` is being copied to `{peer}`; follow it with `rempart status --watch`"),
    });
    Ok(())
}

pub async fn unprotect(command: Unprotect, client: &Client, output: Output) -> Result<(), Error> {
    let name = &command.name;
    let job: Job = client.post(&format!("/v1/vms/{name}/unprotect"), &()).await?;
    let done = super::finish_job(client, output, job, &format!("`{name}` is no longer mirrored")).await?;
    for left in done["copies_left"].as_array().into_iter().flatten().filter_map(|left| left.as_str()) {
        output.tell(&format!("warning: its copy remains on {left}"));
    }
    Ok(())
}

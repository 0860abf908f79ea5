use crate::Output;
use clap::Args;
use rempart_api::{Client, Error, FailoverMode, FailoverRequest, Job, RejoinRequest};

#[derive(Debug, Args)]
pub struct Failover {
    name: String,
    /// Shut down there, hand over, boot here; nothing is lost. The default.
    #[arg(long, conflicts_with = "force")]
    planned: bool,
    /// Take over without the primary's consent. Tells first what would be lost.
    #[arg(long)]
    force: bool,
    /// You made sure that the other side cannot run the machine any more. `--force` demands it.
    #[arg(long, requires = "force")]
    confirm_fenced: bool,
}

#[derive(Debug, Args)]
pub struct Failback {
    name: String,
}

#[derive(Debug, Args)]
pub struct Rejoin {
    name: String,
    /// Do it; without this it only tells what would be given up.
    #[arg(long)]
    yes: bool,
    /// Do not save this copy's disks aside first.
    #[arg(long, requires = "yes")]
    discard: bool,
}

pub async fn rejoin(command: Rejoin, client: &Client, output: Output) -> Result<(), Error> {
    let name = &command.name;
    let request = RejoinRequest { confirm: command.yes, discard: command.discard };
    let job: Job = client.post(&format!("/v1/vms/{name}/rejoin"), &request).await?;
    let done = format!("`{name}` rejoins; follow it with `rempart status --watch`");
    let result = super::finish_job(client, output, job, &done).await?;
    if let Some(saved) = result["saved"].as_str() {
        output.tell(&format!("what only this copy held is saved in `{saved}`"));
    }
    Ok(())
}

pub async fn failover(command: Failover, client: &Client, output: Output) -> Result<(), Error> {
    let mode = if command.force { FailoverMode::Force } else { FailoverMode::Planned };
    move_here(&command.name, FailoverRequest { mode, confirm_fenced: command.confirm_fenced }, client, output)
        .await
}

pub async fn failback(command: Failback, client: &Client, output: Output) -> Result<(), Error> {
    let request = FailoverRequest { mode: FailoverMode::Planned, confirm_fenced: false };
    move_here(&command.name, request, client, output).await
}

async fn move_here(
    name: &str,
    request: FailoverRequest,
    client: &Client,
    output: Output,
) -> Result<(), Error> {
    let job: Job = client.post(&format!("/v1/vms/{name}/failover"), &request).await?;
    super::finish_job(client, output, job, &format!("`{name}` runs here")).await.map(drop)
}

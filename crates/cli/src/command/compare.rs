use crate::{Output, output::bytes};
use clap::Args;
use rempart_api::{Client, Comparison, Error, Job};

#[derive(Debug, Args)]
pub struct Compare {
    name: String,
}

pub async fn run(command: Compare, client: &Client, output: Output) -> Result<(), Error> {
    let job: Job = client.post(&format!("/v1/vms/{}/compare", command.name), &()).await?;
    let value = super::finish_job(client, output, job, "").await?;
    let found: Comparison = serde_json::from_value(value)
        .map_err(|e| Error::failed("cannot read the comparison's result").cause(e))?;
    if found.different_extents == 0 {
        output.tell(&format!(
            "both copies of `{}` are equal: {} compared at log position {}",
            command.name,
            bytes(found.compared_bytes),
            found.lsn
        ));
        return Ok(());
    }
    let places: Vec<String> =
        found.first_differences.iter().take(5).map(|(disk, at)| format!("disk {disk} offset {at}")).collect();
    Err(Error::failed(format!(
        "the copies of `{}` differ in {} extents of 64 KiB at log position {}",
        command.name, found.different_extents, found.lsn
    ))
    .cause(format!("first differences: {}", places.join(", ")))
    .hint("find out which copy is good before anything else; the primary's is the one that the guest sees"))
}

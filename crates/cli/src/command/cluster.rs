use crate::{Output, parse};
use clap::{Subcommand, ValueEnum};
use rempart_api::{
    Client, ClusterCreate, Error, JoinRequest, MemberRole, Members, RevokeRequest, Token, TokenRequest,
};

#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Make this node the first of a new cluster.
    Create { name: String },
    /// Print a one-time token with which another machine joins.
    Token {
        #[arg(long, value_enum, default_value = "node")]
        role: Role,
        /// How long the token may be used, such as 15m or 1h.
        #[arg(long, default_value = "1h", value_parser = parse::seconds)]
        valid: u64,
    },
    /// Join the cluster that printed the token.
    Join { token: String },
    /// The members and whether they answer.
    Members,
    /// Remove a lost or replaced member and revoke its certificate.
    Remove { name: String },
    /// Draw a new key for this node and have it certified again.
    Renew,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Role {
    Node,
    Witness,
}

pub async fn run(command: ClusterCommand, client: &Client, output: Output) -> Result<(), Error> {
    match command {
        ClusterCommand::Create { name } => {
            let members: Members = client.post("/v1/cluster", &ClusterCreate { name: name.clone() }).await?;
            show(
                output,
                &members,
                &format!("cluster `{name}` created; add machines with `rempart cluster token`"),
            )
        }
        ClusterCommand::Token { role, valid } => {
            let role = match role {
                Role::Node => MemberRole::Node,
                Role::Witness => MemberRole::Witness,
            };
            let token: Token =
                client.post("/v1/cluster/tokens", &TokenRequest { role, valid_s: valid }).await?;
            if output.json { output.print_json(&token) } else { output.print(&token.token) }
        }
        ClusterCommand::Join { token } => {
            let members: Members = client.post("/v1/cluster/join", &JoinRequest { token }).await?;
            show(output, &members, &format!("joined cluster `{}`", members.cluster))
        }
        ClusterCommand::Members => {
            let members: Members = client.get("/v1/cluster").await?;
            if output.json {
                return output.print_json(&members);
            }
            let rows = members.members.iter().map(|m| {
                let role = match m.role {
                    MemberRole::Node => "node",
                    MemberRole::Witness => "witness",
                };
                let reachable = match m.reachable {
                    None => "this node",
                    Some(true) => "yes",
                    Some(false) => "NO",
                };
                vec![m.name.clone(), role.into(), m.address.clone(), reachable.into()]
            });
            output.table(&["name", "role", "address", "reachable"], rows.collect())
        }
        ClusterCommand::Remove { name } => {
            let members: Members =
                client.post("/v1/cluster/remove", &RevokeRequest { name: name.clone() }).await?;
            show(output, &members, &format!("`{name}` removed and its certificate revoked"))
        }
        ClusterCommand::Renew => {
            let members: Members = client.post("/v1/cluster/renew", &()).await?;
            show(output, &members, "certificate renewed")
        }
    }
}

fn show(output: Output, members: &Members, done: &str) -> Result<(), Error> {
    if output.json {
        return output.print_json(members);
    }
    output.tell(done);
    Ok(())
}

//! The cluster's members, as this node knows them. Changes are rare and made by people; the list carries a version,
//! every change raises it, and a node that hears of a higher one takes that list whole.

use crate::durable;
use rempart_api::{Member, MemberRole};
use rempart_types::NodeId;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    pub id: NodeId,
    pub name: String,
    pub role: MemberRole,
    /// `host:port`.
    pub address: String,
}

/// What is written to `cluster.json` and told to peers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    pub id: String,
    pub name: String,
    pub version: u64,
    pub members: Vec<MemberRecord>,
}

impl Cluster {
    pub fn load(path: &Path) -> io::Result<Option<Cluster>> {
        durable::read_json(path)
    }

    pub fn save(&self, path: &Path) -> io::Result<()> {
        durable::write_json(path, self)
    }

    pub fn by_name(&self, name: &str) -> Option<&MemberRecord> {
        self.members.iter().find(|member| member.name == name)
    }

    pub fn by_id(&self, id: NodeId) -> Option<&MemberRecord> {
        self.members.iter().find(|member| member.id == id)
    }

    pub fn name_of(&self, id: NodeId) -> String {
        self.by_id(id).map_or_else(|| id.to_string(), |member| member.name.clone())
    }

    pub fn nodes(&self) -> impl Iterator<Item = &MemberRecord> {
        self.members.iter().filter(|member| member.role == MemberRole::Node)
    }

    pub fn witness(&self) -> Option<&MemberRecord> {
        self.members.iter().find(|member| member.role == MemberRole::Witness)
    }

    /// Adds a member, or changes the one with its id.
    pub fn put(&mut self, member: MemberRecord) {
        self.members.retain(|other| other.id != member.id);
        self.members.push(member);
        self.members.sort_by(|a, b| (a.role, &a.name).cmp(&(b.role, &b.name)));
        self.version += 1;
    }

    pub fn remove(&mut self, id: NodeId) {
        self.members.retain(|member| member.id != id);
        self.version += 1;
    }

    pub fn to_api(&self, me: NodeId, reachable: impl Fn(NodeId) -> bool) -> rempart_api::Members {
        rempart_api::Members {
            cluster: self.name.clone(),
            cluster_id: self.id.clone(),
            version: self.version,
            members: self
                .members
                .iter()
                .map(|member| Member {
                    id: member.id,
                    name: member.name.clone(),
                    role: member.role,
                    address: member.address.clone(),
                    reachable: (member.id != me).then(|| reachable(member.id)),
                })
                .collect(),
        }
    }
}

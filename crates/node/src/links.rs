//! Keeps each group connected with its peers. Of two nodes the one with the lower id dials; the other waits to be
//! dialled, so that two connections never chase each other.

use crate::group::ToGroup;
use crate::node::Node;
use crate::vm::LinkWanted;
use rempart_transport::{Deadlines, Hello, Identity, Purpose, Role, dial_data};
use rempart_types::{GroupId, NodeId};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;

const FIRST_RETRY: Duration = Duration::from_millis(100);
const MOST_RETRY: Duration = Duration::from_secs(1);

/// Who is being dialled. What is wanted meanwhile is not forgotten: a connection may be lost again before its dialler
/// is done.
#[derive(Debug, Default)]
struct Dialling(BTreeMap<(GroupId, NodeId), bool>);

impl Dialling {
    /// False if somebody dials already; that one will go on.
    fn begin(&mut self, link: (GroupId, NodeId)) -> bool {
        match self.0.get_mut(&link) {
            Some(again) => {
                *again = true;
                false
            }
            None => self.0.insert(link, false).is_none(),
        }
    }

    /// False if the dialler has to go on.
    fn end(&mut self, link: (GroupId, NodeId)) -> bool {
        let again = self.0.get_mut(&link).is_some_and(std::mem::take);
        if !again {
            self.0.remove(&link);
        }
        !again
    }
}

/// One dialler per group and peer, while a link is wanted.
pub async fn keep(node: Arc<Node>, mut wanted: mpsc::UnboundedReceiver<LinkWanted>) {
    let dialling: Arc<Mutex<Dialling>> = Arc::default();
    while let Some(LinkWanted { group, peer }) = wanted.recv().await {
        if node.id() > peer || !dialling.lock().expect("held for a moment only").begin((group, peer)) {
            continue;
        }
        let (node, dialling) = (node.clone(), dialling.clone());
        tokio::spawn(async move {
            loop {
                dial(&node, group, peer).await;
                // A peer that takes connections and closes them at once is not dialled without a pause.
                tokio::time::sleep(FIRST_RETRY).await;
                if dialling.lock().expect("held for a moment only").end((group, peer)) {
                    return;
                }
            }
        });
    }
}

/// Dials until it succeeds or the link is not wanted any more.
async fn dial(node: &Node, group: GroupId, peer: NodeId) {
    let mut pause = FIRST_RETRY;
    let mut last_error = String::new();
    loop {
        let Some(vm) = node.vm_of_group(group).filter(|vm| vm.peers().contains(&peer)) else { return };
        match dial_once(node, group, peer).await {
            Ok(connection) => {
                node.heard_of(peer);
                vm.group.send(ToGroup::Link { peer, connection: Box::new(connection) });
                return;
            }
            Err(error) => {
                if error != last_error {
                    tracing::info!(
                        vm = vm.name(),
                        peer = node.name_of(peer),
                        error,
                        "no link to the peer yet"
                    );
                    last_error = error;
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MOST_RETRY);
    }
}

async fn dial_once(
    node: &Node,
    group: GroupId,
    peer: NodeId,
) -> Result<rempart_transport::Connection, String> {
    let tls = node.tls().ok_or("this node is in no cluster")?;
    let cluster = tls.identity().cluster;
    let address = node.address_of(peer).await.map_err(|e| e.to_string())?;
    let expected = Identity { cluster, role: Role::Node, id: peer };
    let hello = Hello::new(cluster, node.id(), group, Purpose::Replication);
    let mut connection =
        dial_data(address, &tls, expected, hello, deadlines(node)).await.map_err(|e| e.to_string())?;
    connection.set_compression(node.compression());
    Ok(connection)
}

/// Every wait on a peer ends by these.
pub fn deadlines(node: &Node) -> Deadlines {
    let timing = node.config.timing;
    Deadlines {
        handshake: Duration::from_millis(timing.peer_deadline_ms),
        silence: Duration::from_millis(timing.peer_deadline_ms),
        ..Deadlines::default()
    }
}

/// The first address that `text` resolves to.
pub async fn resolve(text: &str) -> Result<SocketAddr, String> {
    let mut found =
        tokio::net::lookup_host(text).await.map_err(|e| format!("cannot resolve `{text}`: {e}"))?;
    found.next().ok_or_else(|| format!("`{text}` resolves to no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer closed the connection while its dialler was still about to leave: nobody dialled again.
    #[test]
    fn a_link_lost_before_its_dialler_is_done_is_dialled_again() {
        let (link, other) = ((GroupId(1), NodeId(2)), (GroupId(1), NodeId(3)));
        let mut dialling = Dialling::default();
        assert!(dialling.begin(link));
        assert!(!dialling.begin(link), "one dialler a link");
        assert!(dialling.begin(other));
        assert!(!dialling.end(link), "it was wanted again");
        assert!(dialling.end(link));
        assert!(dialling.begin(link), "it was wanted after all was done");
        assert!(dialling.end(other));
    }
}

//! What peers may ask of this node, and how a connection finds its way: one port serves the data plane, the API
//! between nodes, and strangers who want to join.

use super::answer::{Answer, Body, Refused, answer};
use super::enrol;
use crate::group::ToGroup;
use crate::links;
use crate::members::Cluster;
use crate::membership;
use crate::node::Node;
use crate::operation::{self, DiskChange, HandOver, ReplicaOffer};
use crate::schedule;
use axum::extract::{Path, State};
use axum::routing::{get, post};
use axum::{Extension, Router};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use rempart_api::Error;
use rempart_transport::{Accepted, Hello, HttpStream, Incoming, Peer, Purpose, Refusal, RefusalReason, Role};
use rempart_types::GroupId;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections that are being identified, or are spoken to over HTTP, at once.
const MAX_CONNECTIONS: usize = 512;

/// Accepts until the daemon ends.
pub async fn serve(node: Arc<Node>, listener: TcpListener) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                // Out of descriptors, most likely: others must go first.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let node = node.clone();
        tokio::spawn(async move {
            let Some(tls) = node.tls() else { return };
            match rempart_transport::accept(socket, &tls, links::deadlines(&node)).await {
                Ok(Accepted::Data(incoming)) => data(&node, incoming).await,
                Ok(Accepted::Http(stream)) => {
                    if let Some(peer) = stream.peer().cloned() {
                        if tls.is_revoked(&peer) {
                            return;
                        }
                        node.heard_of(peer.identity.id);
                        http(stream, router(node).layer(Extension(peer))).await;
                    }
                }
                Ok(Accepted::Enrolment(stream)) => http(stream, enrol::router(node)).await,
                Err(error) => tracing::info!(%error, "connection refused"),
            }
            drop(permit);
        });
    }
}

async fn http(stream: HttpStream, router: Router) {
    let service = TowerToHyperService::new(super::to_the_end(router));
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(hyper_util::rt::TokioTimer::new())
        .header_read_timeout(Duration::from_secs(10))
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = serving.await {
        tracing::debug!(%error, "connection ended");
    }
}

/// A peer's replica wants to talk to ours.
async fn data(node: &Node, incoming: Incoming) {
    let (peer, group) = (incoming.peer().identity.id, incoming.hello().group);
    let vm = node.vm_of_group(group).filter(|vm| vm.peers().contains(&peer));
    let Some((vm, tls)) = vm.zip(node.tls()) else {
        let refusal = Refusal::new(RefusalReason::UnknownGroup, "");
        if let Err(error) = incoming.refuse(refusal).await {
            tracing::debug!(%error, "refusal not delivered");
        }
        return;
    };
    let hello = Hello::new(tls.identity().cluster, node.id(), group, Purpose::Replication);
    match incoming.accept(hello).await {
        Ok(mut connection) => {
            connection.set_compression(node.compression());
            node.heard_of(peer);
            vm.group.send(ToGroup::Link { peer, connection: Box::new(connection) });
        }
        Err(error) => tracing::info!(%error, "link to a peer not made"),
    }
}

type Shared = State<Arc<Node>>;
type From = Extension<Peer>;

fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route("/peer/v1/ping", get(|| async { axum::Json(()) }))
        .route("/peer/v1/leads", post(leads))
        .route("/peer/v1/members", post(members))
        .route("/peer/v1/renew", post(renew))
        .route("/peer/v1/replicas", post(replica_offer))
        .route("/peer/v1/replicas/{group}", axum::routing::delete(replica_drop))
        .route("/peer/v1/replicas/{group}/disks", post(replica_disks))
        .route("/peer/v1/vms/{group}/handover", post(handover))
        .layer(axum::middleware::from_fn(nodes_only))
        .with_state(node)
}

/// A witness has no business here.
async fn nodes_only(
    Extension(peer): From,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Result<axum::response::Response, Refused> {
    let renewal = request.uri().path() == "/peer/v1/renew";
    if peer.identity.role != Role::Node && !renewal {
        return Err(Refused(Error::new(rempart_api::ErrorKind::Forbidden, "only nodes may ask this")));
    }
    Ok(next.run(request).await)
}

async fn leads(State(node): Shared, Body(vm): Body<String>) -> Answer<bool> {
    answer(Ok(schedule::leads(&node, &vm)))
}

async fn members(State(node): Shared, Body(news): Body<membership::News>) -> Answer<Option<Cluster>> {
    answer(membership::hear(&node, news).await)
}

async fn renew(
    State(node): Shared,
    Extension(peer): From,
    Body(request): Body<membership::Renewal>,
) -> Answer<membership::RenewalAnswer> {
    answer(membership::certify_again(&node, &peer, request).await)
}

async fn replica_offer(
    State(node): Shared,
    Extension(peer): From,
    Body(offer): Body<ReplicaOffer>,
) -> Answer<()> {
    answer(operation::accept_replica(&node, peer.identity.id, offer).await)
}

async fn replica_drop(State(node): Shared, Extension(peer): From, Path(group): Path<String>) -> Answer<()> {
    let group = parse_group(&group)?;
    answer(operation::drop_replica(&node, peer.identity.id, group).await)
}

async fn replica_disks(
    State(node): Shared,
    Extension(peer): From,
    Path(group): Path<String>,
    Body(change): Body<DiskChange>,
) -> Answer<()> {
    let group = parse_group(&group)?;
    let vm =
        node.vm_of_group(group).ok_or_else(|| Error::not_found("there is no such virtual machine here"))?;
    answer(operation::change_replica(&node, peer.identity.id, &vm, change).await)
}

async fn handover(
    State(node): Shared,
    Extension(peer): From,
    Path(group): Path<String>,
    Body(order): Body<HandOver>,
) -> Answer<()> {
    let group = parse_group(&group)?;
    let vm =
        node.vm_of_group(group).ok_or_else(|| Error::not_found("there is no such virtual machine here"))?;
    if order.to != peer.identity.id || !vm.peers().contains(&order.to) {
        return answer(Err(Error::refused("a node may ask for itself only, and only where it holds a copy")));
    }
    answer(operation::hand_over(&vm, order.to).await)
}

fn parse_group(text: &str) -> Result<GroupId, Error> {
    text.parse().map_err(|e| Error::invalid(format!("`{text}` names no group")).cause(e))
}

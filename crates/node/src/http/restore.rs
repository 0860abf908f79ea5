//! A restore lives as long as the connection that asked for it, or until it is ended.

use super::answer::{Answer, Body, Refused, answer};
use super::stream::stream;
use crate::node::Node;
use crate::operation;
use axum::extract::{Path, State};
use axum::response::Response;
use rempart_api::{Job, RestoreMessage, RestoreRequest, UnfinishedRestore};
use std::sync::Arc;

type Shared = State<Arc<Node>>;

pub async fn open(State(node): Shared, Body(request): Body<RestoreRequest>) -> Result<Response, Refused> {
    let (ready, guard) = operation::open_restore(&node, request).await?;
    let first = RestoreMessage::Ready { ready };
    Ok(stream(&first, RestoreMessage::Alive, std::future::pending(), guard))
}

pub async fn begin(
    State(node): Shared,
    Path(id): Path<u64>,
    Body(unfinished): Body<UnfinishedRestore>,
) -> Answer<()> {
    answer(operation::begin_restore(&node, id, unfinished).await)
}

pub async fn finish(State(node): Shared, Path(id): Path<u64>) -> Answer<Job> {
    let restore = node.restores.take(id)?;
    let (shared, what) = (node.clone(), format!("restore `{}`", restore.name()));
    answer(Ok(node.jobs.start(what, move |reporter| operation::finish_restore(shared, restore, reporter))))
}

//! A view lives as long as the connection that asked for it.

use super::answer::{Body, Refused};
use super::stream::stream;
use crate::node::Node;
use crate::operation::{Opened, open_view};
use axum::extract::{Path, State};
use axum::response::Response;
use rempart_api::{Error, ViewMessage, ViewRequest};
use std::sync::Arc;

pub async fn open(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    Body(request): Body<Option<ViewRequest>>,
) -> Result<Response, Refused> {
    let vm = node.vm(&name)?;
    let Opened { view, guard, lost } = open_view(&node, vm, request.unwrap_or_default()).await?;
    let first = ViewMessage::Opened { view: Box::new(view) };
    // Until the client has heard of its loss, its reads are answered with the reason.
    let loss = async move {
        let why = lost.await.unwrap_or_else(|_| "its copy was closed".into());
        tracing::warn!(vm = name, why, "a view is lost");
        ViewMessage::Lost { error: Error::failed(format!("the view of `{name}` is lost")).cause(why) }
    };
    Ok(stream(&first, ViewMessage::Alive, loss, guard))
}

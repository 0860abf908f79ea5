//! Takes a view out of QEMU: the same for one that is over, one that failed half way, and what a killed process left.
//!
//! It looks at what is there and goes on from that, so it may be done again after it failed.

use super::directory::ViewDirectory;
use super::graph::{Above, Graph, Place};
use super::names::{self, Role, ViewId};
use crate::error::{Error, ErrorKind, Result};
use crate::qmp::Client;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Removes every view whose process is gone.
pub(super) async fn remove_leftovers(client: &Client, directory: &ViewDirectory) -> Result<()> {
    let graph = Graph::read(client).await?;
    let exports = client.query_block_exports().await?;
    let jobs = client.query_jobs().await?;
    let mut views: BTreeSet<ViewId> = graph.view_nodes().map(|(view, _, _)| view).collect();
    views.extend(exports.iter().filter_map(|export| names::parse_export(&export.id)));
    views.extend(jobs.iter().filter_map(|job| names::parse_create_job(&job.id)));
    views.extend(graph.bitmaps().filter_map(|(_, bitmap)| names::parse_view_bitmap(&bitmap.name)));
    views.extend(directory.leftovers());
    for view in views {
        // It may have been made with another directory than ours.
        let its = graph.scratch_file(view).and_then(|file| ViewDirectory::of_scratch_file(&file));
        let its = its.as_ref().unwrap_or(directory);
        if its.is_over(view) {
            tracing::info!(%view, "removing what an earlier view left in QEMU");
            remove(client, its, view).await?;
        }
    }
    Ok(())
}

/// Removes a view's exports, nodes, files and readers' bitmaps. Bitmaps that record stay.
pub(super) async fn remove(client: &Client, directory: &ViewDirectory, view: ViewId) -> Result<()> {
    for export in client.query_block_exports().await? {
        if names::parse_export(&export.id) == Some(view) {
            client.block_export_remove(&export.id).await?;
        }
    }
    for job in client.query_jobs().await? {
        if names::parse_create_job(&job.id) == Some(view) {
            client.job_dismiss(&job.id).await?;
        }
    }
    let graph = Graph::read(client).await?;
    let mine: BTreeSet<(usize, Role)> = graph
        .view_nodes()
        .filter(|(owner, _, _)| *owner == view)
        .map(|(_, role, disk)| (disk, role))
        .collect();
    let delete = async |role: Role| -> Result<()> {
        for (disk, _) in mine.iter().filter(|(_, found)| *found == role) {
            client.blockdev_del(&names::node(view, role, *disk)).await?;
        }
        Ok(())
    };
    delete(Role::Access).await?;
    unlink(client, &graph, view).await?;
    for role in Role::ALL.into_iter().filter(|role| *role != Role::Access) {
        delete(role).await?;
    }
    for (node, bitmap) in graph.bitmaps() {
        if bitmap.name == names::view_bitmap(view) {
            client.remove_bitmap(node, &bitmap.name).await?;
        }
    }
    stop_server(client, directory).await?;
    directory.clear(view);
    Ok(())
}

/// Takes a view out of the path between devices and disks: first all copying at one instant, then its nodes.
async fn unlink(client: &Client, graph: &Graph, view: ViewId) -> Result<()> {
    let tops = graph.view_nodes().filter(|(owner, role, _)| *owner == view && *role == Role::Top);
    let places: BTreeMap<usize, Place> =
        tops.filter_map(|(_, _, disk)| Some((disk, graph.place(view, disk)?))).collect();
    let taken = places.iter().filter(|(_, place)| place.taken);
    let without_copy: Vec<Value> =
        taken.map(|(disk, place)| pass_on(&names::node(view, Role::Top, *disk), &place.below)).collect();
    if !without_copy.is_empty() {
        client.blockdev_reopen(without_copy).await?;
    }
    for (disk, place) in &places {
        match &place.above {
            Above::Device(path) => client.qom_set(path, "drive", json!(place.below)).await?,
            // Only another view's node lets its child be exchanged.
            Above::Node(node) if matches!(names::parse_node(node), Some((_, Role::Base, _))) => {
                client.blockdev_reopen(vec![pass_on(node, &place.below)]).await?;
            }
            Above::Node(node) => {
                let top = names::node(view, Role::Top, *disk);
                let detail = format!(
                    "block node `{node}` of another program uses `{top}`: it only passes requests on, and is removed \
                     by the next run after that program has ended"
                );
                return Err(Error::new(ErrorKind::Refused, "remove a view from QEMU", detail));
            }
        }
    }
    Ok(())
}

/// A node that passes everything on to `below`. `raw` and not `throttle`: QEMU 10.0 crashes when the latter is put on a
/// disk that an I/O thread serves.
pub(super) fn pass_on(node: &str, below: &str) -> Value {
    json!({ "driver": "raw", "node-name": node, "file": below })
}

/// Ends QEMU's NBD server if it is the one of our views and the last of them is gone.
async fn stop_server(client: &Client, directory: &ViewDirectory) -> Result<()> {
    let socket = directory.socket();
    if !is_served(&socket).await {
        return Ok(());
    }
    if client.query_block_exports().await?.is_empty() {
        client.nbd_server_stop().await?;
        let _ = std::fs::remove_file(socket);
    }
    Ok(())
}

/// QEMU has one NBD server: if it answers here, it is ours.
pub(super) async fn is_served(socket: &std::path::Path) -> bool {
    tokio::net::UnixStream::connect(socket).await.is_ok()
}

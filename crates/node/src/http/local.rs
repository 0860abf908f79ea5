//! The operator's API, on a unix socket that only the daemon's user may open.

use super::answer::{Answer, Body, answer};
use crate::membership;
use crate::metrics;
use crate::node::Node;
use crate::operation;
use crate::schedule;
use crate::status;
use axum::Router;
use axum::extract::{Path, Query, State};
use axum::routing::{get, post};
use rempart_api::{
    BackupRun, ClusterCreate, DiskAdd, DiskResize, Error, FailoverRequest, ImportRequest, Job, JobId,
    JoinRequest, Members, ProtectRequest, RejoinRequest, RevokeRequest, Schedule, Status, StopRequest, Token,
    TokenRequest, VmDetail,
};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;

type Shared = State<Arc<Node>>;

fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route(
            "/v1/status",
            get(|State(node): Shared| async move { axum::Json::<Status>(status::of_node(&node)) }),
        )
        .route("/metrics", get(|State(node): Shared| async move { metrics::render(&node) }))
        .route("/v1/jobs/{id}", get(job))
        .route("/v1/cluster", get(members).post(cluster_create))
        .route("/v1/cluster/tokens", post(cluster_token))
        .route("/v1/cluster/join", post(cluster_join))
        .route("/v1/cluster/remove", post(cluster_remove))
        .route("/v1/cluster/renew", post(cluster_renew))
        .route("/v1/schedules", get(schedules))
        .route("/v1/schedules/{name}", get(one_schedule))
        .route("/v1/schedules/{name}/history", get(schedule_history))
        .route("/v1/schedules/{name}/run", post(schedule_run))
        .route("/v1/schedules/{name}/stop", post(schedule_stop))
        .route("/v1/restores", post(super::restore::open))
        .route("/v1/restores/{id}/begin", post(super::restore::begin))
        .route("/v1/restores/{id}/finish", post(super::restore::finish))
        .route("/v1/vms", post(import))
        .route("/v1/vms/{name}", get(vm).delete(delete))
        .route("/v1/vms/{name}/start", post(start))
        .route("/v1/vms/{name}/stop", post(stop))
        .route("/v1/vms/{name}/protect", post(protect))
        .route("/v1/vms/{name}/unprotect", post(unprotect))
        .route("/v1/vms/{name}/failover", post(failover))
        .route("/v1/vms/{name}/failback", post(failback))
        .route("/v1/vms/{name}/rejoin", post(rejoin))
        .route("/v1/vms/{name}/compare", post(compare))
        .route("/v1/vms/{name}/views", post(super::view::open))
        .route("/v1/vms/{name}/disks", post(disk_add))
        .route("/v1/vms/{name}/disks/{index}", axum::routing::delete(disk_remove))
        .route("/v1/vms/{name}/disks/{index}/resize", post(disk_resize))
        .fallback(|| async { super::answer::Refused(Error::not_found("there is no such path in this API")) })
        .with_state(node)
}

/// Serves until the daemon ends.
pub async fn serve(node: Arc<Node>, listener: UnixListener) -> std::io::Result<()> {
    axum::serve(listener, super::to_the_end(router(node))).await
}

#[derive(Deserialize)]
struct JobQuery {
    #[serde(default)]
    wait_ms: u64,
}

async fn job(State(node): Shared, Path(id): Path<u64>, Query(query): Query<JobQuery>) -> Answer<Job> {
    let wait = Duration::from_millis(query.wait_ms.min(30_000));
    let job = node.jobs.get(JobId(id), wait).await;
    answer(job.ok_or_else(|| {
        Error::not_found(format!("there is no job {id}")).hint("the daemon forgets its jobs when it restarts")
    }))
}

async fn members(State(node): Shared) -> Answer<Members> {
    answer(node.members())
}

async fn cluster_create(State(node): Shared, Body(request): Body<ClusterCreate>) -> Answer<Members> {
    answer(membership::create(&node, &request.name).await)
}

async fn cluster_token(State(node): Shared, Body(request): Body<TokenRequest>) -> Answer<Token> {
    answer(membership::token(&node, request).await)
}

async fn cluster_join(State(node): Shared, Body(request): Body<JoinRequest>) -> Answer<Members> {
    answer(membership::join(&node, &request.token).await)
}

async fn cluster_remove(State(node): Shared, Body(request): Body<RevokeRequest>) -> Answer<Members> {
    answer(membership::remove(&node, &request.name).await)
}

async fn cluster_renew(State(node): Shared) -> Answer<Members> {
    answer(membership::renew(&node).await)
}

async fn schedules(State(node): Shared) -> Answer<Vec<Schedule>> {
    answer(Ok(node.schedules.shown()))
}

async fn one_schedule(State(node): Shared, Path(name): Path<String>) -> Answer<Schedule> {
    answer(node.schedules.one(&name))
}

#[derive(Deserialize)]
struct HistoryQuery {
    newest: Option<usize>,
}

async fn schedule_history(
    State(node): Shared,
    Path(name): Path<String>,
    Query(query): Query<HistoryQuery>,
) -> Answer<Vec<BackupRun>> {
    answer(node.schedules.history(&name, query.newest.unwrap_or(usize::MAX)))
}

async fn schedule_run(State(node): Shared, Path(name): Path<String>) -> Answer<Job> {
    answer(schedule::run_now(&node, &name))
}

async fn schedule_stop(State(node): Shared, Path(name): Path<String>) -> Answer<Job> {
    answer(schedule::stop(&node, &name))
}

async fn import(State(node): Shared, Body(request): Body<ImportRequest>) -> Answer<Job> {
    let what = format!("import `{}`", request.name);
    let shared = node.clone();
    answer(Ok(node.jobs.start(what, move |reporter| operation::import(shared, request, reporter))))
}

async fn vm(State(node): Shared, Path(name): Path<String>) -> Answer<VmDetail> {
    answer(node.vm(&name).map(|vm| status::detail(&node, &vm)))
}

async fn delete(State(node): Shared, Path(name): Path<String>) -> Answer<()> {
    answer(operation::delete(&node, &name).await)
}

async fn start(State(node): Shared, Path(name): Path<String>) -> Answer<Job> {
    let vm = node.vm(&name)?;
    let work = async move { vm.start().await.map(|()| serde_json::json!({ "name": vm.name() })) };
    answer(Ok(node.jobs.start(format!("start `{name}`"), move |_| work)))
}

async fn stop(
    State(node): Shared,
    Path(name): Path<String>,
    Body(request): Body<Option<StopRequest>>,
) -> Answer<Job> {
    let request = request.unwrap_or_default();
    if request.force && node.why_not_opened(&name).is_some() {
        let (shared, what) = (node.clone(), format!("stop `{name}`"));
        let work =
            async move { shared.stop_unopened(&name).await.map(|()| serde_json::json!({ "name": name })) };
        return answer(Ok(node.jobs.start(what, move |_| work)));
    }
    let vm = node.vm(&name)?;
    let usual = Duration::from_secs(node.config.vm.shutdown_timeout_s);
    let grace = request.timeout_s.map_or(usual, Duration::from_secs);
    let work = async move {
        let stopped = if request.force { vm.stop_by_force().await } else { vm.stop(grace).await };
        stopped.map(|()| serde_json::json!({ "name": vm.name() }))
    };
    answer(Ok(node.jobs.start(format!("stop `{name}`"), move |_| work)))
}

async fn protect(
    State(node): Shared,
    Path(name): Path<String>,
    Body(request): Body<ProtectRequest>,
) -> Answer<Job> {
    let (vm, shared) = (node.vm(&name)?, node.clone());
    let what = format!("protect `{name}`");
    answer(Ok(node.jobs.start(what, move |reporter| operation::protect(shared, vm, request, reporter))))
}

async fn unprotect(State(node): Shared, Path(name): Path<String>) -> Answer<Job> {
    let (vm, shared) = (node.vm(&name)?, node.clone());
    let what = format!("unprotect `{name}`");
    answer(Ok(node.jobs.start(what, move |reporter| operation::unprotect(shared, vm, reporter))))
}

async fn failover(
    State(node): Shared,
    Path(name): Path<String>,
    Body(request): Body<FailoverRequest>,
) -> Answer<Job> {
    let (vm, shared) = (node.vm(&name)?, node.clone());
    let what = format!("fail over `{name}`");
    answer(Ok(node.jobs.start(what, move |reporter| operation::failover(shared, vm, request, reporter))))
}

async fn failback(State(node): Shared, Path(name): Path<String>) -> Answer<Job> {
    let (vm, shared) = (node.vm(&name)?, node.clone());
    let what = format!("fail back `{name}`");
    answer(Ok(node.jobs.start(what, move |reporter| operation::failback(shared, vm, reporter))))
}

async fn rejoin(
    State(node): Shared,
    Path(name): Path<String>,
    Body(request): Body<RejoinRequest>,
) -> Answer<Job> {
    let (vm, shared) = (node.vm(&name)?, node.clone());
    let what = format!("rejoin `{name}`");
    answer(Ok(node.jobs.start(what, move |reporter| operation::rejoin(shared, vm, request, reporter))))
}

async fn compare(State(node): Shared, Path(name): Path<String>) -> Answer<Job> {
    let vm = node.vm(&name)?;
    let what = format!("compare `{name}`");
    answer(Ok(node.jobs.start(what, move |reporter| operation::compare(vm, reporter))))
}

async fn disk_add(
    State(node): Shared,
    Path(name): Path<String>,
    Body(request): Body<DiskAdd>,
) -> Answer<Job> {
    let (vm, shared) = (node.vm(&name)?, node.clone());
    let what = format!("add a disk to `{name}`");
    answer(Ok(node.jobs.start(what, move |reporter| operation::disk_add(shared, vm, request, reporter))))
}

async fn disk_remove(State(node): Shared, Path((name, index)): Path<(String, u16)>) -> Answer<Job> {
    let (vm, shared) = (node.vm(&name)?, node.clone());
    let what = format!("remove disk {index} of `{name}`");
    answer(Ok(node.jobs.start(what, move |reporter| operation::disk_remove(shared, vm, index, reporter))))
}

async fn disk_resize(
    State(node): Shared,
    Path((name, index)): Path<(String, u16)>,
    Body(request): Body<DiskResize>,
) -> Answer<Job> {
    let (vm, shared) = (node.vm(&name)?, node.clone());
    let what = format!("resize disk {index} of `{name}`");
    let size = request.size_bytes;
    answer(Ok(node
        .jobs
        .start(what, move |reporter| operation::disk_resize(shared, vm, index, size, reporter))))
}

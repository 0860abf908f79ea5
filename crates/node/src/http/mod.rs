//! The HTTP faces of a node: for the operator on a unix socket, for peers and strangers over TLS.

mod answer;
mod enrol;
mod local;
mod peer;
mod peer_client;
mod restore;
mod stream;
mod view;

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn};
use axum::response::IntoResponse;

pub use enrol::{AuthorityFiles, EnrolAnswer, EnrolRequest};
pub use local::serve as serve_local;
pub use peer::serve as serve_peers;
pub use peer_client::{PeerClient, exchange};

/// What was begun is ended, even if who asked is gone by then: work that stopped halfway would leave threads behind that go
/// on writing where the next who asks begins anew.
fn to_the_end(router: Router) -> Router {
    router.layer(from_fn(|request: Request, next: Next| async {
        match tokio::spawn(next.run(request)).await {
            Ok(answer) => answer,
            Err(ended) => match ended.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The daemon ends.
                Err(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
            },
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;
    use std::sync::Arc;
    use tokio::sync::Semaphore;

    /// A peer that died while its copy was made asked again, and two stores were made in one directory at once.
    #[tokio::test]
    async fn what_was_asked_is_ended_after_the_asker_is_gone() {
        let (go_on, ended) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let (waits, told) = (go_on.clone(), ended.clone());
        let handler = || async move {
            waits.acquire().await.expect("it is never closed").forget();
            told.add_permits(1);
        };
        let router = to_the_end(Router::new().route("/", axum::routing::get(handler)));
        let asked = TowerToHyperService::new(router).call(Request::new(axum::body::Body::empty()));
        let mut asked = Box::pin(asked);
        tokio::select! {
            biased;
            _ = &mut asked => panic!("it waits"),
            () = tokio::task::yield_now() => {}
        }
        drop(asked);
        go_on.add_permits(1);
        let ended = tokio::time::timeout(std::time::Duration::from_secs(60), ended.acquire());
        drop(ended.await.expect("it went on"));
    }
}

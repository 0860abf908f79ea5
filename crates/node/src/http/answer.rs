//! Answers in the API's form.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use rempart_api::Error;
use serde::Serialize;

/// An error as an HTTP answer.
#[derive(Debug)]
pub struct Refused(pub Error);

impl From<Error> for Refused {
    fn from(error: Error) -> Refused {
        Refused(error)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

pub type Answer<T> = Result<Json<T>, Refused>;

pub fn answer<T: Serialize>(result: Result<T, Error>) -> Answer<T> {
    result.map(Json).map_err(Refused)
}

/// A request body that is not the JSON it should be.
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned> axum::extract::FromRequest<S> for Body<T> {
    type Rejection = Refused;

    async fn from_request(request: axum::extract::Request, state: &S) -> Result<Body<T>, Refused> {
        match axum::body::Bytes::from_request(request, state).await {
            Ok(bytes) => {
                let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
                serde_json::from_slice(text)
                    .map(Body)
                    .map_err(|e| Refused(Error::invalid("the request is not what this path takes").cause(e)))
            }
            Err(e) => Err(Refused(Error::invalid("cannot read the request").cause(e))),
        }
    }
}

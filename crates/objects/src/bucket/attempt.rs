//! What became of a request, and whether to repeat it.
//!
//! The store's client tells errors by text. So the HTTP service under it is ours: it notes for each attempt what was sent and
//! what came back.

use super::versions::Signer;
use crate::ErrorKind;
use http::StatusCode;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};
use object_store::{ClientOptions, Error as StoreError};
use std::cell::RefCell;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How long a [`Bucket`](super::Bucket) waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Attempts of one call.
    pub tries: u32,
    /// Before the second attempt; four times as long before each later one. Up to half is added by chance.
    pub pause: Duration,
    /// Of one attempt, besides the time that its bytes take; and of a read without any progress.
    pub deadline: Duration,
    /// What a slow line carries at least.
    pub bytes_per_second: u64,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            tries: 4,
            pause: Duration::from_millis(200),
            deadline: Duration::from_secs(30),
            bytes_per_second: 64 * 1024,
        }
    }
}

impl Patience {
    /// For an attempt that carries `len` bytes.
    pub(super) fn deadline_of(&self, len: u64) -> Duration {
        self.deadline + Duration::from_secs(len / self.bytes_per_second.max(1))
    }

    /// Before the next attempt; `None` if this was the last.
    pub(super) fn pause_after(&self, attempt: u32) -> Option<Duration> {
        let pause = self.pause.saturating_mul(4u32.saturating_pow(attempt));
        (attempt + 1 < self.tries).then(|| pause.mul_f64(1.0 + fastrand::f64() / 2.0))
    }
}

/// What an attempt's last request met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Met {
    /// None was sent: wrong settings, no credentials.
    #[default]
    Nothing,
    /// Nobody was there to be asked.
    Unconnected,
    /// It was sent; no answer came, or only a part of one.
    Silence,
    Answer(StatusCode),
}

tokio::task_local! {
    static MET: RefCell<Met>;
}

/// Runs an attempt, and tells what it met.
pub(super) async fn watch<T>(attempt: impl Future<Output = T>) -> (T, Met) {
    let watched = async {
        let outcome = attempt.await;
        (outcome, MET.with(|met| *met.borrow()))
    };
    MET.scope(RefCell::default(), watched).await
}

/// What an attempt that failed means to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    pub kind: ErrorKind,
    /// A change may have been done, or come to be.
    pub maybe_done: bool,
}

impl Verdict {
    /// No answer in time.
    pub const TIMEOUT: Verdict = Verdict { kind: ErrorKind::Unavailable, maybe_done: true };

    pub fn of(error: &StoreError, met: Met) -> Verdict {
        let done = |kind, maybe_done| Verdict { kind, maybe_done };
        match met {
            Met::Nothing => match error {
                StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => {
                    done(ErrorKind::Denied, false)
                }
                _ => done(ErrorKind::Failed, false),
            },
            Met::Unconnected => done(ErrorKind::Unavailable, false),
            Met::Silence => done(ErrorKind::Unavailable, true),
            Met::Answer(status) => match status.as_u16() {
                401 | 403 => done(ErrorKind::Denied, false),
                404 => done(ErrorKind::Missing, false),
                416 => done(ErrorKind::TooShort, false),
                429 => done(ErrorKind::Unavailable, false),
                507 => done(ErrorKind::Full, false),
                501 => done(ErrorKind::Unsupported, false),
                408 | 500.. => done(ErrorKind::Unavailable, true),
                // The answer came, and its body did not.
                200..300 => done(ErrorKind::Unavailable, true),
                _ => done(ErrorKind::Failed, false),
            },
        }
    }
}

/// Makes the clients of a store.
#[derive(Debug)]
pub(super) struct Connector {
    signer: Arc<OnceLock<Signer>>,
    /// The first one.
    pub made: Arc<OnceLock<HttpClient>>,
}

impl Connector {
    pub fn new(signer: Arc<OnceLock<Signer>>) -> Connector {
        Connector { signer, made: Arc::default() }
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        let client = HttpClient::new(Watched { inner, signer: self.signer.clone() });
        Ok(self.made.get_or_init(|| client).clone())
    }
}

#[derive(Debug)]
struct Watched {
    inner: HttpClient,
    signer: Arc<OnceLock<Signer>>,
}

#[async_trait::async_trait]
impl HttpService for Watched {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if let Some(signer) = self.signer.get() {
            signer
                .add_retention(&mut request)
                .await
                .map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        }
        // Outside of an attempt nobody asks.
        let note = |met| {
            let _ = MET.try_with(|last| last.replace(met));
        };
        note(Met::Silence);
        let answer = self.inner.execute(request).await;
        match &answer {
            Ok(response) => note(Met::Answer(response.status())),
            Err(error) if error.kind() == HttpErrorKind::Connect => note(Met::Unconnected),
            Err(_) => {}
        }
        answer
    }
}

//! Objects in a bucket of S3, or of what speaks like it, or in a container of Azure.
//!
//! A creation carries `If-None-Match: *`, so that the store decides who wins. It may be repeated when nobody answered: the
//! name may then be taken by our own first attempt, and `Taken` is what the caller hears, who compares. Whether a store
//! honours the condition is not known before [`probe`](crate::probe) tried it.

mod attempt;
mod location;
mod versions;

pub use attempt::Patience;
pub use location::{Credentials, InvalidCredentials, InvalidLocation, Kind, Location};

use crate::{Abilities, Created, Error, ErrorKind, Listed, Name, Objects};
use attempt::{Connector, Verdict, watch};
use bytes::Bytes;
use futures_util::StreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::Path;
use object_store::{
    ClientOptions, Error as StoreError, GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt,
    PutMode, PutOptions, RetryConfig,
};
use rempart_types::WallTime;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::runtime::Runtime;
use url::Url;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use versions::fuzz as fuzz_answer;
use versions::{Features, Hidden, RetainUntil, Signer, Versions};

/// Requests cost by number: few and large.
const PACK_LEN: u64 = 64 * 1024 * 1024;
/// A connection gets some 50 MB/s, however fast the line is.
const CREATES: usize = 8;
/// No store has larger objects (S3: 50 TB).
const LARGEST: u64 = 1 << 50;
/// The version of what is written while names have none.
const UNVERSIONED: &str = "null";
/// Versions that are remembered.
const MOST_REMEMBERED: usize = 10_000;
/// Creations of one name that the store refuses as conflicting with another's, which then is not there.
const MOST_CONFLICTS: u32 = 4;
/// Threads that carry the bytes of all connections.
const THREADS: usize = 2;
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

trait Store: ObjectStore + PaginatedListStore {}
impl<S: ObjectStore + PaginatedListStore> Store for S {}

/// Objects in a bucket. With a runtime of its own: it must not be used from an asynchronous task.
pub struct Bucket {
    location: Location,
    store: Arc<dyn Store>,
    patience: Patience,
    /// Of S3.
    versions: Option<Versions>,
    features: Features,
    /// Whether names have versions, as far as is known.
    versioned: AtomicBool,
    /// The oldest version of a name: it stays the oldest.
    oldest: Mutex<BTreeMap<Name, String>>,
    /// `None` while it is dropped.
    runtime: Option<Runtime>,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bucket { location, patience, features, .. } = self;
        f.debug_struct("Bucket")
            .field("location", location)
            .field("patience", patience)
            .field("features", features)
            .finish()
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Waiting for it is not allowed everywhere, and nothing is left to wait for.
            runtime.shutdown_background();
        }
    }
}

/// The store, and what S3 has beyond it.
type Parts = (Arc<dyn Store>, Option<Versions>);

impl Bucket {
    pub fn open(location: Location, credentials: &Credentials, patience: Patience) -> Result<Bucket, Error> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            Error::at_place(ErrorKind::Failed, "open", location.to_string(), error)
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("rempart-bucket")
            .enable_all()
            .build()
            .map_err(|error| failed(error.into()))?;
        let (store, versions) = match &location.kind {
            Kind::S3 { bucket } => s3(&location, bucket, credentials),
            Kind::Azure { account, container } => azure(&location, account, container, credentials),
        }
        .map_err(|error| failed(error.into()))?;
        let mut bucket = Bucket {
            location,
            store,
            patience,
            versions,
            features: Features::default(),
            versioned: AtomicBool::new(false),
            oldest: Mutex::default(),
            runtime: Some(runtime),
        };
        if let Some(versions) = &bucket.versions {
            bucket.features = bucket.call("look at", "", 0, false, async || versions.features().await)?;
            bucket.versioned = AtomicBool::new(bucket.features.versioned);
        }
        Ok(bucket)
    }

    /// Does what `attempt` does, again if that is of use.
    fn call<T>(
        &self,
        action: &'static str,
        name: &str,
        len: u64,
        change: bool,
        attempt: impl AsyncFn() -> Result<T, StoreError>,
    ) -> Result<T, Error> {
        let runtime = self.runtime.as_ref().expect("it is not dropped yet");
        let deadline = self.patience.deadline_of(len);
        let mut maybe_done = false;
        for number in 0.. {
            let attempt = watch(async { tokio::time::timeout(deadline, attempt()).await });
            let (verdict, source): (Verdict, Box<dyn std::error::Error + Send + Sync>) =
                match runtime.block_on(attempt) {
                    (Ok(Ok(done)), _) => return Ok(done),
                    (Ok(Err(error)), met) => (Verdict::of(&error, met), error.into()),
                    (Err(_), _) => (Verdict::TIMEOUT, format!("no answer within {deadline:?}").into()),
                };
            maybe_done |= change && verdict.maybe_done;
            let pause = self.patience.pause_after(number).filter(|_| verdict.kind == ErrorKind::Unavailable);
            let Some(pause) = pause else {
                let kind = if maybe_done { ErrorKind::Unknown } else { verdict.kind };
                let place = self.location.to_string();
                return Err(Error { kind, action, name: name.to_owned(), place, source });
            };
            std::thread::sleep(pause);
        }
        unreachable!("the pauses come to an end")
    }

    fn refused(&self, kind: ErrorKind, action: &'static str, name: &Name, why: &str) -> Error {
        Error::new(kind, action, name, self.url(), why)
    }

    fn key(&self, text: &str) -> String {
        match &*self.location.prefix {
            "" => text.to_owned(),
            prefix => format!("{prefix}/{text}"),
        }
    }

    fn path(&self, name: &Name) -> Path {
        Path::parse(self.key(name.as_str()))
            .expect("names and prefixes are parts of letters, digits and a few signs")
    }

    fn is_versioned(&self) -> bool {
        self.versioned.load(Ordering::Relaxed)
    }

    /// The version that is the object, where there are versions.
    fn version_of(&self, action: &'static str, name: &Name) -> Result<Option<String>, Error> {
        let Some(versions) = self.versions.as_ref().filter(|_| self.is_versioned()) else { return Ok(None) };
        if let Some(version) = self.oldest().get(name) {
            return Ok(Some(version.clone()));
        }
        let history = self.call(action, name.as_str(), 0, false, async || versions.history(name).await)?;
        let Some(version) = history.versions.last() else {
            return Err(self.refused(ErrorKind::Missing, action, name, "it has no version"));
        };
        let mut oldest = self.oldest();
        if oldest.len() >= MOST_REMEMBERED {
            oldest.clear();
        }
        oldest.insert(name.clone(), version.clone());
        Ok(Some(version.clone()))
    }

    fn oldest(&self) -> std::sync::MutexGuard<'_, BTreeMap<Name, String>> {
        self.oldest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the version that we wrote is the object: in a versioned bucket a marker may have hidden an older one.
    fn is_the_object(&self, name: &Name, version: Option<String>) -> Result<Created, Error> {
        let version = match version {
            Some(version) if version != UNVERSIONED => {
                self.versioned.store(true, Ordering::Relaxed);
                version
            }
            // Where versions are suspended, there may be older ones.
            _ if self.is_versioned() => UNVERSIONED.to_owned(),
            _ => return Ok(Created::New),
        };
        self.oldest().remove(name);
        match self.version_of("create", name) {
            Ok(oldest) if oldest.as_ref() == Some(&version) => Ok(Created::New),
            Ok(_) => Ok(Created::Taken),
            Err(mut error) => {
                error.kind = ErrorKind::Unknown;
                Err(error)
            }
        }
    }

    fn read(&self, name: &Name, want: Want) -> Result<Vec<u8>, Error> {
        let version = self.version_of("read", name)?;
        let (range, most) = match &want {
            Want::Whole { limit } => (None, *limit),
            Want::Range(range) => (Some(GetRange::Bounded(range.clone())), range.end - range.start),
        };
        let len = if range.is_some() { most } else { PACK_LEN };
        let path = self.path(name);
        let read = self.call("read", name.as_str(), len, false, async || {
            let options =
                GetOptions { range: range.clone(), version: version.clone(), ..GetOptions::default() };
            let stall = self.patience.deadline;
            let result = match (soon(stall, self.store.get_opts(&path, options)).await?, &want) {
                (Err(error @ StoreError::Generic { .. }), Want::Range(range)) => {
                    // Some answer a range behind the end with 200, which the client takes for a broken answer.
                    let head = GetOptions { head: true, version: version.clone(), ..GetOptions::default() };
                    let there =
                        soon(stall, self.store.get_opts(&path, head)).await?.map(|there| there.meta.size);
                    return there.ok().filter(|len| *len < range.end).map(Err).ok_or(error);
                }
                (result, _) => result?,
            };
            let there = result.range.end - result.range.start;
            let fits = match &want {
                Want::Whole { limit } => there <= *limit,
                Want::Range(range) => result.range == *range,
            };
            if fits { collect(result, most, stall).await.map(Ok) } else { Ok(Err(result.meta.size)) }
        })?;
        read.map_err(|len| match &want {
            Want::Whole { limit } => {
                let why = format!("it has {len} bytes; at most {limit} were expected");
                self.refused(ErrorKind::TooLong, "read", name, &why)
            }
            Want::Range(range) => {
                let why = format!("it has {len} bytes; {} to {} were wanted", range.start, range.end);
                self.refused(ErrorKind::TooShort, "read", name, &why)
            }
        })
    }
}

/// What is to be read of an object.
enum Want {
    Whole { limit: u64 },
    Range(Range<u64>),
}

/// What comes within `stall`.
async fn soon<T>(stall: Duration, coming: impl Future<Output = T>) -> Result<T, StoreError> {
    tokio::time::timeout(stall, coming).await.map_err(|_| StoreError::Generic {
        store: "bucket",
        source: format!("nothing came within {stall:?}").into(),
    })
}

/// The bytes of an answer, exactly as many as it promised and no more than `most`.
async fn collect(result: GetResult, most: u64, stall: Duration) -> Result<Vec<u8>, StoreError> {
    let promised = result.range.end - result.range.start;
    let wrong = |what: &str| StoreError::Generic {
        store: "bucket",
        source: format!("the answer has {what} than the {promised} bytes it promised").into(),
    };
    let mut content = Vec::with_capacity(usize::try_from(promised.min(most)).unwrap_or(0));
    let mut stream = result.into_stream();
    while let Some(part) = soon(stall, stream.next()).await? {
        let part = part?;
        if content.len() as u64 + part.len() as u64 > promised.min(most) {
            return Err(wrong("more"));
        }
        content.extend_from_slice(&part);
    }
    if (content.len() as u64) < promised { Err(wrong("less")) } else { Ok(content) }
}

impl Objects for Bucket {
    fn create(&self, name: &Name, parts: &[&[u8]], retain_until: Option<WallTime>) -> Result<Created, Error> {
        if retain_until.is_some() && !self.features.lock {
            return Err(self.refused(ErrorKind::Unsupported, "create", name, self.no_retention()));
        }
        let content = Bytes::from(parts.concat());
        let path = self.path(name);
        for conflict in 0..MOST_CONFLICTS {
            let put = self.call("create", name.as_str(), content.len() as u64, true, async || {
                let mut options = PutOptions::from(PutMode::Create);
                if let Some(until) = retain_until {
                    options.extensions.insert(RetainUntil(until));
                }
                match self.store.put_opts(&path, content.clone().into(), options).await {
                    Ok(result) => Ok(Some(result.version)),
                    Err(StoreError::AlreadyExists { .. }) => Ok(None),
                    Err(error) => Err(error),
                }
            })?;
            if let Some(version) = put {
                return self.is_the_object(name, version);
            }
            // 409 may also mean that another's request was under way, which may have failed.
            match self.len(name) {
                Ok(_) => return Ok(Created::Taken),
                Err(error) if error.kind == ErrorKind::Missing => {
                    std::thread::sleep(self.patience.pause_after(conflict).unwrap_or_default());
                }
                Err(error) => return Err(error),
            }
        }
        let why = "the store says that it is taken, and then that it is not there";
        Err(self.refused(ErrorKind::Unavailable, "create", name, why))
    }

    fn get(&self, name: &Name, limit: u64) -> Result<Vec<u8>, Error> {
        self.read(name, Want::Whole { limit })
    }

    fn get_range(&self, name: &Name, range: Range<u64>) -> Result<Vec<u8>, Error> {
        if range.is_empty() || range.end > LARGEST {
            let len = self.len(name)?;
            if range.end > len {
                let why = format!("it has {len} bytes; {} to {} were wanted", range.start, range.end);
                return Err(self.refused(ErrorKind::TooShort, "read", name, &why));
            }
            return Ok(Vec::new());
        }
        self.read(name, Want::Range(range))
    }

    fn len(&self, name: &Name) -> Result<u64, Error> {
        let version = self.version_of("look at", name)?;
        let path = self.path(name);
        self.call("look at", name.as_str(), 0, false, async || {
            let options = GetOptions { head: true, version: version.clone(), ..GetOptions::default() };
            Ok(self.store.get_opts(&path, options).await?.meta.size)
        })
    }

    fn list(&self, prefix: &str, after: Option<&Name>) -> Result<Vec<Listed>, Error> {
        let whole = self.key(prefix);
        let strip = self.key("").len();
        let mut token: Option<String> = None;
        loop {
            let page = self.call("list", prefix, 0, false, async || {
                let offset = after.map(|after| self.key(after.as_str())).filter(|_| token.is_none());
                let options =
                    PaginatedListOptions { offset, page_token: token.clone(), ..Default::default() };
                let wanted = (!whole.is_empty()).then_some(&*whole);
                self.store.list_paginated(wanted, options).await
            })?;
            let listed = page.result.objects.into_iter().filter_map(|object| {
                // Others' objects have no place in the list.
                let name = Name::new(object.location.as_ref().get(strip..)?).ok()?;
                let wanted = name.as_str().starts_with(prefix) && after.is_none_or(|after| name > *after);
                wanted.then_some(Listed { name, len: object.size })
            });
            let mut listed: Vec<Listed> = listed.collect();
            if token.is_none() {
                let itself = self.prefix_itself(prefix, after)?.filter(|itself| !listed.contains(itself));
                listed.splice(0..0, itself);
            }
            if !listed.is_sorted_by(|a, b| a.name < b.name) {
                let why = "the store lists its objects in no order";
                return Err(Error::at_place(ErrorKind::Failed, "list", self.url(), why));
            }
            // A page of others' objects alone is not the end. A token that repeats would be none either.
            match page.page_token {
                Some(next) if listed.is_empty() && token.as_ref() != Some(&next) => token = Some(next),
                _ => return Ok(listed),
            }
        }
    }

    fn remove(&self, name: &Name) -> Result<(), Error> {
        let Some(versions) = self.versions.as_ref().filter(|_| self.is_versioned()) else {
            let path = self.path(name);
            return self.call("remove", name.as_str(), 0, true, async || {
                match self.store.delete(&path).await {
                    Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
                    Err(error) => Err(error),
                }
            });
        };
        let history = self.call("remove", name.as_str(), 0, false, async || versions.history(name).await)?;
        // The newest first: the oldest is the object as long as it is there.
        for version in history.versions.iter().chain(&history.markers) {
            let removed =
                self.call("remove", name.as_str(), 0, true, async || versions.remove(name, version).await);
            match removed {
                Err(error) if error.kind == ErrorKind::Denied => {
                    let until = async || versions.retained_until(name, version).await;
                    let until = self.call("remove", name.as_str(), 0, false, until)?;
                    let retained = until.is_some_and(|until| until > now());
                    return Err(if retained { Error { kind: ErrorKind::Retained, ..error } } else { error });
                }
                removed => removed?,
            }
        }
        self.oldest().remove(name);
        Ok(())
    }

    fn retain(&self, name: &Name, until: WallTime) -> Result<(), Error> {
        let Some(versions) = self.versions.as_ref().filter(|_| self.features.lock) else {
            return Err(self.refused(ErrorKind::Unsupported, "retain", name, self.no_retention()));
        };
        let Some(version) = self.version_of("retain", name)? else {
            return Err(self.refused(ErrorKind::Unsupported, "retain", name, self.no_retention()));
        };
        self.call("retain", name.as_str(), 0, true, async || {
            if versions.retained_until(name, &version).await?.is_some_and(|now| now >= until) {
                return Ok(());
            }
            versions.retain(name, &version, until).await
        })
    }

    fn hidden(&self, prefix: &str) -> Result<Vec<Name>, Error> {
        let Some(versions) = self.versions.as_ref().filter(|_| self.is_versioned()) else {
            return Ok(Vec::new());
        };
        let (hidden, mut from) = (Mutex::new(Hidden::default()), None);
        loop {
            from = self.call("list", prefix, 0, false, async || {
                let mut found = std::mem::take(&mut *hidden.lock().unwrap_or_else(PoisonError::into_inner));
                let next = versions.hidden(prefix, &from, &mut found).await;
                *hidden.lock().unwrap_or_else(PoisonError::into_inner) = found;
                next
            })?;
            if from.is_none() {
                let names = hidden.into_inner().unwrap_or_else(PoisonError::into_inner).names;
                // Others' objects are none of ours.
                return Ok(names.into_iter().filter_map(|name| Name::new(name).ok()).collect());
            }
        }
    }

    fn reveal(&self, name: &Name) -> Result<(), Error> {
        let Some(versions) = self.versions.as_ref().filter(|_| self.is_versioned()) else { return Ok(()) };
        let history = self.call("reveal", name.as_str(), 0, false, async || versions.history(name).await)?;
        if history.versions.is_empty() {
            return Ok(());
        }
        history.markers.iter().try_for_each(|marker| {
            self.call("reveal", name.as_str(), 0, true, async || versions.remove(name, marker).await)
        })
    }

    fn abilities(&self) -> Abilities {
        Abilities { retention: self.features.lock, pack_len: PACK_LEN, creates: CREATES }
    }

    fn url(&self) -> String {
        self.location.to_string()
    }
}

impl Bucket {
    /// The object that is named as the prefix, if there is one: the client leaves it out of Azure's lists.
    fn prefix_itself(&self, prefix: &str, after: Option<&Name>) -> Result<Option<Listed>, Error> {
        let azure = matches!(self.location.kind, Kind::Azure { .. });
        let name = Name::new(prefix).ok().filter(|name| azure && after.is_none_or(|after| name > after));
        let Some(name) = name else { return Ok(None) };
        match self.len(&name) {
            Ok(len) => Ok(Some(Listed { name, len })),
            Err(error) if error.kind == ErrorKind::Missing => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn no_retention(&self) -> &'static str {
        match self.location.kind {
            Kind::S3 { .. } => {
                "the bucket has no object lock (or we may not ask): it must be created with it"
            }
            Kind::Azure { .. } => {
                "retention of single objects is not supported on Azure; a policy on the container retains all of them"
            }
        }
    }
}

/// Tells a refusal for retention from one for want of rights; the store's clock decides about retention itself.
fn now() -> WallTime {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    WallTime(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn client_options(location: &Location) -> ClientOptions {
    ClientOptions::new()
        .with_allow_http(location.plain())
        .with_connect_timeout(CONNECT_DEADLINE)
        // Ours are by attempt, and know how much there is to carry.
        .with_timeout_disabled()
}

/// Attempts are repeated by us, who know what a repetition means.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

fn endpoint_of(location: &Location) -> Option<String> {
    location.endpoint.as_ref().map(|endpoint| endpoint.as_str().trim_end_matches('/').to_owned())
}

fn s3(location: &Location, bucket: &str, credentials: &Credentials) -> Result<Parts, StoreError> {
    let signer = Arc::new(OnceLock::new());
    let connector = Connector::new(signer.clone());
    let client = connector.made.clone();
    let mut builder = AmazonS3Builder::new().with_client_options(client_options(location));
    for (key, value) in credentials.settings::<AmazonS3ConfigKey>() {
        builder = builder.with_config(key, value);
    }
    if let Some(endpoint) = endpoint_of(location) {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(region) = &location.region {
        builder = builder.with_region(region);
    }
    let region =
        builder.get_config_value(&AmazonS3ConfigKey::Region).unwrap_or_else(|| "us-east-1".to_owned());
    let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
    let store = builder
        .with_bucket_name(bucket)
        .with_region(&region)
        .with_allow_http(location.plain())
        .with_virtual_hosted_style_request(false)
        .with_checksum_algorithm(Checksum::SHA256)
        .with_disable_bulk_delete(true)
        .with_retry(no_retries())
        .with_http_connector(connector)
        .build()?;
    let endpoint = endpoint.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
    let base = Url::parse(&format!("{}/{bucket}", endpoint.trim_end_matches('/')));
    let base = base.map_err(|error| StoreError::Generic { store: "S3", source: error.into() })?;
    signer.get_or_init(|| Signer { credentials: store.credentials().clone(), region });
    let prefix = if location.prefix.is_empty() { String::new() } else { format!("{}/", location.prefix) };
    let client = client.get().expect("the store has made its client").clone();
    Ok((Arc::new(store), Some(Versions { client, base, prefix, signer })))
}

fn azure(
    location: &Location,
    account: &str,
    container: &str,
    credentials: &Credentials,
) -> Result<Parts, StoreError> {
    let mut builder = MicrosoftAzureBuilder::new().with_client_options(client_options(location));
    for (key, value) in credentials.settings::<AzureConfigKey>() {
        builder = builder.with_config(key, value);
    }
    if let Some(endpoint) = endpoint_of(location) {
        builder = builder.with_endpoint(endpoint);
    }
    let store = builder
        .with_account(account)
        .with_container_name(container)
        .with_allow_http(location.plain())
        .with_retry(no_retries())
        .with_http_connector(Connector::new(Arc::default()))
        .build()?;
    Ok((Arc::new(store), None))
}

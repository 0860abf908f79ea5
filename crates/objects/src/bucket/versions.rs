//! What S3 has beyond objects under names: versions of them, and retention. Signed by the store's own signer.
//!
//! In a versioned bucket a delete marker hides an object, and its name looks free again. So there the oldest version of a name
//! is the object; later ones were never acknowledged, or are somebody's mischief.

use crate::Name;
use data_encoding::{BASE64, HEXLOWER};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use object_store::Error as StoreError;
use object_store::aws::{AwsAuthorizer, AwsCredentialProvider};
use object_store::client::{HttpClient, HttpRequest, HttpRequestBody};
use rempart_types::WallTime;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Bytes of an answer, at most.
const LONGEST_ANSWER: usize = 4 * 1024 * 1024;
/// Pages of versions of one name: each has a thousand.
const MOST_PAGES: usize = 100;
const STORE: &str = "S3";

/// Until when an object is retained from its birth: travels with its creation's request.
#[derive(Debug, Clone, Copy)]
pub(super) struct RetainUntil(pub WallTime);

/// Signs requests to S3.
#[derive(Debug)]
pub(super) struct Signer {
    pub credentials: AwsCredentialProvider,
    pub region: String,
}

impl Signer {
    async fn sign(&self, request: &mut HttpRequest, digest: Option<&[u8]>) -> Result<(), StoreError> {
        let credential = self.credentials.get_credential().await?;
        AwsAuthorizer::new(&credential, "s3", &self.region).try_authorize(request, digest)
    }

    /// Adds to a creation's request that the object is to be retained, and signs it anew.
    pub async fn add_retention(&self, request: &mut HttpRequest) -> Result<(), StoreError> {
        let Some(RetainUntil(until)) = request.extensions().get::<RetainUntil>().copied() else {
            return Ok(());
        };
        let headers = request.headers_mut();
        // The checksum itself is there on every creation.
        headers.insert("x-amz-sdk-checksum-algorithm", HeaderValue::from_static("SHA256"));
        headers.insert("x-amz-object-lock-mode", HeaderValue::from_static("COMPLIANCE"));
        let until = HeaderValue::try_from(date(until)).map_err(generic)?;
        headers.insert("x-amz-object-lock-retain-until-date", until);
        headers.remove(header::AUTHORIZATION);
        let digest = headers.get("x-amz-content-sha256").and_then(|hex| HEXLOWER.decode(hex.as_bytes()).ok());
        self.sign(request, digest.as_deref()).await
    }
}

/// The requests that the store's client lacks.
#[derive(Debug)]
pub(super) struct Versions {
    pub client: HttpClient,
    /// `https://HOST/BUCKET`.
    pub base: url::Url,
    /// In front of all names, with its `/`.
    pub prefix: String,
    pub signer: std::sync::Arc<std::sync::OnceLock<Signer>>,
}

/// What a bucket does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Features {
    pub versioned: bool,
    pub lock: bool,
}

/// All versions of an object, the newest first, and the markers of its deletion.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct History {
    pub versions: Vec<String>,
    pub markers: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct VersionsPage {
    #[serde(default)]
    is_truncated: bool,
    next_key_marker: Option<String>,
    next_version_id_marker: Option<String>,
    #[serde(default, rename = "Version")]
    versions: Vec<Version>,
    #[serde(default, rename = "DeleteMarker")]
    markers: Vec<Version>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Version {
    key: String,
    version_id: String,
    #[serde(default)]
    is_latest: bool,
}

/// Where a list of versions goes on: behind that version of that key.
pub(super) type Next = Option<(String, String)>;

/// What some versions tell of names that a marker hides. Those of one name follow each other, the newest first.
#[derive(Debug, Default)]
pub(super) struct Hidden {
    /// Names whose newest version is a marker.
    marked: BTreeSet<String>,
    /// Those of them that have another.
    pub names: BTreeSet<String>,
}

impl Hidden {
    /// Adds a page, and returns where the next one begins. `before` stands in front of all names.
    fn add(&mut self, page: VersionsPage, before: &str) -> Next {
        let name = |key: String| key.strip_prefix(before).map(str::to_owned);
        let newest = page.markers.into_iter().filter(|marker| marker.is_latest);
        self.marked.extend(newest.filter_map(|marker| name(marker.key)));
        let names = page.versions.into_iter().filter_map(|version| name(version.key));
        self.names.extend(names.filter(|name| self.marked.contains(name)));
        let next = page.next_key_marker.filter(|_| page.is_truncated);
        next.map(|key| (key, page.next_version_id_marker.unwrap_or_default()))
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Versioning {
    status: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ObjectLock {
    object_lock_enabled: Option<String>,
}

impl Versions {
    /// What the bucket does. What we may not ask for is not there for us.
    pub async fn features(&self) -> Result<Features, StoreError> {
        let versioning = self.ask("", &[("versioning", "")]).await?;
        let versioned = match &versioning {
            Some(text) => {
                let versioning: Versioning = parse(text)?;
                // A bucket that was versioned once keeps its old versions.
                versioning.status.is_some()
            }
            None => false,
        };
        let lock = match self.ask("", &[("object-lock", "")]).await? {
            Some(text) => {
                let lock: ObjectLock = parse(&text)?;
                lock.object_lock_enabled.as_deref() == Some("Enabled")
            }
            None => false,
        };
        Ok(Features { versioned: versioned || lock, lock })
    }

    pub async fn history(&self, name: &Name) -> Result<History, StoreError> {
        let key = format!("{}{name}", self.prefix);
        let mut history = History::default();
        let mut from: Next = None;
        for _ in 0..MOST_PAGES {
            let page = self.page(&key, &from).await?;
            let ours = |version: &Version| version.key == key;
            history.versions.extend(page.versions.into_iter().filter(ours).map(|version| version.version_id));
            history.markers.extend(page.markers.into_iter().filter(ours).map(|version| version.version_id));
            // Other names that start with this one come behind it.
            match (page.is_truncated, page.next_key_marker, page.next_version_id_marker) {
                (true, Some(next), version) if next == key => {
                    from = Some((next, version.unwrap_or_default()));
                }
                _ => return Ok(history),
            }
        }
        Err(generic(format!("`{key}` has more than {MOST_PAGES} pages of versions")))
    }

    /// Adds what the versions behind `from` tell of names with that prefix. Returns where to go on.
    pub async fn hidden(&self, prefix: &str, from: &Next, hidden: &mut Hidden) -> Result<Next, StoreError> {
        let page = self.page(&format!("{}{prefix}", self.prefix), from).await?;
        let next = hidden.add(page, &self.prefix);
        if next.is_some() && next == *from {
            return Err(generic("the list of versions goes in circles"));
        }
        Ok(next)
    }

    async fn page(&self, prefix: &str, from: &Next) -> Result<VersionsPage, StoreError> {
        let mut query = vec![("versions", ""), ("prefix", prefix), ("max-keys", "1000")];
        if let Some((key, version)) = from {
            query.push(("key-marker", key));
            query.push(("version-id-marker", version));
        }
        let (_, text) = self.send(Method::GET, "", &query, "").await?;
        parse(&text)
    }

    pub async fn remove(&self, name: &Name, version: &str) -> Result<(), StoreError> {
        self.send(Method::DELETE, name.as_str(), &[("versionId", version)], "").await.map(|_| ())
    }

    /// Until when a version must be kept, as far as we may know.
    pub async fn retained_until(&self, name: &Name, version: &str) -> Result<Option<WallTime>, StoreError> {
        let headers = match self.send(Method::HEAD, name.as_str(), &[("versionId", version)], "").await {
            Ok((headers, _)) => headers,
            Err(StoreError::NotFound { .. } | StoreError::PermissionDenied { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(until) = headers.get("x-amz-object-lock-retain-until-date") else { return Ok(None) };
        let until = OffsetDateTime::parse(until.to_str().map_err(generic)?, &Rfc3339).map_err(generic)?;
        let millis = u64::try_from(until.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
        Ok(Some(WallTime(millis)))
    }

    pub async fn retain(&self, name: &Name, version: &str, until: WallTime) -> Result<(), StoreError> {
        let body = format!(
            "<Retention xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Mode>COMPLIANCE</Mode>\
             <RetainUntilDate>{}</RetainUntilDate></Retention>",
            date(until)
        );
        let query = [("retention", ""), ("versionId", version)];
        self.send(Method::PUT, name.as_str(), &query, &body).await.map(|_| ())
    }

    /// A question, answered by `None` where there is no such thing, or none that we may see.
    async fn ask(&self, name: &str, query: &[(&str, &str)]) -> Result<Option<String>, StoreError> {
        match self.send(Method::GET, name, query, "").await {
            Ok((_, text)) => Ok(Some(text)),
            Err(
                StoreError::NotFound { .. }
                | StoreError::PermissionDenied { .. }
                | StoreError::NotImplemented { .. },
            ) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn send(
        &self,
        method: Method,
        name: &str,
        query: &[(&str, &str)],
        body: &str,
    ) -> Result<(HeaderMap, String), StoreError> {
        let mut url = self.base.clone();
        if !name.is_empty() {
            url.set_path(&format!("{}/{}{name}", self.base.path().trim_end_matches('/'), self.prefix));
        }
        url.query_pairs_mut().extend_pairs(query);
        let mut request = http::Request::builder()
            .method(method)
            .uri(url.as_str())
            .header(header::CONTENT_LENGTH, body.len())
            .body(HttpRequestBody::from(body.to_owned()))
            .map_err(generic)?;
        if !body.is_empty() {
            let digest = BASE64.encode(&Sha256::digest(body));
            let digest = HeaderValue::try_from(digest).map_err(generic)?;
            request.headers_mut().insert("x-amz-checksum-sha256", digest);
            request.headers_mut().insert("x-amz-sdk-checksum-algorithm", HeaderValue::from_static("SHA256"));
        }
        let signer = self.signer.get().ok_or_else(|| generic("there is nobody to sign"))?;
        signer.sign(&mut request, None).await?;
        let response = self.client.execute(request).await.map_err(generic)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body =
            Limited::new(response.into_body(), LONGEST_ANSWER).collect().await.map_err(generic_boxed)?;
        let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
        if status.is_success() {
            return Ok((headers, text));
        }
        let path = name.to_owned();
        let source = format!("{status}: {}", text.chars().take(500).collect::<String>()).into();
        Err(match status {
            StatusCode::NOT_FOUND => StoreError::NotFound { path, source },
            StatusCode::FORBIDDEN => StoreError::PermissionDenied { path, source },
            StatusCode::NOT_IMPLEMENTED | StatusCode::METHOD_NOT_ALLOWED => {
                StoreError::NotImplemented { operation: source.to_string(), implementer: STORE.to_owned() }
            }
            _ => StoreError::Generic { store: STORE, source },
        })
    }
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, StoreError> {
    quick_xml::de::from_str(text).map_err(generic)
}

/// # Panics
/// If names are found hidden that the answer does not have.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(text: &str) {
    let _ = (parse::<Versioning>(text).is_ok(), parse::<ObjectLock>(text).is_ok());
    for before in ["", "p/"] {
        let Ok(page) = parse::<VersionsPage>(text) else { continue };
        let keys: Vec<String> = page
            .versions
            .iter()
            .map(|version| version.key.clone())
            .filter(|key| key.starts_with(before))
            .collect();
        let mut hidden = Hidden::default();
        hidden.add(page, before);
        assert!(hidden.names.iter().all(|name| keys.contains(&format!("{before}{name}"))), "{hidden:?}");
    }
}

fn generic(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
    StoreError::Generic { store: STORE, source: source.into() }
}

fn generic_boxed(source: Box<dyn std::error::Error + Send + Sync>) -> StoreError {
    StoreError::Generic { store: STORE, source }
}

/// Rounded up to a second, as S3 wants it.
fn date(time: WallTime) -> String {
    let seconds = i64::try_from(time.0.div_ceil(1000)).unwrap_or(i64::MAX);
    // The last moment of the year 9999 stands for all later ones.
    let last = 253_402_300_799;
    let date = OffsetDateTime::from_unix_timestamp(seconds.min(last)).expect("years to 9999 are dates");
    date.format(&Rfc3339).expect("they can be written")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_rounded_up_to_a_second() {
        assert_eq!(date(WallTime(0)), "1970-01-01T00:00:00Z");
        assert_eq!(date(WallTime(1_763_816_400_001)), "2025-11-22T13:00:01Z");
        assert_eq!(date(WallTime(u64::MAX)), "9999-12-31T23:59:59Z");
    }

    #[test]
    fn versions_and_markers_are_told_apart() {
        let text = "<?xml version=\"1.0\"?><ListVersionsResult><Name>b</Name><IsTruncated>true</IsTruncated>\
            <NextKeyMarker>k</NextKeyMarker><NextVersionIdMarker>2</NextVersionIdMarker>\
            <DeleteMarker><Key>k</Key><VersionId>3</VersionId><IsLatest>true</IsLatest></DeleteMarker>\
            <Version><Key>k</Key><VersionId>2</VersionId></Version>\
            <DeleteMarker><Key>k</Key><VersionId>1</VersionId></DeleteMarker>\
            <Version><Key>k</Key><VersionId>0</VersionId></Version></ListVersionsResult>";
        let page: VersionsPage = parse(text).expect("a page");
        assert!(page.is_truncated);
        assert_eq!(page.next_version_id_marker.as_deref(), Some("2"));
        let ids = |versions: &[Version]| versions.iter().map(|v| v.version_id.clone()).collect::<Vec<_>>();
        assert_eq!(ids(&page.versions), ["2", "0"]);
        assert_eq!(ids(&page.markers), ["3", "1"]);
        for garbage in ["", "<", "<a>", "<ListVersionsResult><Version/></ListVersionsResult>", "\u{0}"] {
            parse::<VersionsPage>(garbage).expect_err(garbage);
        }
    }

    #[test]
    fn what_is_hidden_is_told_over_the_ends_of_pages() {
        let version = |kind: &str, key: &str, is_latest: bool| {
            format!(
                "<{kind}><Key>{key}</Key><VersionId>1</VersionId><IsLatest>{is_latest}</IsLatest></{kind}>"
            )
        };
        let (marker, object) = ("DeleteMarker", "Version");
        let first = [
            version(object, "p/a", true),
            version(marker, "p/b", true),
            version(object, "p/c", true),
            version(marker, "p/c", false),
            version(marker, "p/d", true),
            version(marker, "p/e", true),
        ];
        let second =
            [version(marker, "p/e", false), version(object, "p/e", false), version(object, "p/c", false)];
        let mut hidden = Hidden::default();
        let end = "<IsTruncated>true</IsTruncated><NextKeyMarker>p/e</NextKeyMarker>\
            <NextVersionIdMarker>1</NextVersionIdMarker>";
        let page = |entries: &[String], end: &str| {
            let text = format!("<ListVersionsResult>{}{end}</ListVersionsResult>", entries.concat());
            parse(&text).expect("a page")
        };
        let next = hidden.add(page(&first, end), "p/");
        assert_eq!(next, Some(("p/e".to_owned(), "1".to_owned())));
        assert_eq!(hidden.add(page(&second, ""), "p/"), None);
        assert_eq!(hidden.names, BTreeSet::from(["e".to_owned()]), "`b` and `d` are gone, `c` is there");
    }
}

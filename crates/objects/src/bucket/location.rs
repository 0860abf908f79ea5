//! Where a bucket is: what a user writes, and what may be shown of it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use thiserror::Error;
use url::{Host, Url};

/// Bytes of a file of credentials, at most.
const LONGEST_FILE: u64 = 64 * 1024;

/// Where objects are kept in a bucket (S3) or container (Azure). Holds no secrets.
///
/// ```text
/// s3://BUCKET/PREFIX?endpoint=https://HOST&region=REGION
/// az://ACCOUNT/CONTAINER/PREFIX?endpoint=https://HOST
/// ```
/// `allow_http=true` allows an endpoint without TLS on another machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    pub kind: Kind,
    /// In front of all names; empty, or parts joined by `/`.
    pub prefix: String,
    pub endpoint: Option<Url>,
    pub region: Option<String>,
    allow_http: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    S3 { bucket: String },
    Azure { account: String, container: String },
}

/// A text that says of no bucket where it is.
#[derive(Debug, Error)]
pub enum InvalidLocation {
    #[error(transparent)]
    Url(#[from] url::ParseError),
    #[error("`{0}` is missing: {SHAPES}")]
    Missing(&'static str),
    #[error("a URL is shown and logged, so it must hold no user or password; give them by {SOURCES}")]
    Secret,
    #[error("it has an unknown option `{0}`; known are `endpoint`, `region` and `allow_http`")]
    Option(String),
    /// The value itself may hold a secret.
    #[error("option `{0}` has a value it cannot have: {1}")]
    Value(&'static str, &'static str),
    #[error("`{0}` cannot be part of a prefix: letters, digits, `-`, `_` and `.` can")]
    Prefix(String),
    #[error(
        "endpoint `{0}` has no TLS, and is not on this machine: what is sent could be read and changed on its way \
         (all but names is encrypted; with credentials stolen, all could be removed). `allow_http=true` allows it"
    )]
    Plain(Url),
}

const SHAPES: &str = "s3://BUCKET/PREFIX or az://ACCOUNT/CONTAINER/PREFIX";
const SOURCES: &str = "the environment (AWS_ACCESS_KEY_ID, AZURE_STORAGE_ACCOUNT_KEY, …) or a file";

impl Location {
    pub fn parse(text: &str) -> Result<Location, InvalidLocation> {
        let url = Url::parse(text)?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(InvalidLocation::Secret);
        }
        let host = url.host_str().unwrap_or("").to_owned();
        let mut path = url.path().split('/').filter(|part| !part.is_empty());
        let kind = match url.scheme() {
            "s3" if host.is_empty() => return Err(InvalidLocation::Missing("bucket")),
            "s3" => Kind::S3 { bucket: host },
            "az" if host.is_empty() => return Err(InvalidLocation::Missing("account")),
            "az" => {
                let container = path.next().ok_or(InvalidLocation::Missing("container"))?;
                Kind::Azure { account: host, container: container.to_owned() }
            }
            _ => return Err(InvalidLocation::Missing("scheme")),
        };
        let prefix: Vec<&str> = path.collect();
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if let Some(part) = prefix.iter().find(|part| part.starts_with('.') || !part.bytes().all(fits)) {
            return Err(InvalidLocation::Prefix((*part).to_owned()));
        }
        let mut location =
            Location { kind, prefix: prefix.join("/"), endpoint: None, region: None, allow_http: false };
        for (option, value) in url.query_pairs() {
            match &*option {
                "endpoint" => {
                    let shape =
                        "http:// or https://, a host, perhaps a port and a path, no user, no password";
                    let endpoint = endpoint(&value).ok_or(InvalidLocation::Value("endpoint", shape))?;
                    location.endpoint = Some(endpoint);
                }
                // It is shown, and sent in headers.
                "region" if !value.bytes().all(fits) => {
                    return Err(InvalidLocation::Value("region", "letters, digits, `-`, `_` and `.`"));
                }
                "region" => location.region = Some(value.into_owned()),
                "allow_http" => {
                    let invalid = |_| InvalidLocation::Value("allow_http", "true or false");
                    location.allow_http = value.parse().map_err(invalid)?;
                }
                _ => return Err(InvalidLocation::Option(option.into_owned())),
            }
        }
        match &location.endpoint {
            Some(endpoint) if location.plain() && !location.allow_http && !is_loopback(endpoint) => {
                Err(InvalidLocation::Plain(endpoint.clone()))
            }
            _ => Ok(location),
        }
    }

    /// Without TLS.
    pub fn plain(&self) -> bool {
        self.endpoint.as_ref().is_some_and(|endpoint| endpoint.scheme() == "http")
    }
}

/// Scheme, host, port and path, nothing that could be a secret.
fn endpoint(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let fits = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    fits.then_some(url)
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// So that what is shown can be given again: these have a meaning in front of a URL's options.
fn as_value(url: &str) -> String {
    url.replace('%', "%25").replace('&', "%26").replace('+', "%2B")
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::S3 { bucket } => write!(f, "s3://{bucket}")?,
            Kind::Azure { account, container } => write!(f, "az://{account}/{container}")?,
        }
        if !self.prefix.is_empty() {
            write!(f, "/{}", self.prefix)?;
        }
        let options = [
            self.endpoint
                .as_ref()
                .map(|endpoint| format!("endpoint={}", as_value(endpoint.as_str().trim_end_matches('/')))),
            self.region.as_ref().map(|region| format!("region={region}")),
            self.allow_http.then(|| "allow_http=true".to_owned()),
        ];
        for (number, option) in options.into_iter().flatten().enumerate() {
            write!(f, "{}{option}", if number == 0 { '?' } else { '&' })?;
        }
        Ok(())
    }
}

/// Names and values that say who we are, as environment variables do: of the environment, or of a file.
#[derive(Clone, Default)]
pub struct Credentials(BTreeMap<String, String>);

/// A file that holds no credentials, or not only for us.
#[derive(Debug, Error)]
pub enum InvalidCredentials {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("others may read it: it must be the owner's alone (chmod 600)")]
    Exposed,
    #[error("it is longer than {LONGEST_FILE} bytes")]
    TooLong,
    /// The line itself may be secret.
    #[error("line {0} is not of the shape NAME=VALUE")]
    Line(usize),
}

impl Credentials {
    /// The variables of the environment that start with `AWS_` or `AZURE_`.
    pub fn from_environment() -> Credentials {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        let ours = |(name, _): &(String, String)| name.starts_with("AWS_") || name.starts_with("AZURE_");
        Credentials(std::env::vars_os().filter_map(text).filter(ours).collect())
    }

    /// `NAME=VALUE` a line, as in the environment; `#` starts a comment.
    pub fn from_file(path: &Path) -> Result<Credentials, InvalidCredentials> {
        let mut file = File::open(path)?;
        if file.metadata()?.mode() & 0o077 != 0 {
            return Err(InvalidCredentials::Exposed);
        }
        let mut text = String::new();
        if file.by_ref().take(LONGEST_FILE + 1).read_to_string(&mut text)? as u64 > LONGEST_FILE {
            return Err(InvalidCredentials::TooLong);
        }
        let mut values = BTreeMap::new();
        for (number, line) in text.lines().map(str::trim).enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, value) = line.split_once('=').ok_or(InvalidCredentials::Line(number + 1))?;
            values.insert(name.trim().to_owned(), value.trim().trim_matches('"').to_owned());
        }
        Ok(Credentials(values))
    }

    /// What object_store knows under these names, spelled as it does.
    pub fn settings<K: std::str::FromStr>(&self) -> impl Iterator<Item = (K, &str)> {
        self.0
            .iter()
            .filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, value.as_str())))
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_location_reads_back_as_it_is_shown() {
        for text in [
            "s3://bucket",
            "s3://bucket/a/b?endpoint=http://127.0.0.1:5000&region=eu-west-3",
            "s3://bucket?endpoint=http://[::1]:5000",
            "s3://bucket?endpoint=http://localhost:5000",
            "s3://bucket/a?endpoint=http://192.0.2.1&allow_http=true",
            "s3://bucket?endpoint=https://storage.example/a%26b%2Bc%2525d",
            "az://account/container/a_b/C.d",
            "az://account/container?endpoint=https://storage.example/account",
        ] {
            let location = Location::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(location.to_string(), text);
        }
        let location = Location::parse("s3://bucket//a///b/").expect("a location");
        assert_eq!(location.to_string(), "s3://bucket/a/b");
    }

    #[test]
    fn what_is_no_location_is_refused() {
        for text in [
            "s3:",
            "s3://",
            "s3:///a",
            "az://account",
            "az://",
            "ftp://bucket",
            "s3://key:secret@bucket/a",
            "s3://key@bucket/a",
            "s3://bucket/a%20b",
            "s3://bucket/.a",
            "s3://bucket?secret=1",
            "s3://bucket?region=eu%1b[2J",
            "s3://bucket?region=eu%26allow_http=true",
            "s3://bucket?endpoint=nowhere",
            "s3://bucket?endpoint=https://key:secret@host",
            "s3://bucket?endpoint=https://host/?sig=secret",
            "s3://bucket?endpoint=http://192.0.2.1",
            "s3://bucket?endpoint=http://localhost.example",
            "s3://bucket?allow_http=perhaps",
        ] {
            let error = Location::parse(text).expect_err(text);
            assert!(!error.to_string().contains("secret@"), "{error}");
        }
    }

    #[test]
    fn credentials_are_of_the_owner_alone_and_never_shown() {
        let home = tempfile::tempdir().expect("a directory");
        let path = home.path().join("credentials");
        fs::write(&path, "# ours\nAWS_ACCESS_KEY_ID=id\n\n AWS_SECRET_ACCESS_KEY = \"hidden\"\n")
            .expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("set");
        assert!(matches!(Credentials::from_file(&path), Err(InvalidCredentials::Exposed)));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("set");
        let credentials = Credentials::from_file(&path).expect("it is ours");
        assert_eq!(credentials.get("AWS_SECRET_ACCESS_KEY"), Some("hidden"));
        let shown = format!("{credentials:?}");
        assert!(shown.contains("AWS_ACCESS_KEY_ID") && !shown.contains("hidden"), "{shown}");
        fs::write(&path, "AWS_ACCESS_KEY_ID=id\nhidden\n").expect("written");
        let error = Credentials::from_file(&path).expect_err("no value");
        assert_eq!(error.to_string(), "line 2 is not of the shape NAME=VALUE");
        fs::write(&path, "#".repeat(LONGEST_FILE as usize + 1)).expect("written");
        assert!(matches!(Credentials::from_file(&path), Err(InvalidCredentials::TooLong)));
    }
}

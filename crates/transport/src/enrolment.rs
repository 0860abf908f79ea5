//! One-time tokens by which a machine joins a cluster.

use crate::pki::{CaPin, write_private};
use crate::{ClusterId, Error, ErrorKind, Role};
use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use rempart_types::{NodeId, WallTime};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// What a token's text begins with; the digit is the format's version.
const PREFIX: &str = "rempart1_";
const CHECKSUM: usize = 4;
/// Characters of a token at most.
const MAX_TOKEN: usize = 4096;
/// Tokens kept in a book at most, counting used and expired ones.
const MAX_TOKENS: usize = 1024;
/// Used and expired tokens are remembered this much longer, so that they are named for what they are.
const REMEMBERED: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The 128 random bits that make a token worth something. Never shown by `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret([u8; 16]);

impl Secret {
    fn random() -> Secret {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
        Secret(bytes)
    }

    /// Parses what a joining member sends: 32 hexadecimal digits.
    pub fn from_hex(text: &str) -> Result<Secret, Error> {
        let bad = || Error::new(ErrorKind::BadToken, "read a token's secret");
        let bytes = HEXLOWER.decode(text.as_bytes()).map_err(|_| bad())?;
        Ok(Secret(bytes.try_into().map_err(|_| bad())?))
    }

    /// The secret itself, to be sent to a member whose authority was verified against the token's pin.
    pub fn to_secret_hex(&self) -> String {
        HEXLOWER.encode(&self.0)
    }

    /// What is stored. The secret has full entropy, so a plain hash is enough.
    fn hash(&self) -> String {
        HEXLOWER.encode(&Sha256::new().chain_update(b"rempart enrolment").chain_update(self.0).finalize())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Everything a machine needs to join: whom to call, how to know it, what to say. `Display` is the text form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolmentToken {
    pub cluster: ClusterId,
    pub role: Role,
    pub pin: CaPin,
    pub secret: Secret,
    pub expires: WallTime,
    /// `host:port`, tried in order.
    pub addresses: Vec<String>,
}

impl fmt::Display for EnrolmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&encode(postcard::to_allocvec(self).expect("a token always serialises")))
    }
}

/// The text form of a serialised token.
pub(crate) fn encode(mut body: Vec<u8>) -> String {
    let checksum = Sha256::digest(&body);
    body.extend_from_slice(&checksum[..CHECKSUM]);
    format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&body))
}

impl FromStr for EnrolmentToken {
    type Err = Error;

    fn from_str(text: &str) -> Result<EnrolmentToken, Error> {
        let bad = |why: &'static str| Error::new(ErrorKind::BadToken, "read the token").because(why);
        let text = text.trim();
        if text.len() > MAX_TOKEN {
            return Err(bad("it is too long"));
        }
        let Some(encoded) = text.strip_prefix(PREFIX) else {
            let newer = text.strip_prefix("rempart").is_some_and(|rest| rest.starts_with(char::is_numeric));
            return Err(bad(if newer {
                "it was made by a newer release"
            } else {
                "it has no known beginning"
            }));
        };
        let bytes = BASE64URL_NOPAD
            .decode(encoded.as_bytes())
            .map_err(|_| bad("it was damaged or cut when it was copied"))?;
        let (body, checksum) = bytes.split_last_chunk::<CHECKSUM>().ok_or_else(|| bad("it is too short"))?;
        if Sha256::digest(body)[..CHECKSUM] != *checksum {
            return Err(bad("it was damaged or cut when it was copied"));
        }
        postcard::from_bytes(body).map_err(|_| bad("its contents make no sense"))
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    /// Hexadecimal hash of the secret.
    hash: String,
    role: Role,
    expires_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    used_by: Option<NodeId>,
}

/// The tokens a cluster gave out. Holds hashes, never secrets; every change is durable before it counts.
#[derive(Debug)]
pub struct TokenBook {
    path: PathBuf,
    entries: Vec<Entry>,
}

impl TokenBook {
    /// Opens the book at `path`; an absent file is an empty book.
    pub fn open(path: impl Into<PathBuf>) -> Result<TokenBook, Error> {
        let path = path.into();
        let doing = |path: &Path| format!("read `{}`", path.display());
        let entries = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| Error::new(ErrorKind::Io, doing(&path)).because(error))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Error::io(doing(&path), error)),
        };
        Ok(TokenBook { path, entries })
    }

    /// Makes a token that is good for one machine until `now + lifetime`.
    pub fn create(
        &mut self,
        cluster: ClusterId,
        addresses: Vec<String>,
        pin: CaPin,
        role: Role,
        lifetime: Duration,
        now: WallTime,
    ) -> Result<EnrolmentToken, Error> {
        let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        let horizon = now.0.saturating_sub(millis(REMEMBERED));
        let mut entries = self.entries.clone();
        entries.retain(|entry| entry.expires_ms >= horizon);
        if entries.len() >= MAX_TOKENS {
            return Err(
                Error::new(ErrorKind::QueueFull, "create a token").because("too many tokens are open")
            );
        }
        let expires = WallTime(now.0.saturating_add(millis(lifetime)));
        let token = EnrolmentToken { cluster, role, pin, secret: Secret::random(), expires, addresses };
        entries.push(Entry { hash: token.secret.hash(), role, expires_ms: expires.0, used_by: None });
        self.replace(entries)?;
        Ok(token)
    }

    /// Whether [`TokenBook::redeem`] would accept it now. Spends nothing.
    ///
    /// Errors: `TokenUnknown`, `TokenUsed`, `TokenExpired`, `TokenWrongRole`.
    pub fn check(&self, secret: &Secret, role: Role, now: WallTime) -> Result<(), Error> {
        self.find(secret, role, now).map(drop)
    }

    fn find(&self, secret: &Secret, role: Role, now: WallTime) -> Result<usize, Error> {
        let refused = |kind| Err(Error::new(kind, format!("admit a {role}")));
        let hash = secret.hash();
        let Some(place) = self.entries.iter().position(|entry| entry.hash == hash) else {
            return refused(ErrorKind::TokenUnknown);
        };
        let entry = &self.entries[place];
        if entry.used_by.is_some() {
            return refused(ErrorKind::TokenUsed);
        }
        if now.0 >= entry.expires_ms {
            return refused(ErrorKind::TokenExpired);
        }
        if entry.role != role {
            return refused(ErrorKind::TokenWrongRole);
        }
        Ok(place)
    }

    /// Spends a token for `who`. When this returns, no one can spend it again, even after a crash.
    ///
    /// Errors: those of [`TokenBook::check`], `Io`.
    pub fn redeem(&mut self, secret: &Secret, role: Role, who: NodeId, now: WallTime) -> Result<(), Error> {
        let place = self.find(secret, role, now)?;
        let mut entries = self.entries.clone();
        entries[place].used_by = Some(who);
        self.replace(entries)
    }

    fn replace(&mut self, entries: Vec<Entry>) -> Result<(), Error> {
        let bytes = serde_json::to_vec_pretty(&entries).expect("a book always serialises");
        write_private(&self.path, &bytes)?;
        self.entries = entries;
        Ok(())
    }
}

//! Keys in files: one that unlocks a repository, one that only writes to it.

use super::{Domain, PublicKeys, Recipient, Secret, Signer, Verifier, WriterKey, WriterName, text};
use crate::error::{Error, ErrorKind, Fault};
use crate::{DomainId, RepositoryId};
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use zeroize::Zeroizing;

const KEY_FILE: &str = "rempart-key-1";
const WRITER: &str = "rempart-writer-1";
/// No key is longer.
const LONGEST: u64 = 4096;

/// A key that unlocks a repository: 32 random bytes in a file, which wrap its master key.
#[derive(Debug, Clone)]
pub struct KeyFile(Secret);

impl KeyFile {
    pub fn random() -> KeyFile {
        KeyFile(Secret::random())
    }

    #[cfg(test)]
    pub(crate) fn new(bytes: [u8; 32]) -> KeyFile {
        KeyFile(Secret::new(bytes))
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.0
    }

    /// Writes it into a new file that only its owner may read.
    pub fn create(&self, path: &Path, repository: &RepositoryId) -> Result<(), Error> {
        let about =
            format!("Opens the backup repository {repository}. Keep it secret, and a copy elsewhere.");
        create(path, &text::encode(KEY_FILE, &about, self.0.bytes()))
    }

    /// [`ErrorKind::Exposed`] if anybody but its owner may read the file.
    pub fn load(path: &Path) -> Result<KeyFile, Error> {
        Self::parse(&load(path)?).map_err(|fault| fault.of(path.display()))
    }

    pub(crate) fn parse(written: &str) -> Result<KeyFile, Fault> {
        let bytes = text::decode(KEY_FILE, written)?;
        let bytes = bytes.as_slice().try_into().map_err(|_| Fault::damaged("a key has 32 bytes"))?;
        Ok(KeyFile(Secret::new(bytes)))
    }
}

/// Bytes of a writer's key before its name: repository, recipient, maintenance, domain and its secret, seed of the
/// signatures.
const WRITER_BYTES: usize = 16 + 32 + 32 + 16 + 32 + 32;

/// What a file turns out to hold.
#[derive(Debug)]
pub enum AnyKey {
    Opens(KeyFile),
    Writes(Box<WriterKey>),
}

impl AnyKey {
    /// [`ErrorKind::Exposed`] if anybody but its owner may read the file.
    pub fn load(path: &Path) -> Result<AnyKey, Error> {
        let written = load(path)?;
        let key = match WriterKey::parse(&written) {
            Ok(key) => Ok(AnyKey::Writes(Box::new(key))),
            Err(fault) if fault.kind == ErrorKind::Invalid => KeyFile::parse(&written).map(AnyKey::Opens),
            Err(fault) => Err(fault),
        };
        key.map_err(|fault| fault.of(path.display()))
    }
}

impl WriterKey {
    /// Writes it into a new file that only its owner may read.
    pub fn create(&self, path: &Path) -> Result<(), Error> {
        create(path, &self.to_text())
    }

    /// [`ErrorKind::Exposed`] if anybody but its owner may read the file.
    pub fn load(path: &Path) -> Result<WriterKey, Error> {
        Self::parse(&load(path)?).map_err(|fault| fault.of(path.display()))
    }

    pub(crate) fn to_text(&self) -> Zeroizing<String> {
        let name = self.name.as_ref().map_or("", WriterName::as_str);
        let mut bytes = Zeroizing::new(Vec::with_capacity(WRITER_BYTES + WriterName::LONGEST));
        bytes.extend_from_slice(&self.public.repository.0);
        bytes.extend_from_slice(&self.public.recipient.0);
        bytes.extend_from_slice(&self.public.maintenance.0);
        bytes.extend_from_slice(&self.domain.id().0);
        bytes.extend_from_slice(self.domain.secret().bytes());
        bytes.extend_from_slice(self.signer.seed().bytes());
        bytes.extend_from_slice(name.as_bytes());
        let about = format!(
            "Adds restore points of {name} to the backup repository {}, and opens nothing in it. Its id: {}.",
            self.public.repository,
            self.signer.id()
        );
        text::encode(WRITER, &about, &bytes)
    }

    pub(crate) fn parse(written: &str) -> Result<WriterKey, Fault> {
        let bytes = text::decode(WRITER, written)?;
        let (bytes, name) = bytes
            .split_first_chunk::<WRITER_BYTES>()
            .ok_or_else(|| Fault::damaged("a writer's key has 160 bytes and a name"))?;
        let name = std::str::from_utf8(name).ok().and_then(WriterName::new);
        let name = name.ok_or_else(|| Fault::damaged("a writer's key has a name"))?;
        let half = |at: usize| <[u8; 16]>::try_from(&bytes[at..at + 16]).expect("16 bytes");
        let whole = |at: usize| <[u8; 32]>::try_from(&bytes[at..at + 32]).expect("32 bytes");
        Ok(WriterKey {
            public: PublicKeys {
                repository: RepositoryId(half(0)),
                recipient: Recipient(whole(16)),
                maintenance: Verifier(whole(48)),
            },
            name: Some(name),
            domain: Domain::new(DomainId(half(80)), Secret::new(whole(96))),
            signer: Signer::new(Secret::new(whole(128))),
        })
    }
}

fn create(path: &Path, content: &str) -> Result<(), Error> {
    let written =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).and_then(|mut file| {
            file.write_all(content.as_bytes())?;
            file.sync_all()
        });
    written.map_err(|source| Error::local(path, "create key file", source))
}

fn load(path: &Path) -> Result<Zeroizing<String>, Error> {
    let local = |source| Error::local(path, "read key file", source);
    let mut file = fs::File::open(path).map_err(local)?;
    let metadata = file.metadata().map_err(local)?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let why = format!("others may read this key (mode {mode:04o}); run `chmod 600` on it");
        return Err(Error::new(ErrorKind::Exposed, path.display(), why));
    }
    let mut content = Zeroizing::new(String::with_capacity(LONGEST as usize + 1));
    match Read::by_ref(&mut file).take(LONGEST + 1).read_to_string(&mut content) {
        Ok(_) => Ok(content),
        Err(source) if source.kind() == std::io::ErrorKind::InvalidData => {
            Err(Error::new(ErrorKind::Invalid, path.display(), "it is no text, so no key"))
        }
        Err(source) => Err(local(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{BoxPurpose, KeyRing, MasterKey};

    fn name() -> WriterName {
        WriterName::new("web").expect("a name")
    }

    fn ring() -> KeyRing {
        KeyRing::new(RepositoryId([1; 16]), MasterKey::new([2; 32]))
    }

    #[test]
    fn a_writers_key_is_the_same_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("agent.key");
        let (ring, agent) = (ring(), ring().new_writer(name()));
        agent.create(&path).expect("written");
        let again = WriterKey::load(&path).expect("read");
        assert_eq!(again.public(), ring.public());
        assert_eq!(again.name(), Some(&name()));
        assert!(matches!(AnyKey::load(&path), Ok(AnyKey::Writes(_))));
        assert_eq!(again.signer().id(), agent.signer().id());
        assert_eq!(again.domain().chunk_id(b"x"), agent.domain().chunk_id(b"x"));
        let sealed = again.seal(BoxPurpose::Commit, b"", b"plain");
        assert!(ring.opener().open(BoxPurpose::Commit, b"", &sealed).is_some());
        assert_eq!(KeyFile::load(&path).expect_err("no key file").kind, ErrorKind::Invalid);
        assert_eq!(agent.create(&path).expect_err("never replaced").kind, ErrorKind::Local);
    }

    #[test]
    fn a_writers_key_holds_nothing_that_opens() {
        let ring = ring();
        let written = text::decode(WRITER, &ring.new_writer(name()).to_text()).expect("a key");
        let own = ring.writer();
        for secret in
            [own.domain().secret(), own.domain().index(), own.signer().seed(), ring.master().secret()]
        {
            assert!(!written.windows(32).any(|part| part == secret.bytes()));
        }
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        let key = KeyFile::random();
        key.create(&path, &RepositoryId([1; 16])).expect("written");
        assert_eq!(KeyFile::load(&path).expect("read").secret().bytes(), key.secret().bytes());
        assert!(matches!(AnyKey::load(&path), Ok(AnyKey::Opens(_))));
        for mode in [0o604, 0o640, 0o620, 0o601] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("changed");
            let error = KeyFile::load(&path).expect_err("exposed");
            assert_eq!(error.kind, ErrorKind::Exposed);
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).expect("changed");
        assert!(KeyFile::load(&path).is_ok());
        fs::write(folder.path().join("not"), [0xff; 9]).expect("written");
        fs::set_permissions(folder.path().join("not"), fs::Permissions::from_mode(0o600)).expect("changed");
        let error = KeyFile::load(&folder.path().join("not")).expect_err("no key");
        assert_eq!(error.kind, ErrorKind::Invalid);
    }
}

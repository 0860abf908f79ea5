//! `keys/<id>`: the master key, wrapped by a passphrase or a key file. A repository has as many as it has ways in.

use super::cipher::{Ordinal, TAG};
use super::{Cipher, CipherKey, KeyFile, MasterKey, Secret, random};
use crate::error::{Error, ErrorKind, Fault, FoundIn};
use crate::wire::{Reader, Writer};
use crate::{RepositoryId, WrappedKeyId};
use argon2::{Algorithm, Argon2, Params, Version};
use rempart_objects::Name;
use rempart_types::WallTime;
use std::fmt;
use zeroize::{Zeroize, Zeroizing};

const MAGIC: &[u8; 8] = b"RMPMKEYS";
const VERSION: u16 = 1;
/// Bytes of a name for people.
const LABEL: usize = 64;
/// Before the encrypted key.
const HEADER: usize = 8 + 2 + 1 + 1 + 12 + 16 + 16 + 8 + LABEL + 32;
/// Bytes of the object.
const WHOLE: usize = HEADER + 32 + TAG + 32;
/// The key is used once.
const ORDINAL: Ordinal = Ordinal { number: 0, space: 0 };

/// Names of the objects start with it.
pub const WRAPPED_KEYS: &str = "keys/";

/// What an attacker who guesses passphrases must spend on each (argon2id).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassphraseCost {
    pub memory_kib: u32,
    pub passes: u32,
    pub lanes: u32,
}

impl PassphraseCost {
    /// The second choice of RFC 9106, for machines that have other things to do, too.
    pub const DEFAULT: PassphraseCost = PassphraseCost { memory_kib: 64 << 10, passes: 3, lanes: 4 };
    /// An object that asks for more is refused: it would only waste the reader's memory and time.
    pub const HIGHEST: PassphraseCost = PassphraseCost { memory_kib: 256 << 10, passes: 16, lanes: 16 };

    fn is_bearable(&self) -> bool {
        self.memory_kib <= Self::HIGHEST.memory_kib
            && (1..=Self::HIGHEST.passes).contains(&self.passes)
            && (1..=Self::HIGHEST.lanes).contains(&self.lanes)
            && self.memory_kib >= 8 * self.lanes
    }
}

/// What opens a wrapped key.
#[derive(Clone, Copy)]
pub enum Unlock<'a> {
    Passphrase(&'a str),
    KeyFile(&'a KeyFile),
}

impl fmt::Debug for Unlock<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unlock::Passphrase(_) => "Passphrase(..)",
            Unlock::KeyFile(_) => "KeyFile(..)",
        })
    }
}

/// By what a wrapped key is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WrappedBy {
    Passphrase(PassphraseCost),
    KeyFile,
}

/// A wrapped copy of the master key, as it lies in the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedKey {
    pub id: WrappedKeyId,
    pub repository: RepositoryId,
    pub by: WrappedBy,
    /// When it was made, by the clock of who made it.
    pub created: WallTime,
    /// For people: whose it is, where the file lies.
    pub label: String,
    pub(crate) salt: [u8; 32],
    sealed: [u8; 32 + TAG],
}

impl WrappedKey {
    /// Wraps the master key. `cost` is that of a passphrase.
    pub fn wrap(
        repository: RepositoryId,
        master: &MasterKey,
        unlock: Unlock<'_>,
        cost: PassphraseCost,
        label: &str,
        created: WallTime,
    ) -> Result<WrappedKey, Error> {
        let invalid = |why: String| Error::new(ErrorKind::Invalid, "key", why);
        if label.len() > LABEL || label.contains('\0') {
            return Err(invalid(format!("a label has at most {LABEL} bytes, none of them zero")));
        }
        if !cost.is_bearable() {
            return Err(invalid(format!("{cost:?} is outside of what a reader bears")));
        }
        let by = match unlock {
            Unlock::Passphrase("") => return Err(invalid("an empty passphrase protects nothing".to_owned())),
            Unlock::Passphrase(_) => WrappedBy::Passphrase(cost),
            Unlock::KeyFile(_) => WrappedBy::KeyFile,
        };
        let mut key = WrappedKey {
            id: WrappedKeyId::random(),
            repository,
            by,
            created,
            label: label.to_owned(),
            salt: random(),
            sealed: [0; 32 + TAG],
        };
        key.seal(master, unlock);
        Ok(key)
    }

    pub(crate) fn seal(&mut self, master: &MasterKey, unlock: Unlock<'_>) {
        let (wrapping, header) = (self.wrapping_key(unlock), self.header());
        let mut sealed = [0; 32 + TAG];
        sealed[..32].copy_from_slice(master.secret().bytes());
        wrapping.seal_in_place(ORDINAL, &header, &mut sealed);
        self.sealed = sealed;
    }

    /// The master key. [`ErrorKind::WrongKey`] if `unlock` is not what it was wrapped by.
    pub fn open(&self, unlock: Unlock<'_>) -> Result<MasterKey, Error> {
        let wrong = match (unlock, self.by) {
            (Unlock::Passphrase(_), WrappedBy::KeyFile) => "it is opened by a key file, not by a passphrase",
            (Unlock::KeyFile(_), WrappedBy::Passphrase(_)) => {
                "it is opened by a passphrase, not by a key file"
            }
            (Unlock::Passphrase(_), WrappedBy::Passphrase(_)) => "the passphrase is wrong",
            (Unlock::KeyFile(_), WrappedBy::KeyFile) => "the key file is another one's",
        };
        let wrong = || Error::new(ErrorKind::WrongKey, self.name(), wrong);
        if matches!(unlock, Unlock::Passphrase(_)) != matches!(self.by, WrappedBy::Passphrase(_)) {
            return Err(wrong());
        }
        let mut bytes = Zeroizing::new(self.sealed);
        let plain = self.wrapping_key(unlock).open_in_place(ORDINAL, &self.header(), &mut *bytes);
        let mut plain: [u8; 32] = (&*plain.ok_or_else(wrong)?).try_into().expect("32 bytes were sealed");
        let master = MasterKey::new(plain);
        plain.zeroize();
        Ok(master)
    }

    fn wrapping_key(&self, unlock: Unlock<'_>) -> CipherKey {
        let secret = match (unlock, self.by) {
            (Unlock::Passphrase(passphrase), WrappedBy::Passphrase(cost)) => {
                let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(32));
                let params = params.expect("the cost was looked at when it was read");
                let mut bytes = Zeroizing::new([0; 32]);
                Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
                    .hash_password_into(passphrase.as_bytes(), &self.salt, &mut *bytes)
                    .expect("passphrases are shorter than 4 GiB");
                Secret::new(*bytes)
            }
            (Unlock::KeyFile(file), _) => file.secret().clone(),
            (Unlock::Passphrase(_), WrappedBy::KeyFile) => unreachable!("refused before"),
        };
        let secret = secret.derive("rempart 2026 wrapping key", &[&self.salt]);
        CipherKey::new(Cipher::ChaCha20Poly1305, &secret)
    }

    /// The name of the object.
    pub fn name(&self) -> Name {
        Name::new(format!("{WRAPPED_KEYS}{}", self.id)).expect("hexadecimal digits make a name")
    }

    /// All but the encrypted key; authenticated with it.
    fn header(&self) -> Vec<u8> {
        let (how, cost) = match self.by {
            WrappedBy::Passphrase(cost) => (1, cost),
            WrappedBy::KeyFile => (2, PassphraseCost { memory_kib: 0, passes: 0, lanes: 0 }),
        };
        let mut out = Writer::with_capacity(WHOLE);
        out.bytes(MAGIC);
        out.u16(VERSION);
        out.bytes(&[how, 0]);
        out.u32(cost.memory_kib);
        out.u32(cost.passes);
        out.u32(cost.lanes);
        out.bytes(&self.repository.0);
        out.bytes(&self.id.0);
        out.u64(self.created.0);
        out.bytes(self.label.as_bytes());
        out.zeroes(LABEL - self.label.len());
        out.bytes(&self.salt);
        out.into_bytes()
    }

    /// The bytes of the object.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.header();
        bytes.extend_from_slice(&self.sealed);
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(check.as_bytes());
        bytes
    }

    /// Bytes of such an object.
    pub const LEN: u64 = WHOLE as u64;

    /// Reads the object `name`. Needs no key: the checksum tells damage from a wrong key.
    pub fn decode(name: &Name, bytes: &[u8]) -> Result<WrappedKey, Error> {
        let key = Self::parse(bytes).found_in(name)?;
        if key.name() != *name {
            return Err(Error::new(ErrorKind::Damaged, name, "it is the key of another name"));
        }
        Ok(key)
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<WrappedKey, Fault> {
        let mut input = Reader::new(bytes);
        input.magic(MAGIC)?;
        input.version(VERSION)?;
        if bytes.len() != WHOLE {
            return Err(Fault::damaged("its length is wrong"));
        }
        let (checked, check) = bytes.split_at(WHOLE - 32);
        if blake3::hash(checked) != *<&[u8; 32]>::try_from(check).expect("32 bytes") {
            return Err(Fault::damaged("its checksum does not fit"));
        }
        let [how, reserved] = input.array()?;
        let cost = PassphraseCost { memory_kib: input.u32()?, passes: input.u32()?, lanes: input.u32()? };
        let nothing = PassphraseCost { memory_kib: 0, passes: 0, lanes: 0 };
        let by = match how {
            1 if cost.is_bearable() => WrappedBy::Passphrase(cost),
            1 => return Err(Fault::damaged("it asks for more memory or time than a reader grants")),
            2 if cost == nothing => WrappedBy::KeyFile,
            _ => return Err(Fault::damaged("it is opened in an unknown way")),
        };
        if reserved != 0 {
            return Err(Fault::damaged("a reserved byte is not zero"));
        }
        let (repository, id) = (RepositoryId(input.array()?), WrappedKeyId(input.array()?));
        let created = WallTime(input.u64()?);
        let label: [u8; LABEL] = input.array()?;
        let length = label.iter().position(|byte| *byte == 0).unwrap_or(LABEL);
        if label[length..].iter().any(|byte| *byte != 0) {
            return Err(Fault::damaged("its label is no text"));
        }
        let text = str::from_utf8(&label[..length]).map_err(|_| Fault::damaged("its label is no text"))?;
        let label = text.to_owned();
        Ok(WrappedKey { id, repository, by, created, label, salt: input.array()?, sealed: input.array()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPOSITORY: RepositoryId = RepositoryId([1; 16]);
    const CHEAP: PassphraseCost = PassphraseCost { memory_kib: 8, passes: 1, lanes: 1 };

    fn wrapped(unlock: Unlock<'_>) -> WrappedKey {
        let master = MasterKey::new([2; 32]);
        WrappedKey::wrap(REPOSITORY, &master, unlock, CHEAP, "büro", WallTime(99)).expect("wrapped")
    }

    #[test]
    fn a_wrong_key_is_told_from_a_damaged_object() {
        let file = KeyFile::random();
        for unlock in [Unlock::Passphrase("correct"), Unlock::KeyFile(&file)] {
            let key = wrapped(unlock);
            let (name, bytes) = (key.name(), key.encode());
            let read = WrappedKey::decode(&name, &bytes).expect("whole");
            assert_eq!(read, key);
            assert_eq!(read.open(unlock).expect("right").secret().bytes(), &[2; 32]);
            for wrong in [Unlock::Passphrase("Correct"), Unlock::KeyFile(&KeyFile::random())] {
                assert_eq!(read.open(wrong).expect_err("wrong").kind, ErrorKind::WrongKey);
            }
            for bit in 0..bytes.len() * 8 {
                let mut changed = bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                let error = WrappedKey::decode(&name, &changed).expect_err("damaged");
                assert!(matches!(error.kind, ErrorKind::Damaged | ErrorKind::Newer), "{bit}: {error}");
                assert_eq!(error.object, name.to_string());
            }
            for length in 0..bytes.len() {
                assert!(WrappedKey::decode(&name, &bytes[..length]).is_err());
            }
        }
    }

    #[test]
    fn what_a_thief_changed_with_its_checksum_does_not_open() {
        let unlock = Unlock::Passphrase("correct");
        let bytes = wrapped(unlock).encode();
        let mut opened = 0;
        for at in 0..bytes.len() - 32 {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let check = blake3::hash(&changed[..changed.len() - 32]);
            let length = changed.len();
            changed[length - 32..].copy_from_slice(check.as_bytes());
            if let Ok(key) = WrappedKey::parse(&changed) {
                assert_eq!(key.open(unlock).expect_err("changed").kind, ErrorKind::WrongKey, "{at}");
                opened += 1;
            }
        }
        assert!(opened > 32 + 48, "most changes are seen by the cipher only");
    }

    #[test]
    fn unbearable_costs_are_refused() {
        let highest = PassphraseCost::HIGHEST;
        for cost in [
            PassphraseCost { memory_kib: highest.memory_kib + 1, ..highest },
            PassphraseCost { passes: highest.passes + 1, ..highest },
            PassphraseCost { lanes: highest.lanes + 1, ..highest },
            PassphraseCost { passes: 0, ..highest },
            PassphraseCost { lanes: 0, ..highest },
            PassphraseCost { memory_kib: 7, ..CHEAP },
        ] {
            let mut key = wrapped(Unlock::Passphrase("correct"));
            key.by = WrappedBy::Passphrase(cost);
            assert_eq!(WrappedKey::parse(&key.encode()).expect_err("refused").kind, ErrorKind::Damaged);
        }
        assert!(highest.is_bearable() && PassphraseCost::DEFAULT.is_bearable());
        let master = MasterKey::new([2; 32]);
        let wrap = |unlock, label: &str| {
            WrappedKey::wrap(REPOSITORY, &master, unlock, CHEAP, label, WallTime(0)).map(|key| key.label)
        };
        assert!(wrap(Unlock::Passphrase(""), "").is_err());
        assert!(wrap(Unlock::Passphrase("x"), &"l".repeat(65)).is_err());
        assert_eq!(wrap(Unlock::Passphrase("x"), &"l".repeat(64)).expect("fits"), "l".repeat(64));
    }
}

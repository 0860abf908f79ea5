//! Who may do what: the master key opens and maintains, a writer's key only adds.

use super::sealed_box::RecipientSecret;
use super::{BoxPurpose, Domain, Recipient, Secret, Signer, Verifier};
use crate::{DomainId, RepositoryId};
use zeroize::Zeroizing;

/// The secret everything else of a repository is derived from.
#[derive(Debug, Clone)]
pub struct MasterKey(Secret);

impl MasterKey {
    pub fn random() -> MasterKey {
        MasterKey(Secret::random())
    }

    pub(crate) fn new(bytes: [u8; 32]) -> MasterKey {
        MasterKey(Secret::new(bytes))
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.0
    }

    fn domain(&self, repository: &RepositoryId, id: DomainId) -> Domain {
        Domain::new(id, self.0.derive("rempart 2026 dedup domain", &[&repository.0, &id.0]))
    }

    fn recipient(&self, repository: &RepositoryId) -> RecipientSecret {
        RecipientSecret::new(self.0.derive("rempart 2026 X25519 key", &[&repository.0]))
    }

    fn maintenance(&self, repository: &RepositoryId) -> Signer {
        Signer::new(self.0.derive("rempart 2026 Ed25519 maintenance key", &[&repository.0]))
    }

    /// The dedup domain of whoever has the master key.
    fn own_domain(&self, repository: &RepositoryId) -> DomainId {
        let id = self.0.derive("rempart 2026 own domain id", &[&repository.0]);
        DomainId(id.bytes()[..16].try_into().expect("32 bytes have a first half"))
    }
}

/// The public keys of a repository: enough to write for it and to check what its owner signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKeys {
    pub repository: RepositoryId,
    /// What boxes are closed for.
    pub recipient: Recipient,
    /// Who may condemn, fence, forget and let writers in.
    pub maintenance: Verifier,
}

/// Everything the master key gives.
#[derive(Debug)]
pub struct KeyRing {
    opener: Opener,
    writer: WriterKey,
}

impl KeyRing {
    pub fn new(repository: RepositoryId, master: MasterKey) -> KeyRing {
        let recipient = master.recipient(&repository);
        let signer = master.maintenance(&repository);
        let public = PublicKeys { repository, recipient: recipient.public(), maintenance: signer.verifier() };
        let domain = master.domain(&repository, master.own_domain(&repository));
        let writer = WriterKey { public, name: None, domain, signer };
        KeyRing { opener: Opener { public, recipient, master }, writer }
    }

    pub fn public(&self) -> &PublicKeys {
        &self.writer.public
    }

    /// To read with.
    pub fn opener(&self) -> &Opener {
        &self.opener
    }

    /// To write with, in the owner's own domain. Its signatures are those of maintenance.
    pub fn writer(&self) -> &WriterKey {
        &self.writer
    }

    /// To write with in any domain. Its signatures are those of maintenance.
    pub fn writer_in(&self, domain: DomainId) -> WriterKey {
        let (public, opener) = (*self.public(), &self.opener);
        let (domain, signer) = (opener.domain(domain), opener.master.maintenance(&public.repository));
        WriterKey { public, name: None, domain, signer }
    }

    /// Signs what only maintenance may do.
    pub fn maintenance(&self) -> &Signer {
        &self.writer.signer
    }

    /// A key for a machine that shall only add to the repository, in the dedup domain of its name.
    pub fn new_writer(&self, name: WriterName) -> WriterKey {
        let domain = self.opener.domain(self.opener.domain_of(name.as_str()));
        WriterKey { public: *self.public(), name: Some(name), domain, signer: Signer::new(Secret::random()) }
    }

    /// The same each time.
    #[cfg(test)]
    pub(crate) fn example_writer(&self, name: WriterName, seed: [u8; 32]) -> WriterKey {
        WriterKey { signer: Signer::new(Secret::new(seed)), ..self.new_writer(name) }
    }

    /// To wrap it once more.
    pub fn master(&self) -> &MasterKey {
        &self.opener.master
    }
}

/// Reads what any writer of the repository wrote.
#[derive(Debug)]
pub struct Opener {
    public: PublicKeys,
    recipient: RecipientSecret,
    master: MasterKey,
}

impl Opener {
    pub fn public(&self) -> &PublicKeys {
        &self.public
    }

    /// The keys of any domain of the repository.
    pub fn domain(&self, id: DomainId) -> Domain {
        self.master.domain(&self.public.repository, id)
    }

    /// The domain of a writer of that name: what is in it can be of no other machine.
    pub fn domain_of(&self, name: &str) -> DomainId {
        let (repository, name) = (&self.public.repository, blake3::hash(name.as_bytes()));
        let id = self.master.0.derive("rempart 2026 writer's domain id", &[&repository.0, name.as_bytes()]);
        DomainId(id.bytes()[..16].try_into().expect("32 bytes have a first half"))
    }

    /// Opens a box; `None` if it was not closed for this repository, purpose and context, or was changed since.
    pub fn open(&self, purpose: BoxPurpose, context: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        self.recipient.open(&self.public.repository, purpose, context, sealed)
    }
}

/// The machine that has a writer's key: a name that is safe to print, and to be a file's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriterName(String);

impl WriterName {
    /// Bytes, at most.
    pub const LONGEST: usize = 64;

    /// `None` if it is too long, or has characters that mean something elsewhere.
    pub fn new(name: &str) -> Option<WriterName> {
        let fits = |c: char| !c.is_control() && !c.is_whitespace() && !matches!(c, '/' | '@');
        let is_name = (1..=Self::LONGEST).contains(&name.len())
            && !name.starts_with(['.', '-'])
            && name.chars().all(fits);
        is_name.then(|| WriterName(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Adds to a repository and reads nothing back but its own index.
///
/// There is no way from it to an [`Opener`]:
///
/// ```compile_fail,E0599
/// fn read(key: &rempart_repository::WriterKey) {
///     key.opener();
/// }
/// ```
#[derive(Debug)]
pub struct WriterKey {
    pub(super) public: PublicKeys,
    pub(super) name: Option<WriterName>,
    pub(super) domain: Domain,
    pub(super) signer: Signer,
}

impl WriterKey {
    pub fn public(&self) -> &PublicKeys {
        &self.public
    }

    /// The machine whose restore points it may add; the owner's own adds those of any.
    pub fn name(&self) -> Option<&WriterName> {
        self.name.as_ref()
    }

    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    pub fn signer(&self) -> &Signer {
        &self.signer
    }

    /// Closes a box that only an [`Opener`] opens, given the same `context`.
    pub fn seal(&self, purpose: BoxPurpose, context: &[u8], plain: &[u8]) -> Vec<u8> {
        self.public.recipient.seal(&self.public.repository, purpose, context, plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPOSITORY: RepositoryId = RepositoryId([1; 16]);

    fn name(name: &str) -> WriterName {
        WriterName::new(name).expect("a name")
    }

    #[test]
    fn what_leads_elsewhere_or_writes_on_terminals_is_no_name() {
        for bad in ["", ".", "..", ".web", "-x", "a/b", "a@7", "a b", "a\nb", "\u{1b}[2J", &"a".repeat(65)] {
            assert_eq!(WriterName::new(bad), None, "{bad:?}");
        }
        for good in ["web", "web-1.example", "büro", &"a".repeat(64)] {
            assert_eq!(name(good).as_str(), good);
        }
    }

    #[test]
    fn only_the_master_key_of_the_repository_opens_a_box() {
        let ring = KeyRing::new(REPOSITORY, MasterKey::new([2; 32]));
        let agent = ring.new_writer(name("web"));
        let sealed = agent.seal(BoxPurpose::Commit, b"vm", b"secret");
        let opens = |ring: &KeyRing, purpose, context: &[u8], sealed: &[u8]| {
            ring.opener().open(purpose, context, sealed).map(|plain| plain.to_vec())
        };
        assert_eq!(opens(&ring, BoxPurpose::Commit, b"vm", &sealed).as_deref(), Some(&b"secret"[..]));
        assert_eq!(opens(&ring, BoxPurpose::PackSecret, b"vm", &sealed), None);
        assert_eq!(opens(&ring, BoxPurpose::Commit, b"wm", &sealed), None);
        let again = KeyRing::new(REPOSITORY, MasterKey::new([2; 32]));
        assert!(opens(&again, BoxPurpose::Commit, b"vm", &sealed).is_some());
        for (repository, master) in [([1; 16], [3; 32]), ([9; 16], [2; 32])] {
            let other = KeyRing::new(RepositoryId(repository), MasterKey::new(master));
            assert_eq!(opens(&other, BoxPurpose::Commit, b"vm", &sealed), None);
        }
        for bit in 0..sealed.len() * 8 {
            let mut changed = sealed.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            // X25519 ignores the highest bit of a point; HPKE mixes the point as it stands into the key.
            assert_eq!(opens(&ring, BoxPurpose::Commit, b"vm", &changed), None, "{bit}");
        }
        for length in 0..sealed.len() {
            assert_eq!(opens(&ring, BoxPurpose::Commit, b"vm", &sealed[..length]), None);
        }
    }

    #[test]
    fn an_agent_does_not_find_the_chunks_of_others() {
        let ring = KeyRing::new(REPOSITORY, MasterKey::new([2; 32]));
        let (one, two) = (ring.new_writer(name("one")), ring.new_writer(name("two")));
        let ids = [ring.writer(), &one, &two].map(|key| key.domain().chunk_id(b"block"));
        assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
        let indexes = [ring.writer(), &one, &two].map(|key| *key.domain().index().bytes());
        assert!(indexes[0] != indexes[1] && indexes[1] != indexes[2] && indexes[0] != indexes[2]);
        // The owner can check them all.
        assert_eq!(ring.opener().domain(one.domain().id()).chunk_id(b"block"), ids[1]);
        assert_ne!(one.signer().id(), ring.maintenance().id());
        assert_ne!(one.domain().node_id(b"block"), ids[1], "a chunk never passes for a node");
        // A new key for the same machine finds what the old one stored.
        let again = ring.new_writer(name("one"));
        assert_eq!((again.domain().id(), again.domain().chunk_id(b"block")), (one.domain().id(), ids[1]));
        assert_ne!(again.signer().id(), one.signer().id());
    }

    #[test]
    fn signatures() {
        let ring = KeyRing::new(REPOSITORY, MasterKey::new([2; 32]));
        let mut signature = ring.maintenance().sign(b"forget");
        assert!(ring.public().maintenance.verify(b"forget", &signature));
        assert!(!ring.public().maintenance.verify(b"forge", &signature));
        assert!(!ring.new_writer(name("web")).signer().verifier().verify(b"forget", &signature));
        signature[3] ^= 1;
        assert!(!ring.public().maintenance.verify(b"forget", &signature));
    }

    #[test]
    fn nothing_secret_is_printed() {
        let ring = KeyRing::new(REPOSITORY, MasterKey::new([0xa7; 32]));
        let printed = format!("{ring:?} {:?}", ring.new_writer(name("web")));
        assert!(!printed.contains("a7a7") && !printed.contains("167, 167"), "{printed}");
        let seed = ring.maintenance().seed().bytes();
        assert!(!printed.contains(&format!("{seed:?}")));
    }
}

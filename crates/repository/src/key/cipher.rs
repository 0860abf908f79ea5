//! Authenticated encryption under a key of its own, with numbers that never repeat as nonces.

use super::Secret;
use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use std::fmt;

/// Bytes that sealing adds.
pub(crate) const TAG: usize = 16;

/// How a pack or a segment is encrypted. Whoever writes it chooses; it stands in its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cipher {
    Aes256Gcm,
    /// The key is used for one object only, so the longer nonces of XChaCha20 would buy nothing.
    ChaCha20Poly1305,
}

impl Cipher {
    /// The faster one on this machine.
    pub fn preferred() -> Cipher {
        #[cfg(target_arch = "x86_64")]
        let has_aes =
            std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
        #[cfg(target_arch = "aarch64")]
        let has_aes = std::arch::is_aarch64_feature_detected!("aes");
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let has_aes = false;
        if has_aes { Cipher::Aes256Gcm } else { Cipher::ChaCha20Poly1305 }
    }

    pub(crate) fn code(self) -> u8 {
        match self {
            Cipher::Aes256Gcm => 1,
            Cipher::ChaCha20Poly1305 => 2,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Cipher> {
        match code {
            1 => Some(Cipher::Aes256Gcm),
            2 => Some(Cipher::ChaCha20Poly1305),
            _ => None,
        }
    }
}

/// A number of this key's use, never used twice for sealing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ordinal {
    pub number: u32,
    /// Keeps apart what is numbered on its own.
    pub space: u8,
}

impl Ordinal {
    fn nonce(self) -> Nonce {
        let mut bytes = [0; NONCE_LEN];
        bytes[..4].copy_from_slice(&self.number.to_le_bytes());
        bytes[4] = self.space;
        Nonce::assume_unique_for_key(bytes)
    }
}

/// A key that is ready for use. Made in about a microsecond, and some hundred bytes large.
pub(crate) struct CipherKey(LessSafeKey);

impl CipherKey {
    pub fn new(cipher: Cipher, secret: &Secret) -> CipherKey {
        let algorithm = match cipher {
            Cipher::Aes256Gcm => &AES_256_GCM,
            Cipher::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        };
        let key = UnboundKey::new(algorithm, secret.bytes()).expect("both take keys of 32 bytes");
        CipherKey(LessSafeKey::new(key))
    }

    /// Encrypts what all but the last [`TAG`] bytes hold, which take the tag.
    pub fn seal_in_place(&self, ordinal: Ordinal, context: &[u8], bytes: &mut [u8]) {
        let (plain, tag) = bytes.split_last_chunk_mut::<TAG>().expect("there is room for the tag");
        let made = self.0.seal_in_place_separate_tag(ordinal.nonce(), Aad::from(context), plain);
        tag.copy_from_slice(made.expect("sealing so little cannot fail").as_ref());
    }

    /// Encrypts `plain` into `sealed`, which is longer by [`TAG`].
    pub fn seal_into(&self, ordinal: Ordinal, context: &[u8], plain: &[u8], sealed: &mut [u8]) {
        let (out, tag) = sealed.split_last_chunk_mut::<TAG>().expect("there is room for the tag");
        self.0
            .seal_out_of_place_scatter(ordinal.nonce(), Aad::from(context), plain, out, &[], tag)
            .expect("the lengths agree");
    }

    /// Decrypts in place; `None` if one bit of the bytes, the context or the number is another.
    pub fn open_in_place<'a>(
        &self,
        ordinal: Ordinal,
        context: &[u8],
        sealed: &'a mut [u8],
    ) -> Option<&'a mut [u8]> {
        self.0.open_in_place(ordinal.nonce(), Aad::from(context), sealed).ok()
    }

    /// Decrypts into `plain`, which is shorter by [`TAG`]; its content is of no worth if that fails.
    pub fn open_into(&self, ordinal: Ordinal, context: &[u8], sealed: &[u8], plain: &mut [u8]) -> Option<()> {
        let (sealed, tag) = sealed.split_last_chunk::<TAG>()?;
        self.0.open_separate_gather(ordinal.nonce(), Aad::from(context), sealed, tag, plain).ok()
    }
}

impl fmt::Debug for CipherKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CipherKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_sealing_are_one() {
        for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
            assert_eq!(Cipher::from_code(cipher.code()), Some(cipher));
            let key = CipherKey::new(cipher, &Secret::new([3; 32]));
            let ordinal = Ordinal { number: 7, space: 1 };
            let mut in_place = [9; 100];
            key.seal_in_place(ordinal, b"context", &mut in_place);
            let mut into = [0; 100];
            key.seal_into(ordinal, b"context", &[9; 84], &mut into);
            assert_eq!(in_place, into);

            let mut plain = [0; 84];
            assert!(key.open_into(ordinal, b"context", &into, &mut plain).is_some());
            assert_eq!(plain, [9; 84]);
            for wrong in [Ordinal { number: 8, space: 1 }, Ordinal { number: 7, space: 0 }] {
                assert!(key.open_into(wrong, b"context", &into, &mut plain).is_none());
            }
            assert!(key.open_into(ordinal, b"Context", &into, &mut plain).is_none());
            assert!(key.open_into(ordinal, b"context", &into[..8], &mut plain).is_none());
            assert_eq!(key.open_in_place(ordinal, b"context", &mut in_place).expect("whole"), [9; 84]);
        }
    }
}

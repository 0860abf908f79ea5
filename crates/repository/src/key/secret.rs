//! Secrets, random numbers and what is derived from secrets.

use std::fmt;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Random bytes of the operating system's generator.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system's random generator works");
    bytes
}

/// 32 bytes that must not be seen. Erased when dropped, and never printed.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub(crate) struct Secret([u8; 32]);

impl Secret {
    pub fn new(bytes: [u8; 32]) -> Secret {
        Secret(bytes)
    }

    pub fn random() -> Secret {
        Secret(random())
    }

    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The secret for one purpose. `context` names the purpose and is written nowhere else; `parts` must have fixed
    /// lengths, so that no two lists of them are the same bytes.
    pub fn derive(&self, context: &'static str, parts: &[&[u8]]) -> Secret {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        hasher.update(&self.0);
        for part in parts {
            hasher.update(part);
        }
        let secret = Secret(*hasher.finalize().as_bytes());
        hasher.zeroize();
        secret
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

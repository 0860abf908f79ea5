//! Whether KVM really runs a guest here.
//!
//! `/dev/kvm` may open and its guests still not run (nested hosts, half-emulated CPUs), so the only test that
//! counts is a guest that ran.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    Kvm,
    /// Emulation: correct, and many times slower.
    Tcg,
}

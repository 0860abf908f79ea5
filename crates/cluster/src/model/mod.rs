//! Exhaustive check.

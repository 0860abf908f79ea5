//! Promises of the registers.

mod adapters;
mod crash;
mod recovery;
mod support;
mod tls;
mod witness;

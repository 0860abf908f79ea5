//! Promises of the transport, on real sockets of the loopback interface.

mod certificates;
mod connections;
mod decoder;
mod refusals;
mod support;
mod tokens;

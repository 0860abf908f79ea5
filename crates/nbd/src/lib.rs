//! The NBD protocol: the server's and the client's end of a connection, on one codec.
//!
//! - [`server::Session`]: one client's connection to a server, without the connection; [`server::Readers`]: the
//!   connections of a read-only server.
//! - [`client::Client`]: a connection to a server, with pipelining and deadlines; [`client::Codec`] is the
//!   same without the connection.
//!
//! Written from the protocol's specification, `doc/proto.md` of NetworkBlockDevice/nbd with its extended
//! headers. Only the fixed newstyle handshake is spoken.

pub mod client;
mod code;
mod export;
pub mod fuzz;
mod header;
mod output;
pub mod poller;
pub mod protocol;
mod receive_buffer;
pub mod server;
mod wire;

pub use code::ErrorCode;
pub use export::{BlockSizes, Export, ExportError, ExportList};
pub use header::HeaderStyle;
pub use protocol::{BASE_ALLOCATION, STATE_HOLE, STATE_ZERO};
pub use server::ContextIndex;

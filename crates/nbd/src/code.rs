use std::fmt;

/// Why a request failed, in the numbers the protocol allows on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The export is read-only.
    NotPermitted,
    /// The device failed.
    Io,
    NoMemory,
    /// The request breaks a rule: alignment, bounds of a read, flags.
    Invalid,
    /// A write past the end, or a full device.
    NoSpace,
    /// Longer than the server takes in one request.
    TooLarge,
    /// A fast zero that would not be fast.
    NotSupported,
    /// The server is going away.
    ShuttingDown,
}

impl ErrorCode {
    /// The number on the wire.
    pub fn to_wire(self) -> u32 {
        match self {
            ErrorCode::NotPermitted => 1,
            ErrorCode::Io => 5,
            ErrorCode::NoMemory => 12,
            ErrorCode::Invalid => 22,
            ErrorCode::NoSpace => 28,
            ErrorCode::TooLarge => 75,
            ErrorCode::NotSupported => 95,
            ErrorCode::ShuttingDown => 108,
        }
    }

    /// A number from the wire; one the specification does not list reads as `Invalid`, as it asks.
    pub fn from_wire(number: u32) -> ErrorCode {
        match number {
            1 => ErrorCode::NotPermitted,
            5 => ErrorCode::Io,
            12 => ErrorCode::NoMemory,
            28 => ErrorCode::NoSpace,
            75 => ErrorCode::TooLarge,
            95 => ErrorCode::NotSupported,
            108 => ErrorCode::ShuttingDown,
            _ => ErrorCode::Invalid,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorCode::NotPermitted => "operation not permitted",
            ErrorCode::Io => "input/output error",
            ErrorCode::NoMemory => "out of memory",
            ErrorCode::Invalid => "invalid request",
            ErrorCode::NoSpace => "no space left on device",
            ErrorCode::TooLarge => "request too large",
            ErrorCode::NotSupported => "operation not supported",
            ErrorCode::ShuttingDown => "server is shutting down",
        })
    }
}

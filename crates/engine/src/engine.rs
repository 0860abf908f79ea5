//! The composition.

use crate::{Action, Bytes, DiskRange, GuestError, Input, OpenError, Params, Status, Token, WriteBuffer};
use rempart_types::{DiskIndex, MonotonicTime, WallTime};

/// One replica of one group.
#[derive(Debug)]
pub struct Engine {
    #[expect(dead_code)]
    params: Params,
}

impl Engine {
    /// Recovers the store and starts. Nothing is served yet; `out` holds the first actions.
    pub fn open<D: crate::pending::Disk>(
        _disk: &mut D,
        _params: Params,
        _now: MonotonicTime,
        _out: &mut Vec<Action>,
    ) -> Result<Engine, OpenError> {
        todo!()
    }

    pub fn handle(&mut self, _input: Input, _now: MonotonicTime, _out: &mut Vec<Action>) {
        todo!()
    }

    /// Everything that is ready was handed in. `wall` is written into the batch.
    pub fn end_turn(&mut self, _now: MonotonicTime, _wall: WallTime, _out: &mut Vec<Action>) {
        todo!()
    }

    pub fn next_wake(&self) -> Option<MonotonicTime> {
        todo!()
    }

    /// The node should stop reading guest requests while this is false: the log has outrun the image.
    pub fn accepts_writes(&self) -> bool {
        todo!()
    }

    /// Reads. Like every guest call, this needs no time and no list of actions: what follows from it comes out of
    /// the next `end_turn`.
    pub fn read(&mut self, _token: Token, _range: DiskRange) {
        todo!()
    }

    /// Writes; the payload is copied once, now. Writes take their places in the log in the order of these calls.
    pub fn write(&mut self, _token: Token, _disk: DiskIndex, _offset: u64, _payload: &[u8], _fua: bool) {
        todo!()
    }

    /// A buffer for a large write, to be filled by the caller while other requests go on. The write takes its
    /// place in the log when `write_buffer` is called, not now.
    pub fn reserve(&self, _length: usize) -> Result<WriteBuffer, GuestError> {
        todo!()
    }

    /// Writes what the buffer holds, without a copy.
    pub fn write_buffer(
        &mut self,
        _token: Token,
        _disk: DiskIndex,
        _offset: u64,
        _buffer: WriteBuffer,
        _fua: bool,
    ) {
        todo!()
    }

    /// Makes the range read as zeroes. `may_unmap`: its space may be given back.
    pub fn write_zeroes(&mut self, _token: Token, _range: DiskRange, _may_unmap: bool, _fua: bool) {
        todo!()
    }

    /// Gives the range's space back; it reads as zeroes.
    pub fn discard(&mut self, _token: Token, _range: DiskRange, _fua: bool) {
        todo!()
    }

    /// Done when everything acknowledged before this call is durable on every member.
    pub fn flush(&mut self, _token: Token) {
        todo!()
    }

    /// Forgets what a closed connection of the guest still has under way: reads are not answered any more, and
    /// the call returns the writes that are still on their way into the log. A successor of that connection is
    /// served only when all of them have been replied to.
    pub fn abandon(&mut self, _tokens: &[Token]) -> Vec<Token> {
        todo!()
    }

    /// Sizes of the disks, by index.
    pub fn disk_sizes(&self) -> &[u64] {
        todo!()
    }

    /// The latest definition of the virtual machine in the log of this replica.
    pub fn config(&self) -> Option<&Bytes> {
        todo!()
    }

    pub fn status(&self, _now: MonotonicTime) -> Status {
        todo!()
    }
}

//! Requests that wait for their reply.

use super::ContextIndex;

/// Names one request of one session until it is answered.
///
/// It is not the client's cookie: a client may use one cookie twice, a session never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId {
    slot: u32,
    generation: u32,
}

/// What a reply needs to know of its request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read {
        dont_fragment: bool,
    },
    Write,
    /// A bit for each context asked for.
    BlockStatus {
        contexts: u32,
        one: bool,
    },
    Other,
}

pub(super) fn context_bit(context: ContextIndex) -> u32 {
    1 << context
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    waiting: Option<Waiting>,
}

#[derive(Debug, Default)]
pub(super) struct InFlight {
    slots: Vec<Slot>,
    free: Vec<u32>,
    count: usize,
    bytes: u64,
}

impl InFlight {
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Bytes of data that the waiting requests brought or will bring.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn insert(&mut self, waiting: Waiting) -> RequestId {
        self.count += 1;
        self.bytes += waiting.data_bytes();
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, waiting: None });
            u32::try_from(self.slots.len() - 1).expect("requests in flight are bounded")
        });
        let entry = &mut self.slots[slot as usize];
        entry.waiting = Some(waiting);
        RequestId { slot, generation: entry.generation }
    }

    pub(super) fn get(&self, id: RequestId) -> Waiting {
        let slot = self.slots.get(id.slot as usize).filter(|slot| slot.generation == id.generation);
        slot.and_then(|slot| slot.waiting).expect("a request is answered once, on the session it came from")
    }

    pub(super) fn remove(&mut self, id: RequestId) -> Waiting {
        let waiting = self.get(id);
        let slot = &mut self.slots[id.slot as usize];
        slot.waiting = None;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(id.slot);
        self.count -= 1;
        self.bytes -= waiting.data_bytes();
        waiting
    }
}

impl Waiting {
    fn data_bytes(&self) -> u64 {
        match self.kind {
            Kind::Read { .. } | Kind::Write => self.length,
            Kind::BlockStatus { .. } | Kind::Other => 0,
        }
    }
}

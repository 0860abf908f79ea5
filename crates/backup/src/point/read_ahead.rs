//! Reading what will be asked for next, on threads of its own.

use super::cache::Shelf;
use rempart_repository::{FAN_OUT, Tree};
use std::ops::Range;
use std::sync::{Arc, Mutex, mpsc};

const THREADS: usize = 2;
/// Orders that wait. What comes when there are more is not read ahead: everybody reads for himself then.
const ORDERS: usize = 16;

#[derive(Debug)]
struct Order {
    tree: Tree,
    chunks: Range<u64>,
}

/// The way to the threads. They end when it is dropped, once what they read is here: nobody waits for that.
#[derive(Debug)]
pub(super) struct ReadAhead {
    orders: mpsc::SyncSender<Order>,
    most: u64,
}

impl ReadAhead {
    /// For at most `most` chunks an order; with none there are no threads.
    pub fn start(shelf: Arc<Shelf>, most: u64) -> ReadAhead {
        let (sender, receiver) = mpsc::sync_channel(ORDERS);
        let receiver = Arc::new(Mutex::new(receiver));
        let thread = |_: &usize| {
            let (shelf, receiver) = (shelf.clone(), receiver.clone());
            let spawned = std::thread::Builder::new().name("read-ahead".into()).spawn(move || {
                loop {
                    let order = receiver.lock().expect("no holder panics").recv();
                    let Ok(Order { tree, chunks }) = order else { return };
                    read(&shelf, tree, chunks);
                }
            });
            spawned.is_ok()
        };
        let started = (0..THREADS).filter(|_| most > 0).filter(thread).count();
        ReadAhead { orders: sender, most: if started == 0 { 0 } else { most } }
    }

    pub fn most(&self) -> u64 {
        self.most
    }

    pub fn order(&self, tree: Tree, chunks: Range<u64>) {
        let _ = self.orders.try_send(Order { tree, chunks });
    }
}

/// What cannot be read is left to who asks for it.
fn read(shelf: &Shelf, tree: Tree, chunks: Range<u64>) {
    let fan_out = FAN_OUT as u64;
    let mut at = chunks.start;
    while at < chunks.end {
        let (leaf, first) = (at / fan_out, (at % fan_out) as usize);
        let end = chunks.end.min((leaf + 1) * fan_out);
        if let Ok(ids) = shelf.leaf(tree, leaf) {
            shelf.fetch(&ids[first..first + (end - at) as usize], |_, _| {});
        }
        at = end;
    }
}

//! Reading what will be asked for next, on threads of its own.

use super::cache::Shelf;
use rempart_repository::{FAN_OUT, Tree};
use std::ops::Range;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

const THREADS: usize = 2;
/// Orders that wait. What comes when there are more is not read ahead: everybody reads for himself then.
const ORDERS: usize = 16;

#[derive(Debug)]
struct Order {
    tree: Tree,
    chunks: Range<u64>,
}

/// The threads, and the way to them.
#[derive(Debug)]
pub(super) struct ReadAhead {
    /// Dropped first: that ends the threads.
    orders: Option<mpsc::SyncSender<Order>>,
    threads: Vec<JoinHandle<()>>,
    most: u64,
}

impl ReadAhead {
    /// For at most `most` chunks an order; with none there are no threads.
    pub fn start(shelf: Arc<Shelf>, most: u64) -> ReadAhead {
        let (sender, receiver) = mpsc::sync_channel(ORDERS);
        let receiver = Arc::new(Mutex::new(receiver));
        let thread = |_| {
            let (shelf, receiver) = (shelf.clone(), receiver.clone());
            let spawned = std::thread::Builder::new().name("read-ahead".into()).spawn(move || {
                loop {
                    let order = receiver.lock().expect("no holder panics").recv();
                    let Ok(Order { tree, chunks }) = order else { return };
                    read(&shelf, tree, chunks);
                }
            });
            spawned.ok()
        };
        let threads: Vec<JoinHandle<()>> = (0..THREADS).filter(|_| most > 0).filter_map(thread).collect();
        let most = if threads.is_empty() { 0 } else { most };
        ReadAhead { orders: Some(sender), threads, most }
    }

    pub fn most(&self) -> u64 {
        self.most
    }

    pub fn order(&self, tree: Tree, chunks: Range<u64>) {
        if let Some(orders) = &self.orders {
            let _ = orders.try_send(Order { tree, chunks });
        }
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

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.orders.take();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

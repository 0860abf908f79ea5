//! When the store asks for write-back of what it writes to the journal.

mod common;

use rempart_store::simulated::SimulatedDisk;
use rempart_store::{
    BatchBuilder, BufferMut, IoClass, IoCompletion, IoOp, IoOutput, OpenOptions, Output, Store,
};
use rempart_types::{DiskIndex, Term, WallTime};

/// Completes every command as if the disk took no time; how many were eager journal writes.
fn complete_all(store: &mut Store, out: &mut Output) -> usize {
    let mut eager = 0;
    while !out.commands.is_empty() {
        for command in std::mem::take(&mut out.commands) {
            eager += usize::from(command.class == IoClass::JournalWrite { eager: true });
            let output = match command.op {
                IoOp::Read { len, .. } => IoOutput::Data(BufferMut::zeroed(len).freeze()),
                _ => IoOutput::Done,
            };
            store.complete(IoCompletion { id: command.id, result: Ok(output) }, out);
        }
    }
    out.events.clear();
    eager
}

/// It went on for ever after the last flush: each small write then waited for the device to be told of it.
#[test]
fn eager_write_back_begins_and_ends_with_the_flushes() {
    let mut disk = SimulatedDisk::new();
    let mut params = common::params();
    params.segment_size = 8 << 20;
    Store::format(&mut disk, &params).expect("formats");
    let (mut store, _) = Store::open(&mut disk, &OpenOptions::default()).expect("opens");
    let mut out = Output::default();
    let mut builder = BatchBuilder::new(store.max_batch_len());
    let mut write = |store: &mut Store, out: &mut Output| {
        builder.write(DiskIndex(0), 0, &[7; 4096]);
        let batch = builder.seal(&store.next_place(Term::new(1, 0), WallTime(1)));
        store.append(&batch, out).expect("appends");
        complete_all(store, out)
    };
    // A write and a flush, again and again.
    for number in 0..100 {
        let eager = write(&mut store, &mut out);
        assert_eq!(eager, usize::from(number > 0), "write {number}");
        store.sync(&mut out);
        complete_all(&mut store, &mut out);
    }
    // Then only writes, 8 KiB of journal each.
    let eager: usize = (0..1000).map(|_| write(&mut store, &mut out)).sum();
    assert_eq!(eager, 64, "those of the first half MiB");
    // A flush after so much tells nothing of the next one.
    store.sync(&mut out);
    complete_all(&mut store, &mut out);
    assert_eq!(write(&mut store, &mut out), 0);
    store.sync(&mut out);
    complete_all(&mut store, &mut out);
    assert_eq!(write(&mut store, &mut out), 1, "flushes are frequent again");
}

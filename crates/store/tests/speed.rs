//! What the store itself costs per record, without any disk. Run with `--release -- --ignored --nocapture`.

mod common;

use rempart_store::simulated::SimulatedDisk;
use rempart_store::{BatchBuilder, IoCompletion, IoOp, IoOutput, Output, Store};
use rempart_types::{DiskIndex, Lsn, Term, WallTime};
use std::time::Duration;

/// This thread's own time: a busy machine counts less.
fn spent() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Completes every command at once, as if the disk took no time.
fn complete_all(store: &mut Store, out: &mut Output) {
    while !out.commands.is_empty() {
        for command in std::mem::take(&mut out.commands) {
            let output = match command.op {
                IoOp::Read { len, .. } => IoOutput::Data(rempart_store::BufferMut::zeroed(len).freeze()),
                _ => IoOutput::Done,
            };
            store.complete(IoCompletion { id: command.id, result: Ok(output) }, out);
        }
    }
    out.events.clear();
}

#[test]
#[ignore = "a measurement"]
fn time_per_record() {
    for per_batch in [1, 32] {
        let mut disk = SimulatedDisk::new();
        let mut params = common::params();
        params.segment_size = 8 << 20;
        params.disks[0].size = 128 << 20;
        Store::format(&mut disk, &params).expect("formats");
        let options = rempart_store::OpenOptions::default();
        let (mut store, _) = Store::open(&mut disk, &options).expect("opens");
        let mut out = Output::default();
        let mut builder = BatchBuilder::new(store.max_batch_len());
        let data = vec![7; 4096];
        let (batches, mut at) = (40_000 / per_batch, 1u64);
        let mut building = Duration::ZERO;
        let start = spent();
        for number in 0..batches {
            let before = spent();
            for _ in 0..per_batch {
                at = at.wrapping_mul(6364136223846793005).wrapping_add(1);
                builder.write(DiskIndex(0), (at >> 40) % (1 << 15) * 4096, &data);
            }
            let batch = builder.seal(&store.next_place(Term::new(1, 0), WallTime(1)));
            building += spent() - before;
            store.append(&batch, &mut out).expect("appends");
            complete_all(&mut store, &mut out);
            store.committed_is(batch.last());
            if number % 16 == 15 {
                store.sync(&mut out);
                complete_all(&mut store, &mut out);
                store.stable_is(store.durable(), &mut out);
                complete_all(&mut store, &mut out);
            }
        }
        let records = (batches * per_batch) as f64;
        let all = (spent() - start).as_nanos() as f64 / records;
        let building = building.as_nanos() as f64 / records;
        assert!(store.applied() > Lsn(0));
        eprintln!(
            "{per_batch} a batch: {all:.0} ns a record in all, {building:.0} of them copy, checksum and seal"
        );
    }
}

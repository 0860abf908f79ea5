//! The disk table, configuration records, existing images, several batches of changes to them.

mod common;

use common::{Change, World};
use rempart_store::simulated::SimulatedDisk;
use rempart_store::{
    AppendError, BatchBuilder, DiskEntry, FileId, FormatParams, OpenError, Refused, Slice, Store, StoreEvent,
    Token,
};
use rempart_types::{DiskIndex, ExtentIndex, Lsn, Term, WallTime};

fn changed(world: &mut World, token: u64) {
    world.drain();
    let seen = |event: &StoreEvent| matches!(event, StoreEvent::DisksChanged(Token(seen)) if *seen == token);
    assert!(world.events.iter().any(seen));
}

#[test]
fn disks_come_grow_and_go_and_the_table_survives() {
    let mut world = World::new(1);
    world.append(vec![Change::Write { disk: 0, offset: 0, data: vec![1; 4096] }]);
    let entry =
        DiskEntry { index: DiskIndex(5), size: 100 * 512, location: String::new(), base: DiskEntry::EMPTY };
    world.store.add_disk(Token(1), entry.clone(), &mut world.out).expect("adds");
    assert_eq!(world.store.remove_disk(Token(9), DiskIndex(0), &mut world.out), Err(Refused::State));
    changed(&mut world, 1);
    assert_eq!(world.store.add_disk(Token(9), entry, &mut world.out), Err(Refused::Name));

    let write = |world: &World, offset: u64| {
        let mut builder = BatchBuilder::new(world.store.max_batch_len());
        builder.write(DiskIndex(5), offset, &[9; 512]);
        builder.seal(&world.store.next_place(Term::new(1, 0), WallTime(1)))
    };
    let beyond = write(&world, 100 * 512);
    assert!(matches!(world.store.append(&beyond, &mut world.out), Err(AppendError::OutOfRange { .. })));
    assert_eq!(
        world.store.resize_disk(Token(9), DiskIndex(5), 512, &mut world.out),
        Err(Refused::OutOfRange)
    );
    world.store.resize_disk(Token(2), DiskIndex(5), 200 * 65536, &mut world.out).expect("grows");
    changed(&mut world, 2);
    let beyond = write(&world, 199 * 65536);
    world.store.append(&beyond, &mut world.out).expect("there is room now");
    world.model.log.push((1, Change::Nothing));
    world.model.ends.insert(2);
    world.make_all_stable();
    let (list, next) = world.store.changed_since(DiskIndex(5), Lsn(1), ExtentIndex(0), 10);
    assert_eq!((list, next), (vec![(ExtentIndex(199), Lsn(2))], None));
    world.store.remove_disk(Token(3), DiskIndex(0), &mut world.out).expect("removes");
    changed(&mut world, 3);
    let (store, recovered) = common::open(&mut world.disk).expect("opens");
    let table: Vec<(u16, u64)> = recovered.disks.iter().map(|disk| (disk.index.0, disk.size)).collect();
    assert_eq!(table, [(1, common::SIZES[1]), (5, 200 * 65536)]);
    assert_eq!(recovered.log_end.lsn, Lsn(2));
    assert_eq!(store.changed_since(DiskIndex(0), Lsn(0), ExtentIndex(0), 10), (Vec::new(), None));
    assert_eq!(world.disk.content(FileId::Image(DiskIndex(5))).map(|bytes| bytes.len()), Some(200 * 65536));
}

#[test]
fn the_last_applied_definition_survives_its_journal() {
    let mut world = World::new(1);
    for version in 1..=5u8 {
        let mut builder = BatchBuilder::new(world.store.max_batch_len());
        builder.config(&[version; 900]);
        let batch = builder.seal(&world.store.next_place(Term::new(1, 0), WallTime(1)));
        world.store.append(&batch, &mut world.out).expect("appends");
        world.model.log.push((1, Change::Nothing));
        world.model.ends.insert(u64::from(version));
        assert_eq!(
            world.store.config().map(|(lsn, _)| lsn),
            (version > 1).then(|| Lsn(u64::from(version) - 1))
        );
        world.make_all_stable();
    }
    for _ in 0..40 {
        world.append_random();
        world.make_all_stable();
    }
    assert!(world.store.oldest_available_lsn() > Lsn(5));
    let recovered = world.crash(true);
    assert_eq!(recovered.config, Some((Lsn(5), Slice::copy_of(&[5; 900]))));
    assert_eq!(world.store.config().map(|(lsn, _)| lsn), Some(Lsn(5)));
}

#[test]
fn an_existing_image_is_kept_and_counts_as_changed() {
    let mut disk = SimulatedDisk::new();
    let image = FileId::Image(DiskIndex(0));
    disk.overwrite(image, 0, &[7; 3 * 65536]);
    let entry = |base| DiskEntry { index: DiskIndex(0), size: 3 * 65536, location: String::new(), base };
    let params = |base| FormatParams {
        segment_size: common::SEGMENT,
        ..FormatParams::new(common::GROUP, vec![entry(base)])
    };
    let refused = Store::format(&mut disk, &params(DiskEntry::EMPTY));
    assert!(matches!(refused, Err(OpenError::ImageExists(DiskIndex(0)))), "{refused:?}");
    Store::format(&mut disk, &params(DiskEntry::EXISTING)).expect("adopts");
    let (store, _) = common::open(&mut disk).expect("opens");
    assert_eq!(store.changed_since(DiskIndex(0), Lsn(0), ExtentIndex(0), 10).0.len(), 3);
    assert!(!store.is_untouched(DiskIndex(0), ExtentIndex(1)));
    assert_eq!(disk.content(image), Some(vec![7; 3 * 65536]));
}

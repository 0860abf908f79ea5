//! What is left out is restored as zeroes, and nothing else is.

use crate::lab::{CHUNK, Lab};
use rand::Rng;
use rempart_backup::ChunkSet;
use rempart_repository::{Excluded, PointDisk};

const CHUNKS: u64 = 300;
const SIZE: u64 = (CHUNKS - 1) * CHUNK + 777;

fn some_chunks(lab: &mut Lab) -> Vec<Excluded> {
    let mut left_out: Vec<Excluded> = Vec::new();
    let mut chunk = lab.random.random_range(0..40);
    while chunk < CHUNKS {
        let chunks = lab.random.random_range(1..30).min(CHUNKS - chunk);
        let (offset, end) = (chunk * CHUNK, ((chunk + chunks) * CHUNK).min(SIZE));
        left_out.push(Excluded { offset, len: end - offset, reason: "swap".to_owned() });
        chunk += chunks + lab.random.random_range(1..40);
    }
    left_out
}

fn expected(lab: &Lab, left_out: &[Excluded]) -> Vec<u8> {
    let mut disk = std::fs::read(lab.disk()).expect("reads");
    for Excluded { offset, len, .. } in left_out {
        disk[*offset as usize..(offset + len) as usize].fill(0);
    }
    disk
}

/// Exclusions come and go between backups that read only what changed: what leaves one is read although the map says nothing
/// of it, what enters one becomes zeroes, what stays in one is not audited.
#[test]
fn exclusions_may_change_from_backup_to_backup() {
    let mut lab = Lab::new();
    lab.make_disk(SIZE);
    let mut left_out = some_chunks(&mut lab);
    let mut last: (u64, PointDisk) = lab.back_up_without(None, None, &left_out).expect("backs up");
    let mut points = vec![(last.0, expected(&lab, &left_out))];
    for step in 0..12 {
        let changed = lab.change(20);
        if step % 3 != 2 {
            left_out = some_chunks(&mut lab);
        }
        last = lab.back_up_without(Some(&last), Some(changed), &left_out).expect("backs up");
        assert_eq!(last.1.how.full_because, None, "what is left out is no surprise: step {step}");
        assert_eq!(last.1.excluded, left_out);
        points.push((last.0, expected(&lab, &left_out)));
    }
    last = lab.back_up(Some(&last), Some(ChunkSet::none(SIZE, CHUNK))).expect("backs up");
    points.push((last.0, expected(&lab, &[])));
    for (root, disk) in points {
        assert!(lab.restore(root).expect("restores") == disk, "point {root}");
    }
}

//! Backups that are cut off, and a place that misbehaves.

use crate::lab::{Lab, PASSPHRASE};
use rempart_objects::testing::{Faulty, Rates};
use rempart_objects::{Memory, Objects};
use rempart_repository::Repository;
use std::sync::Arc;

const SIZE: u64 = 1 << 20;

/// A repository in memory, and the place that everything goes through.
struct Place {
    lab: Lab,
    memory: Arc<dyn Objects>,
    /// What the disk was when a backup of it was begun: of those that were made, and of those that may have been.
    contents: Vec<Vec<u8>>,
    /// Points whose making was told, and what they hold.
    made: Vec<(u64, Vec<u8>)>,
}

impl Place {
    fn new() -> Place {
        let memory: Arc<dyn Objects> = Arc::new(Memory::default());
        let mut lab = Lab::on(tempfile::tempdir().expect("a folder"), memory.clone());
        lab.make_disk(SIZE);
        let mut place = Place { lab, memory, contents: Vec::new(), made: Vec::new() };
        place.back_up().expect("nothing is in the way");
        place
    }

    /// From now on through that.
    fn go_through(&mut self, objects: Arc<dyn Objects>) -> Result<(), rempart_repository::Error> {
        let cache = self.lab.folder.path().join("cache");
        self.lab.repository = Arc::new(Repository::open(objects, &cache, PASSPHRASE)?);
        Ok(())
    }

    fn back_up(&mut self) -> Result<(), rempart_backup::BackupError> {
        self.lab.change(6);
        self.contents.push(self.lab.content());
        let (root, _) = self.lab.back_up(None, None)?;
        self.made.push((root, self.lab.content()));
        Ok(())
    }

    /// Points that were told of are what they were, and all others are of backups that were begun.
    fn examine(&mut self, context: &str) {
        self.go_through(self.memory.clone()).expect("opens");
        for (root, content) in &self.made {
            assert!(self.lab.restore(*root).expect("restores") == *content, "{context}: point {root}");
        }
        let log = self.lab.repository.log().expect("opens");
        for root in log.state().roots().keys() {
            let restored = self.lab.restore(*root).expect("restores");
            assert!(self.contents.contains(&restored), "{context}: point {root} was never anybody's disk");
        }
    }
}

/// Whatever call to the place is a backup's last.
#[test]
fn a_backup_that_ends_at_any_step_leaves_every_point_and_the_next_one_is_made() {
    let mut ended = 0;
    for calls in 0.. {
        let mut place = Place::new();
        let dying = Arc::new(Faulty::new(place.memory.clone(), 1, Rates::default()));
        dying.die_after(calls);
        let cut_off = match place.go_through(dying) {
            Ok(()) => place.back_up().is_err(),
            Err(_) => true,
        };
        place.examine(&format!("after {calls} calls"));
        if !cut_off {
            break;
        }
        ended += 1;
        place.back_up().expect("the next one is made");
        place.examine(&format!("after {calls} calls, and the next one"));
        assert!(calls < 200, "a backup of little takes few calls");
    }
    assert!(ended > 10, "{ended} steps");
}

/// Calls that are refused, lost, answered to nobody, or done later than it seemed.
#[test]
fn what_a_rough_place_takes_is_whole_or_is_not_there() {
    for seed in 0..3 {
        let mut place = Place::new();
        let rough = Arc::new(Faulty::new(place.memory.clone(), seed, Rates::rough()));
        let mut made = 0;
        for _ in 0..3 {
            if place.go_through(rough.clone()).is_ok() && place.back_up().is_ok() {
                made += 1;
            }
        }
        rough.set_rates(Rates::default());
        rough.land();
        place.examine(&format!("seed {seed}"));
        assert!(made > 0, "seed {seed}: nothing was backed up, although every call may be tried again");
        place.back_up().expect("the place is as it should be again");
    }
}

//! `backup`, `gc` and `copy` where the repository lies in a bucket of a real server.

use super::{Story, backup, collection, copy};
use crate::lab::moto;

/// Everything takes a server of one request at a time ten times as long as a directory.
const SLICE: usize = 3;

fn in_bucket(story: impl FnOnce() -> Story) -> Option<Story> {
    let server = moto()?;
    Some(Story { server: Some(server), slice: SLICE, ..story() })
}

#[test]
fn a_backup_into_a_bucket_that_is_killed_at_any_step_leaves_every_point_and_the_next_goes_on() {
    let Some(story) = in_bucket(backup::story) else { return };
    backup::play(&story);
}

#[test]
fn a_collection_in_a_bucket_that_is_killed_at_any_step_leaves_every_point_and_the_next_goes_on() {
    let Some(story) = in_bucket(collection::story) else { return };
    collection::play(&story);
}

#[test]
fn a_copy_into_a_bucket_that_is_killed_at_any_step_is_gone_on_with() {
    let Some(story) = in_bucket(copy::story) else { return };
    copy::play(&story);
}

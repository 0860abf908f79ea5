//! Checkers that find nothing prove nothing: each planted bug must be found. `cargo xtask sim --planted all` hunts
//! them all in the worlds of a campaign.

use rempart_sim::faults::Planted;
use rempart_sim::hunt::{in_row, in_worlds};

/// Far more worlds than each takes now (a stale register some 4,000, the others few): what changes a world must not make this test fail by chance.
const WORLDS: u64 = 8_000;

macro_rules! found {
    ($($test:ident: $bug:ident $(in $row:literal)?,)*) => {
        $(
            #[test]
            fn $test() {
                let found = found!(@hunt $bug $($row)?).expect("it is found");
                println!("after {}, seed {}: {}", found.after, found.seed, found.violation);
            }
        )*

        #[test]
        fn every_bug_has_its_test() {
            assert_eq!(vec![$(Planted::$bug),*], Planted::ALL);
        }
    };
    (@hunt $bug:ident) => { in_worlds(Planted::$bug, 0..WORLDS) };
    (@hunt $bug:ident $row:literal) => { in_row(Planted::$bug, $row, 0..20) };
}

found! {
    journal_sync_ignored: JournalSyncIgnored,
    image_sync_ignored: ImageSyncIgnored,
    superblock_sync_ignored: SuperblockSyncIgnored,
    map_sync_ignored: MapSyncIgnored,
    superblock_write_lost: SuperblockWriteLost,
    image_write_lost: ImageWriteLost,
    map_write_lost: MapWriteLost,
    journal_write_lost: JournalWriteLost,
    punch_ignored: PunchIgnored,
    guard_ignores_lease: GuardIgnoresLease in "daemon killed, not back",
    guard_sleeps: GuardSleeps in "daemon killed, not back",
    clock_beyond_drift: ClockBeyondDrift in "daemon killed, not back",
    stale_register: StaleRegister,
    swap_ignores_expectation: SwapIgnoresExpectation,
    register_forgets: RegisterForgets,
    amnesia_unnoticed: AmnesiaUnnoticed,
    old_sessions_kept: OldSessionsKept,
    messages_reordered: MessagesReordered,
    messages_lost: MessagesLost,
    write_answered_early: WriteAnsweredEarly,
    flush_answered_early: FlushAnsweredEarly,
    fua_ignored: FuaIgnored,
    kill_ignored: KillIgnored,
    reads_from_image: ReadsFromImage,
    discard_dropped: DiscardDropped,
    connection_not_drained: ConnectionNotDrained,
    change_forgotten: ChangeForgotten,
}

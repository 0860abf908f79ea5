//! What a witness counts.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters since the start, for a metrics page. Read them with [`Counters::each`].
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub(crate) $name: AtomicU64,)*
        }

        impl Counters {
            /// Name and value of each counter.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Values read.
    reads,
    /// Swaps that were stored.
    swaps_won,
    /// Swaps whose comparison failed.
    swaps_lost,
    /// Requests declined.
    refused,
    /// Reports of replicas.
    reports,
    /// Changes whose storage failed.
    storage_failures,
    /// Connections served.
    connections,
    /// Connections that were refused, or failed before they named a caller.
    connections_failed,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

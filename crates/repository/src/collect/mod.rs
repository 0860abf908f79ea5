//! Collection: what no backup requires any more is condemned, removed, and seen absent.
//!
//! [`collect`] does all of it in a repository; what backups reach is told by [`Reach`].
//!
//! Nobody is locked out meanwhile, and a collector may die at any moment: the log says where it was, and the next one goes on.
//!
//! | step | what makes it safe |
//! |---|---|
//! | `repack` | what is reached in packs of a domain that hold little else but waste is put anew there, and live, before those are condemned |
//! | [`condemn`](Collector::condemn) | planned behind state `n`, and right only as entry `n + 1`. A lost slot: the backups that came in between are followed, too; all of them if something that was to be kept was condemned |
//! | [`delete`](Collector::delete) | condemned is for good: no commit that needs it is valid after that, and its name is never used again. So at once, and as late as it may land |
//! | `gone` | only what was seen absent is forgotten |
//! | [`sweep`](Collector::sweep) | objects that no entry names: listed first, then the log is read. What is not live then, of a session that is over then, never will be |
//! | [`sweep_writers`](Collector::sweep_writers) | names of writers, in the same order: who registers a key puts its name within the same session before. Then nobody else may be about to |
//! | `merge` | small index segments of a domain are put anew as one, and live, before they are condemned |
//! | [`truncate`](Collector::truncate) | entries are removed once a checkpoint stands for them and a signed pointer leads to it |

mod collection;
mod collector;
mod domains;
mod kept;
mod marks;
mod merge;
mod pending;
mod reach;
mod repack;

pub use collection::{Collected, Collection, Outlook, collect, look};
pub use collector::{CollectError, Collector, Condemned, Follow, Removed};
pub use kept::Kept;
pub use reach::Reach;
pub use repack::Rewritten;

#[cfg(test)]
mod tests;

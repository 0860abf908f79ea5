//! What a set of replicas has in common.

use rempart_types::Lsn;

/// The highest number that every member reached; `None` of nobody, or while a member's is unknown.
pub(crate) fn reached_by_all(members: impl IntoIterator<Item = Option<Lsn>>) -> Option<Lsn> {
    let mut lowest = None;
    for member in members {
        let reached = member?;
        lowest = Some(lowest.map_or(reached, |lowest: Lsn| lowest.min(reached)));
    }
    lowest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, word for word: the largest n such that each member reached n.
    fn naive(members: &[Option<u64>]) -> Option<u64> {
        if members.is_empty() || members.contains(&None) {
            return None;
        }
        (0..=64).rev().find(|n| members.iter().all(|member| member.expect("checked") >= *n))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn reached_by_all_matches_its_definition(members in proptest::collection::vec(proptest::option::weighted(0.9, 0u64..64), 0..5)) {
            let found = reached_by_all(members.iter().map(|member| member.map(Lsn)));
            prop_assert_eq!(found, naive(&members).map(Lsn));
        }
    }
}

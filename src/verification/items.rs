//! How many chunks of a row a block takes at once, for the kernels that sweep rows in items.

/// Warps of a block, each with a chunk of its own.
pub(crate) const WARPS: u64 = 8;
/// Blocks that share a multiprocessor.
pub(crate) const BLOCKS_A_MULTIPROCESSOR: u64 = 3;

/// Clocks that an item takes beside its sweep, in which its block issues little: the request's parameters, the first
/// rows on their way, a barrier, the counter. And those in which a multiprocessor issues the instructions of a round, a
/// chunk for each warp of a block: 475 a warp, four at a time. Both from the machine code and latencies of an H200.
const ALONE: u64 = 4400;
const A_ROUND: u64 = WARPS * 475 / 4;
/// Larger items would be seldom better, and find out later that a request has stopped.
const MOST_ROUNDS: u64 = 4;

/// The rounds of an item for which the items are done first, with `items(rounds)` of them: few and long ones leave
/// multiprocessors without work at the end, many short ones cost their beginnings and ends. The results do not depend
/// on it.
pub(crate) fn rounds(multiprocessors: u64, items: impl Fn(u64) -> u64) -> u64 {
    let at_once = |blocks: u64, rounds: u64| (blocks * rounds * A_ROUND).max(ALONE + rounds * A_ROUND);
    let clocks = |rounds: u64| {
        let wave = multiprocessors * BLOCKS_A_MULTIPROCESSOR;
        let (waves, rest) = (items(rounds) / wave, items(rounds) % wave);
        let last = if rest > 0 { at_once(rest.div_ceil(multiprocessors), rounds) } else { 0 };
        waves * at_once(BLOCKS_A_MULTIPROCESSOR, rounds) + last
    };
    (1..=MOST_ROUNDS).min_by_key(|&rounds| (clocks(rounds), MOST_ROUNDS - rounds)).expect("there are some")
}

#[cfg(test)]
mod tests {
    use super::rounds;

    /// The items of `batch` requests of `drafts` pairs of rows and a row without a draft.
    fn chosen(batch: u64, drafts: u64, target: u64, draft: u64) -> u64 {
        rounds(132, |rounds| batch * (drafts * (target + draft).div_ceil(rounds * 8) + target.div_ceil(rounds * 8)))
    }

    #[test]
    fn few_chunks_are_spread_and_many_are_bundled() {
        assert_eq!(chosen(1, 4, 126, 126), 1);
        assert_eq!(chosen(64, 4, 126, 126), 4);
        assert_eq!(chosen(64, 4, 126, 0), 4);
        assert_eq!(chosen(256, 4, 256, 256), 4);
        assert_eq!(chosen(16, 4, 126, 126), 2);
        assert_eq!(chosen(0, 4, 126, 0), 4);
    }
}

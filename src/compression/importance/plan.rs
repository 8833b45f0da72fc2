//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::super::key_norms::plan::{
    MOST_ITEMS, MOST_TOKENS, check_sizes, keys_layout, lengths_layout, rows_layout, vectors_layout,
};
use super::super::places::Places;
use super::{Importance, Traffic};
use crate::device::DeviceInfo;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;

const MOST_MASKED: u64 = 1024;
const MOST_POOL: u32 = 63;
/// Query heads of a KV head, where all of them have to be looked at together.
const MOST_GROUPS: u64 = 16;
/// Keys that a block of the portable kernels takes at once: 8 warps of 32.
pub(super) const SPAN: u64 = 256;
/// Shared memory for queries, the same on every device.
const QUERY_BYTES: u64 = 96 << 10;
/// Queries are counted in columns of a product: 8.
const EIGHT: u64 = 8;

/// What the scores of a KV head's query heads become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Aggregation {
    /// The maximum of the logits, before the softmax (FlowCache, R-KV).
    #[default]
    MaxLogit,
    /// Probabilities added up (SnapKV, H2O); with [`Reduction::Mean`] their mean (kvpress).
    MeanProb,
    /// The maximum of the probabilities.
    MaxProb,
    /// Logits added up, and no softmax (ScaleKV); with [`Reduction::Mean`] their mean.
    Logit,
}

/// What the scores of all queries become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Reduction {
    /// The sum over queries, divided by their number; where query heads are added up, by theirs too.
    #[default]
    Mean,
    /// The sum.
    Sum,
}

/// What neighbours make of a score. Widths are odd, up to 63.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Pool {
    /// Nothing.
    #[default]
    None,
    /// The maximum of so many columns around each; columns beyond the ends count as -inf.
    Max(u32),
    /// Their average; columns beyond the ends count as 0, and are counted (PyTorch's `avg_pool1d` as it comes).
    Average(u32),
}

/// Which kernels score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ImportanceVariant {
    /// The faster ones for the shape and the device.
    #[default]
    Auto,
    /// `mma.sync`, sm_80 and newer.
    Portable,
    /// `wgmma`, sm_90.
    Hopper,
}

/// Describes a scoring; [`ImportanceBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct ImportanceBuilder<T> {
    heads: u64,
    groups: u64,
    dim: u64,
    sets: u64,
    tokens: u64,
    queries: u64,
    q_rows: Option<u64>,
    masked: u64,
    q: Option<[i64; 3]>,
    k: Option<[i64; 3]>,
    scores: Option<[i64; 2]>,
    lengths: Option<[i64; 2]>,
    lse: Option<[i64; 3]>,
    aggregation: Aggregation,
    reduction: Reduction,
    causal: bool,
    excluded: u64,
    unscored: u64,
    pool: Pool,
    accumulate: bool,
    given_lse: bool,
    scale: Option<f32>,
    variant: ImportanceVariant,
    protect: bool,
    places: Places,
    types: PhantomData<T>,
}

impl<T: Float> ImportanceBuilder<T> {
    pub(super) fn new(heads: usize, groups: usize, dim: usize) -> Self {
        ImportanceBuilder {
            heads: heads as u64,
            groups: groups as u64,
            dim: dim as u64,
            sets: 1,
            tokens: 1,
            queries: 1,
            q_rows: None,
            masked: 0,
            q: None,
            k: None,
            scores: None,
            lengths: None,
            lse: None,
            aggregation: Aggregation::default(),
            reduction: Reduction::default(),
            causal: false,
            excluded: 0,
            unscored: 0,
            pool: Pool::None,
            accumulate: false,
            given_lse: false,
            scale: None,
            variant: ImportanceVariant::Auto,
            protect: false,
            places: Places::default(),
            types: PhantomData,
        }
    }

    /// Sets, that is layers of sequences, of the launch; 1 if not given.
    pub fn sets(mut self, sets: usize) -> Self {
        self.sets = sets as u64;
        self
    }

    /// Keys of each set; 1 if not given.
    pub fn tokens(mut self, tokens: usize) -> Self {
        self.tokens = tokens as u64;
        self
    }

    /// Queries that score; 1 if not given.
    pub fn queries(mut self, queries: usize) -> Self {
        self.queries = queries as u64;
        self
    }

    /// The queries are listed rows of `q`, which has `q_rows` of them (ScaleKV's grid).
    pub fn listed_queries(mut self, q_rows: usize) -> Self {
        self.q_rows = Some(q_rows as u64);
        self
    }

    /// So many columns are listed that are -inf before the pooling (ScaleKV's window).
    pub fn masked(mut self, masked: usize) -> Self {
        self.masked = masked as u64;
        self
    }

    /// The keys lie in the pages of a pool: `k` is `[sets, pages * page_rows, heads, dim]`, of which a set's stride is
    /// 0 where sets share the pool, and `tokens` rows are found by [`KeyPages`](super::super::KeyPages).
    pub fn pages(mut self, page_rows: usize, pages: usize) -> Self {
        self.places = Places { first_rows: self.places.first_rows, ..Places::paged(page_rows, pages) };
        self
    }

    /// The first `rows` rows, whole pages, are what a compression left, which heads may have less of:
    /// [`KeyPages::kept`](super::super::KeyPages::kept).
    pub fn first_rows(mut self, rows: usize) -> Self {
        self.places.first_rows = rows as u64;
        self
    }

    /// Scores of masked columns are +inf: they are kept, whatever their neighbours are.
    pub fn protect_masked(mut self) -> Self {
        self.protect = true;
        self
    }

    /// Strides of `q` in elements, `[set, row, head]`; contiguous `[sets, q_rows, heads * groups, dim]` if not given.
    pub fn q_strides(mut self, strides: [i64; 3]) -> Self {
        self.q = Some(strides);
        self
    }

    /// Strides of `k` in elements, `[set, token, head]`; contiguous `[sets, tokens, heads, dim]` if not given.
    pub fn k_strides(mut self, strides: [i64; 3]) -> Self {
        self.k = Some(strides);
        self
    }

    /// Strides of `scores` in elements, `[set, head]`; contiguous `[sets, heads, tokens]` if not given.
    pub fn scores_strides(mut self, strides: [i64; 2]) -> Self {
        self.scores = Some(strides);
        self
    }

    /// Strides of `lengths` in elements, `[set, head]`; contiguous `[sets, heads]` if not given. 0 shares lengths.
    pub fn lengths_strides(mut self, strides: [i64; 2]) -> Self {
        self.lengths = Some(strides);
        self
    }

    /// Strides of `lse` in elements, `[set, head, query]`; contiguous `[sets, heads * groups, queries]` if not given.
    pub fn lse_strides(mut self, strides: [i64; 3]) -> Self {
        self.lse = Some(strides);
        self
    }

    /// What the scores of query heads become; [`Aggregation::MaxLogit`] if not given.
    pub fn aggregation(mut self, aggregation: Aggregation) -> Self {
        self.aggregation = aggregation;
        self
    }

    /// What the scores of queries become; [`Reduction::Mean`] if not given.
    pub fn reduction(mut self, reduction: Reduction) -> Self {
        self.reduction = reduction;
        self
    }

    /// The queries are those of the last keys: query `i` sees the keys up to `length - queries + i` (SnapKV's window).
    pub fn causal(mut self) -> Self {
        self.causal = true;
        self
    }

    /// Trailing keys that are not looked at: neither in the softmax nor scored (R-KV's window).
    pub fn excluded(mut self, keys: usize) -> Self {
        self.excluded = keys as u64;
        self
    }

    /// Trailing keys, before those excluded, that are in the softmax but not scored (SnapKV's window).
    pub fn unscored(mut self, keys: usize) -> Self {
        self.unscored = keys as u64;
        self
    }

    /// Pooling over the scored keys.
    pub fn pool(mut self, pool: Pool) -> Self {
        self.pool = pool;
        self
    }

    /// Adds to the scores there are (H2O); pooled, if there is a pooling.
    pub fn accumulate(mut self) -> Self {
        self.accumulate = true;
        self
    }

    /// The log-sum-exp of every row is given, as attention leaves it: natural logarithm, of the same scaled logits over the
    /// same visible keys. The first pass over the keys is then left out.
    pub fn given_lse(mut self) -> Self {
        self.given_lse = true;
        self
    }

    /// Scale of the logits; `1 / sqrt(dim)` if not given.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Forces the kernels.
    pub fn variant(mut self, variant: ImportanceVariant) -> Self {
        self.variant = variant;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `dim` other than 64, 96 and 128, `heads` or `groups` of 0, more than 16 `groups` with a
    /// maximum over them, `sets * heads` beyond 65535, `tokens` or `queries * groups` of about 2^31, `masked` beyond
    /// 1024, a pool wider than 63; [`Error::Stride`] for a negative stride, one of `q` or `k` that is no multiple of 8,
    /// scores that overlap; [`Error::Unsupported`] for an even pool, an LSE that does not fit the aggregation, masked
    /// columns that accumulate, first rows that are no pages, a scale that is not positive and finite, or Hopper's
    /// kernels on another device; [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Importance<T>> {
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        let Self { sets, tokens, queries, heads, groups, dim, .. } = self;
        check_sizes(device, [sets, heads, tokens, dim], MOST_TOKENS)?;
        let maximum = matches!(self.aggregation, Aggregation::MaxLogit | Aggregation::MaxProb);
        size("groups", groups, 1, if maximum { MOST_GROUPS } else { MOST_ITEMS })?;
        size("queries * groups", queries.saturating_mul(groups), 0, MOST_TOKENS)?;
        size("q_rows", self.q_rows.unwrap_or(queries), 0, MOST_TOKENS)?;
        size("excluded", self.excluded, 0, MOST_TOKENS)?;
        size("unscored", self.unscored, 0, MOST_TOKENS)?;
        size("masked", self.masked, 0, MOST_MASKED)?;
        if let Pool::Max(width) | Pool::Average(width) = self.pool {
            size("pool", width.into(), 1, MOST_POOL.into())?;
            if width % 2 == 0 {
                return Err(Error::Unsupported { arg: "pool", what: "widths are odd" });
            }
        }
        if self.given_lse && (self.aggregation == Aggregation::Logit) {
            return Err(Error::Unsupported { arg: "lse", what: "logits are not normalised" });
        }
        if self.given_lse && self.aggregation == Aggregation::MaxLogit && groups > 1 {
            let what = "a maximum of logits over query heads has a log-sum-exp of its own";
            return Err(Error::Unsupported { arg: "lse", what });
        }
        if self.masked > 0 && self.accumulate {
            return Err(Error::Unsupported { arg: "masked", what: "-inf cannot be added to scores" });
        }
        self.places.check(tokens)?;
        let scale = self.scale.unwrap_or((dim as f32).sqrt().recip());
        if !(scale > 0.0 && scale.is_finite()) {
            return Err(Error::Unsupported { arg: "scale", what: "it is positive and finite" });
        }
        let q_rows = self.q_rows.unwrap_or(queries);
        if self.q_rows.is_some() && queries > 0 {
            size("q_rows", q_rows, 1, MOST_TOKENS)?;
        }

        let q_shape = [sets, q_rows, heads * groups, dim];
        let k_shape = [sets, self.places.rows(tokens), heads, dim];
        let (q, k) = (vectors_layout("q", q_shape, self.q)?, keys_layout(k_shape, self.k)?);
        let scores = rows_layout([sets, heads, tokens], self.scores);
        scores.require_disjoint("scores")?;
        let lengths = lengths_layout([sets, heads], self.lengths);
        let lse_shape = [sets, heads * groups, queries];
        let lse = self.lse.map_or(Layout::contiguous(lse_shape), |strides| Layout::strided(lse_shape, strides));

        // A single query head: all ways to aggregate are one.
        let aggregation = match self.aggregation {
            Aggregation::Logit => Aggregation::Logit,
            _ if groups == 1 => Aggregation::MeanProb,
            other => other,
        };
        let divisor = match (self.reduction, aggregation) {
            (Reduction::Sum, _) => 1,
            (Reduction::Mean, Aggregation::MeanProb | Aggregation::Logit) => queries * groups,
            (Reduction::Mean, _) => queries,
        };
        // Dimensions of a tensor map have strides, if they have elements to tell apart.
        let flat = |layout: &Layout<4>| (1..3).any(|dim| layout.shape()[dim] > 1 && layout.strides()[dim] == 0);
        let unfit = match () {
            () if self.causal => Some("Hopper's kernels have no causal order"),
            () if self.q_rows.is_some() => Some("Hopper's kernels take queries as they come"),
            () if flat(&q) || flat(&k) => Some("Hopper's kernels take strides above 0"),
            () => None,
        };
        let schedule = ImportanceSchedule::of(&Shape {
            device,
            unfit,
            sets,
            heads,
            groups,
            dim,
            tokens,
            queries,
            aggregation,
            needs_stats: !self.given_lse && aggregation != Aggregation::Logit,
            finishes: self.pool != Pool::None || self.masked > 0,
            variant: self.variant,
            places: self.places,
        })?;
        let plan = Plan {
            q_len: q.required_len("q")?,
            k_len: k.required_len("k")?,
            scores_len: scores.required_len("scores")?,
            lengths_len: lengths.required_len("lengths")?,
            lse_len: lse.required_len("lse")?,
            q,
            k,
            scores,
            lengths,
            lse,
            places: self.places,
            protect: self.protect && self.masked > 0,
            queries,
            groups,
            listed: self.q_rows.is_some(),
            masked: self.masked,
            aggregation,
            causal: self.causal,
            excluded: self.excluded,
            unscored: self.unscored,
            pool: self.pool,
            accumulate: self.accumulate,
            given_lse: self.given_lse,
            scale: scale.to_bits(),
            factor: (1.0 / divisor.max(1) as f32).to_bits(),
            schedule,
        };
        Ok(Importance { inner: plan, types: PhantomData })
    }
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) q: Layout<4>,
    pub(super) k: Layout<4>,
    pub(super) scores: Layout<3>,
    pub(super) lengths: Layout<2>,
    pub(super) lse: Layout<3>,
    pub(super) q_len: u64,
    pub(super) k_len: u64,
    pub(super) scores_len: u64,
    pub(super) lengths_len: u64,
    pub(super) lse_len: u64,
    pub(super) places: Places,
    pub(super) protect: bool,
    pub(super) queries: u64,
    pub(super) groups: u64,
    pub(super) listed: bool,
    pub(super) masked: u64,
    pub(super) aggregation: Aggregation,
    pub(super) causal: bool,
    pub(super) excluded: u64,
    pub(super) unscored: u64,
    pub(super) pool: Pool,
    pub(super) accumulate: bool,
    pub(super) given_lse: bool,
    scale: u32,
    factor: u32,
    pub(super) schedule: ImportanceSchedule,
}

impl Plan {
    pub(super) fn scale(&self) -> f32 {
        f32::from_bits(self.scale)
    }

    /// Of the sums over queries.
    pub(super) fn factor(&self) -> f32 {
        f32::from_bits(self.factor)
    }

    /// Rows that have a log-sum-exp of their own, of a set and head.
    pub(super) fn stat_rows(&self) -> u64 {
        if self.aggregation == Aggregation::MaxLogit { self.queries } else { self.queries * self.groups }
    }

    /// Bytes of the statistics at the start of the workspace, to a multiple of 256.
    pub(super) fn stats_bytes(&self) -> u64 {
        let [sets, heads, _] = self.scores.shape();
        let of_row = if self.schedule.stat_splits > 1 { 8 * self.schedule.stat_splits } else { 4 };
        let needed = !self.given_lse && self.aggregation != Aggregation::Logit && self.scores_len > 0;
        if needed { (sets * heads * self.stat_rows() * of_row).next_multiple_of(256) } else { 0 }
    }

    /// Bytes of the sums, after the statistics.
    pub(super) fn sums_bytes(&self) -> u64 {
        let [sets, heads, tokens] = self.scores.shape();
        if self.schedule.finishes { self.schedule.sum_splits * sets * heads * tokens * 4 } else { 0 }
    }

    /// Keys of the softmax and keys scored, of so many.
    pub(super) fn seen_and_scored(&self, length: u64) -> (u64, u64) {
        let seen = length.saturating_sub(self.excluded);
        (seen, seen.saturating_sub(self.unscored))
    }

    pub(super) fn traffic(&self, element: usize) -> Traffic {
        let [sets, heads, tokens] = self.scores.shape();
        let [_, q_rows, q_heads, dim] = self.q.shape();
        let scores = sets * heads * tokens * 4;
        let queries = sets * self.queries.min(q_rows) * q_heads;
        let vectors = (sets * heads * tokens).saturating_add(queries);
        let read = vectors.saturating_mul(dim * element as u64);
        Traffic { read: read.saturating_add(if self.accumulate { scores } else { 0 }), written: scores }
    }

    pub(super) fn flops(&self) -> u64 {
        let [sets, heads, tokens] = self.scores.shape();
        let passes = if self.given_lse || self.aggregation == Aggregation::Logit { 1 } else { 2 };
        [sets, heads, tokens, self.queries, self.groups, self.k.shape()[3]]
            .into_iter()
            .fold(2 * passes, |product: u64, n| product.saturating_mul(n))
    }
}

/// From so many queries on the products are what takes time, and Hopper's kernels have more of them.
const MANY_QUERIES: u64 = 256;

struct Shape<'a> {
    device: &'a DeviceInfo,
    /// What Hopper's kernels do not take, of what the sizes do not say.
    unfit: Option<&'static str>,
    sets: u64,
    heads: u64,
    groups: u64,
    dim: u64,
    tokens: u64,
    queries: u64,
    aggregation: Aggregation,
    needs_stats: bool,
    finishes: bool,
    variant: ImportanceVariant,
    places: Places,
}

impl Shape<'_> {
    fn fits_hopper(&self) -> Result<()> {
        let what = match self {
            _ if self.device.arch.major != 9 => "Hopper's kernels run on sm_90 only",
            Shape { unfit: Some(what), .. } => what,
            Shape { aggregation: Aggregation::Logit, .. } => "Hopper's kernels take a softmax",
            Shape { aggregation: Aggregation::MaxLogit, groups: 5.., .. } => {
                "Hopper's kernels take a maximum over at most 4 query heads"
            }
            Shape { queries: 0, .. } | Shape { tokens: 0, .. } | Shape { sets: 0, .. } => "nothing is there to load",
            _ => return Ok(()),
        };
        Err(Error::Unsupported { arg: "variant", what })
    }
}

/// How the kernels cut a scoring up; all of it for each set and head.
///
/// A row is a query (where query heads are looked at together, and in the second pass of Hopper's kernels) or a query of one query
/// head. The first pass gives a block
/// `stat_rows` rows and a span of `stat_span` keys; it leaves a log-sum-exp, or `stat_splits` parts of it. The second gives a
/// block a span of `sum_span` keys and `sum_rows_split` rows, which it takes `sum_rows` at a time. A third pass adds up
/// what `sum_splits` blocks have found for a key, masks and pools. What is cut within a set does not depend on how many
/// sets there are, but for `sum_span`, which changes no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ImportanceSchedule {
    /// Whether the kernels are Hopper's.
    pub hopper: bool,
    /// Whether the first pass runs.
    pub has_stats: bool,
    /// Rows of a block of the first pass.
    pub stat_rows: u64,
    /// Keys of a block of the first pass.
    pub stat_span: u64,
    /// Blocks of the first pass that share a row.
    pub stat_splits: u64,
    /// Rows that a block of the second pass takes at a time.
    pub sum_rows: u64,
    /// Keys of a block of the second pass.
    pub sum_span: u64,
    /// Rows of a block of the second pass.
    pub sum_rows_split: u64,
    /// Blocks of the second pass that share a key.
    pub sum_splits: u64,
    /// Whether the third pass runs.
    pub finishes: bool,
}

impl ImportanceSchedule {
    fn of(shape: &Shape<'_>) -> Result<Self> {
        let fits = shape.fits_hopper();
        match shape.variant {
            ImportanceVariant::Hopper => fits.map(|()| Self::hopper(shape)),
            ImportanceVariant::Auto if fits.is_ok() && shape.queries >= MANY_QUERIES => Ok(Self::hopper(shape)),
            _ => Ok(Self::portable(shape)),
        }
    }

    fn hopper(shape: &Shape<'_>) -> Self {
        let &Shape { heads, groups, tokens, queries, aggregation, .. } = shape;
        let multiprocessors = shape.device.sm_count.max(1) as u64;
        let (stat_rows, each) = if aggregation == Aggregation::MaxLogit { (128, 1) } else { (256, groups) };
        let spans = tokens.div_ceil(SPAN).max(1);
        let stat_blocks = heads * each * queries.div_ceil(stat_rows).max(1);
        // Keys are loaded 128 at a time, none beyond a page.
        let stat_keys = shape.places.chunk_rows(tokens, 128);
        let stat_spans = stat_keys.div_ceil(SPAN).max(1);
        let stat_span = stat_spans.div_ceil(multiprocessors.div_ceil(stat_blocks).min(stat_spans)) * SPAN;
        let sum_rows = 64;
        let tiles = queries.div_ceil(sum_rows).max(1);
        let sum_tiles = tiles.div_ceil(multiprocessors.div_ceil(heads * spans).min((tiles / 8).max(1)));
        let sum_splits = tiles.div_ceil(sum_tiles);
        ImportanceSchedule {
            hopper: true,
            has_stats: shape.needs_stats,
            stat_rows,
            stat_span,
            stat_splits: stat_keys.div_ceil(stat_span).max(1),
            sum_rows,
            sum_span: SPAN,
            sum_rows_split: sum_tiles * sum_rows,
            sum_splits,
            finishes: shape.finishes || sum_splits > 1,
        }
    }

    fn portable(shape: &Shape<'_>) -> Self {
        let &Shape { sets, heads, groups, dim, tokens, queries, aggregation, .. } = shape;
        let multiprocessors = shape.device.sm_count.max(1) as u64;
        // Rows of a tile, as vectors of `dim` in shared memory.
        let fits = |vectors: u64, buffers: u64| QUERY_BYTES / (vectors * buffers * dim * 2) / EIGHT * EIGHT;
        let (stat_vectors, stat_most) = if aggregation == Aggregation::MaxLogit { (groups, 64) } else { (1, 128) };
        let stat_total = queries * groups / stat_vectors;
        let stat_rows = fits(stat_vectors, 1).min(stat_most).min(stat_total.next_multiple_of(EIGHT)).max(EIGHT);

        let spans = tokens.div_ceil(SPAN).max(1);
        let stat_blocks = heads * stat_total.div_ceil(stat_rows).max(1);
        let stat_span = spans.div_ceil(multiprocessors.div_ceil(stat_blocks).min(spans)) * SPAN;
        let stat_splits = tokens.div_ceil(stat_span).max(1);

        let together = matches!(aggregation, Aggregation::MaxLogit | Aggregation::MaxProb);
        let sum_vectors = if together { groups } else { 1 };
        let sum_total = queries * groups / sum_vectors;
        // All rows at once, or two buffers of tiles.
        let padded = sum_total.next_multiple_of(EIGHT).max(EIGHT);
        let sum_rows = if padded <= fits(sum_vectors, 1) {
            padded
        } else {
            // A thread has a vector's log-sum-exp.
            fits(sum_vectors, 2)
                .min(SPAN / sum_vectors / EIGHT * EIGHT)
                .min(128 / sum_vectors.next_power_of_two().min(4))
        };
        let tiles = sum_total.div_ceil(sum_rows).max(1);
        // Too few keys to occupy the device: several blocks share them, each with four tiles of rows or more.
        let most_splits = (tiles / 4).max(1);
        let sum_tiles = tiles.div_ceil(multiprocessors.div_ceil(heads * spans).min(most_splits));
        let sum_splits = tiles.div_ceil(sum_tiles);
        // Queries that stay are loaded once for several spans.
        let blocks = sets * heads * spans;
        let sum_span = if tiles == 1 { (blocks / (4 * multiprocessors)).clamp(1, 8) * SPAN } else { SPAN };
        ImportanceSchedule {
            hopper: false,
            has_stats: shape.needs_stats,
            stat_rows,
            stat_span,
            stat_splits,
            sum_rows,
            sum_span,
            sum_rows_split: sum_tiles * sum_rows,
            sum_splits,
            finishes: shape.finishes || sum_splits > 1,
        }
    }
}

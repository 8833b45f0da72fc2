//! Who sees whom: segments of tokens, and a rule for each pair of them.

use core::ops::Range;

use crate::error::{Error, Result};

/// Consecutive tokens that share their visibility: a scale's grid, a text, a source image, a clean or noisy block.
///
/// Tokens lie frame by frame, row by row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Segment {
    frames: u32,
    height: u32,
    width: u32,
    length: Option<u32>,
}

impl Segment {
    /// `n` tokens in a line.
    pub const fn tokens(n: u32) -> Self {
        Self::video(1, 1, n)
    }

    /// A grid of `height` x `width` tokens.
    pub const fn grid(height: u32, width: u32) -> Self {
        Self::video(1, height, width)
    }

    /// `frames` grids of `height` x `width` tokens.
    pub const fn video(frames: u32, height: u32, width: u32) -> Self {
        Segment { frames, height, width, length: None }
    }

    /// As keys, only the first `lengths[index]` tokens exist: a prompt with a length of its own in each batch entry, a
    /// cache that was pruned head by head. The lengths are an operand of the run.
    pub const fn with_length(mut self, index: u32) -> Self {
        self.length = Some(index);
        self
    }

    /// Number of tokens; saturates at 2^32 - 1, which no plan takes.
    pub const fn len(&self) -> u32 {
        self.frames.saturating_mul(self.height).saturating_mul(self.width)
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The index of the length that limits it.
    pub const fn length(&self) -> Option<u32> {
        self.length
    }

    /// Numbers of frames, rows and columns.
    const fn shape(&self) -> [u32; 3] {
        [self.frames, self.height, self.width]
    }

    /// Frame, row and column of a token.
    const fn place(&self, token: u32) -> [u32; 3] {
        let area = self.height * self.width;
        [token / area, token % area / self.width, token % self.width]
    }
}

/// Tokens in a line.
impl From<u32> for Segment {
    fn from(tokens: u32) -> Self {
        Segment::tokens(tokens)
    }
}

/// A grid: height, width.
impl From<(u32, u32)> for Segment {
    fn from((height, width): (u32, u32)) -> Self {
        Segment::grid(height, width)
    }
}

/// A video: frames, height, width.
impl From<(u32, u32, u32)> for Segment {
    fn from((frames, height, width): (u32, u32, u32)) -> Self {
        Segment::video(frames, height, width)
    }
}

/// What the tokens of one segment see of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Rule {
    /// Nothing.
    #[default]
    Hidden,
    /// Everything.
    Full,
    /// Query i sees keys 0 to i, both counted from the start of their segments: text, raster order.
    Causal,
    /// The query at column x and row y sees the columns before x whole, and of column x the rows up to y: raster order
    /// of the transposed grid. Frames before the query's are seen whole, later ones not at all. Both grids have the
    /// same shape.
    ColumnCausal,
    /// The query sees the keys whose frame + row + column is at most its own: an image that grows from a corner, one
    /// diagonal at a time (NAR, arXiv 2503.10696). No other rule has it while tokens lie in raster order.
    DiagonalCausal,
    /// The query's place is projected to the grid of the keys, `floor((place + 1/2) * keys / queries)` along each axis,
    /// and what lies within so many frames, rows and columns of it is seen, as far as the grid goes.
    Window {
        /// Frames to either side.
        frames: u32,
        /// Rows to either side.
        rows: u32,
        /// Columns to either side.
        columns: u32,
    },
}

/// One rule for consecutive segments of keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Sight {
    keys: Range<u32>,
    rule: Rule,
}

/// Segments of queries, segments of keys, and which sees which.
///
/// Queries and keys are counted through all of their segments, in order. Nothing of the size of queries x keys is ever
/// made.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Visibility {
    queries: Vec<Segment>,
    keys: Vec<Segment>,
    /// Of each segment of queries, ascending, without what is hidden.
    sights: Vec<Vec<Sight>>,
    /// First tokens of the segments, and one past the last.
    query_starts: Vec<u32>,
    key_starts: Vec<u32>,
}

/// More tokens than this need 64-bit indices, which no kernel has.
const MOST_TOKENS: u64 = (1 << 31) - 1;

fn starts(arg: &'static str, segments: &[Segment]) -> Result<Vec<u32>> {
    let mut starts = vec![0u32];
    for segment in segments {
        let got = u64::from(*starts.last().expect("it starts with one")) + u64::from(segment.len());
        if got > MOST_TOKENS {
            return Err(Error::Size { arg, got, min: 0, max: MOST_TOKENS });
        }
        starts.push(got as u32);
    }
    Ok(starts)
}

/// Empty segments share their start with the next: the last one that starts there has the token.
fn segment_at(starts: &[u32], token: u32) -> usize {
    starts.partition_point(|&start| start <= token) - 1
}

/// The place among the keys, along one axis, at which a query's is looked for.
fn projected(place: [u32; 3], queries: &Segment, keys: &Segment, axis: usize) -> u32 {
    let (of, grid) = (u64::from(queries.shape()[axis]), u64::from(keys.shape()[axis]));
    ((2 * u64::from(place[axis]) + 1) * grid / (2 * of)) as u32
}

impl Visibility {
    /// Any rules: `rule(q, k)` is asked for each pair of a segment of queries and one of keys.
    ///
    /// # Errors
    /// [`Error::Size`] for 2^31 tokens or more; [`Error::Unsupported`] for [`Rule::ColumnCausal`] between grids of
    /// different shape.
    pub fn new(queries: &[Segment], keys: &[Segment], rule: impl Fn(usize, usize) -> Rule) -> Result<Self> {
        let mut sights = Vec::with_capacity(queries.len());
        for (q, query) in queries.iter().enumerate() {
            let mut seen: Vec<Sight> = Vec::new();
            for (k, key) in keys.iter().enumerate() {
                let rule = rule(q, k);
                if rule == Rule::ColumnCausal && query.shape() != key.shape() {
                    return Err(Error::Unsupported { arg: "rule", what: "ColumnCausal is for grids of one shape" });
                }
                match seen.last_mut() {
                    _ if rule == Rule::Hidden => {}
                    Some(last) if last.rule == rule && last.keys.end == k as u32 => last.keys.end += 1,
                    _ => seen.push(Sight { keys: k as u32..k as u32 + 1, rule }),
                }
            }
            sights.push(seen);
        }
        Ok(Visibility {
            query_starts: starts("queries", queries)?,
            key_starts: starts("keys", keys)?,
            queries: queries.to_vec(),
            keys: keys.to_vec(),
            sights,
        })
    }

    /// The same segments as queries and keys, and which sees which, whole.
    ///
    /// # Errors
    /// As [`Visibility::new`].
    pub fn table(segments: &[Segment], sees: impl Fn(usize, usize) -> bool) -> Result<Self> {
        Self::new(segments, segments, |q, k| if sees(q, k) { Rule::Full } else { Rule::Hidden })
    }

    /// The queries of the segments in `range` alone, with all keys.
    ///
    /// # Panics
    /// If there are no such segments.
    pub fn of_queries(&self, range: Range<usize>) -> Self {
        let queries = &self.queries[range.clone()];
        Visibility {
            query_starts: starts("queries", queries).expect("fewer tokens than before"),
            key_starts: self.key_starts.clone(),
            queries: queries.to_vec(),
            keys: self.keys.clone(),
            sights: self.sights[range].to_vec(),
        }
    }

    /// One step of generation: the queries of segment `k`, and the keys of the segments up to it. For layouts whose
    /// queries and keys are the same segments.
    ///
    /// # Panics
    /// If there is no such segment.
    pub fn step(&self, k: usize) -> Self {
        self.steps(k..k + 1)
    }

    /// Several steps at once, as for scales that were drafted and are verified together: the queries of the segments in
    /// `range`, and the keys of the segments up to its last. For layouts whose queries and keys are the same segments.
    ///
    /// # Panics
    /// If there are no such segments.
    pub fn steps(&self, range: Range<usize>) -> Self {
        let end = range.end;
        let mut steps = self.of_queries(range);
        steps.keys.truncate(end);
        steps.key_starts.truncate(end + 1);
        for sights in &mut steps.sights {
            for sight in &mut *sights {
                sight.keys.end = sight.keys.end.min(end as u32);
            }
            sights.retain(|sight| !sight.keys.is_empty());
        }
        steps
    }

    /// The same queries with the keys of those segments alone that any of them sees, and the numbers of these segments.
    /// For caches that keep segments apart and join what a step needs, or drop what no later step does (InfinityStar).
    pub fn seen_keys(&self) -> (Self, Vec<usize>) {
        let mut seen = vec![false; self.keys.len()];
        for sight in self.sights.iter().flatten() {
            seen[sight.keys.start as usize..sight.keys.end as usize].fill(true);
        }
        let kept: Vec<usize> = (0..seen.len()).filter(|&k| seen[k]).collect();
        let keys: Vec<Segment> = kept.iter().map(|&k| self.keys[k]).collect();
        let seen = Self::new(&self.queries, &keys, |q, k| self.rule(q, kept[k])).expect("a part of what there was");
        (seen, kept)
    }

    /// The segments of queries.
    pub fn queries(&self) -> &[Segment] {
        &self.queries
    }

    /// The segments of keys.
    pub fn keys(&self) -> &[Segment] {
        &self.keys
    }

    /// Number of queries.
    pub fn query_count(&self) -> u32 {
        *self.query_starts.last().expect("it is never empty")
    }

    /// Number of keys.
    pub fn key_count(&self) -> u32 {
        *self.key_starts.last().expect("it is never empty")
    }

    /// The tokens of a segment of queries.
    pub fn query_range(&self, segment: usize) -> Range<u32> {
        self.query_starts[segment]..self.query_starts[segment + 1]
    }

    /// The tokens of a segment of keys.
    pub fn key_range(&self, segment: usize) -> Range<u32> {
        self.key_starts[segment]..self.key_starts[segment + 1]
    }

    /// How many lengths the segments of keys name: one more than the greatest index.
    pub fn length_count(&self) -> u32 {
        self.keys.iter().filter_map(|segment| segment.length).map(|index| index.saturating_add(1)).max().unwrap_or(0)
    }

    /// What segment `q` of the queries sees of segment `k` of the keys.
    pub fn rule(&self, q: usize, k: usize) -> Rule {
        let k = k as u32;
        let sight = self.sights[q].get(self.sights[q].partition_point(|sight| sight.keys.end <= k));
        sight.filter(|sight| sight.keys.start <= k).map_or(Rule::Hidden, |sight| sight.rule)
    }

    /// Whether a query sees a key, lengths left aside.
    ///
    /// # Panics
    /// If there is no such query or key.
    pub fn sees(&self, query: u32, key: u32) -> bool {
        assert!(query < self.query_count() && key < self.key_count(), "no query {query} or no key {key}");
        let (q, k) = (segment_at(&self.query_starts, query), segment_at(&self.key_starts, key));
        let (query, key) = (query - self.query_starts[q], key - self.key_starts[k]);
        let (queries, keys) = (&self.queries[q], &self.keys[k]);
        let (from, at) = (queries.place(query), keys.place(key));
        match self.rule(q, k) {
            Rule::Hidden => false,
            Rule::Full => true,
            Rule::Causal => key <= query,
            Rule::ColumnCausal => [at[0], at[2], at[1]] <= [from[0], from[2], from[1]],
            Rule::DiagonalCausal => at.iter().sum::<u32>() <= from.iter().sum(),
            Rule::Window { frames, rows, columns } => {
                let reach = [frames, rows, columns];
                (0..3).all(|axis| at[axis].abs_diff(projected(from, queries, keys, axis)) <= reach[axis])
            }
        }
    }

    /// The segment of a query.
    pub(super) fn segment_of(&self, query: u32) -> usize {
        segment_at(&self.query_starts, query)
    }

    /// Whether the rows of a segment of queries see different keys.
    pub(super) fn differs_within(&self, q: usize) -> bool {
        self.sights[q].iter().any(|sight| sight.rule != Rule::Full)
    }

    /// The keys that a query sees, as ranges in ascending order that are not empty, and neither overlap nor need be
    /// apart. Lengths are left to the caller.
    pub(super) fn for_each_range(&self, query: u32, mut range: impl FnMut(Range<u32>)) {
        let q = self.segment_of(query);
        let token = query - self.query_starts[q];
        for sight in &self.sights[q] {
            if sight.rule == Rule::Full {
                let keys = self.key_starts[sight.keys.start as usize]..self.key_starts[sight.keys.end as usize];
                if !keys.is_empty() {
                    range(keys);
                }
                continue;
            }
            for k in sight.keys.clone() {
                let first = self.key_starts[k as usize];
                let mut emit = |within: Range<u32>| {
                    if !within.is_empty() {
                        range(first + within.start..first + within.end);
                    }
                };
                Self::ranges_within(&self.queries[q], &self.keys[k as usize], sight.rule, token, &mut emit);
            }
        }
    }

    /// The same within one segment of keys.
    fn ranges_within(queries: &Segment, keys: &Segment, rule: Rule, token: u32, range: &mut dyn FnMut(Range<u32>)) {
        if keys.is_empty() {
            return;
        }
        let area = keys.height * keys.width;
        match rule {
            Rule::Hidden => {}
            Rule::Full => range(0..keys.len()),
            Rule::Causal => range(0..(token + 1).min(keys.len())),
            Rule::ColumnCausal => {
                let [frame, row, column] = queries.place(token);
                range(0..frame * area);
                for y in 0..keys.height {
                    let first = frame * area + y * keys.width;
                    range(first..first + column + u32::from(y <= row));
                }
            }
            Rule::DiagonalCausal => {
                let most: u32 = queries.place(token).iter().sum();
                for t in 0..keys.frames {
                    for y in 0..keys.height {
                        let first = t * area + y * keys.width;
                        range(first..first + (most + 1).saturating_sub(t + y).min(keys.width));
                    }
                }
            }
            Rule::Window { frames, rows, columns } => {
                let place = queries.place(token);
                let reach = [frames, rows, columns];
                let [t, y, x] = core::array::from_fn(|axis| {
                    let centre = projected(place, queries, keys, axis);
                    centre.saturating_sub(reach[axis])
                        ..centre.saturating_add(reach[axis]).saturating_add(1).min(keys.shape()[axis])
                });
                for t in t {
                    for y in y.clone() {
                        let first = t * area + y * keys.width;
                        range(first + x.start..first + x.end);
                    }
                }
            }
        }
    }

    /// Pairs of a query and a key that it sees, lengths left aside: 4 x dim x this are the useful floating-point
    /// operations of one head.
    pub fn visible_pairs(&self) -> u64 {
        let mut pairs = 0;
        for q in 0..self.queries.len() {
            let tokens = self.query_range(q);
            let of = |query| {
                let mut keys = 0;
                self.for_each_range(query, |range| keys += u64::from(range.end - range.start));
                keys
            };
            pairs += if self.differs_within(q) {
                tokens.map(of).sum()
            } else if tokens.is_empty() {
                0
            } else {
                of(tokens.start) * u64::from(tokens.end - tokens.start)
            };
        }
        pairs
    }
}

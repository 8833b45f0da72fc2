//! The stages of an event, and where in the workspace each has its part. Pure.

use super::Event;
use crate::compression::{
    CacheSpec, Compact, CompactBuilder, Compaction, Importance, KeyNorms, Policy, Redundancy, Select, Traffic, Turn,
};
use crate::device::DeviceInfo;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;

/// Parts of the workspace begin at multiples of this.
const ALIGN: u64 = 256;
/// The workspace that an event may have if nothing else is said.
const WORKSPACE: u64 = 64_000_000;

/// Describes the event of a policy; made by [`ChunkCache::event`](super::super::ChunkCache::event).
#[derive(Debug, Clone)]
pub struct EventBuilder<T> {
    policy: Policy,
    spec: CacheSpec,
    pages: usize,
    sets: usize,
    shape: Compaction,
    compact: CompactBuilder<T, T>,
    groups: usize,
    queries: Option<usize>,
    q: Option<[i64; 3]>,
    scale: Option<f32>,
    block: usize,
    turns: bool,
    workspace: u64,
}

impl<T: Float> EventBuilder<T> {
    pub(in crate::compression) fn new(
        policy: Policy,
        spec: CacheSpec,
        pages: usize,
        sets: usize,
        shape: Compaction,
        compact: CompactBuilder<T, T>,
    ) -> Self {
        EventBuilder {
            policy,
            spec,
            pages,
            sets,
            shape,
            compact,
            groups: 1,
            queries: None,
            q: None,
            scale: None,
            block: 1,
            turns: false,
            workspace: WORKSPACE,
        }
    }

    /// Query heads of a KV head; 1 if not given.
    pub fn groups(mut self, groups: usize) -> Self {
        self.groups = groups;
        self
    }

    /// Queries that score: rows of `q`. If not given those that the policy says; FlowCache and H2O say nothing.
    pub fn queries(mut self, queries: usize) -> Self {
        self.queries = Some(queries);
        self
    }

    /// Strides of `q` in elements, `[set, row, head]`; contiguous if not given.
    pub fn q_strides(mut self, strides: [i64; 3]) -> Self {
        self.q = Some(strides);
        self
    }

    /// Scale of the logits; `1 / sqrt(k_dim)` if not given.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Tokens that are kept or dropped together: FlowCache's frames and chunks; the budget is whole ones, and a last
    /// one that is shorter counts as one. 1 if not given.
    pub fn block(mut self, tokens: usize) -> Self {
        self.block = tokens;
        self
    }

    /// Keys hold their rotary embedding, and kept row `r` is turned to position `first + r`: StreamingLLM's positions
    /// in the cache.
    pub fn turn(mut self, first: u32, turn: Turn) -> Self {
        self.compact = self.compact.renumber(first).turn(turn);
        self.turns = true;
        self
    }

    /// The most bytes of workspace: sets are taken in as few groups as they allow, one after the other. A group of one
    /// set has what it needs. 64 MB if not given.
    pub fn workspace(mut self, bytes: u64) -> Self {
        self.workspace = bytes;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// Those of the stages ([`Importance`], [`KeyNorms`], [`Redundancy`], [`Select`], [`Compact`]);
    /// [`Error::Unsupported`] for queries that are missing, or others than the policy's, a budget of no whole blocks,
    /// or a scale of ScaleKV less than 4 tokens wide; [`Error::Size`] for compactions that keep fewer rows than
    /// [`Policy::rows`], or more tokens of ScaleKV's last scale than there are.
    pub fn build(self, device: &DeviceInfo) -> Result<Event<T>> {
        let Compaction { tokens, kept, first_rows, first_kept, .. } = self.shape;
        let scores = self.policy.scores();
        let wanted = self.policy.queries();
        let queries = match (scores.importance, self.queries, wanted) {
            (false, _, _) => 0,
            (true, Some(queries), None) => queries,
            (true, None, Some(queries)) => queries,
            (true, Some(queries), Some(its)) if queries == its => queries,
            (true, Some(_), Some(_)) => {
                return Err(Error::Unsupported { arg: "queries", what: "those of the policy" });
            }
            (true, None, None) => return Err(Error::Unsupported { arg: "queries", what: "a number of them" }),
        };
        if self.block > 1 && !self.policy.budget().is_multiple_of(self.block) {
            return Err(Error::Unsupported { arg: "block", what: "blocks of which the budget is whole ones" });
        }
        // Keys that there are: no head has fewer, but of Ada-KV's.
        let keys = first_kept + tokens - first_rows;
        let mut columns = Vec::new();
        let mut q_rows = queries;
        if let Policy::ScaleKv { scale: [height, width], .. } = self.policy {
            if height.min(width) < 4 {
                return Err(Error::Unsupported { arg: "scale", what: "4 tokens and more along either axis" });
            }
            q_rows = height.saturating_mul(width);
            if q_rows > keys {
                return Err(Error::Size { arg: "scale", got: q_rows as u64, min: 16, max: keys as u64 });
            }
            columns = self.policy.grid().iter().map(|row| row + (keys - q_rows) as i32).collect();
        }
        let q_heads = self.spec.heads * self.groups;
        let shape = [self.sets, q_rows, q_heads, self.spec.k_dim].map(|size| size as u64);
        let q =
            self.q.map_or(Layout::contiguous(shape), |[set, row, head]| Layout::strided(shape, [set, row, head, 1]));
        let q_len = if scores.importance { q.required_len("q")? } else { 0 };

        let stages = |sets: usize| Stages::of(&self, device, sets, queries, q.strides(), [tokens, kept, first_rows]);
        let mut groups = 1;
        let (mut of_group, mut full);
        loop {
            of_group = self.sets.div_ceil(groups).max(1);
            full = stages(of_group)?;
            if full.parts.bytes <= self.workspace || of_group == 1 {
                break;
            }
            groups += 1;
        }
        let left = self.sets % of_group;
        let rest = if left > 0 { Some(stages(left)?) } else { None };
        let pool = (self.pages * self.spec.page_rows * self.spec.heads) as u64;
        // Over the items that there are; the table has room for rows between.
        let mut weights = self.policy.weights(keys.div_ceil(self.block.max(1)));
        if let Some(weights) = &mut weights {
            weights.resize(full.select.items(), 1.0);
        }
        Ok(Event {
            shape: super::Shape {
                sets: self.sets,
                heads: self.spec.heads,
                input_pages: tokens.div_ceil(self.spec.page_rows),
                out_pages: if self.shape.in_place { 0 } else { kept.div_ceil(self.spec.page_rows) },
                first_rows,
                q_len,
                q_stride_set: q.strides()[0],
                rows: self.policy.grid(),
                columns,
                k_len: pool * self.spec.k_dim as u64,
                v_len: pool * self.spec.v_dim as u64,
                pool,
                keys: (keys * self.spec.k_dim) as u64,
                turns: self.turns,
            },
            weights,
            full,
            rest,
        })
    }
}

/// A part of the workspace: its first byte, and how many it has.
pub(super) type Part = (usize, usize);

/// What lives at once lies side by side: importance to the selection; beside it the workspace of importance, then
/// redundancy, and behind that what makes it, then the indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Parts {
    pub(super) importance: Part,
    pub(super) importance_workspace: Part,
    pub(super) redundancy: Part,
    pub(super) inverse_norms: Part,
    pub(super) unit_sum: Part,
    pub(super) norms_workspace: Part,
    pub(super) redundancy_workspace: Part,
    pub(super) indices: Part,
    pub(super) select_workspace: Part,
    pub(super) bytes: u64,
}

/// The stages of as many sets as are taken at once.
pub(super) struct Stages<T> {
    pub(super) sets: usize,
    pub(super) importance: Option<Importance<T>>,
    pub(super) redundancy: Option<(KeyNorms<T>, Redundancy<T>)>,
    pub(super) select: Select,
    pub(super) compact: Compact<T, T>,
    pub(super) parts: Parts,
}

impl<T: Float> Stages<T> {
    fn of(
        event: &EventBuilder<T>,
        device: &DeviceInfo,
        sets: usize,
        queries: usize,
        q_strides: [i64; 4],
        [tokens, kept, first_rows]: [usize; 3],
    ) -> Result<Self> {
        let CacheSpec { heads, k_dim, page_rows, .. } = event.spec;
        let keys = [0, (heads * k_dim) as i64, k_dim as i64];
        // Rows of scores begin at multiples of 16 bytes.
        let row = tokens.next_multiple_of(4);
        let rows = [(heads * row) as i64, row as i64];
        let importance = match event.policy.importance::<T>(heads, event.groups, k_dim) {
            None => None,
            Some(builder) => {
                let [set, token, head, _] = q_strides;
                let mut builder = builder
                    .sets(sets)
                    .tokens(tokens)
                    .queries(queries)
                    .q_strides([set, token, head])
                    .k_strides(keys)
                    .pages(page_rows, event.pages)
                    .first_rows(first_rows)
                    .scores_strides(rows);
                if let Some(scale) = event.scale {
                    builder = builder.scale(scale);
                }
                Some(builder.build(device)?)
            }
        };
        let redundancy = match event.policy.redundancy() {
            None => None,
            Some(form) => {
                let norms = KeyNorms::builder(heads, k_dim)
                    .sets(sets)
                    .tokens(tokens)
                    .k_strides(keys)
                    .pages(page_rows, event.pages)
                    .first_rows(first_rows)
                    .inverse_norms_strides(rows)
                    .build(device)?;
                let redundancy = Redundancy::builder(heads, k_dim)
                    .sets(sets)
                    .tokens(tokens)
                    .k_strides(keys)
                    .pages(page_rows, event.pages)
                    .first_rows(first_rows)
                    .inverse_norms_strides(rows)
                    .scores_strides(rows)
                    .form(form)
                    .build(device)?;
                Some((norms, redundancy))
            }
        };
        let select = event
            .policy
            .select(sets, heads, tokens)
            .block(event.block)
            .first_rows(first_rows)
            .capacity(kept)
            .importance_strides(rows)
            .redundancy_strides(rows)
            .build(device)?;
        let compact = event.compact.clone().sets(sets).build(device)?;

        let lists = (sets * heads) as u64;
        let scores = lists * row as u64;
        let has = |there: bool, len: u64| if there { len } else { 0 };
        let mut parts = Parts::default();
        let take = |at: &mut u64, len: u64, size: u64| {
            let part = (*at as usize, (len * size) as usize);
            *at = (*at + len * size).next_multiple_of(ALIGN);
            part
        };
        let mut shared = 0;
        parts.importance = take(&mut shared, has(importance.is_some(), scores), 4);
        let mut first = shared;
        let bytes = importance.as_ref().map_or(0, |stage| stage.workspace_bytes());
        parts.importance_workspace = take(&mut first, bytes, 1);
        let mut after = shared;
        parts.redundancy = take(&mut after, has(redundancy.is_some(), scores), 4);
        let mut second = after;
        if let Some((norms, redundancy)) = &redundancy {
            parts.inverse_norms = take(&mut second, scores, 4);
            parts.unit_sum = take(&mut second, lists * k_dim as u64, 4);
            parts.norms_workspace = take(&mut second, norms.workspace_bytes(), 1);
            parts.redundancy_workspace = take(&mut second, redundancy.workspace_bytes(), 1);
        }
        let mut third = after;
        parts.indices = take(&mut third, lists * kept as u64, 4);
        parts.select_workspace = take(&mut third, select.workspace_bytes(), 1);
        parts.bytes = first.max(second).max(third);
        Ok(Stages { sets, importance, redundancy, select, compact, parts })
    }

    pub(super) fn traffic(&self, keys: u64) -> Traffic {
        let moved = self.compact.traffic();
        let scored = self.importance.is_some() || self.redundancy.is_some();
        Traffic { read: moved.read.saturating_add(if scored { keys } else { 0 }), written: moved.written }
    }

    fn key(&self) -> impl PartialEq + core::hash::Hash + core::fmt::Debug + '_ {
        (self.sets, &self.importance, &self.redundancy, &self.select, &self.compact)
    }
}

impl<T: Float> Clone for Stages<T> {
    fn clone(&self) -> Self {
        Stages {
            sets: self.sets,
            importance: self.importance.clone(),
            redundancy: self.redundancy.clone(),
            select: self.select.clone(),
            compact: self.compact.clone(),
            parts: self.parts,
        }
    }
}

impl<T: Float> PartialEq for Stages<T> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}
impl<T: Float> Eq for Stages<T> {}

impl<T: Float> core::hash::Hash for Stages<T> {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl<T: Float> core::fmt::Debug for Stages<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.key().fmt(f)
    }
}

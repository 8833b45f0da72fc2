//! `--kv-budget`: the cache is compressed between scales.
//!
//! After a scale has attended, the rows that its queries looked at most are kept, in each layer and head for itself, and
//! moved to the front, where the next scale's rows join them. Row 0, the class, is always kept.

use nextscale::compression::{
    Aggregation, Compact, CompactArgs, Importance, ImportanceArgs, Reduction, Select, SelectArgs,
};
use nextscale::dtype::Float;

use crate::device::{Buffer, Device};
use crate::failure::Result;
use crate::weights::Config;

/// Rows of the cache that are left after each scale: of all tokens so far the part that the budget says, and what there is.
pub(crate) fn rows_kept(config: &Config, budget: f32) -> Vec<usize> {
    let mut kept = Vec::with_capacity(config.scales.len());
    for scale in 0..config.scales.len() {
        let there = kept.last().copied().unwrap_or(0) + config.scales[scale] * config.scales[scale];
        let wanted = (f64::from(budget) * config.first(scale + 1) as f64).ceil() as usize;
        kept.push(wanted.clamp(1, there));
    }
    kept
}

/// The shape of one compression.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Event {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    /// Rows of queries that say what matters.
    pub(crate) queries: usize,
    /// Rows that the cache has room for, has, and keeps.
    pub(crate) room: usize,
    pub(crate) rows: usize,
    pub(crate) kept: usize,
}

/// Scores, selects and moves the rows of one layer's cache.
pub(crate) struct Compressor<A> {
    importance: Importance<A>,
    select: Select,
    compact: Compact<A, A>,
    /// `[batch, heads, rows]`
    scores: Buffer<f32>,
    /// `[batch, heads, kept]`
    indices: Buffer<i32>,
    counts: Buffer<i32>,
    importance_workspace: Buffer<u8>,
    select_workspace: Buffer<u8>,
}

impl<A: Float> Compressor<A> {
    pub(crate) fn new(device: &Device, event: Event) -> Result<Self> {
        let (info, Event { batch, heads, head_dim, queries, room, rows, kept }) = (device.info()?, event);
        let width = (heads * head_dim) as i64;
        let strides = [room as i64 * width, width, head_dim as i64];
        let importance = Importance::builder(heads, 1, head_dim)
            .sets(batch)
            .tokens(rows)
            .queries(queries)
            .k_strides(strides)
            .aggregation(Aggregation::MeanProb)
            .reduction(Reduction::Mean)
            // As in attention: queries have their multiplier.
            .scale(1.0)
            .build(&info)?;
        let select = Select::builder(batch, heads, rows).budget(kept).sink(1).build(&info)?;
        let compact = Compact::builder(batch, heads, rows, kept)
            .k(head_dim)
            .v(head_dim)
            .k_out_strides(strides)
            .v_out_strides(strides)
            .in_place()
            .build(&info)?;
        Ok(Compressor {
            scores: device.zeros(batch * heads * rows)?,
            indices: device.zeros(batch * heads * kept)?,
            counts: device.zeros(batch * heads)?,
            importance_workspace: device.zeros(importance.workspace_bytes() as usize)?,
            select_workspace: device.zeros(select.workspace_bytes() as usize)?,
            importance,
            select,
            compact,
        })
    }

    pub(crate) fn run(&mut self, device: &Device, q: &Buffer<A>, k: &mut Buffer<A>, v: &mut Buffer<A>) -> Result<()> {
        let stream = device.stream();
        self.importance.run(
            &stream,
            ImportanceArgs {
                pages: None,
                q: q.input(),
                k: k.input(),
                scores: self.scores.output(),
                rows: None,
                masked: None,
                lengths: None,
                lse: None,
                workspace: Some(self.importance_workspace.output()),
            },
        )?;
        self.select.run(
            &stream,
            SelectArgs {
                importance: Some(self.scores.input()),
                redundancy: None,
                weights: None,
                lengths: None,
                budgets: None,
                indices: self.indices.output(),
                counts: self.counts.output(),
                status: None,
                workspace: Some(self.select_workspace.output()),
            },
        )?;
        self.compact.run(
            &stream,
            CompactArgs { k_out: Some(k.output()), v_out: Some(v.output()), ..CompactArgs::of(self.indices.input()) },
        )?;
        Ok(())
    }
}

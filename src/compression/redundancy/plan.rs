//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::super::key_norms::plan::{MOST_TOKENS, check_sizes, keys_layout, lengths_layout, rows_layout, span_of};
use super::super::places::Places;
use super::{Redundancy, Traffic};
use crate::device::DeviceInfo;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;

/// What makes a key redundant.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Form {
    /// The cosine to the mean of the unit keys; KeyDiff keeps where it is least (arXiv 2504.15364).
    Cosine,
    /// The softmax over keys of the product with that mean (FlowCache).
    #[default]
    Softmax,
    /// The softmax over keys of the mean cosine to all others, of which each key leaves one out (R-KV).
    Similar(Similar),
}

/// Which of its neighbours a key leaves out of the sum, so that this one is not redundant for its sake: neighbours are the keys
/// whose cosine to it is above a threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Similar {
    /// 0.5 in R-KV; from 0 to 1.
    pub threshold: f32,
    /// `Retain::Last` in R-KV.
    pub retain: Retain,
    /// A key without a neighbour leaves out key 0, as in the published code; else none.
    pub lonely_leave_first: bool,
}

impl Default for Similar {
    fn default() -> Self {
        Similar { threshold: 0.5, retain: Retain::Last, lonely_leave_first: true }
    }
}

/// The neighbour that is left out.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Retain {
    /// The last one; the published `last`, and `last_percent` whatever the ratio.
    #[default]
    Last,
    /// The first one.
    First,
    /// Key 0, whatever the neighbours are: what the published `first` comes to, as it looks for the least index with 0 in the
    /// place of all that are no neighbours.
    Zero,
    /// The `k`-th least index with 0 in the place of all that are no neighbours, `k` being the length times this ratio, rounded
    /// down in f32, and at least 1: the published `first_percent`. Key 0 unless almost all keys are neighbours.
    FirstPercent(f32),
}

/// Describes a scoring; [`RedundancyBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct RedundancyBuilder<T> {
    heads: u64,
    dim: u64,
    sets: u64,
    tokens: u64,
    k: Option<[i64; 3]>,
    inverse_norms: Option<[i64; 2]>,
    unit_sum: Option<[i64; 2]>,
    scores: Option<[i64; 2]>,
    lengths: Option<[i64; 2]>,
    form: Form,
    places: Places,
    types: PhantomData<T>,
}

impl<T: Float> RedundancyBuilder<T> {
    pub(super) fn new(heads: usize, dim: usize) -> Self {
        RedundancyBuilder {
            heads: heads as u64,
            dim: dim as u64,
            sets: 1,
            tokens: 1,
            k: None,
            inverse_norms: None,
            unit_sum: None,
            scores: None,
            lengths: None,
            form: Form::default(),
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

    /// Strides of `k` in elements, `[set, token, head]`; contiguous `[sets, tokens, heads, dim]` if not given.
    pub fn k_strides(mut self, strides: [i64; 3]) -> Self {
        self.k = Some(strides);
        self
    }

    /// Strides of `inverse_norms` in elements, `[set, head]`; contiguous `[sets, heads, tokens]` if not given.
    pub fn inverse_norms_strides(mut self, strides: [i64; 2]) -> Self {
        self.inverse_norms = Some(strides);
        self
    }

    /// Strides of `unit_sum` in elements, `[set, head]`; contiguous `[sets, heads, dim]` if not given.
    pub fn unit_sum_strides(mut self, strides: [i64; 2]) -> Self {
        self.unit_sum = Some(strides);
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

    /// What makes a key redundant; [`Form::Softmax`] if not given.
    pub fn form(mut self, form: Form) -> Self {
        self.form = form;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `dim` other than 64, 96 and 128, no `heads`, `sets * heads` beyond 65535, `tokens` of about 2^31, of
    /// [`Form::Similar`] beyond 8192; [`Error::Stride`] for a negative stride, one of `k` that is no multiple of 8, scores that
    /// overlap; [`Error::Unsupported`] for a threshold or a ratio outside 0 to 1; [`Error::UnsupportedDevice`] below compute
    /// capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Redundancy<T>> {
        let Self { sets, tokens, heads, dim, .. } = self;
        let similar = match self.form {
            Form::Similar(similar) => Some(similar),
            Form::Cosine | Form::Softmax => None,
        };
        let most = if similar.is_some() { crate::ffi::NXS_REDUNDANCY_SIMILAR_TOKENS.into() } else { MOST_TOKENS };
        check_sizes(device, [sets, heads, tokens, dim], most)?;
        let unit = |arg, x: f32| match (0.0..=1.0).contains(&x) {
            true => Ok(x.to_bits()),
            false => Err(Error::Unsupported { arg, what: "it is from 0 to 1" }),
        };
        let form = match similar {
            None => Kind::Anchor { softmax: self.form == Form::Softmax },
            Some(similar) => Kind::Similar {
                threshold: unit("threshold", similar.threshold)?,
                neighbour: match similar.retain {
                    Retain::Last => Neighbour::Last,
                    Retain::First => Neighbour::First,
                    Retain::Zero => Neighbour::Zero,
                    Retain::FirstPercent(ratio) => Neighbour::FirstPercent(unit("ratio", ratio)?),
                },
                // Both of these come to key 0 where there is no neighbour to speak of.
                lonely: similar.lonely_leave_first || matches!(similar.retain, Retain::Zero | Retain::FirstPercent(_)),
            },
        };
        let k = keys_layout([sets, self.places.rows(tokens), heads, dim], self.k)?;
        self.places.check(tokens)?;
        let per_token = [sets, heads, tokens];
        let inverse_norms = rows_layout(per_token, self.inverse_norms);
        let unit_sum = rows_layout([sets, heads, dim], self.unit_sum);
        let scores = rows_layout(per_token, self.scores);
        scores.require_disjoint("scores")?;
        let lengths = lengths_layout([sets, heads], self.lengths);
        let plan = Plan {
            k_len: k.required_len("k")?,
            inverse_norms_len: inverse_norms.required_len("inverse_norms")?,
            unit_sum_len: unit_sum.required_len("unit_sum")?,
            scores_len: scores.required_len("scores")?,
            lengths_len: lengths.required_len("lengths")?,
            k,
            inverse_norms,
            unit_sum,
            scores,
            lengths,
            places: self.places,
            form,
        };
        Ok(Redundancy { inner: plan, types: PhantomData })
    }
}

/// Floats by their bits, so that a plan can be a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Anchor { softmax: bool },
    Similar { threshold: u32, neighbour: Neighbour, lonely: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Neighbour {
    Last,
    First,
    Zero,
    FirstPercent(u32),
}

impl Neighbour {
    /// Which hit it is, of so many keys, from the last on; 0: none. Among indices with 0 for all that are no hits, the `k`-th least
    /// is the hit with `length - k` behind it.
    pub(super) fn nth(self, length: u64) -> u64 {
        match self {
            Neighbour::Last | Neighbour::First => 1,
            Neighbour::Zero => 0,
            Neighbour::FirstPercent(ratio) => {
                let some = (length as f32 * f32::from_bits(ratio)) as u64;
                length + 1 - some.max(1).min(length)
            }
        }
    }
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) k: Layout<4>,
    pub(super) inverse_norms: Layout<3>,
    pub(super) unit_sum: Layout<3>,
    pub(super) scores: Layout<3>,
    pub(super) lengths: Layout<2>,
    pub(super) places: Places,
    pub(super) k_len: u64,
    pub(super) inverse_norms_len: u64,
    pub(super) unit_sum_len: u64,
    pub(super) scores_len: u64,
    pub(super) lengths_len: u64,
    pub(super) form: Kind,
}

impl Plan {
    /// `[sets, tokens, heads, dim]`.
    pub(super) fn sizes(&self) -> [u64; 4] {
        let [sets, _, heads, dim] = self.k.shape();
        [sets, self.scores.shape()[2], heads, dim]
    }

    pub(super) fn span(&self) -> u64 {
        span_of(self.sizes()[1])
    }

    /// Of a row of retained keys, in entries.
    pub(super) fn retained_row(&self) -> u64 {
        self.sizes()[1].next_multiple_of(2)
    }

    pub(super) fn workspace_bytes(&self) -> u64 {
        let [sets, tokens, heads, _] = self.sizes();
        match self.form {
            Kind::Anchor { softmax: false } => 0,
            Kind::Anchor { softmax: true } => tokens.div_ceil(self.span()) * sets * heads * 4,
            Kind::Similar { .. } => self.retained_row() * sets * heads * 8,
        }
    }

    pub(super) fn traffic(&self, element: usize) -> Traffic {
        let [sets, tokens, heads, dim] = self.sizes();
        let rows = sets * tokens * heads;
        Traffic { read: rows.saturating_mul(dim * element as u64 + 4) + sets * heads * dim * 4, written: rows * 4 }
    }
}

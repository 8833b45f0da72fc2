//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::super::places::Places;
use super::{KeyNorms, Traffic};
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;

/// The kernels count tokens in 32 bits, with room for a step beyond the last.
pub(in crate::compression) const MOST_TOKENS: u64 = (1 << 31) - (1 << 16) - 1;
/// Sets times heads are one dimension of a grid.
pub(in crate::compression) const MOST_ITEMS: u64 = 65_535;
/// Keys of a block are a multiple of this, and blocks of a head at most as many.
const SPAN: u64 = 64;

/// Describes an update; [`KeyNormsBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct KeyNormsBuilder<T> {
    heads: u64,
    dim: u64,
    sets: u64,
    tokens: u64,
    k: Option<[i64; 3]>,
    inverse_norms: Option<[i64; 2]>,
    unit_sum: Option<[i64; 2]>,
    lengths: Option<[i64; 2]>,
    accumulate: bool,
    eps: f32,
    places: Places,
    types: PhantomData<T>,
}

impl<T: Float> KeyNormsBuilder<T> {
    pub(super) fn new(heads: usize, dim: usize) -> Self {
        KeyNormsBuilder {
            heads: heads as u64,
            dim: dim as u64,
            sets: 1,
            tokens: 1,
            k: None,
            inverse_norms: None,
            unit_sum: None,
            lengths: None,
            accumulate: false,
            eps: 1e-8,
            places: Places::default(),
            types: PhantomData,
        }
    }

    /// Sets, that is layers of sequences, of the launch; 1 if not given.
    pub fn sets(mut self, sets: usize) -> Self {
        self.sets = sets as u64;
        self
    }

    /// Keys of each set, those that are new; 1 if not given.
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

    /// Strides of `lengths` in elements, `[set, head]`; contiguous `[sets, heads]` if not given. 0 shares lengths.
    pub fn lengths_strides(mut self, strides: [i64; 2]) -> Self {
        self.lengths = Some(strides);
        self
    }

    /// Adds to the sum there is, that of the keys before.
    pub fn accumulate(mut self) -> Self {
        self.accumulate = true;
        self
    }

    /// Added to every norm; 1e-8 if not given (FlowCache, R-KV).
    pub fn eps(mut self, eps: f32) -> Self {
        self.eps = eps;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `dim` other than 64, 96 and 128, no `heads`, `sets * heads` beyond 65535, `tokens` of about 2^31;
    /// [`Error::Stride`] for a negative stride, one of `k` that is no multiple of 8, outputs that overlap themselves;
    /// [`Error::Unsupported`] for an `eps` that is negative or not finite; [`Error::UnsupportedDevice`] below compute capability
    /// 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<KeyNorms<T>> {
        let Self { sets, tokens, heads, dim, .. } = self;
        check_sizes(device, [sets, heads, tokens, dim], MOST_TOKENS)?;
        if !(self.eps >= 0.0 && self.eps.is_finite()) {
            return Err(Error::Unsupported { arg: "eps", what: "it is not negative, and finite" });
        }
        let k = keys_layout([sets, self.places.rows(tokens), heads, dim], self.k)?;
        self.places.check(tokens)?;
        let per_token = [sets, heads, tokens];
        let inverse_norms = rows_layout(per_token, self.inverse_norms);
        let unit_sum = rows_layout([sets, heads, dim], self.unit_sum);
        inverse_norms.require_disjoint("inverse_norms")?;
        unit_sum.require_disjoint("unit_sum")?;
        let lengths = lengths_layout([sets, heads], self.lengths);
        let plan = Plan {
            k_len: k.required_len("k")?,
            inverse_norms_len: inverse_norms.required_len("inverse_norms")?,
            unit_sum_len: unit_sum.required_len("unit_sum")?,
            lengths_len: lengths.required_len("lengths")?,
            k,
            inverse_norms,
            unit_sum,
            lengths,
            places: self.places,
            accumulate: self.accumulate,
            eps: self.eps.to_bits(),
        };
        Ok(KeyNorms { inner: plan, types: PhantomData })
    }
}

/// `[sets, heads, tokens, dim]` within what kernels take.
pub(in crate::compression) fn check_sizes(device: &DeviceInfo, sizes: [u64; 4], most_tokens: u64) -> Result<()> {
    if device.arch < (Arch { major: 8, minor: 0 }) {
        return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
    }
    let size = |arg, got, min, max| {
        if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
    };
    let [sets, heads, tokens, dim] = sizes;
    if ![64, 96, 128].contains(&dim) {
        return Err(Error::Size { arg: "dim", got: dim, min: 64, max: 128 });
    }
    size("heads", heads, 1, MOST_ITEMS)?;
    size("sets * heads", sets.saturating_mul(heads), 0, MOST_ITEMS)?;
    size("tokens", tokens, 0, most_tokens)
}

/// Of queries or keys, `[set, token, head]` strided, rows of 16-byte pieces.
pub(in crate::compression) fn vectors_layout(
    arg: &'static str,
    shape: [u64; 4],
    strides: Option<[i64; 3]>,
) -> Result<Layout<4>> {
    let layout = strides.map_or(Layout::contiguous(shape), |[a, b, c]| Layout::strided(shape, [a, b, c, 1]));
    match layout.strides()[..3].iter().position(|stride| stride % 8 != 0) {
        Some(dim) => Err(Error::Stride { arg, dim, got: layout.strides()[dim], need: "must be a multiple of 8" }),
        None => Ok(layout),
    }
}

pub(in crate::compression) fn keys_layout(shape: [u64; 4], strides: Option<[i64; 3]>) -> Result<Layout<4>> {
    vectors_layout("k", shape, strides)
}

/// `[set, head]` strided, what is inside contiguous.
pub(in crate::compression) fn rows_layout(shape: [u64; 3], strides: Option<[i64; 2]>) -> Layout<3> {
    strides.map_or(Layout::contiguous(shape), |[set, head]| Layout::strided(shape, [set, head, 1]))
}

pub(in crate::compression) fn lengths_layout(shape: [u64; 2], strides: Option<[i64; 2]>) -> Layout<2> {
    strides.map_or(Layout::contiguous(shape), |strides| Layout::strided(shape, strides))
}

/// Keys of a block, of those that only read keys once: at most 64 blocks share a head, so that sums have few parts.
pub(in crate::compression) fn span_of(tokens: u64) -> u64 {
    tokens.div_ceil(SPAN).next_multiple_of(SPAN).max(SPAN)
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) k: Layout<4>,
    pub(super) inverse_norms: Layout<3>,
    pub(super) unit_sum: Layout<3>,
    pub(super) lengths: Layout<2>,
    pub(super) places: Places,
    pub(super) k_len: u64,
    pub(super) inverse_norms_len: u64,
    pub(super) unit_sum_len: u64,
    pub(super) lengths_len: u64,
    pub(super) accumulate: bool,
    eps: u32,
}

impl Plan {
    /// `[sets, tokens, heads, dim]`.
    pub(super) fn sizes(&self) -> [u64; 4] {
        let [sets, _, heads, dim] = self.k.shape();
        [sets, self.inverse_norms.shape()[2], heads, dim]
    }

    pub(super) fn eps(&self) -> f32 {
        f32::from_bits(self.eps)
    }

    pub(super) fn span(&self) -> u64 {
        span_of(self.sizes()[1])
    }

    pub(super) fn workspace_bytes(&self) -> u64 {
        let [sets, tokens, heads, dim] = self.sizes();
        tokens.div_ceil(self.span()) * sets * heads * dim * 4
    }

    pub(super) fn traffic(&self, element: usize) -> Traffic {
        let [sets, tokens, heads, dim] = self.sizes();
        let sums = sets * heads * dim * 4;
        Traffic {
            read: (sets * tokens * heads * dim).saturating_mul(element as u64) + if self.accumulate { sums } else { 0 },
            written: sets * tokens * heads * 4 + sums,
        }
    }
}

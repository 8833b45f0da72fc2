//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::Drift;
use crate::compression::Traffic;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::{Access, Layout};

/// Elements that a block adds.
pub(super) const SLAB: u64 = 16384;
/// Threads of a block.
pub(super) const THREADS: usize = 256;
/// Neighbouring elements of a thread.
pub(super) const GROUP: usize = 8;
const MOST_TERMS: usize = 8;
const MOST_CHUNKS: u64 = 65535;
const MOST_SLABS: u64 = (1 << 31) - 1;

/// Describes a drift test; [`DriftBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct DriftBuilder<P> {
    chunks: u64,
    elements: u64,
    features_stride: Option<i64>,
    previous_stride: Option<i64>,
    threshold: f32,
    eps: f64,
    polynomial: [f64; MOST_TERMS],
    terms: usize,
    warmup: usize,
    compute_before: usize,
    compute_from: usize,
    reset_forced: bool,
    keep: bool,
    access: Access,
    types: PhantomData<P>,
}

impl<P: Float> DriftBuilder<P> {
    pub(super) fn new(chunks: usize, elements: usize) -> Self {
        DriftBuilder {
            chunks: chunks as u64,
            elements: elements as u64,
            features_stride: None,
            previous_stride: None,
            threshold: 0.01,
            eps: 1e-8,
            polynomial: [0.0; MOST_TERMS],
            terms: 0,
            warmup: 0,
            compute_before: 1,
            compute_from: i32::MAX as usize,
            reset_forced: false,
            keep: false,
            access: Access::Auto,
            types: PhantomData,
        }
    }

    /// Elements from one chunk of `features` to the next; `elements` if not given.
    pub fn features_stride(mut self, stride: i64) -> Self {
        self.features_stride = Some(stride);
        self
    }

    /// Elements from one chunk of `previous` to the next; `elements` if not given.
    pub fn previous_stride(mut self, stride: i64) -> Self {
        self.previous_stride = Some(stride);
        self
    }

    /// A chunk is reused while what has accumulated is less; 0.01 if not given.
    pub fn threshold(mut self, threshold: f32) -> Self {
        self.threshold = threshold;
        self
    }

    /// Added to the mean of `|previous|`: 1e-8 (FlowCache) if not given, 0 in TeaCache.
    pub fn eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// What the change goes through before it is accumulated: up to 8 coefficients, of the highest power first, as
    /// `numpy.poly1d` has them. Without it (or empty) the change itself is accumulated.
    pub fn polynomial(mut self, coefficients: &[f64]) -> Self {
        self.terms = coefficients.len();
        for (to, from) in self.polynomial.iter_mut().zip(coefficients) {
            *to = *from;
        }
        self
    }

    /// A chunk's first `steps` steps are computed, and what has accumulated is 0 after them; 0 if not given.
    pub fn warmup(mut self, steps: usize) -> Self {
        self.warmup = steps;
        self
    }

    /// A chunk's steps before `step` are computed (`ret_steps`); 1 if not given, for the first step has nothing to compare
    /// with. With 0 `previous` must hold features from the start.
    pub fn compute_before(mut self, step: usize) -> Self {
        self.compute_before = step;
        self
    }

    /// A chunk's steps from `step` on are computed (the last one, or `cutoff_steps`); none if not given.
    pub fn compute_from(mut self, step: usize) -> Self {
        self.compute_from = step;
        self
    }

    /// A step that is computed without a test sets what has accumulated to 0, as in TeaCache. FlowCache leaves it.
    pub fn reset_forced(mut self, reset: bool) -> Self {
        self.reset_forced = reset;
        self
    }

    /// Writes `features` to `previous`, whatever the decision.
    pub fn keep(mut self, keep: bool) -> Self {
        self.keep = keep;
        self
    }

    /// Forces how memory is reached.
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for more than 65535 chunks, no elements or 2^45, more than 8 coefficients or 2^31 - 1 steps;
    /// [`Error::Stride`] for chunks that overlap, or wide access that the strides do not allow; [`Error::Unsupported`] for a
    /// threshold, an `eps` or a coefficient that is not finite; [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Drift<P>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, max| if got <= max { Ok(()) } else { Err(Error::Size { arg, got, min: 0, max }) };
        size("chunks", self.chunks, MOST_CHUNKS)?;
        if self.elements == 0 || self.elements.div_ceil(SLAB) > MOST_SLABS {
            let max = MOST_SLABS * SLAB;
            return Err(Error::Size { arg: "elements", got: self.elements, min: 1, max });
        }
        size("polynomial", self.terms as u64, MOST_TERMS as u64)?;
        for (arg, steps) in
            [("warmup", self.warmup), ("compute_before", self.compute_before), ("compute_from", self.compute_from)]
        {
            size(arg, steps as u64, i32::MAX as u64)?;
        }
        let finite = |arg, is| if is { Ok(()) } else { Err(Error::Unsupported { arg, what: "finite numbers only" }) };
        finite("threshold", self.threshold.is_finite())?;
        finite("eps", self.eps.is_finite() && self.eps >= 0.0)?;
        finite("polynomial", self.polynomial.iter().all(|x| x.is_finite()))?;

        let shape = [self.chunks, self.elements];
        let layout = |stride: Option<i64>| {
            stride.map_or(Layout::contiguous(shape), |stride| Layout::strided(shape, [stride, 1]))
        };
        let (features, previous) = (layout(self.features_stride), layout(self.previous_stride));
        previous.require_disjoint("previous")?;
        let (features_len, previous_len) = (features.required_len("features")?, previous.required_len("previous")?);
        let vec = (16 / size_of::<P>()) as i64;
        let check = [("features", &features), ("previous", &previous)]
            .into_iter()
            .find(|(_, layout)| layout.strides()[0] % vec != 0);
        let wide = match (self.access, check) {
            (Access::Narrow, _) => false,
            (Access::Auto, misaligned) => misaligned.is_none(),
            (Access::Wide, None) => true,
            (Access::Wide, Some((arg, layout))) => {
                let need = "wide access needs multiples of 16 bytes";
                return Err(Error::Stride { arg, dim: 0, got: layout.strides()[0], need });
            }
        };
        let inner = Plan {
            chunks: self.chunks,
            elements: self.elements,
            features_stride: features.strides()[0],
            previous_stride: previous.strides()[0],
            features_len,
            previous_len,
            threshold: self.threshold.to_bits(),
            eps: self.eps.to_bits(),
            polynomial: self.polynomial.map(f64::to_bits),
            terms: self.terms,
            warmup: self.warmup as i32,
            compute_before: self.compute_before as i32,
            compute_from: self.compute_from as i32,
            reset_forced: self.reset_forced,
            keep: self.keep,
            access: self.access,
            wide,
        };
        Ok(Drift { inner, types: PhantomData })
    }
}

/// The plan behind the types. Numbers by their bits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) chunks: u64,
    pub(super) elements: u64,
    pub(super) features_stride: i64,
    pub(super) previous_stride: i64,
    pub(super) features_len: u64,
    pub(super) previous_len: u64,
    threshold: u32,
    eps: u64,
    polynomial: [u64; MOST_TERMS],
    pub(super) terms: usize,
    pub(super) warmup: i32,
    pub(super) compute_before: i32,
    pub(super) compute_from: i32,
    pub(super) reset_forced: bool,
    pub(super) keep: bool,
    pub(super) access: Access,
    /// The strides allow wide access.
    pub(super) wide: bool,
}

impl Plan {
    pub(super) fn threshold(&self) -> f32 {
        f32::from_bits(self.threshold)
    }

    pub(super) fn eps(&self) -> f64 {
        f64::from_bits(self.eps)
    }

    pub(super) fn polynomial(&self) -> [f64; MOST_TERMS] {
        self.polynomial.map(f64::from_bits)
    }

    pub(super) fn slabs(&self) -> u64 {
        self.elements.div_ceil(SLAB)
    }

    pub(super) fn workspace_bytes(&self) -> u64 {
        self.chunks.saturating_mul(self.slabs()).saturating_mul(8)
    }

    pub(super) fn traffic(&self, element: usize) -> Traffic {
        let one = self.chunks.saturating_mul(self.elements).saturating_mul(element as u64);
        Traffic { read: one.saturating_mul(2), written: if self.keep { one } else { 0 } }
    }
}

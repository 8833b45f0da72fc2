//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::PooledVerifier;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::verification::Traffic;
use crate::verification::rows::chunks;

const MOST_VOCAB: u64 = 1 << 18;
const MOST_BATCH: u64 = 1 << 20;
const MOST_TOKENS: u64 = 1 << 20;
const MOST_NEIGHBOURS: u64 = 65535;
const MOST_RADIUS: u64 = 255;
/// Blocks that share a multiprocessor.
const BLOCKS_A_MULTIPROCESSOR: u64 = 4;

/// Describes a verifier; [`PooledVerifierBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct PooledVerifierBuilder<T> {
    batch: u64,
    height: u64,
    width: u64,
    vocab: u64,
    target_stride: Option<i64>,
    codes: Option<(u64, u64)>,
    neighbours: u64,
    neighbours_stride: Option<i64>,
    radius: u64,
    threshold: f32,
    guided: bool,
    types: PhantomData<T>,
}

impl<T: Float> PooledVerifierBuilder<T> {
    pub(super) fn new(batch: usize, [height, width]: [usize; 2], vocab: usize) -> Self {
        PooledVerifierBuilder {
            batch: batch as u64,
            height: height as u64,
            width: width as u64,
            vocab: vocab as u64,
            target_stride: None,
            codes: None,
            neighbours: 0,
            neighbours_stride: None,
            radius: 0,
            threshold: 0.5,
            guided: false,
            types: PhantomData,
        }
    }

    /// Elements from one row of `target` to the next, and of `target_free`; `vocab` if not given.
    pub fn target_row_stride(mut self, stride: i64) -> Self {
        self.target_stride = Some(stride);
        self
    }

    /// Which tokens are codes: `codes` from `first` on; all if not given.
    pub fn codes(mut self, first: usize, codes: usize) -> Self {
        self.codes = Some((first as u64, codes as u64));
        self
    }

    /// How many neighbours of a code count, beside itself; none if not given.
    pub fn neighbours(mut self, neighbours: usize) -> Self {
        self.neighbours = neighbours as u64;
        self
    }

    /// Entries from one row of `neighbours` to the next; as many as count if not given.
    pub fn neighbours_row_stride(mut self, stride: i64) -> Self {
        self.neighbours_stride = Some(stride);
        self
    }

    /// How far around a rejected token tokens are drawn again, in rows and columns; 0 if not given.
    pub fn radius(mut self, radius: usize) -> Self {
        self.radius = radius as u64;
        self
    }

    /// The least probability of a neighbourhood that is accepted, where requests bring none; 0.5 if not given.
    pub fn threshold(mut self, threshold: f32) -> Self {
        self.threshold = threshold;
        self
    }

    /// Classifier-free guidance: rows of `target` have rows without the condition beside them.
    pub fn guided(mut self) -> Self {
        self.guided = true;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `vocab` outside 1 to 2^18, `batch` above 2^20, an image that is empty or has more than 2^20
    /// tokens, 2^31 rows and more, `codes` that are none or not in the vocabulary, more than 65535 neighbours, a radius
    /// above 255; [`Error::Unsupported`] for a threshold that is NaN; [`Error::Stride`] for rows that overlap;
    /// [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<PooledVerifier<T>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("vocab", self.vocab, 1, MOST_VOCAB)?;
        size("batch", self.batch, 0, MOST_BATCH)?;
        size("height", self.height, 1, MOST_TOKENS)?;
        size("width", self.width, 1, MOST_TOKENS)?;
        size("height * width", self.height * self.width, 1, MOST_TOKENS)?;
        let rows = self.batch * self.height * self.width;
        size("rows", rows, 0, i32::MAX as u64)?;
        let (first_code, codes) = self.codes.unwrap_or((0, self.vocab));
        size("first code", first_code, 0, self.vocab - 1)?;
        size("codes", codes, 1, self.vocab - first_code)?;
        size("neighbours", self.neighbours, 0, MOST_NEIGHBOURS)?;
        size("radius", self.radius, 0, MOST_RADIUS)?;
        if self.threshold.is_nan() {
            return Err(Error::Unsupported { arg: "threshold", what: "a number" });
        }
        let tensor = |arg, rows, columns, stride: Option<i64>| {
            let layout = Layout::strided([rows, columns], [stride.unwrap_or(columns as i64), 1]);
            if rows > 1 {
                layout.require_disjoint(arg)?;
            }
            Ok::<_, Error>((layout.strides()[0], layout.required_len(arg)?))
        };
        let (target_stride, target_len) = tensor("target", rows, self.vocab, self.target_stride)?;
        let (neighbours_stride, neighbours_len) = tensor("neighbours", codes, self.neighbours, self.neighbours_stride)?;
        let plan = Plan {
            batch: self.batch,
            height: self.height,
            width: self.width,
            vocab: self.vocab,
            target_stride,
            target_len,
            neighbours: self.neighbours,
            neighbours_stride,
            neighbours_len,
            first_code,
            codes,
            radius: self.radius,
            threshold: self.threshold.to_bits(),
            guided: self.guided,
            multiprocessors: device.sm_count.max(1) as u64,
        };
        Ok(PooledVerifier { inner: plan, types: PhantomData })
    }
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) batch: u64,
    pub(super) height: u64,
    pub(super) width: u64,
    pub(super) vocab: u64,
    pub(super) target_stride: i64,
    pub(super) target_len: u64,
    pub(super) neighbours: u64,
    pub(super) neighbours_stride: i64,
    pub(super) neighbours_len: u64,
    pub(super) first_code: u64,
    pub(super) codes: u64,
    pub(super) radius: u64,
    pub(super) threshold: u32,
    pub(super) guided: bool,
    multiprocessors: u64,
}

impl Plan {
    pub(super) fn tokens(&self) -> u64 {
        self.height * self.width
    }

    pub(super) fn rows(&self) -> u64 {
        self.batch * self.tokens()
    }

    pub(super) fn blocks(&self) -> u32 {
        (self.multiprocessors * BLOCKS_A_MULTIPROCESSOR).min(self.rows()) as u32
    }

    /// Of the device; the host needs less.
    pub(super) fn workspace_bytes(&self) -> u64 {
        (self.rows() * 12).next_multiple_of(16) + u64::from(self.blocks()).max(1) * chunks(self.vocab) * 8
    }

    /// For elements of so many bytes.
    pub(super) fn traffic(&self, element: usize) -> Traffic {
        let sources = if self.guided { 2 } else { 1 };
        let read = self.rows() as u128 * sources * self.vocab as u128 * element as u128;
        Traffic { read: read.try_into().unwrap_or(u64::MAX), written: self.rows() + self.batch * 12 }
    }
}

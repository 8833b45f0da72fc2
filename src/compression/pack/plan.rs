//! Shapes and checks. Pure.

use core::marker::PhantomData;

use super::{Pack, check_numbers};
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::{Access, Layout};
use crate::packed::{Format, Rotation};

/// Blocks along y.
const MOST_SETS: u64 = 65_535;
/// The kernels count rows times heads in 32 bits.
const MOST: u64 = (1 << 31) - 1;

/// Describes a [`Pack`]; [`PackBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct PackBuilder<T, N> {
    format: Format,
    sets: u64,
    tokens: u64,
    heads: u64,
    dim: usize,
    kept: Option<u64>,
    counted: bool,
    inline: bool,
    given: bool,
    rotation: Option<Rotation>,
    input: Option<[i64; 3]>,
    codes: Option<[i64; 3]>,
    numbers: Option<[i64; 3]>,
    scales: Option<[i64; 2]>,
    kept_strides: Option<[i64; 2]>,
    counts: Option<[i64; 2]>,
    out: Option<[i64; 3]>,
    access: Access,
    types: PhantomData<(T, N)>,
}

impl<T: Float, N: Float> PackBuilder<T, N> {
    pub(super) fn new(format: Format, tokens: usize, heads: usize, dim: usize) -> Self {
        PackBuilder {
            format,
            sets: 1,
            tokens: tokens as u64,
            heads: heads as u64,
            dim,
            kept: None,
            counted: false,
            inline: false,
            given: false,
            rotation: None,
            input: None,
            codes: None,
            numbers: None,
            scales: None,
            kept_strides: None,
            counts: None,
            out: None,
            access: Access::Auto,
            types: PhantomData,
        }
    }

    /// Layers, sequences or branches packed at once; 1 if not given.
    pub fn sets(mut self, sets: usize) -> Self {
        self.sets = sets as u64;
        self
    }

    /// Row r of a head is token `kept[set, head, r]`: compaction and packing in one copy.
    pub fn kept(mut self, rows: usize) -> Self {
        self.kept = Some(rows as u64);
        self
    }

    /// A head has `counts[set, head]` rows; those after them are neither written nor read.
    pub fn counted(mut self) -> Self {
        self.counted = true;
        self
    }

    /// The numbers of a row lie in its slot ([`Format::inline_bytes`]), not in an array.
    pub fn inline(mut self) -> Self {
        self.inline = true;
        self
    }

    /// The scales of fp8 or int8 are given, `[sets, heads]`: strides of 0 make them one for a head, a set, or all.
    pub fn given_scales(mut self, strides: [i64; 2]) -> Self {
        (self.given, self.scales) = (true, Some(strides));
        self
    }

    /// Rotates rows before they are quantized, and back when they are unpacked.
    pub fn rotation(mut self, rotation: Rotation) -> Self {
        self.rotation = Some(rotation);
        self
    }

    /// Strides of `input` in elements, `[set, token, head]`; contiguous if not given.
    pub fn input_strides(mut self, strides: [i64; 3]) -> Self {
        self.input = Some(strides);
        self
    }

    /// Strides of `codes` in bytes, `[set, row, head]`; contiguous if not given.
    pub fn codes_strides(mut self, strides: [i64; 3]) -> Self {
        self.codes = Some(strides);
        self
    }

    /// Strides of `numbers` in elements, `[set, row, head]`, a row being a group of them for [`Format::Channel`]; contiguous if
    /// not given.
    pub fn numbers_strides(mut self, strides: [i64; 3]) -> Self {
        self.numbers = Some(strides);
        self
    }

    /// Strides of `kept` in elements, `[set, head]`; contiguous if not given.
    pub fn kept_strides(mut self, strides: [i64; 2]) -> Self {
        self.kept_strides = Some(strides);
        self
    }

    /// Strides of `counts` in elements, `[set, head]`; contiguous if not given.
    pub fn counts_strides(mut self, strides: [i64; 2]) -> Self {
        self.counts = Some(strides);
        self
    }

    /// Strides of `out` in elements, `[set, row, head]`; contiguous if not given.
    pub fn out_strides(mut self, strides: [i64; 3]) -> Self {
        self.out = Some(strides);
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
    /// [`Error::Size`] and [`Error::Unsupported`] for a `head_dim`, bits or a group that the format has not
    /// ([`Format::check`]), heads of 0, more than 65535 sets, 2^31 - 1 tokens or rows times heads; rows that are no multiple of the
    /// group of a [`Format::Channel`]; a rotation of a [`Format::Channel`]; inline numbers of more than one group; given scales
    /// of other formats than fp8 and int8; [`Error::DType`] for numbers of a type that the format has not; [`Error::Stride`] for
    /// negative strides, outputs that overlap, or strides that wide access or inline numbers do not allow;
    /// [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Pack<T, N>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        let refuse = |arg, what| Err(Error::Unsupported { arg, what });
        let (format, dim) = (self.format, self.dim);
        format.check(dim)?;
        if !self.given {
            check_numbers(format, N::DTYPE)?;
        }
        let channel = matches!(format, Format::Channel { .. });
        let rows = self.kept.unwrap_or(self.tokens);
        size("sets", self.sets, 0, MOST_SETS)?;
        size("heads", self.heads, 1, MOST)?;
        size("tokens", self.tokens, u64::from(self.kept.is_some_and(|rows| rows > 0)), MOST)?;
        size("rows * heads", rows.saturating_mul(self.heads), 0, MOST)?;
        if !rows.is_multiple_of(format.rows() as u64) {
            return refuse("rows", "whole groups: what is left waits until it is one");
        }
        if channel && self.rotation.is_some() {
            return refuse("rotation", "not of a format by channels");
        }
        if self.inline && (format.groups(dim) != 1 || channel) {
            return refuse("inline", "of formats with one group a row");
        }
        if self.given && !matches!(format, Format::Fp8 | Format::Int8) {
            return refuse("given_scales", "of fp8 and int8");
        }
        if self.given && self.inline {
            return refuse("inline", "not with given scales");
        }

        let width = dim as u64;
        let elements = |rows, strides: Option<[i64; 3]>| {
            let shape = [self.sets, rows, self.heads, width];
            strides.map_or(Layout::contiguous(shape), |[s, r, h]| Layout::strided(shape, [s, r, h, 1]))
        };
        let input = elements(self.tokens, self.input);
        let out = elements(rows, self.out);
        let inner = |rows, inner: usize, strides: Option<[i64; 3]>| {
            let shape = [self.sets, rows, self.heads, inner as u64];
            strides.map_or(Layout::contiguous(shape), |[s, r, h]| Layout::strided(shape, [s, r, h, 1]))
        };
        let slot = if self.inline { format.inline_bytes(dim) } else { format.code_bytes(dim) };
        let codes = inner(rows, slot, self.codes);
        let numbers = inner(rows / format.rows() as u64, format.groups(dim) * format.numbers(), self.numbers);
        let pair = |strides: Option<[i64; 2]>| {
            let shape = [self.sets, self.heads];
            strides.map_or(Layout::contiguous(shape), |strides| Layout::strided(shape, strides))
        };
        let kept_shape = [self.sets, self.heads, rows];
        let kept =
            self.kept_strides.map_or(Layout::contiguous(kept_shape), |[s, h]| Layout::strided(kept_shape, [s, h, 1]));
        let (scales, counts) = (pair(self.scales), pair(self.counts));
        codes.require_disjoint("codes")?;
        numbers.require_disjoint("numbers")?;
        out.require_disjoint("out")?;
        if self.inline {
            for (dim, &got) in codes.strides()[..3].iter().enumerate() {
                if got % 16 != 0 {
                    return Err(Error::Stride { arg: "codes", dim, got, need: "inline: multiples of 16" });
                }
            }
        }

        let needed = |there: bool, len: u64| if there { len } else { 0 };
        let mut plan = Plan {
            input_len: input.required_len("input")?,
            codes_len: codes.required_len("codes")?,
            numbers_len: needed(!self.inline && !self.given, numbers.required_len("numbers")?),
            scales_len: needed(self.given, scales.required_len("scales")?),
            kept_len: needed(self.kept.is_some(), kept.required_len("kept")?),
            counts_len: needed(self.counted, counts.required_len("counts")?),
            out_len: out.required_len("out")?,
            format,
            inline: self.inline,
            given: self.given,
            gathers: self.kept.is_some(),
            counted: self.counted,
            rotation: self.rotation,
            input,
            codes,
            numbers,
            scales,
            kept,
            counts,
            out,
            access: self.access,
            element: size_of::<T>(),
        };
        if plan.codes_len == 0 {
            // What nothing reaches need not be there.
            (plan.input_len, plan.numbers_len, plan.scales_len) = (0, 0, 0);
            (plan.kept_len, plan.counts_len, plan.out_len) = (0, 0, 0);
        }
        if self.access == Access::Wide {
            plan.check_wide("input", &plan.input)?;
            plan.check_wide("out", &plan.out)?;
        }
        Ok(Pack { inner: plan, types: PhantomData })
    }
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) format: Format,
    pub(super) inline: bool,
    pub(super) given: bool,
    pub(super) gathers: bool,
    pub(super) counted: bool,
    pub(super) rotation: Option<Rotation>,
    /// `[sets, tokens, heads, dim]`.
    pub(super) input: Layout<4>,
    /// `[sets, rows, heads, slot]`.
    pub(super) codes: Layout<4>,
    /// `[sets, rows / group, heads, groups * numbers]`.
    pub(super) numbers: Layout<4>,
    pub(super) scales: Layout<2>,
    pub(super) kept: Layout<3>,
    pub(super) counts: Layout<2>,
    /// `[sets, rows, heads, dim]`.
    pub(super) out: Layout<4>,
    pub(super) input_len: u64,
    pub(super) codes_len: u64,
    pub(super) numbers_len: u64,
    pub(super) scales_len: u64,
    pub(super) kept_len: u64,
    pub(super) counts_len: u64,
    pub(super) out_len: u64,
    pub(super) access: Access,
    /// Bytes of an unpacked element.
    element: usize,
}

impl Plan {
    pub(super) fn dim(&self) -> usize {
        self.out.shape()[3] as usize
    }

    /// Where a slot's own numbers begin.
    pub(super) fn inline_at(&self) -> usize {
        self.format.code_bytes(self.dim()).next_multiple_of(16)
    }

    /// What wide access asks of codes: a lane's share of 8 codes is one store, of 3 bits four lanes' are three words.
    pub(super) fn codes_align(&self) -> usize {
        match self.format.bits() {
            8 => 8,
            2 => 2,
            _ => 4,
        }
    }

    pub(super) fn check_inline(&self, codes: usize) -> Result<()> {
        if self.inline && self.codes_len > 0 && !codes.is_multiple_of(16) {
            return Err(Error::Alignment { arg: "codes", need: 16 });
        }
        Ok(())
    }

    /// Whether layouts allow wide access to the codes and to what is unpacked.
    pub(super) fn check_wide(&self, arg: &'static str, unpacked: &Layout<4>) -> Result<()> {
        let whole = [(arg, unpacked, 16 / self.element), ("codes", &self.codes, self.codes_align())];
        for (arg, layout, multiple) in whole {
            for (dim, &got) in layout.strides()[..3].iter().enumerate() {
                if got % multiple as i64 != 0 {
                    return Err(Error::Stride { arg, dim, got, need: "wide access needs multiples of 16 bytes" });
                }
            }
        }
        Ok(())
    }

    /// Of what is unpacked, packed, and of kept indices.
    pub(super) fn bytes(&self, element: usize, number: usize) -> [u64; 3] {
        let all = |shape: [u64; 4], size: usize| shape.iter().fold(size as u64, |all, &n| all.saturating_mul(n));
        let mut packed = all(self.codes.shape(), 1);
        if self.numbers_len > 0 {
            packed = packed.saturating_add(all(self.numbers.shape(), number));
        }
        let [sets, rows, heads, _] = self.codes.shape();
        let kept = if self.gathers { all([sets, rows, heads, 1], 4) } else { 0 };
        [all(self.out.shape(), element), packed, kept]
    }
}

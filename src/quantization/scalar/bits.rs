//! Bits between their forms: values by their signs, labels, integers.

use core::marker::PhantomData;

use super::{MOST_ROWS, size};
use crate::device::{Arch, Device, DeviceInfo};
use crate::dtype::{Code, Float};
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::philox;
use crate::plan::typed_plan;
use crate::quantization::multi_scale::{BIT_FLIP_DOMAIN, Token, TokenKind};
use crate::stream::{AsStream, Stream};
use crate::view::{In, Out};

const HERE: &str = "operands are on the stream's device";
const MOST_DIM: u64 = 4096;

/// Which channel is the most significant bit of an integer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum BitOrder {
    /// Channel 0: `sum of bit[k] 2^(dim - 1 - k)` (LFQ, Infinity).
    #[default]
    MsbFirst,
    /// The last channel: `sum of bit[k] 2^k`.
    LsbFirst,
}

/// Random flips of bits: bitwise self-correction, noise.
///
/// Bit `k` of row `r` is flipped where the uniform of word `k % 4` of `philox::block(seeds[r / rows_per_seed],
/// (first_row + r % rows_per_seed) * ceil(dim / 4) + k / 4, BIT_FLIP_DOMAIN, 0)` is below `rate`: what
/// [`MultiScale::encode_bits`](crate::quantization::MultiScale::encode_bits) flips, with `first_row` the tokens of
/// the scales before.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flips {
    /// The probability of a flip.
    pub rate: f32,
    /// Rows that one seed is for: the tokens of a batch entry.
    pub rows_per_seed: usize,
    /// What rows are counted from.
    pub first_row: u64,
}

/// Describes a conversion; [`BitsBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct BitsBuilder<I, O, C> {
    rows: u64,
    dim: u64,
    order: BitOrder,
    scale: Option<f32>,
    flips: Option<Flips>,
    types: PhantomData<(I, O, C)>,
}

/// A plan that quantizes vectors to bits, or brings bits from one form to others, in one pass.
///
/// Lookup-free quantization (MAGVIT-v2, arXiv 2310.05737; lucidrains' `lookup_free_quantization.py`) and binary
/// spherical quantization (arXiv 2406.07548; Infinity's `bsq.py`), whose norm changes no sign. The input's type says
/// what it is ([`Token`]): `f32`, `f16`, `bf16` are values `[rows, dim]`, whose bits are `x > 0`; `u8` are labels
/// `[rows, dim]`; `u16`, `u32`, `i64` are integers `[rows]` of `dim` bits. `O` is the type of the values made, `C` of
/// the integers made.
///
/// Values are `+scale` or `-scale`: `1 / sqrt(dim)` for BSQ, which is what there is if no scale is given; 1 for LFQ;
/// `2^-level` for residual LFQ. Zero and NaN give bit 0; a NaN stays a NaN among the values. The same bits on the
/// host and on every device.
///
/// ```
/// use nextscale::{DeviceInfo, In, Out, Stream, quantization::{Bits, BitsArgs}};
/// let (mut labels, mut codes) = ([0u8; 8], [0u16; 2]);
/// let plan = Bits::<f32, f32, u16>::builder(2, 4).build(&DeviceInfo::A100)?;
/// plan.run(&Stream::host(), BitsArgs {
///     input: In::host(&[0.5, -1.0, 0.0, 2.0, -3.0, 1.0, 1.0, -0.0]),
///     labels: Some(Out::host(&mut labels)),
///     values: None,
///     codes: Some(Out::host(&mut codes)),
///     seeds: None,
/// })?;
/// assert_eq!(labels, [1, 0, 0, 1, 0, 1, 1, 0]);
/// assert_eq!(codes, [0b1001, 0b0110]);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Bits<I, O, C> {
    inner: Plan,
    types: PhantomData<(I, O, C)>,
}
typed_plan!(Bits<I, O, C>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Plan {
    rows: u64,
    dim: u64,
    order: BitOrder,
    scale: u32,
    /// The rate's bits, rows a seed, first row.
    flips: Option<(u32, u64, u64)>,
}

/// The buffers of one conversion. See [`Bits`] for shapes.
#[derive(Debug)]
pub struct BitsArgs<'a, I, O, C>
where
    I: Token,
    O: Float,
    C: Code,
{
    /// Values, labels or integers.
    pub input: In<'a, I>,
    /// `[rows, dim]`: 0 or 1.
    pub labels: Option<Out<'a, u8>>,
    /// `[rows, dim]`: `+scale` or `-scale`.
    pub values: Option<Out<'a, O>>,
    /// `[rows]`; `dim` is at most the bits of `C`.
    pub codes: Option<Out<'a, C>>,
    /// `[ceil(rows / rows_per_seed)]`, bits of u64; needed for flips.
    pub seeds: Option<In<'a, i64>>,
}

impl<I: Token, O: Float, C: Code> BitsBuilder<I, O, C> {
    /// Of integers; channel 0 first if not given.
    pub fn order(mut self, order: BitOrder) -> Self {
        self.order = order;
        self
    }

    /// What a bit of 1 stands for; `1 / sqrt(dim)` if not given.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Flips bits on their way.
    pub fn flips(mut self, flips: Flips) -> Self {
        self.flips = Some(flips);
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for a `dim` outside 1 to 4096 or beyond the bits of an input of integers, more than 2^31 - 1
    /// rows, `rows_per_seed` of none; [`Error::Unsupported`] for a scale that is not finite or a rate outside 0 to 1;
    /// [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Bits<I, O, C>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let bits = if I::KIND == TokenKind::Codes { 8 * size_of::<I>() as u64 } else { MOST_DIM };
        size("dim", self.dim, 1, bits)?;
        size("rows", self.rows, 0, MOST_ROWS)?;
        let scale = self.scale.unwrap_or((1.0 / (self.dim as f64).sqrt()) as f32);
        if !scale.is_finite() {
            return Err(Error::Unsupported { arg: "scale", what: "a finite number" });
        }
        let mut flips = None;
        if let Some(Flips { rate, rows_per_seed, first_row }) = self.flips {
            size("rows_per_seed", rows_per_seed as u64, 1, i64::MAX as u64)?;
            size("first_row", first_row, 0, i64::MAX as u64 / 2)?;
            if !(0.0..=1.0).contains(&rate) {
                return Err(Error::Unsupported { arg: "rate", what: "a probability" });
            }
            flips = Some((rate.to_bits(), rows_per_seed as u64, first_row));
        }
        let inner = Plan { rows: self.rows, dim: self.dim, order: self.order, scale: scale.to_bits(), flips };
        Ok(Bits { inner, types: PhantomData })
    }
}

impl<I: Token, O: Float, C: Code> Bits<I, O, C> {
    /// A plan for `rows` vectors of `dim` bits.
    pub fn builder(rows: usize, dim: usize) -> BitsBuilder<I, O, C> {
        let (rows, dim) = (rows as u64, dim as u64);
        BitsBuilder { rows, dim, order: BitOrder::default(), scale: None, flips: None, types: PhantomData }
    }

    /// Converts on `stream`; on a CUDA stream it enqueues one kernel.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer missing, too short, misaligned, overlapping, on another device or
    /// ordered on another stream; [`Error::Size`] for integers of fewer bits than `dim`; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, args: BitsArgs<'_, I, O, C>) -> Result<()> {
        let stream = stream.as_stream();
        let Plan { rows, dim, flips, .. } = self.inner;
        if args.codes.is_some() {
            size("dim", dim, 1, 8 * size_of::<C>() as u64)?;
        }
        let elements = if I::KIND == TokenKind::Codes { rows } else { rows * dim };
        Operands::of(&stream)
            .input("input", &args.input, elements)?
            .output_if("labels", &args.labels, rows * dim)?
            .output_if("values", &args.values, rows * dim)?
            .output_if("codes", &args.codes, rows)?
            .input_needed("seeds", &args.seeds, flips.map_or(0, |(_, per_seed, _)| rows.div_ceil(per_seed)))?
            .finish()?;
        match stream.device() {
            Device::Host => {
                self.on_host(args);
                Ok(())
            }
            _ => self.on_cuda(&stream, &args),
        }
    }

    fn on_host(&self, mut args: BitsArgs<'_, I, O, C>) {
        let plan = &self.inner;
        let (dim, scale) = (plan.dim as usize, f32::from_bits(plan.scale));
        let input = args.input.as_host().expect(HERE);
        for row in 0..plan.rows as usize {
            let mut integer = 0u64;
            for k in 0..dim {
                let place = match plan.order {
                    BitOrder::MsbFirst => dim - 1 - k,
                    BitOrder::LsbFirst => k,
                };
                let at = row * dim + k;
                let value = if I::KIND == TokenKind::Codes { 0.0 } else { input[at].value() };
                let mut bit = match I::KIND {
                    TokenKind::Codes => input[row].code() as u64 >> place & 1 == 1,
                    _ => value > 0.0,
                };
                if let (Some((rate, per_seed, first)), Some(seeds)) = (plan.flips, &args.seeds) {
                    let (entry, row) = (row as u64 / per_seed, row as u64 % per_seed);
                    let position = (first + row) * plan.dim.div_ceil(4) + k as u64 / 4;
                    let seed = seeds.as_host().expect(HERE)[entry as usize] as u64;
                    let word = philox::block(seed, position, BIT_FLIP_DOMAIN, 0)[k % 4];
                    bit ^= philox::uniform(word) < f32::from_bits(rate);
                }
                if let Some(labels) = &mut args.labels {
                    labels.as_host().expect(HERE)[at] = bit.into();
                }
                if let Some(values) = &mut args.values {
                    let signed = if bit { scale } else { -scale };
                    values.as_host().expect(HERE)[at] = O::from_f32(if value.is_nan() { f32::NAN } else { signed });
                }
                integer |= u64::from(bit).checked_shl(place as u32).unwrap_or(0);
            }
            if let Some(codes) = &mut args.codes {
                codes.as_host().expect(HERE)[row] = bytemuck::cast_slice(&[integer])[0];
            }
        }
    }

    #[cfg(nxs_kernels)]
    fn on_cuda(&self, stream: &Stream<'_>, args: &BitsArgs<'_, I, O, C>) -> Result<()> {
        use crate::ffi;
        let plan = &self.inner;
        let (rate, per_seed, first) = plan.flips.unwrap_or((0, 1, 0));
        let seeds = args.seeds.as_ref().filter(|_| plan.flips.is_some());
        let params = ffi::nxs_bits_params {
            input: args.input.span().address as *const _,
            labels_or_null: crate::launch::address_mut(&args.labels),
            values_or_null: crate::launch::address_mut(&args.values),
            codes_or_null: crate::launch::address_mut(&args.codes),
            seeds_or_null: seeds.map_or(core::ptr::null(), |view| view.span().address as *const _),
            rows: plan.rows as i64,
            rows_per_seed: per_seed as i64,
            first_row: first as i64,
            dim: plan.dim as i32,
            order: match plan.order {
                BitOrder::MsbFirst => ffi::NXS_BITS_MSB_FIRST,
                BitOrder::LsbFirst => ffi::NXS_BITS_LSB_FIRST,
            } as i32,
            scale: f32::from_bits(plan.scale),
            flip_rate: f32::from_bits(rate),
            input_dtype: I::DTYPE as i32,
            values_dtype: O::DTYPE as i32,
            codes_dtype: C::DTYPE as i32,
        };
        crate::launch::launch("nxs_bits", stream, |handle| {
            // SAFETY: the operands are checked against the plan.
            unsafe { ffi::nxs_bits(&params, handle) }
        })
    }

    #[cfg(not(nxs_kernels))]
    fn on_cuda(&self, _stream: &Stream<'_>, _args: &BitsArgs<'_, I, O, C>) -> Result<()> {
        Err(Error::NotCompiled)
    }
}

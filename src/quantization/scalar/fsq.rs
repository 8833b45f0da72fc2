//! Finite scalar quantization, and residual FSQ.

use core::marker::PhantomData;

use super::{MOST_ROWS, capacity, size};
use crate::device::{Arch, Device, DeviceInfo};
use crate::dtype::{Code, Float};
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::{AsStream, Stream};
use crate::view::{In, Out};

const HERE: &str = "operands are on the stream's device";
const MOST_DIM: usize = crate::ffi::NXS_FSQ_MOST_DIM as usize;
const MOST_QUANTIZERS: usize = 16;
const MOST_CODES: u64 = 1 << 31;

/// How values are bounded before they are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum FsqBound {
    /// The paper's (arXiv 2309.15505): `tanh(z + shift) half - offset`, rounded half to even; levels stand for
    /// `(level - L / 2) / (L / 2)`.
    #[default]
    Tanh,
    /// lucidrains' `preserve_symmetry`: levels stand for -1 to 1 in even steps.
    Symmetric,
    /// The same without tanh: values are clamped to -1 to 1 (`bound_hard_clamp`, residual FSQ).
    Clamp,
}

impl FsqBound {
    const fn number(self) -> u32 {
        match self {
            FsqBound::Tanh => crate::ffi::NXS_FSQ_TANH,
            FsqBound::Symmetric => crate::ffi::NXS_FSQ_SYMMETRIC,
            FsqBound::Clamp => crate::ffi::NXS_FSQ_CLAMP,
        }
    }
}

/// Describes a quantization; [`FsqBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct FsqBuilder<Z, O, C> {
    rows: u64,
    levels: Vec<usize>,
    bound: FsqBound,
    scales: Vec<Vec<f32>>,
    soft_clamp: Option<Vec<f32>>,
    types: PhantomData<(Z, O, C)>,
}

/// A plan for finite scalar quantization: each of a few channels is rounded to one of its levels, and the levels
/// together are an index, the first channel least significant (lucidrains' `finite_scalar_quantization.py`).
///
/// `Z` is the type of the values quantized, `O` of those made, `C` of the indices. Without `z` it goes back from
/// indices to values.
///
/// With several quantizers (residual FSQ) each one quantizes what the ones before have left, divided by its scales,
/// and values are the sum. The scales are explicit because published versions differ: `levels^-q` now, `(levels -
/// 1)^-q` before; so is the soft clamp of the input, `tanh(z / c) c`, where `c = 1 + 1 / (levels - 1)` now and none
/// before.
///
/// **Arithmetic.** In f32, with a tanh within 2e-7; the same bits on the host and on every device. Levels are never
/// outside their range. A NaN has level 0, and stays a NaN among the values.
///
/// ```
/// use nextscale::{DeviceInfo, In, Out, Stream, quantization::{Fsq, FsqArgs}};
/// let (mut values, mut indices) = ([0f32; 3], [0u16; 1]);
/// let plan = Fsq::<f32, f32, u16>::builder(1, &[8, 5, 5]).build(&DeviceInfo::A100)?;
/// plan.run(&Stream::host(), FsqArgs {
///     z: Some(In::host(&[9.0, 0.0, -9.0])),
///     values: Some(Out::host(&mut values)),
///     indices: Some(Out::host(&mut indices)),
///     given: None,
///     flags: None,
/// })?;
/// assert_eq!(values, [0.75, 0.0, -1.0]);
/// assert_eq!(indices, [7 + 2 * 8 + 0 * 40]);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Fsq<Z, O, C> {
    inner: Plan,
    types: PhantomData<(Z, O, C)>,
}
typed_plan!(Fsq<Z, O, C>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Plan {
    rows: u64,
    dim: usize,
    quantizers: usize,
    levels: [i32; MOST_DIM],
    bound: FsqBound,
    /// Bits of the scales, quantizer after quantizer, and of the soft clamp.
    scales: [[u32; MOST_DIM]; MOST_QUANTIZERS],
    soft: [u32; MOST_DIM],
    codes: u64,
}

/// The buffers of one quantization. See [`Fsq`].
#[derive(Debug)]
pub struct FsqArgs<'a, Z, O, C>
where
    Z: Float,
    O: Float,
    C: Code,
{
    /// `[rows, dim]`; `None`: values are made from `given`.
    pub z: Option<In<'a, Z>>,
    /// `[rows, dim]`.
    pub values: Option<Out<'a, O>>,
    /// `[rows, quantizers]`; with `z`.
    pub indices: Option<Out<'a, C>>,
    /// `[rows, quantizers]`: indices to go back from; without `z`. One out of range is [`Error::CodeOutOfRange`] on
    /// the host; a kernel clamps it and sets [`Fsq::CODE_CLAMPED`].
    pub given: Option<In<'a, C>>,
    /// `[1]`, or `None`: bits are only ever set.
    pub flags: Option<Out<'a, u32>>,
}

impl<Z: Float, O: Float, C: Code> FsqBuilder<Z, O, C> {
    /// How values are bounded; as the paper does if not given.
    pub fn bound(mut self, bound: FsqBound) -> Self {
        self.bound = bound;
        self
    }

    /// The scales of each quantizer, one a channel; one quantizer of scale 1 if not given.
    pub fn scales(mut self, scales: &[Vec<f32>]) -> Self {
        self.scales = scales.to_vec();
        self
    }

    /// The input goes through `tanh(z / c) c` first, with a `c` for each channel.
    pub fn soft_clamp(mut self, clamp: &[f32]) -> Self {
        self.soft_clamp = Some(clamp.to_vec());
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for other than 1 to 16 channels or quantizers, levels outside 2 to 65536, a product of levels
    /// beyond 2^31 or what `C` can count, more than 2^31 - 1 rows; [`Error::Unsupported`] for scales or clamps of
    /// another number than channels, or that are not positive and finite; [`Error::UnsupportedDevice`] below compute
    /// capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Fsq<Z, O, C>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let dim = self.levels.len();
        size("dim", dim as u64, 1, MOST_DIM as u64)?;
        size("rows", self.rows, 0, MOST_ROWS)?;
        let scales = if self.scales.is_empty() { vec![vec![1.0; dim]] } else { self.scales };
        size("quantizers", scales.len() as u64, 1, MOST_QUANTIZERS as u64)?;
        let mut plan = Plan {
            rows: self.rows,
            dim,
            quantizers: scales.len(),
            levels: [0; MOST_DIM],
            bound: self.bound,
            scales: [[0; MOST_DIM]; MOST_QUANTIZERS],
            soft: [0; MOST_DIM],
            codes: 1,
        };
        for (to, &levels) in plan.levels.iter_mut().zip(&self.levels) {
            size("levels", levels as u64, 2, 65_536)?;
            *to = levels as i32;
            plan.codes = plan.codes.saturating_mul(levels as u64);
        }
        size("product of levels", plan.codes, 1, MOST_CODES.min(capacity::<C>()))?;
        let positive = |arg, from: &[f32], to: &mut [u32; MOST_DIM]| {
            let right = from.len() == dim && from.iter().all(|x| x.is_finite() && *x > 0.0);
            to.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_bits());
            if right { Ok(()) } else { Err(Error::Unsupported { arg, what: "a positive number for each channel" }) }
        };
        for (to, from) in plan.scales.iter_mut().zip(&scales) {
            positive("scales", from, to)?;
        }
        if let Some(clamp) = &self.soft_clamp {
            positive("soft_clamp", clamp, &mut plan.soft)?;
        }
        Ok(Fsq { inner: plan, types: PhantomData })
    }
}

impl<Z: Float, O: Float, C: Code> Fsq<Z, O, C> {
    /// Set in `flags` when a kernel clamped an index.
    pub const CODE_CLAMPED: u32 = crate::ffi::NXS_FLAG_CODE_CLAMPED;

    /// A plan for `rows` vectors with so many levels in each channel.
    pub fn builder(rows: usize, levels: &[usize]) -> FsqBuilder<Z, O, C> {
        FsqBuilder {
            rows: rows as u64,
            levels: levels.to_vec(),
            bound: FsqBound::default(),
            scales: Vec::new(),
            soft_clamp: None,
            types: PhantomData,
        }
    }

    /// Quantizes, or goes back from indices, on `stream`; on a CUDA stream it enqueues one kernel.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer missing, too short, misaligned, overlapping, on another device or
    /// ordered on another stream; on the host an index out of range; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, args: FsqArgs<'_, Z, O, C>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let (elements, indices) = (plan.rows * plan.dim as u64, plan.rows * plan.quantizers as u64);
        let back = args.z.is_none();
        if back && args.indices.is_some() {
            return Err(Error::Unsupported { arg: "indices", what: "made from z; without it they are given" });
        }
        if back && args.values.is_none() && elements > 0 {
            return Err(Error::Length { arg: "values", need: elements, got: 0 });
        }
        Operands::of(&stream)
            .input_if("z", &args.z, elements)?
            .output_if("values", &args.values, elements)?
            .output_if("indices", &args.indices, indices)?
            .input_needed("given", &args.given, if back { indices } else { 0 })?
            .output_if("flags", &args.flags, 1)?
            .finish()?;
        match stream.device() {
            Device::Host => plan.on_host(args),
            _ => plan.on_cuda(&stream, &args),
        }
    }
}

/// Within 2e-7 of tanh, by operations that kernels do bit for bit alike.
fn tanh(x: f32) -> f32 {
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return x;
    }
    if magnitude >= 9.5 {
        return 1f32.copysign(x);
    }
    let twice = magnitude + magnitude;
    const MAGIC: f32 = 12_582_912.0; // rounds to an integer
    let n = twice.mul_add(core::f32::consts::LOG2_E, MAGIC) - MAGIC;
    let r = n.mul_add(-1.428_606_8e-6, n.mul_add(-0.693_145_75, twice));
    let coefficients = [720.0f32, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0].map(|factorial| 1.0 / factorial);
    let e = coefficients.iter().fold(1f32 / 5040.0, |e, c| e.mul_add(r, *c));
    let e = e * f32::from_bits(((n as i32 + 127) as u32) << 23);
    let result = (e - 1.0) / (e + 1.0);
    if x < 0.0 { -result } else { result }
}

impl Plan {
    fn level(&self, k: usize, z: f32) -> f32 {
        let levels = self.levels[k] as f32;
        let level = match self.bound {
            FsqBound::Tanh => {
                let (count, halves) = (f64::from(self.levels[k]), (self.levels[k] / 2) as f32);
                let (half, offset) = ((count - 1.0) * 1.001 / 2.0, if self.levels[k] % 2 == 0 { 0.5 } else { 0.0 });
                let shift = (offset / half).atanh() as f32;
                tanh(z + shift).mul_add(half as f32, -(offset as f32)).round_ties_even() + halves
            }
            FsqBound::Symmetric => ((levels - 1.0) * 0.5).mul_add(tanh(z) + 1.0, 0.5).floor(),
            FsqBound::Clamp => ((levels - 1.0) * 0.5).mul_add(z.clamp(-1.0, 1.0) + 1.0, 0.5).floor(),
        };
        // A NaN stays one.
        if level < 0.0 {
            0.0
        } else if level > levels - 1.0 {
            levels - 1.0
        } else {
            level
        }
    }

    fn value(&self, k: usize, level: f32) -> f32 {
        let (halves, last) = ((self.levels[k] / 2) as f32, (self.levels[k] - 1) as f32);
        match self.bound {
            FsqBound::Tanh => (level - halves) / halves,
            FsqBound::Symmetric | FsqBound::Clamp => (level + level - last) / last,
        }
    }

    fn on_host<Z: Float, O: Float, C: Code>(&self, mut args: FsqArgs<'_, Z, O, C>) -> Result<()> {
        if let (None, Some(given)) = (&args.z, &args.given) {
            let given = &given.as_host().expect(HERE)[..self.rows as usize * self.quantizers];
            for (at, code) in given.iter().map(|code| code.to_i64()).enumerate() {
                if code < 0 || code as u64 >= self.codes {
                    return Err(Error::CodeOutOfRange { arg: "given", at: at as u64, code, entries: self.codes });
                }
            }
        }
        for row in 0..self.rows as usize {
            let (mut rest, mut sum) = ([0f32; MOST_DIM], [0f32; MOST_DIM]);
            if let Some(z) = &args.z {
                let z = &z.as_host().expect(HERE)[row * self.dim..][..self.dim];
                for (k, z) in z.iter().enumerate() {
                    let soft = f32::from_bits(self.soft[k]);
                    rest[k] = z.to_f32();
                    if soft > 0.0 {
                        rest[k] = tanh(rest[k] / soft) * soft;
                    }
                }
            }
            for q in 0..self.quantizers {
                let at = row * self.quantizers + q;
                let (mut index, mut basis) = (0, 1);
                let mut left = match (&args.z, &args.given) {
                    (None, Some(given)) => given.as_host().expect(HERE)[at].to_i64(),
                    _ => 0,
                };
                for k in 0..self.dim {
                    let scale = f32::from_bits(self.scales[q][k]);
                    let levels = i64::from(self.levels[k]);
                    let level = if args.z.is_some() {
                        let level = self.level(k, rest[k] / scale);
                        index += basis * level as i64; // 0 for a NaN
                        level
                    } else {
                        let level = left % levels;
                        left /= levels;
                        level as f32
                    };
                    basis *= levels;
                    let value = self.value(k, level);
                    rest[k] = (-value).mul_add(scale, rest[k]);
                    sum[k] = value.mul_add(scale, sum[k]);
                }
                if let Some(indices) = &mut args.indices {
                    indices.as_host().expect(HERE)[at] = C::from_i64(index).expect("the product of levels fits");
                }
            }
            if let Some(values) = &mut args.values {
                let values = &mut values.as_host().expect(HERE)[row * self.dim..][..self.dim];
                values.iter_mut().zip(sum).for_each(|(to, sum)| *to = O::from_f32(sum));
            }
        }
        Ok(())
    }

    #[cfg(nxs_kernels)]
    fn on_cuda<Z: Float, O: Float, C: Code>(&self, stream: &Stream<'_>, args: &FsqArgs<'_, Z, O, C>) -> Result<()> {
        use crate::ffi;
        use core::ptr::null_mut;
        let given = args.given.as_ref().filter(|_| args.z.is_none()).map(|view| view.span().address);
        let written = args.indices.as_ref().map(|view| view.span().address);
        let mut params = ffi::nxs_fsq_params {
            z_or_null: crate::launch::address(&args.z),
            values_or_null: crate::launch::address_mut(&args.values),
            indices_or_null: given.or(written).map_or(null_mut(), |address| address as *mut _),
            flags_or_null: crate::launch::address_mut(&args.flags),
            rows: self.rows as i64,
            dim: self.dim as i32,
            quantizers: self.quantizers as i32,
            levels: self.levels,
            soft: self.soft.map(f32::from_bits),
            bound: self.bound.number() as i32,
            z_dtype: Z::DTYPE as i32,
            values_dtype: O::DTYPE as i32,
            indices_dtype: C::DTYPE as i32,
            ..ffi::nxs_fsq_params::default()
        };
        for (to, from) in params.scales.iter_mut().zip(self.scales.iter().flatten()) {
            *to = f32::from_bits(*from);
        }
        if args.z.is_some() && args.values.is_none() && args.indices.is_none() {
            return Ok(());
        }
        crate::launch::launch("nxs_fsq", stream, |handle| {
            // SAFETY: the operands are checked against the plan; indices are clamped. Given indices are only read.
            unsafe { ffi::nxs_fsq(&params, handle) }
        })
    }

    #[cfg(not(nxs_kernels))]
    fn on_cuda<Z: Float, O: Float, C: Code>(&self, _: &Stream<'_>, _: &FsqArgs<'_, Z, O, C>) -> Result<()> {
        let _ = self.bound.number();
        Err(Error::NotCompiled)
    }
}

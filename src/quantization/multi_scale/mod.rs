//! Multi-scale residual quantizers: steps, decoding and encoding.

mod cuda;
mod encode;
mod host;
mod phi;
mod plan;

pub use phi::{PhiTable, pack_phi};
pub use plan::{Cut, MultiScaleBuilder, Next, Up};

use core::marker::PhantomData;

use crate::device::Device;
use crate::dtype::{Code, Element, Float, bf16, f16};
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::{Traffic, typed_plan};
use crate::stream::{AsStream, Stream};
use crate::view::{In, Out};
use plan::Plan;

/// The side lengths of the scales of published models, in tokens; their maps are square.
pub mod schedules {
    /// VAR at 256 pixels: 680 tokens.
    pub const VAR_256: [usize; 10] = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16];
    /// VAR at 512 pixels: 2240 tokens.
    pub const VAR_512: [usize; 10] = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32];
    /// VAR and HART at 1024 pixels: 9451 tokens.
    pub const VAR_1024: [usize; 14] = [1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64];
    /// Infinity at one megapixel: 10,521 tokens.
    pub const INFINITY_1M: [usize; 13] = [1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64];
    /// Infinity at a quarter of a megapixel.
    pub const INFINITY_0_25M: [usize; 10] = [1, 2, 4, 6, 8, 12, 16, 20, 24, 32];
    /// Infinity at 0.06 megapixels: 521 tokens.
    pub const INFINITY_0_06M: [usize; 7] = [1, 2, 4, 6, 8, 12, 16];

    /// A schedule of square scales.
    pub fn square(sides: &[usize]) -> Vec<(usize, usize)> {
        sides.iter().map(|&side| (side, side)).collect()
    }
}

/// What a type of tokens is to the quantizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenKind {
    /// Rows of the codebook, `[batch, tokens]`.
    Codes,
    /// Rows themselves, `[batch, tokens, width]`.
    Embeddings,
    /// Bit labels, `[batch, tokens, width]`: 0, or anything else for 1.
    Bits,
}

/// Types of tokens: `u16`, `u32`, `i64` are codes, `f32`, [`struct@f16`], [`bf16`] embeddings, `u8` bits.
pub trait Token: Element {
    /// What it is.
    const KIND: TokenKind;
    /// A code; 0 for what is none.
    fn code(self) -> i64;
    /// An element of an embedding; a bit as 0 or 1; 0 for a code.
    fn value(self) -> f32;
}
macro_rules! tokens {
    ($($type:ty => $kind:ident, $code:expr, $value:expr;)*) => {$(
        impl Token for $type {
            const KIND: TokenKind = TokenKind::$kind;
            fn code(self) -> i64 { $code(self) }
            fn value(self) -> f32 { $value(self) }
        }
    )*};
}
tokens! {
    u16 => Codes, Code::to_i64, |_| 0.0;
    u32 => Codes, Code::to_i64, |_| 0.0;
    i64 => Codes, Code::to_i64, |_| 0.0;
    f32 => Embeddings, |_| 0, Float::to_f32;
    f16 => Embeddings, |_| 0, Float::to_f32;
    bf16 => Embeddings, |_| 0, Float::to_f32;
    u8 => Bits, |_| 0, |bit: u8| f32::from(u8::from(bit != 0));
}

/// A plan for a quantizer whose scales add up to one map: VAR's (arXiv 2404.02905, `models/quant.py`), HART's,
/// Infinity's (arXiv 2412.04431, `multiscale_bsq.py`), and, with [`Next::Tokens`], FlexVAR's.
///
/// ```text
/// f_hat = f_hat + phi(resize(tokens of the scale -> the map's size));  next = resize(f_hat -> the next scale's size)
/// ```
///
/// The schedule of scales is the plan's: of any number up to 32 and any sizes, the last that of the map. `T` is the
/// type of the tokens ([`Token`]), `O` that of the next scale's input.
///
/// | operand | shape | |
/// |---|---|---|
/// | `tokens` | codes `[batch, l]`, embeddings or bits `[batch, l, width]` | rows of the grid one after the other |
/// | `codebook` | `[entries, channels]` f32 | where tokens are codes |
/// | `phi` | what [`pack_phi`] returns | 16-byte aligned; with a phi table |
/// | `f_hat` | `[batch, channels, height, width]` f32 | the running map |
/// | `next` | `[repeat, batch, l_next, width]` of `O` | token-major, as a transformer reads it |
///
/// All are contiguous. `width` is `channels`, with a patch of 2 four times that.
///
/// **Arithmetic.** Positions and weights of the resizing are PyTorch's (`align_corners=False`), from exact fractions.
/// The kernels sum in f32, the host in f64; the map is f32 on both. After ten scales it is within 2e-6 of the exact
/// one, relative to its greatest element. Bitwise repeatable, and independent of the batch. A NaN stays in its image.
///
/// **Codes out of range.** The host returns [`Error::CodeOutOfRange`] and writes nothing. A kernel clamps the code to
/// the nearest entry and sets [`MultiScale::CODE_CLAMPED`] in `flags`.
///
/// ```
/// use nextscale::{DeviceInfo, In, Out, Stream, quantization::{FHat, MultiScale, Next, StepArgs, Up}};
/// let stream = Stream::host();
/// // Two channels, scales of 1x1 and 2x2 bits, as Infinity adds them up.
/// let plan = MultiScale::<u8, f32>::builder(2, (2, 2), &[(1, 1), (2, 2)]).up(Up::Bilinear).next(Next::Bilinear);
/// let plan = plan.bit_scale(0.5).build(&DeviceInfo::of(&stream)?)?;
/// let (mut f_hat, mut next) = ([0f32; 8], [0f32; 8]);
/// plan.step(&stream, StepArgs {
///     scale: 0,
///     tokens: In::host(&[1, 0]),
///     codebook: None,
///     phi: None,
///     f_hat: Some(FHat::FromZero(Out::host(&mut f_hat))),
///     next: Some(Out::host(&mut next)),
///     flags: None,
/// })?;
/// assert_eq!(f_hat, [0.5, 0.5, 0.5, 0.5, -0.5, -0.5, -0.5, -0.5]);
/// assert_eq!(next, [0.5, -0.5, 0.5, -0.5, 0.5, -0.5, 0.5, -0.5]);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct MultiScale<T, O> {
    inner: Plan,
    types: PhantomData<(T, O)>,
}
typed_plan!(MultiScale<T, O>);

/// The running map of a step.
#[derive(Debug)]
pub enum FHat<'a> {
    /// Read and written in place.
    InPlace(Out<'a, f32>),
    /// Zero before, so only written: for the first scale.
    FromZero(Out<'a, f32>),
    /// Read from one buffer, written to another: two that take turns. Without a phi and with [`Next::Bilinear`] the
    /// kernel then has no barrier and more blocks, which is fastest.
    Between(In<'a, f32>, Out<'a, f32>),
}

impl<'a> FHat<'a> {
    /// The same buffer, once it was written.
    fn in_place(self) -> Self {
        let (FHat::InPlace(map) | FHat::FromZero(map) | FHat::Between(_, map)) = self;
        FHat::InPlace(map)
    }

    /// On the host: what was written.
    fn written(&mut self) -> &[f32] {
        let (FHat::InPlace(map) | FHat::FromZero(map) | FHat::Between(_, map)) = self;
        map.as_host().expect("operands are on the stream's device")
    }
}

/// The buffers of one step. See [`MultiScale`] for shapes.
#[derive(Debug)]
pub struct StepArgs<'a, T, O>
where
    T: Token,
    O: Float,
{
    /// Which scale of the schedule, from 0.
    pub scale: usize,
    /// Of this scale.
    pub tokens: In<'a, T>,
    /// Where tokens are codes.
    pub codebook: Option<In<'a, f32>>,
    /// With a phi table.
    pub phi: Option<In<'a, f32>>,
    /// Needed, except with [`Next::Tokens`] before the last scale, where it is left alone.
    pub f_hat: Option<FHat<'a>>,
    /// The next scale's input; not after the last scale.
    pub next: Option<Out<'a, O>>,
    /// `[1]`, or `None`: bits are only ever set.
    pub flags: Option<Out<'a, u32>>,
}

/// The buffers of a decode. See [`MultiScale`] for shapes.
#[derive(Debug)]
pub struct DecodeArgs<'a, T, O>
where
    T: Token,
    O: Float,
{
    /// Of all scales, in each batch entry one after the other.
    pub tokens: In<'a, T>,
    /// Where tokens are codes.
    pub codebook: Option<In<'a, f32>>,
    /// With a phi table.
    pub phi: Option<In<'a, f32>>,
    /// `[batch, channels, height, width]`, or with `prefixes` `[scales, batch, channels, height, width]`.
    pub f_hat: Out<'a, f32>,
    /// The map after every scale, not only after the last.
    pub prefixes: bool,
    /// `[batch, l of scales 1 and up, width]`: the inputs of all scales but the first, for teacher forcing. Not
    /// repeated; not together with `prefixes`.
    pub next: Option<Out<'a, O>>,
    /// `[1]`, or `None`: bits are only ever set.
    pub flags: Option<Out<'a, u32>>,
}

/// The buffers of an encode to codes. See [`MultiScale`] for shapes.
#[derive(Debug)]
pub struct EncodeArgs<'a, C>
where
    C: Code,
{
    /// `[batch, channels, height, width]`: what the encoder made, after `quant_conv`.
    pub f: In<'a, f32>,
    /// `[entries, channels]`: the rows that are added up.
    pub codebook: In<'a, f32>,
    /// `[entries, channels]`: the rows that are searched, if others. With them the vectors searched for are divided
    /// by their norm (at least 1e-12), so normalised rows make the search by cosine (VAR's `using_znorm`).
    pub search: Option<In<'a, f32>>,
    /// With a phi table.
    pub phi: Option<In<'a, f32>>,
    /// `[batch, l of all scales]`.
    pub codes: Out<'a, C>,
    /// `[batch, channels, height, width]`: the map that the codes add up to.
    pub f_hat: Out<'a, f32>,
    /// [`MultiScale::encode_workspace_bytes`], 256-byte aligned.
    pub workspace: Option<Out<'a, u8>>,
}

/// The buffers of an encode to bits. See [`MultiScale`] for shapes.
#[derive(Debug)]
pub struct EncodeBitsArgs<'a, O>
where
    O: Float,
{
    /// `[batch, channels, height, width]`.
    pub f: In<'a, f32>,
    /// `[batch, l of all scales, width]`: 1 where what is left is above zero; 0 for zero and NaN.
    pub labels: Out<'a, u8>,
    /// The labels with bits flipped, which the map is then made from (bitwise self-correction: flip and requantise).
    pub flips: Option<FlipArgs<'a>>,
    /// `[batch, channels, height, width]`: the map that the (flipped) bits add up to.
    pub f_hat: Out<'a, f32>,
    /// `[batch, l of scales 1 and up, width]`: the inputs of all scales but the first, as [`Next`] says. Not
    /// repeated.
    pub next: Option<Out<'a, O>>,
}

/// Random flips of bit labels.
///
/// The bit of element `e` of token `t`, counted over the scales, is flipped where the uniform of word `e % 4` of
/// `philox::block(seed, t * ceil(width / 4) + e / 4, BIT_FLIP_DOMAIN, 0)` is below the scale's rate.
#[derive(Debug)]
pub struct FlipArgs<'a> {
    /// `[batch, l of all scales, width]`.
    pub flipped: Out<'a, u8>,
    /// `[batch]`, bits of u64: what one entry draws does not depend on the others.
    pub seeds: In<'a, i64>,
    /// Of each scale: the probability of a flip.
    pub rates: &'a [f32],
}

/// The Philox domain of flips.
pub const BIT_FLIP_DOMAIN: u32 = crate::ffi::NXS_DOMAIN_BIT_FLIP;

/// One pass over some scales: one launch.
struct Call<'c, 't, 'm, 'o, T: Token, O: Float> {
    /// Scales `first..first + scales`; `tokens` starts with the first one's, batch entries `tokens_stride` apart.
    first: usize,
    scales: usize,
    tokens: Option<&'c In<'t, T>>,
    tokens_at: usize,
    tokens_stride: usize,
    codebook: Option<&'c In<'m, f32>>,
    phi: Option<&'c In<'m, f32>>,
    f_hat: Option<&'c mut FHat<'m>>,
    prefixes: bool,
    next: Option<(&'c mut Out<'o, O>, usize, usize)>,
    repeat: usize,
    flags: Option<&'c Out<'m, u32>>,
}

impl<T: Token, O: Float> MultiScale<T, O> {
    /// Set in `flags` when a kernel clamped a code.
    pub const CODE_CLAMPED: u32 = crate::ffi::NXS_FLAG_CODE_CLAMPED;

    /// A plan for maps of `channels` channels and `(height, width)` pixels, and the `(height, width)` of each scale's
    /// grid of tokens.
    pub fn builder(channels: usize, size: (usize, usize), schedule: &[(usize, usize)]) -> MultiScaleBuilder<T, O> {
        MultiScaleBuilder::new(channels, size, schedule)
    }

    /// How the kernel of whole channels cuts its work up.
    pub fn cut(&self) -> Cut {
        self.inner.cut
    }

    /// Tokens of a scale, or `None` beyond the last.
    pub fn tokens(&self, scale: usize) -> Option<usize> {
        self.inner.scales.get(scale).map(|scale| scale.tokens as usize)
    }

    /// Tokens of all scales.
    pub fn all_tokens(&self) -> usize {
        self.inner.tokens as usize
    }

    /// The bytes that a step must move: tokens and maps, and the next scale's input. The codebook and the phis, which L2
    /// holds, are not among them.
    ///
    /// # Errors
    /// [`Error::Size`] for a scale that is not there.
    pub fn traffic(&self, scale: usize) -> Result<Traffic> {
        self.check_scale(scale)?;
        let width = if T::KIND == TokenKind::Codes { 1 } else { self.inner.token_width() };
        let map = self.inner.next != Next::Tokens || scale + 1 == self.inner.scales.len();
        Ok(self.inner.traffic(scale, width * size_of::<T>() as u64, size_of::<O>() as u64, map))
    }

    fn check_scale(&self, scale: usize) -> Result<()> {
        let max = self.inner.scales.len() as u64 - 1;
        if scale as u64 > max {
            return Err(Error::Size { arg: "scale", got: scale as u64, min: 0, max });
        }
        Ok(())
    }

    fn token_elements(&self) -> usize {
        if T::KIND == TokenKind::Codes { 1 } else { self.inner.token_width() as usize }
    }

    /// What the codebook and the phis must hold.
    fn constants(&self, any_phi: bool) -> (u64, u64) {
        let plan = &self.inner;
        let codebook = if T::KIND == TokenKind::Codes { plan.entries * plan.channels } else { 0 };
        let used = plan.batch > 0;
        (if used { codebook } else { 0 }, if used && any_phi { plan.phi_len() } else { 0 })
    }

    /// Adds a scale and makes the next one's input, on a CUDA stream with one kernel.
    ///
    /// # Errors
    /// Nothing was launched or written: a scale that is not there, a next after the last scale, a buffer missing, too
    /// short, misaligned, overlapping, on another device or ordered on another stream; on the host a code out of
    /// range; on CUDA what CUDA said.
    pub fn step<S: AsStream + ?Sized>(&self, stream: &S, mut args: StepArgs<'_, T, O>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        self.check_scale(args.scale)?;
        let (scale, last) = (plan.scales[args.scale], args.scale + 1 == plan.scales.len());
        if last && args.next.is_some() {
            return Err(Error::Unsupported { arg: "next", what: "there is none after the last scale" });
        }
        let has_map = plan.next != Next::Tokens || last;
        let (codebook, phi) = self.constants(plan.phi[args.scale] >= 0);
        let tokens = plan.batch * scale.tokens * self.token_elements() as u64;
        let next = plan.scales.get(args.scale + 1).map_or(0, |next| next.tokens);
        let next = plan.repeat * plan.batch * next * plan.token_width();
        let operands = Operands::of(&stream)
            .input("tokens", &args.tokens, tokens)?
            .input_needed("codebook", &args.codebook, codebook)?
            .input_needed("phi", &args.phi, phi)?
            .output_if("next", &args.next, next)?
            .output_if("flags", &args.flags, 1)?;
        let map = if has_map { plan.map_len() } else { 0 };
        match &args.f_hat {
            Some(FHat::InPlace(f_hat) | FHat::FromZero(f_hat)) => operands.output("f_hat", f_hat, map)?,
            Some(FHat::Between(before, after)) => operands.input("f_hat", before, map)?.output("f_hat", after, map)?,
            None if map > 0 => return Err(Error::Length { arg: "f_hat", need: map, got: 0 }),
            None => operands,
        }
        .finish()?;
        if plan.batch == 0 {
            return Ok(());
        }
        let call = Call {
            first: args.scale,
            scales: 1,
            tokens: Some(&args.tokens),
            tokens_at: 0,
            tokens_stride: scale.tokens as usize * self.token_elements(),
            codebook: args.codebook.as_ref(),
            phi: args.phi.as_ref(),
            f_hat: if has_map { args.f_hat.as_mut() } else { None },
            prefixes: false,
            next: args.next.as_mut().map(|next| (next, 0, (next_stride(plan, args.scale)) as usize)),
            repeat: plan.repeat as usize,
            flags: args.flags.as_ref(),
        };
        self.call(&stream, call)
    }

    fn call(&self, stream: &Stream<'_>, call: Call<'_, '_, '_, '_, T, O>) -> Result<()> {
        match stream.device() {
            Device::Host => host::run(&self.inner, call),
            _ => cuda::run(&self.inner, stream, call),
        }
    }

    /// Adds all scales up, on a CUDA stream with one kernel, or with one a scale if inputs are asked for.
    ///
    /// # Errors
    /// As [`MultiScale::step`]; [`Error::Unsupported`] for inputs together with prefixes.
    pub fn decode<S: AsStream + ?Sized>(&self, stream: &S, args: DecodeArgs<'_, T, O>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let (scales, elements) = (plan.scales.len(), self.token_elements());
        if args.prefixes && args.next.is_some() {
            return Err(Error::Unsupported { arg: "next", what: "not together with prefixes" });
        }
        let (codebook, phi) = self.constants(plan.phi.iter().any(|&phi| phi >= 0));
        let maps = if args.prefixes { scales as u64 } else { 1 };
        let next = plan.batch * plan.input_tokens() * plan.token_width();
        Operands::of(&stream)
            .input("tokens", &args.tokens, plan.batch * plan.tokens * elements as u64)?
            .input_needed("codebook", &args.codebook, codebook)?
            .input_needed("phi", &args.phi, phi)?
            .output("f_hat", &args.f_hat, maps * plan.map_len())?
            .output_if("next", &args.next, next)?
            .output_if("flags", &args.flags, 1)?
            .finish()?;
        if plan.batch == 0 {
            return Ok(());
        }
        if stream.device() == Device::Host {
            host::check_codes(plan, &args.tokens, 0..scales, 0, plan.tokens as usize * elements)?;
        }
        let DecodeArgs { tokens, codebook, phi, f_hat, prefixes, mut next, flags } = args;
        let mut f_hat = FHat::FromZero(f_hat);
        let calls = if next.is_some() { scales } else { 1 };
        for call in 0..calls {
            if call == 1 {
                f_hat = f_hat.in_place();
            }
            // With inputs a scale at a time, else all. Of scales that do not add up only the last makes the map.
            let (first, taken) = match (calls, plan.next) {
                (1, Next::Tokens) if !prefixes => (scales - 1, 1),
                (1, _) => (0, scales),
                _ => (call, 1),
            };
            let has_map = plan.next != Next::Tokens || calls == 1 || call + 1 == scales;
            let first_token = plan.scales[first].first as usize;
            let input = plan.scales.get(call + 1).map_or(0, |next| next.first - plan.scales[0].tokens);
            let width = plan.token_width() as usize;
            let next = if call + 1 < scales { next.as_mut() } else { None };
            self.call(
                &stream,
                Call {
                    first,
                    scales: taken,
                    tokens: Some(&tokens),
                    tokens_at: first_token * elements,
                    tokens_stride: plan.tokens as usize * elements,
                    codebook: codebook.as_ref(),
                    phi: phi.as_ref(),
                    f_hat: has_map.then_some(&mut f_hat),
                    prefixes,
                    next: next.map(|next| (next, input as usize * width, plan.input_tokens() as usize * width)),
                    repeat: 1,
                    flags: flags.as_ref(),
                },
            )?;
        }
        Ok(())
    }
}

fn next_stride(plan: &Plan, scale: usize) -> u64 {
    plan.scales.get(scale + 1).map_or(0, |next| next.tokens * plan.token_width())
}

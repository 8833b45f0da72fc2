use core::marker::PhantomData;

use super::{require_device, size};
use crate::device::{Device, DeviceInfo};
use crate::dtype::Float;
use crate::error::Result;
use crate::launch::Operands;
use crate::layout::Layout;
use crate::plan::typed_plan;
use crate::stream::{AsStream, Stream};
use crate::verification::Traffic;
use crate::verification::host_rows::{distribution, guide, said_of};
use crate::verification::rows::{Domain, Partial, Scale, Shape, Truncation, chunks, uniforms};
use crate::view::{In, Out};

const HERE: &str = "operands are on the stream's device";
const BLOCKS_A_MULTIPROCESSOR: u64 = 2;

/// A plan that draws a token of each row of two heads, which a gate mixes before anything else (FlashAR's horizontal
/// and vertical heads): `second + gate (first - second)`, in f32, and -inf where either is.
///
/// | operand | shape | |
/// |---|---|---|
/// | `first`, `second` | `[rows, vocab]` | raw logits, `T`: f32, f16, bf16; a stride between rows; vocab up to 2^24 |
/// | `gate` | `[rows]` f32 | 1: the first head alone |
/// | `temperature`, `top_k`, `top_p`, `min_p`, `seeds`, `positions` | `[rows]`, optional | as those of [`DraftSample`](crate::verification::DraftSample) |
/// | `uniforms` | `[rows, 3]` f32, optional | of `[0, 1)`, in place of seeds |
/// | `tokens` | `[rows]` i32 | |
/// | `stats` | `[rows, 4]` f32, optional | as [`DraftSample`](crate::verification::DraftSample)'s, of the mixed row |
/// | `status` | `[rows]` u32 | bits of [`status`](crate::verification::status), the row being the target |
///
/// Everything is the same bit for bit on the host and on every device, in any batch. `workspace` may hold anything.
pub struct GatedSample<T> {
    inner: Plan,
    types: PhantomData<T>,
}
typed_plan!(GatedSample<T>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Plan {
    rows: u64,
    vocab: u64,
    stride: i64,
    len: u64,
    row_in_step: u32,
    fallback: i32,
    multiprocessors: u64,
}

/// Describes a sampler; [`GatedSampleBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct GatedSampleBuilder<T> {
    rows: u64,
    vocab: u64,
    stride: Option<i64>,
    row_in_step: u32,
    fallback: i32,
    types: PhantomData<T>,
}

impl<T: Float> GatedSampleBuilder<T> {
    /// Elements from one row of either head to the next; `vocab` if not given.
    pub fn row_stride(mut self, stride: i64) -> Self {
        self.stride = Some(stride);
        self
    }

    /// Which token of its step this is; 0 if not given. Its position is that of the step and this.
    pub fn row_in_step(mut self, row: u32) -> Self {
        self.row_in_step = row;
        self
    }

    /// The token in place of one that cannot be drawn; 0 if not given.
    pub fn fallback_token(mut self, token: i32) -> Self {
        self.fallback = token;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`](crate::Error::Size) for `vocab` outside 1 to 2^24, `rows` above 2^20, `row_in_step` above 1023;
    /// [`Error::Stride`](crate::Error::Stride) for rows that overlap;
    /// [`Error::UnsupportedDevice`](crate::Error::UnsupportedDevice) below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<GatedSample<T>> {
        require_device(device)?;
        size("vocab", self.vocab, 1, 1 << 24)?;
        size("rows", self.rows, 0, 1 << 20)?;
        size("row_in_step", self.row_in_step.into(), 0, 1023)?;
        let stride = self.stride.unwrap_or(self.vocab as i64);
        let layout = Layout::strided([self.rows, self.vocab], [stride, 1]);
        if self.rows > 1 {
            layout.require_disjoint("first")?;
        }
        let inner = Plan {
            rows: self.rows,
            vocab: self.vocab,
            stride,
            len: layout.required_len("first")?,
            row_in_step: self.row_in_step,
            fallback: self.fallback,
            multiprocessors: device.sm_count.max(1) as u64,
        };
        Ok(GatedSample { inner, types: PhantomData })
    }
}

/// The buffers of one run. See [`GatedSample`] for shapes.
#[derive(Debug)]
pub struct GatedSampleArgs<'a, T>
where
    T: Float,
{
    /// `[rows, vocab]`.
    pub first: In<'a, T>,
    /// `[rows, vocab]`.
    pub second: In<'a, T>,
    /// `[rows]`.
    pub gate: In<'a, f32>,
    /// `[rows]`; 1 if not given.
    pub temperature: Option<In<'a, f32>>,
    /// `[rows]`; off if not given.
    pub top_k: Option<In<'a, i32>>,
    /// `[rows]`; off if not given.
    pub top_p: Option<In<'a, f32>>,
    /// `[rows]`; off if not given.
    pub min_p: Option<In<'a, f32>>,
    /// `[rows]`; 0 if not given.
    pub seeds: Option<In<'a, i64>>,
    /// `[rows]`; 0 if not given.
    pub positions: Option<In<'a, i64>>,
    /// `[rows, 3]`; drawn if not given.
    pub uniforms: Option<In<'a, f32>>,
    /// `[rows]`.
    pub tokens: Out<'a, i32>,
    /// `[rows, 4]`.
    pub stats: Option<Out<'a, f32>>,
    /// `[rows]`.
    pub status: Out<'a, u32>,
    /// [`GatedSample::workspace_bytes`], 256-byte aligned.
    pub workspace: Out<'a, u8>,
}

impl<T: Float> GatedSample<T> {
    /// A plan for `rows` rows of each head.
    pub fn builder(rows: usize, vocab: usize) -> GatedSampleBuilder<T> {
        let (rows, vocab) = (rows as u64, vocab as u64);
        GatedSampleBuilder { rows, vocab, stride: None, row_in_step: 0, fallback: 0, types: PhantomData }
    }

    /// The bytes that any kernel must move: each row of both heads once, and the outputs without `stats`.
    pub fn traffic(&self) -> Traffic {
        let read = 2 * self.inner.rows as u128 * self.inner.vocab as u128 * size_of::<T>() as u128;
        Traffic { read: read.try_into().unwrap_or(u64::MAX), written: self.inner.rows * 8 }
    }

    fn blocks(&self) -> u64 {
        (self.inner.multiprocessors * BLOCKS_A_MULTIPROCESSOR).min(self.inner.rows)
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        self.blocks().max(1) * chunks(self.inner.vocab) * 8
    }

    /// Draws on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: GatedSampleArgs<'_, T>) -> Result<()> {
        let stream = stream.as_stream();
        let rows = self.inner.rows;
        Operands::of(&stream)
            .input("first", &args.first, self.inner.len)?
            .input("second", &args.second, self.inner.len)?
            .input("gate", &args.gate, rows)?
            .input_if("temperature", &args.temperature, rows)?
            .input_if("top_k", &args.top_k, rows)?
            .input_if("top_p", &args.top_p, rows)?
            .input_if("min_p", &args.min_p, rows)?
            .input_if("seeds", &args.seeds, rows)?
            .input_if("positions", &args.positions, rows)?
            .input_if("uniforms", &args.uniforms, rows * 3)?
            .output("tokens", &args.tokens, rows)?
            .output_if("stats", &args.stats, rows * 4)?
            .output("status", &args.status, rows)?
            .workspace(&args.workspace, self.workspace_bytes())?
            .finish()?;
        match stream.device() {
            Device::Host => {
                self.run_on_host(&mut args);
                Ok(())
            }
            _ => self.run_on_cuda(&stream, &args),
        }
    }

    fn run_on_host(&self, args: &mut GatedSampleArgs<'_, T>) {
        let plan = &self.inner;
        let (first, second) = (args.first.as_host().expect(HERE), args.second.as_host().expect(HERE));
        let gate = args.gate.as_host().expect(HERE);
        let number = |view: &Option<In<'_, f32>>, r: usize, otherwise: f32| {
            view.as_ref().map_or(otherwise, |view| view.as_host().expect(HERE)[r])
        };
        let word = |view: &Option<In<'_, i64>>, r: usize| {
            view.as_ref().map_or(0, |view| view.as_host().expect(HERE)[r] as u64)
        };
        let given = args.uniforms.as_ref().map(|view| view.as_host().expect(HERE));
        let (tokens, statuses) = (args.tokens.as_host().expect(HERE), args.status.as_host().expect(HERE));
        let mut stats = args.stats.as_mut().map(|view| view.as_host().expect(HERE));
        let workspace = args.workspace.as_host().expect(HERE);
        let partials: &mut [Partial] = bytemuck::cast_slice_mut(&mut workspace[..chunks(plan.vocab) as usize * 8]);
        for r in 0..plan.rows as usize {
            let scale = Scale::of(number(&args.temperature, r, 1.0));
            let truncation = Truncation {
                top_k: args.top_k.as_ref().map_or(0, |view| view.as_host().expect(HERE)[r].max(0) as u32),
                top_p: number(&args.top_p, r, 1.0),
                min_p: number(&args.min_p, r, 0.0),
            };
            let logit = |column: u64| match column < plan.vocab {
                true => {
                    let at = r * plan.stride as usize + column as usize;
                    guide(first[at].to_f32(), second[at].to_f32(), gate[r])
                }
                false => f32::NEG_INFINITY,
            };
            let (of, said) = distribution(partials, scale.as_ref(), &truncation, 32, plan.vocab, logit);
            let token = of.peak.or_else(|| {
                let three = match given {
                    Some(given) => given[r * 3..][..3].try_into().expect("three"),
                    None => {
                        let position = word(&args.positions, r).wrapping_add(plan.row_in_step.into());
                        let [x, y, z, _] = uniforms(word(&args.seeds, r), position, Domain::Draft, plan.row_in_step, 0);
                        [x, y, z]
                    }
                };
                of.summary.sample(partials, three, plan.vocab, logit)
            });
            tokens[r] = token.map_or(plan.fallback, |token| token as i32);
            debug_assert_eq!(said, said_of(&of.summary));
            statuses[r] = said;
            if let Some(stats) = &mut stats {
                let (sum, cut, per_logit) = match of.summary.shape {
                    Shape::Spread { scale, sum, cut, .. } => (sum, cut, scale.per_logit),
                    Shape::Peak | Shape::Empty => (0.0, f32::NEG_INFINITY, 0.0),
                };
                let sum = if of.summary.nan { -sum } else { sum };
                stats[r * 4..][..4].copy_from_slice(&[of.summary.top, sum, cut, per_logit]);
            }
        }
    }

    #[cfg(nxs_kernels)]
    fn run_on_cuda(&self, stream: &Stream<'_>, args: &GatedSampleArgs<'_, T>) -> Result<()> {
        use crate::ffi;
        use crate::launch::{address, address_mut};
        let params = ffi::nxs_gated_sample_params {
            first: args.first.span().address as *const _,
            second: args.second.span().address as *const _,
            gate: args.gate.span().address as *const _,
            temperature_or_null: address(&args.temperature),
            top_k_or_null: address(&args.top_k),
            top_p_or_null: address(&args.top_p),
            min_p_or_null: address(&args.min_p),
            seeds_or_null: address(&args.seeds),
            positions_or_null: address(&args.positions),
            uniforms_or_null: address(&args.uniforms),
            tokens: args.tokens.span().address as *mut _,
            stats_or_null: address_mut(&args.stats),
            status: args.status.span().address as *mut _,
            workspace: args.workspace.span().address as *mut _,
            stride_row: self.inner.stride,
            rows: self.inner.rows as i64,
            vocab: self.inner.vocab as i64,
            row_in_step: self.inner.row_in_step as i32,
            fallback: self.inner.fallback,
            blocks: self.blocks() as i32,
            dtype: T::DTYPE as i32,
        };
        crate::launch::launch("nxs_gated_sample", stream, |handle| {
            // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layout.
            unsafe { ffi::nxs_gated_sample(&params, handle) }
        })
    }

    #[cfg(not(nxs_kernels))]
    fn run_on_cuda(&self, _: &Stream<'_>, _: &GatedSampleArgs<'_, T>) -> Result<()> {
        let _ = (self.blocks(), self.inner.fallback);
        Err(crate::Error::NotCompiled)
    }
}

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
use crate::verification::host_rows::distribution;
use crate::verification::log2::log2;
use crate::verification::rows::{Partial, Scale, Shape, Truncation, chunks, order_key};
use crate::view::{In, Out};

const HERE: &str = "operands are on the stream's device";
const BLOCKS_A_MULTIPROCESSOR: u64 = 3;
const MOST_WIDTH: u64 = 32;

/// A plan that ranks the continuations of beams and names their parents, for the cache to follow (beam search over
/// ordered tokens and grids of images).
///
/// Of all pairs of a beam and a token those `width` are taken whose `score + ln p(token)` is greatest, p being the
/// softmax of the beam's row; of ties the lower beam, then the token of the greater logit, then the lower one.
///
/// | operand | shape | |
/// |---|---|---|
/// | `logits` | `[batch * beams, vocab]` | raw logits, `T`: f32, f16, bf16; a stride between rows; vocab up to 2^24 |
/// | `scores` | `[batch, beams]` f32 | sums of `ln p` so far; NaN and -inf: no such beam, as for all but one at the start |
/// | `temperature` | `[batch]` f32, optional | else 1; below 1e-5: 1e-5 |
/// | `parents`, `tokens` | `[batch, width]` i32 | the beam that is continued, and with what; -1 where there are no more |
/// | `best` | `[batch, width]` f32 | their scores, greatest first; -inf where there are no more |
/// | `status` | `[batch]` u32 | bits of [`status`](crate::verification::status), of all rows |
///
/// Up to 32 beams and a width of 32. Everything is the same bit for bit on the host and on every device, in any batch.
/// `workspace` may hold anything; `counters` must be all zero before the first run and is all zero after each.
pub struct BeamRank<T> {
    inner: Plan,
    types: PhantomData<T>,
}
typed_plan!(BeamRank<T>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Plan {
    batch: u64,
    beams: u64,
    width: u64,
    vocab: u64,
    stride: i64,
    len: u64,
    multiprocessors: u64,
}

/// The buffers of one run. See [`BeamRank`] for shapes.
#[derive(Debug)]
pub struct BeamRankArgs<'a, T>
where
    T: Float,
{
    /// `[batch * beams, vocab]`.
    pub logits: In<'a, T>,
    /// `[batch, beams]`.
    pub scores: In<'a, f32>,
    /// `[batch]`; 1 if not given.
    pub temperature: Option<In<'a, f32>>,
    /// `[batch, width]`.
    pub parents: Out<'a, i32>,
    /// `[batch, width]`.
    pub tokens: Out<'a, i32>,
    /// `[batch, width]`.
    pub best: Out<'a, f32>,
    /// `[batch]`.
    pub status: Out<'a, u32>,
    /// [`BeamRank::workspace_bytes`], 256-byte aligned.
    pub workspace: Out<'a, u8>,
    /// [`BeamRank::counter_words`]; all zero before the first run.
    pub counters: Out<'a, u32>,
}

impl<T: Float> BeamRank<T> {
    /// A plan for `batch` requests of `beams` beams, of whose continuations `width` are kept; `stride` from one row of
    /// `logits` to the next, `vocab` if not given.
    ///
    /// # Errors
    /// [`Error::Size`](crate::Error::Size) for `vocab` outside 1 to 2^24, `batch` above 2^20, `beams` or `width`
    /// outside 1 to 32; [`Error::Stride`](crate::Error::Stride) for rows that overlap;
    /// [`Error::UnsupportedDevice`](crate::Error::UnsupportedDevice) below compute capability 8.0.
    pub fn new(
        batch: usize,
        beams: usize,
        width: usize,
        vocab: usize,
        stride: Option<i64>,
        device: &DeviceInfo,
    ) -> Result<Self> {
        require_device(device)?;
        let (batch, beams, width, vocab) = (batch as u64, beams as u64, width as u64, vocab as u64);
        size("vocab", vocab, 1, 1 << 24)?;
        size("batch", batch, 0, 1 << 20)?;
        size("beams", beams, 1, MOST_WIDTH)?;
        size("width", width, 1, MOST_WIDTH)?;
        let stride = stride.unwrap_or(vocab as i64);
        let layout = Layout::strided([batch * beams, vocab], [stride, 1]);
        if batch * beams > 1 {
            layout.require_disjoint("logits")?;
        }
        let len = layout.required_len("logits")?;
        let inner = Plan { batch, beams, width, vocab, stride, len, multiprocessors: device.sm_count.max(1) as u64 };
        Ok(BeamRank { inner, types: PhantomData })
    }

    /// The bytes that any kernel must move: each row once, and the outputs.
    pub fn traffic(&self) -> Traffic {
        let plan = &self.inner;
        let read = (plan.batch * plan.beams) as u128 * plan.vocab as u128 * size_of::<T>() as u128;
        Traffic { read: read.try_into().unwrap_or(u64::MAX), written: plan.batch * (plan.width * 12 + 4) }
    }

    fn blocks(&self) -> u64 {
        (self.inner.multiprocessors * BLOCKS_A_MULTIPROCESSOR).min(self.inner.batch * self.inner.beams)
    }

    fn row_words(&self) -> u64 {
        2 * self.inner.width + 2
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        let rows = self.inner.batch * self.inner.beams;
        rows * self.row_words() * 4 + self.blocks().max(1) * chunks(self.inner.vocab) * 8
    }

    /// Words of `counters`.
    pub fn counter_words(&self) -> usize {
        self.inner.batch as usize
    }

    /// Ranks on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: BeamRankArgs<'_, T>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let out = plan.batch * plan.width;
        Operands::of(&stream)
            .input("logits", &args.logits, plan.len)?
            .input("scores", &args.scores, plan.batch * plan.beams)?
            .input_if("temperature", &args.temperature, plan.batch)?
            .output("parents", &args.parents, out)?
            .output("tokens", &args.tokens, out)?
            .output("best", &args.best, out)?
            .output("status", &args.status, plan.batch)?
            .workspace(&args.workspace, self.workspace_bytes())?
            .output("counters", &args.counters, plan.batch)?
            .finish()?;
        match stream.device() {
            Device::Host => {
                self.run_on_host(&mut args);
                Ok(())
            }
            _ => self.run_on_cuda(&stream, &args),
        }
    }

    fn run_on_host(&self, args: &mut BeamRankArgs<'_, T>) {
        let plan = &self.inner;
        let logits = args.logits.as_host().expect(HERE);
        let scores = args.scores.as_host().expect(HERE);
        let temperature = args.temperature.as_ref().map(|view| view.as_host().expect(HERE));
        let parents = args.parents.as_host().expect(HERE);
        let tokens = args.tokens.as_host().expect(HERE);
        let best = args.best.as_host().expect(HERE);
        let statuses = args.status.as_host().expect(HERE);
        let workspace = args.workspace.as_host().expect(HERE);
        let partials: &mut [Partial] = bytemuck::cast_slice_mut(&mut workspace[..chunks(plan.vocab) as usize * 8]);
        let (beams, width) = (plan.beams as usize, plan.width as usize);
        let off = Truncation { top_k: 0, top_p: 1.0, min_p: 0.0 };
        for b in 0..plan.batch as usize {
            let scale = Scale::of(temperature.map_or(1.0, |of| of[b]).max(1e-5));
            // As many as are kept so far, greatest first.
            let mut kept: [(f32, usize, u64); MOST_WIDTH as usize] = [(0.0, 0, 0); MOST_WIDTH as usize];
            let mut count = 0;
            statuses[b] = 0;
            for beam in 0..beams {
                let r = b * beams + beam;
                let logit = |column: u64| match column < plan.vocab {
                    true => logits[r * plan.stride as usize + column as usize].to_f32(),
                    false => f32::NEG_INFINITY,
                };
                let (of, said) = distribution(partials, scale.as_ref(), &off, 32, plan.vocab, logit);
                statuses[b] |= said;
                if scores[r].is_nan() || scores[r] == f32::NEG_INFINITY || of.summary.shape == Shape::Empty {
                    continue;
                }
                // The row's greatest logits, of ties the lower token, one after the other.
                let mut last: Option<(u32, u64)> = None;
                for n in 0..width {
                    let place = |token: u64| {
                        let x = logit(token);
                        (!order_key(if x.is_nan() { f32::NEG_INFINITY } else { x }), token)
                    };
                    let next = (0..plan.vocab).map(place).filter(|at| last.is_none_or(|last| *at > last)).min();
                    let Some(next) = next else { break };
                    last = Some(next);
                    let x = logit(next.1);
                    let log = match of.summary.shape {
                        Shape::Spread { scale, reference, sum, .. } if x > f32::NEG_INFINITY => {
                            (x.mul_add(scale.per_logit, -reference) - log2(sum)) * core::f32::consts::LN_2
                        }
                        Shape::Peak if n == 0 => 0.0,
                        _ => break,
                    };
                    let score = scores[r] + log;
                    let at = kept[..count].partition_point(|kept| order_key(kept.0) >= order_key(score));
                    if at < width {
                        count = (count + 1).min(width);
                        kept[at..count].rotate_right(1);
                        kept[at] = (score, beam, next.1);
                    }
                }
            }
            for (n, &(score, beam, token)) in kept[..width].iter().enumerate() {
                let there = n < count;
                let to = b * width + n;
                parents[to] = if there { beam as i32 } else { -1 };
                tokens[to] = if there { token as i32 } else { -1 };
                best[to] = if there { score } else { f32::NEG_INFINITY };
            }
        }
    }

    #[cfg(nxs_kernels)]
    fn run_on_cuda(&self, stream: &Stream<'_>, args: &BeamRankArgs<'_, T>) -> Result<()> {
        use crate::ffi;
        let params = ffi::nxs_beam_rank_params {
            logits: args.logits.span().address as *const _,
            scores: args.scores.span().address as *const _,
            temperature_or_null: crate::launch::address(&args.temperature),
            parents: args.parents.span().address as *mut _,
            tokens: args.tokens.span().address as *mut _,
            best: args.best.span().address as *mut _,
            status: args.status.span().address as *mut _,
            workspace: args.workspace.span().address as *mut _,
            counters: args.counters.span().address as *mut _,
            stride_row: self.inner.stride,
            batch: self.inner.batch as i64,
            vocab: self.inner.vocab as i64,
            beams: self.inner.beams as i32,
            width: self.inner.width as i32,
            blocks: self.blocks() as i32,
            dtype: T::DTYPE as i32,
        };
        crate::launch::launch("nxs_beam_rank", stream, |handle| {
            // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layout.
            unsafe { ffi::nxs_beam_rank(&params, handle) }
        })
    }

    #[cfg(not(nxs_kernels))]
    fn run_on_cuda(&self, _: &Stream<'_>, _: &BeamRankArgs<'_, T>) -> Result<()> {
        let _ = self.blocks();
        Err(crate::Error::NotCompiled)
    }
}

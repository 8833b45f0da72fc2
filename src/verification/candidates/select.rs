use super::{require_device, size};
use crate::device::{Device, DeviceInfo};
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::stream::{AsStream, Stream};
use crate::verification::host_rows::{distribution, said_of};
use crate::verification::rows::{CHUNK, Domain, Partial, Scale, Truncation, uniforms};
use crate::view::{In, Out};

const HERE: &str = "operands are on the stream's device";

/// A plan that selects one of several candidate sequences of a request: importance resampling among parallel samples
/// (energy-based diffusion, arXiv 2410.21357), or the best of n.
///
/// A candidate is drawn from the softmax of `score / temperature`; with logarithms of importance weights as scores and
/// temperature 1 that is resampling. At temperature 0 it is the one of the greatest score, of ties the first.
///
/// | operand | shape | |
/// |---|---|---|
/// | `scores` | `[batch, candidates]` f32 | NaN and -inf are never selected |
/// | `sequences` | `[batch, candidates, length]` i32, optional | |
/// | `temperature` | `[batch]` f32, optional | else 1; below 1e-5: best of n |
/// | `seeds`, `positions` | `[batch]` i64, optional | draws are of use 11 |
/// | `uniforms` | `[batch, 3]` f32, optional | of `[0, 1)`, in place of seeds |
/// | `parents` | `[batch]` i32 | which candidate, for the cache to follow; 0 where none can be selected |
/// | `selected` | `[batch, length]` i32, with `sequences` | its sequence |
/// | `status` | `[batch]` u32 | bits of [`status`](crate::verification::status), the scores being the target |
///
/// Up to 1024 candidates. Everything is the same bit for bit on the host and on every device, in any batch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SelectCandidate {
    batch: u64,
    candidates: u64,
    length: u64,
}

/// The buffers of one run. See [`SelectCandidate`] for shapes.
#[derive(Debug)]
pub struct SelectCandidateArgs<'a> {
    /// `[batch, candidates]`.
    pub scores: In<'a, f32>,
    /// `[batch, candidates, length]`.
    pub sequences: Option<In<'a, i32>>,
    /// `[batch]`; 1 if not given.
    pub temperature: Option<In<'a, f32>>,
    /// `[batch]`; 0 if not given.
    pub seeds: Option<In<'a, i64>>,
    /// `[batch]`; 0 if not given.
    pub positions: Option<In<'a, i64>>,
    /// `[batch, 3]`; drawn if not given.
    pub uniforms: Option<In<'a, f32>>,
    /// `[batch]`.
    pub parents: Out<'a, i32>,
    /// `[batch, length]`; goes with `sequences`.
    pub selected: Option<Out<'a, i32>>,
    /// `[batch]`.
    pub status: Out<'a, u32>,
}

impl SelectCandidate {
    /// A plan for `batch` requests of `candidates` sequences of `length` tokens.
    ///
    /// # Errors
    /// [`Error::Size`] for `batch` above 2^20, `candidates` outside 1 to 1024, `length` of 2^31 and above;
    /// [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn new(batch: usize, candidates: usize, length: usize, device: &DeviceInfo) -> Result<Self> {
        require_device(device)?;
        size("batch", batch as u64, 0, 1 << 20)?;
        size("candidates", candidates as u64, 1, CHUNK)?;
        size("length", length as u64, 0, i32::MAX as u64)?;
        Ok(SelectCandidate { batch: batch as u64, candidates: candidates as u64, length: length as u64 })
    }

    /// Selects on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; one of `sequences` and `selected` without the other; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: SelectCandidateArgs<'_>) -> Result<()> {
        let stream = stream.as_stream();
        if args.sequences.is_some() != args.selected.is_some() {
            return Err(Error::Unsupported { arg: "selected", what: "it goes with sequences" });
        }
        let all = self.batch * self.candidates;
        Operands::of(&stream)
            .input("scores", &args.scores, all)?
            .input_if("sequences", &args.sequences, all * self.length)?
            .input_if("temperature", &args.temperature, self.batch)?
            .input_if("seeds", &args.seeds, self.batch)?
            .input_if("positions", &args.positions, self.batch)?
            .input_if("uniforms", &args.uniforms, self.batch * 3)?
            .output("parents", &args.parents, self.batch)?
            .output_if("selected", &args.selected, self.batch * self.length)?
            .output("status", &args.status, self.batch)?
            .finish()?;
        match stream.device() {
            Device::Host => {
                self.run_on_host(&mut args);
                Ok(())
            }
            _ => self.run_on_cuda(&stream, &args),
        }
    }

    fn run_on_host(&self, args: &mut SelectCandidateArgs<'_>) {
        let scores = args.scores.as_host().expect(HERE);
        let temperature = args.temperature.as_ref().map(|view| view.as_host().expect(HERE));
        let given = args.uniforms.as_ref().map(|view| view.as_host().expect(HERE));
        let word = |view: &Option<In<'_, i64>>, b: usize| {
            view.as_ref().map_or(0, |view| view.as_host().expect(HERE)[b] as u64)
        };
        let parents = args.parents.as_host().expect(HERE);
        let statuses = args.status.as_host().expect(HERE);
        let (candidates, length) = (self.candidates as usize, self.length as usize);
        let off = Truncation { top_k: 0, top_p: 1.0, min_p: 0.0 };
        for b in 0..self.batch as usize {
            let scale = Scale::of(temperature.map_or(1.0, |of| of[b]));
            let score = |at: u64| match at < self.candidates {
                true => scores[b * candidates + at as usize],
                false => f32::NEG_INFINITY,
            };
            let mut partials = [Partial { max: 0.0, sum: 0.0 }];
            let (of, _) = distribution(&mut partials, scale.as_ref(), &off, 32, self.candidates, score);
            let three = match given {
                Some(given) => given[b * 3..][..3].try_into().expect("three"),
                None => {
                    let [x, y, z, _] = uniforms(word(&args.seeds, b), word(&args.positions, b), Domain::Select, 0, 0);
                    [x, y, z]
                }
            };
            let chosen = of.summary.sample(&partials, three, self.candidates, score).unwrap_or(0) as usize;
            (parents[b], statuses[b]) = (chosen as i32, said_of(&of.summary));
            if let (Some(from), Some(to)) = (&args.sequences, &mut args.selected) {
                let from = &from.as_host().expect(HERE)[(b * candidates + chosen) * length..][..length];
                to.as_host().expect(HERE)[b * length..][..length].copy_from_slice(from);
            }
        }
    }

    #[cfg(nxs_kernels)]
    fn run_on_cuda(&self, stream: &Stream<'_>, args: &SelectCandidateArgs<'_>) -> Result<()> {
        use crate::ffi;
        use crate::launch::{address, address_mut};
        let params = ffi::nxs_select_candidate_params {
            scores: args.scores.span().address as *const _,
            sequences_or_null: address(&args.sequences),
            temperature_or_null: address(&args.temperature),
            seeds_or_null: address(&args.seeds),
            positions_or_null: address(&args.positions),
            uniforms_or_null: address(&args.uniforms),
            parents: args.parents.span().address as *mut _,
            selected_or_null: address_mut(&args.selected),
            status: args.status.span().address as *mut _,
            batch: self.batch as i64,
            candidates: self.candidates as i64,
            length: self.length as i64,
        };
        crate::launch::launch("nxs_select_candidate", stream, |handle| {
            // SAFETY: every address the kernel reaches lies in the operands, which are checked against the sizes.
            unsafe { ffi::nxs_select_candidate(&params, handle) }
        })
    }

    #[cfg(not(nxs_kernels))]
    fn run_on_cuda(&self, _: &Stream<'_>, _: &SelectCandidateArgs<'_>) -> Result<()> {
        Err(Error::NotCompiled)
    }
}

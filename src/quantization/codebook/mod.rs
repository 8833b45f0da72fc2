//! Codebooks, made ready for search.

mod cuda;
mod host;
mod plan;

pub(crate) use host::norm;
pub use plan::{Codebook, CodebookBuilder, Filter, Metric};
pub(crate) use plan::{Geometry, MOST_DIM};

use crate::device::Device;
use crate::dtype::Float;
use crate::error::Result;
use crate::launch::Operands;
use crate::layout::Layout;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// The buffers of [`Codebook::prepare`].
#[derive(Debug)]
pub struct CodebookArgs<'a, E: Float> {
    /// `[levels, entries, dim]`, with a padding row `[levels, entries + 1, dim]`.
    pub rows: In<'a, E>,
    /// `[levels, entries]`: required for a moving average, and else `None`.
    pub usage: Option<In<'a, f32>>,
    /// At least [`Codebook::bytes`], 256-byte aligned (on the host 4): what is written.
    pub prepared: Out<'a, u8>,
    /// `[1]`, or `None`: bits are only ever set, so the caller clears it. The host path leaves it alone.
    pub flags: Option<Out<'a, u32>>,
}

/// What prepared memory must lie at a multiple of: the host reads it as f32.
pub(crate) fn alignment(device: Device) -> usize {
    if device == Device::Host { 4 } else { 256 }
}

impl Codebook {
    /// Set in `flags` when a kernel met an element that is NaN or infinite.
    pub const NOT_FINITE: u32 = crate::ffi::NXS_FLAG_CODEBOOK_NOT_FINITE;

    /// Codebooks of `levels` levels, each of `entries` rows of `dim` elements.
    pub fn builder(levels: usize, entries: usize, dim: usize) -> CodebookBuilder {
        CodebookBuilder::new(levels, entries, dim)
    }

    /// Levels; one may serve all levels of an encode.
    pub fn levels(&self) -> usize {
        self.geometry.levels as usize
    }

    /// Entries of a level, without the padding row.
    pub fn entries(&self) -> usize {
        self.geometry.entries as usize
    }

    /// Elements of a row.
    pub fn dim(&self) -> usize {
        self.geometry.dim as usize
    }

    /// Bytes of the prepared memory, which the caller owns and keeps as long as it is searched.
    pub fn bytes(&self) -> u64 {
        self.geometry.bytes
    }

    /// Where the prepared memory holds what codes stand for: f32 `[levels, entries, dim]`, positions counted in f32 from
    /// its start. A decode can read them: `first` elements on, with these strides.
    pub fn values(&self) -> (usize, Layout<3>) {
        let g = &self.geometry;
        let strides = [(g.entries * g.padded_dim) as i64, g.padded_dim as i64, 1];
        ((g.values_at / 4) as usize, Layout::strided([g.levels, g.entries, g.dim], strides))
    }

    /// Makes the codebooks ready: divides sums by counts and rows by norms, rounds what the kernels filter with, and puts all
    /// where the kernels want it. Once; the memory is then read by every encode, on the host or on the device that it was
    /// made on. On a CUDA stream it enqueues its kernels and returns.
    ///
    /// **Rows that are not finite** (NaN, infinity, or a sum whose quotient is) are refused on the host. A kernel takes
    /// such an element as 0, so that whatever is searched later is defined, and sets [`Codebook::NOT_FINITE`] in the
    /// `flags` word for the caller to read when it likes.
    ///
    /// # Errors
    /// Nothing was launched: a buffer too short, misaligned, overlapping `prepared`, on another device or ordered on another
    /// stream; usage where there is no moving average, or none where there is; on the host
    /// [`Error::NotFinite`](crate::Error::NotFinite), with parts of `prepared` written; on CUDA what CUDA said.
    pub fn prepare<E: Float, S: AsStream + ?Sized>(&self, stream: &S, mut args: CodebookArgs<'_, E>) -> Result<()> {
        use crate::error::Error;
        let stream = stream.as_stream();
        let g = &self.geometry;
        if args.usage.is_some() && self.usage_eps.is_none() {
            return Err(Error::Unsupported { arg: "usage", what: "the plan is for no moving average" });
        }
        let usage_len = if self.usage_eps.is_some() { g.levels * g.entries } else { 0 };
        let need = alignment(stream.device());
        if !args.prepared.span().address.is_multiple_of(need) {
            return Err(Error::Alignment { arg: "prepared", need });
        }
        Operands::of(&stream)
            .input("rows", &args.rows, self.rows_len)?
            .input_needed("usage", &args.usage, usage_len)?
            .output("prepared", &args.prepared, g.bytes)?
            .output_if("flags", &args.flags, 1)?
            .finish()?;
        match stream.device() {
            Device::Host => host::prepare(self, &mut args),
            _ => cuda::prepare(self, &stream, &args),
        }
    }
}

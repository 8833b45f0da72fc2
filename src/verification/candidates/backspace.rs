use super::{require_device, size};
use crate::device::{Device, DeviceInfo};
use crate::error::Result;
use crate::launch::Operands;
use crate::stream::{AsStream, Stream};
use crate::verification::status;
use crate::view::{In, Out};

const HERE: &str = "operands are on the stream's device";

/// A plan that appends emitted tokens to sequences, where one token takes the last one away instead: the backspace of
/// SequenceMatch (arXiv 2306.05426).
///
/// | operand | shape | |
/// |---|---|---|
/// | `emitted` | `[batch, most]` i32 | what a verifier emitted; up to the first that is negative |
/// | `least` | `[batch]` i32, optional | how many tokens, the prompt's for instance, are never taken away; else 0 |
/// | `sequences` | `[batch, capacity]` i32 | read and written |
/// | `lengths` | `[batch]` i32 | read and written |
/// | `kept` | `[batch]` i32 | the least length on the way: entries of a cache from there on are no longer valid |
/// | `status` | `[batch]` u32 | [`status::SEQUENCE_FULL`] where tokens had no place and were dropped |
///
/// A backspace at `least` tokens does nothing. A length outside 0 to `capacity` is taken for the nearest of these.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Backspace {
    batch: u64,
    most: u64,
    capacity: u64,
    token: i32,
}

/// The buffers of one run. See [`Backspace`] for shapes.
#[derive(Debug)]
pub struct BackspaceArgs<'a> {
    /// `[batch, most]`.
    pub emitted: In<'a, i32>,
    /// `[batch]`; 0 if not given.
    pub least: Option<In<'a, i32>>,
    /// `[batch, capacity]`, read and written.
    pub sequences: Out<'a, i32>,
    /// `[batch]`, read and written.
    pub lengths: Out<'a, i32>,
    /// `[batch]`.
    pub kept: Out<'a, i32>,
    /// `[batch]`.
    pub status: Out<'a, u32>,
}

impl Backspace {
    /// A plan for `batch` sequences of up to `capacity` tokens, to which up to `most` are appended at once; `token`
    /// is the backspace.
    ///
    /// # Errors
    /// [`Error::Size`](crate::Error::Size) for a size or token of 2^31 and above;
    /// [`Error::UnsupportedDevice`](crate::Error::UnsupportedDevice) below compute capability 8.0.
    pub fn new(batch: usize, most: usize, capacity: usize, token: u32, device: &DeviceInfo) -> Result<Self> {
        require_device(device)?;
        const MOST: u64 = i32::MAX as u64;
        for (arg, got) in [("batch", batch as u64), ("most", most as u64), ("capacity", capacity as u64)] {
            size(arg, got, 0, MOST)?;
        }
        size("batch * most", batch as u64 * most as u64, 0, i64::MAX as u64 / 8)?;
        size("batch * capacity", batch as u64 * capacity as u64, 0, i64::MAX as u64 / 8)?;
        size("token", token.into(), 0, MOST)?;
        Ok(Backspace { batch: batch as u64, most: most as u64, capacity: capacity as u64, token: token as i32 })
    }

    /// Appends on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: BackspaceArgs<'_>) -> Result<()> {
        let stream = stream.as_stream();
        Operands::of(&stream)
            .input("emitted", &args.emitted, self.batch * self.most)?
            .input_if("least", &args.least, self.batch)?
            .output("sequences", &args.sequences, self.batch * self.capacity)?
            .output("lengths", &args.lengths, self.batch)?
            .output("kept", &args.kept, self.batch)?
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

    fn run_on_host(&self, args: &mut BackspaceArgs<'_>) {
        let emitted = args.emitted.as_host().expect(HERE);
        let least = args.least.as_ref().map(|view| view.as_host().expect(HERE));
        let sequences = args.sequences.as_host().expect(HERE);
        let lengths = args.lengths.as_host().expect(HERE);
        let (kept, statuses) = (args.kept.as_host().expect(HERE), args.status.as_host().expect(HERE));
        let (most, capacity) = (self.most as usize, self.capacity as usize);
        for b in 0..self.batch as usize {
            let mut length = lengths[b].clamp(0, capacity as i32) as usize;
            let least = least.map_or(0, |least| least[b].max(0) as usize);
            (kept[b], statuses[b]) = (length as i32, 0);
            for &token in emitted[b * most..][..most].iter().take_while(|&&token| token >= 0) {
                if token == self.token {
                    length -= usize::from(length > least);
                    kept[b] = kept[b].min(length as i32);
                } else if length < capacity {
                    sequences[b * capacity + length] = token;
                    length += 1;
                } else {
                    statuses[b] = status::SEQUENCE_FULL;
                }
            }
            lengths[b] = length as i32;
        }
    }

    #[cfg(nxs_kernels)]
    fn run_on_cuda(&self, stream: &Stream<'_>, args: &BackspaceArgs<'_>) -> Result<()> {
        use crate::ffi;
        let params = ffi::nxs_backspace_params {
            emitted: args.emitted.span().address as *const _,
            least_or_null: crate::launch::address(&args.least),
            sequences: args.sequences.span().address as *mut _,
            lengths: args.lengths.span().address as *mut _,
            kept: args.kept.span().address as *mut _,
            status: args.status.span().address as *mut _,
            batch: self.batch as i64,
            most: self.most as i64,
            capacity: self.capacity as i64,
            backspace: self.token,
        };
        crate::launch::launch("nxs_backspace", stream, |handle| {
            // SAFETY: every address the kernel reaches lies in the operands; lengths from device memory are clamped.
            unsafe { ffi::nxs_backspace(&params, handle) }
        })
    }

    #[cfg(not(nxs_kernels))]
    fn run_on_cuda(&self, _: &Stream<'_>, _: &BackspaceArgs<'_>) -> Result<()> {
        Err(crate::Error::NotCompiled)
    }
}

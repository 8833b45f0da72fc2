//! Labels by a table.

use core::marker::PhantomData;

use super::size;
use crate::device::Device;
use crate::dtype::Code;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::{AsStream, Stream};
use crate::view::{In, Out};

/// A plan for `out[i] = table[codes[i]]`: coarse labels of codes, such as the k-means labels of a codebook's rows
/// (CTF, arXiv 2503.16194). `C` is the type of the codes, `O` of the labels.
///
/// A code outside the table is [`Error::CodeOutOfRange`] on the host, where nothing is then written; a kernel clamps
/// it and sets [`Remap::CODE_CLAMPED`] in `flags`.
///
/// ```
/// use nextscale::{In, Out, Stream, quantization::{Remap, RemapArgs}};
/// let mut out = [0u16; 3];
/// Remap::<u16, u16>::new(3, 4)?.run(&Stream::host(), RemapArgs {
///     codes: In::host(&[3, 0, 1]),
///     table: In::host(&[7, 7, 8, 9]),
///     out: Out::host(&mut out),
///     flags: None,
/// })?;
/// assert_eq!(out, [9, 7, 7]);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Remap<C, O> {
    inner: Plan,
    types: PhantomData<(C, O)>,
}
typed_plan!(Remap<C, O>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Plan {
    count: u64,
    entries: u64,
}

/// The buffers of one remap.
#[derive(Debug)]
pub struct RemapArgs<'a, C, O>
where
    C: Code,
    O: Code,
{
    /// `[count]`.
    pub codes: In<'a, C>,
    /// `[entries]`.
    pub table: In<'a, O>,
    /// `[count]`.
    pub out: Out<'a, O>,
    /// `[1]`, or `None`: bits are only ever set.
    pub flags: Option<Out<'a, u32>>,
}

impl<C: Code, O: Code> Remap<C, O> {
    /// Set in `flags` when a kernel clamped a code.
    pub const CODE_CLAMPED: u32 = crate::ffi::NXS_FLAG_CODE_CLAMPED;

    /// A plan for `count` codes and a table of `entries` labels.
    ///
    /// # Errors
    /// [`Error::Size`] for no entries or more than 2^31 - 1, or more than 2^38 codes.
    pub fn new(count: usize, entries: usize) -> Result<Self> {
        size("entries", entries as u64, 1, i32::MAX as u64)?;
        size("count", count as u64, 0, 1 << 38)?;
        Ok(Remap { inner: Plan { count: count as u64, entries: entries as u64 }, types: PhantomData })
    }

    /// Looks up on `stream`; on a CUDA stream it enqueues one kernel.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping, on another device or ordered on
    /// another stream; on the host a code out of range; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: RemapArgs<'_, C, O>) -> Result<()> {
        const HERE: &str = "operands are on the stream's device";
        let stream = stream.as_stream();
        let Plan { count, entries } = self.inner;
        Operands::of(&stream)
            .input("codes", &args.codes, count)?
            .input("table", &args.table, if count > 0 { entries } else { 0 })?
            .output("out", &args.out, count)?
            .output_if("flags", &args.flags, 1)?
            .finish()?;
        if stream.device() != Device::Host {
            return self.on_cuda(&stream, &args);
        }
        let (codes, table) = (&args.codes.as_host().expect(HERE)[..count as usize], args.table.as_host().expect(HERE));
        for (at, code) in codes.iter().map(|code| code.to_i64()).enumerate() {
            if code < 0 || code as u64 >= entries {
                return Err(Error::CodeOutOfRange { arg: "codes", at: at as u64, code, entries });
            }
        }
        for (out, code) in args.out.as_host().expect(HERE).iter_mut().zip(codes) {
            *out = table[code.to_i64() as usize];
        }
        Ok(())
    }

    #[cfg(nxs_kernels)]
    fn on_cuda(&self, stream: &Stream<'_>, args: &RemapArgs<'_, C, O>) -> Result<()> {
        use crate::ffi;
        let flags = crate::launch::address_mut(&args.flags);
        let params = ffi::nxs_remap_params {
            codes: args.codes.span().address as *const _,
            table: args.table.span().address as *const _,
            out: args.out.span().address as *mut _,
            flags_or_null: flags,
            count: self.inner.count as i64,
            entries: self.inner.entries as i64,
            codes_dtype: C::DTYPE as i32,
            out_dtype: O::DTYPE as i32,
        };
        crate::launch::launch("nxs_remap", stream, |handle| {
            // SAFETY: the operands are checked against the plan; codes are clamped to the entries.
            unsafe { ffi::nxs_remap(&params, handle) }
        })
    }

    #[cfg(not(nxs_kernels))]
    fn on_cuda(&self, _stream: &Stream<'_>, _args: &RemapArgs<'_, C, O>) -> Result<()> {
        Err(Error::NotCompiled)
    }
}

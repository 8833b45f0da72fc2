//! What the emulator counted and found. Both belong to the thread that runs the ops; `docs/emulator.md` explains them.

use core::ffi::{CStr, c_char};
use core::fmt;

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Sums over the launches of a thread since its last [`reset`].
        ///
        /// As text: a line for each counter that is not zero.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[non_exhaustive]
        #[repr(C)] // `nxs_emulator_counts` of `nextscale_emulator.h`
        pub struct Counters {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl Counters {
            /// Every counter, by the name of its field.
            pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [$((stringify!($name), self.$name)),+].into_iter()
            }
        }
    };
}

counters! {
    /// Kernels launched.
    launches,
    /// Blocks that began.
    blocks,
    /// Threads that began.
    threads,
    /// Bytes read from global memory: 32 for each sector that an instruction of a warp touches.
    global_load_bytes,
    /// Bytes written to global memory, counted alike.
    global_store_bytes,
    /// Load and store instructions of warps to shared memory, `ldmatrix` and `stmatrix` included.
    shared_accesses,
    /// Passes of theirs beyond those that their bytes need.
    shared_conflicts,
    /// Floating-point operations of `mma` on bf16.
    mma_bf16_flops,
    /// Of `mma` on f16.
    mma_f16_flops,
    /// Of `mma` on tf32.
    mma_tf32_flops,
    /// Of `wgmma` on bf16.
    wgmma_bf16_flops,
    /// Of `wgmma` on f16.
    wgmma_f16_flops,
    /// `ex2`, `lg2`, `rsqrt`, `rcp` and `tanh`, by thread.
    special_ops,
    /// Completions of a block's barriers, named ones included.
    barriers,
    /// Completions of a phase of an mbarrier.
    mbarrier_phases,
    /// Completions of a cluster's barrier.
    cluster_barriers,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.launches == 0 {
            return f.write_str("no launches");
        }
        let mut separator = "";
        for (name, count) in self.named().filter(|&(_, count)| count != 0) {
            write!(f, "{separator}{name:<20}{count:>16}")?;
            separator = "\n";
        }
        Ok(())
    }
}

// By hand: the emulator's header is not the library's, from which `ffi.rs` is generated.
unsafe extern "C" {
    fn nxs_emulator_counters(counts: *mut Counters);
    fn nxs_emulator_report() -> *const c_char;
    fn nxs_emulator_reset();
}

/// What the launches of this thread did since its last [`reset`]. A launch that was stopped is counted in part.
pub fn counters() -> Counters {
    let mut counts = Counters::default();
    // SAFETY: `counts` is a valid place for the call to fill; tests/header.rs holds its layout against the header.
    unsafe { nxs_emulator_counters(&mut counts) };
    counts
}

/// What stopped the latest launch of this thread, which then was an [`Error::Launch`](crate::Error::Launch); empty if
/// nothing did. The emulator has also printed it to stderr.
pub fn report() -> String {
    // SAFETY: never null, and valid until this thread's next launch.
    unsafe { CStr::from_ptr(nxs_emulator_report()) }.to_string_lossy().into_owned()
}

/// Clears the counters and the report of this thread.
pub fn reset() {
    // SAFETY: takes nothing, and touches nothing but this thread's state.
    unsafe { nxs_emulator_reset() }
}

#[cfg(all(test, feature = "quantization"))]
mod tests {
    use super::*;
    use crate::ffi;
    use crate::launch::check;
    use crate::{DType, Error};

    #[repr(C)] // `nxs_emulator_options`
    struct Options {
        seed: u64,
        landing: i32,
        quiet: i32,
    }
    unsafe extern "C" {
        fn nxs_emulator_configure(options: *const Options);
    }

    /// An output that is also the codebook, which only the C ABI lets through.
    #[test]
    fn a_stopped_launch_is_an_error_with_a_report() {
        let codes = [0u32; 2];
        let decode = |codebooks: *const f32, out: *mut f32| {
            let params = ffi::nxs_rvq_decode_params {
                codes: codes.as_ptr().cast(),
                codebooks: codebooks.cast(),
                out: out.cast(),
                codes_stride_row: 1,
                codebooks_stride_entry: 1,
                out_stride_row: 1,
                batch: 1,
                rows: 2,
                entries: 1,
                levels: 1,
                dim: 1,
                codes_dtype: DType::U32 as i32,
                codebooks_dtype: DType::F32 as i32,
                out_dtype: DType::F32 as i32,
                ..Default::default()
            };
            // SAFETY: all addresses are those of live arrays of the sizes given.
            check("nxs_rvq_decode", unsafe { ffi::nxs_rvq_decode(&params, core::ptr::null_mut()) })
        };
        // SAFETY: the options are copied.
        unsafe { nxs_emulator_configure(&Options { seed: 0, landing: 0, quiet: 1 }) };
        reset();
        let mut memory = [1f32, 0.0, 0.0];
        let [codebook, out @ ..] = &mut memory;
        assert_eq!((decode(codebook, out.as_mut_ptr()), report()), (Ok(()), String::new()));
        let counted = counters();
        assert_eq!((counted.launches, counted.blocks, counted.threads), (1, 1, 128));
        assert!(counted.to_string().starts_with("launches                           1\nblocks "), "{counted}");
        assert!(!counted.to_string().contains("flops"), "{counted}");

        let pointer = memory.as_mut_ptr();
        let stopped = decode(pointer, pointer);
        let expected = Error::Launch { op: "nxs_rvq_decode", code: 719, name: "cudaErrorLaunchFailure" };
        assert_eq!(stopped, Err(expected));
        assert!(report().starts_with("race: ") && report().contains("[kernel rvq_decode_rows_kernel"), "{}", report());
        reset();
        assert_eq!((counters(), report()), (Counters::default(), String::new()));
        assert_eq!(counters().to_string(), "no launches");
    }
}

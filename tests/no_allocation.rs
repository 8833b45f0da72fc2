//! A run allocates nothing on the heap: engines call it per layer and per step.

#![cfg(all(feature = "attention", feature = "quantization"))]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use nextscale::DeviceInfo;
use nextscale::attention::{Merge, MergeArgs, Norm, Prepare, PrepareArgs, Rope};
use nextscale::quantization::{RvqDecode, RvqDecodeArgs};
use support::{Buffer, TestDevice};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

#[test]
fn a_run_allocates_nothing() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1, "the counter counts");
    for device in TestDevice::all() {
        let plan = RvqDecode::<u32, f32, f32>::builder(2, 4, 8).rows(3).build(&DeviceInfo::A100).unwrap();
        let codes = Buffer::of(&device, &[1u32; 6], 0);
        let codebooks = Buffer::of(&device, &[1f32; 64], 0);
        let mut out = Buffer::<f32>::poisoned(&device, 24, 0);
        let mut run = || {
            let args =
                RvqDecodeArgs { codes: codes.input(), codebooks: codebooks.input(), out: out.output(), flags: None };
            plan.run(&device.stream(), args).unwrap();
        };
        run(); // the first one loads code and looks for the driver
        assert_eq!(allocations(run), 0, "{device:?}");
    }
}

#[test]
fn a_run_of_attention_allocates_nothing() {
    for device in TestDevice::all() {
        let merge = Merge::<f32, f32>::builder(2, 2, 8).rows(3).build(&DeviceInfo::A100).unwrap();
        let prepare = Prepare::<f32, f32, f32>::builder(8).rows(3).q(2).k(2, 3).v(2, 3);
        let prepare = prepare.norm(Norm::L2 { eps: 1e-12 }).rope(Rope::half(3)).build(&DeviceInfo::A100).unwrap();
        let ones = Buffer::of(&device, &[1f32; 96], 0);
        let mut outs = [0, 1, 2].map(|_| Buffer::<f32>::poisoned(&device, 48, 0));
        let mut run = || {
            let [q_out, k_cache, v_cache] = &mut outs;
            let args = MergeArgs { parts: ones.input(), lse: ones.input(), out: q_out.output(), out_lse: None };
            merge.run(&device.stream(), args).unwrap();
            let args = PrepareArgs {
                q: Some(ones.input()),
                k: Some(ones.input()),
                v: Some(ones.input()),
                q_out: Some(q_out.output()),
                k_cache: Some(k_cache.output()),
                v_cache: Some(v_cache.output()),
                cos: Some(ones.input()),
                sin: Some(ones.input()),
                ..PrepareArgs::default()
            };
            prepare.run(&device.stream(), args).unwrap();
        };
        run();
        assert_eq!(allocations(run), 0, "{device:?}");
    }
}

//! A run allocates nothing on the heap: engines call it per layer and per step.

#![cfg(feature = "quantization")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use nextscale::DeviceInfo;
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

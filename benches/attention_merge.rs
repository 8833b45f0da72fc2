//! Merge on the shapes of `benches/shapes.json`. `benches/support` says what the modes time.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::DeviceInfo;
use nextscale::attention::{Merge, MergeArgs};
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::dtype::Float;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, ForFloats, TestDevice, dtype, for_floats};

#[derive(Deserialize)]
struct Shape {
    name: String,
    parts: usize,
    batch: usize,
    rows: usize,
    heads: usize,
    dim: usize,
    #[serde(rename = "in")]
    input: String,
    out: String,
    accumulate: bool,
}

struct Bench<'a> {
    criterion: &'a mut Criterion,
    stream: &'a Arc<CudaStream>,
    shape: &'a Shape,
}

impl ForFloats for Bench<'_> {
    fn call<P: Float, O: Float>(self) {
        let Shape { parts: of_parts, batch, rows, heads, dim, accumulate, .. } = *self.shape;
        let builder = |rows| {
            let builder = Merge::<P, O>::builder(of_parts, heads, dim).batch(batch).rows(rows);
            if accumulate { builder.accumulate() } else { builder }
        };
        let plan = builder(rows).build(&DeviceInfo::of(self.stream).unwrap()).unwrap();

        let device = TestDevice::Cuda(self.stream.clone());
        let mut rng = StdRng::seed_from_u64(1);
        let items = batch * rows * heads;
        let mut random = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let parts: Vec<P> = random(of_parts * items * dim).into_iter().map(P::from_f32).collect();
        let (parts, lse) = (Buffer::of(&device, &parts, 0), Buffer::of(&device, &random(of_parts * items), 0));
        let out: Vec<O> = random(items * dim).into_iter().map(O::from_f32).collect();
        let out = RefCell::new((Buffer::of(&device, &out, 0), Buffer::of(&device, &random(items), 0)));

        let run = |plan: &Merge<P, O>| {
            let (out, out_lse) = &mut *out.borrow_mut();
            let (parts, lse, out) = (parts.input(), lse.input(), out.output());
            plan.run(self.stream, MergeArgs { parts, lse, out, out_lse: Some(out_lse.output()) }).unwrap();
        };
        let empty = builder(0).build(&DeviceInfo::H200).unwrap();
        let passes = if accumulate { 2 } else { 1 };
        let moved = items * (of_parts * (dim * size_of::<P>() + 4) + passes * (dim * size_of::<O>() + 4));
        let name = ("attention_merge", self.shape.name.as_str(), moved as u64);
        support::time(self.criterion, self.stream, name, || run(&plan), || run(&empty));
    }
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("attention_merge") {
        let bench = Bench { criterion: &mut criterion, stream: &stream, shape };
        for_floats(dtype(&shape.input), dtype(&shape.out), bench);
    }
    criterion.final_summary();
}

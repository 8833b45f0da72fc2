//! RVQ decode on the shapes of `benches/shapes.json`. `benches/support` says what the modes time.

mod support;

use std::sync::Arc;

use criterion::Criterion;
use nextscale::DeviceInfo;
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::dtype::{Code, Float};
use nextscale::quantization::{RvqDecode, RvqDecodeArgs, RvqDecodeTraffic};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, ForDTypes, TestDevice, dtype, for_dtypes};

#[derive(Deserialize)]
struct Shape {
    name: String,
    batch: usize,
    rows: usize,
    levels: usize,
    entries: usize,
    dim: usize,
    codes: String,
    codebooks: String,
    out: String,
    shared: bool,
    codes_layout: String,
}

struct Bench<'a> {
    criterion: &'a mut Criterion,
    stream: &'a Arc<CudaStream>,
    shape: &'a Shape,
}

impl ForDTypes for Bench<'_> {
    fn call<C: Code, E: Float, O: Float>(self) {
        let Shape { batch, rows, levels, entries, dim, shared, .. } = *self.shape;
        let mut builder = RvqDecode::<C, E, O>::builder(levels, entries, dim).batch(batch).rows(rows);
        if shared {
            builder = builder.shared_codebook();
        }
        match self.shape.codes_layout.as_str() {
            "batch_levels_rows" => {}
            "batch_rows_levels" => builder = builder.codes_rows_first(),
            other => panic!("no layout {other}"),
        }
        let plan = builder.build(&DeviceInfo::of(self.stream).unwrap()).unwrap();

        let device = TestDevice::Cuda(self.stream.clone());
        let mut rng = StdRng::seed_from_u64(1);
        let code = || C::from_i64(rng.random_range(0..entries as i64)).unwrap();
        let codes: Vec<C> = std::iter::repeat_with(code).take(batch * levels * rows).collect();
        let books = if shared { 1 } else { levels } * entries * dim;
        let value = || E::from_f32(rng.random_range(-1.0..1.0));
        let codebooks: Vec<E> = std::iter::repeat_with(value).take(books).collect();
        let (codes, codebooks) = (Buffer::of(&device, &codes, 0), Buffer::of(&device, &codebooks, 0));
        let out = std::cell::RefCell::new(Buffer::<O>::poisoned(&device, batch * rows * dim, 0));

        let run = |plan: &RvqDecode<C, E, O>| {
            let mut out = out.borrow_mut();
            let (codes, codebooks, out) = (codes.input(), codebooks.input(), out.output());
            plan.run(self.stream, RvqDecodeArgs { codes, codebooks, out, flags: None }).unwrap();
        };
        let empty = RvqDecode::builder(levels, entries, dim).rows(0).build(&DeviceInfo::H200).unwrap();
        let RvqDecodeTraffic { codes, gathered, written } = plan.traffic();
        let name = ("rvq_decode", self.shape.name.as_str(), codes + gathered + written);
        support::time(self.criterion, self.stream, name, || run(&plan), || run(&empty));
    }
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("rvq_decode") {
        let [codes, codebooks, out] = [&shape.codes, &shape.codebooks, &shape.out].map(|name| dtype(name));
        for_dtypes(codes, codebooks, out, Bench { criterion: &mut criterion, stream: &stream, shape });
    }
    criterion.final_summary();
}

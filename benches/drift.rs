//! The drift test on the shapes of `benches/shapes.json`. `benches/support` says what the modes time.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::DeviceInfo;
use nextscale::compression::{Drift, DriftArgs};
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::dtype::Float;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, ForFloats, TestDevice, dtype, for_floats};

#[derive(Deserialize)]
struct Shape {
    name: String,
    chunks: usize,
    rows: usize,
    dim: usize,
    dtype: String,
    keep: bool,
    terms: usize,
}

struct Bench<'a> {
    criterion: &'a mut Criterion,
    stream: &'a Arc<CudaStream>,
    shape: &'a Shape,
}

impl ForFloats for Bench<'_> {
    fn call<P: Float, O: Float>(self) {
        let Shape { chunks, rows, dim, keep, terms, .. } = *self.shape;
        let elements = rows * dim;
        let builder = |chunks| {
            let polynomial = [0.1, -0.2, 0.3, 0.9, 0.01];
            let builder = Drift::<P>::builder(chunks, elements).polynomial(&polynomial[5 - terms..]);
            builder.compute_before(0).keep(keep).build(&DeviceInfo::H200).unwrap()
        };
        let (plan, empty) = (builder(chunks), builder(0));
        let device = TestDevice::Cuda(self.stream.clone());
        let mut rng = StdRng::seed_from_u64(1);
        let mut random = |len: usize| -> Vec<P> {
            // A period of values: drawing every one would take longer than all benches.
            let values: Vec<P> = (0..1 << 20).map(|_| P::from_f32(rng.random_range(-1.0..1.0))).collect();
            values.into_iter().cycle().take(len).collect()
        };
        let features = Buffer::of(&device, &random(chunks * elements), 0);
        let previous = RefCell::new(Buffer::of(&device, &random(chunks * elements), 0));
        let state = RefCell::new((
            Buffer::of(&device, &vec![0f32; chunks], 0),
            Buffer::of(&device, &vec![0i32; chunks], 0),
            Buffer::<i32>::poisoned(&device, chunks, 0),
            Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0),
            Buffer::of(&device, &vec![0u32; chunks], 0),
        ));
        let run = |plan: &Drift<P>| {
            let (accumulated, steps, decision, workspace, counters) = &mut *state.borrow_mut();
            let previous = &mut *previous.borrow_mut();
            let args = DriftArgs {
                features: features.input(),
                previous: previous.output(),
                accumulated: accumulated.output(),
                steps: steps.output(),
                force: None,
                decision: decision.output(),
                change: None,
                workspace: workspace.output(),
                counters: counters.output(),
            };
            plan.run(self.stream, args).unwrap();
        };
        let traffic = plan.traffic();
        let name = ("drift", self.shape.name.as_str(), traffic.read + traffic.written);
        support::time(self.criterion, self.stream, name, || run(&plan), || run(&empty));
    }
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("drift") {
        let dtype = dtype(&shape.dtype);
        for_floats(dtype, dtype, Bench { criterion: &mut criterion, stream: &stream, shape });
    }
    criterion.final_summary();
}

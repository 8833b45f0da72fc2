//! Importance on the shapes of `benches/shapes.json`: all layers of an event. `benches/support` says what the modes time.
//! A case is timed with the kernels that the plan picks, and, where those are Hopper's, in a graph with the portable ones as
//! `<case>@portable`.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::compression::{Aggregation, Importance, ImportanceArgs, ImportanceVariant, Pool, Reduction};
use nextscale::cudarc_0_19::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use nextscale::dtype::Float;
use nextscale::{DeviceInfo, In};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, ForFloats, TestDevice, dtype, for_floats};

#[derive(Deserialize)]
struct Shape {
    name: String,
    sets: usize,
    heads: usize,
    groups: usize,
    dim: usize,
    tokens: usize,
    queries: usize,
    aggregation: String,
    reduction: String,
    causal: bool,
    excluded: usize,
    unscored: usize,
    pool: String,
    pool_width: u32,
    /// The queries are every so-manieth row, listed, and their columns masked.
    listed: bool,
    dtype: String,
}

struct Bench<'a> {
    criterion: &'a mut Criterion,
    stream: &'a Arc<CudaStream>,
    shape: &'a Shape,
}

/// Random vectors in device memory, a stretch of them over and over: there are too many to draw.
fn random<T: Float>(stream: &Arc<CudaStream>, len: usize, seed: u64) -> CudaSlice<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    // No multiple of a row of keys.
    let stretch: Vec<T> = (0..(4 << 20) + 8 * 129).map(|_| T::from_f32(rng.random_range(-1.0..1.0))).collect();
    let stretch: &[u8] = bytemuck::cast_slice(&stretch);
    let mut memory = stream.alloc_zeros::<u8>((len * size_of::<T>()).max(1)).expect("device memory");
    let all = len * size_of::<T>();
    for first in (0..all).step_by(stretch.len()) {
        let some = stretch.len().min(all - first);
        stream.memcpy_htod(&stretch[..some], &mut memory.slice_mut(first..first + some)).expect("a copy to the device");
    }
    memory
}

fn view<'a, T: Float>(memory: &'a CudaSlice<u8>, stream: &Arc<CudaStream>, len: usize) -> In<'a, T> {
    let (address, _guard) = memory.device_ptr(stream);
    // SAFETY: the memory is that long, lives longer than the view, and is used on one stream.
    unsafe { In::from_raw(address, len, 0) }
}

impl ForFloats for Bench<'_> {
    fn call<T: Float, O: Float>(self) {
        let Shape { sets, heads, groups, dim, tokens, queries, .. } = *self.shape;
        let aggregation = match self.shape.aggregation.as_str() {
            "max_logit" => Aggregation::MaxLogit,
            "mean_prob" => Aggregation::MeanProb,
            "max_prob" => Aggregation::MaxProb,
            "logit" => Aggregation::Logit,
            other => panic!("no aggregation {other}"),
        };
        let reduction = if self.shape.reduction == "sum" { Reduction::Sum } else { Reduction::Mean };
        let pool = match self.shape.pool.as_str() {
            "none" => Pool::None,
            "max" => Pool::Max(self.shape.pool_width),
            "average" => Pool::Average(self.shape.pool_width),
            other => panic!("no pool {other}"),
        };
        let q_rows = if self.shape.listed { 256 * queries } else { queries };
        let info = DeviceInfo::of(self.stream).unwrap();
        let plan = |sets, variant| {
            let mut builder = Importance::<T>::builder(heads, groups, dim)
                .sets(sets)
                .tokens(tokens)
                .queries(queries)
                .aggregation(aggregation)
                .reduction(reduction)
                .excluded(self.shape.excluded)
                .unscored(self.shape.unscored)
                .pool(pool)
                .variant(variant);
            if self.shape.causal {
                builder = builder.causal();
            }
            if self.shape.listed {
                builder = builder.listed_queries(q_rows).masked(queries);
            }
            builder.build(&info).unwrap()
        };

        let device = TestDevice::Cuda(self.stream.clone());
        let (q_len, k_len) = (sets * q_rows * heads * groups * dim, sets * tokens * heads * dim);
        let (q, k) = (random::<T>(self.stream, q_len, 1), random::<T>(self.stream, k_len, 2));
        let listed: Vec<i32> = (0..queries as i32).map(|i| 256 * i + 100).collect();
        let masked: Vec<i32> = listed.iter().map(|row| tokens as i32 - q_rows as i32 + row).collect();
        let (rows, masked) = (Buffer::of(&device, &listed, 0), Buffer::of(&device, &masked, 0));
        let scores = RefCell::new(Buffer::<f32>::poisoned(&device, sets * heads * tokens, 0));
        let auto = plan(sets, ImportanceVariant::Auto);
        let variants = [("", ImportanceVariant::Auto), ("@portable", ImportanceVariant::Portable)];
        let variants = &variants[..if auto.schedule().hopper { 2 } else { 1 }];
        for &(suffix, variant) in variants {
            let (full, empty) = (plan(sets, variant), plan(0, variant));
            let workspace = full.workspace_bytes() as usize;
            let workspace = RefCell::new(Buffer::<u8>::poisoned(&device, workspace, 0));
            let run = |plan: &Importance<T>| {
                let (mut scores, mut workspace) = (scores.borrow_mut(), workspace.borrow_mut());
                let args = ImportanceArgs {
                    pages: None,
                    q: view(&q, self.stream, q_len),
                    k: view(&k, self.stream, k_len),
                    scores: scores.output(),
                    rows: self.shape.listed.then(|| rows.input()),
                    masked: self.shape.listed.then(|| masked.input()),
                    lengths: None,
                    lse: None,
                    workspace: Some(workspace.output()),
                };
                plan.run(self.stream, args).unwrap();
            };
            let traffic = full.traffic();
            let name = format!("{}{suffix}", self.shape.name);
            if !suffix.is_empty() {
                let mut group = self.criterion.benchmark_group("importance");
                support::time_graph(&mut group, self.stream, &name, || run(&full));
                continue;
            }
            let name = ("importance", name.as_str(), traffic.read + traffic.written);
            support::time(self.criterion, self.stream, name, || run(&full), || run(&empty));
        }
    }
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("importance") {
        let dtype = dtype(&shape.dtype);
        for_floats(dtype, dtype, Bench { criterion: &mut criterion, stream: &stream, shape });
    }
    criterion.final_summary();
}

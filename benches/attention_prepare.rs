//! Prepare on the shapes of `benches/shapes.json`: queries, keys and values are views of one packed projection.
//! `benches/support` says what the modes time.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::DeviceInfo;
use nextscale::attention::{AppendAt, Norm, Positions, Prepare, PrepareArgs, Rope};
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::dtype::Float;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, ForFloats, TestDevice, dtype, for_floats};

#[derive(Deserialize)]
struct Shape {
    name: String,
    batch: usize,
    rows: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    cache_rows: usize,
    append_at: usize,
    #[serde(rename = "in")]
    input: String,
    out: String,
    norm: String,
    rope: String,
    full_table: bool,
}

struct Bench<'a> {
    criterion: &'a mut Criterion,
    stream: &'a Arc<CudaStream>,
    shape: &'a Shape,
}

impl ForFloats for Bench<'_> {
    fn call<I: Float, O: Float>(self) {
        let Shape { batch, rows, heads, kv_heads, dim, cache_rows, append_at, full_table, .. } = *self.shape;
        let norm = match self.shape.norm.as_str() {
            "none" => Norm::None,
            "l2" => Norm::L2 { eps: 1e-12 },
            "rms" => Norm::Rms { eps: 1e-6 },
            other => panic!("no norm {other}"),
        };
        let rope = match self.shape.rope.as_str() {
            "none" => None,
            "interleaved" => Some(Rope::interleaved(cache_rows)),
            "half" => Some(Rope::half(cache_rows)),
            other => panic!("no rope {other}"),
        };
        let rope = rope.map(|rope| if full_table { rope.full_table() } else { rope });
        let token = (heads + 2 * kv_heads) * dim;
        let builder = |rows: usize| {
            let strides = [(rows * token) as i64, token as i64, dim as i64];
            let builder = Prepare::<I, O, O>::builder(dim).batch(batch).rows(rows).norm(norm);
            let builder = builder.q(heads).k(kv_heads, cache_rows).v(kv_heads, cache_rows);
            let builder = builder.q_strides(strides).k_strides(strides).v_strides(strides);
            match rope {
                Some(rope) => builder.rope(rope),
                None => builder,
            }
        };
        let plan = builder(rows).build(&DeviceInfo::of(self.stream).unwrap()).unwrap();
        let empty = builder(0).build(&DeviceInfo::H200).unwrap();

        let device = TestDevice::Cuda(self.stream.clone());
        let mut rng = StdRng::seed_from_u64(1);
        let mut random = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let packed: Vec<I> = random(batch * rows * token).into_iter().map(I::from_f32).collect();
        let packed = Buffer::of(&device, &packed, 0);
        let [cos, sin] = [0, 1].map(|_| Buffer::of(&device, &random(cache_rows * dim), 0));
        let [q_weight, k_weight] = [0, 1].map(|_| Buffer::of(&device, &random(dim), 0));
        let multiplier = Buffer::of(&device, &random(heads), 0);
        let poisoned = |len| Buffer::<O>::poisoned(&device, len, 0);
        let cache = batch * cache_rows * kv_heads * dim;
        let outs = RefCell::new([poisoned(batch * rows * heads * dim), poisoned(cache), poisoned(cache)]);

        let (k_first, v_first) = (heads * dim, (heads + kv_heads) * dim);
        let run = |plan: &Prepare<I, O, O>| {
            let [q_out, k_cache, v_cache] = &mut *outs.borrow_mut();
            let all = packed.input().len();
            let args = PrepareArgs {
                q: Some(packed.input()),
                k: Some(packed.input_from(k_first, all - k_first)),
                v: Some(packed.input_from(v_first, all - v_first)),
                q_out: Some(q_out.output()),
                k_cache: Some(k_cache.output()),
                v_cache: Some(v_cache.output()),
                q_weight: (self.shape.norm == "rms").then(|| q_weight.input()),
                k_weight: (self.shape.norm == "rms").then(|| k_weight.input()),
                q_multiplier: (self.shape.norm == "l2").then(|| multiplier.input()),
                cos: rope.map(|_| cos.input()),
                sin: rope.map(|_| sin.input()),
                positions: Positions::Appended,
                append_at: AppendAt::Row(append_at as u64),
                flags: None,
            };
            plan.run(self.stream, args).unwrap();
        };
        let moved = batch * rows * token * (size_of::<I>() + size_of::<O>());
        let name = ("attention_prepare", self.shape.name.as_str(), moved as u64);
        support::time(self.criterion, self.stream, name, || run(&plan), || run(&empty));
    }
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("attention_prepare") {
        let bench = Bench { criterion: &mut criterion, stream: &stream, shape };
        for_floats(dtype(&shape.input), dtype(&shape.out), bench);
    }
    criterion.final_summary();
}

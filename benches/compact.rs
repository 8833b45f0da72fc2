//! The compaction on the shapes of `benches/shapes.json`. `benches/support` says what the modes time.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::DeviceInfo;
use nextscale::compression::{Compact, CompactArgs, RopePairs, Turn};
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::dtype::Float;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, ForFloats, TestDevice, dtype, for_floats};

#[derive(Deserialize)]
struct Shape {
    name: String,
    sets: usize,
    heads: usize,
    dim: usize,
    tokens: usize,
    kept: usize,
    #[serde(rename = "in")]
    input: String,
    out: String,
    in_place: bool,
    turn: bool,
}

struct Bench<'a> {
    criterion: &'a mut Criterion,
    stream: &'a Arc<CudaStream>,
    shape: &'a Shape,
}

impl ForFloats for Bench<'_> {
    fn call<I: Float, O: Float>(self) {
        let Shape { sets, heads, dim, tokens, kept, in_place, turn, .. } = *self.shape;
        let info = DeviceInfo::of(self.stream).unwrap();
        let plan = |sets| {
            let mut builder = Compact::<I, O>::builder(sets, heads, tokens, kept).k(dim).v(dim);
            if in_place {
                builder = builder.in_place();
            }
            if turn {
                let turn = Turn { pairs: RopePairs::Half, rotary_dim: dim, table_rows: tokens, table_stride: None };
                builder = builder.renumber(0).turn(turn);
            }
            builder.build(&info).unwrap()
        };
        let (plan, empty) = (plan(sets), plan(0));
        let device = TestDevice::Cuda(self.stream.clone());
        let mut rng = StdRng::seed_from_u64(1);
        let values: Vec<I> = (0..1 << 20).map(|_| I::from_f32(rng.random_range(-1.0..1.0))).collect();
        let len = sets * tokens * heads * dim;
        let cache = |len: usize| values.iter().copied().cycle().take(len).collect::<Vec<I>>();
        let inputs = [0, 1].map(|_| Buffer::of(&device, &cache(if in_place { 0 } else { len }), 0));
        let out_len = sets * if in_place { tokens } else { kept } * heads * dim;
        let outs = RefCell::new([0, 1].map(|_| Buffer::<O>::poisoned(&device, out_len, 0)));
        // A random choice of the kept, each list its own: every token is kept with the same probability.
        let mut indices = Vec::with_capacity(sets * heads * kept);
        for _ in 0..sets * heads {
            let mut left = kept;
            for token in 0..tokens {
                if rng.random_range(0..tokens - token) < left {
                    indices.push(token as i32);
                    left -= 1;
                }
            }
        }
        let indices = Buffer::of(&device, &indices, 0);
        let table = Buffer::of(&device, &vec![0.7f32; if turn { tokens * dim / 2 } else { 0 }], 0);
        let run = |plan: &Compact<I, O>| {
            let [k_out, v_out] = &mut *outs.borrow_mut();
            let mut args = CompactArgs::<I, O>::of(indices.input());
            args.k = (!in_place).then(|| inputs[0].input());
            args.v = (!in_place).then(|| inputs[1].input());
            args.k_out = Some(k_out.output());
            args.v_out = Some(v_out.output());
            args.cos = turn.then(|| table.input());
            args.sin = turn.then(|| table.input());
            plan.run(self.stream, args).unwrap();
        };
        let traffic = plan.traffic();
        let name = ("compact", self.shape.name.as_str(), traffic.read + traffic.written);
        support::time(self.criterion, self.stream, name, || run(&plan), || run(&empty));
    }
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("compact") {
        let bench = Bench { criterion: &mut criterion, stream: &stream, shape };
        for_floats(dtype(&shape.input), dtype(&shape.out), bench);
    }
    criterion.final_summary();
}
